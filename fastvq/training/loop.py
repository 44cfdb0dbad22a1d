"""The training loop."""

from __future__ import annotations

import importlib
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.data import CropBatches, Images
from fastvq.models import VQVAE
from fastvq.training import checkpoint as checkpoints
from fastvq.training.backend import check_backend
from fastvq.training.checkpoint import Checkpoint, CheckpointError
from fastvq.training.interrupt import stop_requested
from fastvq.training.log import MetricsLog, Row
from fastvq.training.metrics import CodebookUse, code_counts
from fastvq.training.settings import TrainSettings

PACKAGES = ("safetensors.torch", "torch.utils.tensorboard", "tqdm")  # imported where they are used
HELD_OUT_CROPS = 64  # for the curve; `evaluate` judges on whole images
SHOWN_CROPS = 8


@dataclass(frozen=True)
class TrainResult:
    """Where the training came to.

    Attributes:
        step: optimiser steps taken, in all sessions of the run.
        interrupted: Ctrl-C stopped it before its last step.
        checkpoint: the folder of the checkpoint at that step.
    """

    step: int
    interrupted: bool
    checkpoint: Path


@dataclass
class Trainer:
    """All that changes while a run trains, and what it learns from."""

    settings: TrainSettings
    model: VQVAE
    optimizer: torch.optim.Adam
    batches: CropBatches
    device: torch.device
    step: int = 0

    @classmethod
    def fresh(cls, settings: TrainSettings, images: Images, device: torch.device) -> Trainer:
        """A run before its first step; the global generator is seeded."""
        torch.manual_seed(settings.seed)
        model = VQVAE(settings.model).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
        channels = settings.model.in_channels
        batches = CropBatches(images.train, settings.crop, channels, settings.batch_size, settings.seed)
        return cls(settings, model, optimizer, batches, device)

    def train_step(self) -> tuple[Tensor, Tensor, Tensor]:
        """One step: the loss (), the reconstruction error (), and the counts of the codes (K,)."""
        images = next(self.batches).to(self.device)
        output = self.model(images)
        self.optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        self.optimizer.step()
        self.step += 1
        mse = F.mse_loss(output.reconstruction.detach(), images)
        return output.loss.detach(), mse, code_counts(output.indices, self.settings.model.codebook_size)

    def checkpoint(self) -> Checkpoint:
        """The run as it stands."""
        state = self.optimizer.state_dict()
        tensors = {
            f"optimizer.{index}.{name}": value
            for index, values in state["state"].items()
            for name, value in values.items()
        }
        tensors |= {"generator.batches": self.batches.state, "generator.torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["generator.cuda"] = torch.cuda.get_rng_state(self.device)
        return Checkpoint(self.step, self.settings, self.model.state_dict(), tensors, state["param_groups"])

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint, as if the run had never stopped.

        Raises:
            CheckpointError: the checkpoint is of another model.
        """
        checkpoints.restore(self.model, checkpoint)
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in checkpoint.training.items():
            kind, index, *name = key.split(".", 2)
            if kind == "optimizer":
                state.setdefault(int(index), {})[name[0]] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": checkpoint.groups})
        self.batches.state = checkpoint.training["generator.batches"]
        torch.set_rng_state(checkpoint.training["generator.torch"])
        if self.device.type == "cuda" and "generator.cuda" in checkpoint.training:
            torch.cuda.set_rng_state(checkpoint.training["generator.cuda"], self.device)
        self.step = checkpoint.step


class Window:
    """Sums over the steps since the last row of metrics; nothing waits for the device until it is read."""

    def __init__(self) -> None:
        self._steps = 0
        self._seconds = 0.0
        self._loss: Tensor | float = 0.0
        self._mse: Tensor | float = 0.0
        self._counts: Tensor | int = 0

    def add(self, loss: Tensor, mse: Tensor, counts: Tensor, seconds: float) -> None:
        """Add one step."""
        self._steps += 1
        self._seconds += seconds
        self._loss, self._mse, self._counts = self._loss + loss, self._mse + mse, self._counts + counts

    def row(self, step: int, batch_size: int, held_out_mse: float, held_out: CodebookUse) -> Row:
        """The row of metrics."""
        train = CodebookUse.of(torch.as_tensor(self._counts))
        return Row(
            step=step,
            images_per_second=self._steps * batch_size / self._seconds,
            train_loss=float(self._loss) / self._steps,
            train_mse=float(self._mse) / self._steps,
            train_perplexity=train.perplexity,
            train_usage=train.usage,
            dead_codes=train.dead,
            held_out_mse=held_out_mse,
            held_out_perplexity=held_out.perplexity,
            held_out_usage=held_out.usage,
        )


def train(
    run: Path,
    settings: TrainSettings,
    images: Images,
    steps: int,
    *,
    resume: bool = False,
    device: torch.device | str = "cpu",
) -> TrainResult:
    """Train to `steps` steps in all, with a progress bar, metrics and checkpoints in the folder `run`.

    With `resume` the run goes on from its newest checkpoint: on the CPU, with as many threads, bit for bit as if it
    had not stopped. Ctrl-C saves and returns; the caller's global generator is left as it was.

    Raises:
        CheckpointError: the run exists (without `resume`), does not exist (with it), is damaged, or has other settings.
        UserError: the backend asked for in the environment does not exist.
        BackendUnavailableError: it cannot serve here.
        ModuleNotFoundError: a package of the extra "train" is missing. Like the others: before anything is written.
    """
    device = torch.device(device)
    check_backend(device)
    for name in PACKAGES:
        importlib.import_module(name)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), stop_requested() as stop:
        trainer = Trainer.fresh(settings, images, device)
        if resume:
            saved = checkpoints.load(run)
            if saved.settings != settings:
                raise CheckpointError(f"run {run} was started with other settings: {saved.settings}")
            trainer.restore(saved)
        elif not checkpoints.is_free(run):
            raise CheckpointError(f"run {run} exists and is not an empty folder; resume it, or choose another")
        # The checkpoint of step 0 comes first: a run that has begun can always be resumed.
        checkpoints.save(run, trainer.checkpoint())
        channels = settings.model.in_channels
        held_out = next(CropBatches(images.held_out, settings.crop, channels, HELD_OUT_CROPS, seed=0)).to(device)
        with MetricsLog(run, trainer.step) as log:
            _loop(trainer, run, steps, held_out, log, stop)
        folder = checkpoints.save(run, trainer.checkpoint())
    return TrainResult(trainer.step, trainer.step < steps, folder)


def _loop(trainer: Trainer, run: Path, steps: int, held_out: Tensor, log: MetricsLog, stop: threading.Event) -> None:
    from tqdm import tqdm

    settings, window = trainer.settings, Window()
    bar = tqdm(
        total=steps * settings.batch_size,
        initial=trainer.step * settings.batch_size,
        unit=" images",
        unit_scale=True,
        # A file or a pipe gets a line now and then.
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        dynamic_ncols=True,
    )
    with bar:
        while trainer.step < steps and not stop.is_set():
            start = time.perf_counter()
            loss, mse, counts = trainer.train_step()
            window.add(loss, mse, counts, time.perf_counter() - start)
            bar.update(settings.batch_size)
            if trainer.step % settings.log_every == 0 or trainer.step == steps:
                row = window.row(trainer.step, settings.batch_size, *_held_out(trainer.model, held_out))
                log.add(row)
                bar.set_postfix_str(
                    f"mse {row.train_mse:.5f}, held out {row.held_out_mse:.5f}, "
                    f"perplexity {row.train_perplexity:.0f}, dead {row.dead_codes}"
                )
                window = Window()
            if trainer.step % settings.save_every == 0 or trainer.step == steps:
                checkpoints.save(run, trainer.checkpoint())
                log.add_images(
                    held_out[:SHOWN_CROPS], _reconstruct(trainer.model, held_out[:SHOWN_CROPS]), trainer.step
                )


def _held_out(model: VQVAE, images: Tensor) -> tuple[float, CodebookUse]:
    indices = model.encode(images)
    mse = float(F.mse_loss(model.decode(indices, (images.shape[-2], images.shape[-1])), images))
    return mse, CodebookUse.of(code_counts(indices, model.config.codebook_size))


def _reconstruct(model: VQVAE, images: Tensor) -> Tensor:
    return model.decode(model.encode(images), (images.shape[-2], images.shape[-1]))
