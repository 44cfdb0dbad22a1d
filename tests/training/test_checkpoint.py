"""Checkpoints: whatever happens while one is written, the last good one is there."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fastvq.training import CheckpointError, load_model, train
from fastvq.training import checkpoint as checkpoints
from fastvq.training.checkpoint import Checkpoint


def checkpoint(settings, step: int) -> Checkpoint:
    tensors = {"weight": torch.full((3,), float(step)), "scalar": torch.tensor(step), "none": torch.empty(0)}
    return Checkpoint(step, settings, tensors, {"generator": torch.arange(8, dtype=torch.uint8)}, [{"lr": 1e-3}])


def test_what_is_saved_is_loaded(tmp_path, settings):
    before = checkpoint(settings, 7)
    folder = checkpoints.save(tmp_path, before)
    after = checkpoints.load(tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint.json", "model.safetensors", "training.safetensors"]
    assert (after.step, after.settings, after.groups) == (7, settings, [{"lr": 1e-3}])
    for one, other in ((before.model, after.model), (before.training, after.training)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


def test_the_last_two_stay(tmp_path, settings):
    for step in (0, 5, 90, 100):
        checkpoints.save(tmp_path, checkpoint(settings, step))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000090", "step-00000100"]
    assert checkpoints.load(tmp_path).step == 100


class CrashError(Exception):
    pass


OPERATIONS = [(Path, "mkdir"), (Path, "write_text"), (Path, "rename"), (checkpoints, "sync"), (checkpoints, "_sha256")]


@pytest.mark.parametrize(("owner", "name"), OPERATIONS, ids=[name for _, name in OPERATIONS])
@pytest.mark.parametrize("survived", range(5))
def test_a_crash_at_any_point_leaves_a_good_checkpoint(tmp_path, settings, monkeypatch, owner, name, survived):
    """Each operation in turn fails, at its first call, its second, ..."""
    checkpoints.save(tmp_path, checkpoint(settings, 4))
    real, calls = getattr(owner, name), []

    def failing(*arguments, **options):
        calls.append(arguments)
        if len(calls) > survived:
            raise CrashError
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, failing)
    crashed = False
    try:
        checkpoints.save(tmp_path, checkpoint(settings, 8))
    except CrashError:
        crashed = True
    monkeypatch.undo()
    found = checkpoints.load(tmp_path)
    # Once renamed the new one counts, even if the crash came right after.
    assert found.step in ((4, 8) if crashed else (8,))
    assert torch.equal(found.model["weight"], torch.full((3,), float(found.step)))
    # And the next attempt goes through, over what the crash has left.
    checkpoints.save(tmp_path, checkpoint(settings, 8))
    assert checkpoints.load(tmp_path).step == 8
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")]


def test_a_crash_between_the_two_tensor_files_leaves_a_good_checkpoint(tmp_path, settings, monkeypatch):
    import safetensors.torch

    checkpoints.save(tmp_path, checkpoint(settings, 4))
    real = safetensors.torch.save_file

    def failing(tensors, path):
        if path.name == "training.safetensors":
            path.write_bytes(b"half")
            raise CrashError
        real(tensors, path)

    monkeypatch.setattr(safetensors.torch, "save_file", failing)
    with pytest.raises(CrashError):
        checkpoints.save(tmp_path, checkpoint(settings, 8))
    assert checkpoints.load(tmp_path).step == 4


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found(tmp_path, settings, name, damage):
    path = checkpoints.save(tmp_path, checkpoint(settings, 4)) / name
    content = bytearray(path.read_bytes())
    # In the JSON, a digit of the format's version.
    position = content.index(b"1") if name == "checkpoint.json" else len(content) - 2
    content[position] ^= 2
    {
        "flip": lambda: path.write_bytes(content),
        "truncate": lambda: path.write_bytes(content[: len(content) // 2]),
        "remove": path.unlink,
    }[damage]()
    with pytest.raises(CheckpointError, match=r"damaged|format") as caught:
        checkpoints.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "{}", '"x"', '{"format": 1, "step": 1}'])
def test_foreign_json_is_refused(tmp_path, settings, text):
    folder = checkpoints.save(tmp_path, checkpoint(settings, 4))
    (folder / "checkpoint.json").write_text(text)
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoints.load(tmp_path)


def test_missing_runs_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        checkpoints.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoints.load(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path, settings, images):
    train(tmp_path / "run", settings, images, 1)
    path = next((tmp_path / "run" / "checkpoints").glob("step-*1")) / "checkpoint.json"
    index = json.loads(path.read_text())
    index["settings"]["model"]["hidden"] = [6, 9]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="of another model"):
        load_model(tmp_path / "run")


def test_a_run_can_start_over_what_a_crash_before_its_first_checkpoint_left(tmp_path, settings, images):
    run = tmp_path / "run"
    (run / "checkpoints" / ".step-00000000.partial").mkdir(parents=True)
    assert train(run, settings, images, 1).step == 1
    assert not checkpoints.is_free(run)
    shutil.rmtree(run)
    run.mkdir()
    assert checkpoints.is_free(run)
    (run / "thesis.txt").touch()
    assert not checkpoints.is_free(run)


def test_nothing_is_pickled(tmp_path, settings, images):
    run = tmp_path / "run"
    train(run, settings, images, 4)
    names = {p.name for p in run.rglob("*") if p.is_file() and "tfevents" not in p.name}
    assert names == {"checkpoint.json", "model.safetensors", "training.safetensors", "metrics.csv"}
