"""What vector-quantize-pytorch asserts is a ValueError, in the same places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import vector_quantize_pytorch as peer
from torch import nn

import fastvq

VQ = {"dim": 6, "codebook_size": 13}
LEARNABLE = {"learnable_codebook": True, "ema_update": False}
RESIDUAL = VQ | {"num_quantizers": 2}
FSQ, LFQ = {"levels": [8, 5], "dim": 6}, {"dim": 6, "codebook_size": 16}
TOKENS, MASK, LENS = torch.zeros(2, 5, 6), torch.ones(2, 5, dtype=torch.bool), torch.tensor([5, 2])
HIERARCHY = {"dim": 6, "codebook_size": 8, "scales": [1, 5]}

# class, constructor, arguments of forward, or None where the constructor itself asserts
ASSERTED: list[tuple[str, dict[str, Any], dict[str, Any] | None]] = [
    ("VectorQuantize", VQ | {"use_cosine_sim": True} | LEARNABLE, None),
    ("VectorQuantize", VQ | {"straight_through": True, "rotation_trick": True}, None),
    ("VectorQuantize", VQ | {"directional_reparam": True, "rotation_trick": True, "threshold_ema_dead_code": 1}, None),
    ("VectorQuantize", VQ | {"directional_reparam": True}, None),
    ("VectorQuantize", VQ | {"straight_through": True, "rotation_trick": False} | LEARNABLE, None),
    ("VectorQuantize", VQ | {"learnable_codebook": True, "ema_update": True}, None),
    ("VectorQuantize", VQ | {"vq_bridge": nn.Identity(), "learnable_codebook": False}, None),
    ("VectorQuantize", VQ | {"vq_bridge": nn.Identity(), "ema_update": True}, None),
    ("VectorQuantize", VQ | LEARNABLE | {"sync_update_v": 1.5}, None),
    ("VectorQuantize", VQ | {"sync_update_v": 0.5}, None),
    ("VectorQuantize", VQ | {"affine_param": True, "use_cosine_sim": True}, None),
    ("VectorQuantize", VQ, {"mask": MASK, "lens": LENS}),
    ("VectorQuantize", VQ | {"accept_image_fmap": True}, {"x": torch.zeros(2, 6, 3, 3), "mask": MASK}),
    ("VectorQuantize", VQ | {"accept_3d_fmap": True}, {"x": torch.zeros(2, 6, 3, 3, 3), "mask": MASK}),
    ("VectorQuantize", VQ, {"x": torch.zeros(2, 6), "mask": MASK}),
    ("VectorQuantize", VQ | {"heads": 2}, {"topk": 3}),
    ("VectorQuantize", VQ, {"topk": 0}),
    ("VectorQuantize", VQ | {"commitment_use_cross_entropy_loss": True}, {"topk": 3}),
    ("VectorQuantize", VQ | LEARNABLE | {"in_place_codebook_optimizer": torch.optim.SGD}, {"topk": 3}),
    (
        "VectorQuantize",
        VQ
        | {"orthogonal_reg_weight": 1.0, "orthogonal_reg_active_codes_only": True}
        | {"heads": 2, "separate_codebook_per_head": True},
        {},
    ),
    ("ResidualVQ", RESIDUAL | {"heads": 2}, None),
    ("ResidualVQ", VQ, None),
    ("ResidualVQ", RESIDUAL | {"codebook_size": (13, 7, 5)}, None),
    ("ResidualVQ", RESIDUAL | {"quantize_dropout": True, "quantize_dropout_cutoff_index": -1}, None),
    ("ResidualVQ", RESIDUAL | {"eval_beam_size": 2}, None),
    ("ResidualVQ", RESIDUAL | {"beam_size": 2, "beam_score_quantizer_weights": [1.0]}, None),
    ("ResidualVQ", RESIDUAL | {"codebook_size": (13, 7), "shared_codebook": True}, None),
    ("ResidualVQ", RESIDUAL, {"indices": torch.full((2, 5, 2), -1)}),
    ("GroupedResidualVQ", RESIDUAL | {"groups": 4}, None),
    ("GroupedResidualVQ", RESIDUAL | {"groups": 2}, {"x": torch.zeros(2, 5, 4)}),
    ("ResidualFSQ", FSQ | {"levels": [8, 1], "num_quantizers": 2}, None),
    ("GroupedResidualFSQ", FSQ | {"num_quantizers": 2, "groups": 4}, None),
    ("GroupedResidualFSQ", FSQ | {"num_quantizers": 2, "groups": 2}, {"x": torch.zeros(2, 5, 4)}),
    ("GroupedResidualLFQ", LFQ | {"num_quantizers": 2, "groups": 4}, None),
    ("GroupedResidualLFQ", LFQ | {"num_quantizers": 2, "groups": 2}, {"x": torch.zeros(2, 5, 4)}),
    ("FSQ", FSQ | {"levels": [8, 2]}, None),
    ("FSQ", FSQ | {"noise_dropout": 0.5}, None),
    ("FSQ", FSQ | {"num_codebooks": 2, "keep_num_codebooks_dim": False}, None),
    ("FSQ", FSQ, {"x": torch.zeros(2, 5, 4)}),
    ("LFQ", {}, None),
    ("LFQ", {"dim": 6, "codebook_size": 13}, None),
    ("LFQ", LFQ | {"num_codebooks": 2, "keep_num_codebooks_dim": False}, None),
    ("LFQ", LFQ | {"frac_per_sample_entropy": 0.0}, None),
    ("LFQ", LFQ | {"soft_clamp_input_value": 0.5}, None),
    ("LFQ", LFQ, {"x": torch.zeros(2, 5, 4)}),
    ("LatentQuantize", FSQ, {"x": torch.zeros(2, 5, 4)}),
    ("BinaryMapper", {"bits": 6}, {"x": torch.zeros(2, 5, 4)}),
    (
        "EvoLFQ",
        LFQ | {"pop_size": 2, "elitism_count": 2, "encoder": nn.Identity(), "decoder": nn.Identity()},
        None,
    ),
    ("ResidualSimVQ", RESIDUAL | {"heads": 2}, None),
    ("HierarchicalVQ", HIERARCHY | {"accept_image_fmap": True, "accept_3d_fmap": True}, None),
    ("HierarchicalVQ", HIERARCHY | {"nested_dropout": 1.5}, None),
    ("HierarchicalVQ", HIERARCHY | {"nested_dropout_min_levels": 0}, None),
    ("HierarchicalVQ", HIERARCHY | {"scales": []}, None),
    ("HierarchicalVQ", HIERARCHY | {"scales": [5, 1]}, None),
    ("HierarchicalVQ", HIERARCHY | {"codebook_size": (8, 8, 8)}, None),
    ("HierarchicalVQ", HIERARCHY | {"codebook_size": (8, 9)}, None),
    ("HierarchicalVQ", HIERARCHY, {"x": torch.zeros(2, 6, 5), "mask": MASK, "lens": LENS}),
]


@pytest.mark.parametrize(("name", "options", "call"), ASSERTED, ids=str)
def test_an_assertion_is_a_value_error(name: str, options: dict[str, Any], call: dict[str, Any] | None) -> None:
    for package, error in ((peer, AssertionError), (fastvq, ValueError)):
        if call is None:
            with pytest.raises(error):
                getattr(package, name)(**options)
            continue
        arguments = {"x": TOKENS} | call
        try:
            layer = getattr(package, name)(**options)
        except ValueError:
            assert package is fastvq  # told earlier than there
            continue
        with pytest.raises(error):
            layer(arguments.pop("x"), **arguments)
