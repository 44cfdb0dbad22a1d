"""Other libraries' models before and after `fastvq.patch`: the time in the quantiser, and of the whole encoding.

`python -m benchmarks.bench_clients [TITLE...]` builds each model from its published configuration with random weights,
compares the codes, has both take turns, and writes benchmarks/results/clients.csv and the table in docs/migration.md;
what else was measured stays there. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastvq
from fastvq.measure.agreement import Agreement, compare_codes, compare_stages
from fastvq.measure.table import fill_table, machine, machine_line, read_csv, write_csv
from fastvq.measure.timing import Work, interleave, percentile

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "clients.csv", ROOT / "docs" / "migration.md"


@dataclass
class Case:
    """A model of a client, and what of it is measured."""

    package: str
    model: nn.Module
    encode: Callable[[Any], Any]  # of the model, as its users call it
    quantiser: str  # the module, by its name, and the method that does all of the quantiser's work
    method: str
    compare: Callable[[Any, Any, Any, Any], Agreement]  # the client's quantiser, its arguments, its result and ours
    fill: Callable[[Any, Any], None] = lambda quantiser, arguments: None  # gives codes to one that has none yet
    whole: bool = True  # whether there is more to encoding, which is timed too


class CpuWork(Work):
    """Timed by the processor time of this process: for one thread on a busy machine, where the wall's means nothing."""

    def once(self) -> float:
        start = time.process_time()
        self.call()
        return (time.process_time() - start) * 1e3


@contextlib.contextmanager
def recorded(module: nn.Module, method: str) -> Iterator[list[tuple[Any, ...]]]:
    """The arguments of each call of a method."""
    calls: list[tuple[Any, ...]] = []
    original = getattr(module, method)

    def recording(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    vars(module)[method] = recording
    try:
        yield calls
    finally:
        del vars(module)[method]


def fill_stages(latents: Tensor, codebooks: Sequence[Tensor]) -> None:
    """Codes for a residual quantiser whose configuration leaves them zero: as long as serves the residuals best.

    The best of K random directions in D dimensions has a cosine of about sqrt(2 log K / D) to a row.
    """
    rows = latents.transpose(1, 2).flatten(0, 1)
    for codes in codebooks:
        size, width = codes.shape
        codes.normal_().mul_(rows.std() * min(1.0, math.sqrt(2 * math.log(size) / width)))
        rows = rows - codes[fastvq.search(rows, codes)]


def codebooks_of(quantiser: Any) -> list[Tensor]:
    """The codes of each stage of EnCodec's and X-Codec's residual quantisers."""
    return [stage.codebook.embed for stage in getattr(quantiser, "layers", None) or quantiser.quantizers]


def fill(quantiser: Any, arguments: Any) -> None:
    fill_stages(arguments[0][0], codebooks_of(quantiser))


def stages_agree(quantiser: Any, arguments: Any, theirs: Tensor, ours: Tensor) -> Agreement:
    """Compare the codes (Q, B, T) of latents (B, D, T)."""
    rows = arguments[0][0].transpose(1, 2).flatten(0, 1)
    return compare_stages(rows, codebooks_of(quantiser)[: len(theirs)], theirs.flatten(1), ours.flatten(1))


def fill_image(quantiser: Any, arguments: Any) -> None:
    """Codes as long as the latents, for an image quantiser of random weights."""
    nn.init.normal_(quantiser.embedding.weight, std=float(arguments[0][0].std()))


def fill_higgs(quantiser: Any, arguments: Any) -> None:
    residual = arguments[0][0]
    for stage in quantiser.quantizers:
        fill_stages(stage.project_in(residual.transpose(1, 2)).transpose(1, 2), [stage.codebook.embed])
        residual = residual - stage.decode(stage.encode(residual))


def higgs_agrees(quantiser: Any, arguments: Any, theirs: Tensor, ours: Tensor) -> Agreement:
    """Compare the codes (Q, B, T), each stage on the client's own residual: it projects every one by itself."""
    residual, total = arguments[0][0], Agreement(0, 0, 0)
    after = copy.deepcopy(quantiser)
    fastvq.patch(after)
    for stage, fast, codes in zip(quantiser.quantizers, after.quantizers, theirs, strict=True):
        rows = stage.project_in(residual.transpose(1, 2)).flatten(0, 1)
        total += compare_codes(rows, stage.codebook.embed, codes.flatten(), fast.encode(residual).flatten())
        residual = residual - stage.decode(codes)
    return total


def mimi_parts(quantiser: Any) -> tuple[Any, Any]:
    return quantiser.semantic_residual_vector_quantizer, quantiser.acoustic_residual_vector_quantizer


def fill_mimi(quantiser: Any, arguments: Any) -> None:
    for part in mimi_parts(quantiser):
        fill_stages(part.input_proj(arguments[0][0]), [stage.codebook.embed_sum for stage in part.layers])
        for stage in part.layers:
            stage.codebook._embed = None  # made of zeros


def mimi_agrees(quantiser: Any, arguments: Any, theirs: Tensor, ours: Tensor) -> Agreement:
    """Compare Mimi's codes, the semantic and the acoustic ones each with their own latents."""
    total, first = Agreement(0, 0, 0), 0
    for part in mimi_parts(quantiser):
        levels = slice(first, first + len(part.layers))
        latents = ((part.input_proj(arguments[0][0]),), {})
        total += stages_agree(part, latents, theirs[levels], ours[levels])
        first += len(part.layers)
    return total


def images_agree(normalised: bool = False) -> Callable[..., Agreement]:
    """Compare the indices of an image quantiser."""

    def compare(before: Any, arguments: Any, theirs: Any, ours: Any) -> Agreement:
        latents = arguments[0][0]
        channels = latents.dim() - 3
        rows, codebook = latents.movedim(channels, -1).flatten(0, -2), before.embedding.weight
        if normalised:
            rows, codebook = functional.normalize(rows, dim=-1), functional.normalize(codebook, dim=-1)
        return compare_codes(rows, codebook, *(_indices(r).flatten() for r in (theirs, ours)))

    return compare


def _indices(result: Any) -> Tensor:
    while not isinstance(result, Tensor):
        result = result[-1]
    return result


def projected_stages_agree(before: Any, arguments: Any, theirs: Any, ours: Any) -> Agreement:
    """Compare a quantiser of the DAC family stage by stage, each on the client's own residual."""
    total = Agreement(0, 0, 0)
    after = copy.deepcopy(before)
    fastvq.patch(after)
    with contextlib.ExitStack() as stack:
        calls = [stack.enter_context(recorded(stage, "decode_latents")) for stage in before.quantizers]
        before(*arguments[0], **arguments[1])
    for stage, fast, (((latents,), _),) in zip(before.quantizers, after.quantizers, calls, strict=True):
        rows = functional.normalize(latents.transpose(1, 2).flatten(0, 1))
        codebook = functional.normalize(stage.codebook.weight)
        codes = (m.decode_latents(latents)[1].flatten() for m in (stage, fast))
        total += compare_codes(rows, codebook, *codes)
    return total


def choices_agree(before: Any, arguments: Any, theirs: Any, ours: Any) -> Agreement:
    """Compare the code vectors of a Gumbel quantiser: a choice is the same or it is wrong, as its logits are."""
    different = int((theirs[0] != ours[0]).any(-1).sum())
    return Agreement(theirs[0].shape[:-1].numel(), different, different)


# ---- the models -------------------------------------------------------------------------------------------------


def encodec() -> Case:
    transformers = importlib.import_module("transformers")
    audio = torch.randn(1, 1, 240000) * 0.1
    model = transformers.EncodecModel(transformers.EncodecConfig())
    return Case(
        "transformers", model, lambda m: m.encode(audio, bandwidth=24.0), "quantizer", "encode", stages_agree, fill
    )


def mimi() -> Case:
    transformers = importlib.import_module("transformers")
    audio = torch.randn(1, 1, 240000) * 0.1
    model = transformers.MimiModel(transformers.MimiConfig())
    return Case("transformers", model, lambda m: m.encode(audio), "quantizer", "encode", mimi_agrees, fill_mimi)


def xcodec() -> Case:
    transformers = importlib.import_module("transformers")
    audio = torch.randn(1, 1, 160000) * 0.1
    model = transformers.XcodecModel(transformers.XcodecConfig())
    return Case("transformers", model, lambda m: m.encode(audio), "quantizer", "encode", stages_agree, fill)


def dac() -> Case:
    transformers = importlib.import_module("transformers")
    audio = torch.randn(1, 1, 88200) * 0.1
    model = transformers.DacModel(transformers.DacConfig())
    return Case("transformers", model, lambda m: m.encode(audio), "quantizer", "forward", projected_stages_agree)


def snac() -> Case:
    package = importlib.import_module("snac")
    audio = torch.randn(1, 1, 240000) * 0.1
    model = package.SNAC(
        24000,
        48,
        [2, 4, 8, 8],
        decoder_dim=1024,
        decoder_rates=[8, 8, 4, 2],
        attn_window_size=None,
        vq_strides=[4, 2, 1],
    )
    return Case("snac", model, lambda m: m.encode(audio), "quantizer", "forward", projected_stages_agree)


def wav2vec2() -> Case:
    transformers = importlib.import_module("transformers")
    audio = torch.randn(2, 160000) * 0.1
    model = transformers.Wav2Vec2ForPreTraining(transformers.Wav2Vec2Config())
    nn.init.uniform_(model.quantizer.codevectors)
    return Case("transformers", model, lambda m: m(audio), "quantizer", "forward", choices_agree)


def higgs_quantiser() -> Case:
    importlib.import_module("transformers")
    stand_in = ModuleType("torchaudio")  # which the model needs, but not its quantiser
    sys.modules.setdefault("torchaudio", stand_in)
    module = importlib.import_module("transformers.models.higgs_audio_v2_tokenizer.modeling_higgs_audio_v2_tokenizer")
    if sys.modules["torchaudio"] is stand_in:
        del sys.modules["torchaudio"]
    config = SimpleNamespace(codebook_size=1024, codebook_dim=64, hidden_size=1024, num_quantizers=8, frame_rate=25)
    model = nn.Sequential(module.HiggsAudioV2TokenizerResidualVectorQuantization(config))
    latents = torch.randn(1, config.hidden_size, 250)
    return Case("transformers", model, lambda m: m[0].encode(latents), "0", "encode", higgs_agrees, fill_higgs, False)


def _image_tokenizer(
    name: str, model: str, sizes: tuple[int, ...], normalised: bool = False, arguments: dict[str, Any] | None = None
) -> Case:
    """Of transformers, on an image, or what its encoder is given in the place of one."""
    transformers = importlib.import_module("transformers")
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    config = getattr(transformers, f"{name}Config", None) or getattr(module, f"{name}Config")
    image = torch.randn(1, *sizes)
    return Case(
        "transformers",
        getattr(module, name)(config()),
        lambda m: m.encode(image, **(arguments or {})),
        "quantize",
        "forward",
        images_agree(normalised),
        fill_image,
    )


def _vqmodel(pixels: int, **config: Any) -> Case:
    package = importlib.import_module("diffusers")
    image = torch.randn(1, 3, pixels, pixels)
    model = package.VQModel(**config)
    return Case(
        "diffusers",
        model,
        lambda m: m.quantize(m.encode(image).latents),
        "quantize",
        "forward",
        images_agree(),
        fill_image,
    )


F4 = {
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [128, 256, 512],
    "layers_per_block": 2,
    "latent_channels": 3,
    "num_vq_embeddings": 8192,
}
MOVQ = {
    "down_block_types": ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [128, 256, 256, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "num_vq_embeddings": 16384,
    "vq_embed_dim": 4,
    "norm_type": "spatial",
}

CASES: dict[str, Callable[[], Case]] = {
    "EnCodec 24 kHz, 32 stages, 10 s": encodec,
    "Mimi, 32 stages, 10 s": mimi,
    "Wav2Vec2 base, 2 x 10 s": wav2vec2,
    "X-Codec, 8 stages, 10 s": xcodec,
    "DAC 44.1 kHz, 9 stages, 2 s": dac,
    "SNAC 24 kHz, 3 stages, 10 s": snac,
    "Higgs, quantiser alone, 8 stages, 10 s": higgs_quantiser,
    "Chameleon, 256 pixels": lambda: _image_tokenizer("ChameleonVQVAE", "chameleon", (3, 256, 256)),
    "Janus, 384 pixels": lambda: _image_tokenizer("JanusVQVAE", "janus", (3, 384, 384)),
    "Emu3, 128 pixels": lambda: _image_tokenizer(
        "Emu3VQVAE", "emu3", (3, 128, 128), arguments={"image_sizes": torch.tensor([[128, 128]])}
    ),
    "GLM-Image, 32 x 32 features": lambda: _image_tokenizer("GlmImageVQVAE", "glm_image", (1536, 32, 32), True),
    "VQ-f4, 256 pixels": lambda: _vqmodel(256, **F4),
    "MoVQ, 256 pixels": lambda: _vqmodel(256, **MOVQ),
}

# ---- measuring --------------------------------------------------------------------------------------------------


@dataclass
class Patched:
    """A case before and after, with the arguments of its quantiser."""

    case: Case
    before: nn.Module
    after: nn.Module
    arguments: Any

    def quantise(self, model: nn.Module) -> Any:
        """What the quantiser of either model gives."""
        quantiser = model.get_submodule(self.case.quantiser)
        return getattr(quantiser, self.case.method)(*self.arguments[0], **self.arguments[1])

    def agreement(self) -> Agreement:
        """How the codes of the two compare."""
        quantiser = self.before.get_submodule(self.case.quantiser)
        return self.case.compare(quantiser, self.arguments, *map(self.quantise, (self.before, self.after)))


def patched(title: str) -> Patched:
    """The model of a title, with random weights, and a patched copy."""
    torch.manual_seed(0)
    case = CASES[title]()
    before = case.model.eval()
    quantiser = before.get_submodule(case.quantiser)
    with recorded(quantiser, case.method) as calls:
        case.encode(before)
    case.fill(quantiser, calls[0])
    after = copy.deepcopy(before)
    report = fastvq.patch(after)
    if not report.done:
        raise RuntimeError(str(report))
    return Patched(case, before, after, calls[0])


def measure(title: str, thread_counts: Sequence[int], clock: str, encode: bool) -> list[dict[str, Any]]:
    """The rows of one client, before and after: its quantiser, and all of encoding with the first number of threads."""
    timed = CpuWork if clock == "cpu" else Work
    models = patched(title)
    case, before, after, agreement = models.case, models.before, models.after, models.agreement()
    parts = {"quantiser": {"before": lambda: models.quantise(before), "after": lambda: models.quantise(after)}}
    rows = []
    for threads in thread_counts:
        torch.set_num_threads(threads)
        if case.whole and encode and threads == thread_counts[0]:
            parts["encode"] = {"before": lambda: case.encode(before), "after": lambda: case.encode(after)}
        else:
            parts.pop("encode", None)
        for part, works in parts.items():
            turns = {name: timed(work).turn for name, work in works.items()}
            times = interleave(turns, seconds=2, rounds=5 if part == "quantiser" else 2)
            slow = percentile(times["before"], 50)
            for name, values in times.items():
                row = {"client": title, "part": part, "contender": name, "threads": threads, "clock": clock}
                row |= {"calls": len(values)}
                row |= {f"p{p}_ms": round(percentile(values, p), 3) for p in (20, 50, 80)}
                row |= {"ratio": round(slow / percentile(values, 50), 2)}
                row |= {"codes": agreement.codes, "different": agreement.different}
                row |= {"unexplained": agreement.unexplained, "package": case.package}
                rows.append(row | {"version": metadata.version(case.package)} | machine())
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table of documentation, a line for each client and number of threads."""
    lines = [
        "| model | threads | quantiser before | after | faster | encoding before | after | faster | codes differ |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    found = {(r["client"], str(r["threads"]), r["part"], r["contender"]): r for r in rows}
    for client, threads in dict.fromkeys((r["client"], str(r["threads"])) for r in rows):
        cells = [client, threads]
        for part in ("quantiser", "encode"):
            pair = [found.get((client, threads, part, name)) for name in ("before", "after")]
            if pair[0] is None or pair[1] is None:
                cells += ["-"] * 3
            else:
                cells += [f"{float(r['p50_ms']):.4g} ms" for r in pair if r] + [f"{float(pair[1]['ratio']):.3g}"]
        row = next(r for r in rows if r["client"] == client)
        lines.append("| " + " | ".join([*cells, f"{row['different']} of {row['codes']}"]) + " |")
    return "\n".join(lines)


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("client", "part", "threads", "clock"))


def main() -> None:
    """Measure the clients of the given titles, or all; what else was measured stays in the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("titles", nargs="*", help=f"of {', '.join(CASES)}")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1], help="the first for whole encodings too")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: with --threads 1 only")
    parser.add_argument("--no-encode", action="store_true", help="time the quantisers alone")
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != [1]:
        parser.error("--clock cpu needs --threads 1")
    warnings.simplefilter("ignore")
    wrong = 0
    for title in options.titles or CASES:
        with torch.no_grad():
            new = measure(title, options.threads, options.clock, not options.no_encode)
        wrong += new[0]["unexplained"]
        measured = {_key(row) for row in new}
        known = [row for row in read_csv(RESULTS) if row["client"] in CASES] if RESULTS.exists() else []
        others = [row for row in known if _key(row) not in measured]
        write_csv(RESULTS, others + new)
        print(table(new), flush=True)
    rows = read_csv(RESULTS)
    fill_table(PAGE, "python -m benchmarks.bench_clients", f"{table(rows)}\n\n{machine_line(rows)}")
    if wrong:
        raise SystemExit(f"{wrong} codes differ by more than rounding")


if __name__ == "__main__":
    main()
