"""The acceptance test: trained on the photographs, the fused layer is as good as the naive one."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq import VectorQuantize
from fastvq.data import CropBatches, Images, load
from fastvq.models import CONFIGS, VQVAE

CONFIG = dataclasses.replace(
    CONFIGS["photos"],
    hidden=(16, 32),
    residual_blocks=1,
    residual_channels=16,
    code_dim=16,
    codebook_size=256,
    kmeans_init=False,
    threshold_ema_dead_code=0,
)
CROP, BATCH, WARMUP, STEPS, RATE = 32, 32, 60, 300, 2e-3


class NaiveQuantizer(nn.Module):
    """What most VQ-VAE code has: the distance matrix, argmin, one-hot matmuls, moving averages."""

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer("codebook", codes.clone())
        self.register_buffer("cluster_size", torch.ones(len(codes)))
        self.register_buffer("embed_avg", codes.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        distances = flat.square().sum(1, keepdim=True) - 2 * flat @ self.codebook.T + self.codebook.square().sum(1)
        indices = distances.argmin(1)
        one_hot = F.one_hot(indices, len(self.codebook)).float()
        rows = one_hot @ self.codebook
        if self.training:
            with torch.no_grad():
                self.cluster_size.lerp_(one_hot.sum(0), 1 - CONFIG.decay)
                self.embed_avg.lerp_(one_hot.T @ flat, 1 - CONFIG.decay)
                total = self.cluster_size.sum()
                smoothed = (self.cluster_size + 1e-5) / (total + len(self.codebook) * 1e-5) * total
                self.codebook.copy_(self.embed_avg / smoothed[:, None])
        quantized = rows.view(*x.shape[:1], *x.shape[2:], -1).permute(0, 3, 1, 2)
        loss = CONFIG.commitment_weight * F.mse_loss(x, quantized)
        return x + (quantized - x).detach(), indices.view(x.shape[0], *x.shape[2:]), loss


class NoQuantizer(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x, torch.zeros(x.shape[0], *x.shape[2:], dtype=torch.int64), x.new_zeros(())


def fused_quantizer(codes: Tensor) -> nn.Module:
    layer = VectorQuantize(
        dim=CONFIG.code_dim,
        codebook_size=CONFIG.codebook_size,
        decay=CONFIG.decay,
        commitment_weight=CONFIG.commitment_weight,
        accept_image_fmap=True,
        rotation_trick=False,
    )
    layer.codebook = codes
    return layer


def fit(model: VQVAE, batches: CropBatches, steps: int) -> None:
    """Adam, its rate falling to zero: what is left at the end is the model, not the noise of its last steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(next(batches)).loss.backward()
        optimizer.step()
        schedule.step()


def held_out_mse(model: VQVAE, images: Tensor) -> float:
    with torch.no_grad():
        return float(F.mse_loss(model.eval()(images).reconstruction, images))


def train_both(images: Images, held_out: Tensor, seed: int) -> dict[str, float]:
    """The held-out error of each layer, from one start and over the same batches."""
    batches = CropBatches(images.train, CROP, 3, BATCH, seed=seed)
    torch.manual_seed(seed)
    # Both start from the same encoder, decoder and codes, warm enough that the codes are of use.
    start = VQVAE(CONFIG, quantizer=NoQuantizer())
    fit(start, batches, WARMUP)
    latents = start.encoder(next(batches) - 0.5).detach().permute(0, 2, 3, 1).reshape(-1, CONFIG.code_dim)
    codes = latents[torch.randperm(len(latents))[: CONFIG.codebook_size]]
    state, errors = batches.state, {}
    for name, quantizer in {"naive": NaiveQuantizer(codes), "fused": fused_quantizer(codes)}.items():
        model = VQVAE(CONFIG, quantizer=quantizer)
        model.encoder.load_state_dict(start.encoder.state_dict())
        model.decoder.load_state_dict(start.decoder.state_dict())
        batches.state = state
        fit(model, batches, STEPS)
        errors[name] = held_out_mse(model, held_out)
        used = model.encode(held_out).unique().numel()
        assert used > CONFIG.codebook_size // 4, f"the {name} codebook collapsed to {used} codes"
    return errors


def test_fused_layer_reaches_the_held_out_error_of_the_naive_layer_within_2_percent():
    images = load("photos")
    held_out = next(CropBatches(images.held_out, CROP, 3, 256, seed=1000))
    # Two seeds: a rounding that differs in its last bit leads each training elsewhere, by half a percent or so.
    errors = [train_both(images, held_out, seed) for seed in (0, 1)]
    fused, naive = (sum(error[name] for error in errors) for name in ("fused", "naive"))
    assert fused / len(errors) < 0.01, "the models have learnt nothing"
    assert fused <= 1.02 * naive, errors
