"""What all tests share: the backends they run on, the soak switch, and a clean state around each test."""

import os

import pytest
import torch

# Triton's kernels, its own library's too, become interpreted ones where they are defined: set it before any import.
# With FASTVQ_TEST_DEVICE=cuda, tests/kernels runs on a GPU instead (`make gpu-check` does that).
if os.environ.get("FASTVQ_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.cure()

BACKENDS = ("reference", "cpu")


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="run the tests marked soak too")


def pytest_collection_modifyitems(config, items):
    # For pytest-xdist: a file's tests stay together, and so do those of a folder that compile once for all.
    for item in items:
        folder = item.path.parent
        item.add_marker(pytest.mark.xdist_group(str(folder if folder.name in ("cli", "cuda") else item.path)))
    if config.getoption("--soak"):
        return
    soak = [item for item in items if item.get_closest_marker("soak")]
    config.hook.pytest_deselected(items=soak)
    items[:] = [item for item in items if not item.get_closest_marker("soak")]


@pytest.fixture(params=BACKENDS)
def backend(request, _clean_state):
    """Each backend that this machine must have; a missing one fails the tests."""
    if request.param == "reference":
        torch.set_num_threads(1)  # it goes in steps too small to share
    return request.param


@pytest.fixture(autouse=True)
def _clean_state(monkeypatch):
    monkeypatch.delenv("FASTVQ_BACKEND", raising=False)
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
