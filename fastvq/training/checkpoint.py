"""Checkpoints: a folder a step, written beside and renamed, so that a crash at any point leaves the last good one.

RUN/checkpoints/step-00000500/model.safetensors     the weights and the codebook, with its moving averages
RUN/checkpoints/step-00000500/training.safetensors  the optimiser and the random generators
RUN/checkpoints/step-00000500/checkpoint.json       step, settings, SHA-256 of the two files above
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvq.data.atomic import sync
from fastvq.data.errors import UserError
from fastvq.models import VQVAE
from fastvq.training.backend import check_backend
from fastvq.training.settings import TrainSettings

FORMAT = 1
KEPT = 2  # checkpoints that stay; older ones are removed

_MODEL, _TRAINING, _INDEX = "model.safetensors", "training.safetensors", "checkpoint.json"
_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(UserError):
    """A run that is missing, already there, or damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """A run at one step.

    Attributes:
        step: optimiser steps taken.
        settings: of the run.
        model: the state of the model, by name.
        training: the tensors of the optimiser and the generators, by name.
        groups: the optimiser's parameter groups, without tensors.
    """

    step: int
    settings: TrainSettings
    model: Mapping[str, Tensor]
    training: Mapping[str, Tensor]
    groups: list[dict[str, Any]]


def save(run: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint, unless that step has one, and remove all but the last two; returns its folder."""
    from safetensors.torch import save_file

    root = run / "checkpoints"
    final = root / f"step-{checkpoint.step:08d}"
    if final.exists():
        return final
    root.mkdir(parents=True, exist_ok=True)
    partial = root / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name, tensors in ((_MODEL, checkpoint.model), (_TRAINING, checkpoint.training)):
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, partial / name)
    index = {
        "format": FORMAT,
        "step": checkpoint.step,
        "settings": checkpoint.settings.to_dict(),
        "optimizer": checkpoint.groups,
        "sha256": {name: _sha256(partial / name) for name in (_MODEL, _TRAINING)},
    }
    (partial / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for path in (*partial.iterdir(), partial):
        sync(path)
    partial.rename(final)
    sync(root)
    for old in _folders(run)[:-KEPT]:
        shutil.rmtree(old)
    return final


def load(run: Path) -> Checkpoint:
    """The newest checkpoint of a run.

    Raises:
        CheckpointError: the run has none, or it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folders = _folders(run)
    if not folders:
        raise CheckpointError(f"run {run} {'holds no checkpoint' if run.exists() else 'does not exist'}")
    newest = folders[-1]
    try:
        index = json.loads((newest / _INDEX).read_text())
        if index["format"] != FORMAT:
            raise CheckpointError(f"checkpoint {newest} has format {index['format']}; this fastvq reads {FORMAT}")
        for name, digest in index["sha256"].items():
            if _sha256(newest / name) != digest:
                raise CheckpointError(f"checkpoint {newest} is damaged: {name} is not the file that was saved")
        return Checkpoint(
            step=index["step"],
            settings=TrainSettings.from_dict(index["settings"]),
            model=load_file(newest / _MODEL),
            training=load_file(newest / _TRAINING),
            groups=index["optimizer"],
        )
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {newest} is damaged: {' '.join(str(error).split())}") from error


def exists(run: Path) -> bool:
    """Whether the run has a checkpoint."""
    return bool(_folders(run))


def is_free(run: Path) -> bool:
    """Whether a run can start here: nothing is there, or what a crash before the first checkpoint has left."""
    if not run.exists():
        return True
    return run.is_dir() and not exists(run) and all(path.name == "checkpoints" for path in run.iterdir())


def load_model(run: Path, device: torch.device | str = "cpu") -> tuple[VQVAE, TrainSettings]:
    """The newest model of a run, ready to encode and decode, and the settings of the run.

    Raises:
        CheckpointError: the run has no checkpoint, or it is damaged.
        UserError, BackendUnavailableError: the backend asked for in the environment cannot serve.
    """
    check_backend(torch.device(device))
    checkpoint = load(run)
    model = VQVAE(checkpoint.settings.model)
    restore(model, checkpoint)
    return model.to(device).eval(), checkpoint.settings


def restore(model: VQVAE, checkpoint: Checkpoint) -> None:
    """Give the model its state.

    Raises:
        CheckpointError: the state is of another model.
    """
    try:
        model.load_state_dict(dict(checkpoint.model))
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint is of another model: {' '.join(str(error).split())}") from error


def _folders(run: Path) -> list[Path]:
    root = run / "checkpoints"
    return sorted(p for p in root.iterdir() if _NAME.fullmatch(p.name)) if root.is_dir() else []


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
