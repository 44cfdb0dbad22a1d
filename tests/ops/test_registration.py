"""The operators as torch sees them: opcheck, fake tensors, torch.compile, torch.export."""

import pytest
import torch
import torch._dynamo.testing
from compare import assert_same_bits, assert_same_indices
from families import DTYPES, make
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import fastvq

ops = torch.ops.fastvq
HEADS = pytest.mark.parametrize("heads", [None, 2])


def data(dtype="float32", heads=None, stages=None):
    """x, codebook(s) and mask, a dimension of rows more than needed."""
    x, codebook = make("gaussian", 12, 7, 5, dtype, heads=heads)
    x = x.reshape(*x.shape[:-2], 3, 4, 5)
    if stages:
        codebook = torch.stack([codebook / (s + 1) for s in range(stages)], dim=-3)
    return x, codebook, torch.rand(x.shape[:-1]) < 0.7


def calls(dtype="float32", heads=None):
    """Every operator with arguments it takes, as (operator, arguments)."""
    x, codebook, mask = data(dtype, heads)
    codebooks = data(dtype, heads, stages=3)[1]
    indices = torch.randint(7, x.shape[:-1])
    size, average = codebook[..., 0].abs() + 1, torch.randn_like(codebook)
    stage_indices = torch.randint(7, (*x.shape[:-1], 3))
    upstream, loss, losses = torch.randn_like(x), torch.randn(()), torch.randn(3)
    return {
        "search": (x, codebook, "euclidean", True, "exact", None),
        "search without distances": (x, codebook, "dot", False, "fast", None),
        "vector_quantize": (x, codebook, "euclidean", 0.5, 1.5, mask, None),
        "vector_quantize without mask": (x, codebook, "cosine", 1.0, 0.0, None, None),
        "vector_quantize_counted": (x, codebook, "euclidean", 0.5, 1.5, mask, None),
        "vector_quantize_backward": (upstream, loss, x, codebook, indices, mask, 0.5, 1.5, True, True, None),
        "vector_quantize_backward to x": (upstream, loss, x, codebook, indices, None, 0.5, 1.5, True, False, None),
        "code_sums": (x, indices, 7, mask, heads is not None, None),
        "ema_update_": (codebook, size, average, size.clone(), average.clone(), 0.9, 1e-5, None),
        "ema_step_": (codebook, size, average, torch.empty_like(size), x, indices, mask, 0.9, 1e-5, None),
        "residual_quantize": (x, codebooks, "euclidean", None),
        "residual_quantize_backward": (upstream, losses, x, codebooks, stage_indices, True, True, None),
        "residual_quantize_backward to codebooks": (upstream, losses, x, codebooks, stage_indices, False, True, None),
    }


NAMES = list(calls())


def operator(name):
    return getattr(ops, name.split()[0]).default


def on(backend, arguments):
    return (*arguments[:-1], backend)


@HEADS
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(backend, name, heads):
    arguments = on(backend, calls(heads=heads)[name])
    if name.startswith(("vector_quantize", "residual_quantize")) and "backward" not in name:
        arguments = tuple(
            a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments
        )
    opcheck(operator(name), arguments)


def test_opcheck_of_the_copy_that_compilers_leave_alone():
    x = torch.randn(3, 4, requires_grad=True)
    opcheck(ops.copied.default, (x,))
    copy = ops.copied(x)
    copy.sum().backward()
    assert copy.data_ptr() != x.data_ptr()
    assert_same_bits(copy, x)
    assert_same_bits(x.grad, torch.ones(3, 4))


def test_opcheck_of_what_layers_call(backend):
    x, _, _ = data()
    opcheck(ops.finite_code_sums.default, (x, torch.randint(7, x.shape[:-1]), 7, None, True, backend))
    codebooks = data(stages=3)[1]
    indices = torch.randint(7, (*x.shape[:-1], 3))
    opcheck(ops.residual_code_sums.default, (x, codebooks, indices, backend))
    for codes, of_stages in ((codebooks, indices), (torch.randn_like(x), None)):
        opcheck(ops.rotate_back.default, (torch.randn_like(x), x, codes, of_stages, backend))


@HEADS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_fake_outputs_have_the_shapes_dtypes_and_strides_of_real_ones(backend, name, dtype, heads):
    arguments = on(backend, calls(dtype, heads)[name])
    with FakeTensorMode() as mode:
        fake_arguments = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        fake = operator(name)(*fake_arguments)
    real = operator(name)(*arguments)
    for found, right in zip(*(r if isinstance(r, tuple) else () for r in (fake, real)), strict=True):
        assert found.dtype == right.dtype
        assert found.shape == right.shape
        assert found.stride() == right.stride() or found.numel() == 0
        assert found.device == right.device


@pytest.mark.parametrize("name", NAMES)
def test_meta_tensors_give_meta_tensors(name):
    arguments = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in calls()[name]]
    results = operator(name)(*arguments) or ()
    assert all(r.is_meta for r in results)


def test_no_operator_returns_its_inputs(backend):
    for name in NAMES:
        arguments = on(backend, calls()[name])
        memory = {a.untyped_storage().data_ptr() for a in arguments if isinstance(a, torch.Tensor)}
        for result in operator(name)(*arguments) or ():
            assert result.numel() == 0 or result.untyped_storage().data_ptr() not in memory, name


# ---- torch.compile ----------------------------------------------------------------------------------------------


def training_step(x, codebook, cluster_size, embed_avg, mask, codebooks):
    """All functions, as layers would call them."""
    quantized, indices, loss = fastvq.vector_quantize(x, codebook, codebook_weight=0.5, mask=mask)
    counts, sums = fastvq.code_sums(x, indices, codebook.shape[0], mask=mask)
    with torch.no_grad():
        fresh = codebook.clone()
        fastvq.ema_update_(fresh, cluster_size, embed_avg, counts, sums, decay=0.9)
        fastvq.ema_step_(fresh, cluster_size, embed_avg, x, indices, decay=0.9)
    nearest, distances = fastvq.search(quantized, fresh, return_distance=True)
    residual, stages, losses = fastvq.residual_quantize(x * 2, codebooks)
    again, _, learnt, taken = fastvq.vector_quantize(x, codebook, codebook_weight=1.0, mask=mask, return_counts=True)
    total = (quantized * 3).sum() + loss + (residual * x).sum() + losses.sum() + (again * x).sum() + learnt
    return total, (quantized, indices, loss, fresh, nearest, distances, residual, stages, losses, taken)


def inputs(requires_grad=True):
    x, codebook, mask = data()
    codebooks = data(stages=3)[1]
    cluster_size, embed_avg = torch.ones(7), codebook.clone()
    if requires_grad:
        x.requires_grad_()
        codebook.requires_grad_()
    return x, codebook, cluster_size, embed_avg, mask, codebooks


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_without_a_graph_break_the_results_are_the_same(backend, compiler):
    torch._dynamo.reset()
    compiled = torch.compile(training_step, fullgraph=True, backend=compiler)
    outcomes = []
    for function in (training_step, compiled):
        torch.manual_seed(0)
        arguments = inputs()
        with fastvq.use_backend(backend):
            total, outputs = function(*arguments)
            grads = torch.autograd.grad(total, arguments[:2])
        outcomes.append((*outputs, *grads, arguments[2], arguments[3]))
    for plain, fast in zip(*outcomes, strict=True):
        if plain.dtype == torch.int64:
            assert_same_indices(fast, plain)
        else:
            torch.testing.assert_close(fast, plain)


def test_compiled_for_any_number_of_rows(backend):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, codebook: fastvq.vector_quantize(x, codebook, backend=backend),
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    codebook = torch.randn(7, 5)
    compiled(torch.randn(9, 5), codebook)
    compilations = counter.frame_count
    for n in (9, 12, 31, 100):
        x = torch.randn(n, 5)
        for found, right in zip(compiled(x, codebook), fastvq.vector_quantize(x, codebook), strict=True):
            assert_same_bits(found, right)
    assert counter.frame_count == compilations


def test_compiled_code_refuses_what_eager_code_refuses():
    torch._dynamo.reset()
    compiled = torch.compile(fastvq.search, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="x must have D = 6"):
        compiled(torch.randn(3, 5), torch.randn(7, 6))


# ---- torch.export -----------------------------------------------------------------------------------------------


class Tokeniser(torch.nn.Module):
    """What people export: a codebook and the way there and back."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codebook", torch.randn(40, 6))
        self.register_buffer("codebooks", torch.randn(3, 40, 6))

    def forward(self, x):
        quantized, indices, _ = fastvq.vector_quantize(x, self.codebook)
        _, stages, losses = fastvq.residual_quantize(x, self.codebooks)
        counts, _ = fastvq.code_sums(x, indices, 40)
        return quantized, indices, fastvq.search(x, self.codebook, metric="dot"), stages, losses, counts


def test_exported_with_any_number_of_rows(backend, tmp_path):
    module = Tokeniser()
    rows = torch.export.Dim("rows", min=2, max=10_000)
    with fastvq.use_backend(backend):
        program = torch.export.export(module, (torch.randn(9, 6),), dynamic_shapes={"x": {0: rows}})
        torch.export.save(program, tmp_path / "tokeniser.pt2")
        loaded = torch.export.load(tmp_path / "tokeniser.pt2").module()
        for n in (2, 9, 333):
            x = torch.randn(n, 6)
            for found, right in zip(loaded(x), module(x), strict=True):
                assert_same_bits(found, right)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {
        f"fastvq.{name}.default" for name in ("search", "vector_quantize", "residual_quantize", "code_sums")
    } <= names
