"""The scalar quantisers where vector-quantize-pytorch crashes or is silently wrong; and their errors."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from peers import twins
from torch import Tensor, nn

import fastvq
from fastvq.nn import distributed


def round_trip(layer: nn.Module, x: Tensor) -> None:
    """What `forward` gives is what its indices give back."""
    layer.eval()
    with torch.no_grad():
        quantized, indices, *_ = layer(x)
        decode = getattr(layer, "get_output_from_indices", None) or layer.indices_to_codes
        torch.testing.assert_close(decode(indices), quantized, rtol=1e-4, atol=1e-5)


def test_fsq_of_more_codes_than_float32_or_int32_can_number() -> None:
    layer = fastvq.FSQ([8] * 12)
    x = torch.randn(3, 50, 12)
    quantized, indices = layer(x)
    assert (layer.codebook_size, indices.dtype) == (2**36, torch.int64)
    assert torch.equal(layer.indices_to_codes(indices), quantized)
    assert fastvq.FSQ([8] * 10)(x[..., :10])[1].dtype == torch.int32
    round_trip(fastvq.FSQ([8] * 10, preserve_symmetry=True), x[..., :10])


def test_fsq_of_more_levels_than_the_bound_leaves_room_for() -> None:
    layer = fastvq.FSQ([3001, 4000])
    indices = layer(torch.linspace(-50, 50, 999).unsqueeze(-1).expand(-1, 2))[1]
    levels = layer.indices_to_level_indices(indices)
    assert levels.amin(0).tolist() == [0, 0]
    assert levels.amax(0).tolist() == [3000, 3999]


def test_fsq_without_float32() -> None:
    layer = fastvq.FSQ([8, 8, 8, 5, 5], force_quantization_f32=False)
    quantized, indices = layer(torch.randn(3, 50, 5, dtype=torch.bfloat16))
    torch.testing.assert_close(layer.indices_to_codes(indices).bfloat16(), quantized, rtol=0, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_nan_is_level_0(symmetric: bool) -> None:
    layer = fastvq.FSQ([8, 5], preserve_symmetry=symmetric)
    quantized, indices = layer(torch.tensor([[torch.nan, 0.0], [torch.nan, torch.nan]]))
    assert layer.indices_to_level_indices(indices).tolist() == [[0, 2], [0, 0]]
    assert quantized.isnan().tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("FSQ", {"levels": [8, 5, 5]}, (3, 3)),
        ("FSQ", {"levels": [8, 5, 5], "dim": 6}, (6,)),
        ("LFQ", {"dim": 6}, (3, 6)),
        ("LFQ", {"dim": 6, "channel_first": False}, (2, 4, 5, 6)),
        ("LFQ", {"dim": 6, "codebook_size": 16, "spherical": True, "orthogonal_rotation": True}, (2, 4, 6)),
        ("ResidualFSQ", {"levels": [5, 5], "dim": 6, "num_quantizers": 2, "orthogonal_rotation": True}, (2, 4, 6)),
        ("ResidualFSQ", {"levels": [5, 5], "dim": 6, "num_quantizers": 3, "is_channel_first": True}, (2, 6, 4, 5)),
        ("ResidualFSQ", {"levels": [5, 5], "dim": 6, "num_quantizers": 3, "is_channel_first": True}, (2, 6, 3)),
        (
            "GroupedResidualFSQ",
            {"levels": [5, 5], "dim": 6, "groups": 2, "num_quantizers": 3, "accept_image_fmap": True},
            (2, 6, 4, 5),
        ),
        ("ResidualLFQ", {"codebook_size": 16, "dim": 6, "num_quantizers": 3, "spherical": True}, (2, 4, 6)),
        (
            "GroupedResidualLFQ",
            {"codebook_size": 16, "dim": 6, "groups": 2, "num_quantizers": 3, "accept_image_fmap": True},
            (2, 6, 4, 5),
        ),
        ("LatentQuantize", {"levels": [5, 4], "dim": 6}, (3, 6)),
        ("LatentQuantize", {"levels": [5, 4], "dim": 6, "num_codebooks": 3}, (3, 6, 4)),
        ("FSP", {"levels": [5, 4], "dim": 6, "channel_first": True, "need_inv_act": True}, (3, 6, 4)),
    ],
    ids=str,
)
def test_decoding_gives_the_output(name: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    round_trip(getattr(fastvq, name)(**options), torch.randn(shape))


def test_residual_fsq_decodes_channel_first_as_the_peer_when_asked() -> None:
    options = {"levels": [5, 5], "dim": 6, "num_quantizers": 3, "is_channel_first": True}
    ours, theirs = twins("ResidualFSQ", ours_only={"strict_compat": True}, **options)
    indices = ours(torch.randn(2, 6, 7))[1]
    for method in ("get_codes_from_indices", "get_output_from_indices"):
        mine, other = (getattr(layer, method)(indices.movedim(1, -1)) for layer in (ours, theirs))
        torch.testing.assert_close(mine, other)


def lfq(**options: Any) -> fastvq.LFQ:
    torch.manual_seed(1)
    return fastvq.LFQ(dim=8, codebook_size=64, commitment_loss_weight=0.5, **options)


def test_masked_tokens_take_no_part_in_the_loss_of_lfq() -> None:
    x, mask = torch.randn(3, 7, 8), torch.rand(3, 7) < 0.5
    found, parts = lfq()(x, mask=mask, inv_temperature=3.0, return_loss_breakdown=True)
    alone, of_alone = lfq()(x[mask].unsqueeze(0), inv_temperature=3.0, return_loss_breakdown=True)
    torch.testing.assert_close([found.entropy_aux_loss, *parts], [alone.entropy_aux_loss, *of_alone])
    x[~mask] = 1e6
    torch.testing.assert_close(lfq()(x, mask=mask, inv_temperature=3.0).entropy_aux_loss, found.entropy_aux_loss)
    nothing = lfq()(x, mask=torch.zeros_like(mask), return_loss_breakdown=True)[1]
    assert torch.stack(nothing).tolist() == [0.0, 0.0, 0.0]


def test_lfq_takes_the_mask_of_an_image_in_either_shape() -> None:
    x, mask = torch.randn(2, 8, 4, 3), torch.rand(2, 4, 3) < 0.5
    flat = lfq()(x, mask=mask.flatten(1)).entropy_aux_loss
    torch.testing.assert_close(lfq()(x, mask=mask).entropy_aux_loss, flat)


def test_a_share_of_the_masked_tokens_is_sampled() -> None:
    x, mask = torch.randn(3, 20, 8), torch.arange(20).expand(3, 20) < 10
    whole = lfq()(x, mask=mask, return_loss_breakdown=True)[1].per_sample_entropy
    x[:, 10:] = torch.nan
    half = lfq(frac_per_sample_entropy=0.5)
    shares = [half(x, mask=mask, return_loss_breakdown=True)[1].per_sample_entropy for _ in range(100)]
    torch.testing.assert_close(torch.stack(shares).mean(), whole, rtol=0.2, atol=0.0)
    assert torch.stack(shares).unique().numel() > 80


def test_the_batch_of_lfq_is_that_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, one with the mirror image of the other's rows: together they use every code as often."""
    x = torch.randn(1, 9, 4, dtype=torch.float64).requires_grad_()
    layer = fastvq.LFQ(dim=4)
    both = layer(torch.cat([x, -x], 1), return_loss_breakdown=True)[1].batch_entropy
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce_", lambda mean: mean + mean.flip(-1))
    mine = layer(x, return_loss_breakdown=True)[1].batch_entropy
    torch.testing.assert_close(mine, both)
    gradients = [torch.autograd.grad(value, x)[0] for value in (mine, both)]
    torch.testing.assert_close(*gradients)  # each process has its half of the rows: half the sum, twice the weight


def test_the_values_of_latent_quantize_learn() -> None:
    torch.manual_seed(0)
    layer = fastvq.LatentQuantize([5, 4], dim=2)
    x = torch.rand(64, 2, 9) * 3
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(150):
        loss = layer(x)[2]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 10
    quantized, indices, _ = layer.eval()(x)
    assert torch.equal(layer.indices_to_codes(indices), quantized)
    assert torch.equal(layer.codes_to_indices(quantized.movedim(1, -1)), indices)
    frozen = fastvq.LatentQuantize([5, 4], dim=2, strict_compat=True)
    loss = frozen(x.requires_grad_())[2]
    loss.backward()
    assert all(value.grad is None for value in frozen.values_per_latent)


def test_the_values_of_latent_quantize_learn_in_place() -> None:
    layer = fastvq.LatentQuantize([5, 4], dim=2, in_place_codebook_optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    x = torch.rand(64, 2, 9) * 3
    losses = [float(layer(x)[2].detach()) for _ in range(100)]
    assert losses[-1] < losses[0] / 5
    before = [value.clone() for value in layer.values_per_latent]
    layer.eval()(x)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.values_per_latent, strict=True))


def test_fixed_values_move_with_the_module_and_are_not_saved() -> None:
    layer = fastvq.LatentQuantize([5, 4], dim=2, optimize_values=False)
    assert list(layer.state_dict()) == []
    assert layer.to(torch.float64).values_per_latent[1].dtype == torch.float64
    assert len(layer.values_per_latent) == 2


def test_evo_lfq_reads_bits_behind_a_projection_and_from_images() -> None:
    model = fastvq.EvoLFQ(nn.Identity(), nn.Identity(), dim=7, codebook_size=32, num_codebooks=2)
    x = torch.randn(4, 7)
    bits = model.encode(x)
    assert bits.shape == (4, 10)
    torch.testing.assert_close(model.decode_bits(bits), model.eval()(x).reconstructed)
    torch.testing.assert_close(model.decode_bits(model.encode(x, return_signs=True)), model(x).reconstructed)
    image = torch.randn(2, 7, 3, 4)
    torch.testing.assert_close(model.decode_bits(model.encode(image)), model(image).reconstructed)


def test_evo_lfq_leaves_the_modes_of_its_parts_alone() -> None:
    model = fastvq.EvoLFQ(nn.Identity(), nn.Identity(), dim=5).train()
    model.decoder.eval()
    model.encode(torch.randn(3, 5))
    assert (model.training, model.encoder.training, model.decoder.training) == (True, True, False)


def test_one_row_has_finite_moments() -> None:
    x = torch.randn(1, 1, 2, requires_grad=True)
    loss = fastvq.FSP([5, 4], vector_norm="kurt")(x)[2]
    loss.backward()
    assert loss.isfinite()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_hierarchical_vq_learns_decodes_and_looks_at_no_padding() -> None:
    torch.manual_seed(0)
    layer = fastvq.HierarchicalVQ(dim=4, codebook_size=8, scales=[1, 2, 5, 10], quant_resi=0.1)
    x, mask = torch.randn(8, 4, 10), torch.arange(10) < torch.randint(1, 11, (8, 1))
    errors = []
    for _ in range(20):
        quantized, _, loss = layer(x, mask=mask)
        errors.append(float((quantized - x)[mask.unsqueeze(1).expand_as(x)].square().mean().detach()))
        assert loss.isfinite()
    assert errors[-1] < errors[0]
    layer.eval()
    quantized, indices, _ = layer(x, mask=mask)
    garbage = torch.where(mask.unsqueeze(1), x, torch.nan)
    torch.testing.assert_close(layer(garbage, mask=mask)[:2], (quantized, indices))
    decoded = layer.get_output_from_indices(indices)
    torch.testing.assert_close(decoded.where(mask.unsqueeze(1), 0.0), quantized, rtol=1e-4, atol=1e-5)


def test_nested_dropout_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A last level that only the device knows gives what one does that the host knows."""
    options = {"kmeans_init": False, "threshold_ema_dead_code": 0, "nested_dropout": 1.0}
    layer = fastvq.HierarchicalVQ(dim=4, codebook_size=16, scales=[1, 2, 5], **options)
    x, state = torch.randn(8, 4, 5), {name: value.clone() for name, value in layer.state_dict().items()}
    outputs = []
    for cutoff in (1, torch.tensor(1)):
        layer.load_state_dict(state)
        monkeypatch.setattr(layer, "sample_nested_cutoff", lambda device, cutoff=cutoff: cutoff)
        quantized, _, loss = layer(x)
        outputs.append((quantized, loss))
    torch.testing.assert_close(*outputs)
    monkeypatch.undo()
    monkeypatch.setattr("fastvq.nn.hierarchical_vq.host_seed", lambda device: None)
    drawn = torch.stack([layer.sample_nested_cutoff(x.device) for _ in range(100)])
    assert drawn.unique().tolist() == [0, 1]


def test_random_projections_are_the_paper_s() -> None:
    """The nearest unit code of each projection, by hand; and no weight that could be trained."""
    layer = fastvq.RandomProjectionQuantizer(dim=6, codebook_size=13, codebook_dim=4, num_codebooks=3)
    assert list(layer.parameters()) == []
    x = torch.randn(2, 7, 6)
    rows = torch.einsum("bnd,hde->bnhe", nn.functional.layer_norm(x, (6,)), layer.rand_projs)
    cosines = torch.einsum("bnhe,hke->bnhk", nn.functional.normalize(rows, dim=-1), layer.vq.codebook)
    assert torch.equal(layer.train()(x), cosines.argmax(-1))
    loss = nn.functional.cross_entropy(cosines.flatten(0, 2), (targets := torch.randint(13, (2, 7, 3))).flatten())
    torch.testing.assert_close(layer(x, indices=targets), loss)


FSQ, LFQ = {"levels": [8, 5]}, {"dim": 4}
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("FSQ", {"levels": [8, 2]}, "levels must be at least 3, or preserve_symmetry; got [8, 2]"),
    ("FSQ", {"levels": [8, 1], "preserve_symmetry": True}, "levels must be at least 2; got [8, 1]"),
    ("FSQ", {"levels": []}, "levels must name at least one level; got []"),
    ("FSQ", FSQ | {"noise_dropout": 0.5}, "noise_dropout needs preserve_symmetry=True; got noise_dropout=0.5"),
    ("FSQ", FSQ | {"noise_dropout": 1.5, "preserve_symmetry": True}, "noise_dropout must be from 0 to 1; got 1.5"),
    (
        *("FSQ", FSQ | {"num_codebooks": 2, "keep_num_codebooks_dim": False}),
        "keep_num_codebooks_dim must be True with num_codebooks = 2; got False",
    ),
    ("LFQ", {}, "dim or codebook_size must be given; got neither"),
    ("LFQ", {"codebook_size": 12}, "codebook_size must be a power of 2, such as 16; got 12"),
    ("LFQ", LFQ | {"soft_clamp_input_value": 0.5}, "soft_clamp_input_value must be at least codebook_scale = 1.0"),
    ("LFQ", LFQ | {"frac_per_sample_entropy": 0.0}, "frac_per_sample_entropy must be more than 0; got 0"),
    ("LFQ", LFQ | {"codebook_size": 8, "has_projections": False}, "has_projections=False needs dim = 3"),
    ("ResidualFSQ", FSQ | {"num_quantizers": 0}, "num_quantizers must be at least 1; got 0"),
    (
        *("ResidualFSQ", FSQ | {"num_quantizers": 2, "soft_clamp_input_value": 1.0}),
        "soft_clamp_input_value needs bound_hard_clamp=False",
    ),
    ("ResidualFSQ", FSQ | {"num_quantizers": 2, "num_codebooks": 2}, "num_codebooks is no argument of ResidualFSQ"),
    (
        *("ResidualFSQ", FSQ | {"num_quantizers": 2, "quantize_dropout": True, "quantize_dropout_cutoff_index": 2}),
        "quantize_dropout_cutoff_index must be below num_quantizers = 2; got 2",
    ),
    ("GroupedResidualFSQ", FSQ | {"num_quantizers": 2, "dim": 5, "groups": 2}, "dim must be a multiple of groups = 2"),
    ("ResidualLFQ", {"dim": 4, "num_quantizers": 2, "codebook_size": 12}, "codebook_size must be a power of 2"),
    ("FSP", FSQ | {"quantize_rate": 2.0}, "quantize_rate must be from 0 to 1; got 2.0"),
    ("FSP", FSQ | {"act_name": "relu"}, "act_name must be one of tanh, sigmoid, normal, laplace, cauchy; got 'relu'"),
    ("FSP", FSQ | {"vector_norm": "l5"}, "vector_norm must be one of none, var, kurt"),
    ("LatentQuantize", {"levels": 5, "dim": 4}, "codebook_dim, with an int for levels, must be at least 1; got -1"),
    (
        *("LatentQuantize", FSQ | {"dim": 4, "optimize_values": False, "in_place_codebook_optimizer": torch.optim.SGD}),
        "in_place_codebook_optimizer needs optimize_values=True; got False",
    ),
    ("BinaryMapper", {"bits": 0}, "bits must be at least 1; got 0"),
    ("SimVQ", {"dim": 4, "codebook_size": 0}, "codebook_size must be at least 1; got 0"),
    (
        *("ResidualSimVQ", {"dim": 4, "codebook_size": 8, "num_quantizers": 2, "heads": 2}),
        "heads must be 1 in a residual quantiser; got 2",
    ),
    ("HierarchicalVQ", {"dim": 4, "codebook_size": 8, "scales": [2, 1]}, "scales must not decrease; got [(2,), (1,)]"),
    (
        *("HierarchicalVQ", {"dim": 4, "codebook_size": (8, 9), "scales": [1, 2]}),
        "codebook_size must be one number with shared_codebook; got (8, 9)",
    ),
    (
        *("EvoLFQ", {"encoder": nn.Identity(), "decoder": nn.Identity(), "dim": 4, "pop_size": 3, "elitism_count": 3}),
        "pop_size must be more than elitism_count = 3; got 3",
    ),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD, ids=[f"{b[0]} {b[2]}" for b in BAD])
def test_bad_arguments(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(fastvq, name)(**options)


def test_bad_inputs() -> None:
    with pytest.raises(ValueError, match=re.escape("z must have shape (..., dim), with dim = 2; got (3, 4)")):
        fastvq.FSQ([8, 5])(torch.randn(3, 4))
    with pytest.raises(TypeError, match=re.escape("z must be a torch.Tensor; got list")):
        fastvq.FSQ([8, 5])([[1.0, 2.0]])
    with pytest.raises(ValueError, match=re.escape("x must have shape (B, dim, ...), with dim = 4; got (1, 3, 2, 2)")):
        fastvq.LFQ(dim=4)(torch.randn(1, 3, 2, 2))
    with pytest.raises(TypeError, match=re.escape("mask must be bool; got torch.float32")):
        fastvq.LFQ(dim=4)(torch.randn(1, 3, 4), mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match=re.escape("mask must have shape (1, 3); got (3,)")):
        fastvq.LFQ(dim=4)(torch.randn(1, 3, 4), mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match=re.escape("indices must be int64 or int32; got torch.float32")):
        fastvq.FSQ([8, 5]).indices_to_codes(torch.ones(3))
    residual = fastvq.ResidualFSQ(levels=[8, 5], num_quantizers=3)
    with pytest.raises(ValueError, match=r"indices must have num_quantizers = 3 .* got \(4, 2\); fewer need"):
        residual.get_codes_from_indices(torch.zeros(4, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="give one of indices and one_hot; got neither"):
        fastvq.BinaryMapper(2).log_prob(torch.randn(3, 2))
