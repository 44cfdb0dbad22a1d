"""The machine code of the CUDA search: what the committed table promises, and that nvcc's code is no worse than it."""

import importlib.util
from pathlib import Path

import pytest

from benchmarks import cuda_report

SPEC = importlib.util.find_spec("fastvq._cuda")
LIBRARY = Path(SPEC.origin) if SPEC else Path()
built = pytest.mark.skipif(SPEC is None, reason="fastvq was built without nvcc")


def lines_of(**chosen):
    """The committed lines with these values, of kernels that search one codebook."""
    lines = [line for line in cuda_report.read() if line["source"] != "staged"]
    found = [line for line in lines if all(line[name] == value for name, value in chosen.items())]
    assert found, chosen
    return found


def test_the_table_has_every_policy_on_every_architecture():
    by_arch = {}
    for line in cuda_report.read():
        by_arch.setdefault(line["arch"], set()).add(tuple(line[name] for name in cuda_report.KEY[1:]))
    assert tuple(by_arch) == cuda_report.ARCHES
    wanted = {
        *[("split", "bfloat16", source, width) for source in ("resident", "streamed") for width in ("16", "32", "64")],
        *[("rounded", "float16", "staged", width) for width in ("32", "64", "128", "256", "512")],
    }
    for kind in (("stored", "bfloat16"), ("stored", "float16"), ("rounded", "float16")):
        wanted |= {(*kind, "resident", width) for width in ("32", "64")}
        wanted |= {(*kind, "streamed", width) for width in ("32", "64", "128", "256")} | {
            (*kind, "chunked", "over 256")
        }
    for arch, policies in by_arch.items():
        assert policies == wanted, arch


def test_the_table_meets_the_targets():
    """sm_90: 1.5 half-rate operations an element at 64, tensor-bound 0.75 there and 0.9 at 128; sm_80: 0.9 at 64."""
    searches = [
        line for operand in ("stored", "rounded") for line in lines_of(operand=operand, arch="sm_90", width="64")
    ]
    assert all(float(line["alu"]) <= 1.5 and float(line["tensor"]) >= 0.75 for line in searches)
    assert all(float(line["tensor"]) >= 0.9 for line in lines_of(arch="sm_90", width="128"))
    assert all(float(line["tensor"]) >= 0.9 for line in lines_of(arch="sm_80", width="64"))
    for arch in ("sm_80", "sm_90"):  # D = 8, K = 1024: the codes stay in shared memory, 27 places are multiplied
        (line,) = lines_of(operand="split", source="resident", width="32", arch=arch)
        assert float(line["issued"]) <= 2.0
    for line in cuda_report.read():
        assert (int(line["spills"]), cuda_report.missed(line)) == (0, []), line
        assert 0 < int(line["registers"]) <= 255
        assert int(line["shared"]) > 0


def test_a_worse_line_is_complained_of():
    lines = cuda_report.read()
    assert not cuda_report.check(lines, lines)
    worse = [line | {"alu": "1.99", "tensor": "0.50", "spills": "3"} if line["alu"] else line for line in lines]
    complaints = cuda_report.check(worse, lines)
    assert len(complaints) >= 3 * sum(bool(line["alu"]) for line in lines)
    assert "sm_90 stored bfloat16 streamed 64: 1.99 ALU operations an element, 1.5 are allowed" in complaints
    assert "sm_80 rounded float16 streamed 64: tensor-bound for 0.50 of the time, 0.9 is asked for" in complaints


@built
def test_policies_with_a_target_meet_it():
    rows = cuda_report.measure(LIBRARY, targets_only=True)
    assert rows
    assert not cuda_report.check(rows, cuda_report.read())


@built
@pytest.mark.soak
def test_no_policy_is_worse_than_the_table():
    assert not cuda_report.check(cuda_report.measure(LIBRARY), cuda_report.read())
