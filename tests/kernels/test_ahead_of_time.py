"""Every kernel, compiled for devices that are not here, and its machine code looked at; in processes of their own."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fastvq.kernels import code_sums, pointwise, residual_search, search
from fastvq.kernels.launch import DEVICES

ROOT = Path(__file__).parents[2]


def run(*command):
    """Standard output of a Python program that compiles; its text where it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.fail(f"{' '.join(command)}\n{done.stdout[-10_000:]}{done.stderr[-5_000:]}", pytrace=False)
    return done.stdout


def test_the_gate_finds_seeded_faults():
    faults = json.loads(run("tests/kernels/seeded_faults.py"))
    assert faults["sound"] == faults["float32 needs no tensor instruction"] == []
    assert faults["too few rows for a warp group"] == ["a product of f16 without HGMMA"]
    assert "touch local memory" in faults["too many registers"][0]
    assert "touch local memory" in faults["too many registers on AMD"][0]
    assert all(len(found) == 1 and "a float atomic" in found[0] for found in faults["atomics"]), faults["atomics"]
    assert faults["atomics of integers"] == [[], []]
    assert faults["too much shared memory"] == ["262144 bytes of shared memory, the device has 101376"]


@pytest.fixture(scope="module")
def what_is_compiled():
    return json.loads(run("tests/kernels/what_is_compiled.py"))


def chosen_by_the_heuristics(device):
    """Kernel: the tiles that its heuristics give for any shape and dtype, as the gate writes them, sorted."""
    dims = {*range(1, 1100), 2048, 10_000}
    widths = sorted({search.width_of(d) for d in dims})
    sizes = sorted({size for bit in range(21) for size in (1 << bit, (1 << bit) + 1)})
    found = {}

    def add(kernel, warps, stages=None, **tile):
        options = {"num_warps": warps} | ({} if stages is None else {"num_stages": stages})
        found.setdefault(kernel, set()).add(tuple(sorted((tile | options).items())))

    def add_codes(tiles, width):
        cut = {"COLUMNS": tiles.columns, "STEPS": tiles.steps}
        add("pack_codes_kernel", 4, 1, **cut, CHUNK=min(width, 64), BLOCK=16)

    for width in widths:
        for k, raw in itertools.product(sizes, (False, True)):
            tiles = search.tiles_for(device, k, width, raw)
            cut = {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "STEPS": tiles.steps, "STAGES": tiles.stages}
            chunk = search.chunk_for(device, width)
            add("screen_kernel", tiles.warps, tiles.stages, **cut, CHUNK=chunk, WIDTH=min(width, 257))
            group = 2 * tiles.steps
            add("rescore_kernel", 4, 1, ROWS=16, GROUP=group, CHUNK=min(width, 64 // group))
            add_codes(tiles, width)
        for chunk in (16, 32):  # of float64, and of other codes
            add("whole_kernel", 8, 1, COLUMNS=64, CHUNK=min(width, chunk))
        if width <= 128:
            tiles = residual_search.stage_tiles(device, width)
            cut = {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "STEPS": tiles.steps, "STAGES": tiles.stages}
            add("stages_kernel", tiles.warps, tiles.stages, **cut, WIDTH=width)
            add_codes(tiles, width)
    for d in dims:
        tile = pointwise.tile_for(d)
        cut = {"ROWS": tile.rows, "COLUMNS": tile.columns}
        add("gather_kernel", 8, **cut)
        add("pull_kernel", 4, **cut)
        add("gather_stages_kernel", 8, **cut, STAGES=8)
        add("pull_stages_kernel", 4, **cut)
        add("update_kernel", 8, **cut, LEVELS=10)
        for size in (2, 4, 8):
            tile = code_sums.sum_tile(d, size)
            for kernel in ("sum_rows_kernel", "sum_differences_kernel") + ("sum_chunks_kernel",) * (size == 8):
                add(kernel, tile.warps, ROWS=tile.rows, COLUMNS=tile.columns)
    return found


def every_kernel():
    """The names of all kernels of the package."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "kernels").glob("*.py")]
    return {name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE)}


@pytest.mark.parametrize("arch", DEVICES)
def test_the_gate_has_every_configuration_that_the_heuristics_choose(arch, what_is_compiled):
    """Aligned and not, on every device; a kernel of one configuration has it both ways too."""
    compiled = {}
    for kernel, *tile, aligned in what_is_compiled["chosen"][arch]:
        compiled.setdefault((kernel, aligned), set()).add(tuple(sorted(map(tuple, tile))))
    for kernel, tiles in chosen_by_the_heuristics(DEVICES[arch]).items():
        for aligned in (True, False):
            assert compiled[kernel, aligned] >= tiles, f"{kernel}, aligned: {aligned}"
    assert compiled.keys() == {(kernel, aligned) for kernel in every_kernel() for aligned in (True, False)}


def test_one_compilation_serves_every_batch_size(what_is_compiled):
    """But for sums of chunks, which have a level more for each factor of 256 of N."""
    for batches in what_is_compiled["batches"]:
        changing = {kernel: of_all for kernel, (of_one, of_all) in batches.items() if of_one != of_all}
        assert changing.keys() <= {"sum_chunks_kernel"}, changing
        assert batches["screen_kernel"] == [1, 1]


def test_every_kernel_passes_the_gate_on_every_device():
    run("-m", "benchmarks.kernel_gate")


@pytest.mark.soak
def test_every_launch_of_the_sweep_passes_the_gate():
    run("-m", "benchmarks.kernel_gate", "--all")


def test_no_kernel_is_worse_than_the_committed_table():
    run("-m", "benchmarks.kernel_report", "--check")


def test_the_table_holds_what_was_aimed_at():
    from benchmarks.kernel_report import read

    screen = {(row["arch"], row["D"]): row for row in read() if row["kernel"] == "screen_kernel"}
    assert float(screen["sm_90", "64"]["alu"]) <= 2.4
    assert float(screen["sm_90", "64"]["shuffles"]) == 0
    assert float(screen["sm_90", "256"]["tensor"]) >= 0.9


def test_a_worse_kernel_is_found():
    from benchmarks.kernel_report import check, read

    committed = read()
    assert check(committed, committed) == []
    row = next(row for row in committed if row["kernel"] == "screen_kernel")
    for name, value in (("alu", "9"), ("shuffles", "1"), ("spills", "1"), ("blocks", "0"), ("tensor", "0.01")):
        assert len(check([row | {name: value}], committed)) == 1, name
    assert "not in the table" in check([row | {"D": "7"}], committed)[0]
