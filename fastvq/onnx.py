"""Export to ONNX with equal indices: fastvq's operators as plain ONNX operators, for `torch.onnx.export`.

    torch.onnx.export(model.eval(), (x,), dynamo=True, custom_translation_table=fastvq.onnx.translation_table())

The index is that of `fastvq.search` in any runtime whose float64 is that of IEEE 754, one operation after the other, as
onnxruntime's is. A float64 matmul screens all codes; the 8 nearest are scored again by the definition in
`backends/reference.py`, dimension after dimension; a bound on what the screen may be off by proves that none of the
others can win. Where it proves nothing (near-equal codes by the dozen, NaN) a row is scored whole by the definition.

Codes are taken in blocks of some 1024, one after the other: a search holds N x 1024 numbers in float64, never N x K.
Exporting needs the extra `onnx`; running the result needs only a runtime.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

try:
    import onnx.parser
    import onnx_ir as ir
    from onnxscript import opset18
except ImportError as error:
    raise ImportError("fastvq.onnx needs onnx and onnxscript: pip install 'fastvq[onnx]'") from error

op: Any = opset18
_CANDIDATES = 8
_BLOCK = 1024  # codes that are scored at a time
_ROUNDING = 2.0**-53  # of one float64 operation, relative
_LEAST = 1e-290  # far above all that underflow can do

# ---- pieces -----------------------------------------------------------------------------------------------------


def _integers(*numbers: int) -> Any:
    return op.Constant(value=ir.tensor(list(numbers), dtype=ir.DataType.INT64))


def _double(number: float) -> Any:
    return op.Constant(value=ir.tensor(number, dtype=ir.DataType.DOUBLE))


def _to(tensor: Any, dtype: ir.DataType) -> Any:
    return op.Cast(tensor, to=int(dtype))


def _float64(tensor: Any) -> Any:
    return _to(tensor, ir.DataType.DOUBLE)


def _working(*tensors: Any) -> ir.DataType:
    return ir.DataType.DOUBLE if any(t.dtype == ir.DataType.DOUBLE for t in tensors) else ir.DataType.FLOAT


def _flat(x: Any, width: int) -> Any:
    """Rows (n, D) of x (..., D)."""
    return op.Reshape(x, _integers(-1, width))


def _heads(x: Any, codebook: Any, rank: int) -> list[tuple[Any, Any]]:
    """x and codebook of each head, in turn; `rank` is that of a codebook without heads."""
    if len(codebook.shape) == rank:
        return [(x, codebook)]
    numbers = [_integers(h) for h in range(codebook.shape[0])]
    return [tuple(op.Squeeze(op.Gather(t, h, axis=0), _integers(0)) for t in (x, codebook)) for h in numbers]


def _by_head(parts: Sequence[Any], shape: Any) -> Any:
    """The parts of the heads, (n, ...) each, one after the other in `shape`."""
    return op.Reshape(op.Concat(*parts, axis=0) if len(parts) > 1 else parts[0], shape)


def _mean_square(parts: Sequence[Any], kept: Any | None = None) -> Any:
    """The mean of the squares of parts (n, D), over the rows that are kept, (n, 1) in float64; 0 without any."""
    differences = op.Concat(*parts, axis=0)
    if kept is not None:
        differences = op.Where(_to(kept, ir.DataType.BOOL), differences, _double(0.0))
        many = op.Mul(op.ReduceSum(kept, keepdims=0), _float64(op.Squeeze(op.Shape(differences, start=1))))
    else:
        many = _float64(op.Size(differences))
    return op.Div(op.ReduceSumSquare(differences, keepdims=0), op.Max(many, _double(1.0)))


# ---- the nearest code -------------------------------------------------------------------------------------------

_numbers = itertools.count()
_TERMS = {
    True: "difference = Sub(row, code)  term = Mul(difference, difference)",
    False: "product = Mul(row, code)  term = Neg(product)",
}


def _defined(rows: Any, codes: Any, euclidean: bool) -> Any:
    """What is minimised, (n, k): the sum over the dimensions, in order, of (x - c)^2 or of -x c; NaN as infinity.

    Rows (D, n, 1) and codes (D, 1 or n, k) in float64.
    """
    n, k, one, b = (
        f"{size}{next(_numbers)}" for size in ("n", "k", "one", "b")
    )  # a runtime takes equal names for equal sizes
    body = onnx.parser.parse_graph(
        f"step (double[{n}, {k}] total, double[{n}, {one}] row, double[{b}, {k}] code) => (double[{n}, {k}] next) {{"
        f" {_TERMS[euclidean]}  next = Add(total, term) }}"
    )
    shape = op.Concat(op.Shape(rows, start=1, end=2), op.Shape(codes, start=2, end=3), axis=0)
    total = op.Scan(op.Expand(_double(0.0), shape), rows, codes, body=ir.from_proto(body), num_scan_inputs=2)
    return op.Where(op.IsNaN(total), _double(math.inf), total)


def _squares(codes: Any) -> Any:
    """|c|^2 of codes (K, D): (K,)."""
    return op.ReduceSumSquare(codes, _integers(1), keepdims=0)


def _blocks(codes: Any, size: int) -> list[tuple[int, Any]]:
    """Codes (K, D) in blocks of equal sizes, but for one: the number of the first, and the block."""
    step = -(-size // -(-size // _BLOCK))
    return [
        (first, op.Slice(codes, _integers(first), _integers(min(first + step, size)), _integers(0)))
        for first in range(0, size, step)
    ]


def _whole(rows: Any, codes: Any, size: int, euclidean: bool) -> tuple[Any, Any]:
    """The first of the codes (K, D) that are nearest to each row (n, D), and what it attains, by the definition."""
    by_dimension = op.Unsqueeze(op.Transpose(rows, perm=[1, 0]), _integers(2))
    index = value = None
    for first, block in _blocks(codes, size):
        scores = _defined(by_dimension, op.Unsqueeze(op.Transpose(block, perm=[1, 0]), _integers(1)), euclidean)
        attained, places = op.TopK(scores, _integers(1), axis=1, largest=0, sorted=1)  # the first of equals
        found = op.Add(places, _integers(first))
        if value is None:
            index, value = found, attained
        else:
            index, value = op.Where(op.Less(attained, value), found, index), op.Min(attained, value)
    return op.Squeeze(index, _integers(1)), op.Squeeze(value, _integers(1))


def _screened(rows: Any, codes: Any, size: int, euclidean: bool) -> tuple[Any, Any]:
    """The least `_CANDIDATES` + 1 screened scores of each row (n, D), in order, and their codes; both (n, 9)."""
    wanted, scores, numbers = _CANDIDATES + 1, [], []
    for first, block in _blocks(codes, size):
        products = op.MatMul(rows, op.Transpose(block, perm=[1, 0]))
        screened = op.Sub(_squares(block), op.Mul(products, _double(2.0))) if euclidean else op.Neg(products)
        screened = op.Where(op.IsNaN(screened), _double(math.inf), screened)
        least, places = op.TopK(screened, _integers(wanted), axis=1, largest=0, sorted=1)
        scores.append(least)
        numbers.append(op.Add(places, _integers(first)))
    if len(scores) == 1:
        return scores[0], numbers[0]
    least, places = op.TopK(op.Concat(*scores, axis=1), _integers(wanted), axis=1, largest=0, sorted=1)
    return least, op.GatherElements(op.Concat(*numbers, axis=1), places, axis=1)


def _nearest(rows: Any, codes: Any, size: int, width: int, metric: str) -> tuple[Any, Any]:
    """The canonical code of each row (n, D), and what it attains of what is minimised; both (n,).

    In float64 a screened score and a defined one are each off by less than (D + 8) 2^-53 (|x| + max |c|)^2, so a code
    whose screened score is 16 times that above the least one has the larger distance by the definition too.
    """
    rows, codes, euclidean = _float64(rows), _float64(codes), metric == "euclidean"
    if size <= _CANDIDATES:
        return _whole(rows, codes, size, euclidean)
    least, candidates = _screened(rows, codes, size, euclidean)
    lengths = op.Sqrt(op.ReduceSumSquare(rows, _integers(1), keepdims=1))
    reach = op.Add(lengths, op.Sqrt(op.ReduceMax(_squares(codes), keepdims=0)))
    bound = op.Mul(op.Mul(reach, reach), _double(16 * (width + 8) * _ROUNDING))
    first, next_best = (op.Slice(least, _integers(i), _integers(i + 1), _integers(1)) for i in (0, _CANDIDATES))
    proven = op.Greater(op.Sub(next_best, first), op.Add(bound, _double(_LEAST)))

    candidates = op.Slice(candidates, _integers(0), _integers(_CANDIDATES), _integers(1))
    chosen = op.Transpose(op.Gather(codes, candidates, axis=0), perm=[2, 0, 1])
    scores = _defined(op.Unsqueeze(op.Transpose(rows, perm=[1, 0]), _integers(2)), chosen, euclidean)
    value = op.ReduceMin(scores, _integers(1), keepdims=1)
    index = op.ReduceMin(op.Where(op.Equal(scores, value), candidates, _integers(size)), _integers(1), keepdims=0)

    unproven = op.Squeeze(op.NonZero(op.Not(op.Squeeze(proven, _integers(1)))), _integers(0))
    whole_index, whole_value = _whole(op.Gather(rows, unproven, axis=0), codes, size, euclidean)
    index = op.ScatterElements(index, unproven, whole_index, axis=0)
    return index, op.ScatterElements(op.Squeeze(value, _integers(1)), unproven, whole_value, axis=0)


# ---- the operators ----------------------------------------------------------------------------------------------


def _search(x: Any, codebook: Any, metric: str, return_distance: bool, precision: str, backend: None = None) -> Any:
    size, width = codebook.shape[-2:]
    found = [_nearest(_flat(part, width), codes, size, width, metric) for part, codes in _heads(x, codebook, 2)]
    places = op.Shape(x, start=0, end=-1)
    values = _to(op.Concat(*[v for _, v in found], axis=0), _working(x, codebook))
    values = values if metric == "euclidean" else op.Neg(values)
    distances = op.Reshape(values, places) if return_distance else op.Slice(values, _integers(0), _integers(0))
    return _by_head([index for index, _ in found], places), distances


def _vector_quantize(
    x: Any,
    codebook: Any,
    metric: str,
    commitment_weight: float,
    codebook_weight: float,
    mask: Any | None = None,
    backend: None = None,
) -> Any:
    size, width = codebook.shape[-2:]
    indices, quantized, differences = [], [], []
    for part, codes in _heads(x, codebook, 2):
        rows = _flat(part, width)
        index, _ = _nearest(rows, codes, size, width, metric)
        code = op.Gather(codes, index, axis=0)
        indices.append(index)
        quantized.append(_to(code, x.dtype))
        differences.append(op.Sub(_float64(rows), _float64(code)))
    kept = None if mask is None else _float64(op.Reshape(mask, _integers(-1, 1)))
    loss = op.Mul(_mean_square(differences, kept), _double(commitment_weight + codebook_weight))
    shape = op.Shape(x)
    places = op.Shape(x, start=0, end=-1)
    return _by_head(quantized, shape), _by_head(indices, places), _to(loss, _working(x, codebook))


def _residual_quantize(x: Any, codebooks: Any, metric: str, backend: None = None) -> Any:
    stages, size, width = codebooks.shape[-3:]
    work = _working(x, codebooks)
    indices, quantized = [], []
    differences: list[list[Any]] = [[] for _ in range(stages)]
    for part, books in _heads(x, codebooks, 3):
        residual = _to(_flat(part, width), work)
        total, chosen = None, []
        for stage in range(stages):
            codes = op.Squeeze(op.Gather(books, _integers(stage), axis=0), _integers(0))
            index, _ = _nearest(residual, codes, size, width, metric)
            code = _to(op.Gather(codes, index, axis=0), work)
            differences[stage].append(op.Sub(_float64(residual), _float64(code)))
            residual = op.Sub(residual, code)
            total = code if total is None else op.Add(total, code)
            chosen.append(op.Unsqueeze(index, _integers(1)))
        quantized.append(_to(total, x.dtype))
        indices.append(op.Concat(*chosen, axis=1))
    losses = op.Concat(*[op.Unsqueeze(_mean_square(parts), _integers(0)) for parts in differences], axis=0)
    places = op.Concat(op.Shape(x, start=0, end=-1), _integers(stages), axis=0)
    return _by_head(quantized, op.Shape(x)), _by_head(indices, places), _to(losses, work)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export(..., dynamo=True, custom_translation_table=...)` needs for modules of fastvq.

    Covers `search`, `vector_quantize` and `residual_quantize`, and so the layers in eval mode; any batch size where the
    export has a dynamic one, codebooks as they are. Opset 18 or later. An operator of training has no translation: the
    export names it.
    """
    operators = torch.ops.fastvq
    return {
        operators.search.default: _search,
        operators.vector_quantize.default: _vector_quantize,
        operators.residual_quantize.default: _residual_quantize,
    }
