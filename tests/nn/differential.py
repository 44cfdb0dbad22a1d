"""The comparer of the differential suite: our layer and the peer's, the same weights and inputs, step by step."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from common import assert_same, give_codes
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize as Peer

import fastvq

DIM, CODES, BATCH, LENGTH = 6, 13, 3, 19
TOLERANCE = {torch.float32: (1e-4, 2e-5), torch.float64: (1e-4, 2e-5), torch.bfloat16: (2e-2, 2e-2)}
LEARNABLE = {"learnable_codebook": True, "ema_update": False}

# Every factor and its levels; the suite runs cases that hold each pair of levels of two factors that go together.
FACTORS: dict[str, dict[str, dict[str, Any]]] = {
    "metric": {"euclidean": {}, "cosine": {"use_cosine_sim": True}},
    "teacher": {
        "ema": {},
        "learnable": LEARNABLE,
        "in place": LEARNABLE | {"in_place_codebook_optimizer": partial(torch.optim.SGD, lr=0.1)},
    },
    "estimator": {"rotation": {}, "straight-through": {"rotation_trick": False}},
    "heads": {"one": {}, "shared": {"heads": 2}, "separate": {"heads": 2, "separate_codebook_per_head": True}},
    "projection": {"none": {"codebook_dim": None}, "projected": {"codebook_dim": 4}},
    "layout": {
        "last": {},
        "first": {"channel_last": False},
        "image": {"accept_image_fmap": True},
        "volume": {"accept_3d_fmap": True},
        "single": {},
    },
    "mask": {"none": {}, "mask": {}, "lens": {}},
    "dtype": {"float32": {}, "bfloat16": {}, "float64": {}},
    "mode": {"train": {}, "eval": {}},
}
Case = dict[str, str]


def runs_there(case: Case) -> bool:
    """Whether the peer neither refuses the case nor crashes."""
    masked = case["mask"] != "none"
    return not (
        (case["metric"] == "cosine" and case["teacher"] != "ema")
        or (masked and (case["heads"], case["projection"]) != ("one", "none"))
        or (masked and case["layout"] not in ("last", "first"))
        or (case["mask"] == "lens" and case["layout"] == "first")
        or (case["teacher"] == "in place" and case["dtype"] != "float32")  # it mixes dtypes
        or (case["projection"] == "projected" and case["dtype"] != "float32")  # its projections stay in float32
    )


def pairs_of(case: Case) -> set[tuple[tuple[str, str], ...]]:
    """The pairs of levels that a case holds."""
    return set(itertools.combinations(case.items(), 2))


def pairwise() -> list[Case]:
    """Few cases that hold every pair of levels which any runnable case holds: greedily, the most new pairs first."""
    product = itertools.product(*FACTORS.values())
    cases = [case for levels in product if runs_there(case := dict(zip(FACTORS, levels, strict=True)))]
    left = set().union(*map(pairs_of, cases))
    chosen = []
    while left:
        best = max(cases, key=lambda case: len(pairs_of(case) & left))
        chosen.append(best)
        left -= pairs_of(best)
    return chosen


def options_of(case: Case) -> dict[str, Any]:
    """The constructor's arguments, heads and codebook_dim such that there is a projection where one is asked for."""
    options = {key: value for factor, level in case.items() for key, value in FACTORS[factor][level].items()}
    if options["codebook_dim"] is None:
        options["codebook_dim"] = DIM // options.get("heads", 1)
    strict = case["metric"] == "cosine" and case["mask"] != "none"  # the peer's loss of masked cosine rows
    return options | ({"strict_compat": True} if strict else {})


def build(**options: Any) -> tuple[fastvq.VectorQuantize, Peer]:
    """Ours and the peer's layer with equal weights."""
    strict = {"strict_compat": options.pop("strict_compat", False)}
    layers = []
    for kind, extra in ((fastvq.VectorQuantize, strict), (Peer, {})):
        torch.manual_seed(1)
        layers.append(kind(**({"dim": DIM, "codebook_size": CODES} | copy.deepcopy(options) | extra)))
    if not options.get("kmeans_init"):
        give_codes(*layers)
    return layers[0], layers[1]


def batches(case: Case, count: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Inputs of the case's layout and dtype, and its mask."""
    shapes = {
        "last": (BATCH, LENGTH, DIM),
        "first": (BATCH, DIM, LENGTH),
        "image": (BATCH, DIM, 5, 4),
        "volume": (BATCH, DIM, 2, 3, 3),
        "single": (BATCH * LENGTH, DIM),
    }
    lens = torch.tensor([4, LENGTH, 1])
    masks = {"none": {}, "mask": {"mask": torch.arange(LENGTH) < lens[:, None]}, "lens": {"lens": lens}}
    for seed in range(count):
        x = torch.randn(shapes[case["layout"]], generator=torch.Generator().manual_seed(seed))
        yield x.to(getattr(torch, case["dtype"])), masks[case["mask"]]


def step(layer: nn.Module, x: Tensor, **arguments: Any) -> dict[str, Tensor]:
    """One step: all that is returned, the gradients, and the state after gradient descent, by name."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    torch.manual_seed(2)
    quantized, indices, loss, parts = layer(x, return_loss_breakdown=True, **arguments)
    found = {"quantized": quantized.detach(), "indices": indices, "loss": loss.detach()}
    found |= {name: part.detach() for name, part in parts._asdict().items()}
    if layer.training:
        weights = torch.randn(quantized.shape, generator=torch.Generator().manual_seed(3)).to(quantized)
        ((quantized * weights).sum() + loss).backward()
        found["grad x"] = x.grad
        for name, parameter in layer.named_parameters():
            if parameter.grad is not None:
                found[f"grad {name}"] = parameter.grad.clone()
                parameter.data -= 1e-2 * parameter.grad
    return found | {name: value.detach().clone() for name, value in layer.state_dict().items()}


def compare(layers: Sequence[nn.Module], inputs: Iterator[tuple[Tensor, dict[str, Any]]], **arguments: Any) -> None:
    """Fails unless both layers do the same at every step, to the rounding of the dtype."""
    ours, theirs = layers
    for x, masks in inputs:
        rtol, atol = TOLERANCE[x.dtype]
        mine, other = (step(layer, x, **masks, **arguments) for layer in (ours, theirs))
        if x.dtype == torch.bfloat16:  # the peer's loss and rotation are computed in bfloat16: rounded many times
            mine, other = ({k: v.float() if v.is_floating_point() else v for k, v in f.items()} for f in (mine, other))
            for name in {"quantized", "grad x"} & mine.keys():
                value, wanted = mine.pop(name), other.pop(name)
                assert (value - wanted).norm() < rtol * wanted.norm()
        assert_same(mine, other, rtol=rtol, atol=atol)


def compare_case(case: Case, steps: int = 20) -> None:
    """A case of the grid, for so many steps."""
    layers = build(**options_of(case))
    for layer in layers:
        layer.train(case["mode"] == "train")
    compare(layers, batches(case, steps))


PLAIN: Case = {factor: next(iter(levels)) for factor, levels in FACTORS.items()}


def compare_options(steps: int = 3, case: Case = PLAIN, **options: Any) -> None:
    """Constructor arguments beside the grid's, on plain inputs."""
    compare(build(**options), batches(case, steps))


def compare_kmeans() -> None:
    """The first codebook from the same rows, to the rounding of the peer's smoothing of its counts."""
    ours, theirs = build(kmeans_init=True)
    x = torch.randn(BATCH, LENGTH * 3, DIM, generator=torch.Generator().manual_seed(0))
    found = []
    for layer in (ours, theirs):
        torch.manual_seed(3)
        layer.eval()(x)
        found.append(layer.state_dict())
    assert_same(*found, rtol=1e-4, atol=1e-4)


def compare_near_ties() -> None:
    """Codes far closer to each other than to the rows: indices are equal but where float64 can hardly tell."""
    ours, theirs = build(codebook_size=200, dim=8)
    generator = torch.Generator().manual_seed(4)
    codes = 1e-2 * torch.rand(200, 8, generator=generator)
    for layer in (ours, theirs):
        layer._codebook.embed.copy_(codes)
        layer.eval()
    x = torch.randn(2, 500, 8, generator=generator)
    mine, other = (layer(x)[1].flatten() for layer in (ours, theirs))
    distances = torch.cdist(x.flatten(0, 1).double(), codes.double())
    pair = torch.stack([mine, other], 1)
    gaps = distances.gather(1, pair)
    assert torch.equal(mine, distances.argmin(1))
    assert ((mine == other) | ((gaps[:, 0] - gaps[:, 1]).abs() < 4e-7 * gaps[:, 0])).all()


def compare_ties() -> None:
    """Every code twice: the first copy is taken."""
    ours, _ = build(codebook_size=2 * CODES)
    codes = torch.randn(CODES, DIM, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        ours._codebook.embed.copy_(torch.cat([codes, codes])[None])
    x = torch.randn(BATCH, LENGTH, DIM, generator=torch.Generator().manual_seed(6))
    assert torch.equal(ours.eval()(x)[1], torch.cdist(x, codes).argmin(-1))


# What must notice a fault: a small part of the suite, the same functions.
SENTINELS = {
    "step by step": partial(compare_options, decay=0.9, eps=1e-3),
    "straight-through": partial(compare_options, rotation_trick=False, commitment_weight=0.3),
    "dead codes": partial(compare_options, threshold_ema_dead_code=3),
    "mask": partial(compare_options, case=PLAIN | {"mask": "mask"}),
    "k-means": compare_kmeans,
    "near ties": compare_near_ties,
    "ties": compare_ties,
}


def first_failure(sentinels: dict[str, Callable[[], None]]) -> str | None:
    """The first sentinel that fails."""
    for name, sentinel in sentinels.items():
        try:
            sentinel()
        except AssertionError:
            return name
    return None
