"""The C++ kernels for CPUs: outputs are allocated here, everything else happens in csrc/cpu."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvq.backends.reference import working_dtype

_kernels: Any
try:
    _kernels = importlib.import_module("fastvq._cpu")
except ImportError as error:
    _kernels = None
    _import_error = str(error)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_LARGE = 1 << 17  # bytes of a result from which on its memory is kept when it is let go
_MAX_DIMS = 12  # of a tensor that is read where it lies; any other is copied


_NOTHING = {dtype: torch.empty(0, dtype=dtype) for dtype in _DTYPES}  # results that nobody wants
_NO_TENSOR = (0, 0, (), ())  # of `_pass`

_unchanged: ContextVar[int] = ContextVar("fastvq_unchanged", default=0)


@contextlib.contextmanager
def unchanged_codebooks(token: int) -> Iterator[None]:
    """Within, `residual_quantize` does not compare its codebooks with those that it has packed under this token.

    Args:
        token: positive; stands for these codes, at the address where they lie, and never for others.
    """
    reset = _unchanged.set(token)
    try:
        yield
    finally:
        _unchanged.reset(reset)


def missing() -> str | None:
    """Why this backend cannot serve, or None."""
    return None if _kernels is not None else f"fastvq was built without its C++ extension ({_import_error})"


def extension() -> ModuleType:
    """The compiled module, for `fastvq.info`."""
    return _kernels


def _pass(t: Tensor) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    if t.dim() > _MAX_DIMS:  # dense, as `_readable` has made it
        t = t.flatten(1, -2)
    return t.data_ptr(), _DTYPES[t.dtype], t.shape, t.stride()


def _readable(t: Tensor) -> Tensor:
    """The tensor itself where its memory holds its values under strides the kernels take, else a copy."""
    return t.resolve_neg() if t.dim() <= _MAX_DIMS else t.contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor for results; a large one in memory that fastvq keeps for reuse, since fresh pages cost much."""
    size = math.prod(shape) * dtype.itemsize
    if not shape:
        return torch.empty((), dtype=dtype)
    if size < _LARGE:
        return torch.empty(*shape, dtype=dtype)  # one by one: a torch.Size takes twice as long
    return torch.frombuffer(_kernels.Bytes(size), dtype=dtype).resize_(*shape)


def search(x: Tensor, codebook: Tensor, metric: str, return_distance: bool, precision: str) -> tuple[Tensor, Tensor]:
    """Indices (...), and squared distances or scores (...) when asked for, else an empty tensor."""
    x, codebook = _readable(x), _readable(codebook)
    indices = _empty(x.shape[:-1], torch.int64)
    dtype = working_dtype(x, codebook)
    # A view of what is there: making a tensor takes longer than some searches.
    distances = torch.empty(x.shape[:-1], dtype=dtype) if return_distance else _NOTHING[dtype].detach()
    _kernels.search(
        _pass(x),
        _pass(codebook),
        codebook.dim() == 3,
        metric != "euclidean",
        precision == "exact",
        indices.data_ptr(),
        _pass(distances) if return_distance else _NO_TENSOR,
        torch.get_num_threads(),
    )
    return indices, distances


def search_by(way: str, x: Tensor, codebook: Tensor) -> Tensor:
    """Indices (N,) of (N, D) rows among (K, D) codes, both float32, by one way whatever the shape.

    Args:
        way: "few" (the codes read where they lie), "kept" (packed, from the second call on without packing),
            "float32" or "int8" (packed anew, screened so; without int8 instructions in float32).
        x: any strides.
        codebook: the last stride 1.
    """
    indices = _empty(x.shape[:-1], torch.int64)
    _kernels.search_by(way, _pass(x), _pass(codebook), indices.data_ptr(), torch.get_num_threads())
    return indices


def search_way(codebook_size: int, dim: int) -> tuple[int, bool]:
    """Of how many rows at most the codes are read where they lie, and whether more are screened in int8."""
    return _kernels.search_way(codebook_size, dim)


class SearchCounts(NamedTuple):
    """What became of the rows of a search."""

    rows: int
    second_look: int  # rows for which the screen left more than one code
    exact: int  # rows whose code was decided in float64


def search_counts(x: Tensor, codebook: Tensor) -> SearchCounts:
    """A search of (N, D) rows among (K, D) codes that tells how far each went, and nothing else."""
    x, codebook = _readable(x), _readable(codebook)
    return SearchCounts(*_kernels.search_counts(_pass(x), _pass(codebook), torch.get_num_threads()))


def vector_quantize(
    x: Tensor,
    codebook: Tensor,
    metric: str,
    commitment_weight: float,
    codebook_weight: float,
    mask: Tensor | None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantized (..., D) in the dtype of x, indices (...), and the loss, a scalar; `counts` ([H,] K) is filled in."""
    x, codebook, mask = _readable(x), _readable(codebook), _dense(mask)
    quantized = _empty(x.shape, x.dtype)
    indices = _empty(x.shape[:-1], torch.int64)
    loss = torch.empty((), dtype=working_dtype(x, codebook))
    _kernels.vector_quantize(
        _pass(x),
        _pass(codebook),
        codebook.dim() == 3,
        metric != "euclidean",
        commitment_weight + codebook_weight,
        _address(mask),
        quantized.data_ptr(),
        indices.data_ptr(),
        _pass(loss),
        _address(counts),
        torch.get_num_threads(),
    )
    return quantized, indices, loss


def vector_quantize_counted(
    x: Tensor, codebook: Tensor, metric: str, commitment_weight: float, codebook_weight: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`vector_quantize`, and how many finite rows that the mask keeps took each code: counts ([H,] K), int64."""
    counts = _empty(codebook.shape[:-1], torch.int64)
    return *vector_quantize(x, codebook, metric, commitment_weight, codebook_weight, mask, counts), counts


def vector_quantize_backward(
    grad_quantized: Tensor,
    grad_loss: Tensor,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    commitment_weight: float,
    codebook_weight: float,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to x (straight-through and commitment loss) and to the codebook (codebook loss)."""
    grad_quantized, x, codebook, mask = _readable(grad_quantized), _readable(x), _readable(codebook), _dense(mask)
    indices = indices.contiguous()
    grad_x = _empty(x.shape, x.dtype) if need_x else _NOTHING[x.dtype].detach()
    grad_codebook = _empty(codebook.shape, codebook.dtype) if need_codebook else _NOTHING[codebook.dtype].detach()
    _kernels.vector_quantize_backward(
        _pass(grad_quantized),
        grad_loss.item(),
        _pass(x),
        _pass(codebook),
        codebook.dim() == 3,
        indices.data_ptr(),
        _address(mask),
        commitment_weight,
        codebook_weight,
        grad_x.data_ptr() if need_x else 0,
        grad_codebook.data_ptr() if need_codebook else 0,
        torch.get_num_threads(),
    )
    return grad_x, grad_codebook


def code_sums(
    x: Tensor, indices: Tensor, codebook_size: int, mask: Tensor | None, per_head: bool
) -> tuple[Tensor, Tensor]:
    """Counts ([H,] K) and sums ([H,] K, D): float64 sums in row order, rounded once."""
    return _code_sums(x, indices, codebook_size, mask, per_head, finite_alone=False)


def finite_code_sums(
    x: Tensor, indices: Tensor, codebook_size: int, mask: Tensor | None, per_head: bool
) -> tuple[Tensor, Tensor]:
    """`code_sums` of the rows that are finite; a pass is spent on looking for others only where a sum shows them."""
    return _code_sums(x, indices, codebook_size, mask, per_head, finite_alone=True)


def _code_sums(
    x: Tensor, indices: Tensor, codebook_size: int, mask: Tensor | None, per_head: bool, *, finite_alone: bool
) -> tuple[Tensor, Tensor]:
    x, indices, mask = _readable(x), indices.contiguous(), _dense(mask)
    heads = x.shape[:1] if per_head else ()
    counts = torch.empty((*heads, codebook_size), dtype=working_dtype(x))
    sums = _empty((*heads, codebook_size, x.shape[-1]), working_dtype(x))
    _kernels.code_sums(
        _pass(x),
        per_head,
        indices.data_ptr(),
        _address(mask),
        finite_alone,
        _pass(counts),
        sums.data_ptr(),
        torch.get_num_threads(),
    )
    return counts, sums


def ema_update_(
    codebook: Tensor, cluster_size: Tensor, embed_avg: Tensor, counts: Tensor, sums: Tensor, decay: float, eps: float
) -> None:
    """The moving averages and the codebook, in place; float64 within, each stored tensor rounded once."""
    tensors = (codebook, cluster_size, embed_avg, counts.resolve_neg(), sums.resolve_neg())
    _kernels.ema_update(*[_pass(t) for t in tensors], decay, eps, torch.get_num_threads())
    # Autograd must see the writes: a codebook saved for backward and updated since is an error, not a wrong gradient.
    torch.autograd.graph.increment_version((codebook, cluster_size, embed_avg))


def ema_step_(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor,
    counts: Tensor,
    x: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    decay: float,
    eps: float,
) -> None:
    """`finite_code_sums` of the rows, with the counts into `counts`, and `ema_update_` with both."""
    x, indices, mask = _readable(x), indices.contiguous(), _dense(mask)
    _kernels.ema_step(
        *[_pass(t) for t in (codebook, cluster_size, embed_avg, counts, x)],
        indices.data_ptr(),
        _address(mask),
        decay,
        eps,
        torch.get_num_threads(),
    )
    torch.autograd.graph.increment_version((codebook, cluster_size, embed_avg, counts))


def residual_quantize(x: Tensor, codebooks: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor]:
    """Quantized (..., D), indices (..., Q), losses (Q,); residuals rounded once a stage."""
    x, codebooks = _readable(x), _readable(codebooks)
    stages = codebooks.shape[-3]
    quantized = _empty(x.shape, x.dtype)
    indices = _empty((*x.shape[:-1], stages), torch.int64)
    losses = torch.empty((stages,), dtype=working_dtype(x, codebooks))
    _kernels.residual_quantize(
        _pass(x),
        _pass(codebooks),
        codebooks.dim() == 4,
        metric != "euclidean",
        quantized.data_ptr(),
        indices.data_ptr(),
        _pass(losses),
        _unchanged.get(),
        torch.get_num_threads(),
    )
    return quantized, indices, losses


def residual_quantize_backward(
    grad_quantized: Tensor,
    grad_losses: Tensor,
    x: Tensor,
    codebooks: Tensor,
    indices: Tensor,
    need_x: bool,
    need_codebooks: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to x (straight-through and all losses) and to the codebooks (each stage's own loss)."""
    grad_quantized, x, codebooks = _readable(grad_quantized), _readable(x), _readable(codebooks)
    losses = grad_losses.to(torch.float64).contiguous()
    indices = indices.contiguous()
    grad_x = _empty(x.shape, x.dtype) if need_x else _NOTHING[x.dtype].detach()
    grad_codebooks = _empty(codebooks.shape, codebooks.dtype) if need_codebooks else _NOTHING[codebooks.dtype].detach()
    _kernels.residual_quantize_backward(
        _pass(grad_quantized),
        losses.data_ptr(),
        _pass(x),
        _pass(codebooks),
        codebooks.dim() == 4,
        indices.data_ptr(),
        grad_x.data_ptr() if need_x else 0,
        grad_codebooks.data_ptr() if need_codebooks else 0,
        torch.get_num_threads(),
    )
    return grad_x, grad_codebooks


def residual_code_sums(x: Tensor, codebooks: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Counts (Q, K) and sums (Q, K, D) of the residuals of each stage; rows that are not finite are left out."""
    x, codebooks, indices = _readable(x), _readable(codebooks), indices.contiguous()
    counts = torch.empty(codebooks.shape[:-1], dtype=working_dtype(x, codebooks))
    sums = _empty(codebooks.shape, counts.dtype)
    _kernels.residual_code_sums(
        _pass(x), _pass(codebooks), indices.data_ptr(), _pass(counts), sums.data_ptr(), torch.get_num_threads()
    )
    return counts, sums


def rotate_back(gradient: Tensor, x: Tensor, codes: Tensor, indices: Tensor | None) -> Tensor:
    """The gradient (..., D) turned from the codes back to the rows, summed over the stages, in the dtype of x."""
    gradient, x, codes, indices = _readable(gradient), _readable(x), _readable(codes), _dense(indices)
    turned = _empty(x.shape, x.dtype)
    _kernels.rotate_back(
        _pass(gradient), _pass(x), _pass(codes), _address(indices), turned.data_ptr(), torch.get_num_threads()
    )
    return turned
