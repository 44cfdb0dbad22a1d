"""Builds the C++ and CUDA extensions with pybind11 and ninja; never imports torch, so one build serves every torch.

Environment: CXX names the compiler; FASTVQ_CPU=0 or FASTVQ_CUDA=0 leaves an extension out, FASTVQ_CPU=1 or
FASTVQ_CUDA=1 makes its failure fatal. Unset, an extension that cannot be built is left out with a warning: the
package works without. FASTVQ_CUDA_ARCHITECTURES (90a, or 80;90a) narrows what the CUDA kernels are compiled for.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent

# A source is compiled for the instruction set its name ends in; any other file for the machine's baseline.
AVX2 = ["-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mpopcnt", "-mprfchw"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
INSTRUCTION_SETS = {
    "avx2": AVX2,
    "avxvnni": [*AVX2, "-mavxvnni"],
    "avx512": AVX512,
    "avx512vnni": [*AVX512, "-mavx512vnni"],
}
# No contraction: the contract rounds each operation on its own, and the screen asks for its FMAs by name.
CPU_FLAGS = [
    *["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off"],
    *["-Wall", "-Wextra", "-Wno-psabi", "-Wno-uninitialized"],  # gcc 12 mistakes its own intrinsics
]
CUDA_ARCHITECTURES = ["80", "86", "89", "90a", "100", "120"]
# As for the CPU: what may be contracted is written as a fused multiply-add.
CUDA_FLAGS = [
    *["-std=c++17", "-O3", "-fmad=false", "--threads", "2", "-cudart", "static"],
    *["-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off"],
]


def cpu_compiler() -> str:
    """The C++ compiler: CXX, or the first that is there."""
    candidates = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    for name in candidates:
        if name and shutil.which(name.split()[0]):
            return name
    raise RuntimeError("no C++ compiler found (looked for CXX, c++, g++, clang++)")


def cuda_compiler() -> str:
    """nvcc: from CUDA_HOME, or the PATH."""
    for name in (str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"), "nvcc"):
        found = shutil.which(name)
        if found:
            return found
    raise RuntimeError("no nvcc found (looked in CUDA_HOME and on the PATH)")


def accepts(compiler: str, flags: list[str]) -> bool:
    """Whether the compiler takes the flags, as an x86 one takes -mavx2 and an Arm one does not."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("int main() { return 0; }\n")
        command = [*compiler.split(), *flags, "-c", str(source), "-o", str(Path(folder, "probe.o"))]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def python_includes() -> list[str]:
    """Include flags of Python and pybind11."""
    import pybind11

    return [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]


class NinjaFile:
    """One build.ninja: a rule a language, a link step an extension."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = ["ninja_required_version = 1.5"]

    def rule(self, name: str, command: str, **settings: str) -> None:
        """Declare how a kind of file is made."""
        self.lines += [f"rule {name}", f"  command = {command}"]
        self.lines += [f"  {key} = {value}" for key, value in settings.items()]

    def build(self, output: Path, rule: str, inputs: list[Path], flags: list[str]) -> Path:
        """Declare that `output` is made of `inputs`."""
        quoted = [str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:") for path in [output, *inputs]]
        self.lines += [f"build {quoted[0]}: {rule} {' '.join(quoted[1:])}", f"  flags = {' '.join(flags)}"]
        return output

    def run(self) -> None:
        """Bring every output up to date."""
        import ninja

        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "--quiet", "-C", str(self.folder)], check=True)


def link_cpu(folder: Path, output: Path, sources: list[Path], flags: list[str], link_flags: list[str]) -> Path:
    """Compile C++ sources, each for the instruction set its name ends in, and link them."""
    compiler = cpu_compiler()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    sets = {name: set_flags for name, set_flags in INSTRUCTION_SETS.items() if x86 and accepts(compiler, set_flags)}
    defines = [f"-DFASTVQ_HAS_{name.upper()}" for name in sets]
    file = NinjaFile(folder)
    file.rule("cxx", f"{compiler} -MMD -MF $out.d $flags -c $in -o $out", depfile="$out.d", deps="gcc")
    file.rule("link", f"{compiler} $in -o $out $flags")
    objects = []
    for source in sources:
        ending = source.stem.rsplit("_", 1)[-1]
        if ending in INSTRUCTION_SETS and ending not in sets:
            continue
        object_flags = [*CPU_FLAGS, *defines, *sets.get(ending, []), *flags]
        objects.append(file.build(folder / f"{source.parent.name}_{source.stem}.o", "cxx", [source], object_flags))
    file.build(output, "link", objects, link_flags)
    file.run()
    return output


def build_cpu(folder: Path, library: Path) -> None:
    """Compile csrc/cpu and its bindings."""
    sources = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), ROOT / "csrc" / "bindings" / "cpu.cpp"]
    system = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-ldl", "-pthread"]
    link_cpu(folder, library, sources, python_includes(), ["-shared", *system])


def cuda_targets() -> list[str]:
    """Which machine code nvcc makes, and PTX of the last architecture for devices to come, if it is no "a" target."""
    names = [a for a in os.environ.get("FASTVQ_CUDA_ARCHITECTURES", "").replace(",", ";").split(";") if a.strip()]
    names = [a.strip() for a in names] or CUDA_ARCHITECTURES
    for name in names:
        if not re.fullmatch(r"[1-9][0-9]{1,2}[af]?", name):
            raise ValueError(f"FASTVQ_CUDA_ARCHITECTURES must name architectures such as 80 or 90a; got {name!r}")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in names]
    if names[-1].isdigit():
        targets.append(f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}")
    return targets


def build_cuda(folder: Path, library: Path) -> None:
    """Compile csrc/cuda with nvcc and the static runtime; the result imports without a driver."""
    nvcc, compiler, targets = cuda_compiler(), cpu_compiler(), cuda_targets()
    file = NinjaFile(folder)
    file.rule("nvcc", f"{nvcc} -MMD -MF $out.d $flags -c $in -o $out", depfile="$out.d", deps="gcc")
    file.rule("cxx", f"{compiler} -MMD -MF $out.d $flags -c $in -o $out", depfile="$out.d", deps="gcc")
    file.rule("link", f"{nvcc} -shared -cudart static $in -o $out $flags")
    objects = [
        file.build(folder / f"{source.stem}.o", "nvcc", [source], [*CUDA_FLAGS, *targets])
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    ]
    # pybind11 stays out of nvcc's sight: it is slow to compile there.
    binding = ROOT / "csrc" / "bindings" / "cuda.cpp"
    objects.append(file.build(folder / "binding.o", "cxx", [binding], [*CPU_FLAGS, *python_includes()]))
    file.build(library, "link", objects, [])
    file.run()


BUILDERS = {"fastvq._cpu": ("FASTVQ_CPU", build_cpu), "fastvq._cuda": ("FASTVQ_CUDA", build_cuda)}


class NinjaBuild(build_ext):
    """Builds each extension by itself, so that one that cannot be built does not take the other along."""

    def folder(self, name: str) -> Path:
        """Where objects are kept: beside the source, so that the next build compiles only what has changed."""
        lasting = ROOT / "build" / f"{name}-{sys.implementation.cache_tag}"
        try:
            lasting.mkdir(parents=True, exist_ok=True)
        except OSError:
            return Path(self.build_temp).resolve() / name
        return lasting

    def build_extension(self, ext: Extension) -> None:
        """Build one extension, or leave it out."""
        variable, builder = BUILDERS[ext.name]
        wanted = os.environ.get(variable)
        if wanted == "0":
            return
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        try:
            builder(self.folder(ext.name), library)
        except (RuntimeError, OSError, subprocess.CalledProcessError, ImportError) as error:
            if wanted == "1":
                raise
            self.warn(f"{ext.name} is left out: {error}")


PACKAGES = ["backends", "cli", "compat", "data", "interop", "measure", "models", "nn", "training"]

if __name__ == "__main__":
    setup(
        packages=["fastvq", *[f"fastvq.{name}" for name in PACKAGES], "fastvq.kernels"],
        package_dir={"fastvq": "fastvq", "fastvq.kernels": "kernels"},
        package_data={"fastvq": ["py.typed"], "fastvq.cli": ["*.j2"]},
        ext_modules=[Extension(name, sources=[], optional=True) for name in BUILDERS],
        cmdclass={"build_ext": NinjaBuild},
        zip_safe=False,
    )
