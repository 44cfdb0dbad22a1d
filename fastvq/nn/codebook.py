"""A codebook and what it remembers between steps: where it came from, how it moves, which codes are dead."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastvq import ops
from fastvq.backends.rows import finite_rows
from fastvq.functional import code_sums
from fastvq.nn.cosine import l2norm
from fastvq.nn.distributed import all_reduce_, take_turns, world_size
from fastvq.nn.kmeans import kmeans
from fastvq.nn.recompute import Recording, generator_state, recomputing, set_generator_state
from fastvq.nn.sampling import rows_for_codes
from fastvq.nn.straight_through import straight_through

EmaWeight = Tensor | Callable[[Tensor, Tensor], Tensor]
T = TypeVar("T")

_finite_code_sums = ops.direct["finite_code_sums"]
_ema_update = ops.direct["ema_update_"]
_ema_step = ops.direct["ema_step_"]


class Codebook(nn.Module):
    """H codebooks of K codes of D numbers, with the state of their exponential moving averages.

    The state_dict is that of vector-quantize-pytorch: initted () bool, cluster_size (H, K), embed_avg (H, K, D) and
    embed (H, K, D), which is a parameter when `learnable_codebook`. Buffers stay in float32 when the module is cast to
    a narrower dtype, since moving averages stall there; a parameter is cast.

    Args:
        dim: D.
        codebook_size: K.
        num_codebooks: H.
        kmeans_init: start from the k-means of the first batch.
        kmeans_iters: its iterations.
        decay: of the moving averages.
        eps: of the Laplace smoothing.
        threshold_ema_dead_code: codes whose cluster_size is below it are dead, and replaced by rows of the batch; 0
            keeps them.
        use_cosine_sim: codes are unit vectors, searched by their dot products.
        learnable_codebook: the codes are a parameter.
        ema_update: the codes follow their moving averages.
        manual_ema_update: they follow when `update_ema` is called.
        shared: the processes of a data-parallel job keep one codebook.
        share_draws: k-means and the replacement of dead codes are part of that.
        vq_bridge: maps the codes (H, K, D) to those that are searched (FVQ: Chang et al., 2025, arXiv:2509.10140).
        strict_compat: see `VectorQuantize`.
    """

    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    embed: Tensor
    counts: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        num_codebooks: int,
        kmeans_init: bool,
        kmeans_iters: int,
        decay: float,
        eps: float,
        threshold_ema_dead_code: float,
        use_cosine_sim: bool,
        learnable_codebook: bool,
        ema_update: bool,
        manual_ema_update: bool,
        shared: bool,
        share_draws: bool,
        vq_bridge: nn.Module | None,
        strict_compat: bool,
    ) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.num_codebooks = num_codebooks
        self.kmeans_iters = kmeans_iters
        self.decay = decay
        self.eps = eps
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.reset_cluster_size = threshold_ema_dead_code
        self.use_cosine_sim = use_cosine_sim
        self.learnable_codebook = learnable_codebook
        self.ema_update = ema_update
        self.manual_ema_update = manual_ema_update
        self.shared = shared
        self.share_draws = share_draws
        self.strict_compat = strict_compat

        embed = torch.zeros(num_codebooks, codebook_size, dim)
        if not kmeans_init:
            nn.init.kaiming_uniform_(embed)
            embed = self._on_manifold(embed)
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(num_codebooks, codebook_size))
        self.register_buffer("embed_avg", embed.clone())
        if learnable_codebook:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        self.register_buffer("counts", torch.zeros(num_codebooks, codebook_size), persistent=False)
        self.vq_bridge = vq_bridge
        self._ready = not kmeans_init  # `initted` for Python, so that no forward waits for the device to ask
        self._waiting = False  # whether statistics wait in the `grad` of the averages, which compiled code cannot ask
        self._recording = Recording()

    @property
    def metric(self) -> str:
        """Of the search."""
        return "cosine" if self.use_cosine_sim else "euclidean"

    @property
    def has_dead_code_replacement(self) -> bool:
        """Whether dead codes are replaced."""
        return self.threshold_ema_dead_code > 0

    # ---- the codes ----------------------------------------------------------------------------------------------

    def codes(self, *, changing: bool, copied: bool = False) -> Tensor:
        """The codes of this forward, (H, K, D).

        Apart from `embed` when the step will write that before backward, unless the caller copies them.
        """
        noted = self.training and (changing or not self.learnable_codebook)
        if noted and recomputing():
            kept: Tensor = self._recording.again()
            return straight_through(self.as_used(self.embed), kept) if self.learnable_codebook else kept
        apart = changing and (not copied or torch.compiler.is_compiling())  # compilers undo a copy they understand
        codes = self.as_used(ops.copied(self.embed) if apart else self.embed)
        if noted:
            self._recording.note(codes.detach if apart else codes.detach().clone)
        return codes

    def once(self, learn: Callable[[], T], device: torch.device) -> T | None:
        """What `learn` returns. In a recomputation it does not run: torch's generators are left as it left them."""
        if not recomputing():
            found = learn()
            if self.training:
                self._recording.note(lambda: generator_state(device))
            return found
        if self.training:
            set_generator_state(self._recording.again(), device)
        return None

    def as_used(self, embed: Tensor) -> Tensor:
        """Codes (H, K, D) as they are searched and returned."""
        return embed if self.vq_bridge is None else self.vq_bridge(embed)

    @staticmethod
    def lookup(codes: Tensor, indices: Tensor) -> Tensor:
        """codes (H, K, D) at indices (H, ...): (H, ..., D), zero where the index is -1; differentiable to the codes."""
        heads = torch.arange(indices.shape[0], device=indices.device).view(-1, *[1] * (indices.dim() - 1))
        found = codes[heads, indices.clamp(min=0)]
        return found.masked_fill((indices < 0).unsqueeze(-1), 0.0)

    @torch.no_grad()
    def set_codes(self, codes: Tensor) -> None:
        """Put codes (H, K, D) in place, with the averages that give them back at the next update."""
        self.embed.copy_(self._on_manifold(codes.to(self.embed)))
        self.embed_avg.copy_(self.embed * self._smoothed_sizes())
        self.initted.fill_(True)
        self._ready = True

    def _smoothed_sizes(self) -> Tensor:
        """cluster_size with Laplace smoothing, (H, K, 1)."""
        total = self.cluster_size.sum(-1, keepdim=True)
        smoothed = (self.cluster_size + self.eps) / (total + self.codebook_size * self.eps) * total
        return smoothed.unsqueeze(-1)

    def _on_manifold(self, codes: Tensor) -> Tensor:
        return l2norm(codes) if self.use_cosine_sim else codes

    # ---- learning -----------------------------------------------------------------------------------------------

    def init_from(self, rows: Tensor, mask: Tensor | None) -> None:
        """Before the first batch with rows (H, B, T, D), mask (H, B, T): their k-means, where that was asked for."""
        if not self._ready and rows.numel() > 0:
            self._start_from(rows, mask)

    @torch.no_grad()
    def _start_from(self, rows: Tensor, mask: Tensor | None) -> None:
        found = rows.shape[1] * rows.shape[2]
        if found < self.codebook_size:
            warnings.warn(
                f"k-means starts {self.codebook_size} codes from {found} rows: some codes will be equal",
                RuntimeWarning,
                stacklevel=2,
            )
        shared = self.shared and self.share_draws
        means, counts = kmeans(
            rows, self.codebook_size, self.kmeans_iters, metric=self.metric, mask=finite_rows(rows, mask), shared=shared
        )
        # A batch that is masked throughout has no counts; sizes of 1 are those of a new codebook.
        self.cluster_size.copy_(torch.where(counts.sum(-1, keepdim=True) > 0, counts, 1.0))
        self.set_codes(means)
        if self.strict_compat:
            self.embed_avg.copy_(means * counts.unsqueeze(-1))
            self.update_ema()

    def observe(self, rows: Tensor, mask: Tensor | None) -> None:
        """Take note of the rows (H, B, T, D) of a forward before their search; nothing here."""

    def writes(self, ema_update: bool | None) -> bool:
        """Whether a training step writes codes or averages."""
        return self.has_dead_code_replacement or (self.ema_update if ema_update is None else ema_update)

    @torch.no_grad()
    def update(
        self,
        rows: Tensor,
        indices: Tensor,
        mask: Tensor | None,
        *,
        weight: EmaWeight | None = None,
        accumulate: bool = False,
        ema_update: bool | None = None,
        counts: Tensor | None = None,
    ) -> None:
        """Learn from rows: move the averages and the codes, replace dead codes. NaN and infinite rows teach nothing.

        Args:
            rows: (H, B, T, D).
            indices: (H, B, T), their codes.
            mask: (H, B, T) bool; rows where it is False are left out.
            weight: of this step for each code, times 1 - decay: (K,) or (H, K), or a function of sums (H, K, D) and
                counts (H, K) that gives one.
            accumulate: keep the sums, in `grad` of the averages, for the next step that does not.
            ema_update: whether codes follow the averages; None asks the constructor's.
            counts: (H, K), how many rows took each code, where that is known; of use where nothing else is learnt.
        """
        if self.counts.device != self.cluster_size.device:  # no checkpoint that is assigned has them
            self.counts = torch.zeros_like(self.cluster_size)
        if counts is not None and not self.writes(ema_update):
            self.counts.copy_(counts)
            return
        if not self.writes(ema_update):
            kept = finite_rows(rows, mask)
            counts, _ = code_sums(rows[..., :1], indices, self.codebook_size, mask=kept, per_head=True)
            self.counts.copy_(counts)
            return
        if weight is None and not accumulate and self._learns_alone():
            codes = self._moved_codes(ema_update)
            averages = self.cluster_size, self.embed_avg
            _ema_step(codes, *averages, self.counts, rows, indices, mask, self.decay, self.eps, None)
            self._settle(codes)
            self.expire_codes_(rows, mask)
            return
        counts, sums = _finite_code_sums(rows, indices, self.codebook_size, mask, True, None)
        if self._follow(counts, sums, weight, accumulate=accumulate, ema_update=ema_update):
            self.expire_codes_(rows, mask)

    def _learns_alone(self) -> bool:
        """Whether the averages want the sums of these rows, as they are, and no others."""
        return not (self._waiting or (self.shared and world_size() > 1))

    def _moved_codes(self, ema_update: bool | None) -> Tensor:
        """What the averages write codes to: `embed`, where the codes follow them in this step."""
        follow = (self.ema_update if ema_update is None else ema_update) and not self.manual_ema_update
        return self.embed if follow else torch.empty_like(self.embed)

    def _settle(self, codes: Tensor) -> None:
        if codes is self.embed and self.use_cosine_sim:
            self.embed.copy_(l2norm(self.embed))

    @torch.no_grad()
    def update_from(self, counts: Tensor, sums: Tensor) -> None:
        """`update` for an EMA codebook without replacement of dead codes, from the counts (H, K) and sums (H, K, D)."""
        self._follow(counts, sums, None, accumulate=False, ema_update=None)

    def _follow(
        self, counts: Tensor, sums: Tensor, weight: EmaWeight | None, *, accumulate: bool, ema_update: bool | None
    ) -> bool:
        """Move the averages, and the codes with them; False when the sums only wait for the next step."""
        counts, sums = all_reduce_(counts, shared=self.shared), all_reduce_(sums, shared=self.shared)
        self.counts.copy_(counts)
        counts, sums = self.of_codes(counts, sums)
        if callable(weight):
            weight = weight(sums, counts)
        if accumulate:
            self._accumulate(counts, sums)
            return False
        if self._waiting:
            counts, sums = self._accumulated(counts, sums)
        codes = self._moved_codes(ema_update)
        if weight is None:
            _ema_update(codes, self.cluster_size, self.embed_avg, counts, sums, self.decay, self.eps, None)
            self._settle(codes)
            return True
        self._move_averages(counts, sums, weight)
        if codes is self.embed:
            self.update_ema()
        return True

    def of_codes(self, counts: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Counts and sums of rows, as those of the rows in the frame of `embed`."""
        return counts, sums

    def _accumulate(self, *sums: Tensor) -> None:
        for average, new in zip((self.cluster_size, self.embed_avg), sums, strict=True):
            average.grad = new.to(average) if average.grad is None else average.grad + new.to(average)
        self._waiting = True

    def _accumulated(self, *sums: Tensor) -> tuple[Tensor, ...]:
        averages = self.cluster_size, self.embed_avg
        total = tuple(n if a.grad is None else n + a.grad for a, n in zip(averages, sums, strict=True))
        for average in averages:
            average.grad = None
        self._waiting = False
        return total

    def _move_averages(self, counts: Tensor, sums: Tensor, weight: Tensor) -> None:
        if weight.shape not in (self.cluster_size.shape, self.cluster_size.shape[1:]):
            wanted = f"{tuple(self.cluster_size.shape[1:])} or {tuple(self.cluster_size.shape)}"
            raise ValueError(f"ema_update_weight must have shape {wanted}; got {tuple(weight.shape)}")
        step = ((1 - self.decay) * weight).to(self.cluster_size).expand_as(self.cluster_size)
        self.cluster_size.lerp_(counts.to(step), step)
        self.embed_avg.lerp_(sums.to(step), step.unsqueeze(-1))

    @torch.no_grad()
    def update_ema(self) -> None:
        """Set the codes to their moving averages; `update` does so unless `manual_ema_update`."""
        self.embed.copy_(self._on_manifold(self.embed_avg / self._smoothed_sizes()))

    # ---- dead codes ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def expire_codes_(self, batch_samples: Tensor, seq_mask: Tensor | None = None) -> None:
        """In training, replace the codes in too little use by rows; see `replace`."""
        if self.has_dead_code_replacement and self.training and batch_samples.numel() > 0:
            self.replace(batch_samples, self.cluster_size < self.threshold_ema_dead_code, seq_mask)

    @torch.no_grad()
    def replace(self, batch_samples: Tensor, batch_mask: Tensor, seq_mask: Tensor | None = None) -> None:
        """Start codes again as random rows, no row twice, each with a cluster_size of the threshold.

        Args:
            batch_samples: (H, ..., D), at least one row, unit vectors for cosine; a code that draws a row
                that is not finite keeps its place.
            batch_mask: (H, K) bool, the codes to replace.
            seq_mask: (H, ...) bool; rows where it is False are not drawn.
        """
        rows = batch_samples.unsqueeze(1) if batch_samples.dim() < 4 else batch_samples.flatten(1, -3)
        mask = None if seq_mask is None else seq_mask.view(rows.shape[:-1])
        drawn, served = rows_for_codes(rows, batch_mask, mask)
        served = served & drawn.isfinite().all(-1)
        drawn, served = take_turns(drawn.to(self.embed), served, shared=self.shared and self.share_draws)
        chosen = served.unsqueeze(-1)
        drawn = self.row_of_codes(drawn).masked_fill(~chosen, 0.0)
        self.cluster_size.masked_fill_(served, self.reset_cluster_size)
        self.embed.masked_fill_(chosen, 0.0).add_(drawn)
        self.embed_avg.masked_fill_(chosen, 0.0).add_(drawn, alpha=self.reset_cluster_size)

    def row_of_codes(self, rows: Tensor) -> Tensor:
        """Rows (H, K, D) in the frame of `embed`."""
        return rows

    # ---- usage --------------------------------------------------------------------------------------------------

    @property
    def usage(self) -> Tensor:
        """The part of the codes that the last training step used, (H,): by all processes if they share averages."""
        return (self.counts > 0).to(self.counts.dtype).mean(-1)

    @property
    def perplexity(self) -> Tensor:
        """exp of the entropy of how the last training step used the codes, (H,); 1 before any."""
        chances = self.counts / self.counts.sum(-1, keepdim=True).clamp(min=1)
        return torch.special.entr(chances).sum(-1).exp()

    # ---- casts and checkpoints ----------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codebook:
        kept = {id(buffer) for buffer in self._buffers.values()}

        def buffers_not_below_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrow = id(tensor) in kept and moved.dtype in (torch.bfloat16, torch.float16)
            return tensor.to(moved.device) if narrow else moved

        super()._apply(buffers_not_below_float32, recurse)
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if not self.initted.is_meta:
            self._ready = bool(self.initted)
