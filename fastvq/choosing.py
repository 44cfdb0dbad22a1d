"""Other choices than the nearest code: the k nearest, and codes drawn at random; streamed, never an N x K matrix.

The random numbers are counter-based: a function of a seed, the head, the row and the code, so they are the same however
the work is cut into blocks, and on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends import reference
from fastvq.backends.reference import working_dtype
from fastvq.streaming import parts, register

_SPARE = 8  # candidates beyond the k nearest by screening, to be scored again in the order of the specification
_SCORES = 1 << 22  # elements of the candidates' differences held at once

# ---- the k nearest ----------------------------------------------------------------------------------------------


def _rescored(x: Tensor, codes: Tensor, candidates: Tensor, euclidean: bool) -> Tensor:
    """What is minimised, (n, m), for the candidates (n, m) of rows x (n, D): float64, terms added in order."""
    near = codes[candidates].double()
    total = near.new_zeros(candidates.shape)
    for i in range(x.shape[1]):
        term = x[:, i : i + 1] - near[..., i] if euclidean else x[:, i : i + 1] * near[..., i]
        total += term * term if euclidean else -term
    return torch.where(total.isnan(), torch.inf, total)


def _nearest(x: Tensor, codes: Tensor, k: int, metric: str) -> Tensor:
    indices = torch.empty((*x.shape[:-1], k), dtype=torch.int64, device=x.device)
    many = min(k + _SPARE, codes.shape[1])
    first = torch.arange(many, device=x.device)
    most_rows = max(1, _SCORES // (many * codes.shape[2]))
    for head, part, ready, rows in parts(x, codes, metric, 1.0, torch.float64, most_rows):
        values, places = rows.new_empty(rows.shape[0], 0), indices.new_empty(rows.shape[0], 0)
        for span in ready.spans():
            values, places = _best(values, places, ready.closeness(rows, span), span.start, many)
        places = torch.where(values[:, :1] == -torch.inf, first, places)  # nothing is near a NaN
        candidates = places.sort(1).values  # in order, so that a stable sort puts the first of equals first
        scores = _rescored(x[head, part].double(), codes[head], candidates, metric == "euclidean")
        indices[head, part] = candidates.gather(1, scores.sort(dim=1, stable=True).indices[:, :k])
        if many < codes.shape[1] and x.device.type == "cpu":  # others would wait for the answer
            gap = values[:, k - 1] - values[:, -1]
            (unproven,) = torch.where(~(gap > _screening_error(x[head, part], codes[head])))
            numbers = torch.arange(x.shape[1])[part][unproven]
            for block in numbers.split(max(1, _SCORES // codes.shape[1])):
                indices[head, block] = _nearest_of_all(x[head, block], codes[head], k, metric)
    return indices


def _screening_error(x: Tensor, codes: Tensor) -> Tensor:
    """How far two screened scores of rows x (n, D) can be from the order of the defined ones, (n,).

    With u = 2^-53 and centred codes, whose norms are at most twice the largest, a product of D terms, the norms beside
    it and the centring are off by less than 2 (D + 8) u (|x| + 3 max |c|)^2, the defined score by less than half that.
    """
    norms = codes.double().norm(dim=1)
    reach = x.double().norm(dim=1) + 3 * torch.where(norms.isfinite(), norms, 0.0).max()  # others are near no row
    return 16 * (x.shape[1] + 8) * 2.0**-53 * reach.square() + 1e-290


def _nearest_of_all(x: Tensor, codes: Tensor, k: int, metric: str) -> Tensor:
    """The k nearest (n, k) of all codes (K, D), by the specification."""
    scores = reference._scores(x.double(), codes.double(), metric)
    return torch.where(scores.isnan(), torch.inf, scores).sort(dim=1, stable=True).indices[:, :k]


def _best(values: Tensor, places: Tensor, scores: Tensor, start: int, many: int) -> tuple[Tensor, Tensor]:
    """The `many` highest of values and scores (n, k), with their places among the codes; NaN is the lowest."""
    scores = scores.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    block = scores.topk(min(many, scores.shape[1]), dim=1)
    values, places = torch.cat([values, block.values], 1), torch.cat([places, block.indices + start], 1)
    kept = values.topk(min(many, values.shape[1]), dim=1)
    return kept.values, places.gather(1, kept.indices)


register(
    "nearest_codes(Tensor x, Tensor codes, int k, str metric) -> Tensor",
    _nearest,
    lambda x, codes, k, metric: x.new_empty((*x.shape[:-1], k), dtype=torch.int64),
)


def nearest_codes(x: Tensor, codes: Tensor, k: int, *, metric: str) -> Tensor:
    """The k nearest codes of every row, nearest first, the lowest index first of equals.

    Codes are screened in float64 and the best scored again as the specification does. On the CPU rows for which that
    proves nothing are scored whole, so the order is exact; other devices would have to wait to know, and are exact
    unless more than eight codes beyond the k are nearer to the last than float64 can tell. Not differentiable.

    Args:
        x: (H, N, D), any floating dtype.
        codes: (H, K, D).
        k: from 1 to K.
        metric: "euclidean", "cosine" or "dot".

    Returns:
        (H, N, k), int64.
    """
    indices: Tensor = torch.ops.fastvq.nearest_codes(x.detach(), codes.detach(), k, metric)
    return indices


# ---- codes at random --------------------------------------------------------------------------------------------

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # of SplitMix64 (Steele, Lea, Flood, 2014), as are the numbers below
_MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def _shifted(bits: Tensor, by: int) -> Tensor:
    """bits >> by of int64 as if it had no sign."""
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)


def _mixed(bits: Tensor) -> Tensor:
    """The finaliser of SplitMix64: every bit of the result depends on every bit given; in place."""
    bits.bitwise_xor_(_shifted(bits, 30)).mul_(_MIX[0])
    bits.bitwise_xor_(_shifted(bits, 27)).mul_(_MIX[1])
    return bits.bitwise_xor_(_shifted(bits, 31))


def _gumbel(seed: Tensor, head: int, rows: slice, codes: slice, dtype: torch.dtype) -> Tensor:
    """Standard Gumbel numbers for these rows and codes, (n, k)."""
    row = torch.arange(rows.start + 1, rows.stop + 1, device=seed.device)
    code = torch.arange(codes.start + 1, codes.stop + 1, device=seed.device)
    stream = _mixed(_mixed(seed + (head + 1) * 0x5851F42D4C957F2D) + row * _GOLDEN)
    bits = _mixed(stream.unsqueeze(1) + code * _GOLDEN)
    # u = (bits + 1/2) / 2^53 is uniform between 0 and 1, fine near 0, where -log(1 - u) is small and its Gumbel large.
    uniform = _shifted(bits, 11).to(dtype).add_(0.5).mul_(2.0**-53).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _sample(x: Tensor, codes: Tensor, seed: Tensor, k: int, metric: str, temperature: float) -> Tensor:
    indices = torch.empty((*x.shape[:-1], k), dtype=torch.int64, device=x.device)
    for head, part, ready, rows in parts(x, codes, metric, 1 / temperature, working_dtype(x, codes)):
        values, places = rows.new_empty(rows.shape[0], 0), indices.new_empty(rows.shape[0], 0)
        for span in ready.spans():
            noisy = ready.logits(rows, span).add_(_gumbel(seed, head, part, span, rows.dtype))
            values, places = _best(values, places, noisy, span.start, k)
        indices[head, part] = places.masked_fill(values == -torch.inf, 0)
    return indices


register(
    "sample_codes(Tensor x, Tensor codes, Tensor seed, int k, str metric, float temperature) -> Tensor",
    _sample,
    lambda x, codes, seed, k, metric, temperature: x.new_empty((*x.shape[:-1], k), dtype=torch.int64),
)


def sample_codes(x: Tensor, codes: Tensor, *, metric: str, temperature: float, k: int = 1) -> Tensor:
    """k codes of every row drawn without replacement, by chances softmax_k(logit / temperature), in the order drawn.

    The Gumbel-max trick (Maddison et al., 2014; without replacement: Vieira, 2014): the k highest of
    logit / temperature plus Gumbel noise. The logits are those of `fastvq.streaming`. Not differentiable. The noise
    comes from one number drawn from torch's default generator of the device.

    Args:
        x: (H, N, D), any floating dtype.
        codes: (H, K, D).
        metric: "euclidean", "cosine" or "dot".
        temperature: above 0.
        k: from 1 to K.

    Returns:
        (H, N, k), int64; index 0 for a row whose logits are all NaN.
    """
    seed = torch.randint(-(1 << 62), 1 << 62, (), device=x.device)
    indices: Tensor = torch.ops.fastvq.sample_codes(x.detach(), codes.detach(), seed, k, metric, temperature)
    return indices
