"""The quantisation layer, with the constructor and return values of `vector_quantize_pytorch.VectorQuantize`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvq import functional
from fastvq.nn import checks
from fastvq.nn.codebook import Codebook
from fastvq.nn.cosine import l2norm
from fastvq.nn.recompute import recomputing
from fastvq.nn.rotation import rotate_gradient
from fastvq.nn.unsupported import refuse


class VectorQuantize(nn.Module):
    """Replace every token by its nearest code, and learn the codes (van den Oord et al., 2017, arXiv:1711.00937).

    Takes the place of `vector_quantize_pytorch.VectorQuantize` 1.32.0: the same arguments, defaults, return values,
    state_dict and, from the same seed, the same first weights. An argument of that class that has no meaning here yet
    is refused by name unless it has its default.

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
        use_cosine_sim: quantise x / |x| to the code with the largest dot product; codes are unit vectors.
        threshold_ema_dead_code: after a step, codes with a smaller average of rows a step (`cluster_size`) start again
            as random rows of the batch, no row twice; 0 never does so.
        channel_last: tokens are (B, N, dim); else (B, dim, N).
        accept_image_fmap: the input is (B, dim, height, width).
        commitment_weight: weight of the loss mean((x - sg[q])^2); 0 or less leaves it out.
        rotation_trick: gradients pass to x turned and scaled as x is to its code (arXiv:2410.06424), not as they are;
            None means yes where dim is more than 1.
        ema_update: the codes follow their moving averages; None means yes.
        learnable_codebook: the codes are a parameter, trained by the loss, mean((x - q)^2) for both x and q; needs
            ema_update=False. None means no.

    Attributes:
        codebook: the codes (K, D), or (heads, K, D) with one for each head; may be assigned.

    Raises:
        TypeError, ValueError: an argument of the wrong type, out of range, or that does not go with another.
        NotImplementedError: an argument that is not supported yet.
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
    ) -> None:
        super().__init__()
        refuse(
            "VectorQuantize",
            sync_kmeans=(sync_kmeans, True),
            layernorm_after_project_in=(layernorm_after_project_in, False),
            accept_3d_fmap=(accept_3d_fmap, False),
            commitment_use_cross_entropy_loss=(commitment_use_cross_entropy_loss, False),
            orthogonal_reg_weight=(orthogonal_reg_weight, 0.0),
            orthogonal_reg_active_codes_only=(orthogonal_reg_active_codes_only, False),
            orthogonal_reg_max_codes=(orthogonal_reg_max_codes, None),
            codebook_diversity_loss_weight=(codebook_diversity_loss_weight, 0.0),
            codebook_diversity_temperature=(codebook_diversity_temperature, 100.0),
            stochastic_sample_codes=(stochastic_sample_codes, False),
            sample_codebook_temp=(sample_codebook_temp, 1.0),
            straight_through=(straight_through, False),
            directional_reparam=(directional_reparam, False),
            directional_reparam_variance=(directional_reparam_variance, 5e-3),
            sync_codebook=(sync_codebook, None),
            sync_affine_param=(sync_affine_param, False),
            vq_bridge=(vq_bridge, None),
            manual_ema_update=(manual_ema_update, False),
            in_place_codebook_optimizer=(in_place_codebook_optimizer, None),
            manual_in_place_optimizer_update=(manual_in_place_optimizer_update, False),
            affine_param=(affine_param, False),
            affine_param_batch_decay=(affine_param_batch_decay, 0.99),
            affine_param_codebook_decay=(affine_param_codebook_decay, 0.9),
            sync_update_v=(sync_update_v, 0.0),
            return_zeros_for_masked_padding=(return_zeros_for_masked_padding, True),
            route_gradients_to_input=(route_gradients_to_input, True),
        )
        codebook_dim = dim if codebook_dim is None else codebook_dim
        ema_update = True if ema_update is None else ema_update
        learnable_codebook = False if learnable_codebook is None else learnable_codebook
        checks.whole("dim", dim, 1)
        checks.whole("codebook_size", codebook_size, 1)
        checks.whole("codebook_dim", codebook_dim, 1)
        checks.whole("heads", heads, 1)
        checks.whole("kmeans_iters", kmeans_iters, 0)
        checks.number("decay", decay, 0.0, 1.0)
        checks.number("eps", eps, 0.0)
        checks.number("threshold_ema_dead_code", threshold_ema_dead_code, 0.0)
        checks.number("commitment_weight", commitment_weight)
        if learnable_codebook and ema_update:
            raise ValueError("learnable_codebook=True needs ema_update=False: the codes have one teacher; got True")
        if learnable_codebook and use_cosine_sim:
            raise ValueError("learnable_codebook=True needs use_cosine_sim=False; got True")

        self.dim = dim
        self.codebook_size = codebook_size
        self.heads = heads
        self.separate_codebook_per_head = separate_codebook_per_head
        self.eps = eps
        self.freeze_codebook = freeze_codebook
        self.use_cosine_sim = use_cosine_sim
        self.channel_last = channel_last
        self.accept_image_fmap = accept_image_fmap
        self.commitment_weight = commitment_weight
        self.learnable_codebook = learnable_codebook
        self.rotation_trick = dim > 1 if rotation_trick is None else rotation_trick

        width = codebook_dim * heads
        self.has_projections = width != dim
        self.project_in = nn.Linear(dim, width) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(width, dim) if self.has_projections else nn.Identity()
        self._codebook = Codebook(
            codebook_dim,
            codebook_size,
            num_codebooks=heads if separate_codebook_per_head else 1,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            decay=decay,
            eps=eps,
            threshold=threshold_ema_dead_code,
            metric="cosine" if use_cosine_sim else "euclidean",
            learnable=learnable_codebook,
            ema_update=ema_update,
        )

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
        self._codebook.set_codes(codes if self.separate_codebook_per_head else codes.unsqueeze(0))

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes at indices as `forward` returns them.

        Args:
            indices: (...), or (..., heads) with several heads; int64 or int32; -1 gives zeros.

        Returns:
            (..., D); with a codebook a head (..., heads * D); with several heads on one codebook (..., heads, D). With
            accept_image_fmap or channel_last=False the last dimension comes second.

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
            (..., dim), or (B, dim, ...) with accept_image_fmap or channel_last=False.

        Raises:
            TypeError, ValueError: as in `get_codes_from_indices`.
        """
        output = self.project_out(self._codes_at(indices))
        left_out = indices < 0 if self.heads == 1 else (indices < 0).all(-1)
        return self._channels_in_place(output.masked_fill(left_out.unsqueeze(-1), 0.0))

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
        codebook_transform_fn: Callable[..., Any] | None = None,
        ema_update_weight: Tensor | Callable[..., Any] | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise x; in training, learn from it.

        Args:
            x: (B, N, dim), or (B, dim) for one token each; (B, dim, N) with channel_last=False; (B, dim, height,
                width) with accept_image_fmap. float32, bfloat16, float16 or float64.
            mask: (B, N) bool; tokens where it is False give zeros and the index -1, and nothing is learnt from them.
            lens: (B,) integers, the same by the number of leading tokens to keep; not together with mask.
            freeze_codebook: learn nothing in this call; None asks the constructor's.
            indices, topk, sample_codebook_temp, return_loss_breakdown, codebook_transform_fn, ema_update_weight,
                accum_ema_update, ema_update: not supported yet.

        Returns:
            quantized: the shape and dtype of x.
            indices: int64, (B, N), (B,) or (B, height, width); and a last dimension heads with several heads.
            loss: (), float32 (float64 for float64 x): commitment_weight * mean((x - sg[q])^2), over the rows as they
                were quantised, after `project_in` and normalisation; 0 in eval mode.

        Raises:
            TypeError, ValueError: an argument of the wrong type or shape.
            NotImplementedError: an argument that is not supported yet.
        """
        refuse(
            "VectorQuantize.forward",
            indices=(indices, None),
            topk=(topk, None),
            sample_codebook_temp=(sample_codebook_temp, None),
            return_loss_breakdown=(return_loss_breakdown, False),
            codebook_transform_fn=(codebook_transform_fn, None),
            ema_update_weight=(ema_update_weight, None),
            accum_ema_update=(accum_ema_update, False),
            ema_update=(ema_update, None),
        )
        tokens = self._tokens(x)
        token_mask = self._token_mask(x, tokens, mask, lens)
        if token_mask is not None:
            tokens = torch.where(token_mask.unsqueeze(-1), tokens, 0.0)  # padding may hold anything, NaN too
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook

        rows = self._rows(self.project_in(tokens))
        row_mask = None if token_mask is None else self._row_mask(token_mask)
        quantized, row_indices, loss = self._quantize(rows, row_mask, frozen)

        output = self.project_out(self._join_heads(quantized))
        index = self._join_heads(row_indices.unsqueeze(-1))
        if token_mask is not None:
            output = torch.where(token_mask.unsqueeze(-1), output, 0.0)
            index = torch.where(token_mask.unsqueeze(-1), index, -1)
        places = x.shape[:1] + (x.shape[2:] if self._channels_second(x) else x.shape[1:-1])
        output = output.reshape(*places, self.dim)
        index = index.reshape(*places, self.heads) if self.heads > 1 else index.reshape(places)
        return (output.movedim(-1, 1) if self._channels_second(x) else output), index, loss

    def _quantize(self, rows: Tensor, mask: Tensor | None, frozen: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (H, B, T, D) quantised; learnt from unless frozen: codes (H, B, T, D), indices (H, B, T), loss ()."""
        book = self._codebook
        if self.use_cosine_sim:
            rows = l2norm(rows)
        if not self.training:
            rows = rows.detach()
        book.init_from(rows, mask)
        codes = book.codes(changing=self.training and book.tracks)
        weight = max(float(self.commitment_weight), 0.0)
        taught = self.learnable_codebook and self.training and not frozen
        quantized, indices, loss = functional.vector_quantize(
            rows,
            codes if taught else codes.detach(),
            metric=book.metric,
            commitment_weight=weight,
            codebook_weight=weight if taught else 0.0,
            mask=mask,
        )
        if rows.requires_grad and self.rotation_trick:
            quantized = rotate_gradient(rows, quantized)
        elif self.learnable_codebook and not frozen and not rows.requires_grad and torch.is_grad_enabled():
            quantized = book.lookup(indices).to(rows.dtype)  # without an encoder the output trains the codes
        if not self.training:
            loss = torch.zeros((), dtype=torch.float32, device=rows.device)
        else:
            if taught:
                loss = loss - loss.detach() / 2  # one mean((x - q)^2), with the gradients of both its halves
            if torch.is_grad_enabled() and not loss.requires_grad and not torch.compiler.is_compiling():
                loss.requires_grad_()  # so that loss.backward() works on fixed features too
            if book.tracks and not frozen and not recomputing():
                book.update(rows.detach(), indices, mask)
        return quantized, indices, loss

    def _channels_second(self, x: Tensor) -> bool:
        return self.accept_image_fmap or (not self.channel_last and x.dim() > 2)

    def _channels_in_place(self, codes: Tensor) -> Tensor:
        """Channels moved from last to where this layer's outputs have them."""
        return codes if self.channel_last and not self.accept_image_fmap else codes.movedim(-1, 1)

    def _tokens(self, x: Tensor) -> Tensor:
        """The input as (B, N, dim)."""
        checks.tensor("x", x)
        if self.accept_image_fmap:
            checks.layout("x", x, 4, 1, self.dim, "(B, dim, height, width), as accept_image_fmap asks")
            return x.flatten(2).transpose(1, 2)
        if x.dim() == 2:
            checks.layout("x", x, 2, 1, self.dim, "(B, N, dim) or (B, dim)")
            return x.unsqueeze(1)
        if not self.channel_last:
            checks.layout("x", x, 3, 1, self.dim, "(B, dim, N) or (B, dim), as channel_last=False asks")
            return x.transpose(1, 2)
        checks.layout("x", x, 3, 2, self.dim, "(B, N, dim) or (B, dim)")
        return x

    def _token_mask(self, x: Tensor, tokens: Tensor, mask: Tensor | None, lens: Tensor | None) -> Tensor | None:
        """Which tokens take part, (B, N) bool, or None when all do."""
        if mask is None and lens is None:
            return None
        name = "mask" if lens is None else "lens"
        if mask is not None and lens is not None:
            raise ValueError("mask and lens say the same thing: give one of them; got both")
        if x.dim() != 3:
            raise ValueError(f"{name} needs x with a dimension of tokens, of 3 dimensions; got {tuple(x.shape)}")
        if mask is not None:
            checks.tensor("mask", mask)
            checks.dtype("mask", mask, (torch.bool,))
            checks.shape("mask", mask, tokens.shape[:2])
            return mask
        assert lens is not None
        checks.tensor("lens", lens)
        checks.dtype("lens", lens, (torch.int64, torch.int32))
        checks.shape("lens", lens, tokens.shape[:1])
        return torch.arange(tokens.shape[1], device=lens.device) < lens.unsqueeze(1)

    def _rows(self, tokens: Tensor) -> Tensor:
        """(B, N, heads * D) as (heads, B, N, D), or, on one codebook, (1, B, N * heads, D)."""
        parts = tokens.unflatten(-1, (self.heads, -1))
        return parts.permute(2, 0, 1, 3) if self.separate_codebook_per_head else parts.flatten(1, 2).unsqueeze(0)

    def _row_mask(self, mask: Tensor) -> Tensor:
        """(B, N) in the layout of `_rows` less its last dimension."""
        return self._rows(mask.repeat_interleave(self.heads, dim=1).unflatten(1, (-1, self.heads))).squeeze(-1)

    def _join_heads(self, rows: Tensor) -> Tensor:
        """What `_rows` has split: (B, N, heads * D)."""
        if self.separate_codebook_per_head:
            return rows.permute(1, 2, 0, 3).flatten(2)
        return rows.squeeze(0).unflatten(1, (-1, self.heads)).flatten(2)

    def _codes_at(self, indices: Tensor) -> Tensor:
        """The codes of each token side by side, (..., heads * D)."""
        checks.tensor("indices", indices)
        checks.dtype("indices", indices, (torch.int64, torch.int32))
        if self.heads > 1 and (indices.dim() == 0 or indices.shape[-1] != self.heads):
            raise ValueError(
                f"indices must have heads = {self.heads} in the last dimension; got {tuple(indices.shape)}"
            )
        places = indices.shape if self.heads == 1 else indices.shape[:-1]
        rows = self._rows(indices.reshape(1, -1, self.heads)).squeeze(-1)
        codes = self._join_heads(self._codebook.lookup(rows))
        return codes.reshape(*places, codes.shape[-1])

    def extra_repr(self) -> str:
        """The arguments that matter most, for `print`."""
        book = self._codebook
        return (
            f"dim={self.dim}, codebook_size={self.codebook_size}, codebook_dim={book.embed.shape[-1]}, "
            f"heads={self.heads}, metric={book.metric}, decay={book.decay}, ema_update={book.ema_update}, "
            f"learnable_codebook={self.learnable_codebook}"
        )
