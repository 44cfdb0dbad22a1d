"""Functions of all logits of a row, streamed over blocks of codes: O(N D + K D) memory, never an N x K matrix.

The logit of row x for code c is -max(|x - c|, 1e-4) for the metric "euclidean" (the distance itself, not its square,
as vector-quantize-pytorch has it), and x . c for "cosine" and "dot"; times a scale, the inverse of a temperature. A
forward pass keeps one number a row, the logarithm of the sum of the exponentials; a backward pass computes each block
of logits again and takes it to the rows and the codes by two matmuls. float32, or float64 where an input is float64.

The operators are plain PyTorch on every device, registered so that torch.compile sees one node each, and so that
autocast cannot lower their precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvq.backends.reference import working_dtype

MIN_SQUARE = 1e-8  # squared distances below it count as this much, and have no gradient: that of the distance is 1 / 0
MIN_PROBABILITY = 1e-5  # in the logarithm of an entropy, where it counts as this much
_BLOCK = {"cpu": 1 << 18}  # elements of a block of logits: within the cache of a core
_GPU_BLOCK = 1 << 24  # enough to fill a device
_CODES = 4096  # of a block at most

_lib = torch.library.Library("fastvq", "FRAGMENT")


# ---- blocks -----------------------------------------------------------------------------------------------------


def block_elements(device: torch.device) -> int:
    """How many logits a block may hold on `device`."""
    return _BLOCK.get(device.type, _GPU_BLOCK)


def spans(total: int, step: int) -> Iterator[slice]:
    """0 .. total-1 in slices of at most `step`."""
    for start in range(0, total, max(step, 1)):
        yield slice(start, min(start + max(step, 1), total))


class Codes(NamedTuple):
    """Codes (K, D) made ready for blocks of logits."""

    values: Tensor  # (K, D), less their mean for "euclidean": differences stay, and lose less to rounding
    squares: Tensor  # (K,), their squared norms; empty for the other metrics
    mean: Tensor  # (D,)
    euclidean: bool
    scale: float
    step: int  # codes of a block

    @staticmethod
    def of(codes: Tensor, metric: str, scale: float, dtype: torch.dtype, step: int) -> Codes:
        """Codes (K, D) of any dtype."""
        values, euclidean = codes.to(dtype), metric == "euclidean"
        mean = values.nan_to_num(0.0, 0.0, 0.0).mean(0) if euclidean else values.new_zeros(values.shape[1])
        values = values - mean if euclidean else values
        squares = values.square().sum(1) if euclidean else values.new_empty(0)
        return Codes(values, squares, mean, euclidean, scale, step)

    def spans(self) -> Iterator[slice]:
        """All codes, a block at a time."""
        return spans(self.values.shape[0], self.step)

    def rows(self, x: Tensor) -> Tensor:
        """Rows (n, D) in the frame of the codes."""
        x = x.to(self.values.dtype)
        return x - self.mean if self.euclidean else x

    def closeness(self, rows: Tensor, span: slice) -> Tensor:
        """x . c - |c|^2 / 2, or x . c: what the nearest code has most of, (n, k)."""
        products = rows @ self.values[span].t()
        return products.sub_(self.squares[span], alpha=0.5) if self.euclidean else products

    def logits(self, rows: Tensor, span: slice) -> Tensor:
        """scale * logit of `rows` for the codes of `span`, (n, k)."""
        products = rows @ self.values[span].t()
        if not self.euclidean:
            return products.mul_(self.scale)
        square = products.mul_(-2).add_(self.squares[span]).add_(rows.square().sum(1, keepdim=True))
        return square.clamp_(min=MIN_SQUARE).sqrt_().mul_(-self.scale)

    def pull_(
        self, grad: Tensor, logits: Tensor, rows: Tensor, span: slice, to_rows: Tensor, to_codes: Tensor | None
    ) -> None:
        """Take the gradient (n, k) of `logits` to rows (n, D) and codes (K, D), adding; `grad` is overwritten."""
        codes = self.values[span]
        if not self.euclidean:
            grad.mul_(self.scale)
            to_rows.addmm_(grad, codes)
            if to_codes is not None:
                to_codes[span].addmm_(grad.t(), rows)
            return
        # A logit is -scale * r with r = |x - c|, and the gradient of -r is (c - x) / r to x and (x - c) / r to c, none
        # where r was raised to its least value; scale / r = -scale^2 / logit.
        least = logits.new_full((), MIN_SQUARE).sqrt_().mul_(-self.scale)
        grad.mul_(-self.scale * self.scale).div_(logits).masked_fill_(logits >= least, 0.0)
        to_rows.addmm_(grad, codes).addcmul_(rows, grad.sum(1, keepdim=True), value=-1)
        if to_codes is not None:
            to_codes[span].addmm_(grad.t(), rows).addcmul_(codes, grad.sum(0).unsqueeze(1), value=-1)

    def log_partition(self, rows: Tensor) -> Tensor:
        """log sum_k exp(scale * logit) of each row, (n,)."""
        total = rows.new_full(rows.shape[:1], -torch.inf)
        for span in self.spans():
            total = torch.logaddexp(total, _log_sum(self.logits(rows, span)))
        return total

    def partition_and_blocks(self, rows: Tensor) -> tuple[Tensor, Iterable[tuple[slice, Tensor]]]:
        """`log_partition` and then the logits of each span; made once where they are one block."""
        if self.values.shape[0] > self.step:
            return self.log_partition(rows), ((span, self.logits(rows, span)) for span in self.spans())
        whole = slice(0, self.values.shape[0])
        logits = self.logits(rows, whole)
        return _log_sum(logits), [(whole, logits)]


def _chances(logits: Tensor, partition: Tensor) -> Tensor:
    """exp(logits - partition), (n, k), but not so little (1e-26 in float32) that it or its products are denormal, which
    a CPU takes ten times as long over.
    """
    least = math.log(torch.finfo(logits.dtype).tiny * 1e12)
    return (logits - partition.unsqueeze(1)).clamp_(min=least).exp_()


def _log_sum(logits: Tensor) -> Tensor:
    """log sum exp of logits (n, k), (n,), by `_chances`."""
    largest = logits.amax(1)
    return _chances(logits, largest).sum(1).log_().add_(largest)


def parts(
    x: Tensor, codes: Tensor, metric: str, scale: float, dtype: torch.dtype, most_rows: int | None = None
) -> Iterator[tuple[int, slice, Codes, Tensor]]:
    """Rows x (H, N, D) and codes (H, K, D), cut: the head, a span of rows, the head's codes, and those rows."""
    step = min(codes.shape[1], _CODES)
    row_step = min(block_elements(x.device) // step, most_rows or x.shape[1])
    for head, book in enumerate(codes):
        ready = Codes.of(book, metric, scale, dtype, step)
        for part in spans(x.shape[1], row_step):
            yield head, part, ready, ready.rows(x[head, part])


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define one operator; autocast and autograd stay outside of it."""
    name = schema[: schema.index("(")]

    def alone(*arguments: Any) -> Any:
        with torch.no_grad(), torch.autocast(arguments[0].device.type, enabled=False):
            return run(*arguments)

    _lib.define(schema)
    _lib.impl(name, alone, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastvq::{name}", fake, lib=_lib)


def _differentiable(name: str, setup: Callable[..., Any], backward: Callable[..., Any]) -> None:
    torch.library.register_autograd(f"fastvq::{name}", backward, setup_context=setup, lib=_lib)


def _like_work(x: Tensor, codes: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=working_dtype(x, codes))


class _Gradients:
    """The gradients of x and codes, in the working dtype; that of the codes only where it is needed."""

    def __init__(self, x: Tensor, codes: Tensor, need_codes: bool) -> None:
        self.dtypes = x.dtype, codes.dtype
        dtype = working_dtype(x, codes)
        self.x = torch.zeros(x.shape, dtype=dtype, device=x.device)
        self.codes = torch.zeros(codes.shape if need_codes else (0,), dtype=dtype, device=x.device)
        self.need_codes = need_codes

    def of_head(self, head: int) -> Tensor | None:
        """The gradient of the codes of a head, (K, D), if it is needed."""
        return self.codes[head] if self.need_codes else None

    def rounded(self) -> tuple[Tensor, Tensor]:
        """Both in the dtypes of their inputs; an empty tensor for one that is not needed."""
        return self.x.to(self.dtypes[0]), self.codes.to(self.dtypes[1])


def _gradients_fake(grad: Tensor, x: Tensor, codes: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), codes.new_empty(codes.shape if rest[-1] else (0,))


# ---- cross entropy ----------------------------------------------------------------------------------------------


def _cross_entropy(x: Tensor, codes: Tensor, targets: Tensor, metric: str, scale: float) -> tuple[Tensor, Tensor]:
    if targets.device.type == "cpu" and targets.numel() and targets.max() >= codes.shape[1]:  # others would wait
        raise ValueError(f"indices must be below codebook_size = {codes.shape[1]}; got {int(targets.max())}")
    losses, partition = (_like_work(x, codes, *targets.shape) for _ in range(2))
    for head, part, ready, rows in parts(x, codes, metric, scale, losses.dtype):
        target = targets[head, part]
        total, chosen = rows.new_full(target.shape, -torch.inf), rows.new_zeros(target.shape)
        for span in ready.spans():
            logits = ready.logits(rows, span)
            total = torch.logaddexp(total, _log_sum(logits))
            place, here = _within(target, span)
            chosen = torch.where(here, logits.gather(1, place).squeeze(1), chosen)
        partition[head, part] = total
        losses[head, part] = torch.where(target >= 0, total - chosen, 0.0)
    return losses, partition


def _within(target: Tensor, span: slice) -> tuple[Tensor, Tensor]:
    """The place (n, 1) of each target (n,) in the codes of `span`, any place for the others; and whether it has one."""
    place = target - span.start
    width = span.stop - span.start
    return place.clamp(0, width - 1).unsqueeze(1), (place >= 0) & (place < width)


def _cross_entropy_backward(
    grad: Tensor,
    x: Tensor,
    codes: Tensor,
    targets: Tensor,
    partition: Tensor,
    metric: str,
    scale: float,
    need_codes: bool,
) -> tuple[Tensor, Tensor]:
    to = _Gradients(x, codes, need_codes)
    weights = grad.to(to.x.dtype).masked_fill(targets < 0, 0.0)
    for head, part, ready, rows in parts(x, codes, metric, scale, to.x.dtype):
        for span in ready.spans():
            logits = ready.logits(rows, span)
            grad_logits = _chances(logits, partition[head, part])
            place, here = _within(targets[head, part], span)
            grad_logits.scatter_add_(1, place, here.to(rows.dtype).neg_().unsqueeze(1))
            grad_logits.mul_(weights[head, part].unsqueeze(1))
            ready.pull_(grad_logits, logits, rows, span, to.x[head, part], to.of_head(head))
    return to.rounded()


def _cross_entropy_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, codes, targets, ctx.metric, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, codes, targets, output[1])


def _cross_entropy_grad(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, codes, targets, partition = ctx.saved_tensors
    to_x, to_codes = torch.ops.fastvq.code_cross_entropy_backward(
        grad, x, codes, targets, partition, ctx.metric, ctx.scale, ctx.needs_input_grad[1]
    )
    return to_x, to_codes if ctx.needs_input_grad[1] else None, None, None, None


register(
    "code_cross_entropy(Tensor x, Tensor codes, Tensor targets, str metric, float scale) -> (Tensor, Tensor)",
    _cross_entropy,
    lambda x, codes, targets, metric, scale: tuple(_like_work(x, codes, *targets.shape) for _ in range(2)),
)
register(
    "code_cross_entropy_backward(Tensor grad, Tensor x, Tensor codes, Tensor targets, Tensor partition, str metric,"
    " float scale, bool need_codes) -> (Tensor, Tensor)",
    _cross_entropy_backward,
    _gradients_fake,
)
_differentiable("code_cross_entropy", _cross_entropy_setup, _cross_entropy_grad)


def cross_entropy(x: Tensor, codes: Tensor, targets: Tensor, *, metric: str, scale: float = 1.0) -> Tensor:
    """-log softmax_k(scale * logit) at the target code of each row.

    Args:
        x: (H, N, D), any floating dtype.
        codes: (H, K, D), one codebook a head.
        targets: (H, N) int64, below K; a row with -1 has a loss of 0 and no gradient.
        metric: "euclidean", "cosine" or "dot".
        scale: of the logits.

    Returns:
        (H, N), float32, or float64 where an input is; with gradients to x and codes.
    """
    losses: Tensor = torch.ops.fastvq.code_cross_entropy(x, codes, targets, metric, scale)[0]
    return losses


# ---- entropy of the mean choice ---------------------------------------------------------------------------------


class _Positions:
    """Some positions of x (H, G, P, D): their rows by head, and blocks of the chances of their codes."""

    def __init__(self, x: Tensor, part: slice, codes: list[Codes], weights: Tensor) -> None:
        self.codes, self.weights = codes, weights[:, :, part]
        self.rows = [book.rows(x[head, :, part].flatten(0, 1)) for head, book in enumerate(codes)]
        self.found = [book.partition_and_blocks(rows) for book, rows in zip(codes, self.rows, strict=True)]

    def blocks(self) -> Iterator[tuple[slice, list[Tensor], list[Tensor], Tensor]]:
        """Of each span of codes: logits and chances by head, (G * p, k) and (G, p, k); their weighted sum (p, k)."""
        groups = self.weights.shape[1]
        for by_head in zip(*(blocks for _, blocks in self.found), strict=True):
            span, logits = by_head[0][0], [at for _, at in by_head]
            chances = [
                _chances(at, total).unflatten(0, (groups, -1))
                for at, (total, _) in zip(logits, self.found, strict=True)
            ]
            mean = torch.zeros_like(chances[0][0])
            for weights, p in zip(self.weights, chances, strict=True):
                for weight, row in zip(weights, p, strict=True):
                    mean.addcmul_(row, weight.unsqueeze(1))
            yield span, logits, chances, mean


def _positions(
    x: Tensor, codes: Tensor, weights: Tensor, metric: str, scale: float, dtype: torch.dtype
) -> Iterator[tuple[slice, _Positions]]:
    groups = max(x.shape[1], 1)
    step = min(codes.shape[1], _CODES, max(16, block_elements(x.device) // groups))
    ready = [Codes.of(book, metric, scale, dtype, step) for book in codes]
    for part in spans(x.shape[2], block_elements(x.device) // (groups * step)):
        yield part, _Positions(x, part, ready, weights.to(dtype))


def _slope(mean: Tensor) -> Tensor:
    """The derivative of -a log max(a, MIN_PROBABILITY) at a = mean."""
    return -(mean.clamp(min=MIN_PROBABILITY).log() + (mean >= MIN_PROBABILITY).to(mean.dtype))


def _entropy(x: Tensor, codes: Tensor, weights: Tensor, metric: str, scale: float) -> tuple[Tensor, Tensor]:
    entropy, tilt = _like_work(x, codes, weights.shape[2]).zero_(), _like_work(x, codes, *weights.shape).zero_()
    for part, here in _positions(x, codes, weights, metric, scale, entropy.dtype):
        for _, _, chances, mean in here.blocks():
            entropy[part] -= (mean * mean.clamp(min=MIN_PROBABILITY).log()).sum(1)
            slope = _slope(mean)
            for head, p in enumerate(chances):
                tilt[head, :, part] += torch.linalg.vecdot(p, slope)
    return entropy, tilt


def _entropy_backward(
    grad: Tensor,
    x: Tensor,
    codes: Tensor,
    weights: Tensor,
    tilt: Tensor,
    metric: str,
    scale: float,
    need_codes: bool,
) -> tuple[Tensor, Tensor]:
    to = _Gradients(x, codes, need_codes)
    for part, here in _positions(x, codes, weights, metric, scale, to.x.dtype):
        pulled = [torch.zeros_like(rows) for rows in here.rows]
        pull = (here.weights * grad[part]).unsqueeze(3)
        for span, logits, chances, mean in here.blocks():
            slope = _slope(mean)
            for head, p in enumerate(chances):
                grad_logits = (slope - tilt[head, :, part].unsqueeze(2)).mul_(p).mul_(pull[head]).flatten(0, 1)
                here.codes[head].pull_(grad_logits, logits[head], here.rows[head], span, pulled[head], to.of_head(head))
        for head, to_rows in enumerate(pulled):
            to.x[head, :, part] = to_rows.view(x.shape[1], -1, x.shape[-1])
    return to.rounded()


def _entropy_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, codes, weights, ctx.metric, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, codes, weights, output[1])


def _entropy_grad(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    need_codes = ctx.needs_input_grad[1]
    to_x, to_codes = torch.ops.fastvq.code_entropy_backward(grad, *ctx.saved_tensors, ctx.metric, ctx.scale, need_codes)
    return to_x, to_codes if need_codes else None, None, None, None


register(
    "code_entropy(Tensor x, Tensor codes, Tensor weights, str metric, float scale) -> (Tensor, Tensor)",
    _entropy,
    lambda x, codes, weights, metric, scale: (
        _like_work(x, codes, weights.shape[2]),
        _like_work(x, codes, *weights.shape),
    ),
)
register(
    "code_entropy_backward(Tensor grad, Tensor x, Tensor codes, Tensor weights, Tensor tilt, str metric, float scale,"
    " bool need_codes) -> (Tensor, Tensor)",
    _entropy_backward,
    _gradients_fake,
)
_differentiable("code_entropy", _entropy_setup, _entropy_grad)


def mean_choice_entropy(x: Tensor, codes: Tensor, weights: Tensor, *, metric: str, scale: float = 1.0) -> Tensor:
    """The entropy in nats of a_k = sum over h, g of weight * softmax_k(scale * logit), at each position.

    Its terms are -a log max(a, 1e-5), as vector-quantize-pytorch has them.

    Args:
        x: (H, G, P, D): G rows at each of P positions.
        codes: (H, K, D).
        weights: (H, G, P), of each row; no gradient goes to them.
        metric, scale: as in `cross_entropy`.

    Returns:
        (P,), float32, or float64 where an input is; with gradients to x and codes.
    """
    entropy: Tensor = torch.ops.fastvq.code_entropy(x, codes, weights, metric, scale)[0]
    return entropy


# ---- the mean code ----------------------------------------------------------------------------------------------


def _mean_code(x: Tensor, codes: Tensor, metric: str, scale: float) -> tuple[Tensor, Tensor]:
    mean, partition = _like_work(x, codes, *x.shape), _like_work(x, codes, *x.shape[:-1])
    for head, part, ready, rows in parts(x, codes, metric, scale, mean.dtype):
        total, blocks = ready.partition_and_blocks(rows)
        out = ready.mean.repeat(rows.shape[0], 1)
        for span, logits in blocks:
            out.addmm_(_chances(logits, total), ready.values[span])
        mean[head, part], partition[head, part] = out, total
    return mean, partition


def _mean_code_backward(
    grad: Tensor,
    x: Tensor,
    codes: Tensor,
    mean: Tensor,
    partition: Tensor,
    metric: str,
    scale: float,
    need_codes: bool,
) -> tuple[Tensor, Tensor]:
    to = _Gradients(x, codes, need_codes)
    for head, part, ready, rows in parts(x, codes, metric, scale, to.x.dtype):
        pull = grad[head, part].to(to.x.dtype)
        at_mean = (pull * (mean[head, part] - ready.mean)).sum(1, keepdim=True)
        for span in ready.spans():
            logits = ready.logits(rows, span)
            chances = _chances(logits, partition[head, part])
            if need_codes:
                to.codes[head, span].addmm_(chances.t(), pull)
            grad_logits = (pull @ ready.values[span].t()).sub_(at_mean).mul_(chances)
            ready.pull_(grad_logits, logits, rows, span, to.x[head, part], to.of_head(head))
    return to.rounded()


def _mean_code_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, codes, ctx.metric, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, codes, *output)


def _mean_code_grad(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    need_codes = ctx.needs_input_grad[1]
    to_x, to_codes = torch.ops.fastvq.mean_code_backward(grad, *ctx.saved_tensors, ctx.metric, ctx.scale, need_codes)
    return to_x, to_codes if need_codes else None, None, None


register(
    "mean_code(Tensor x, Tensor codes, str metric, float scale) -> (Tensor, Tensor)",
    _mean_code,
    lambda x, codes, metric, scale: (_like_work(x, codes, *x.shape), _like_work(x, codes, *x.shape[:-1])),
)
register(
    "mean_code_backward(Tensor grad, Tensor x, Tensor codes, Tensor mean, Tensor partition, str metric, float scale,"
    " bool need_codes) -> (Tensor, Tensor)",
    _mean_code_backward,
    _gradients_fake,
)
_differentiable("mean_code", _mean_code_setup, _mean_code_grad)


def mean_code(x: Tensor, codes: Tensor, *, metric: str, scale: float = 1.0) -> Tensor:
    """sum_k softmax_k(scale * logit) c_k: the code that a row would take on average if it drew one.

    Args:
        x: (H, N, D).
        codes: (H, K, D).
        metric, scale: as in `cross_entropy`.

    Returns:
        (H, N, D), float32, or float64 where an input is; with gradients to x and codes.
    """
    mean: Tensor = torch.ops.fastvq.mean_code(x, codes, metric, scale)[0]
    return mean
