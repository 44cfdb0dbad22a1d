"""The functions for those who write their own layer; each is one operator, with the arguments people expect."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq import ops

_search = ops.direct["search"]
_vector_quantize = ops.direct["vector_quantize"]
_vector_quantize_counted = ops.direct["vector_quantize_counted"]
_code_sums = ops.direct["code_sums"]
_ema_update = ops.direct["ema_update_"]
_ema_step = ops.direct["ema_step_"]
_residual_quantize = ops.direct["residual_quantize"]


def _still(t: Tensor) -> Tensor:
    """A tensor without its gradient; making a view of one that has none costs as much as all checks."""
    return t.detach() if t.requires_grad else t


def _given(**optional: object) -> dict[str, object]:
    """The optional arguments that were given."""
    return {name: value for name, value in optional.items() if value is not None}


def search(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "euclidean",
    return_distance: bool = False,
    precision: str = "exact",
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The nearest code of every row: the one that is nearest in exact arithmetic, the first of equals.

    The index is the same on every backend, device, batch size and number of threads: see `backends/reference.py`.
    A NaN distance counts as infinite. Not differentiable.

    Args:
        x: (..., D), or (H, ..., D) with a codebook a head; float32, bfloat16, float16 or float64, any strides.
        codebook: (K, D) or (H, K, D); any of those dtypes.
        metric: "euclidean" (smallest distance), "dot" (largest dot product), or "cosine" (the same, for codes that
            the caller has normalised; the scale of x does not matter).
        return_distance: return the distances too.
        precision: "exact", or "fast", which may skip the proof and so may miss the nearest of near-equals.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; None asks `use_backend` and FASTVQ_BACKEND.

    Returns:
        Indices (...), int64; or (indices, distances) with distances (...): squared euclidean distances, or the dot
        products for the other two metrics; float32, or float64 when an input is float64.

    Raises:
        TypeError: an argument is no dense tensor, has a dtype that is not floating, or no string where one is needed.
        ValueError: shapes or devices do not fit, K = 0, D = 0, or an unknown metric, precision or backend.
        BackendUnavailableError: the backend asked for by name cannot serve in this process.
    """
    ops.check_tensors(x=x, codebook=codebook)
    ops.check_strings(metric=metric, precision=precision)
    ops.check_backend(backend)
    indices, distances = _search(_still(x), _still(codebook), metric, return_distance, precision, backend)
    return (indices, distances) if return_distance else indices


def vector_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "euclidean",
    commitment_weight: float = 1.0,
    codebook_weight: float = 0.0,
    mask: Tensor | None = None,
    return_counts: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Replace every row by its nearest code, with the straight-through gradient and the losses of a VQ-VAE.

    loss = commitment_weight * mean((x - sg[q])^2) + codebook_weight * mean((sg[x] - q)^2), where sg stops the
    gradient (van den Oord et al., 2017, equation 3). The gradient of `quantized` goes to x as it is.

    Args:
        x: (..., D) or (H, ..., D); float32, bfloat16, float16 or float64, any strides.
        codebook: (K, D) or (H, K, D).
        metric: as in `search`; the losses are squared euclidean under every metric.
        commitment_weight: weight of the loss that pulls x to its code.
        codebook_weight: weight of the loss that pulls the code to x.
        mask: (...) bool, the shape of x less its last dimension; rows where it is False are quantised but take no
            part in the loss nor in the counts. Without any row the loss is 0.
        return_counts: return the counts too; they are taken in the same pass over the rows.
        backend: as in `search`.

    Returns:
        quantized (..., D) in the dtype of x, exactly the codes (rounded where that dtype is narrower); indices (...),
        int64; loss (), float32, or float64 when an input is float64. With return_counts also counts (K,), or (H, K)
        with a codebook a head, int64: how many rows took each code, those of `code_sums` as numbers that stay exact
        however many there are. A row with NaN or infinity in it has an index and a loss but is not counted, as such
        rows say nothing of how the codes are used.

    Raises:
        TypeError, ValueError, BackendUnavailableError: as in `search`; also for a mask of the wrong dtype or shape.
    """
    ops.check_tensors(x=x, codebook=codebook, **_given(mask=mask))
    ops.check_strings(metric=metric)
    ops.check_backend(backend)
    ops.check_numbers(commitment_weight=commitment_weight, codebook_weight=codebook_weight)
    quantize = _vector_quantize_counted if return_counts else _vector_quantize
    found: tuple[Tensor, ...] = quantize(x, codebook, metric, commitment_weight, codebook_weight, mask, backend)
    return found


def code_sums(
    x: Tensor,
    indices: Tensor,
    codebook_size: int,
    *,
    mask: Tensor | None = None,
    per_head: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """How many rows chose each code, and their sum: what k-means and the EMA update need.

    Sums are taken in float64 in the order of the rows and rounded once, so they do not depend on the number of
    threads. Not differentiable.

    Args:
        x: (..., D); float32, bfloat16, float16 or float64, any strides.
        indices: (...) int64, from -1 (the row is left out) to codebook_size - 1.
        codebook_size: K.
        mask: (...) bool; rows where it is False are left out.
        per_head: the first dimension of x and indices is H, and each head is summed by itself.
        backend: as in `search`.

    Returns:
        counts (K,) and sums (K, D), or (H, K) and (H, K, D) per head; float32, or float64 for float64 x.

    Raises:
        TypeError, ValueError, BackendUnavailableError: as in `search`; also for indices that are not int64 or that lie
            at or past codebook_size, in a row that the mask leaves out too. Backend "triton" fails a device-side
            assertion instead, as torch does: an exception would take waiting for the device.
    """
    ops.check_tensors(x=x, indices=indices, **_given(mask=mask))
    ops.check_integers(codebook_size=codebook_size)
    ops.check_backend(backend)
    sums: tuple[Tensor, Tensor] = _code_sums(_still(x), indices, codebook_size, mask, per_head, backend)
    return sums


def ema_update_(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor,
    counts: Tensor,
    sums: Tensor,
    *,
    decay: float,
    eps: float = 1e-5,
    backend: str | None = None,
) -> None:
    """The exponential-moving-average codebook update, in place (van den Oord et al., 2017, appendix A.1).

    cluster_size <- decay * cluster_size + (1 - decay) * counts, embed_avg likewise with sums; then with
    n = sum(cluster_size), codebook <- embed_avg / ((cluster_size + eps) / (n + K * eps) * n), Laplace smoothing.

    Args:
        codebook: (K, D) or (H, K, D), overwritten.
        cluster_size: (K,) or (H, K), updated.
        embed_avg: the shape of codebook, updated.
        counts: the shape of cluster_size, from `code_sums`.
        sums: the shape of codebook, from `code_sums`.
        decay: from 0 to 1, the weight of the past.
        eps: smoothing that keeps codes without rows finite.
        backend: as in `search`.

    An operator of the same step that is to be differentiated needs the codes as they were: pass it a copy, and where
    the step is compiled one by `fastvq.ops.copied`, since inductor drops a `clone`.

    Raises:
        TypeError, ValueError, BackendUnavailableError: as in `search`; also for a decay outside 0 to 1.
    """
    ops.check_tensors(codebook=codebook, cluster_size=cluster_size, embed_avg=embed_avg, counts=counts, sums=sums)
    ops.check_numbers(decay=decay, eps=eps)
    ops.check_backend(backend)
    _ema_update(codebook, cluster_size, embed_avg, counts, sums, decay, eps, backend)


def ema_step_(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor,
    x: Tensor,
    indices: Tensor,
    *,
    decay: float,
    eps: float = 1e-5,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`code_sums` and `ema_update_` in one call: the codebook learns from rows and their codes, in place.

    Rows with NaN or infinity in them are left out. Where processes share a codebook their sums must be added up between
    the two: call them one by one there.

    Args:
        codebook: (K, D), or (H, K, D) with a codebook a head, overwritten.
        cluster_size: (K,) or (H, K), updated.
        embed_avg: the shape of codebook, updated.
        x: (..., D) or (H, ..., D), any floating dtype and strides.
        indices: the shape of x less its last dimension, int64, as `search` gives them; -1 leaves a row out.
        decay, eps: as in `ema_update_`.
        mask: the shape of indices, bool; rows where it is False are left out.
        backend: as in `search`.

    Returns:
        counts, the shape and dtype of cluster_size: how many rows took each code.

    Raises:
        TypeError, ValueError, BackendUnavailableError: as in `code_sums` and `ema_update_`.
    """
    tensors = {"codebook": codebook, "cluster_size": cluster_size, "embed_avg": embed_avg, "x": x, "indices": indices}
    ops.check_tensors(**tensors, **_given(mask=mask))
    ops.check_numbers(decay=decay, eps=eps)
    ops.check_backend(backend)
    counts = torch.empty_like(cluster_size)
    _ema_step(codebook, cluster_size, embed_avg, counts, x, indices, mask, decay, eps, backend)
    return counts


def residual_quantize(
    x: Tensor, codebooks: Tensor, *, metric: str = "euclidean", backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise x, then what is left of it, stage by stage (SoundStream: Zeghidour et al., 2021, algorithm 1).

    The residual after a stage is r - c, rounded once in float32 (float64 for float64 input); quantized is the sum of
    the codes in the order of the stages, in the same arithmetic; so each stage has its canonical nearest code.

    Args:
        x: (..., D), or (H, ..., D) with codebooks a head.
        codebooks: (Q, K, D) or (H, Q, K, D), one codebook a stage.
        metric: as in `search`.
        backend: as in `search`.

    Returns:
        quantized (..., D) in the dtype of x, with the straight-through gradient to x; indices (..., Q), int64; losses
        (Q,): mean((r - c)^2) of each stage, with gradients to x and to the stage's own codebook (detach `codebooks`
        for a commitment loss alone); float32, or float64 when an input is float64.

    Raises:
        TypeError, ValueError, BackendUnavailableError: as in `search`; also for Q = 0.
    """
    ops.check_tensors(x=x, codebooks=codebooks)
    ops.check_strings(metric=metric)
    ops.check_backend(backend)
    return _residual_quantize(x, codebooks, metric, backend)
