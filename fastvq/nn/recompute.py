"""Activation checkpointing runs a forward twice; the second run must repeat the first and learn nothing."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def recomputing() -> bool:
    """Whether this call runs inside a backward pass, where a checkpointed forward is run again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def apart() -> torch.autograd.graph.saved_tensors_hooks:
    """A context for a graph that ends in it: activation checkpointing neither counts nor makes again what it saves."""
    return torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)


def _hook_region() -> Any:
    """What `torch.utils.checkpoint(use_reentrant=False)` keeps of the region we are in, the same when it is recomputed.

    It is found where checkpoint's hooks on saved tensors hold it, by itself or by a weak reference.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is None:
        return None
    for cell in getattr(inspect.unwrap(hooks[0]), "__closure__", None) or ():
        held = cell.cell_contents
        held = held() if isinstance(held, weakref.ref) else held
        if hasattr(held, "recompute_fn"):
            return held
    return None


def _function_region() -> Any:
    """The context of the nearest autograd.Function that we run in: reentrant checkpointing is one."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name in ("forward", "backward") and "ctx" in frame.f_code.co_varnames:
            context = frame.f_locals.get("ctx")
            if isinstance(context, torch.autograd.function.FunctionCtx):
                return context
    return None


def _region() -> Any:
    """What stands for the checkpointed region that this call is in, in the first run and in the second; or None."""
    if torch.compiler.is_compiling():
        return None
    region = _hook_region()
    if region is None and (recomputing() or not torch.is_grad_enabled()):
        region = _function_region()
    return region


@dataclass
class _Run:
    """What one region's forward left behind, in order, and how far its recomputation has come."""

    noted: list[Any] = field(default_factory=list)
    task: int = -1  # the backward pass that recomputes it
    place: int = 0


class Recording:
    """What the forwards of a module need to be run again as they were, by checkpointed region.

    A region may call the module many times, and many regions may await their backward pass; each is recomputed in the
    order of its forward, and what is noted lives as long as the region does. Nothing is noted outside of one.
    """

    def __init__(self) -> None:
        self._runs: weakref.WeakKeyDictionary[Any, _Run] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Recording, ()  # a copied or pickled module has no forward to repeat

    def note(self, make: Callable[[], Any]) -> None:
        """In a checkpointed region, keep what `make` returns."""
        region = _region()
        if region is not None:
            self._runs.setdefault(region, _Run()).noted.append(make())

    def again(self) -> Any:
        """In a recomputation, what the first run noted at this place.

        Raises:
            RuntimeError: nothing was, or nothing tells which of several forwards this one repeats.
        """
        region = _region()
        run = None if region is None else self._runs.get(region)
        if run is None:  # regions within regions are new ones when the outer is run again
            runs = list(self._runs.values())
            if len(runs) != 1:
                raise RuntimeError(
                    f"a quantiser is recomputed in a backward pass, but {len(runs)} of its training forwards could be "
                    "the one; use torch.utils.checkpoint, and no checkpoint within another"
                )
            run = runs[0]
        task = torch._C._current_graph_task_id()
        if task != run.task:
            run.task, run.place = task, 0
        run.place += 1
        return run.noted[run.place - 1]


def generator_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """That of torch's generators, on the CPU and on `device`."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_generator_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    """Put back what `generator_state` has given."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
