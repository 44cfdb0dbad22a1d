"""How the CUDA sources are compiled for the CPU, against the shim."""

import importlib.util
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHIM = Path(__file__).parent / "shim"

_spec = importlib.util.spec_from_file_location("fastvq_setup", ROOT / "setup.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)

# No contraction, as nvcc is told; misaligned vectors are caught in every build.
FLAGS = [
    *[
        "-std=c++17",
        "-O1",
        "-g1",
        "-fPIC",
        "-fvisibility=hidden",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
    ],
    *["-fsanitize=alignment", "-fno-sanitize-recover=all", f"-I{SHIM}"],
]
# Unoptimised: that compiles in half of the time, and the cases are small.
SANITIZERS = ["-fsanitize=address,undefined", "-fsanitize-sections=fastvq_shared", "-O0"]


# Each access of the sources is announced to shim/races.cpp.
RACES = ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"]


def compile_shim(folder, output, sources, flags=(), link_flags=(), source_flags=()):
    """Compile .cu and .cpp sources and the shim with the C++ compiler; link them. `source_flags` are not the shim's."""
    compiler = build.cpu_compiler()
    file = build.NinjaFile(folder)
    file.rule("cxx", f"{compiler} -MMD -MF $out.d $flags -x c++ -c $in -o $out", depfile="$out.d", deps="gcc")
    file.rule("link", f"{compiler} $in -o $out $flags")
    objects = [
        file.build(folder / f"{source.parent.name}_{source.stem}.o", "cxx", [source], [*FLAGS, *flags, *extra])
        for files, extra in ((sources, source_flags), (sorted(SHIM.glob("*.cpp")), ()))
        for source in files
    ]
    file.build(output, "link", objects, [*FLAGS, *flags, *link_flags, "-ldl"])
    file.run()
    return output


def run(program, *arguments):
    """A finished run of a program, its output captured."""
    return subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, check=False)


def compile_module(folder, flags=()):
    """The whole extension against the shim; returns the path of module _cuda_shim."""
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ROOT / "csrc" / "bindings" / "cuda.cpp"]
    flags = [*build.python_includes(), "-DFASTVQ_CUDA_MODULE=_cuda_shim", *flags]
    return compile_shim(folder, folder / "_cuda_shim.so", sources, flags, ["-shared"])


def load_module(path):
    """What compile_module or compile_mutant made, imported; pybind11 keeps one module a name, so each has its own."""
    spec = importlib.util.spec_from_file_location(f"{Path(path).parent}._cuda_shim".replace("/", "-"), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_mutant(module, folder, name, changes, source_flags=()):
    """The module with one source changed, each piece of text at the one place where it stands; the rest is linked anew.

    `name` is the .cu file that is compiled again, `changes` {file: {old: new}}.
    """
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for changed, pieces in changes.items():
        path = folder / "csrc" / "cuda" / changed
        text = path.read_text()
        for old, new in pieces.items():
            assert text.count(old) == 1, f"{old!r} stands in {text.count(old)} places of {changed}"
            text = text.replace(old, new)
        path.write_text(text)
    return relink(module, folder, [folder / "csrc" / "cuda" / f"{name}.cu"], source_flags)


def relink(module, folder, sources, source_flags=()):
    """The module with some .cu files compiled anew, or in another way."""
    names = [f"cuda_{source.stem}" for source in sources]
    objects = Path(module.__file__).parent.glob("*.o")
    others = [str(o) for o in objects if o.stem not in names and not o.stem.startswith("shim_")]
    output = folder / "_cuda_shim.so"
    return compile_shim(folder, output, sources, link_flags=["-shared", *others], source_flags=source_flags)


def dies(module, code):
    """What a program says that runs `code`, in which `cuda` is the backend on the CPU, and that must be aborted."""
    load = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_cuda_shim", {module.__file__!r})
from fastvq.backends import cuda
cuda._kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda._kernels)
"""
    done = subprocess.run([sys.executable, "-c", load + code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGABRT, done
    return done.stderr
