"""Autotuning: only when asked for, the fastest choice that the device takes, kept on disk for the next process."""

import itertools
import json

import pytest
import torch
from fastvq.kernels import autotune, search
from fastvq.kernels.launch import DEVICES, INTERPRETER

H100 = DEVICES["sm_90"]
CHOICES = ((1, 2), (3, 4), (5, 6))


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVQ_CACHE", str(tmp_path))
    monkeypatch.setattr(autotune, "_found", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.fixture
def asked(monkeypatch):
    """The choices that were timed; each takes what it adds up to, but the device refuses the last."""
    calls = []

    def milliseconds(call):
        choice = call()
        calls.append(choice)
        if choice == CHOICES[-1]:
            raise autotune.triton.runtime.errors.OutOfResources(1, 0, "shared memory")
        return -sum(choice)

    monkeypatch.setattr(autotune, "_milliseconds", milliseconds)
    return calls


def pick(device=H100, what="a search"):
    return autotune.fastest(device, what, CHOICES, lambda choice: choice)


def test_the_fastest_is_found_once_and_kept(asked, monkeypatch):
    assert pick() == (3, 4)
    assert asked == list(CHOICES)
    assert pick() == (3, 4)
    monkeypatch.setattr(autotune, "_found", {})  # as in another process
    assert pick() == (3, 4)
    assert len(asked) == 3
    assert pick(what="another search") == (3, 4)
    assert len(asked) == 6
    assert len(json.loads(autotune.cache_file().read_text())) == 2
    assert [path.name for path in autotune.cache_file().parent.iterdir()] == ["autotune.json"]


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_damaged_file_is_made_anew(asked, text):
    autotune.cache_file().write_text(text)
    assert pick() == (3, 4)
    assert list(json.loads(autotune.cache_file().read_text()).values()) == [[3, 4]]


def test_a_kept_choice_that_is_none_any_more_is_timed_again(asked):
    pick()
    kept = json.loads(autotune.cache_file().read_text())
    autotune.cache_file().write_text(json.dumps({key: [9, 9] for key in kept}))
    autotune._found.clear()
    assert pick() == (3, 4)
    assert len(asked) == 6


def test_a_folder_that_cannot_be_written_keeps_nothing(asked, monkeypatch):
    monkeypatch.setenv("FASTVQ_CACHE", "/proc/nowhere")
    assert pick() == (3, 4)


def test_nothing_is_timed_in_the_interpreter_or_while_a_graph_is_captured(asked, monkeypatch):
    assert pick(INTERPRETER) == CHOICES[0]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert pick() == CHOICES[0]
    assert asked == []


def test_search_asks_only_when_the_user_does(monkeypatch):
    x, codebook = torch.randn(5, 4), torch.randn(9, 4)
    monkeypatch.setattr(autotune, "fastest", lambda *rest: pytest.fail("not asked for"))
    wanted, _ = search.search(x, codebook, "euclidean", False)
    monkeypatch.setenv("FASTVQ_AUTOTUNE", "1")
    seen = []
    monkeypatch.setattr(autotune, "fastest", lambda device, what, choices, run: seen.append(what) or choices[0])
    assert torch.equal(search.search(x, codebook, "euclidean", False)[0], wanted)
    assert seen == ["screen, N to 8, K to 16, D to 16, rounded rows"]


def test_every_choice_fits_the_device_and_the_usual_one_comes_first():
    for device in DEVICES.values():
        for k in (64, 1024, 65_536):
            for width, raw in itertools.product((16, 64, 256, 384), (False, True)):
                choices = search.choices_for(device, k, width, raw)
                assert choices[0] == search.tiles_for(device, k, width, raw)
                assert len(set(choices)) == len(choices) > 1
                assert all(search.shared_memory(device, tiles, width) <= device.shared_memory for tiles in choices)
