"""Calls past torch's dispatcher: what they give, and who must still be told of them."""

import subprocess
import sys

import pytest
import torch
from compare import assert_same_bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastvq
from fastvq import ops

OPERATORS = ("vector_quantize", "vector_quantize_counted", "residual_quantize")


def arguments(name, requires_grad=False):
    """x, codebook(s) and the rest of a call."""
    x = torch.randn(9, 4).requires_grad_(requires_grad)
    if name == "residual_quantize":
        return x, torch.randn(3, 5, 4), "euclidean", None
    return x, torch.randn(5, 4).requires_grad_(requires_grad), "euclidean", 0.5, 1.5, torch.rand(9) < 0.7, None


@pytest.fixture
def dispatched(monkeypatch):
    """The names of the operators that went to the dispatcher, in order."""
    names = []
    for name, operator in ops.direct.items():

        def listen(*given, name=name, call=operator._dispatched):
            names.append(name)
            return call(*given)

        monkeypatch.setattr(operator, "_dispatched", listen)
    return names


@pytest.mark.parametrize("name", OPERATORS)
def test_results_and_gradients_are_those_of_the_operator(name, backend, dispatched):
    with fastvq.use_backend(backend):
        given = arguments(name, requires_grad=True)
        found = []
        for call in (ops.direct[name], getattr(torch.ops.fastvq, name).default):
            outputs = call(*given)
            assert [o.requires_grad for o in outputs] == [True, False, True, False][: len(outputs)]
            total = (outputs[0] * torch.arange(4.0)).sum() + outputs[2].sum() * 3
            leaves = [a for a in given if isinstance(a, torch.Tensor) and a.requires_grad]
            found.append([*outputs, *torch.autograd.grad(total, leaves)])
        # Direct all the way; by the dispatcher the backward operator is called alike.
        assert dispatched == []
        for direct, right in zip(*found, strict=True):
            assert_same_bits(direct.detach(), right.detach())


def learn(requires_grad=False):
    """Everything that a step without a gradient finds and writes, from the public functions."""
    generator = torch.Generator().manual_seed(0)
    x, codebook, sums = (torch.randn(size, 4, generator=generator) for size in (9, 5, 5))
    x.requires_grad_(requires_grad)
    codebook.requires_grad_(requires_grad)
    size = torch.ones(5)
    indices = fastvq.search(x, codebook)
    counts, found = fastvq.code_sums(x, indices, 5)
    fresh = fastvq.ema_step_(codebook, size, sums, x, indices, decay=0.9)
    fastvq.ema_update_(codebook, size, sums, counts, found, decay=0.5)
    return [indices, counts, found, fresh, codebook, size, sums]


NO_GRADIENT = ["search", "code_sums", "ema_step_", "ema_update_"]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_operators_without_a_gradient(requires_grad, backend, dispatched):
    with fastvq.use_backend(backend):
        direct = learn(requires_grad)
        assert dispatched == []
        with Listening():
            right = learn(requires_grad)
    assert dispatched == NO_GRADIENT
    for found, wanted in zip(direct, right, strict=True):
        assert_same_bits(found.detach(), wanted.detach())
        assert found.grad_fn is None
        assert found.requires_grad == (requires_grad and found is direct[4])


def test_transforms_of_torch_func_see_a_search(dispatched):
    x, codebook = torch.randn(2, 9, 4), torch.randn(5, 4)
    mapped = torch.func.vmap(lambda x: fastvq.search(x, codebook))(x)
    assert dispatched == ["search"]
    assert torch.equal(mapped, fastvq.search(x, codebook))


def test_without_a_gradient_to_take_none_is_recorded(dispatched):
    x, codebook, *rest = arguments("vector_quantize", requires_grad=True)
    quantize = ops.direct["vector_quantize"]
    with torch.no_grad():
        assert not any(o.requires_grad for o in quantize(x, codebook, *rest))
    with torch._C._AutoDispatchBelowAutograd():
        assert not any(o.requires_grad for o in quantize(x, codebook, *rest))
    assert not any(o.requires_grad for o in quantize(x.detach(), codebook.detach(), *rest))
    assert dispatched == []


def test_second_derivatives_are_refused(dispatched):
    x = torch.randn(9, 4, requires_grad=True)
    _, _, loss = fastvq.vector_quantize(x, torch.randn(5, 4))
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad.sum().backward()
    assert dispatched == []


class Listening(TorchDispatchMode):
    """Notes the operators of fastvq."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastvq":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


class Wrapping(TorchFunctionMode):
    """Notes the operators of fastvq, as a mode of torch functions."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "namespace", None) == "fastvq":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_operators_in_backward_too(dispatched):
    x = torch.randn(9, 4, requires_grad=True)
    with Listening() as listener:
        _, _, loss = fastvq.vector_quantize(x, torch.randn(5, 4))
        loss.backward()
    assert listener.seen == ["vector_quantize", "vector_quantize_backward"] == dispatched


def test_a_mode_of_torch_functions_sees_them(dispatched):
    with Wrapping() as listener:
        fastvq.vector_quantize(torch.randn(9, 4), torch.randn(5, 4))
    assert listener.seen == ["vector_quantize"] == dispatched


def test_the_profiler_sees_them():
    x = torch.randn(9, 4, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fastvq.vector_quantize(x, torch.randn(5, 4))[2].backward()
    names = {event.key for event in profile.key_averages()}
    assert {"fastvq::vector_quantize", "fastvq::vector_quantize_backward"} <= names


def test_tracers_see_them():
    x, codebook = torch.randn(9, 4), torch.randn(5, 4)
    graph = make_fx(lambda x: fastvq.vector_quantize(x, codebook)[0])(x).graph
    assert torch.ops.fastvq.vector_quantize.default in {node.target for node in graph.nodes}


def test_fake_and_meta_tensors_stay_so():
    x, codebook = torch.randn(9, 4), torch.randn(5, 4)
    assert fastvq.vector_quantize(x.to("meta"), codebook.to("meta"))[0].is_meta
    with FakeTensorMode() as mode:
        given = mode.from_tensor(x), mode.from_tensor(codebook)
        assert type(fastvq.vector_quantize(*given)[0]) is type(given[0])
    assert type(fastvq.vector_quantize(*given)[0]) is type(given[0])  # outside of their mode too


def test_a_subclass_is_given_to_its_own_function(dispatched):
    class Named(torch.Tensor):
        pass

    quantized, _, _ = fastvq.vector_quantize(torch.randn(9, 4).as_subclass(Named), torch.randn(5, 4))
    assert type(quantized) is Named
    assert dispatched == ["vector_quantize"]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_torch_func(dispatched):
    x, codebook = torch.randn(2, 9, 4), torch.randn(5, 4)
    mapped = torch.func.vmap(lambda x: fastvq.vector_quantize(x, codebook)[1])(x)
    assert dispatched == ["vector_quantize"]
    assert torch.equal(mapped, fastvq.vector_quantize(x, codebook)[1])
    with pytest.raises(
        RuntimeError, match="functorch transforms"
    ):  # torch has no such gradient for operators of Python
        torch.func.grad(lambda x: fastvq.vector_quantize(x, codebook)[2])(x)
    assert dispatched == ["vector_quantize"] * 2


def test_a_default_device_is_not_that_of_the_results():
    x, codebook = torch.randn(9, 4), torch.randn(5, 4)
    with torch.device("meta"):
        quantized, _, _ = fastvq.vector_quantize(x, codebook)
    assert quantized.device == x.device


def test_inference_mode_and_its_tensors(dispatched):
    x, codebook = torch.randn(9, 4), torch.randn(5, 4)
    right = fastvq.vector_quantize(x, codebook)
    with torch.inference_mode():
        inferred = x.clone(), codebook.clone()
        within = fastvq.vector_quantize(*inferred)
    assert within[0].is_inference()
    assert dispatched == ["vector_quantize"]
    for found, outside, wanted in zip(within, fastvq.vector_quantize(*inferred), right, strict=True):
        assert_same_bits(found.clone(), wanted)
        assert_same_bits(outside, wanted)
    assert dispatched == ["vector_quantize"]


def test_importing_within_a_mode_changes_nothing():
    code = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    import fastvq
from fastvq import direct
x = torch.randn(9, 4)
assert direct.unobserved(x)
with FakeTensorMode() as mode:
    assert not direct.unobserved(mode.from_tensor(x))
with torch.inference_mode():
    assert not direct.unobserved(x)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_values_that_memory_does_not_hold(dispatched):
    codebook = torch.randn(5, 4)
    z = torch.randn(9, 4, dtype=torch.complex64)
    negative = z.conj().imag
    assert negative.is_neg()
    found = fastvq.vector_quantize(negative, codebook)
    assert dispatched == ["vector_quantize"]
    for part, right in zip(found, fastvq.vector_quantize(negative.resolve_neg(), codebook), strict=True):
        assert_same_bits(part, right)
    zeros = torch._efficientzerotensor((9, 4))
    for part, right in zip(
        fastvq.vector_quantize(zeros, codebook), fastvq.vector_quantize(torch.zeros(9, 4), codebook), strict=True
    ):
        assert_same_bits(part, right)
