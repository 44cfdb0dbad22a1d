"""Residual vector quantisation, with the constructor and return values of `vector_quantize_pytorch.ResidualVQ`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvq import functional
from fastvq.nn import checks
from fastvq.nn.affine import AffineCodebook
from fastvq.nn.beam import Beams
from fastvq.nn.channels import at_least_float32, autocast_off, project, projections
from fastvq.nn.codebook import Codebook
from fastvq.nn.directional import directional_reparam
from fastvq.nn.implicit_codebook import ImplicitCodebook
from fastvq.nn.layout import Layout
from fastvq.nn.residual import GroupedStages, ResidualStages
from fastvq.nn.rotation import rotate_residual_gradient
from fastvq.nn.stage_dropout import host_seed
from fastvq.nn.straight_through import straight_through
from fastvq.nn.vector_quantize import VectorQuantize

_DIVEQ_VARIANCE = 5e-3  # of the noise on the direction, that of vector-quantize-pytorch


class _Call(NamedTuple):
    """What one forward is to do."""

    last: int | Tensor | None  # the last stage that runs; None for all
    mask: Tensor | None  # (B, N)
    given: Tensor | None  # indices to be learnt, (B, N, Q)
    temperature: float | None
    frozen: bool
    beam_size: int


class ResidualVQ(ResidualStages):
    """`VectorQuantize` in stages, each on what the ones before have left (Zeghidour et al., 2021, arXiv:2107.03312).

    Takes the place of `vector_quantize_pytorch.ResidualVQ` 1.32.0: the same arguments, defaults, returns and
    state_dict; docs/compat.md lists what differs. Where the options allow it all stages run in one call of
    `fastvq.residual_quantize`: in eval mode, and in training without masks, sampling, other losses than the commitment
    loss and other estimators than rotation and straight-through.

    Args:
        dim: channels of the input.
        num_quantizers: Q; None takes the number of codebook sizes.
        codebook_size: K, or a tuple with that of each stage.
        codebook_dim: D, channels of a code; None takes dim. Where it is another number, linear layers `project_in`
            and `project_out` lead there and back, once around all stages.
        shared_codebook: all stages have one codebook, which learns from all of them at the end of a step.
        diveq: the output is x moved by its distance to the sum of its codes (DiVeQ:
            openreview.net/forum?id=KRVnpTbx7R), which trains all codebooks.
        heads: must be 1.
        quantize_dropout: in training, leave out the last stages at random; the argument takes effect from Q = 2 on.
        quantize_dropout_cutoff_index: the stages up to this one always run.
        quantize_dropout_multiple_of: the number of stages that run is rounded up to a multiple of this.
        accept_image_fmap: the input is (B, dim, height, width).
        implicit_neural_codebook: from the second stage on a network makes each token's codebook from what it has
            become so far (QINCo: arXiv:2401.14732).
        mlp_kwargs: `dim_hidden` and `depth` of those networks.
        beam_size: keep this many sequences of codes for each token, rather than the nearest code of each stage.
        eval_beam_size: the same in eval mode; None takes beam_size.
        beam_score_quantizer_weights: weights of the stages' losses in the score of a sequence; None takes 1.
        quant_grad_frac: part of the gradient that passes from a residual to the codes that made it.
        return_zeros_for_masked_padding: masked tokens give zeros; else the input.
        vq_kwargs: further arguments of `VectorQuantize`, for every stage; `channel_last`, `accept_3d_fmap` and
            `strict_compat` are of the whole.

    Raises:
        TypeError, ValueError: an argument of the wrong type, out of range, or that does not go with another.
    """

    beam_score_weights: Tensor

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | tuple[int, ...],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        diveq: bool = False,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        implicit_neural_codebook: bool = False,
        mlp_kwargs: dict[str, Any] | None = None,
        beam_size: int | None = None,
        eval_beam_size: int | None = None,
        beam_score_quantizer_weights: Sequence[float] | None = None,
        quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        **vq_kwargs: Any,
    ) -> None:
        super().__init__()
        if heads != 1:
            raise ValueError(f"heads must be 1 in a residual quantiser; got {heads}")
        if num_quantizers is None:
            if not isinstance(codebook_size, tuple):
                raise ValueError(f"num_quantizers is needed with one codebook_size for all; got {codebook_size}")
            num_quantizers = len(codebook_size)
        self._set_stages(num_quantizers, quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of)
        sizes = codebook_size if isinstance(codebook_size, tuple) else (codebook_size,) * num_quantizers
        if len(sizes) != num_quantizers:
            raise ValueError(f"codebook_size must have num_quantizers = {num_quantizers} entries; got {sizes}")
        self.uniform_codebook_size = len(set(sizes)) == 1
        if shared_codebook and not self.uniform_codebook_size:
            raise ValueError(f"codebook_size must be the same in all stages with shared_codebook=True; got {sizes}")
        for name, size in (("beam_size", beam_size), ("eval_beam_size", eval_beam_size)):
            if size is not None:
                checks.whole(name, size, 1)
        if eval_beam_size is not None and beam_size is None:
            raise ValueError(f"eval_beam_size = {eval_beam_size} needs beam_size; got None")
        checks.number("quant_grad_frac", quant_grad_frac)
        weights = [1.0] * num_quantizers if beam_score_quantizer_weights is None else list(beam_score_quantizer_weights)
        if len(weights) != num_quantizers:
            raise ValueError(
                f"beam_score_quantizer_weights must have num_quantizers = {num_quantizers} entries; got {len(weights)}"
            )

        layout = {
            "channel_last": vq_kwargs.pop("channel_last", True),
            "image": accept_image_fmap,
            "volume": vq_kwargs.pop("accept_3d_fmap", False),
        }
        self.layout = Layout(dim, **layout)
        options = vq_kwargs | {"return_zeros_for_masked_padding": return_zeros_for_masked_padding}
        if implicit_neural_codebook:
            options |= {"learnable_codebook": True, "ema_update": False}
        if shared_codebook:
            options |= {"manual_ema_update": True, "manual_in_place_optimizer_update": True}
        if diveq:
            options |= {"ema_update": False, "learnable_codebook": True, "route_gradients_to_input": False}
            options |= {"commitment_weight": 0.0}

        codebook_dim = dim if codebook_dim is None else codebook_dim
        self.dim = dim
        self.codebook_dim = codebook_dim
        self.has_projections = codebook_dim != dim
        self.project_in, self.project_out = projections(dim, codebook_dim)
        self.accept_image_fmap = accept_image_fmap
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.implicit_neural_codebook = implicit_neural_codebook
        self.diveq = diveq
        self.codebook_sizes = sizes
        self.quant_grad_frac = 1.0 if diveq else quant_grad_frac
        self.beam_size = beam_size
        self.eval_beam_size = beam_size if eval_beam_size is None else eval_beam_size
        self.shared_codebook = shared_codebook
        self.layers = nn.ModuleList(VectorQuantize(codebook_dim, size, codebook_dim, **options) for size in sizes)
        first = self._first
        self.vq_is_ema_updating = first.ema_update
        self.strict_compat = first.strict_compat
        self.register_buffer("beam_score_weights", torch.tensor(weights), persistent=False)
        networks = [ImplicitCodebook(codebook_dim, **(mlp_kwargs or {})) for _ in sizes[1:] if implicit_neural_codebook]
        self.mlps: Any = nn.ModuleList(networks) if implicit_neural_codebook else (None,) * (num_quantizers - 1)
        if shared_codebook:
            for layer in self.layers:
                layer._codebook = first._codebook

    # ---- the codebooks ------------------------------------------------------------------------------------------

    @property
    def _first(self) -> VectorQuantize:
        first: VectorQuantize = self.layers[0]
        return first

    @property
    def _books(self) -> list[Codebook]:
        return [layer._codebook for layer in self.layers]

    @property
    def codebook_size(self) -> int:
        """K, of the first stage."""
        return self._first.codebook_size

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """The codes of each stage, (Q, K, D), or a tuple of (K, D) where their numbers differ."""
        codes = tuple(book.embed[0] for book in self._books)
        return torch.stack(codes) if self.uniform_codebook_size else codes

    def _stage_codes(self, indices: Tensor) -> Tensor:
        found: list[Tensor] = []
        for layer, network, index in zip(self.layers, (None, *self.mlps), indices.unbind(-1), strict=True):
            codes = layer._codes_at(index)
            found.append(codes if network is None else network.of_codes(codes, torch.stack(found).sum(0)))
        return torch.stack(found, -2)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of each stage, (Q, ..., D), from indices (..., Q) as `forward` returns them.

        An index of -1 gives zeros. With quantize_dropout there may be fewer stages.
        """
        return self._codes(indices)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The output of `forward`, in its layout, from its indices (..., Q); a token of -1 alone gives zeros."""
        output = project(self.project_out, self._codes(indices).sum(0))
        if self.strict_compat:
            return output
        output = output.masked_fill((indices < 0).all(-1, keepdim=True), 0.0)
        second = self.layout.spatial or (not self.layout.channel_last and output.dim() > 2)
        return output.movedim(-1, 1) if second else output

    # ---- forward ------------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | list[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantise x; in training, learn from it.

        Args:
            x: (B, N, dim), (B, dim), or a layout that the constructor asks for. Any floating dtype.
            mask: (B, N) bool; tokens where it is False give zeros and the indices -1, and nothing is learnt from them.
            indices: codes to be learnt, (B, N, Q) as `forward` returns them, without -1, or a list of tensors that
                stack to that: the return value is (quantized, loss), the sum of the cross entropies of the stages.
            return_all_codes: return the codes of each stage too.
            sample_codebook_temp: of `VectorQuantize.forward`.
            freeze_codebook: learn nothing in this call.
            beam_size: in place of the constructor's; 1 takes the nearest codes.
            rand_quantize_dropout_fixed_seed: decides which stages drop out, rather than torch's generator.

        Returns:
            quantized: the shape and dtype of x, with the gradient of every stage.
            indices: the shape of x without the channels, and a last dimension Q; int64, -1 for stages left out.
            losses: (Q,), those of `VectorQuantize`; 0 in eval mode and for stages left out. With beam search the mean
                weighted commitment losses of the sequences that were chosen, in eval mode too.
            With return_all_codes a fourth, the codes as `get_codes_from_indices` gives them.

        Raises:
            TypeError, ValueError: an argument of the wrong type or shape.
        """
        checks.tensor("x", x)
        last = None if indices is not None else self._last_stage(x.device, rand_quantize_dropout_fixed_seed)
        return self._forward(
            x,
            last,
            return_all_codes=return_all_codes,
            mask=mask,
            indices=indices,
            sample_codebook_temp=sample_codebook_temp,
            freeze_codebook=freeze_codebook,
            beam_size=beam_size,
        )

    def _last_stage(self, device: torch.device, seed: int | None) -> int | Tensor | None:
        if self._dropout is None or not self.training:
            return None
        if seed is None:  # what an optimizer or k-means does cannot be undone
            seed = host_seed(device, wait=self._first.in_place_codebook_optimizer is not None or not self._ready)
        return self._dropout.last(device, seed)

    @property
    def _ready(self) -> bool:
        """Whether no codebook waits for its k-means."""
        return all(book._ready for book in self._books)

    def _forward(
        self,
        x: Tensor,
        last: int | Tensor | None,
        *,
        return_all_codes: bool,
        mask: Tensor | None,
        indices: Tensor | list[Tensor] | None,
        sample_codebook_temp: float | None,
        freeze_codebook: bool,
        beam_size: int | None = None,
    ) -> tuple[Tensor, ...]:
        tokens = self.layout.tokens(x)
        token_mask = self.layout.mask(x, tokens, mask, None)
        given = None if indices is None else self._given(indices, x, tokens, token_mask)
        beam_size = (self.beam_size if self.training else self.eval_beam_size) if beam_size is None else beam_size
        if beam_size is not None:
            checks.whole("beam_size", beam_size, 1)
        call = _Call(
            last,
            token_mask,
            given,
            sample_codebook_temp,
            freeze_codebook or (self._first.freeze_codebook and not self.strict_compat),
            beam_size or 1,
        )
        filled = tokens if token_mask is None else torch.where(token_mask.unsqueeze(-1), tokens, 0.0)
        projected = project(self.project_in, filled)
        with autocast_off(x):
            rows = at_least_float32(projected)
            run = self._beam_search if call.beam_size > 1 else self._at_once if self._fuses(call) else self._in_turn
            quantized, index, losses = run(rows, call)
            if self.diveq and (self.training or self.strict_compat):
                quantized = directional_reparam(rows, quantized, _DIVEQ_VARIANCE)
        output = project(self.project_out, quantized.to(projected.dtype)).to(x.dtype)
        if token_mask is not None:
            padding = torch.zeros_like(tokens) if self.return_zeros_for_masked_padding else tokens
            output = torch.where(token_mask.unsqueeze(-1), output, padding)
        output = self.layout.restored(output, x)
        if given is not None:
            return output, losses.sum()
        if token_mask is not None:
            index = index.masked_fill(~token_mask.unsqueeze(-1), -1)
        index = index.reshape(*self.layout.places(x), self.num_quantizers)
        found = output, index, losses
        return (*found, self._codes(index)) if return_all_codes else found

    def _given(self, indices: Tensor | list[Tensor], x: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Indices to be learnt, (B, N, Q)."""
        if self.accept_image_fmap:
            raise ValueError("indices need accept_image_fmap=False; got True")
        indices = torch.stack(indices) if isinstance(indices, list) else indices
        checks.tensor("indices", indices)
        checks.dtype("indices", indices, (torch.int64, torch.int32))
        checks.shape("indices", indices, (*self.layout.places(x), self.num_quantizers))
        indices = indices.reshape(*tokens.shape[:2], self.num_quantizers)
        dropped = indices < 0 if mask is None else (indices < 0) & mask.unsqueeze(-1)
        if not torch.compiler.is_compiling():
            message = "indices must not hold -1: take them from eval mode, where no stage drops out"
            if dropped.device.type != "cpu":  # where the host would have to wait
                torch._assert_async(~dropped.any(), message)
            elif bool(dropped.any()):
                raise ValueError(message)
        return indices

    def _stages_of(self, call: _Call) -> int:
        """How many stages run."""
        return self.num_quantizers if call.last is None else min(int(call.last) + 1, self.num_quantizers)

    def _padded(self, indices: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Indices (B, N, q) and losses (q,) of the stages that ran, as those of all Q."""
        left_out = self.num_quantizers - indices.shape[-1]
        return nn.functional.pad(indices, (0, left_out), value=-1), nn.functional.pad(losses, (0, left_out))

    # ---- the stages, all in one call ----------------------------------------------------------------------------

    def _fuses(self, call: _Call) -> bool:
        """Whether one call of the fused operator does what the stages in turn would."""
        first = self._first
        possible = (
            self.uniform_codebook_size
            and not self.implicit_neural_codebook
            and not first.use_cosine_sim
            and not isinstance(first._codebook, AffineCodebook)
            and call.given is None
            and self._ready
        )
        if not self.training or not possible:
            return possible
        return (
            call.mask is None
            and not isinstance(call.last, Tensor)
            and not (first.stochastic_sample_codes or first.straight_through or first.directional_reparam)
            and not (first.has_codebook_diversity_loss or first.has_codebook_orthogonal_loss)
            and not first.commitment_use_cross_entropy_loss
            and first.in_place_codebook_optimizer is None
            and first.sync_update_v == 0
            and first.route_gradients_to_input
            and self.quant_grad_frac <= 0
            and not (self.shared_codebook and first._codebook.has_dead_code_replacement)  # codes change on the way
        )

    def _at_once(self, rows: Tensor, call: _Call) -> tuple[Tensor, Tensor, Tensor]:
        first = self._first
        stages = self._stages_of(call)
        learns = self.training and not call.frozen
        books = self._books[:stages]
        codes = torch.cat([book.codes(changing=learns and book.writes(None), copied=True) for book in books])
        codes = codes.detach() if call.frozen else codes
        taught = codes if self.training and first.learnable_codebook else codes.detach()
        quantized, indices, losses = functional.residual_quantize(rows if self.training else rows.detach(), taught)
        if self.training and rows.requires_grad:
            quantized = (
                rotate_residual_gradient(rows, quantized, indices, codes)
                if first.rotation_trick
                else straight_through(stages * quantized, quantized)  # once for each stage; the operator passes it once
            )
        elif codes.requires_grad and torch.is_grad_enabled():
            found = torch.stack([part[index] for part, index in zip(codes, indices.unbind(-1), strict=True)])
            quantized = straight_through(found.sum(0).to(quantized.dtype), quantized)
        if not self.training:
            return quantized, indices, torch.zeros_like(losses.detach())
        if learns:
            first._codebook.once(lambda: self._learn(rows.detach(), codes.detach(), indices, books), rows.device)
        losses = losses * first.commitment_weight if first.has_commitment_loss else torch.zeros_like(losses)
        if torch.is_grad_enabled() and not losses.requires_grad and not torch.compiler.is_compiling():
            losses.requires_grad_()  # as `VectorQuantize` does, so that backward works on fixed features too
        return quantized, *self._padded(indices, losses)

    def _learn(self, residual: Tensor, codes: Tensor, indices: Tensor, books: list[Codebook]) -> None:
        """Every stage's codebook learns from what it has quantised: tokens (B, N, D) to indices (B, N, q)."""
        if books[0].writes(None) and not books[0].has_dead_code_replacement:
            all_counts, all_sums = torch.ops.fastvq.residual_code_sums(residual, codes, indices, None)
            for book, counts, sums in zip(books, all_counts.split(1), all_sums.split(1), strict=True):
                book.update_from(counts, sums)
        else:  # nothing to learn but the counts, or dead codes to replace by residuals
            for book, stage_codes, index in zip(books, codes, indices.unbind(-1), strict=True):
                book.update(residual.unsqueeze(0), index.unsqueeze(0), None)
                residual = residual - stage_codes[index]
        if self.shared_codebook:
            self._finish_shared([], None)

    # ---- the stages in turn -------------------------------------------------------------------------------------

    def _to_residual(self, quantized: Tensor) -> Tensor:
        """The codes as the residual loses them: with a part of their gradient."""
        if self.quant_grad_frac <= 0:
            return quantized.detach()
        return straight_through(self.quant_grad_frac * quantized, quantized)

    def _stage_call(self, number: int, total: Tensor, call: _Call) -> dict[str, Any]:
        """The arguments of stage `number`, for tokens whose codes so far add up to `total` (B, N, D)."""
        network = self.mlps[number - 1] if number else None
        return {
            "sample_codebook_temp": call.temperature,
            "freeze_codebook": call.frozen,
            "codebook_transform_fn": None if network is None else partial(network, condition=total),
        }

    def _in_turn(self, rows: Tensor, call: _Call) -> tuple[Tensor, Tensor, Tensor]:
        residual, total = rows, torch.zeros_like(rows)
        inputs: list[Tensor] = []
        all_indices: list[Tensor] = []
        losses: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            if isinstance(call.last, int) and number > call.last:
                all_indices.append(torch.full_like(all_indices[0], -1))
                losses.append(torch.zeros_like(losses[0]))
                continue
            inputs.append(residual.detach())
            arguments = self._stage_call(number, total, call)
            if call.given is not None:
                quantized, loss = layer(residual, mask=call.mask, indices=call.given[..., number], **arguments)
                index = call.given[..., number]
            elif isinstance(call.last, Tensor):
                runs = number <= call.last
                with _undone_unless(runs, layer._codebook, frozen=call.frozen):
                    quantized, index, loss = layer(residual, mask=call.mask, **arguments)
                quantized, index = torch.where(runs, quantized, 0.0), torch.where(runs, index, -1)
                loss = torch.where(runs, loss, 0.0)
            else:
                quantized, index, loss = layer(residual, mask=call.mask, **arguments)
            residual = residual - self._to_residual(quantized)
            total = total + quantized
            all_indices.append(index)
            losses.append(loss)
        self._finish(inputs, call)
        return total, torch.stack(all_indices, -1), torch.stack(losses)

    def _finish(self, inputs: list[Tensor], call: _Call) -> None:
        if self.shared_codebook and self.training and not call.frozen:
            self._first._codebook.once(lambda: self._finish_shared(inputs, call.mask), inputs[0].device)

    def _finish_shared(self, inputs: list[Tensor], mask: Tensor | None) -> None:
        """The one codebook learns what the stages have gathered; dead codes become some of their inputs (B, N, D)."""
        first = self._first
        book = first._codebook
        if book.ema_update:
            book.update_ema()
        first.update_in_place_optimizer()
        if inputs and book.has_dead_code_replacement:
            rows = first._rows(torch.stack(inputs, 2).flatten(1, 2))
            book.expire_codes_(rows, None if mask is None else mask.repeat_interleave(len(inputs), 1).unsqueeze(0))

    # ---- beam search --------------------------------------------------------------------------------------------

    def _beam_search(self, rows: Tensor, call: _Call) -> tuple[Tensor, Tensor, Tensor]:
        if call.given is not None:
            raise ValueError(f"indices need beam_size=None or 1; got {call.beam_size}")
        if self.training and not self._first.has_commitment_loss:
            raise ValueError("beam_size above 1 needs commitment_weight above 0 in training, to score by; got none")
        stages = self._stages_of(call)
        beams = Beams.of(rows)
        for number in range(stages):
            width = beams.scores.shape[2]
            quantized, indices, losses = self.layers[number](
                beams.residual.flatten(1, 2),
                mask=None if call.mask is None else call.mask.repeat_interleave(width, 1),
                topk=call.beam_size,
                **self._stage_call(number, beams.total.flatten(1, 2), call),
            )
            passed = self._to_residual(quantized)
            beams = beams.grown(quantized, passed, indices, losses, self.beam_score_weights[number])
            beams = beams.best(1 if number == stages - 1 else call.beam_size)
        total, indices, losses, inputs = (t[:, :, 0] for t in (beams.total, beams.indices, beams.losses, beams.inputs))
        kept = torch.ones(rows.shape[:2], device=rows.device) if call.mask is None else call.mask
        losses = torch.where(kept.unsqueeze(-1) > 0, losses, 0.0).sum((0, 1)) / kept.sum().clamp(min=1)
        stage_inputs = list(inputs.unbind(2))[: 1 if self.strict_compat else None]  # there only the first stage learns
        if self.training and not call.frozen:
            pairs = zip(self.layers, stage_inputs, indices.unbind(-1), strict=False)

            def learn() -> None:
                for layer, taken, index in pairs:
                    layer.update_indices(taken, index, mask=call.mask)

            self._first._codebook.once(learn, rows.device)
        self._finish(stage_inputs, call)
        return total, *self._padded(indices, losses)


@contextmanager
def _undone_unless(runs: Tensor, book: Codebook, *, frozen: bool) -> Iterator[None]:
    """What happens to the state of the codebook in here counts only if `runs`, a bool () on the device."""
    written = not frozen and book.writes(None)  # else the backward pass needs the codes themselves, as they lie
    state = [
        t for t in (*book.buffers(recurse=False), *book.parameters(recurse=False)) if written or t is not book.embed
    ]
    before = [tensor.detach().clone() for tensor in state]
    yield
    with torch.no_grad():
        for tensor, old in zip(state, before, strict=True):
            tensor.copy_(torch.where(runs, tensor, old))


class GroupedResidualVQ(GroupedStages):
    """`ResidualVQ` for each group of channels.

    Takes the place of `vector_quantize_pytorch.GroupedResidualVQ` 1.32.0.

    Args:
        dim: channels of the input, a multiple of groups.
        groups: G.
        accept_image_fmap: the input is (B, dim, height, width).
        kwargs: further arguments of `ResidualVQ`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, out of range, or that does not go with another.
    """

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any) -> None:
        second = accept_image_fmap or kwargs.get("accept_3d_fmap", False) or not kwargs.get("channel_last", True)
        super().__init__(
            dim, groups, second, lambda width: ResidualVQ(dim=width, accept_image_fmap=accept_image_fmap, **kwargs)
        )

    def forward(
        self,
        x: Tensor,
        indices: Tensor | Sequence[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        mask: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """Quantise x; in training, learn from it.

        Args:
            x: as in `ResidualVQ.forward`.
            indices: those of each group, (G, B, N, Q): the return value is (quantized, loss), the sum over the groups.
            return_all_codes: return the codes of each group and stage too.
            sample_codebook_temp: as in `ResidualVQ.forward`.
            freeze_codebook: learn nothing in this call.
            mask: (B, N) bool, as in `ResidualVQ.forward`.

        Returns:
            As `ResidualVQ.forward`: quantized of all groups side by side, indices (G, ..., Q), losses (G, Q), codes a
            tuple of G.

        Raises:
            TypeError, ValueError: an argument of the wrong type or shape.
        """
        arguments = {"sample_codebook_temp": sample_codebook_temp, "freeze_codebook": freeze_codebook, "mask": mask}
        if indices is None or len(indices) == 0:
            return self._run_groups(x, return_all_codes, indices=None, **arguments)
        pairs = zip(self.rvqs, x.chunk(self.groups, self.split_dim), self._per_group(indices), strict=True)
        outputs, losses = zip(*(rvq(part, indices=own, **arguments) for rvq, part, own in pairs), strict=True)
        return torch.cat(outputs, dim=self.split_dim), torch.stack(losses).sum()
