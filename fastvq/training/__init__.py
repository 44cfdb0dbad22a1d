"""Training the reference VQ-VAE: the loop, its checkpoints, and what is measured."""

from fastvq.training.checkpoint import CheckpointError, load_model
from fastvq.training.evaluation import Evaluation, evaluate
from fastvq.training.loop import TrainResult, train
from fastvq.training.settings import TrainSettings

__all__ = ["CheckpointError", "Evaluation", "TrainResult", "TrainSettings", "evaluate", "load_model", "train"]
