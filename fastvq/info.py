"""`python -m fastvq.info`: what was built, what was found, and which backend serves which device."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from typing import Any

import torch

import fastvq
from fastvq.backends import cpu, select


def processor() -> str:
    """The processor's name as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _built(extension: str) -> bool:
    return importlib.util.find_spec(extension) is not None


def collect() -> dict[str, Any]:
    """Everything the report says, as plain data."""
    devices = {"cpu": f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        devices[f"cuda:{i}"] = torch.cuda.get_device_name(i)
    cpu_missing = cpu.missing()
    serving = {}
    for kind in dict.fromkeys(name.split(":")[0] for name in [*devices, "cuda"]):
        name, why = select.automatic(kind)
        serving[kind] = {"backend": name, "why": why}
    return {
        "versions": {
            "fastvq": fastvq.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": _version("numpy"),
            "triton": _version("triton"),
        },
        "built": {"cpu": _built("fastvq._cpu"), "cuda": _built("fastvq._cuda")},
        "instruction_sets": {
            "available": [] if cpu_missing else cpu.extension().instruction_sets(),
            "in_use": None if cpu_missing else cpu.extension().instruction_set(),
        },
        "devices": devices,
        "backends": {name: select.missing(name) or "ready" for name in select.BACKENDS if name != "auto"},
        "requested": select.requested(),
        "serving": serving,
    }


def render(info: dict[str, Any]) -> str:
    """The report as a person reads it."""
    sets = info["instruction_sets"]
    lines = [f"{name:<12}{version or 'not installed'}" for name, version in info["versions"].items()]
    lines += ["", "built"]
    lines += [f"  {name:<10}{'yes' if built else 'no'}" for name, built in info["built"].items()]
    lines += ["", "instruction sets"]
    lines += [f"  in use    {sets['in_use']} (of {', '.join(sets['available'])})" if sets["in_use"] else "  none"]
    lines += ["", "devices"]
    lines += [f"  {name:<10}{description}" for name, description in info["devices"].items()]
    lines += ["", "backends"]
    lines += [f"  {name:<10}{state}" for name, state in info["backends"].items()]
    lines += ["", f"who serves (asked for: {info['requested']})"]
    for device, served in info["serving"].items():
        why = f" ({served['why']})" if served["why"] else ""
        lines.append(f"  {device:<10}{served['backend']}{why}")
    return "\n".join(lines)


OPERATORS = (
    *["search", "vector_quantize", "vector_quantize_counted", "vector_quantize_backward", "code_sums", "ema_update_"],
    *["residual_quantize", "residual_quantize_backward"],
)
# What `explain` speaks of where there is no device.
USUAL_GPUS = (select.Gpu("sm_80", 108), select.Gpu("sm_90", 132), select.Gpu("sm_100", 148), select.Gpu("gfx942", 304))


def explain(N: int, K: int, D: int, dtype: str) -> str:
    """Which backend computes each operator at this size on each GPU, and why; without one, on the usual ones."""
    found = [select.gpu_of(i) for i in range(torch.cuda.device_count())]
    built = {"triton": importlib.util.find_spec("triton") is not None, "cuda": _built("fastvq._cuda")}
    able = select.able("cuda") if found else frozenset(name for name, there in built.items() if there)
    lines = [f"{N} rows, {K} codes, {D} dimensions, {dtype}; kernels: {', '.join(sorted(able)) or 'none'}"]
    for gpu in found or USUAL_GPUS:
        lines += ["", f"{gpu.arch}, {gpu.multiprocessors} multiprocessors" + ("" if found else " (not here)")]
        for operator in OPERATORS:
            choice = select.choose(gpu, select.Problem(operator, N, K, D, dtype), able)
            lines.append(f"  {operator:<28}{choice.backend:<10} {choice.why}")
    return "\n".join(lines)


def report(as_json: bool) -> str:
    """The report, as JSON or as a person reads it.

    Raises:
        ValueError: FASTVQ_BACKEND or FASTVQ_CPU_ISA names what is not there.
    """
    info = collect()
    return json.dumps(info, indent=2) if as_json else render(info)


def main(argv: list[str] | None = None) -> int:
    """`fastvq info`; its exit status."""
    from fastvq.cli import main as command

    return command(["info", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
