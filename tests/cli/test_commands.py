"""Every command, doing its work."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import fastvq
from fastvq.data import load, read_image
from fastvq.training import checkpoint as checkpoints
from fastvq.training import evaluate, load_model

OPTIONAL = ["PIL", "jinja2", "matplotlib", "mlxtend", "safetensors", "skimage", "tensorboard", "tqdm"]


def python(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_help_names_every_command(call, capsys):
    for arguments in (["--help"], *([name, "--help"] for name in fastvq.cli.COMMANDS)):
        with pytest.raises(SystemExit, match="0"):
            fastvq.cli.main(arguments)
        text = capsys.readouterr().out
        assert arguments != ["--help"] or all(name in text for name in fastvq.cli.COMMANDS)


def test_module_and_version():
    ran = python("-m", "fastvq", "--version")
    assert (ran.returncode, ran.stdout) == (0, f"fastvq {fastvq.__version__}\n")
    ran = python("-m", "fastvq", "fly")
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)


def test_info_needs_no_optional_package():
    block = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL})); from fastvq.cli import main; sys.exit(main())"
    ran = python("-c", block, "info", "--json")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert json.loads(ran.stdout)["versions"]["fastvq"] == fastvq.__version__


# ---- train ------------------------------------------------------------------------------------------------------


def test_train_and_resume(tmp_path, pixels, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = os.path.relpath(pixels, tmp_path)
    options = ["--batch-size", 2, "--seed", 4, "--codebook-size", 16, "--log-every", 2, "--learning-rate", "2e-3"]
    answer = call("train", "--data", relative, "--out", "run", "--steps", 2, *options)
    assert (answer.status, answer.out) == (0, "trained to step 2: run/checkpoints/step-00000002\n")
    settings = checkpoints.load(tmp_path / "run").settings
    assert (settings.seed, settings.batch_size, settings.learning_rate, settings.crop) == (4, 2, 2e-3, 20)
    assert (settings.model.codebook_size, settings.model.in_channels, settings.log_every) == (16, 3, 2)
    # From another folder, and with options that say the same.
    monkeypatch.chdir("/")
    run = tmp_path / "run"
    answer = call("train", "--out", run, "--steps", 3, "--resume", "--seed", 4, "--config", "photos")
    assert (answer.status, checkpoints.load(run).step) == (0, 3)
    answer = call("train", "--out", run, "--steps", 3, "--resume")
    assert (answer.status, answer.out, answer.err) == (0, f"{run} is at step 3 already\n", "")


def test_grey_data_gets_the_grey_model(tmp_path, call):
    np.save(tmp_path / "grey.npy", np.random.default_rng(0).random((12, 30, 30)))
    assert call("train", "--data", tmp_path / "grey.npy", "--out", tmp_path / "run", "--steps", 1).status == 0
    settings = checkpoints.load(tmp_path / "run").settings
    assert (settings.model.in_channels, settings.crop) == (1, 28)


def test_digits_train_with_the_seed_architecture(tmp_path, call):
    answer = call("train", "--data", "digits", "--config", "seed", "--out", tmp_path / "run", "--steps", 2)
    assert answer.status == 0
    model, settings = load_model(tmp_path / "run")
    assert (model.config.codebook_size, model.config.code_dim, settings.crop) == (64, 16, 28)
    answer = call("evaluate", tmp_path / "run", "--json")
    assert json.loads(answer.out)["images"] == 1000


def test_a_folder_of_images_trains(tmp_path, call):
    generator = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(4):
        image = Image.fromarray(generator.integers(0, 256, (16 + number, 90, 3), np.uint8))
        image.save(tmp_path / "pictures" / f"{number}.jpg")
    answer = call(
        "train", "--data", tmp_path / "pictures", "--out", tmp_path / "run", "--steps", 1, "--codebook-size", 64
    )
    assert answer.status == 0
    assert checkpoints.load(tmp_path / "run").settings.crop == 16


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, pixels, call):
    run = tmp_path / "run"
    arguments = ["train", "--data", str(pixels), "--out", str(run), "--steps", "1000000", "--log-every", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastvq", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.csv").exists() and len((run / "metrics.csv").read_text().splitlines()) > 2:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    step = checkpoints.load(run).step
    assert step >= 2
    assert out == f"stopped at step {step}, saved; go on: fastvq train --out {run} --resume --steps 1000000\n"
    assert "Traceback" not in err
    assert call("train", "--out", run, "--resume", "--steps", step + 1).status == 0


def test_ctrl_c_elsewhere_is_one_line(run, call, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastvq.cli.evaluate.run", interrupted)
    answer = call("evaluate", run)
    assert (answer.status, answer.err) == (130, "fastvq evaluate: error: interrupted\n")


# ---- reconstruct, encode, decode, evaluate ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["RGB", "L", "RGBA"])
def test_reconstruct_is_what_the_model_says(kind, tmp_path, run, picture, call):
    with Image.open(picture) as image:
        image.convert(kind).save(tmp_path / "other.png")
    answer = call("reconstruct", run, picture, tmp_path / "other.png", "-o", tmp_path / "out")
    assert answer.status == 0
    assert [line.split(":")[0] for line in answer.out.splitlines()] == [
        str(tmp_path / "out" / name) for name in ("picture.png", "other.png")
    ]
    model, _ = load_model(run)
    for name in ("picture.png", "other.png"):
        original = read_image(tmp_path / name, 3)
        with torch.no_grad():
            expected = model(original[None] / 255).reconstruction[0].clamp(0, 1)
        restored = read_image(tmp_path / "out" / name)
        assert restored.shape == (3, 33, 19)
        torch.testing.assert_close(restored / 255, expected, atol=0.51 / 255, rtol=0)


def test_decode_restores_what_encode_wrote(tmp_path, run, picture, call):
    with Image.open(picture) as image:
        image.crop((0, 0, 7, 30)).save(tmp_path / "slim.png")
    fvq = tmp_path / "tokens.fvq"
    answer = call("encode", run, picture, tmp_path / "slim.png", "-o", fvq)
    assert answer.status == 0
    # 9 x 5 and 8 x 2 codes of 5 bits.
    assert fvq.stat().st_size == 36 + 2 * 8 + -(-61 * 5 // 8) + 4
    assert answer.out.startswith(f"{fvq}: 2 images, {fvq.stat().st_size} bytes")
    answer = call("decode", run, fvq, "-o", tmp_path / "decoded")
    decoded = [tmp_path / "decoded" / f"tokens-000{number}.png" for number in (1, 2)]
    assert (answer.status, answer.out.split()) == (0, [str(path) for path in decoded])
    call("reconstruct", run, picture, tmp_path / "slim.png", "-o", tmp_path / "seen")
    assert decoded[0].read_bytes() == (tmp_path / "seen" / "picture.png").read_bytes()
    assert decoded[1].read_bytes() == (tmp_path / "seen" / "slim.png").read_bytes()


def test_evaluate_prints_the_evaluation(run, pixels, call):
    model, _ = load_model(run)
    found = evaluate(model, load(str(pixels)).held_out)
    assert json.loads(call("evaluate", run, "--json").out) == found.to_dict()
    assert json.loads(call("evaluate", run, "--data", pixels, "--json").out) == found.to_dict()
    text = call("evaluate", run).out
    for words in (f"{found.mse:.6f}", f"{found.psnr:.2f} dB", f"{found.use.perplexity:.1f} of 20 codes"):
        assert words in text
    assert f"{found.png_bytes / found.token_bytes:.1f} times smaller than {found.png_bytes:,} bytes" in text
    assert f"{found.raw_bytes / found.token_bytes:.1f} times smaller than {found.raw_bytes:,} bytes" in text
