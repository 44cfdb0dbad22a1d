"""The loop: it learns, it logs, it stops when asked, and it refuses before it writes."""

import csv
import dataclasses
import math
import signal
import threading

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastvq.backends.select import BackendUnavailableError
from fastvq.data import Images, UserError
from fastvq.training import evaluate, load_model, train
from fastvq.training.interrupt import stop_requested
from fastvq.training.log import read_metrics
from fastvq.training.loop import Trainer


@pytest.fixture
def smooth() -> Images:
    """Images with something to learn: a ramp of some colour in some direction."""
    generator = torch.Generator().manual_seed(0)
    across = torch.linspace(0, 1, 32).expand(1, 32, 32)
    ramps = [torch.rand(3, 1, 1, generator=generator) * ramp for ramp in (across, across.mT) for _ in range(6)]
    return Images(ramps[::2], ramps[1::2], held_out_names=[str(i) for i in range(6)], channels=3)


def test_it_learns(tmp_path, settings, smooth):
    settings = dataclasses.replace(settings, batch_size=8, learning_rate=5e-3, log_every=5, save_every=1000)
    train(tmp_path / "run", settings, smooth, 150)
    rows = read_metrics(tmp_path / "run")
    assert rows[-1].held_out_mse < rows[0].held_out_mse / 4
    assert rows[-1].train_mse < rows[0].train_mse / 4
    model, _ = load_model(tmp_path / "run")
    assert evaluate(model, smooth.held_out).mse < rows[0].held_out_mse / 2


def test_metrics_are_in_the_table_and_on_the_board(tmp_path, settings, images):
    run = tmp_path / "run"
    result = train(run, settings, images, 7)
    assert (result.step, result.interrupted, result.checkpoint.name) == (7, False, "step-00000007")
    with (run / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["step"] for row in table] == ["3", "6", "7"]
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    board.Reload()
    tags = {
        "train_mse": "train/mse",
        "train_loss": "train/loss",
        "train_perplexity": "train/perplexity",
        "train_usage": "train/usage",
        "dead_codes": "train/dead_codes",
        "images_per_second": "train/images_per_second",
        "held_out_mse": "held_out/mse",
        "held_out_perplexity": "held_out/perplexity",
        "held_out_usage": "held_out/usage",
    }
    assert set(board.Tags()["scalars"]) == set(tags.values())
    for column, tag in tags.items():
        shown = [event.value for event in board.Scalars(tag)]
        assert shown == pytest.approx([float(row[column]) for row in table], rel=1e-6)
    # Eight crops of 16 pixels, over their reconstructions, at each checkpoint.
    pictures = board.Images("held_out/original_over_reconstruction")
    assert [(p.step, p.width, p.height) for p in pictures] == [(4, 128, 32), (7, 128, 32)]
    for row in read_metrics(run):
        assert 0 < row.images_per_second < math.inf
        assert 1 <= row.train_perplexity <= 32
        assert row.dead_codes == round(32 * (1 - row.train_usage))


def test_train_metrics_are_means_and_sums_over_the_steps(tmp_path, settings, images, monkeypatch):
    seen = []
    real = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self: seen.append(real(self)) or seen[-1])
    train(tmp_path / "run", settings, images, 3)
    (row,) = read_metrics(tmp_path / "run")
    assert row.train_loss == pytest.approx(sum(float(loss) for loss, _, _ in seen) / 3)
    assert row.train_mse == pytest.approx(sum(float(mse) for _, mse, _ in seen) / 3)
    assert row.dead_codes == int((sum(counts for _, _, counts in seen) == 0).sum())


def test_ctrl_c_saves_and_the_run_goes_on(tmp_path, settings, images, monkeypatch):
    run = tmp_path / "run"
    real = Trainer.train_step

    def interrupted(trainer):
        if trainer.step == 2:
            signal.raise_signal(signal.SIGINT)
        return real(trainer)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    result = train(run, settings, images, 20)
    assert (result.step, result.interrupted, result.checkpoint.name) == (3, True, "step-00000003")
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    assert train(run, settings, images, 5, resume=True).step == 5


def test_a_second_ctrl_c_does_not_wait():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        _interrupt_twice()
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt_twice():
    with pytest.raises(KeyboardInterrupt), stop_requested() as stop:  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        signal.raise_signal(signal.SIGINT)


def test_training_works_outside_the_main_thread(tmp_path, settings, images):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(tmp_path / "run", settings, images, 1)))
    thread.start()
    thread.join()
    assert results[0].step == 1


@pytest.mark.parametrize(("name", "error"), [("nonsense", UserError), ("cuda", BackendUnavailableError)])
def test_a_backend_that_cannot_serve_is_refused_before_anything_is_written(
    tmp_path, settings, images, monkeypatch, name, error
):
    monkeypatch.setenv("FASTVQ_BACKEND", name)
    with pytest.raises(error):
        train(tmp_path / "run", settings, images, 1)
    assert not (tmp_path / "run").exists()
