"""The modules: state and policy over the operators of `fastvq.functional`, under the names people already use."""

from fastvq.nn.vector_quantize import VectorQuantize

__all__ = ["VectorQuantize"]
