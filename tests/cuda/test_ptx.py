"""The shim's matrix product, matrix loads and copies: fragments lie as the PTX manual has them."""

from pathlib import Path

from shimmed import SANITIZERS, compile_shim, run


def test_fragments_lie_as_the_manual_says(tmp_path):
    source = Path(__file__).parent / "ptx.cu"
    done = run(compile_shim(tmp_path, tmp_path / "ptx", [source], SANITIZERS))
    assert done.returncode == 0, done.stdout + done.stderr
