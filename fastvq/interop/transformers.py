"""transformers: the quantisers of its codecs, image tokenizers and speech encoders."""

from __future__ import annotations

import contextlib
import importlib
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.accelerate import force_accelerate_hooks

from fastvq.functional import search
from fastvq.interop.nearest import nearest_direction, quantized_image
from fastvq.interop.patching import Client, FastModule, by_path, differs, fast_class
from fastvq.interop.residual import fixed_codes, one_call, stacked_codes, stages_in_turn


class FastCodebook(FastModule):
    """The nearest code by fastvq.search."""

    embed: Tensor

    def quantize(self, hidden_states: Tensor) -> Tensor:
        """Indices (N,) of the codes nearest to rows (N, D)."""
        return cast(Tensor, search(hidden_states, self.embed))


class FastMimiCodebook(FastCodebook):
    """The nearest code by fastvq.search."""

    def quantize(self, hidden_states: Tensor) -> Tensor:
        """Indices (N,) of the codes nearest to rows (N, D), in float32 at least, as the client widens both."""
        return cast(Tensor, search(hidden_states, self.embed))


class FastResidualQuantizer(FastModule):
    """All stages in one call of fastvq.residual_quantize."""

    stages = "layers"  # the attribute that holds them

    def encode(self, embeddings: Tensor, bandwidth: float | None = None) -> Tensor:
        """Codes (Q, B, T) of embeddings (B, D, T)."""
        stages = self._stages(cast(Any, self).get_num_quantizers_for_bandwidth(bandwidth))
        codebooks = self._codebooks(stages)
        if one_call(embeddings, codebooks):
            return stacked_codes(self, embeddings, codebooks)
        return stages_in_turn(stages, embeddings)

    def _stages(self, count: int) -> list[Any]:
        return list(islice(getattr(self, self.stages), count))

    def _codebooks(self, stages: list[Any]) -> list[Tensor]:
        """The codes of each stage; none where a stage is not of the class that the client makes."""
        codebooks = [cast(Any, s).codebook for s in stages if type(s) is self.used_classes[0]]
        known = len(codebooks) == len(stages) and all(isinstance(c, FastCodebook) for c in codebooks)
        return [c.embed for c in codebooks] if known else []


class FastXcodecQuantizer(FastResidualQuantizer):
    """All stages in one call of fastvq.residual_quantize."""

    stages = "quantizers"


class FastMimiQuantizer(FastResidualQuantizer):
    """All stages in one call of fastvq.residual_quantize."""

    def encode(self, embeddings: Tensor, num_quantizers: int | None = None) -> Tensor:  # type: ignore[override]
        """Codes (Q, B, T) of embeddings (B, C, T)."""
        client = cast(Any, self)
        stages = self._stages(client.num_quantizers if num_quantizers is None else num_quantizers)
        latents = embeddings if client.input_proj is None else client.input_proj(embeddings)
        codebooks = self._codebooks(stages)
        if one_call(latents, codebooks):
            return fixed_codes(self, latents, codebooks)
        return stages_in_turn(stages, latents)


class FastDacQuantizer(FastModule):
    """The nearest normalised code by fastvq.search."""

    @force_accelerate_hooks("codebook")
    def decode_latents(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (B, D, T) as stored, and their indices (B, T), for latents (B, D, T)."""
        codebook = cast(nn.Embedding, self.codebook)
        indices = nearest_direction(hidden_states.transpose(1, 2), codebook.weight)
        return codebook(indices).transpose(1, 2), indices


class FastImageQuantizer(FastModule):
    """The nearest code by fastvq.search."""

    def forward(self, hidden_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantized (B, C, H, W), the loss, and indices (B * H * W,), for latents (B, C, H, W)."""
        client = cast(Any, self)
        tokens = hidden_state.permute(0, 2, 3, 1).contiguous()
        return quantized_image(tokens, client.embedding.weight, client.embedding, (1.0, client.beta))


class FastGlmImageQuantizer(FastModule):
    """The nearest normalised code by fastvq.search."""

    def forward(self, hidden_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantized (B, C, H, W), the loss, and indices (B * H * W,), for latents (B, C, H, W)."""
        client = cast(Any, self)
        tokens = functional.normalize(hidden_state.permute(0, 2, 3, 1).contiguous(), dim=-1)
        codebook = functional.normalize(client.embedding.weight, dim=-1)
        return quantized_image(tokens, codebook, codebook.__getitem__, (1.0, client.beta))


class FastEmu3Quantizer(FastModule):
    """The nearest code by fastvq.search."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        """Indices (B, T, H, W) for latents (B, T, C, H, W)."""
        return cast(Tensor, search(hidden_state.permute(0, 1, 3, 4, 2), cast(Any, self).embedding.weight))


class FastGumbelQuantizer(FastModule):
    """Codes by their indices, not by products with one-hot vectors."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Quantized (B, T, G * D) and the perplexity, for features (B, T, C); in training drawn at random."""
        return self._quantize(hidden_states, None)

    def _quantize(self, hidden_states: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        client = cast(Any, self)
        batch, length, _ = hidden_states.shape
        groups, size = client.num_groups, client.num_vars
        logits = client.weight_proj(hidden_states).view(batch * length, groups, size)
        codebook = client.codevectors.view(groups, size, -1)
        if self.training:
            scores = logits.view(-1, size).float()
            chances = functional.gumbel_softmax(scores, tau=client.temperature, hard=True).type_as(logits)
            quantized = torch.einsum("ngk,gkd->ngd", chances.view_as(logits), codebook)
            marginal = _mean_of_rows(torch.softmax(logits.float(), dim=-1), mask)
        else:
            indices = logits.argmax(dim=-1)
            quantized = codebook[torch.arange(groups, device=indices.device), indices]
            marginal = _shares(indices, size, mask, logits.dtype)
        perplexity = torch.exp(-torch.sum(torch.xlogy(marginal, marginal), dim=-1)).sum()
        return quantized.reshape(batch, length, -1), perplexity


class FastMaskedGumbelQuantizer(FastGumbelQuantizer):
    """Codes by their indices, not by products with one-hot vectors."""

    def forward(self, hidden_states: Tensor, mask_time_indices: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As without a mask; (B, T) bool says which frames the perplexity is of."""
        return self._quantize(hidden_states, mask_time_indices)


def _mean_of_rows(chances: Tensor, mask: Tensor | None) -> Tensor:
    """The mean (G, K) of chances (N, G, K) over the rows that take part."""
    if mask is None:
        return chances.mean(dim=0)
    return torch.where(mask.flatten()[:, None, None], chances, 0).sum(dim=0) / mask.sum()


def _shares(indices: Tensor, size: int, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The share (G, K) of each code in indices (N, G): the mean of their one-hot vectors, from exact counts."""
    rows, groups = indices.shape
    places = indices + size * torch.arange(groups, device=indices.device)
    weights = indices.new_ones(rows) if mask is None else mask.flatten()
    counts = torch.zeros(groups * size, device=indices.device)
    counts.index_add_(0, places.flatten(), weights.float().repeat_interleave(groups))
    if mask is None:
        return (counts / rows).to(dtype).view(groups, size)
    return (counts.to(dtype) / mask.sum()).view(groups, size)


def _client(
    model: str, name: str, fast: type[FastModule], digests: tuple[str, ...], uses: tuple[str, ...] = ()
) -> Client:
    return Client(f"transformers.models.{model}.modeling_{model}.{name}", fast, digests, uses)


CLIENTS = by_path(
    [
        _client("encodec", "EncodecEuclideanCodebook", FastCodebook, ("7d51ebb5e14e1417",)),
        _client(
            "encodec",
            "EncodecResidualVectorQuantizer",
            FastResidualQuantizer,
            ("b70f108d1658b1b8",),
            ("EncodecVectorQuantization", "EncodecEuclideanCodebook"),
        ),
        _client("xcodec", "XcodecEuclideanCodebook", FastCodebook, ("70f01339f98e3983",)),
        _client(
            "xcodec",
            "XcodecResidualVectorQuantization",
            FastXcodecQuantizer,
            ("c7b5e76408c7cf92",),
            ("XcodecVectorQuantization", "XcodecEuclideanCodebook"),
        ),
        _client(
            "higgs_audio_v2_tokenizer", "HiggsAudioV2TokenizerEuclideanCodebook", FastCodebook, ("060f67ec5ce5ab5f",)
        ),
        _client("mimi", "MimiEuclideanCodebook", FastCodebook, ("84fd065434d63edb",)),
        _client(
            "mimi",
            "MimiResidualVectorQuantizer",
            FastMimiQuantizer,
            ("409480ddc0316448",),
            ("MimiVectorQuantization", "MimiEuclideanCodebook"),
        ),
        _client("dac", "DacVectorQuantize", FastDacQuantizer, ("aaa250e11673d493",)),
        _client("chameleon", "ChameleonVQVAEVectorQuantizer", FastImageQuantizer, ("3a1f1f6209fdbb69",)),
        _client("janus", "JanusVQVAEVectorQuantizer", FastImageQuantizer, ("0e7d6df8bc0e840b",)),
        _client("glm_image", "GlmImageVQVAEVectorQuantizer", FastGlmImageQuantizer, ("23472e58ae16b0fa",)),
        _client("emu3", "Emu3VQVAEVectorQuantizer", FastEmu3Quantizer, ("4aa14c612707f0f4",)),
        _client("wav2vec2", "Wav2Vec2GumbelVectorQuantizer", FastMaskedGumbelQuantizer, ("8e87dfa541d51df4",)),
        _client(
            "wav2vec2_conformer",
            "Wav2Vec2ConformerGumbelVectorQuantizer",
            FastMaskedGumbelQuantizer,
            ("f0f2688b2a88ea36",),
        ),
        _client("wavlm", "WavLMGumbelVectorQuantizer", FastGumbelQuantizer, ("013be58be2728a6e",)),
        _client("unispeech", "UniSpeechGumbelVectorQuantizer", FastGumbelQuantizer, ("9a09a7d0ebd06742",)),
        _client("unispeech_sat", "UniSpeechSatGumbelVectorQuantizer", FastGumbelQuantizer, ("2211f1ee37371040",)),
    ]
)


def register() -> tuple[str, ...]:
    """Have transformers itself make patched models: in `from_pretrained`, `from_config`, AutoModel, `apply_patches`.

    Models that exist stay as they are (see `fastvq.patch`), and so do those made by a bare constructor.

    Returns:
        The names of the classes that are replaced; those that differ from what fastvq knows are left out.

    Raises:
        ImportError: this version of transformers has no patch mapping.
    """
    from transformers.monkey_patching import register_patch_mapping

    mapping: dict[str, type[nn.Module]] = {}
    for client in CLIENTS.values():
        with contextlib.suppress(ImportError):  # of a model that needs a package that is not there
            module = importlib.import_module(client.path.rpartition(".")[0])
            if differs(client) is not None:
                continue
            mapping[_pattern(client)] = fast_class(getattr(module, client.names[0]))
    register_patch_mapping(mapping, overwrite=True)
    return tuple(pattern.strip("^$") for pattern in mapping)


def unregister() -> None:
    """Undo `register`: models made from now on are the client's own."""
    from transformers.monkey_patching import get_patch_mapping, unregister_patch_mapping

    unregister_patch_mapping([p for p in map(_pattern, CLIENTS.values()) if p in get_patch_mapping()])


def _pattern(client: Client) -> str:
    """transformers takes a name for a pattern too, which would find longer names: this finds one."""
    return f"^{client.names[0]}$"
