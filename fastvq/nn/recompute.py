"""Activation checkpointing runs a forward twice; the second run must repeat the first and learn nothing."""

from __future__ import annotations

import torch


def recomputing() -> bool:
    """Whether this call runs inside a backward pass, where a checkpointed forward is run again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
