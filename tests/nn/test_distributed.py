"""Data-parallel training: every process ends each step with the same codebook."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from common import DIM, give_codes
from torch import distributed, multiprocessing

import fastvq

WORLD = 2
CASES: dict[str, dict[str, Any]] = {
    "ema": {},
    "cosine": {"use_cosine_sim": True},
    "k-means": {"kmeans_init": True},
    "dead codes": {"threshold_ema_dead_code": 2.9},
    "k-means, told not to agree": {"kmeans_init": True, "sync_kmeans": False},
    "affine": {"affine_param": True, "sync_affine_param": True, "sync_codebook": True},
    "in place": {
        "learnable_codebook": True,
        "ema_update": False,
        "in_place_codebook_optimizer": partial(torch.optim.SGD, lr=1.0),
    },
    "everything": {"kmeans_init": True, "threshold_ema_dead_code": 3, "heads": 2, "separate_codebook_per_head": True},
}


def train(case: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Three steps on this process's part of the same batches."""
    torch.manual_seed(0)
    layer = fastvq.VectorQuantize(DIM, 11, **(CASES | APART)[case])
    if not (CASES | APART)[case].get("kmeans_init"):
        give_codes(layer)
    torch.manual_seed(1 + rank)
    for seed in range(3):
        batch = torch.randn(40, DIM, generator=torch.Generator().manual_seed(seed))
        layer(batch.chunk(world)[rank])
    return dict(layer.state_dict())


APART: dict[str, dict[str, Any]] = {
    "not synchronised": {"sync_codebook": False},
    "k-means as before": {"kmeans_init": True, "sync_kmeans": False, "strict_compat": True},
}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    torch.save({case: train(case, rank, WORLD) for case in CASES | APART}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    folder: Path = tmp_path_factory.mktemp("distributed")
    multiprocessing.spawn(worker, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES)
def test_the_same_on_every_process(case: str, states: list[dict[str, dict[str, torch.Tensor]]]) -> None:
    for name, value in states[0][case].items():
        assert torch.equal(value, states[1][case][name]), name
        assert value.isfinite().all()


@pytest.mark.parametrize("case", APART)
def test_each_its_own_where_asked_for(case: str, states: list[dict[str, dict[str, torch.Tensor]]]) -> None:
    assert not torch.equal(states[0][case]["_codebook.embed"], states[1][case]["_codebook.embed"])


@pytest.mark.parametrize("case", ["ema", "cosine", "affine", "in place"])
def test_as_one_process_would(case: str, states: list[dict[str, dict[str, torch.Tensor]]]) -> None:
    alone = train(case, 0, 1)
    for name, value in states[0][case].items():
        torch.testing.assert_close(value, alone[name], rtol=1e-5, atol=1e-6)


def test_replacements_come_from_every_process(states: list[dict[str, dict[str, torch.Tensor]]]) -> None:
    state = states[0]["dead codes"]
    last = torch.randn(40, DIM, generator=torch.Generator().manual_seed(2))
    replaced = state["_codebook.cluster_size"][0] == torch.tensor(2.9)
    rows = (state["_codebook.embed"][0][:, None] == last[None]).all(-1)
    assert torch.equal(rows.any(1), replaced)
    sources = rows.nonzero()[:, 1] // 20
    assert sources.unique().tolist() == [0, 1]


def test_kmeans_uses_the_rows_of_every_process(states: list[dict[str, dict[str, torch.Tensor]]]) -> None:
    total = sum(40 * 0.2 * 0.8**k for k in range(3)) + 40 * 0.8**3  # the first sizes are the counts of all 40 rows
    assert states[0]["k-means"]["_codebook.cluster_size"].sum().item() == pytest.approx(total, rel=1e-5)
