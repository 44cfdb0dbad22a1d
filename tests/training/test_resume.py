"""A run that is stopped and resumed ends where one that never stopped does, bit for bit."""

import dataclasses

import pytest
import torch

from fastvq.data import CropBatches
from fastvq.training import CheckpointError, train
from fastvq.training import checkpoint as checkpoints
from fastvq.training.log import read_metrics


def states(run):
    saved = checkpoints.load(run)
    return {**saved.model, **saved.training}, saved.groups


def test_half_and_half_is_the_whole(tmp_path, settings, images):
    # 8 dead codes or more a step: the codebook draws from the global generator all the way.
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, threshold_ema_dead_code=3))
    train(tmp_path / "straight", settings, images, 12)
    torch.rand(1000)  # what another process would have done to the global generator
    train(tmp_path / "halves", settings, images, 6)
    train(tmp_path / "halves", settings, images, 12, resume=True)
    straight, halves = states(tmp_path / "straight"), states(tmp_path / "halves")
    assert straight[1] == halves[1]
    assert straight[0].keys() == halves[0].keys()
    assert {"generator.batches", "generator.torch", "optimizer.0.exp_avg", "quantizer._codebook.embed"} <= halves[
        0
    ].keys()
    for name, tensor in straight[0].items():
        assert torch.equal(tensor, halves[0][name]), name
    first = [dataclasses.replace(row, images_per_second=0.0) for row in read_metrics(tmp_path / "straight")]
    second = [dataclasses.replace(row, images_per_second=0.0) for row in read_metrics(tmp_path / "halves")]
    assert first == second


@pytest.mark.parametrize("forgotten", ["generator.batches", "generator.torch", "optimizer.0.exp_avg"])
def test_each_part_of_the_state_is_needed(tmp_path, settings, images, monkeypatch, forgotten):
    """The comparison above would notice: without this part the run ends elsewhere."""
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, threshold_ema_dead_code=3))
    train(tmp_path / "straight", settings, images, 12)
    train(tmp_path / "halves", settings, images, 6)
    load = checkpoints.load

    def forget(run):
        saved = load(run)
        other = CropBatches(images.train, 16, 3, 4, seed=9).state
        blank = {"generator.batches": other, "generator.torch": other}.get(
            forgotten, torch.zeros_like(saved.training[forgotten])
        )
        return dataclasses.replace(saved, training={**saved.training, forgotten: blank})

    monkeypatch.setattr(checkpoints, "load", forget)
    train(tmp_path / "halves", settings, images, 12, resume=True)
    monkeypatch.undo()
    straight, halves = states(tmp_path / "straight")[0], states(tmp_path / "halves")[0]
    assert not all(torch.equal(straight[name], halves[name]) for name in straight if name.startswith("quantizer"))


def test_the_seed_decides(tmp_path, settings, images):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tmp_path / name, dataclasses.replace(settings, seed=seed), images, 2)
    a, b, c = (checkpoints.load(tmp_path / name).model for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["encoder.0.weight"], c["encoder.0.weight"])


def test_metrics_after_the_checkpoint_are_forgotten(tmp_path, settings, images):
    run = tmp_path / "run"
    train(run, settings, images, 6)
    path = run / "metrics.csv"
    lines = path.read_text().splitlines()
    # What a crash leaves: a row of a step that no checkpoint has, and half a row.
    path.write_text("\n".join([*lines, lines[-1].replace("6,", "9,", 1), "12,3.0"]))
    train(run, settings, images, 7, resume=True)
    assert [row.step for row in read_metrics(run)] == [3, 6, 7]


def test_a_run_is_not_started_twice_nor_resumed_before_it_exists(tmp_path, settings, images):
    run = tmp_path / "run"
    with pytest.raises(CheckpointError, match="does not exist"):
        train(run, settings, images, 2, resume=True)
    assert not run.exists()
    train(run, settings, images, 2)
    with pytest.raises(CheckpointError, match="not an empty folder"):
        train(run, settings, images, 4)
    with pytest.raises(CheckpointError, match="other settings"):
        train(run, dataclasses.replace(settings, seed=1), images, 4, resume=True)
    assert checkpoints.load(run).step == 2


def test_the_callers_generator_is_left_alone(tmp_path, settings, images):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    train(tmp_path / "run", settings, images, 2)
    assert torch.equal(torch.rand(4), expected)
