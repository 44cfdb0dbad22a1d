"""What every replaced quantiser must keep, whatever its library."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fastvq


def tensors(result: Any) -> Iterator[Tensor | None]:
    """The tensors of a result, in order, and its None fields."""
    if result is None or isinstance(result, Tensor):
        yield result
    else:
        for part in result.values() if isinstance(result, dict) else result:
            yield from tensors(part)


def assert_same_result(found: Any, expected: Any, rtol: float = 0, atol: float = 0) -> None:
    """The same type, None fields, shapes, dtypes and values; indices and other integers exactly."""
    assert type(found) is type(expected) or getattr(found, "_fields", None) == expected._fields
    pairs = list(zip(tensors(found), tensors(expected), strict=True))
    for ours, theirs in pairs:
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            tight = {"rtol": 0, "atol": 0} if not theirs.is_floating_point() else {"rtol": rtol, "atol": atol}
            torch.testing.assert_close(ours, theirs, equal_nan=True, **tight)


def gradients(module: nn.Module, call: Callable[[], Any]) -> list[Tensor | None]:
    """Those of every parameter, of the weighted sum of a result's floating tensors that have one."""
    module.zero_grad()
    parts = [t for t in tensors(call()) if t is not None and t.requires_grad]
    if parts:
        sum((t * torch.linspace(1, 2, t.numel()).view_as(t)).sum() for t in parts).backward()
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def check_drop_in(
    module: nn.Module,
    call: Callable[[nn.Module], Any],
    rtol: float = 0,
    atol: float = 0,
    pickles: bool = True,
) -> fastvq.PatchReport:
    """Patch, compare results and gradients, copy, pickle, unpatch, compare again; in the mode that the module is in.

    The codes must be far from ties: they are compared exactly.
    """
    classes = [type(m) for m in module.modules()]
    attributes = [set(vars(m)) for m in module.modules()]
    state = {name: (t.data_ptr(), t.clone()) for name, t in module.state_dict().items()}
    before = copy.deepcopy(module)

    def run(which: nn.Module) -> Any:
        torch.manual_seed(1)
        return call(which)

    expected, expected_gradients = run(before), gradients(before, lambda: run(before))
    report = fastvq.patch(module)
    assert report.done, report
    assert [m for m, c in zip(module.modules(), classes, strict=True) if not isinstance(m, c)] == []
    assert fastvq.patch(module).done == report.done  # patching what is patched changes nothing
    found = run(module)
    assert_same_result(found, expected, rtol, atol)
    for ours, theirs in zip(gradients(module, lambda: run(module)), expected_gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=max(rtol, 1e-5), atol=max(atol, 1e-6))
    if not module.training:
        assert {name: (t.data_ptr(), True) for name, t in module.state_dict().items()} == {
            name: (at, bool((was == module.state_dict()[name]).all())) for name, (at, was) in state.items()
        }
        twins = [copy.deepcopy(module)]
        if pickles:
            twins.append(pickle.loads(pickle.dumps(module)))
            stream = io.BytesIO()
            torch.save(module, stream)
            stream.seek(0)
            twins.append(torch.load(stream, weights_only=False))
        for twin in twins:
            assert [type(m) for m in twin.modules()] == [type(m) for m in module.modules()]
            assert_same_result(run(twin), found)
            fastvq.unpatch(twin)
            assert [type(m) for m in twin.modules()] == classes
        before.load_state_dict(module.state_dict(), strict=True)
        module.load_state_dict(before.state_dict(), strict=True)
    restored = fastvq.unpatch(module)
    assert [m.name for m in restored.done] == [m.name for m in report.done]
    assert [type(m) for m in module.modules()] == classes
    assert [set(vars(m)) for m in module.modules()] == attributes
    if not module.training:
        assert_same_result(run(module), expected)
    return report
