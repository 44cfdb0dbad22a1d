"""The binary mapper (Fleuret, 2025, arXiv:2510.17558): independent bits, drawn, as a one-hot vector of all codes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, relu

from fastvq.nn import checks
from fastvq.nn.channels import at_least_float32
from fastvq.nn.straight_through import straight_through as pass_gradient

NAT = math.log(2)  # one bit, in nats


class BinaryMapper(nn.Module):
    """Draw each bit of a code by its own probability; the gradient is that of the probability of every code.

    Takes the place of `vector_quantize_pytorch.BinaryMapper` 1.32.0: the same arguments, defaults and returns.

    Args:
        bits: of a code; the output has 2^bits channels.
        kl_loss_threshold: nats of a token's divergence from even bits that cost nothing.
        deterministic_on_eval: in eval mode, take the likelier value of each bit rather than draw it.

    Attributes:
        codes: (2^bits, bits) bool, the first bit the lowest.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.
    """

    power_two: Tensor
    codes: Tensor
    zero: Tensor

    def __init__(self, bits: int = 1, kl_loss_threshold: float = NAT, deterministic_on_eval: bool = False) -> None:
        super().__init__()
        checks.whole("bits", bits, 1)
        checks.number("kl_loss_threshold", kl_loss_threshold)
        self.bits = bits
        self.num_codes = 2**bits
        self.kl_loss_threshold = kl_loss_threshold
        self.deterministic_on_eval = deterministic_on_eval
        power_two = 2 ** torch.arange(bits)
        self.register_buffer("power_two", power_two, persistent=False)
        self.register_buffer("codes", torch.arange(2**bits).unsqueeze(-1) & power_two != 0, persistent=False)
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)

    def binary_entropy(self, logits: Tensor) -> Tensor:
        """The entropy of a token's bits in nats, (...), from log odds (..., bits)."""
        return -(logits.sigmoid() * logsigmoid(logits) + (-logits).sigmoid() * logsigmoid(-logits)).sum(-1)

    def calc_aux_loss(self, logits: Tensor, reduce_aux_kl_loss: bool = True) -> Tensor:
        """How far each token's divergence from even bits is above the threshold: its mean, or (...)."""
        divergence = self.bits * NAT - self.binary_entropy(at_least_float32(logits))
        loss = relu(divergence - self.kl_loss_threshold)
        return loss.sum() / max(1, loss.numel()) if reduce_aux_kl_loss else loss

    def log_prob(
        self, logits: Tensor, *, indices: Tensor | None = None, one_hot: Tensor | None = None, sum_bits: bool = True
    ) -> Tensor:
        """The log probability of codes.

        Args:
            logits: (..., bits), log odds.
            indices: (...), integers; or
            one_hot: (..., 2^bits).
            sum_bits: False gives that of each bit.

        Returns:
            (...), or (..., bits) without sum_bits; at least float32.

        Raises:
            ValueError: both or neither of indices and one_hot are given.
        """
        if (indices is None) == (one_hot is None):
            raise ValueError(f"give one of indices and one_hot; got {'neither' if indices is None else 'both'}")
        chosen = one_hot.argmax(-1) if one_hot is not None else indices
        logits = at_least_float32(logits)
        log_probs = torch.where(self.codes[chosen], logsigmoid(logits), logsigmoid(-logits))
        return log_probs.sum(-1) if sum_bits else log_probs

    def _probabilities(self, logits: Tensor) -> Tensor:
        """Of every code, (..., 2^bits), as products of the bits': two tables of half the bits, and their product."""
        tables = []
        for half in logits.tensor_split(2, dim=-1):
            table = torch.ones_like(logits[..., :1])
            for one in half.unbind(-1):
                odds = torch.stack([(-one).sigmoid(), one.sigmoid()], -1)
                table = (odds.unsqueeze(-1) * table.unsqueeze(-2)).flatten(-2)
            tables.append(table)
        low, high = tables
        return (high.unsqueeze(-1) * low.unsqueeze(-2)).flatten(-2)

    def forward(
        self,
        logits: Tensor,
        temperature: float = 1.0,
        straight_through: bool | None = None,
        calc_aux_loss: bool | None = None,
        deterministic: bool | None = None,
        return_indices: bool = False,
        reduce_aux_kl_loss: bool = True,
    ) -> tuple[Tensor, ...]:
        """Draw a code for every token.

        Args:
            logits: (..., bits), log odds. Any floating dtype.
            temperature: the bits are drawn by sigmoid(logits / temperature).
            straight_through: the gradient of the output is that of the probabilities of the codes, at a temperature
                of 1; None asks whether this is training.
            calc_aux_loss: compute the loss; None asks whether this is training.
            deterministic: the likelier value of each bit; None asks the constructor's.
            return_indices: return the indices too.
            reduce_aux_kl_loss: the mean of the loss over the tokens, rather than (...).

        Returns:
            one_hot: (..., 2^bits), float32, or float64 for float64 logits.
            indices: (...), int64, with return_indices.
            loss: (), or (...) without reduce_aux_kl_loss; see `calc_aux_loss`; 0 where it is not computed.

        Raises:
            TypeError, ValueError: logits are no tensor, or not (..., bits).
        """
        checks.tensor("logits", logits)
        if logits.dim() == 0 or logits.shape[-1] != self.bits:
            raise ValueError(f"logits must have shape (..., bits), with bits = {self.bits}; got {tuple(logits.shape)}")
        likely = deterministic if deterministic is not None else self.deterministic_on_eval and not self.training
        logits = at_least_float32(logits)
        odds = (logits.detach() / temperature).sigmoid()
        drawn = odds > 0.5 if likely else odds.bernoulli().bool()
        indices = (self.power_two * drawn).sum(-1)
        one_hot = logits.new_zeros(*indices.shape, self.num_codes).scatter(-1, indices.unsqueeze(-1), 1.0)
        if self.training if straight_through is None else straight_through:
            one_hot = pass_gradient(self._probabilities(logits), one_hot)
        loss = self.zero.detach()
        if self.training if calc_aux_loss is None else calc_aux_loss:
            loss = self.calc_aux_loss(logits, reduce_aux_kl_loss=reduce_aux_kl_loss)
        return (one_hot, indices, loss) if return_indices else (one_hot, loss)

    def extra_repr(self) -> str:
        """The arguments that matter most, for `print`."""
        return f"bits={self.bits}, kl_loss_threshold={self.kl_loss_threshold}"
