"""The modules: state and policy over the operators of `fastvq.functional`, under the names people already use."""

from fastvq.nn.binary_mapper import BinaryMapper
from fastvq.nn.evo_lfq import EvoLFQ
from fastvq.nn.fsp import FSP
from fastvq.nn.fsq import FSQ
from fastvq.nn.hierarchical_vq import HierarchicalVQ
from fastvq.nn.latent_quantize import LatentQuantize
from fastvq.nn.lfq import LFQ
from fastvq.nn.random_projection import RandomProjectionQuantizer
from fastvq.nn.residual_fsq import GroupedResidualFSQ, ResidualFSQ
from fastvq.nn.residual_lfq import GroupedResidualLFQ, ResidualLFQ
from fastvq.nn.residual_vq import GroupedResidualVQ, ResidualVQ
from fastvq.nn.sim_vq import ResidualSimVQ, SimVQ
from fastvq.nn.vector_quantize import VectorQuantize

__all__ = [
    "FSP",
    "FSQ",
    "LFQ",
    "BinaryMapper",
    "EvoLFQ",
    "GroupedResidualFSQ",
    "GroupedResidualLFQ",
    "GroupedResidualVQ",
    "HierarchicalVQ",
    "LatentQuantize",
    "RandomProjectionQuantizer",
    "ResidualFSQ",
    "ResidualLFQ",
    "ResidualSimVQ",
    "ResidualVQ",
    "SimVQ",
    "VectorQuantize",
]
