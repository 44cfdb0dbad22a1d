"""What a user does: install from the sources, with a compiler and without one, and run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ["fastvq", "kernels", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE"]

SEARCH = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, fastvq, fastvq.kernels
    x, codebook = torch.randn(50, 7), torch.randn(20, 7)
    same = all(
        torch.equal(fastvq.search(x, codebook), fastvq.search(x, codebook, backend="reference")) for _ in range(3)
    )
    fastvq.VectorQuantize(dim=7, codebook_size=20)(x[None])
print(json.dumps({
    "file": fastvq.__file__, "same": same,
    "warnings": [str(w.message) for w in caught if "fastvq" in str(w.message)],
}))
"""


INFO = "from fastvq.info import main; main(['--json'])"


def install(folder: Path, environment: dict[str, str]) -> Path:
    """pip install of a copy of the sources, so that nothing built in the working tree helps, into a folder."""
    copy, target = folder / "sources", folder / "site"
    copy.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, copy / name)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(copy)]
    subprocess.run(command, check=True, env={**os.environ, **environment}, timeout=600)
    return target


def run(site: Path, code: str) -> str:
    """What a program prints that sees the installed package and not the working tree's, were that installed too."""
    hide = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    environment.pop("FASTVQ_BACKEND", None)
    done = subprocess.run(
        [sys.executable, "-c", hide + code],
        env=environment,
        cwd=site.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_with_a_compiler(tmp_path: Path) -> None:
    site = install(tmp_path, {"FASTVQ_CPU": "1", "FASTVQ_CUDA": "0"})
    answer = json.loads(run(site, SEARCH))
    assert answer["file"].startswith(str(site))
    assert answer["same"]
    assert answer["warnings"] == []
    info = json.loads(run(site, INFO))
    assert info["built"] == {"cpu": True, "cuda": False}
    assert info["serving"]["cpu"]["backend"] == "cpu"
    for path in ("py.typed", "kernels/__init__.py", "cli/report.html.j2"):
        assert (site / "fastvq" / path).exists(), path
    assert not (site / "kernels").exists()  # that name belongs to another project


def test_without_a_compiler(tmp_path: Path) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    site = install(tmp_path, {"PATH": str(empty), "CXX": "", "CUDA_HOME": str(empty)})
    assert not list((site / "fastvq").glob("*.so"))
    answer = json.loads(run(site, SEARCH))
    assert answer["file"].startswith(str(site))
    assert answer["same"]
    assert len(answer["warnings"]) == 1
    assert "reference backend serves cpu tensors" in answer["warnings"][0]
    info = json.loads(run(site, INFO))
    assert info["built"] == {"cpu": False, "cuda": False}
    assert info["serving"]["cpu"]["backend"] == "reference"
    assert info["backends"]["cpu"] != "ready"


def test_a_compiler_that_is_asked_for_must_be_there(tmp_path: Path) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    with pytest.raises(subprocess.CalledProcessError):
        install(tmp_path, {"PATH": str(empty), "CXX": "", "FASTVQ_CPU": "1"})


