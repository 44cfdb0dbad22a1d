"""Every user error: one line on standard error, exit status 2, nothing written."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


def tree(*roots: Path) -> dict[Path, tuple[int, int]]:
    """Every file and folder, with its size and time."""
    paths = [path for root in roots for path in (root, *root.rglob("*"))]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def text(path: Path, content: str = "no such thing") -> Path:
    path.write_text(content)
    return path


def tokens(case, flip: int | None = None, cut: int | None = None) -> Path:
    """A token file, whole or not."""
    path = case.folder / "tokens.fvq"
    case.call("encode", case.run, case.picture, "-o", path)
    content = bytearray(path.read_bytes())[:cut]
    if flip is not None:
        content[flip] ^= 4
    path.write_bytes(content)
    return path


def damaged_run(case) -> Path:
    copy = case.folder / "damaged"
    shutil.copytree(case.run, copy)
    path = max(copy.glob("checkpoints/step-*")) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return copy


def twin(case) -> Path:
    (case.folder / "sub").mkdir()
    return Path(shutil.copy(case.picture, case.folder / "sub" / case.picture.name))


def train(*more):
    return lambda c: ["train", "--data", c.pixels, "--out", c.new, "--steps", 2, *more]


def resume(*more):
    return lambda c: ["train", "--out", c.run, "--steps", 9, "--resume", *more]


CASES = {
    "no command": (lambda c: [], "required: COMMAND"),
    "unknown command": (lambda c: ["fly"], "invalid choice: 'fly'"),
    "unknown option": (lambda c: ["info", "--fast"], "unrecognized arguments: --fast"),
    "bench into a directory": (lambda c: ["bench", "--csv", c.run], "--csv must name a file; got the directory"),
    "abbreviated option": (train("--batch", 4), "unrecognized arguments: --batch"),
    # train
    "train without --out": (lambda c: ["train", "--data", c.pixels, "--steps", 1], "--out"),
    "train without --steps": (lambda c: ["train", "--data", c.pixels, "--out", c.new], "--steps"),
    "train without --data": (lambda c: ["train", "--out", c.new, "--steps", 1], "--data is required"),
    "no steps": (train("--steps", 0), "at least 1; got 0"),
    "steps not a number": (train("--steps", "many"), "whole number, at least 1; got many"),
    "negative seed": (train("--seed", -1), "from 0 to 2^63 - 1; got -1"),
    "seed too large": (train("--seed", 1 << 63), "from 0 to 2^63 - 1"),
    "learning rate of zero": (train("--learning-rate", 0), "above 0; got 0"),
    "learning rate not a number": (train("--learning-rate", "nan"), "above 0; got nan"),
    "unknown config": (train("--config", "huge"), "invalid choice: 'huge'"),
    "empty codebook": (train("--codebook-size", 0), "at least 1"),
    "crop of no whole codes": (train("--crop", 18), "--crop must be a multiple of 4; got 18"),
    "unknown device": (train("--device", "abacus"), "invalid choice: 'abacus'"),
    "no CUDA device": (train("--device", "cuda"), "no CUDA device"),
    "missing data": (train("--data", "nowhere"), "nowhere does not exist"),
    "data of a strange kind": (train("--data", __file__), "neither a folder nor a .npy file"),
    "folder without images": (lambda c: [*train()(c), "--data", c.empty], "holds 0 images"),
    "array of the wrong shape": (lambda c: [*train()(c), "--data", c.bad_array], "must have shape"),
    "run exists": (lambda c: ["train", "--data", c.pixels, "--out", c.run, "--steps", 9], "not an empty folder"),
    "run is a file": (lambda c: ["train", "--data", c.pixels, "--out", c.picture, "--steps", 9], "not an empty folder"),
    "run below a file": (
        lambda c: ["train", "--data", c.pixels, "--out", c.picture / "x", "--steps", 9],
        "picture.png",
    ),
    "nothing to resume": (lambda c: ["train", "--out", c.new, "--steps", 9, "--resume"], "does not exist"),
    "resume a damaged run": (lambda c: ["train", "--out", damaged_run(c), "--steps", 9, "--resume"], "is damaged"),
    "resume with another seed": (resume("--seed", 5), "--seed 5 is not that of run"),
    "resume with other data": (resume("--data", "digits"), "--data digits is not that of run"),
    "resume with another crop": (resume("--crop", 8), "--crop 8 is not that of run"),
    "resume with another codebook": (resume("--codebook-size", 5), "--codebook-size 5 is not that of run"),
    "resume with another config": (resume("--config", "seed"), "--config seed is not that of run"),
    # reconstruct
    "reconstruct of a missing run": (lambda c: ["reconstruct", c.new, c.picture, "-o", c.out], "does not exist"),
    "reconstruct of an empty run": (lambda c: ["reconstruct", c.empty, c.picture, "-o", c.out], "no checkpoint"),
    "reconstruct of a damaged run": (lambda c: ["reconstruct", damaged_run(c), c.picture, "-o", c.out], "is damaged"),
    "reconstruct without images": (lambda c: ["reconstruct", c.run, "-o", c.out], "required: IMAGE"),
    "reconstruct without -o": (lambda c: ["reconstruct", c.run, c.picture], "required: -o"),
    "missing image": (lambda c: ["reconstruct", c.run, c.picture, "no.png", "-o", c.out], "no.png does not exist"),
    "unreadable image": (
        lambda c: ["reconstruct", c.run, c.picture, text(c.folder / "x.png"), "-o", c.out],
        "x.png cannot be read",
    ),
    "original in the way": (lambda c: ["reconstruct", c.run, c.picture, "-o", c.folder], "written over its original"),
    "two images of one name": (lambda c: ["reconstruct", c.run, c.picture, twin(c), "-o", c.out], "two images"),
    "output folder is a file": (lambda c: ["reconstruct", c.run, c.picture, "-o", c.pixels], "is not a folder"),
    # encode
    "encode of a missing run": (lambda c: ["encode", c.new, c.picture, "-o", c.out], "does not exist"),
    "encode a missing image": (lambda c: ["encode", c.run, "no.png", "-o", c.out], "no.png does not exist"),
    "encode into a folder": (lambda c: ["encode", c.run, c.picture, "-o", c.empty], "is a folder"),
    "encode over an image": (lambda c: ["encode", c.run, c.picture, "-o", c.picture], "is one of the images"),
    "encode below a file": (lambda c: ["encode", c.run, c.picture, "-o", c.picture / "x.fvq"], "picture.png"),
    # decode
    "missing token file": (lambda c: ["decode", c.run, "no.fvq", "-o", c.out], "no.fvq cannot be read"),
    "foreign token file": (lambda c: ["decode", c.run, c.picture, "-o", c.out], "is not a .fvq file"),
    "damaged token file": (lambda c: ["decode", c.run, tokens(c, flip=50), "-o", c.out], "is damaged"),
    "truncated token file": (lambda c: ["decode", c.run, tokens(c, cut=-7), "-o", c.out], "damaged or truncated"),
    "token file of another model": (lambda c: ["decode", c.other_run, tokens(c), "-o", c.out], "by another model"),
    "decode into a file": (lambda c: ["decode", c.run, tokens(c), "-o", c.picture], "is not a folder"),
    # evaluate, report, demo
    "evaluate a missing run": (lambda c: ["evaluate", c.new], "does not exist"),
    "evaluate on missing data": (lambda c: ["evaluate", c.run, "--data", "nowhere"], "nowhere does not exist"),
    "report of a missing run": (lambda c: ["report", c.new], "does not exist"),
    "report into a file": (lambda c: ["report", c.run, "-o", c.picture], "is not a folder"),
    "demo in a strange folder": (lambda c: ["demo", "--out", c.folder], "not an empty folder"),
}


class Case:
    """What the cases are made of."""

    def __init__(self, folder, run, other_run, pixels, picture, call):
        self.folder, self.run, self.other_run, self.pixels, self.picture = folder, run, other_run, pixels, picture
        self.call = call
        self.new, self.out, self.empty = folder / "new", folder / "out", folder / "empty"
        self.empty.mkdir()
        self.bad_array = folder / "bad.npy"
        np.save(self.bad_array, np.zeros((3, 3)))


@pytest.mark.parametrize("name", CASES)
def test_user_error(name, tmp_path, run, other_run, pixels, picture, call, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    make, words = CASES[name]
    case = Case(tmp_path, run, other_run, pixels, picture, call)
    arguments = make(case)
    before = tree(tmp_path, run, other_run)
    answer = call(*arguments)
    assert answer.status == 2
    assert words in answer.err
    assert answer.err.startswith("fastvq")
    assert answer.err.count("\n") == 1
    assert answer.err.endswith("\n")
    assert answer.out == ""
    assert tree(tmp_path, run, other_run) == before


@pytest.mark.parametrize("command", ["train", "reconstruct", "evaluate"])
@pytest.mark.parametrize(("backend", "words"), [("nonsense", "FASTVQ_BACKEND must be one of"), ("cuda", "cuda")])
def test_backend_that_cannot_serve(command, backend, words, tmp_path, run, pixels, picture, call, monkeypatch):
    monkeypatch.setenv("FASTVQ_BACKEND", backend)
    arguments = {
        "train": ["--data", pixels, "--out", tmp_path / "new", "--steps", 1],
        "reconstruct": [run, picture, "-o", tmp_path / "out"],
        "evaluate": [run],
    }[command]
    before = tree(tmp_path)
    answer = call(command, *arguments)
    assert (answer.status, answer.err.count("\n"), answer.out) == (2, 1, "")
    assert words in answer.err
    assert tree(tmp_path) == before


PACKAGES = {
    "train": ["safetensors", "tqdm", "tensorboard"],
    "reconstruct": ["safetensors", "PIL"],
    "evaluate": ["safetensors", "PIL"],
    "report": ["matplotlib", "jinja2"],
    "demo": ["skimage", "matplotlib", "jinja2", "tqdm"],
}


@pytest.mark.parametrize(("command", "package"), [(c, p) for c, packages in PACKAGES.items() for p in packages])
def test_missing_package(command, package, tmp_path, run, pixels, picture):
    """In a process of its own, where the package has never been imported."""
    arguments = {
        "train": ["--data", pixels, "--out", tmp_path / "new", "--steps", 1],
        "reconstruct": [run, picture, "-o", tmp_path / "out"],
        "evaluate": [run],
        "report": [run, "-o", tmp_path / "out"],
        "demo": ["--out", tmp_path / "new"],
    }[command]
    before = tree(tmp_path)
    block = f"import sys; sys.modules[{package!r}] = None; from fastvq.cli import main; sys.exit(main(sys.argv[1:]))"
    ran = subprocess.run(
        [sys.executable, "-c", block, command, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert ran.stderr == f"fastvq {command}: error: needs the package {package}: pip install 'fastvq[train]'\n"
    assert (ran.returncode, ran.stdout) == (2, "")
    assert tree(tmp_path) == before
