"""Finite scalar perturbation (arXiv:2602.17133): bins of equal probability, and noise in place of rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvq.nn import checks
from fastvq.nn.channels import at_least_float32, channels_back, channels_last, project, projections
from fastvq.nn.mixed_radix import MixedRadix
from fastvq.nn.straight_through import straight_through

Activation = Callable[[Tensor], Tensor]

_UNIFORM_STD = 1 / math.sqrt(12)  # of a number that is uniform from 0 to 1


def _tanh(z: Tensor) -> Tensor:
    return (z.tanh() + 1.0) / 2.0


def _tanh_inverse(p: Tensor) -> Tensor:
    return (p * 2.0 - 1.0).atanh()


def _normal(z: Tensor) -> Tensor:
    return (1.0 + (z / math.sqrt(2)).erf()) / 2.0


def _normal_inverse(p: Tensor) -> Tensor:
    return (2.0 * p - 1.0).erfinv() * math.sqrt(2)


def _laplace(z: Tensor) -> Tensor:
    return 0.5 * (1.0 + z.sign() * (1.0 - (-z.abs()).exp()))


def _laplace_inverse(p: Tensor) -> Tensor:
    return -(p - 0.5).sign() * (1.0 - 2.0 * (p - 0.5).abs()).log()


def _cauchy(z: Tensor) -> Tensor:
    return z.atan() / math.pi + 0.5


def _cauchy_inverse(p: Tensor) -> Tensor:
    return ((p - 0.5) * math.pi).tan()


# Cumulative distribution functions and their inverses.
ACTIVATIONS: dict[str, tuple[Activation, Activation]] = {
    "tanh": (_tanh, _tanh_inverse),
    "sigmoid": (torch.sigmoid, torch.logit),
    "normal": (_normal, _normal_inverse),
    "laplace": (_laplace, _laplace_inverse),
    "cauchy": (_cauchy, _cauchy_inverse),
}

# The variance that each distribution has, and the weights of the deviations of the first four moments.
_MOMENT_WEIGHTS = {"l1_weight": 0.1, "l2_weight": 0.07, "l3_weight": 0.0, "l4_weight": 0.0}
_PRESETS: dict[str, dict[str, float]] = {
    "none": dict.fromkeys(_MOMENT_WEIGHTS, 0.0),
    "var": {**_MOMENT_WEIGHTS, "l2_target": 1.0},
    "kurt": {},
    "var_tanh": {**_MOMENT_WEIGHTS, "l2_target": 0.8225},
    "var_sigmoid": {**_MOMENT_WEIGHTS, "l2_target": 3.29},
    "var_laplace": {**_MOMENT_WEIGHTS, "l2_target": 2.0},
}


class VectorNorm(nn.Module):
    """How far the mean, variance, skewness and excess kurtosis of each channel are from their targets.

    Args:
        l1_target, l2_target, l3_target, l4_target: of the mean, variance, skewness and excess kurtosis.
        l1_weight, l2_weight, l3_weight, l4_weight: weights of the squared deviations.
        eps: the smallest standard deviation divided by.
    """

    def __init__(
        self,
        l1_target: float = 0.0,
        l1_weight: float = 0.1,
        l2_target: float = 1.0,
        l2_weight: float = 0.07,
        l3_target: float = 0.0,
        l3_weight: float = 0.06,
        l4_target: float = 0.0,
        l4_weight: float = 0.05,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        self.l1_target, self.l1_weight = l1_target, l1_weight
        self.l2_target, self.l2_weight = l2_target, l2_weight
        self.l3_target, self.l3_weight = l3_target, l3_weight
        self.l4_target, self.l4_weight = l4_target, l4_weight
        self.eps = eps

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss () of rows z (N, d), and the statistics (d,) by name; all 0 without rows."""
        rows = max(1, z.shape[0])
        mean = z.sum(0) / rows
        centred = z - mean
        variance = centred.square().sum(0) / max(1, z.shape[0] - 1)
        scores = centred / variance.clamp(min=self.eps**2).sqrt()
        found = {
            "mean": mean,
            "variance": variance,
            "skewness": scores.pow(3).sum(0) / rows,
            "kurtosis": scores.pow(4).sum(0) / rows - 3.0,
        }
        targets = self.l1_target, self.l2_target, self.l3_target, self.l4_target
        weights = self.l1_weight, self.l2_weight, self.l3_weight, self.l4_weight
        parts = [
            (value - target).square().mean() * weight
            for value, target, weight in zip(found.values(), targets, weights, strict=True)
        ]
        return torch.stack(parts).sum(), found

    @classmethod
    def build(cls, name: str) -> VectorNorm:
        """The one of that name: none, var, kurt, var_tanh, var_sigmoid or var_laplace; ValueError for another."""
        if name not in _PRESETS:
            raise ValueError(f"vector_norm must be one of {', '.join(_PRESETS)}; got {name!r}")
        return cls(**_PRESETS[name])


class FSP(MixedRadix):
    """Map each channel to 0 .. 1 by a distribution function, cut that into levels; train on noise of a bin's width.

    Takes the place of `vector_quantize_pytorch.FSP` 1.32.0: the same arguments, defaults, returns and state_dict.

    Args:
        levels: the number of bins of each channel of a code.
        dim: channels of the input; None takes the number of levels. Where it is another number, linear layers
            `project_in` and `project_out` lead there and back.
        channel_first: the input is (B, dim, ...).
        projection_has_bias: of those layers.
        act_name: the distribution function: tanh, sigmoid, normal, laplace or cauchy.
        quantize_rate: in training, how many of the numbers are quantised rather than perturbed; 0 to 1.
        need_inv_act: return to the scale of the input by the inverse function, rather than to unit variance.
        vector_norm: a name that `VectorNorm.build` knows: what moments the loss asks for.

    Raises:
        TypeError, ValueError: an argument of the wrong type, out of range, or that does not go with another.
    """

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        channel_first: bool = False,
        projection_has_bias: bool = True,
        act_name: str = "tanh",
        quantize_rate: float = 0.0,
        need_inv_act: bool = False,
        vector_norm: str = "var_tanh",
    ) -> None:
        super().__init__()
        self._set_levels(levels, 1)
        checks.number("quantize_rate", quantize_rate, 0.0, 1.0)
        if act_name not in ACTIVATIONS:
            raise ValueError(f"act_name must be one of {', '.join(ACTIVATIONS)}; got {act_name!r}")
        self.dim = self.codebook_dim if dim is None else dim
        checks.whole("dim", self.dim, 1)
        self.channel_first = channel_first
        self.has_projections = self.dim != self.codebook_dim
        self.project_in, self.project_out = projections(self.dim, self.codebook_dim, bias=projection_has_bias)
        self.act_name = act_name
        self.act_func, self.inv_act_func = ACTIVATIONS[act_name]
        self.need_inv_act = need_inv_act
        self.quantize_rate = quantize_rate
        self.vector_norm = VectorNorm.build(vector_norm)

    def quantize_act_value(self, act_z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Numbers from 0 to 1, (..., d), to the middles of their bins, straight through, and the bins' numbers."""
        level_indices = (act_z.detach().clamp(max=1.0 - eps) * self._levels).floor()
        return straight_through(act_z, (level_indices + 0.5) / self._levels), level_indices

    def level_indices_to_indices(self, level_indices: Tensor) -> Tensor:
        """Numbers of bins (..., d) to indices (...): int32, or int64 from 2^31 codes on."""
        return self._digits_to_indices(level_indices)

    def indices_to_act_value(self, indices: Tensor) -> Tensor:
        """Indices (...) to the middles of their bins, (..., d), from 0 to 1."""
        return (self.indices_to_level_indices(indices).float() + 0.5) / self._levels

    def _to_codes(self, act_values: Tensor, eps: float) -> Tensor:
        if self.need_inv_act:
            return self.inv_act_func(act_values.clamp(eps, 1.0 - eps))
        return (act_values - 0.5) / _UNIFORM_STD

    def indices_to_codes(self, indices: Tensor, eps: float = 1e-6) -> Tensor:
        """The quantised output of `forward` from its indices (...): (..., dim), or (B, dim, ...) with channel_first."""
        codes = self._to_codes(self.indices_to_act_value(indices), eps)
        return channels_back(project(self.project_out, codes), self.channel_first)

    def forward(self, z: Tensor, eps: float | None = None) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """Quantise z; in training, perturb it instead, but for a share quantize_rate of the numbers.

        Args:
            z: (..., dim), or (B, dim, ...) with channel_first. Any floating dtype.
            eps: how far from 0 and 1 the distribution function is kept; None takes the machine epsilon.

        Returns:
            quantized: the shape and dtype of z.
            indices: the shape of z without the channels; int32, or int64 from 2^31 codes on.
            loss: (), of the moments of the input, at least float32; in eval mode too.
            info: level_indices (..., d), norm_info (the moments), and in training p_accept_prob, the share of the
                perturbations that stayed within 0 and 1.

        Raises:
            TypeError, ValueError: z is no tensor, or dim is not where it should be.
        """
        tokens = self.project_in(channels_last("z", z, self.dim, self.channel_first))
        rows = at_least_float32(tokens)
        eps = eps or torch.finfo(rows.dtype).eps
        loss, norm_info = self.vector_norm(rows.reshape(-1, self.codebook_dim))
        act_z = self.act_func(rows)
        act_values, level_indices = self.quantize_act_value(act_z, eps=eps)
        info: dict[str, Any] = {"level_indices": level_indices, "norm_info": norm_info}
        if self.training and self.quantize_rate < 1.0:
            half_bin = 1.0 / (self._levels * 2)
            proposal = act_z + half_bin * (torch.rand_like(act_z) * 2.0 - 1.0)
            accepted = (proposal > 0.0) & (proposal < 1.0)
            info["p_accept_prob"] = accepted.sum() / max(1, accepted.numel())
            perturbed = torch.rand_like(act_values) > self.quantize_rate
            act_values = torch.where(perturbed, torch.where(accepted, proposal, act_z), act_values)
        codes = self._to_codes(act_values, eps)
        if self.need_inv_act:
            codes = straight_through(rows, codes)
        output = channels_back(self.project_out(codes.to(tokens.dtype)), self.channel_first)
        return output, self.level_indices_to_indices(level_indices), loss, info

    def extra_repr(self) -> str:
        """The arguments that matter most, for `print`."""
        return (
            f"levels={self._levels.tolist()}, codebook_size={self.codebook_size}, dim={self.dim}, "
            f"act_name={self.act_name!r}, need_inv_act={self.need_inv_act}, quantize_rate={self.quantize_rate}"
        )
