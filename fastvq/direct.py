"""Operators called past torch's dispatcher where nothing listens there.

The dispatcher and what it wraps round a gradient written in Python take as long as quantising a hundred rows. They
serve whoever traces, transforms, records or wraps tensors, each of whom shows in what `unobserved` looks at. The names
with an underscore are those that torch's own Python code for operators uses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

_keys = torch._C._dispatch_keys
_included = torch._C._dispatch_tls_local_include_set
_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_AUTOGRAD = torch._C.DispatchKey.AutogradOther  # excluded with all of autograd
with ThreadPoolExecutor(1) as _fresh:  # the thread that imports this may be in some mode
    _PLAIN_THREAD = _fresh.submit(lambda: _included().raw_repr()).result()

_plain: set[int] = set()  # what the dispatcher knows of tensors of which it knows but where they lie


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is one of those, of a kind that was not met before."""
    if tensor.device.type not in ("cpu", "cuda") or _keys(tensor).has(torch._C.DispatchKey.Python):
        return False
    with torch.inference_mode():
        inferred = torch.empty(0, device=tensor.device)
    kinds = {_keys(t).raw_repr() for t in (torch.empty(0, device=tensor.device), inferred)}
    _plain.update(kinds)
    return _keys(tensor).raw_repr() in kinds


def unobserved(*tensors: Tensor | None) -> bool:
    """Whether an operator called with these, by code that is not being compiled, would lead to its kernel alone.

    Not so under torch.func's transforms, any mode of torch_function or torch_dispatch (fake tensors, make_fx, a default
    device), the profiler of this thread and inference mode, nor with a subclass of Tensor that asks to be told, or one
    that holds other values than its memory: conjugate or negative by a flag, zeros without memory. Torch does not tell
    of other observers of its calls, a profiler of all threads or an execution trace, nor of kernels that others have
    registered for the operator: for these call `torch.ops.fastvq`.
    """
    if torch.autograd._profiler_enabled() or has_torch_function(tensors):
        return False
    if _included().raw_repr() != _PLAIN_THREAD:
        return False
    for tensor in tensors:
        if tensor is not None and _keys(tensor).raw_repr() not in _plain and not _is_plain(tensor):
            return False
    return True


class Operator:
    """An operator of `torch.ops.fastvq` without a gradient, called as those are.

    Args:
        name: of the operator.
        run: its implementation below autograd, with the same arguments.
    """

    def __init__(self, name: str, run: Callable[..., Any]) -> None:
        self._dispatched = getattr(torch.ops.fastvq, name).default
        types = [str(argument.type) for argument in self._dispatched._schema.arguments]
        self._tensors = tuple(i for i, kind in enumerate(types) if "Tensor" in kind)
        self._writes = self._dispatched._schema.is_mutable
        self.run = run

    def _observed(self, arguments: tuple[Any, ...]) -> bool:
        return torch.compiler.is_dynamo_compiling() or not unobserved(*[arguments[i] for i in self._tensors])

    def __call__(self, *arguments: Any) -> Any:
        """As the operator of torch; one that writes to its arguments does so whether or not they have a gradient."""
        if self._observed(arguments):
            with torch.no_grad() if self._writes else contextlib.nullcontext():
                return self._dispatched(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return self.run(*arguments)


class Differentiable(Operator):
    """An operator with a gradient.

    Args:
        name, run: as for `Operator`.
        setup: what its gradient needs of them, as `torch.library.register_autograd` takes it.
        backward: the gradient, likewise.
    """

    def __init__(
        self, name: str, run: Callable[..., Any], setup: Callable[..., None], backward: Callable[..., Any]
    ) -> None:
        super().__init__(name, run)

        def forward(ctx: Any, *arguments: Any) -> Any:
            output = run(*arguments)
            setup(ctx, arguments, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        function: type[torch.autograd.Function] = type(f"fastvq_{name}", (torch.autograd.Function,), methods)
        # Not Function's own `apply`: it looks for transforms of torch.func, which `unobserved` has seen.
        parent: Any = super(torch.autograd.Function, function)
        self._apply = parent.apply

    def __call__(self, *arguments: Any) -> Any:
        """As the operator of torch."""
        if self._observed(arguments):
            return self._dispatched(*arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments) and not _excluded(_AUTOGRAD):
            return self._apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return self.run(*arguments)
