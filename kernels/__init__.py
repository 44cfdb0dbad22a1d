"""Triton kernels, one file an operator; installed as fastvq.kernels."""
