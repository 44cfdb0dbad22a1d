"""fastvq: vector quantisation for PyTorch; the exact nearest code, fast, without an N x K matrix."""

from fastvq.backends.select import BackendUnavailableError, use_backend
from fastvq.functional import code_sums, ema_step_, ema_update_, residual_quantize, search, vector_quantize
from fastvq.interop import PatchReport, patch, unpatch
from fastvq.nn import (
    FSP,
    FSQ,
    LFQ,
    BinaryMapper,
    EvoLFQ,
    GroupedResidualFSQ,
    GroupedResidualLFQ,
    GroupedResidualVQ,
    HierarchicalVQ,
    LatentQuantize,
    RandomProjectionQuantizer,
    ResidualFSQ,
    ResidualLFQ,
    ResidualSimVQ,
    ResidualVQ,
    SimVQ,
    VectorQuantize,
)
from fastvq.warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "FSP",
    "FSQ",
    "LFQ",
    "BackendUnavailableError",
    "BinaryMapper",
    "EvoLFQ",
    "GroupedResidualFSQ",
    "GroupedResidualLFQ",
    "GroupedResidualVQ",
    "HierarchicalVQ",
    "LatentQuantize",
    "PatchReport",
    "RandomProjectionQuantizer",
    "ResidualFSQ",
    "ResidualLFQ",
    "ResidualSimVQ",
    "ResidualVQ",
    "SimVQ",
    "VectorQuantize",
    "code_sums",
    "ema_step_",
    "ema_update_",
    "patch",
    "residual_quantize",
    "search",
    "unpatch",
    "use_backend",
    "vector_quantize",
    "warmup",
]
