"""An exported quantiser in onnxruntime gives the indices of the reference, near ties and NaN too."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import fastvq

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
import fastvq.onnx  # noqa: E402

DIM, CODES = 6, 40


class Function(nn.Module):
    """A function of fastvq of rows and codes."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        self.name, self.options = name, options

    def forward(self, x: Tensor, codes: Tensor) -> Any:
        return getattr(fastvq, self.name)(x, codes, **self.options)


def exported(module: nn.Module, *inputs: Tensor, batch: int = 0) -> Any:
    """Runs the module, exported with a dynamic dimension `batch` of x, in onnxruntime: tensors in, tensors out."""
    dynamic = {batch: torch.export.Dim("batch", min=1, max=1 << 16)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            inputs,
            dynamo=True,
            custom_translation_table=fastvq.onnx.translation_table(),
            dynamic_shapes=(dynamic, *[{}] * (len(inputs) - 1)),
            verbose=False,
        )
        file = io.BytesIO()
        program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())

    def run(*inputs: Tensor) -> list[Tensor]:
        named = {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), inputs, strict=True)}
        return [torch.from_numpy(numpy.asarray(value)) for value in session.run(None, named)]

    return run


def family(name: str, codes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows and codes that are hard in one way or another."""
    x, c = torch.randn(300, DIM, generator=generator), torch.randn(codes, DIM, generator=generator)
    if name == "offset":
        x, c = x + 1000, c + 1000
    elif name == "near ties":
        c = c[:1] + 1e-7 * c
    elif name == "duplicates":
        c = c[torch.randint(min(5, codes), (codes,), generator=generator)]
    elif name == "on a grid":
        x, c = x.round(), c.round()
    elif name == "tiny codes":
        c = c / codes / 1000
    elif name == "large":
        x, c = x * 1e19, c * 1e19
    elif name == "subnormal":
        x, c = x * 1e-42, c * 1e-42
    elif name == "not finite":
        x[3, 1], x[4], c[2, 0], c[7] = torch.nan, torch.inf, torch.nan, torch.inf
        x[5, 2] = -torch.inf
    return x, c


FAMILIES = ["gaussian", "offset", "near ties", "duplicates", "on a grid", "tiny codes", "large", "subnormal"]


@pytest.mark.parametrize(("metric", "codes"), [("euclidean", 1), ("euclidean", 9), ("euclidean", 40), ("dot", 40)])
def test_search_gives_the_canonical_code(metric: str, codes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    run = exported(Function("search", metric=metric, return_distance=True), *family("gaussian", codes, generator))
    for name in FAMILIES if codes == 1 else [*FAMILIES, "not finite"]:
        x, c = family(name, codes, generator)
        for rows in (x, x[:1]):
            index, distance = run(rows, c)
            wanted, right = fastvq.search(rows, c, metric=metric, return_distance=True, backend="reference")
            assert torch.equal(index, wanted), name
            distance = torch.where(right.isnan(), right, distance)
            torch.testing.assert_close(distance, right, rtol=1e-6, atol=1e-44, equal_nan=True, msg=name)


def test_a_weaker_proof_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes that float64 rounding alone tells apart: without the bound the screen's choice stands, and is wrong."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, DIM, generator=generator, dtype=torch.float64) + 1000
    c = torch.ones(1, DIM, dtype=torch.float64) + 1e-15 * torch.randn(CODES, DIM, generator=generator).double()
    wanted = fastvq.search(x, c, backend="reference")
    assert torch.equal(exported(Function("search"), x, c)(x, c)[0], wanted)
    monkeypatch.setattr(fastvq.onnx, "_ROUNDING", -1.0)
    assert not torch.equal(exported(Function("search"), x, c)(x, c)[0], wanted)


@pytest.mark.parametrize(("heads", "dtype"), [(2, torch.float32), (0, torch.float16), (0, torch.float64)], ids=str)
def test_functions(heads: int, dtype: torch.dtype) -> None:
    lead = (heads,) if heads else ()
    x = torch.randn(*lead, 5, 9, DIM).to(dtype)
    c = torch.randn(*lead, CODES, DIM).to(dtype)
    for name, codes in (("vector_quantize", c), ("residual_quantize", torch.stack([c, c / 2, c / 4], -3))):
        run = exported(Function(name), x, codes, batch=len(lead))
        other = torch.randn(*lead, 11, 9, DIM).to(dtype)
        found, wanted = run(other, codes), getattr(fastvq, name)(other, codes)
        assert torch.equal(found[1], wanted[1])
        assert torch.equal(found[0], wanted[0])
        torch.testing.assert_close(found[2], wanted[2].to(found[2].dtype), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "module",
    [
        fastvq.VectorQuantize(DIM, CODES, use_cosine_sim=True),
        fastvq.VectorQuantize(DIM, CODES, heads=2, codebook_dim=3),
        fastvq.VectorQuantize(DIM, CODES, heads=2, separate_codebook_per_head=True, codebook_dim=4),
        fastvq.VectorQuantize(DIM, CODES, accept_image_fmap=True, codebook_dim=4),
        fastvq.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=3, codebook_dim=4),
        fastvq.SimVQ(dim=DIM, codebook_size=CODES, channel_first=False),
    ],
    ids=lambda module: f"{type(module).__name__}",
)
def test_layers(module: nn.Module) -> None:
    """The projections run in another library, which may round otherwise: only where there are none is all exact."""
    torch.manual_seed(0)
    shape = (DIM, 4, 5) if getattr(module, "accept_image_fmap", False) else (9, DIM)
    run = exported(module, torch.randn(3, *shape))
    x = torch.randn(17, *shape)
    found, wanted = run(x), module(x)
    assert torch.equal(found[1], wanted[1])
    torch.testing.assert_close(found[0], wanted[0].detach(), rtol=1e-5, atol=1e-5)
