"""The reference model: its shapes, its loss, its codes, and the seed example's layers."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvq.models import CONFIGS, VQVAE, VQVAEConfig, fingerprint

SMALL = VQVAEConfig(
    hidden=(6, 10), residual_blocks=1, residual_channels=4, code_dim=5, codebook_size=12, kmeans_init=False
)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_seed_configuration_is_the_keras_example_layer_for_layer():
    model = VQVAE(CONFIGS["seed"])
    assert (parameters(model.encoder), parameters(model.decoder)) == (19_856, 28_033)
    assert model.quantizer.codebook.shape == (64, 16)
    convolutions = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    assert [(m.out_channels, m.kernel_size[0], m.stride[0]) for m in convolutions] == [
        *[(32, 3, 2), (64, 3, 2), (16, 1, 1)],
        *[(64, 3, 2), (32, 3, 2), (1, 3, 1)],
    ]
    output = model(torch.rand(4, 1, 28, 28))
    assert output.indices.shape == (4, 7, 7)
    assert output.reconstruction.shape == (4, 1, 28, 28)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(28, 28), (33, 50), (1, 3)])
def test_any_size_goes_in_and_comes_out(name, size):
    model = VQVAE(dataclasses.replace(CONFIGS[name], kmeans_init=False))
    images = torch.rand(2, model.config.in_channels, *size)
    output = model(images)
    assert output.reconstruction.shape == images.shape
    assert output.indices.shape == (2, -(-size[0] // 4), -(-size[1] // 4))
    assert output.indices.dtype == torch.int64
    assert output.loss.shape == ()


@pytest.mark.parametrize(
    "change", [{"hidden": (4,)}, {"hidden": (4, 6, 8)}, {"kernel": 3}, {"output_convolution": True}]
)
@pytest.mark.parametrize("blocks", [0, 2])
def test_every_shape_of_model_restores_the_size(change, blocks):
    model = VQVAE(dataclasses.replace(SMALL, residual_blocks=blocks, **change))
    assert model(torch.rand(1, 3, 24, 40)).reconstruction.shape == (1, 3, 24, 40)


def test_decoding_the_codes_gives_the_reconstruction():
    model = VQVAE(SMALL).eval()
    images = torch.rand(3, 3, 21, 30)
    expected = model(images)
    indices = model.encode(images)
    assert torch.equal(indices, expected.indices)
    torch.testing.assert_close(model.decode(indices, (21, 30)), expected.reconstruction.clamp(0, 1))
    assert model.decode(indices).shape == (3, 3, 24, 32)


def test_padding_repeats_the_border():
    model = VQVAE(SMALL).eval()
    images = torch.rand(1, 3, 13, 18)
    padded = F.pad(images, (0, 2, 0, 3), mode="replicate")
    assert torch.equal(model.encode(images), model.encode(padded))


def test_the_loss_is_the_error_over_the_variance_and_the_commitment():
    model = VQVAE(SMALL).train()
    images = torch.rand(2, 3, 16, 16)
    latents, codebook = model.encoder(images - 0.5), model.quantizer.codebook.clone()
    output = model(images)
    codes = codebook[output.indices].permute(0, 3, 1, 2)
    commitment = 0.25 * F.mse_loss(latents, codes)
    torch.testing.assert_close(output.loss, F.mse_loss(output.reconstruction, images) / 0.06 + commitment)


def test_the_gradient_passes_the_codebook():
    model = VQVAE(SMALL)
    model(torch.rand(2, 3, 16, 16)).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder.parameters())


def test_encoding_in_training_mode_teaches_the_codebook_nothing():
    model = VQVAE(SMALL).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.encode(torch.rand(2, 3, 16, 16))
    assert model.quantizer.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model(torch.rand(2, 3, 16, 16))
    assert not torch.equal(model.quantizer.codebook, before["quantizer._codebook.embed"][0])


class Halving(nn.Module):
    codebook = torch.zeros(12, 5)

    def forward(self, x):
        return x / 2, torch.full((x.shape[0], *x.shape[2:]), 7), x.new_tensor(3.0)


def test_another_quantizer_can_take_the_place():
    model = VQVAE(SMALL, quantizer=Halving())
    images = torch.rand(2, 3, 16, 16)
    output = model(images)
    torch.testing.assert_close(output.reconstruction, model.decoder(model.encoder(images - 0.5) / 2) + 0.5)
    assert (model.encode(images) == 7).all()
    torch.testing.assert_close(output.loss, F.mse_loss(output.reconstruction, images) / 0.06 + 3.0)


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "images must be floats.*uint8"),
        (torch.zeros(1, 1, 8, 8), ValueError, r"images must have shape \(B, 3, H, W\)"),
        (torch.zeros(3, 8, 8), ValueError, "images must have shape"),
        (torch.zeros(1, 3, 0, 8), ValueError, "images must have shape"),
    ],
)
def test_bad_images_are_refused(images, error, words):
    model = VQVAE(SMALL)
    for call in (model, model.encode):
        with pytest.raises(error, match=words):
            call(images)


@pytest.mark.parametrize(
    ("indices", "words"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), r"indices must have shape"),
        (torch.full((1, 2, 2), 12), "from 0 to 11"),
        (torch.full((1, 2, 2), -1), "from 0 to 11"),
    ],
)
def test_bad_indices_are_refused(indices, words):
    with pytest.raises(ValueError, match=words):
        VQVAE(SMALL).decode(indices)


# ---- fingerprint ------------------------------------------------------------------------------------------------


def fresh() -> VQVAE:
    torch.manual_seed(5)
    return VQVAE(SMALL)


def test_the_fingerprint_is_of_the_weights_and_the_shape():
    model = fresh()
    assert fingerprint(model) == fingerprint(fresh())
    assert len(fingerprint(model)) == 16
    names = {fingerprint(model)}
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.view(-1)[0] += 1
        names.add(fingerprint(model))
    model.quantizer.codebook = model.quantizer.codebook + 1
    names.add(fingerprint(model))
    assert len(names) == len(list(model.parameters())) + 2


def test_the_fingerprint_leaves_out_what_only_training_uses():
    model = fresh()
    before = fingerprint(model)
    model.quantizer._codebook.cluster_size += 1
    model.config = dataclasses.replace(model.config, decay=0.5, commitment_weight=2.0, data_variance=1.0)
    assert fingerprint(model) == before
    model.config = dataclasses.replace(model.config, hidden=(6, 11))
    assert fingerprint(model) != before
