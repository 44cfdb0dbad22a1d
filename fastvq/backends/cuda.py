"""The CUDA C++ kernels: outputs and scratch come from torch's allocator here, everything else happens in csrc/cuda."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvq.backends.reference import working_dtype
from fastvq.backends.rows import Rows, gathered, rows_of

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
CHUNK = 256  # rows of a code that are added one after the other; then the sums of as many chunks

_kernels: Any
try:
    _kernels = importlib.import_module("fastvq._cuda")
except ImportError:
    _kernels = None


def missing() -> str | None:
    """Why this backend cannot serve, or None."""
    if _kernels is None:
        return "fastvq was built without its CUDA extension (no nvcc then, or FASTVQ_CUDA=0)"
    devices, error = _kernels.device_count()
    return None if devices else f"no CUDA device ({error or 'the driver shows none'})"


def extension() -> Any:
    """The compiled module."""
    return _kernels


# ---- devices and arguments ----------------------------------------------------------------------------------------


@functools.cache
def _properties(index: int) -> tuple[int, int, int]:
    properties: Any = torch.cuda.get_device_properties(index)
    arch = 10 * properties.major + properties.minor
    return arch, properties.multi_processor_count, int(properties.shared_memory_per_block_optin)


def _device(t: Tensor) -> tuple[int, int, int]:
    """Architecture, multiprocessors and shared memory of a block; the tests' CPU build plays an H100."""
    return _properties(t.device.index) if t.is_cuda else (90, 132, 232_448)


def _stream(t: Tensor) -> int:
    """The current stream of a tensor's device; the tests' build for the CPU has none."""
    return torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else 0


def _call(function: Callable[..., Any], t: Tensor, *arguments: Any) -> Any:
    """Call a kernel's host function on the device and stream of `t`."""
    if not t.is_cuda:
        return function(*arguments, _stream(t))
    with torch.cuda.device_of(t):
        _kernels.set_device(t.device.index)  # the extension's runtime is not torch's, and has a current device too
        return function(*arguments, _stream(t))


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _type(t: Tensor) -> int:
    return _TYPES[t.dtype]


def _pass(rows: Rows) -> tuple[int, ...]:
    return rows.tensor.data_ptr(), _type(rows.tensor), rows.length, rows.inner, *rows.strides


def _matrix(t: Tensor) -> tuple[int, ...]:
    """A tensor (H, K, D), or (H, K) as if D were 1."""
    return t.data_ptr(), _type(t), *t.stride(), *[0] * (3 - t.dim())


def _codes(codebook: Tensor, x: Tensor) -> Tensor:
    """A codebook (H, K, D) as kernels take it beside x: in its dtype, or widened without loss to float32 or float64."""
    codes = codebook.resolve_neg() if codebook.dim() == 3 else codebook.resolve_neg().unsqueeze(0)
    return codes if codes.dtype == x.dtype else codes.to(working_dtype(x, codebook))


def _code_rows(codes: Tensor) -> Rows:
    heads, K, D = codes.shape
    stride_h, stride_k, stride_d = codes.stride()
    return Rows(codes, heads, K, D, 1, (stride_h, stride_k, 0, stride_d))


def _mask(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A mask as kernels read it, dense bytes, and how many rows it keeps, on its device."""
    return (None, None) if mask is None else (mask.contiguous(), mask.sum())


def _empty(shape: Any, dtype: torch.dtype, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


# ---- search -------------------------------------------------------------------------------------------------------


def search(x: Tensor, codebook: Tensor, metric: str, return_distance: bool, precision: str) -> tuple[Tensor, Tensor]:
    """Indices (...), and squared distances or scores (...) when asked for, else an empty tensor."""
    return certified_search(x, codebook, metric, return_distance)


def certified_search(
    x: Tensor, codebook: Tensor, metric: str, return_distance: bool, slack: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`search`; `slack` multiplies the bound of the certificate: below 1 is for the tests that show it to be needed."""
    rows, codes = rows_of(x, codebook.dim() == 3), _codes(codebook, x).contiguous()
    device = _device(x)
    shape = (rows.heads, *codes.shape[1:])
    plan = plan_search(device, x.dtype, codes.dtype, rows.heads, rows.length, *codes.shape[1:])
    scratch = _empty(plan["scratch_bytes"], torch.uint8, x)
    indices = _empty(x.shape[:-1], torch.int64, x)
    distances = _empty(x.shape[:-1] if return_distance else (0,), working_dtype(x, codebook), x)
    _call(
        _kernels.search,
        x,
        *[device, _pass(rows), _address(codes), _type(codes), *shape, metric == "euclidean", slack],
        *[_address(scratch), _address(indices), _address(distances) if return_distance else 0],
    )
    return indices, distances


def plan_search(
    device: tuple[int, int, int], x: torch.dtype, codes: torch.dtype, heads: int, n: int, k: int, d: int
) -> dict[str, Any]:
    """How a search is cut, a pure function.

    Args:
        device: architecture (80, 90), multiprocessors, and bytes of shared memory that a block may ask for.
        x: dtype of the rows, (heads, n, d).
        codes: dtype of the codes, (heads, k, d), as `_codes` gives them.
    """
    plan: dict[str, Any] = _kernels.plan_search(device, _TYPES[x], _TYPES[codes], heads, n, k, d)
    return plan


# ---- vector_quantize ----------------------------------------------------------------------------------------------


def gather(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    weight: float,
    mask: Tensor | None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The codes at the indices in the dtype of x, and weight * mean((x - code)^2) over the rows that the mask keeps.

    Those of them that are finite are added to `counts` ([H,] K), int64.
    """
    rows, codes = rows_of(x, codebook.dim() == 3), _codes(codebook, x)
    dense, kept = _mask(mask)
    quantized = _empty(x.shape, x.dtype, x)
    loss = _empty((), working_dtype(x, codebook), x)
    parts = _empty((rows.heads, _kernels.loss_parts(rows.length, rows.dim)), torch.float64, x)
    _call(
        _kernels.gather,
        x,
        *[_pass(rows), _pass(_code_rows(codes)), _address(indices), _address(dense), _address(kept), weight],
        *[rows.heads, codes.shape[1], rows.dim, _address(quantized), _address(parts), _address(loss), _type(loss)],
        _address(counts),
    )
    return quantized, loss


def vector_quantize(
    x: Tensor, codebook: Tensor, metric: str, commitment_weight: float, codebook_weight: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantized (..., D) in the dtype of x, indices (...), and the loss, a scalar."""
    indices, _ = search(x, codebook, metric, False, "exact")
    quantized, loss = gather(x, codebook, indices, commitment_weight + codebook_weight, mask)
    return quantized, indices, loss


def vector_quantize_counted(
    x: Tensor, codebook: Tensor, metric: str, commitment_weight: float, codebook_weight: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`vector_quantize`, and how many finite rows that the mask keeps took each code: counts ([H,] K), int64."""
    indices, _ = search(x, codebook, metric, False, "exact")
    counts = _empty(codebook.shape[:-1], torch.int64, x).zero_()
    quantized, loss = gather(x, codebook, indices, commitment_weight + codebook_weight, mask, counts)
    return quantized, indices, loss, counts


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
    per_head = codebook.dim() == 3
    codes, grad_loss, indices = _codes(codebook, x), grad_loss.resolve_neg(), indices.contiguous()
    dense, kept = _mask(mask)
    grad_x = _empty(x.shape if need_x else (0,), x.dtype, x)
    grad_codebook = _empty(codebook.shape if need_codebook else (0,), codebook.dtype, x)
    if need_x:
        rows, gradients = rows_of(x, per_head), rows_of(grad_quantized, per_head)
        _call(
            _kernels.pull,
            x,
            *[_pass(gradients), _pass(rows), _pass(_code_rows(codes)), _address(indices), _address(dense)],
            *[_address(kept), _address(grad_loss), _type(grad_loss), commitment_weight, rows.heads, rows.dim],
            _address(grad_x),
        )
    if need_codebook:
        heads, K, _ = codes.shape
        shape = heads, indices.numel() // max(heads, 1)
        chosen = _Chosen(indices.view(*shape, 1), None if dense is None else dense.view(shape), K)
        target = grad_codebook.view(codes.shape)
        _code_gradients(x, per_head, chosen, 0, codes, grad_loss, kept, -codebook_weight, target)
    return grad_x, grad_codebook


# ---- sums by code -------------------------------------------------------------------------------------------------


class _ByCode(NamedTuple):
    """The rows of each of P problems (a head, or a head and stage), sorted by code in row order."""

    keys: Tensor  # (P, N) uint32, ascending: the problem's number above the bits of a code, K for rows left out
    order: Tensor  # (P, N) uint32, the row at each place
    starts: Tensor  # (P, K + 1) int64, the first place of each code

    def stage(self, q: int, stages: int) -> _ByCode:
        """The problems of one of several stages, where problem = head * stages + stage."""
        return _ByCode(*(t[q::stages] for t in self))

    def arguments(self) -> tuple[int, ...]:
        """As the bindings take it."""
        addresses = [t.data_ptr() for t in self]
        return *addresses, self.keys.stride(0), self.starts.stride(0), self.keys.shape[1], self.starts.shape[1] - 1


def _rows_by_code(indices: Tensor, mask: Tensor | None, K: int, *, checked: bool) -> _ByCode:
    """Sort rows by code, indices (H, N, Q) and mask (H, N), dense: negative indices and masked rows are left out.

    An index past the codebook is left out too, unless `checked`: then it ends the kernel, as an index out of range does
    in torch, since raising an exception here would take waiting for the device.

    Raises:
        ValueError: one sort cannot take them all: it numbers rows and problems and codes in 32 bits.
    """
    heads, N, Q = indices.shape
    problems = heads * Q
    if problems * N >= 1 << 32:
        raise ValueError(f"indices must be fewer than 2^32 to be sorted by code; got {problems} x {N}")
    if K.bit_length() + (problems - 1).bit_length() > 32:
        raise ValueError(f"codes of all codebooks must be numbered by 32 bits to be sorted by; got {problems} x {K}")
    keys, order = (_empty((2, problems, N), torch.uint32, indices) for _ in range(2))  # sorted to and fro
    starts = _empty((problems, K + 1), torch.int64, indices)
    scratch_bytes = _call(_kernels.sort_scratch, indices, problems, N, K, checked)
    scratch = _empty(scratch_bytes, torch.uint8, indices)
    at = _call(
        _kernels.sort_rows,
        indices,
        *[_address(indices), _address(mask), heads, N, Q, K, checked, _address(keys), _address(order)],
        *[_address(starts), _address(scratch), scratch_bytes],
    )
    return _ByCode(keys[at], order[at], starts)


class _Chosen:
    """The codes that rows chose, indices (H, N, Q) and mask (H, N), dense; sorted when that is first needed."""

    def __init__(self, indices: Tensor, mask: Tensor | None, K: int) -> None:
        self.indices, self.mask, self.K = indices, mask, K

    @functools.cached_property
    def by_code(self) -> _ByCode:
        return _rows_by_code(self.indices, self.mask, self.K, checked=False)


def _small_parts(rows: Rows, K: int) -> Tensor | None:
    """The partial sums of blocks that add in shared memory, none for a single block; None where K * D do not fit it."""
    blocks = _kernels.small_sums_parts(rows.length, K, rows.dim, rows.tensor.element_size())
    shape = (rows.heads, blocks if blocks > 1 else 0, K, rows.dim + 1)
    return _empty(shape, torch.float64, rows.tensor) if blocks else None


def _add_up(by_code: _ByCode, sums: Tensor, factor: float, add_rows: Callable[[int, Tensor], None]) -> None:
    """Sums (H, K, D) = factor * the sum of each code: `add_rows` adds chunks of rows, this the chunks."""
    heads, N = by_code.keys.shape
    D = sums.shape[-1]

    def room(size: int) -> Tensor:
        return _empty((heads, 2 * -(-N // size), D), torch.float64, sums)

    size, chunks = CHUNK, room(CHUNK)
    add_rows(size, chunks)
    while size < N:
        parts, chunks = chunks, room(size * CHUNK)
        _call(
            _kernels.sum_chunks,
            sums,
            *[by_code.arguments(), _address(parts), heads, D, size, size * CHUNK, factor],
            *[_address(sums), sums.stride(0), _type(sums), _address(chunks)],
        )
        size *= CHUNK


def _code_gradients(
    x: Tensor,
    per_head: bool,
    chosen: _Chosen,
    q: int,
    codes: Tensor,
    grad_loss: Tensor,
    kept: Tensor | None,
    factor: float,
    gradients: Tensor,
    rest: Tensor | None = None,
) -> None:
    """Gradients (H, K, D) of factor / 2 * grad_loss * mean((c - x)^2); what is left of the rows to `rest` (H, N, D).

    `q` is which of the indices of a row counts. In shared memory where all sums fit it, else sorted by code.
    """
    rows, stages = rows_of(x, per_head), chosen.indices.shape[2]
    parts = _small_parts(rows, chosen.K)
    if parts is not None:
        _call(
            _kernels.small_differences,
            x,
            *[_pass(rows), _pass(_code_rows(codes)), _address(chosen.indices[:, :, q:]), stages, _address(chosen.mask)],
            *[_address(kept), _address(grad_loss), _type(grad_loss), rows.heads, chosen.K, rows.dim, factor],
            *[_address(gradients), gradients.stride(0), _type(gradients), _address(parts), _address(rest)],
        )
        return
    rows, by_code = gathered(x, per_head), chosen.by_code.stage(q, stages)

    def add_differences(size: int, chunks: Tensor) -> None:
        _call(
            _kernels.sum_differences,
            x,
            *[_pass(rows), _pass(_code_rows(codes)), by_code.arguments(), _address(kept), _address(grad_loss)],
            *[_type(grad_loss), rows.heads, rows.dim, size, factor, _address(gradients), gradients.stride(0)],
            *[_type(gradients), _address(chunks), _address(rest)],
        )

    _add_up(by_code, gradients, factor, add_differences)


def code_sums(
    x: Tensor, indices: Tensor, codebook_size: int, mask: Tensor | None, per_head: bool
) -> tuple[Tensor, Tensor]:
    """Counts ([H,] K) and sums ([H,] K, D): float64 sums in row order, rounded once.

    Many rows are added in runs, in a fixed order: of 8192 rows where all sums fit shared memory, else of 256 rows of a
    code. An index at or past `codebook_size` ends the kernel and is never written through.
    """
    rows = rows_of(x, per_head)
    heads, N, D, K = rows.heads, rows.length, rows.dim, codebook_size
    indices = indices.contiguous()
    flat_mask = None if mask is None else mask.contiguous().view(heads, N)
    counts = _empty((heads, K), working_dtype(x), x)
    sums = _empty((heads, K, D), working_dtype(x), x)
    parts = _small_parts(rows, K)
    if parts is not None:
        _call(
            _kernels.small_sums,
            x,
            *[_pass(rows), _address(indices), _address(flat_mask), heads, K, D, True],
            *[_address(counts), _address(sums), _type(sums), _address(parts)],
        )
    else:
        _sorted_sums(gathered(x, per_head), indices, flat_mask, counts, sums)
    return (counts, sums) if per_head else (counts[0], sums[0])


def _sorted_sums(rows: Rows, indices: Tensor, mask: Tensor | None, counts: Tensor, sums: Tensor) -> None:
    """Counts (H, K) and sums (H, K, D) of any size: rows sorted by code, then added by chunks."""
    by_code = _rows_by_code(indices.view(rows.heads, rows.length, 1), mask, sums.shape[1], checked=True)

    def add_rows(size: int, chunks: Tensor) -> None:
        _call(
            _kernels.sum_rows,
            sums,
            *[_pass(rows), by_code.arguments(), rows.heads, rows.dim, size],
            *[_address(counts), _address(sums), _type(sums), _address(chunks)],
        )

    _add_up(by_code, sums, 1.0, add_rows)


# ---- moving averages ----------------------------------------------------------------------------------------------


def ema_update_(
    codebook: Tensor, cluster_size: Tensor, embed_avg: Tensor, counts: Tensor, sums: Tensor, decay: float, eps: float
) -> None:
    """The moving averages and the codebook, in place; float64 within, each stored tensor rounded once."""
    tensors = (codebook, cluster_size, embed_avg, counts.resolve_neg(), sums.resolve_neg())
    by_head = tensors if codebook.dim() == 3 else tuple(t.unsqueeze(0) for t in tensors)
    heads, K, D = by_head[0].shape
    parts = _empty((heads, _kernels.ema_parts(K)), torch.float64, codebook)
    _call(_kernels.ema_update, codebook, *[_matrix(t) for t in by_head], decay, eps, heads, K, D, _address(parts))
    # Autograd must see the writes: a codebook saved for backward and updated since is an error, not a wrong gradient.
    torch.autograd.graph.increment_version((codebook, cluster_size, embed_avg))


# ---- residual quantisation ----------------------------------------------------------------------------------------


def _stage_codes(codebooks: Tensor, x: Tensor) -> Tensor:
    """Codebooks ([H,] Q, K, D), dense, as (H * Q, K, D)."""
    return _codes(codebooks.resolve_neg().contiguous().flatten(0, -3), x)


def residual_search(x: Tensor, codebooks: Tensor, metric: str, slack: float = 1.0) -> Tensor:
    """The code of each stage for each row, (..., Q): in one kernel but for wide rows, docs/cuda.md.

    `slack` is for the tests, as in `certified_search`.
    """
    per_head = codebooks.dim() == 4
    stages = codebooks.shape[-3]
    indices = _empty((*x.shape[:-1], stages), torch.int64, x)
    rows, device = rows_of(x, per_head), _device(x)
    codes = codebooks.resolve_neg().to(working_dtype(x, codebooks)).contiguous()
    shape = (rows.heads, stages, *codes.shape[-2:])
    types = _type(rows.tensor), _type(codes)
    plan = _kernels.plan_stages(device, *types, *shape[:2], rows.length, *shape[2:])
    if plan["source"] != "chunked":
        scratch = _empty(plan["scratch_bytes"], torch.uint8, x)
        _call(
            _kernels.search_stages,
            x,
            *[device, _pass(rows), _address(codes), _type(codes), *shape, metric == "euclidean", slack],
            *[_address(scratch), _address(indices)],
        )
        return indices
    residual = x
    for q in range(stages):
        indices[..., q] = search(residual, codebooks.select(-3, q), metric, False, "exact")[0]
        if q + 1 == stages:
            break
        rows = rows_of(residual, per_head)
        codes = _stage_codes(codebooks, residual)
        rest = _empty(x.shape, working_dtype(x, codebooks), x)
        _call(
            _kernels.take_codes,
            x,
            *[_pass(rows), _pass(_code_rows(codes)), _address(indices), rows.heads, stages, q, rows.dim],
            _address(rest),
        )
        residual = rest
    return indices


def gather_stages(x: Tensor, codebooks: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the codes at the indices (..., Q) in the dtype of x, and the loss of each stage (Q,)."""
    rows, codes = rows_of(x, codebooks.dim() == 4), _stage_codes(codebooks, x)
    stages = codebooks.shape[-3]
    quantized = _empty(x.shape, x.dtype, x)
    losses = _empty(stages, working_dtype(x, codebooks), x)
    parts = _empty((stages, rows.heads, _kernels.loss_parts(rows.length, rows.dim)), torch.float64, x)
    _call(
        _kernels.gather_stages,
        x,
        *[_pass(rows), _pass(_code_rows(codes)), _address(indices), rows.heads, stages, rows.dim],
        *[_address(quantized), _address(parts), _address(losses), _type(losses)],
    )
    return quantized, losses


def residual_quantize(x: Tensor, codebooks: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor]:
    """Quantized (..., D), indices (..., Q), losses (Q,); residuals rounded once a stage."""
    indices = residual_search(x, codebooks, metric)
    quantized, losses = gather_stages(x, codebooks, indices)
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
    per_head = codebooks.dim() == 4
    stages, K, D = codebooks.shape[-3:]
    work = working_dtype(x, codebooks)
    codes = _stage_codes(codebooks, x)
    indices, grad_losses = indices.contiguous(), grad_losses.resolve_neg().contiguous()
    grad_x = _empty(x.shape if need_x else (0,), x.dtype, x)
    grad_codebooks = _empty(codebooks.shape if need_codebooks else (0,), codebooks.dtype, x)
    if need_x:
        rows, gradients = rows_of(x, per_head), rows_of(grad_quantized, per_head)
        _call(
            _kernels.pull_stages,
            x,
            *[_pass(gradients), _pass(rows), _pass(_code_rows(codes)), _address(indices), _address(grad_losses)],
            *[_type(grad_losses), rows.heads, stages, rows.dim, _address(grad_x)],
        )
    if need_codebooks:
        heads = codes.shape[0] // stages
        chosen = _Chosen(indices.view(heads, indices.numel() // max(heads * stages, 1), stages), None, K)
        residual = _empty((heads, chosen.indices.shape[1], D), work, x)
        targets, by_stage = grad_codebooks.view(heads, stages, K, D), codes.view(heads, stages, K, D)
        for q in range(stages):
            rest = residual if q + 1 < stages else None
            stage_codes = _codes(by_stage[:, q], x)
            _code_gradients(x, per_head, chosen, q, stage_codes, grad_losses[q], None, -1.0, targets[:, q], rest)
            x, per_head = residual, True
    return grad_x, grad_codebooks
