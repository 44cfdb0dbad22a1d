"""Bad arguments get an error that says what came and what is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common import CODES, DIM, pair
from torch import nn

import fastvq


def test_defaults_may_be_given_as_other_numbers() -> None:
    fastvq.VectorQuantize(DIM, CODES, orthogonal_reg_weight=0, codebook_diversity_temperature=100, sync_update_v=0)


def test_unknown_arguments_are_type_errors() -> None:
    with pytest.raises(TypeError, match="codebook_sizes"):
        fastvq.VectorQuantize(DIM, CODES, codebook_sizes=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="masks"):
        fastvq.VectorQuantize(DIM, CODES)(torch.randn(3, DIM), masks=None)


BAD = [
    ({"dim": 0}, ValueError, "dim must be at least 1; got 0"),
    ({"dim": 7.0}, TypeError, "dim must be an int; got float"),
    ({"codebook_size": 0}, ValueError, "codebook_size must be at least 1; got 0"),
    ({"codebook_size": "16"}, TypeError, "codebook_size must be an int; got str"),
    ({"codebook_dim": 0}, ValueError, "codebook_dim must be at least 1; got 0"),
    ({"heads": 0}, ValueError, "heads must be at least 1; got 0"),
    ({"heads": True}, TypeError, "heads must be an int; got bool"),
    ({"kmeans_iters": -1}, ValueError, "kmeans_iters must be at least 0; got -1"),
    ({"decay": 1.5}, ValueError, "decay must be from 0 to 1; got 1.5"),
    ({"decay": float("nan")}, ValueError, "decay must be from 0 to 1; got nan"),
    ({"decay": None}, TypeError, "decay must be a number; got NoneType"),
    ({"eps": -1e-5}, ValueError, "eps must be at least 0; got -1e-05"),
    ({"threshold_ema_dead_code": -1}, ValueError, "threshold_ema_dead_code must be at least 0; got -1"),
    ({"commitment_weight": float("inf")}, ValueError, "commitment_weight must be finite; got inf"),
    ({"commitment_weight": "1"}, TypeError, "commitment_weight must be a number; got str"),
    ({"learnable_codebook": True}, ValueError, "learnable_codebook=True needs ema_update=False"),
    (
        {"learnable_codebook": True, "ema_update": False, "use_cosine_sim": True},
        ValueError,
        "learnable_codebook=True needs use_cosine_sim=False",
    ),
    ({"straight_through": True, "rotation_trick": True}, ValueError, "at most one of straight_through, rotation_trick"),
    ({"directional_reparam": True}, ValueError, "directional_reparam=True needs threshold_ema_dead_code above 0"),
    ({"vq_bridge": nn.Identity(), "learnable_codebook": False}, ValueError, "vq_bridge needs learnable_codebook=True"),
    ({"vq_bridge": nn.Identity(), "ema_update": True}, ValueError, "learnable_codebook=True needs ema_update=False"),
    ({"sync_update_v": 0.5}, ValueError, "sync_update_v=0.5 needs learnable_codebook=True"),
    ({"sync_update_v": 1.5}, ValueError, "sync_update_v must be from 0 to 1; got 1.5"),
    ({"affine_param": True, "use_cosine_sim": True}, ValueError, "affine_param=True needs use_cosine_sim=False"),
    ({"sample_codebook_temp": -1.0}, ValueError, "sample_codebook_temp must be at least 0; got -1"),
    ({"orthogonal_reg_max_codes": 0}, ValueError, "orthogonal_reg_max_codes must be at least 1; got 0"),
    (
        {"orthogonal_reg_active_codes_only": True, "heads": 2, "separate_codebook_per_head": True},
        ValueError,
        "orthogonal_reg_active_codes_only=True needs separate_codebook_per_head=False",
    ),
    (
        {"accept_image_fmap": True, "accept_3d_fmap": True},
        ValueError,
        "accept_image_fmap=True needs accept_3d_fmap=False",
    ),
    (
        {"in_place_codebook_optimizer": torch.optim.SGD},
        ValueError,
        "in_place_codebook_optimizer needs learnable_codebook",
    ),
    (
        {"learnable_codebook": True, "ema_update": False, "straight_through": True},
        ValueError,
        "learnable_codebook=True needs straight_through=False",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[str(b[0]) for b in BAD])
def test_bad_constructor_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        fastvq.VectorQuantize(**({"dim": DIM, "codebook_size": CODES} | options))
    assert message in str(caught.value)


MASK = torch.ones(3, 11, dtype=torch.bool)
BAD_CALLS = [
    ({}, {"x": [[1.0]]}, TypeError, "x must be a torch.Tensor; got list"),
    (
        {},
        {"x": torch.zeros(3, 11, 8)},
        ValueError,
        "x must have shape (B, N, dim) or (B, dim), with dim = 7; got (3, 11, 8)",
    ),
    ({}, {"x": torch.zeros(3, 8)}, ValueError, "with dim = 7; got (3, 8)"),
    ({}, {"x": torch.zeros(7)}, ValueError, "with dim = 7; got (7,)"),
    ({}, {"x": torch.zeros(2, 3, 4, 7)}, ValueError, "with dim = 7; got (2, 3, 4, 7)"),
    ({}, {"x": torch.zeros(3, 7, dtype=torch.int64)}, TypeError, "x must be float32"),
    (
        {"channel_last": False},
        {"x": torch.zeros(3, 11, 7)},
        ValueError,
        "as channel_last=False asks, with dim = 7; got (3, 11, 7)",
    ),
    (
        {"accept_image_fmap": True},
        {"x": torch.zeros(3, 4, 5, 7)},
        ValueError,
        "as accept_image_fmap asks, with dim = 7; got (3, 4, 5, 7)",
    ),
    ({"accept_image_fmap": True}, {"x": torch.zeros(3, 7, 5)}, ValueError, "as accept_image_fmap asks"),
    ({}, {"mask": MASK, "lens": torch.ones(3, dtype=torch.int64)}, ValueError, "mask and lens"),
    ({}, {"mask": MASK.float()}, TypeError, "mask must be bool; got torch.float32"),
    ({}, {"mask": MASK[:, :5]}, ValueError, "mask must have shape (3, 11); got (3, 5)"),
    ({}, {"mask": [True]}, TypeError, "mask must be a torch.Tensor; got list"),
    ({}, {"lens": torch.ones(3)}, TypeError, "lens must be int64 or int32; got torch.float32"),
    ({}, {"lens": torch.ones(11, dtype=torch.int64)}, ValueError, "lens must have shape (3,); got (11,)"),
    ({}, {"lens": 4}, TypeError, "lens must be a torch.Tensor; got int"),
    ({}, {"x": torch.zeros(3, 7), "mask": MASK}, ValueError, "mask needs x with a dimension of tokens"),
    (
        {"accept_image_fmap": True},
        {"x": torch.zeros(3, 7, 5, 5), "mask": MASK},
        ValueError,
        "mask needs x with a dimension of tokens",
    ),
    (
        {"accept_image_fmap": True},
        {"x": torch.zeros(3, 7, 5, 5), "lens": torch.ones(3, dtype=torch.int64)},
        ValueError,
        "lens needs x",
    ),
    ({"heads": 2}, {"topk": 2}, ValueError, "topk needs heads=1; got 2"),
    ({}, {"topk": 0}, ValueError, "topk must be at least 1; got 0"),
    (
        {"commitment_use_cross_entropy_loss": True},
        {"topk": 2},
        ValueError,
        "topk needs commitment_use_cross_entropy_loss=False in training",
    ),
    ({}, {"sample_codebook_temp": -0.5}, ValueError, "sample_codebook_temp must be at least 0; got -0.5"),
    (
        {},
        {"ema_update_weight": torch.ones(3)},
        ValueError,
        "ema_update_weight must have shape (13,) or (1, 13); got (3,)",
    ),
    (
        {},
        {"codebook_transform_fn": lambda codes: codes},
        ValueError,
        "codebook_transform_fn must return shape (1, 3, 11, 13, 7); got (1, 13, 7)",
    ),
    ({}, {"indices": torch.full((3, 11), 13)}, ValueError, "indices must be below codebook_size = 13; got 13"),
    ({}, {"indices": torch.zeros(3, 5, dtype=torch.int64)}, ValueError, "indices must have shape (3, 11); got (3, 5)"),
    ({}, {"indices": torch.zeros(3, 11)}, TypeError, "indices must be int64 or int32; got torch.float32"),
    (
        {"accept_3d_fmap": True},
        {"x": torch.zeros(3, 7, 5, 5)},
        ValueError,
        "as accept_3d_fmap asks, with dim = 7; got (3, 7, 5, 5)",
    ),
]


@pytest.mark.parametrize(("options", "call", "error", "message"), BAD_CALLS, ids=[b[3] for b in BAD_CALLS])
def test_bad_inputs(options: dict[str, Any], call: dict[str, Any], error: type[Exception], message: str) -> None:
    layer = fastvq.VectorQuantize(DIM, CODES, **options)
    with pytest.raises(error) as caught:
        layer(**({"x": torch.zeros(3, 11, 7)} | call))
    assert message in str(caught.value)


@pytest.mark.parametrize("method", ["get_codes_from_indices", "get_output_from_indices"])
def test_bad_indices(method: str) -> None:
    layer = fastvq.VectorQuantize(DIM, CODES, heads=2)
    with pytest.raises(TypeError, match=r"indices must be a torch.Tensor; got list"):
        getattr(layer, method)([0, 1])
    with pytest.raises(TypeError, match=r"indices must be int64 or int32; got torch.float32"):
        getattr(layer, method)(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"indices must have heads = 2 in the last dimension; got \(2, 3\)"):
        getattr(layer, method)(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(IndexError):
        getattr(layer, method)(torch.full((3, 2), CODES))


def test_bad_codebooks() -> None:
    layer, _ = pair()
    with pytest.raises(TypeError, match=r"codebook must be a torch.Tensor; got list"):
        layer.codebook = [1.0]
    with pytest.raises(ValueError, match=r"codebook must have shape \(13, 7\); got \(7, 13\)"):
        layer.codebook = torch.zeros(DIM, CODES)
    separate, _ = pair(heads=2, separate_codebook_per_head=True)
    with pytest.raises(ValueError, match=r"codebook must have shape \(2, 13, 7\); got \(13, 7\)"):
        separate.codebook = torch.zeros(CODES, DIM)


def test_attributes_that_people_read() -> None:
    ours, theirs = pair(heads=2, codebook_dim=3, channel_last=False, commitment_weight=0.5, eps=1e-4)
    for name, value in vars(theirs).items():
        if not name.startswith("_") and name != "training":
            assert getattr(ours, name) == value, name
    for name in ("ema_update", "has_projections"):
        assert getattr(ours, name) == getattr(theirs, name), name
    public = {name for name in dir(theirs) if not name.startswith("_")} - set(dir(nn.Module))
    assert public - set(dir(ours)) == set()
    book, other = ours._codebook, theirs._codebook
    for name in ("codebook_size", "num_codebooks", "kmeans_iters", "decay", "eps", "threshold_ema_dead_code"):
        assert getattr(book, name) == getattr(other, name), name
    for name in ("reset_cluster_size", "learnable_codebook", "use_cosine_sim", "has_dead_code_replacement"):
        assert getattr(book, name) == getattr(other, name), name
    assert "codebook_dim=3" in repr(ours)


@pytest.mark.parametrize(
    ("dim", "given", "wanted"), [(7, None, True), (1, None, False), (1, True, True), (7, False, False)]
)
def test_rotation_trick_is_the_default_in_more_than_one_dimension(dim: int, given: bool | None, wanted: bool) -> None:
    assert fastvq.VectorQuantize(dim, CODES, rotation_trick=given).rotation_trick is wanted
