"""What a run was asked to do: all that decides its result, except how many steps it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fastvq.models import VQVAEConfig


@dataclass(frozen=True)
class TrainSettings:
    """The settings of a training run, saved with its checkpoints.

    Attributes:
        data: what `fastvq.data.load` takes.
        model: the shape of the model.
        crop: height and width of the training crops, in pixels.
        seed: of the weights, the batches and the codebook.
        batch_size: crops a step.
        learning_rate: of Adam, the same at every step, so that a run can be made longer afterwards.
        log_every: steps between two rows of metrics.
        save_every: steps between two checkpoints.
    """

    data: str
    model: VQVAEConfig
    crop: int
    seed: int = 0
    batch_size: int = 16
    learning_rate: float = 1e-3
    log_every: int = 50
    save_every: int = 500

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return asdict(self) | {"model": self.model.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainSettings:
        """The settings that `to_dict` wrote.

        Raises:
            ValueError: a field is unknown, missing or out of its range.
        """
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ValueError(f"TrainSettings has the fields {sorted(names)}; got {sorted(values)}")
        return cls(**{**values, "model": VQVAEConfig.from_dict(values["model"])})
