"""The packed codebook is kept between calls; whatever changes the codes, the next search sees it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastvq
from fastvq.measure.memory import measurable, status_kib
from fastvq.measure.worker import RETURN_MEMORY


def _by_optimizer(codebook: Tensor) -> None:
    parameter = torch.nn.Parameter(codebook)
    parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([parameter], lr=3.0).step()


def _by_address(codebook: Tensor) -> None:
    ctypes.memset(codebook.data_ptr() + 4 * codebook.shape[1], 0x3F, 4 * codebook.shape[1])


def _in_inference_mode(codebook: Tensor) -> None:
    with torch.inference_mode():
        codebook.add_(torch.arange(codebook.shape[0]).unsqueeze(1))


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda c: c.mul_(-1),
    "one element": lambda c: c[5].__setitem__(2, 40.0),
    "last element": lambda c: c[-1].__setitem__(-1, 1e-3),
    "data": lambda c: c.data.neg_(),
    "new data": lambda c: setattr(c, "data", c.flip(0).clone()),
    "numpy alias": lambda c: c.numpy().__imul__(-2),
    "view": lambda c: c.view(-1)[7:100].fill_(0.25),
    "detached": lambda c: c.detach().zero_(),
    "copy": lambda c: c.copy_(c.roll(1, 0)),
    "out argument": lambda c: torch.add(c, 1.0, out=c),
    "set": lambda c: c.set_(torch.full_like(c, 2.0).cumsum(0)),
    "foreach": lambda c: torch._foreach_mul_([c], -3.0),
    "optimizer": _by_optimizer,
    "raw memory": _by_address,
    "inference mode": _in_inference_mode,
}


def _data(seed: int, size: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(97, width, generator=generator), torch.randn(size, width, generator=generator)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("size", "width"), [(7, 5), (129, 16), (300, 33)])
def test_a_changed_codebook_is_seen(change: str, size: int, width: int) -> None:
    x, codebook = _data(size, max(size, 8), width)
    codebook = torch.cat([codebook, torch.zeros(8, width)]).clone()
    for _ in range(2):
        before = fastvq.search(x, codebook, backend="cpu")
    kept = codebook.clone()
    CHANGES[change](codebook)
    assert not torch.equal(kept, codebook), "the change must change something"
    after = fastvq.search(x, codebook, backend="cpu")
    assert torch.equal(after, fastvq.search(x, codebook, backend="reference"))
    assert torch.equal(before, fastvq.search(x, kept, backend="cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [20, 97, 700])
@pytest.mark.parametrize(("size", "width"), [(37, 5), (513, 33), (1024, 64)])
def test_one_changed_code_is_seen_wherever_it_lies(size: int, width: int, rows: int, dtype: torch.dtype) -> None:
    """Threads compare the codes while they search, each block of rows its share."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, width, generator=generator)
    codebook = torch.randn(size, width, generator=generator).to(dtype)
    found = fastvq.search(x, codebook, backend="cpu")
    for code in range(1, size, max(1, size // 40)):
        row, before = code % rows, codebook[code].clone()
        codebook[code] = x[row]
        assert fastvq.search(x, codebook, backend="cpu")[row] == code
        codebook[code] = before
        assert torch.equal(fastvq.search(x, codebook, backend="cpu"), found)


def test_codebooks_that_begin_and_end_alike_are_told_apart() -> None:
    """One is the likely codebook of the other's search, at an address of its own or at the same."""
    x, codebook = _data(7, 256, 32)
    others = [torch.cat([codebook[:1], codebook[1:-1].roll(shift, 0), codebook[-1:]]) for shift in range(4)]
    place = torch.empty_like(codebook)
    for _ in range(3):
        for other in others:
            want = fastvq.search(x, other, backend="reference")
            assert torch.equal(fastvq.search(x, other, backend="cpu"), want)
            assert torch.equal(fastvq.search(x, place.copy_(other), backend="cpu"), want)


def test_what_float32_screens_is_made_of_the_kept_codes() -> None:
    """Rows that int8 cannot screen want it, here of codes that are only likely those that are kept."""
    x, kept = torch.randn(64, 64), torch.randn(1024, 64)
    wild, likely = x.clone(), kept.clone()
    wild[::8] = torch.nan
    likely[1:-1] = torch.randn(1022, 64)
    for rows, codebook in ((x, kept), (x, kept), (wild, likely), (wild, kept), (wild, likely), (wild, kept)):
        want = fastvq.search(rows, codebook, backend="reference")
        assert torch.equal(fastvq.search(rows, codebook, backend="cpu"), want)


def test_a_reused_address_is_no_proof() -> None:
    """A codebook made where another one lay has the other's address, shape and version counter."""
    x, _ = _data(0, 128, 16)
    storage = torch.empty(128, 16)
    for seed in range(4):
        _, codes = _data(seed, 128, 16)
        codebook = torch.frombuffer(storage.numpy(), dtype=torch.float32).view(128, 16)
        codebook.copy_(codes)
        assert torch.equal(
            fastvq.search(x, codebook, backend="cpu"), fastvq.search(x, codebook, backend="reference")
        ), seed


def test_kinds_are_kept_apart() -> None:
    """The same bytes under another metric or dtype are another codebook."""
    x, codebook = _data(3, 96, 8)
    for metric in ("euclidean", "dot", "euclidean", "cosine"):
        for rows in (x, x.double(), x.bfloat16()):
            assert torch.equal(
                fastvq.search(rows, codebook, metric=metric, backend="cpu"),
                fastvq.search(rows, codebook, metric=metric, backend="reference"),
            )
    halves = codebook.half()
    alias = halves.view(torch.bfloat16)
    alias = torch.where(alias.isfinite(), alias, 0).view(torch.float16).contiguous()
    for codes in (alias, alias.view(torch.bfloat16)):
        assert torch.equal(fastvq.search(x, codes, backend="cpu"), fastvq.search(x, codes, backend="reference"))


def test_stages_and_heads_share_the_store() -> None:
    generator = torch.Generator().manual_seed(5)
    x, codebooks = torch.randn(64, 16, generator=generator), torch.randn(4, 100, 16, generator=generator)
    want = fastvq.residual_quantize(x, codebooks, backend="reference")[1]
    for _ in range(3):
        assert torch.equal(fastvq.residual_quantize(x, codebooks, backend="cpu")[1], want)
    codebooks[2] += 1
    want = fastvq.residual_quantize(x, codebooks, backend="reference")[1]
    assert torch.equal(fastvq.residual_quantize(x, codebooks, backend="cpu")[1], want)


KEPT = """
import torch, fastvq
from fastvq.measure.memory import status_kib
x, codebook = torch.randn(64, 256), torch.randn(65536, 256)
fastvq.search(x, codebook[:100])
before = status_kib("VmRSS")
fastvq.search(x, codebook)
print((status_kib("VmRSS") - before) // 1024)
"""


def _kept(mib: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **RETURN_MEMORY, "FASTVQ_BACKEND": "cpu", "FASTVQ_CPU_KEPT_MIB": mib}
    return subprocess.run([sys.executable, "-c", KEPT], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not measurable(), reason="this system does not tell its memory")
def test_what_is_kept_has_a_bound() -> None:
    """A copy of 64 MiB of codes, and what is packed of them: a quarter of it in int8, else as much."""
    assert int(_kept("").stdout) > 75
    assert int(_kept("60").stdout) < 60
    wrong = _kept("a lot")
    assert "ValueError: FASTVQ_CPU_KEPT_MIB must be a whole number of MiB, from 0 on; got 'a lot'" in wrong.stderr


def test_codebooks_that_never_come_again_take_little() -> None:
    """As in a training step that makes a new codebook: kept ones are let go long before the bound of all."""
    x = torch.randn(64, 256)
    fastvq.search(x, torch.randn(2048, 256), backend="cpu")
    before = status_kib("VmRSS")
    alive = []
    for _ in range(100):  # 450 MiB packed, at addresses that never return
        alive.append(torch.randn(2048, 256))
        fastvq.search(x, alive[-1], backend="cpu")
    assert status_kib("VmRSS") - before < 1024 * (200 + 48 + 64 + 32)  # the codebooks, those kept, memory for reuse
