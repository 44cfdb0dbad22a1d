"""The quantisation layer, with the constructor and return values of `vector_quantize_pytorch.VectorQuantize`."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvq import functional
from fastvq.nn import checks, losses
from fastvq.nn.affine import AffineCodebook
from fastvq.nn.choice import Call, Chosen, choose
from fastvq.nn.codebook import Codebook, EmaWeight
from fastvq.nn.cosine import l2norm
from fastvq.nn.directional import directional_reparam
from fastvq.nn.distributed import all_reduce_, world_size
from fastvq.nn.layout import Layout
from fastvq.nn.losses import LossBreakdown
from fastvq.nn.recompute import apart
from fastvq.nn.rotation import rotate_gradient
from fastvq.nn.rules import check_rules
from fastvq.nn.transformed import TransformFn
from fastvq.streaming import mean_code


class VectorQuantize(nn.Module):
    """Replace every token by its nearest code, and learn the codes (van den Oord et al., 2017, arXiv:1711.00937).

    Takes the place of `vector_quantize_pytorch.VectorQuantize` 1.32.0: the same arguments, defaults, return values,
    state_dict and, from the same seed, the same first weights. Where that class is silently wrong this one is right,
    unless `strict_compat` asks for the old result; docs/compat.md lists every difference.

    In training the codes follow the exponential moving averages of the rows nearest to them, after the output and the
    loss have been taken from the codes as they were. Nothing in the forward waits for the device.

    Args:
        dim: channels of the input.
        codebook_size: K, the number of codes.
        codebook_dim: D, channels of a code; None takes dim. Where heads * codebook_dim is not dim, linear layers
            `project_in` and `project_out` lead there and back.
        heads: parts that a token is split into; each gets an index of its own.
        separate_codebook_per_head: a codebook for each head, rather than one for all.
        decay: weight of the past in the moving averages, from 0 to 1.
        eps: Laplace smoothing of the cluster sizes (appendix A.1 of the paper).
        freeze_codebook: learn nothing, unless `forward` says otherwise.
        kmeans_init: the first codes are the k-means of the first batch, in eval mode too.
        kmeans_iters: iterations of that k-means; 0 takes random rows.
        sync_kmeans: with strict_compat, False lets each process of a data-parallel job draw its own codes, which then
            differ; without, the processes always agree.
        use_cosine_sim: quantise x / |x| to the code with the largest dot product; codes are unit vectors.
        layernorm_after_project_in: a layer norm behind `project_in`, where there is one.
        threshold_ema_dead_code: after a step, codes with a smaller average of rows a step (`cluster_size`) start again
            as random rows of the batch, no row twice; 0 never does so.
        channel_last: tokens are (B, N, dim); else (B, dim, N).
        accept_image_fmap: the input is (B, dim, height, width).
        accept_3d_fmap: the input is (B, dim, depth, height, width).
        commitment_weight: weight of the loss mean((x - sg[q])^2); 0 or less leaves it out.
        commitment_use_cross_entropy_loss: that loss is -log softmax_k(-|x - c|) at the chosen code instead (of the dot
            products with use_cosine_sim).
        orthogonal_reg_weight: weight of the loss sum of cos^2 of all pairs of codes / K^2 - 1 / K (arXiv:2112.00384).
            More than 0 makes the codes a parameter, which the moving averages write too.
        orthogonal_reg_active_codes_only: only the codes that this batch uses.
        orthogonal_reg_max_codes: only so many codes, drawn at random.
        codebook_diversity_loss_weight: weight of minus the entropy of the mean chance of each code at each place of
            the sequence.
        codebook_diversity_temperature: factor of the logits of those chances.
        stochastic_sample_codes: in training, draw a code with chances softmax_k(-|x - c| / sample_codebook_temp).
        sample_codebook_temp: that temperature; 0 takes the nearest.
        straight_through: the gradient to x is that of sum_k softmax_k(-|x - c| / sample_codebook_temp) c_k.
        rotation_trick: gradients pass to x turned and scaled as x is to its code (arXiv:2410.06424), not as they are;
            None means yes where dim is more than 1 and neither straight_through nor directional_reparam is asked for.
        directional_reparam: the output is x moved by its distance to its code in nearly the code's direction (DiVeQ:
            openreview.net/forum?id=KRVnpTbx7R), which trains the codes; needs threshold_ema_dead_code.
        directional_reparam_variance: of the noise on that direction.
        sync_codebook: the processes of a data-parallel job keep one codebook; None means yes.
        sync_affine_param: they also share the statistics of affine_param.
        ema_update: the codes follow their moving averages; None means yes, but with directional_reparam or vq_bridge.
        vq_bridge: a module that maps the codes (H, K, D) to those that are searched; needs a learnable codebook.
        manual_ema_update: keep the averages in each forward; the codes follow at `vq._codebook.update_ema()`.
        learnable_codebook: the codes are a parameter, trained by the loss, mean((x - q)^2) for both x and q; needs
            ema_update=False. None means no, but with directional_reparam or vq_bridge.
        in_place_codebook_optimizer: makes an optimizer of the parameters of the codebook, which takes a step on
            mean((sg[x] - q)^2) inside each training forward, before the output is taken.
        manual_in_place_optimizer_update: it takes the step at `update_in_place_optimizer()`.
        affine_param: codes are whitened by their mean and variance and coloured by those of the rows.
        affine_param_batch_decay: of the moving statistics of the rows.
        affine_param_codebook_decay: of the moving statistics of the codes.
        sync_update_v: the gradient of the output is 1 + this much; from 0 to 1, needs a learnable codebook.
        return_zeros_for_masked_padding: masked tokens give zeros; else the input.
        route_gradients_to_input: the output has a gradient to x; else only to the codes, where they are a parameter.
        strict_compat: do as vector-quantize-pytorch does where it is wrong and someone may depend on it.

    Attributes:
        codebook: the codes (K, D), or (heads, K, D) with one for each head; may be assigned.
        codebook_usage: the part of the codes that the last training step used, from 0 to 1.
        perplexity: how many codes it used, equally used ones: exp of the entropy, from 1 to K.

    Raises:
        TypeError, ValueError: an argument of the wrong type, out of range, or that does not go with another.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        commitment_use_cross_entropy_loss: bool = False,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_active_codes_only: bool = False,
        orthogonal_reg_max_codes: int | None = None,
        codebook_diversity_loss_weight: float = 0.0,
        codebook_diversity_temperature: float = 100.0,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 1.0,
        straight_through: bool = False,
        rotation_trick: bool | None = None,
        directional_reparam: bool = False,
        directional_reparam_variance: float = 5e-3,
        sync_codebook: bool | None = None,
        sync_affine_param: bool = False,
        ema_update: bool | None = None,
        vq_bridge: nn.Module | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        in_place_codebook_optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        manual_in_place_optimizer_update: bool = False,
        affine_param: bool = False,
        affine_param_batch_decay: float = 0.99,
        affine_param_codebook_decay: float = 0.9,
        sync_update_v: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input: bool = True,
        *,
        strict_compat: bool = False,
    ) -> None:
        super().__init__()
        derived = directional_reparam or vq_bridge is not None
        codebook_dim = dim if codebook_dim is None else codebook_dim
        ema_update = not derived if ema_update is None else ema_update
        learnable_codebook = derived if learnable_codebook is None else learnable_codebook
        checks.whole("dim", dim, 1)
        checks.whole("codebook_size", codebook_size, 1)
        checks.whole("codebook_dim", codebook_dim, 1)
        checks.whole("heads", heads, 1)
        checks.whole("kmeans_iters", kmeans_iters, 0)
        checks.number("decay", decay, 0.0, 1.0)
        checks.number("eps", eps, 0.0)
        checks.number("threshold_ema_dead_code", threshold_ema_dead_code, 0.0)
        checks.number("commitment_weight", commitment_weight)
        checks.number("orthogonal_reg_weight", orthogonal_reg_weight)
        checks.number("codebook_diversity_loss_weight", codebook_diversity_loss_weight)
        checks.number("codebook_diversity_temperature", codebook_diversity_temperature, 0.0)
        checks.number("sample_codebook_temp", sample_codebook_temp, 0.0)
        checks.number("directional_reparam_variance", directional_reparam_variance, 0.0)
        checks.number("affine_param_batch_decay", affine_param_batch_decay, 0.0, 1.0)
        checks.number("affine_param_codebook_decay", affine_param_codebook_decay, 0.0, 1.0)
        checks.number("sync_update_v", sync_update_v, 0.0, 1.0)
        if orthogonal_reg_max_codes is not None:
            checks.whole("orthogonal_reg_max_codes", orthogonal_reg_max_codes, 1)
        if rotation_trick is None:
            rotation_trick = dim > 1 and not (directional_reparam or straight_through)
        check_rules(
            heads=heads,
            separate_codebook_per_head=separate_codebook_per_head,
            use_cosine_sim=use_cosine_sim,
            threshold_ema_dead_code=threshold_ema_dead_code,
            accept_image_fmap=accept_image_fmap,
            accept_3d_fmap=accept_3d_fmap,
            orthogonal_reg_active_codes_only=orthogonal_reg_active_codes_only,
            straight_through=straight_through,
            rotation_trick=rotation_trick,
            directional_reparam=directional_reparam,
            ema_update=ema_update,
            vq_bridge=vq_bridge,
            learnable_codebook=learnable_codebook,
            affine_param=affine_param,
            sync_update_v=sync_update_v,
        )

        self.dim = dim
        self.codebook_size = codebook_size
        self.heads = heads
        self.separate_codebook_per_head = separate_codebook_per_head
        self.eps = eps
        self.freeze_codebook = freeze_codebook
        self.use_cosine_sim = use_cosine_sim
        self.channel_last = channel_last
        self.accept_image_fmap = accept_image_fmap
        self.accept_3d_fmap = accept_3d_fmap
        self.has_commitment_loss = commitment_weight > 0 and not directional_reparam
        self.commitment_weight = commitment_weight
        self.commitment_use_cross_entropy_loss = commitment_use_cross_entropy_loss
        self.has_codebook_orthogonal_loss = orthogonal_reg_weight > 0
        self.orthogonal_reg_weight = orthogonal_reg_weight
        self.orthogonal_reg_active_codes_only = orthogonal_reg_active_codes_only
        self.orthogonal_reg_max_codes = orthogonal_reg_max_codes
        self.has_codebook_diversity_loss = codebook_diversity_loss_weight > 0
        self.codebook_diversity_loss_weight = codebook_diversity_loss_weight
        self.codebook_diversity_temperature = codebook_diversity_temperature
        self.stochastic_sample_codes = stochastic_sample_codes
        self.sample_codebook_temp = sample_codebook_temp
        self.straight_through = straight_through
        self.rotation_trick = rotation_trick
        self.directional_reparam = directional_reparam
        self.directional_reparam_variance = directional_reparam_variance
        self.learnable_codebook = learnable_codebook
        self.manual_in_place_optimizer_update = manual_in_place_optimizer_update
        self.sync_update_v = sync_update_v
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.route_gradients_to_input = route_gradients_to_input
        self.strict_compat = strict_compat
        self.layout = Layout(
            dim, heads, separate_codebook_per_head, channel_last, image=accept_image_fmap, volume=accept_3d_fmap
        )

        width = codebook_dim * heads
        self.has_projections = width != dim
        self.project_in: nn.Module = nn.Linear(dim, width) if self.has_projections else nn.Identity()
        if self.has_projections and layernorm_after_project_in:
            self.project_in = nn.Sequential(self.project_in, nn.LayerNorm(width))
        self.project_out = nn.Linear(width, dim) if self.has_projections else nn.Identity()
        options: dict[str, Any] = {
            "num_codebooks": heads if separate_codebook_per_head else 1,
            "kmeans_init": kmeans_init,
            "kmeans_iters": kmeans_iters,
            "decay": decay,
            "eps": eps,
            "threshold_ema_dead_code": threshold_ema_dead_code,
            "use_cosine_sim": use_cosine_sim,
            "learnable_codebook": learnable_codebook or self.has_codebook_orthogonal_loss,
            "ema_update": ema_update,
            "manual_ema_update": manual_ema_update,
            "shared": sync_codebook is not False,
            "share_draws": sync_kmeans or not strict_compat,
            "vq_bridge": vq_bridge,
            "strict_compat": strict_compat,
        }
        self._codebook = (
            AffineCodebook(
                codebook_dim,
                codebook_size,
                sync_affine_param=sync_affine_param,
                affine_param_batch_decay=affine_param_batch_decay,
                affine_param_codebook_decay=affine_param_codebook_decay,
                **options,
            )
            if affine_param
            else Codebook(codebook_dim, codebook_size, **options)
        )
        self.in_place_codebook_optimizer = None
        if in_place_codebook_optimizer is not None:
            parameters = list(self._codebook.parameters())
            if not parameters:
                raise ValueError("in_place_codebook_optimizer needs learnable_codebook=True; got False")
            self.in_place_codebook_optimizer = in_place_codebook_optimizer(parameters)
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)

    # ---- the codebook -------------------------------------------------------------------------------------------

    @property
    def ema_update(self) -> bool:
        """Whether the codes follow their moving averages."""
        return self._codebook.ema_update

    @property
    def codebook(self) -> Tensor:
        """The codes, (K, D), or (heads, K, D) with one codebook a head.

        Assigning codes also sets the moving averages, so that training starts from them, and takes the place of the
        k-means. With use_cosine_sim they are normalised.
        """
        return self._codebook.embed if self.separate_codebook_per_head else self._codebook.embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        checks.tensor("codebook", codes)
        checks.shape("codebook", codes, self.codebook.shape)
        codes = codes if self.separate_codebook_per_head else codes.unsqueeze(0)
        if not self.strict_compat:
            self._codebook.set_codes(codes)
            return
        with torch.no_grad():
            self._codebook.embed.copy_(codes)

    @property
    def codebook_usage(self) -> Tensor:
        """The part of the codes that the last training step used, (), or (heads,) with one codebook a head."""
        return self._codebook.usage if self.separate_codebook_per_head else self._codebook.usage[0]

    @property
    def perplexity(self) -> Tensor:
        """exp of the entropy of how the last training step used the codes, (), or (heads,); 1 before any."""
        return self._codebook.perplexity if self.separate_codebook_per_head else self._codebook.perplexity[0]

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes at indices as `forward` returns them.

        Args:
            indices: (...), or (..., heads) with several heads; int64 or int32; -1 gives zeros.

        Returns:
            (..., D); with a codebook a head (..., heads * D); with several heads on one codebook (..., heads, D). With
            a feature map or channel_last=False the last dimension comes second.

        Raises:
            TypeError: indices are no tensor of int64 or int32.
            ValueError: the last dimension of indices is not heads.
        """
        codes = self._codes_at(indices)
        if not self.separate_codebook_per_head and self.heads > 1:
            codes = codes.unflatten(-1, (self.heads, -1))
        return self._channels_in_place(codes)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The output of `forward` from its indices: `get_codes_from_indices`, projected out.

        Args:
            indices: as in `get_codes_from_indices`; tokens with the index -1 give zeros.

        Returns:
            (..., dim), or (B, dim, ...) with a feature map or channel_last=False.

        Raises:
            TypeError, ValueError: as in `get_codes_from_indices`.
        """
        output = self.project_out(self._codes_at(indices))
        if not self.strict_compat:
            left_out = indices < 0 if self.heads == 1 else (indices < 0).all(-1)
            output = output.masked_fill(left_out.unsqueeze(-1), 0.0)
        return self._channels_in_place(output)

    def _codes_at(self, indices: Tensor) -> Tensor:
        """The codes of each token side by side, (..., heads * D)."""
        checks.tensor("indices", indices)
        checks.dtype("indices", indices, (torch.int64, torch.int32))
        if self.heads > 1 and (indices.dim() == 0 or indices.shape[-1] != self.heads):
            raise ValueError(
                f"indices must have heads = {self.heads} in the last dimension; got {tuple(indices.shape)}"
            )
        places = indices.shape if self.heads == 1 else indices.shape[:-1]
        book = self._codebook
        codes = book.embed
        if self.strict_compat:
            indices = torch.where(indices < 0, indices + self.codebook_size, indices)
        else:
            codes = book.as_used(codes)
        found = self.layout.joined(book.lookup(codes, self._index_rows(indices.reshape(1, -1, self.heads))))
        return found.reshape(*places, found.shape[-1])

    def _channels_in_place(self, codes: Tensor) -> Tensor:
        """Channels moved from last to where this layer's outputs have them."""
        return codes if self.channel_last and not self.layout.spatial else codes.movedim(-1, 1)

    def _index_rows(self, indices: Tensor) -> Tensor:
        """Indices (B, N, heads) in the layout of the rows, (H, B, T)."""
        return self.layout.rows(indices).squeeze(-1)

    def _given_rows(self, indices: Tensor, x: Tensor, tokens: Tensor) -> Tensor:
        """Indices of the tokens (B, N, dim) of x, by the places of x or of the tokens, in the layout of the rows."""
        checks.tensor("indices", indices)
        checks.dtype("indices", indices, (torch.int64, torch.int32))
        heads = (self.heads,) if self.heads > 1 else ()
        if tuple(indices.shape) != (*tokens.shape[:2], *heads):
            checks.shape("indices", indices, (*self.layout.places(x), *heads))
        return self._index_rows(indices.to(torch.int64).reshape(*tokens.shape[:2], self.heads))

    # ---- learning outside of forward ----------------------------------------------------------------------------

    def maybe_split_heads_from_input(self, x: Tensor) -> Tensor:
        """Tokens (B, N, heads * D): as they are with one head, (heads, B, N, D) with a codebook a head, or
        (1, B * heads, N, D).
        """
        return x if self.heads == 1 else self.layout.by_place(self.layout.rows(x))

    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """Learn from an input and indices chosen for it, as a training forward would from its own.

        Args:
            x: as in `forward`.
            indices: as `forward` returns them; -1 is left out.
            mask: as in `forward`.
        """
        tokens = self.layout.tokens(x)
        token_mask = self.layout.mask(x, tokens, mask, None)
        rows = self._rows(self.project_in(tokens))
        index = self._given_rows(indices, x, tokens)
        self._codebook.update(rows.detach(), index, self._row_mask(token_mask))

    update_ema_indices = update_indices

    def expire_codes_(self, x: Tensor) -> None:
        """In training, replace codes in too little use by some of the tokens x (B, N, heads * D) or (B, heads * D)."""
        self._codebook.expire_codes_(self._rows(x if x.dim() > 2 else x.unsqueeze(1)))

    def update_in_place_optimizer(self) -> None:
        """Let the in-place optimizer take its step, on the mean gradient of all processes."""
        if self.in_place_codebook_optimizer is None:
            return
        if self._codebook.shared and world_size() > 1:
            for parameter in self._codebook.parameters():
                if parameter.grad is not None:
                    all_reduce_(parameter.grad).div_(world_size())
        self.in_place_codebook_optimizer.step()
        self.in_place_codebook_optimizer.zero_grad()

    # ---- forward ------------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: TransformFn | None = None,
        ema_update_weight: EmaWeight | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> tuple[Any, ...]:
        """Quantise x; in training, learn from it.

        Args:
            x: (B, N, dim), or (B, dim) for one token each; (B, dim, N) with channel_last=False; (B, dim, height,
                width) with accept_image_fmap; (B, dim, depth, height, width) with accept_3d_fmap. float32, bfloat16,
                float16 or float64.
            indices: codes to be learnt, as this method returns them: the loss is the cross entropy to them, and the
                return value is (quantized, loss); -1 is left out.
            mask: (B, N) bool; tokens where it is False give zeros and the index -1, and nothing is learnt from them.
            lens: (B,) integers, the same by the number of leading tokens to keep; not together with mask.
            topk: give each token so many codes, nearest first; learn nothing. One head only.
            sample_codebook_temp: of drawing codes, in place of the constructor's.
            freeze_codebook: learn nothing in this call; None asks the constructor's.
            return_loss_breakdown: also return a `LossBreakdown`.
            codebook_transform_fn: makes codebooks (H, B, N, K, D) for each token of the codes (H, K, D) (QINCo,
                arXiv:2401.14732); several heads on one codebook are H = 1 and B * heads.
            ema_update_weight: of this step for each code, (K,) or (H, K), times 1 - decay; or a function of sums
                (H, K, D) and counts (H, K) that gives one.
            accum_ema_update: keep this batch for the moving averages until a call without.
            ema_update: whether the codes follow their averages in this call; None asks the constructor's.

        Returns:
            quantized: the shape and dtype of x; with topk, k behind the places of the tokens.
            indices: int64, (B, N), (B,), (B, height, width) or (B, depth, height, width); and a last dimension heads
                with several heads, or k with topk.
            loss: (), float32 (float64 for float64 x): the weighted sum of the losses of the constructor, over the rows
                as they were quantised, after `project_in` and normalisation; 0 in eval mode. With topk, commitment
                losses have the shape of the indices, in eval mode too.
            breakdown: with return_loss_breakdown.

        Raises:
            TypeError, ValueError: an argument of the wrong type or shape.
        """
        layout, book = self.layout, self._codebook
        tokens = layout.tokens(x)
        token_mask = layout.mask(x, tokens, mask, lens)
        call = self._call(
            topk=topk,
            temperature=sample_codebook_temp,
            frozen=freeze_codebook,
            transform=codebook_transform_fn,
            ema_weight=ema_update_weight,
            accumulate=accum_ema_update,
            ema_update=ema_update,
        )
        filled = tokens
        if token_mask is not None:
            filled = torch.where(token_mask.unsqueeze(-1), tokens, 0.0)  # padding may hold anything, NaN too
        split = layout.rows(self.project_in(filled))
        rows, row_mask = self._on_manifold(split), self._row_mask(token_mask)
        learns = self.training and not call.frozen
        steps = learns and self.in_place_codebook_optimizer is not None

        def start() -> None:
            book.init_from(rows, row_mask)
            book.observe(rows, row_mask)

        book.once(start, x.device)
        parts = dict.fromkeys(LossBreakdown._fields, torch.zeros((), device=x.device))
        if steps:
            stepped = book.once(lambda: self._step_in_place(rows, row_mask, call), x.device)
            parts["inplace_optimize"] = parts["inplace_optimize"] if stepped is None else stepped

        writes = book.writes(call.ema_update) or self.in_place_codebook_optimizer is not None
        codes = book.codes(changing=self.training and not call.frozen and writes)
        codes = codes.detach() if call.frozen else codes
        chosen = choose(book, layout, rows, row_mask, codes, call)
        if learns and not steps and call.topk is None:
            book.once(lambda: self._learn(rows, row_mask, chosen, call), x.device)
        quantized = self._with_gradient(rows, codes, chosen, call, x.requires_grad)

        output = self.project_out(layout.joined(quantized))
        if token_mask is not None:
            padding = torch.zeros_like(tokens) if self.return_zeros_for_masked_padding else tokens
            kept, padding = token_mask.unsqueeze(-1), padding if call.topk is None else padding.unsqueeze(2)
            output = torch.where(kept if call.topk is None else kept.unsqueeze(-1), output, padding)
        output = layout.restored(output, x)
        if indices is not None:
            given = self._given_rows(indices, x, tokens)
            loss = self._cross_entropy(rows, codes, given, None if self.strict_compat else row_mask, chosen)
            return (self._unjoined(quantized) if self.strict_compat else output), loss

        if self.training:
            self._measure(parts, split, rows, row_mask, codes, chosen, call)
        loss = self._weighted(parts, chosen, row_mask, call)
        index = chosen.indices if row_mask is None else chosen.indices.masked_fill(~call.over_k(row_mask), -1)
        loss, *measured = (self._placed(t, x, call) if t.dim() else t for t in (loss, *parts.values()))
        index = self._placed(index, x, call)
        return (output, index, loss, LossBreakdown(*measured)) if return_loss_breakdown else (output, index, loss)

    def _call(self, *, topk: int | None, temperature: float | None, frozen: bool | None, **rest: Any) -> Call:
        """The call with its defaults; ValueError where it asks for what does not go together."""
        if topk is not None:
            checks.whole("topk", topk, 1)
            if self.heads > 1:
                raise ValueError(f"topk needs heads=1; got {self.heads}")
            if self.training and self.commitment_use_cross_entropy_loss:
                raise ValueError("topk needs commitment_use_cross_entropy_loss=False in training; got True")
            if self.training and self.in_place_codebook_optimizer is not None:
                raise ValueError("topk needs in_place_codebook_optimizer=None in training; got one")
            topk = min(topk, self.codebook_size)
        temperature = self.sample_codebook_temp if temperature is None else temperature
        checks.number("sample_codebook_temp", temperature, 0.0)
        frozen = self.freeze_codebook if frozen is None else frozen
        draws = self.training and self.stochastic_sample_codes and temperature > 0
        taught = self.training and self.learnable_codebook and not frozen
        return Call(topk, temperature, draws, self.training, taught, frozen, **rest)

    def _with_gradient(self, rows: Tensor, codes: Tensor, chosen: Chosen, call: Call, routes: bool) -> Tensor:
        """The output in the layout of the rows, with the gradient that the constructor asks for."""
        if not self.training:
            return chosen.values
        routes = rows.requires_grad and self.route_gradients_to_input and (routes or not self.strict_compat)
        soft = self.straight_through and rows.requires_grad and call.temperature > 0 and call.topk is None
        if soft and not (routes and self.strict_compat):
            mean = (
                mean_code(rows.flatten(1, 2), codes.detach(), metric=self._codebook.metric, scale=1 / call.temperature)
                if chosen.transformed is None
                else self.layout.from_places(chosen.transformed.mean_code(call.temperature))
            ).view_as(rows)
            quantized = chosen.values + (mean - mean.detach()).to(rows.dtype)
        elif not routes:
            quantized = chosen.values
        elif self.rotation_trick:
            quantized = rotate_gradient(call.over_k(rows).expand_as(chosen.values), chosen.passed)
        elif self.directional_reparam:
            source = call.over_k(rows).expand_as(chosen.values)
            quantized = directional_reparam(source, chosen.values, self.directional_reparam_variance)
        else:
            quantized = chosen.passed
        if self.sync_update_v > 0:
            quantized = quantized + self.sync_update_v * (quantized - quantized.detach())
        return quantized

    def _learn(self, rows: Tensor, mask: Tensor | None, chosen: Chosen, call: Call) -> None:
        self._codebook.update(
            rows.detach(),
            chosen.indices,
            mask,
            weight=call.ema_weight,
            accumulate=call.accumulate,
            ema_update=call.ema_update,
            counts=chosen.counts,
        )

    @torch.compiler.disable
    def _step_in_place(self, rows: Tensor, mask: Tensor | None, call: Call) -> Tensor:
        """A step of the in-place optimizer on mean((sg[x] - q)^2), which is returned.

        Not to be compiled: torch.compile does not trace an optimizer's step within a forward.
        """
        rows = rows.detach()
        with torch.enable_grad(), apart():
            codes = self._codebook.as_used(self._codebook.embed.clone())
            chosen = choose(self._codebook, self.layout, rows, mask, codes, call)
            loss = losses.masked_mean(losses.commitment(rows, chosen.values), mask)
            self._learn(rows, mask, chosen, call)
            loss.backward()
        if not self.manual_in_place_optimizer_update:
            self.update_in_place_optimizer()
        return loss.detach()

    # ---- losses -------------------------------------------------------------------------------------------------

    def _measure(
        self,
        parts: dict[str, Tensor],
        split: Tensor,
        rows: Tensor,
        mask: Tensor | None,
        codes: Tensor,
        chosen: Chosen,
        call: Call,
    ) -> None:
        """Fill in the parts of the training loss that are asked for."""
        if self.has_commitment_loss:
            if self.commitment_use_cross_entropy_loss:
                parts["commitment"] = self._cross_entropy(rows, codes, chosen.indices, mask, chosen)
            elif self.strict_compat and self.use_cosine_sim and mask is not None and call.topk is None:
                parts["commitment"] = losses.masked_mean(losses.commitment(split, chosen.values.detach()), mask)
            else:
                parts["commitment"] = chosen.commitment
        if self.has_codebook_diversity_loss:
            places = None if mask is None else self.layout.by_place(mask)
            temperature = self.codebook_diversity_temperature
            parts["codebook_diversity"] = (
                losses.diversity(
                    self.layout.by_place(rows), codes, places, temperature=temperature, metric=self._codebook.metric
                )
                if chosen.transformed is None
                else losses.dense_diversity(chosen.transformed.logits, places, temperature=temperature)
            )
        if self.has_codebook_orthogonal_loss:
            active = None
            if self.orthogonal_reg_active_codes_only:
                seen = chosen.indices
                if mask is not None:
                    seen = seen.masked_fill(~call.over_k(mask), -1)
                ones = rows.new_ones(1).expand(*seen.shape, 1)
                counts, _ = functional.code_sums(ones, seen, self.codebook_size, per_head=True)
                active = counts > 0
            parts["orthogonal_reg"] = losses.orthogonal(self._codebook.embed, active, self.orthogonal_reg_max_codes)

    def _weighted(self, parts: dict[str, Tensor], chosen: Chosen, mask: Tensor | None, call: Call) -> Tensor:
        """The loss: () or, with topk, that of each row."""
        if not self.training:
            if call.topk is None:
                return parts["commitment"]
            parts["commitment"] = chosen.commitment
            return chosen.commitment * (self.commitment_weight if self.has_commitment_loss else 1.0)
        weighted = [
            weight * parts[part]
            for asked, part, weight in (
                (self.has_codebook_diversity_loss, "codebook_diversity", self.codebook_diversity_loss_weight),
                (self.has_commitment_loss, "commitment", self.commitment_weight),
                (self.has_codebook_orthogonal_loss, "orthogonal_reg", self.orthogonal_reg_weight),
            )
            if asked
        ]
        loss = functools.reduce(operator.add, weighted) if weighted else torch.zeros_like(parts["commitment"])
        loss = loss.to(torch.promote_types(loss.dtype, torch.float32))  # that of narrow codes alone is narrow
        if torch.is_grad_enabled() and not loss.requires_grad and not torch.compiler.is_compiling():
            loss.requires_grad_()  # so that loss.backward() works on fixed features too
        return loss

    def _cross_entropy(
        self, rows: Tensor, codes: Tensor, indices: Tensor, mask: Tensor | None, chosen: Chosen
    ) -> Tensor:
        if chosen.transformed is None:
            return losses.cross_entropy(rows, codes, indices, mask, metric=self._codebook.metric)
        places = None if mask is None else self.layout.by_place(mask)
        return losses.dense_cross_entropy(chosen.transformed.logits, self.layout.by_place(indices), places)

    # ---- layout -------------------------------------------------------------------------------------------------

    def _rows(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, heads * D) as the codebook sees them."""
        return self._on_manifold(self.layout.rows(tokens))

    def _on_manifold(self, rows: Tensor) -> Tensor:
        return l2norm(rows) if self.use_cosine_sim else rows

    def _row_mask(self, mask: Tensor | None) -> Tensor | None:
        """(B, N) in the layout of the rows, (H, B, T)."""
        return None if mask is None else self._index_rows(mask.unsqueeze(-1).expand(*mask.shape, self.heads))

    def _placed(self, values: Tensor, x: Tensor, call: Call) -> Tensor:
        """Indices or losses (H, B, T) by the places of x, with a last dimension heads; (1, B, T, k) with k last."""
        places = self.layout.places(x)
        if call.topk is not None:
            return values.reshape(*places, values.shape[-1])
        if self.heads == 1:
            return values.reshape(places)
        return self.layout.joined(values.unsqueeze(-1)).reshape(*places, self.heads)

    def _unjoined(self, quantized: Tensor) -> Tensor:
        """The rows as `vector_quantize_pytorch` returns them beside a cross entropy."""
        return quantized.squeeze(0) if self.heads == 1 else self.layout.by_place(quantized)

    def extra_repr(self) -> str:
        """The arguments that matter most, for `print`."""
        book = self._codebook
        return (
            f"dim={self.dim}, codebook_size={self.codebook_size}, codebook_dim={book.embed.shape[-1]}, "
            f"heads={self.heads}, metric={book.metric}, decay={book.decay}, ema_update={book.ema_update}, "
            f"learnable_codebook={self.learnable_codebook}"
        )
