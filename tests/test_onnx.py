"""An exported quantiser in onnxruntime gives the indices of the reference, near ties and NaN too."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import fastvq
from fastvq.measure.memory import measurable
from fastvq.measure.worker import RETURN_MEMORY

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


def program(module: nn.Module, *inputs: Tensor, batch: int = 0) -> bytes:
    """The module, exported with a dynamic dimension `batch` of x."""
    dynamic = {batch: torch.export.Dim("batch", min=1, max=1 << 16)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            module.eval(),
            inputs,
            dynamo=True,
            custom_translation_table=fastvq.onnx.translation_table(),
            dynamic_shapes=(dynamic, *[{}] * (len(inputs) - 1)),
            verbose=False,
        )
        file = io.BytesIO()
        exported.save(file)
    return file.getvalue()


def exported(module: nn.Module, *inputs: Tensor, batch: int = 0) -> Any:
    """Runs the module in onnxruntime: tensors in, tensors out."""
    session = onnxruntime.InferenceSession(program(module, *inputs, batch=batch))

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


@pytest.mark.parametrize(
    ("metric", "codes", "block"),
    [("euclidean", 1, 0), ("euclidean", 9, 0), ("euclidean", 40, 0), ("dot", 40, 0), ("euclidean", 40, 13)],
)
def test_search_gives_the_canonical_code(metric: str, codes: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    if block:
        monkeypatch.setattr(fastvq.onnx, "_BLOCK", block)
    run = exported(Function("search", metric=metric, return_distance=True), *family("gaussian", codes, generator))
    for name in FAMILIES if codes == 1 else [*FAMILIES, "not finite"]:
        x, c = family(name, codes, generator)
        for rows in (x, x[:1], x[:0]):
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
        fastvq.GroupedResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=2, groups=2),
        fastvq.SimVQ(dim=DIM, codebook_size=CODES, channel_first=False),
        fastvq.FSQ(levels=[8, 5, 5, 5, 3, 4]),
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


PEAK = """
import sys, numpy, onnxruntime
from fastvq.measure.memory import peak_mib
options = onnxruntime.SessionOptions()
options.enable_cpu_mem_arena = False  # it keeps twice what is asked for
session = onnxruntime.InferenceSession(sys.argv[1], options)
x, codes = (numpy.random.rand(n, 4).astype("float32") for n in (2000, 20_000))
names = [entry.name for entry in session.get_inputs()]
run = lambda x, codes: session.run(None, dict(zip(names, (x, codes))))
run(x[:9], codes)
print(peak_mib(lambda: run(x, codes)), peak_mib(lambda: run(x, codes[:4].repeat(5000, 0))))
"""


@pytest.mark.skipif(not measurable(), reason="this system does not tell its peak memory")
def test_no_matrix_of_rows_and_codes(tmp_path: Path) -> None:
    """Neither where the screen proves all rows nor where it proves none: codes are taken in blocks."""
    (tmp_path / "search.onnx").write_bytes(program(Function("search"), torch.randn(9, 4), torch.randn(20_000, 4)))
    command = [sys.executable, "-c", PEAK, str(tmp_path / "search.onnx")]
    output = subprocess.run(command, env={**os.environ, **RETURN_MEMORY}, check=True, capture_output=True, text=True)
    assert max(map(float, output.stdout.split())) < 2000 * 20_000 * 8 / 2**20 / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_layers(dtype: torch.dtype) -> None:
    """numpy has no bfloat16, so the layer stands between two casts."""

    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = fastvq.VectorQuantize(DIM, CODES)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            quantized, indices, _ = self.layer(x.to(dtype))
            return quantized.float(), indices

    module = Narrow().eval()
    run = exported(module, torch.randn(3, 9, DIM))
    x = torch.randn(17, 9, DIM)
    for found, wanted in zip(run(x), module(x), strict=True):
        assert torch.equal(found, wanted)
