"""Which backend serves a call: the argument, then `use_backend`, then FASTVQ_BACKEND, then what is there."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")

_chosen: ContextVar[str | None] = ContextVar("fastvq_backend", default=None)

# What os.environ holds, as the system writes names: to be told by os.environ itself that a variable is not there takes
# as long as all other checks of a call.
_environ: Any = os.environ
_variables, _VARIABLE = _environ._data, _environ.encodekey("FASTVQ_BACKEND")


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for by name cannot serve here; the message says what is missing."""


def check_name(name: object, source: str = "backend") -> str:
    """`name`, if it is a backend's; else a TypeError or ValueError that says where the name came from."""
    if not isinstance(name, str):
        raise TypeError(f"{source} must be a string, one of {', '.join(BACKENDS)}; got {type(name).__name__}")
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}; got {name!r}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every fastvq call inside the block with backend `name`, unless the call names its own.

    Args:
        name: "auto", "reference", "cpu", "triton" or "cuda".

    Raises:
        ValueError: `name` is no backend.
        TypeError: `name` is no string.
    """
    token = _chosen.set(check_name(name))
    try:
        yield
    finally:
        _chosen.reset(token)


def requested(backend: str | None = None) -> str:
    """The name asked for by the call, the context or the environment; "auto" when none is."""
    if backend is not None:
        return check_name(backend)
    from_context = _chosen.get()
    if from_context is not None:
        return from_context
    if _VARIABLE not in _variables:
        return "auto"
    return check_name(os.environ["FASTVQ_BACKEND"] or "auto", "FASTVQ_BACKEND")


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"fastvq.backends.{name}")


@functools.cache
def missing(name: str) -> str | None:
    """Why backend `name` cannot serve in this process, or None when it can."""
    if name == "reference":
        return None
    return _module(name).missing()


@functools.cache
def _warn_slow(device_type: str, why: str) -> None:
    warnings.warn(
        f"fastvq: the slow reference backend serves {device_type} tensors ({why}); results are the same, "
        "only slower. `python -m fastvq.info` tells more.",
        RuntimeWarning,
        stacklevel=2,
    )


_CANDIDATES = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}


def serves(name: str, device_type: str) -> bool:
    """Whether backend `name` takes tensors on such devices in this process."""
    if name == "triton":
        from fastvq.backends import triton

        return triton.serves(device_type)
    return name == "reference" or name in _CANDIDATES.get(device_type, ())


@functools.cache
def automatic(device_type: str) -> tuple[str, str | None]:
    """The backend that "auto" means for a device, and, where that is the slow reference, why."""
    reasons = []
    for name in _CANDIDATES.get(device_type, ()):
        why = missing(name)
        if why is None and serves(name, device_type):
            return name, None
        reasons.append(why or f"{name} does not serve {device_type} tensors in this process")
    return "reference", "; ".join(reasons) or f"fastvq has no kernels for {device_type} devices"


# ---- between Triton and CUDA C++ --------------------------------------------------------------------------------


class Gpu(NamedTuple):
    """What the choice may depend on of a device."""

    arch: str  # "sm_90", "gfx942"
    multiprocessors: int


class Problem(NamedTuple):
    """What it may depend on of a call."""

    operator: str
    N: int  # rows of all heads
    K: int
    D: int
    dtype: str  # of the rows: "float32"


class Rule(NamedTuple):
    """A backend, when it is meant, and why: one line."""

    backend: str
    applies: Callable[[Gpu, Problem], bool]
    why: str


class Choice(NamedTuple):
    """The backend of a call, and why."""

    backend: str
    why: str


def _nvidia(gpu: Gpu) -> bool:
    return gpu.arch.startswith("sm_")


def _searches(problem: Problem) -> bool:
    return problem.operator in ("search", "vector_quantize", "vector_quantize_counted")


def _launch_bound(problem: Problem) -> bool:
    """Whether starting the kernels takes longer than they do; 2^33: 0.1 ms of tensor cores."""
    return problem.N * problem.D * (problem.K if _searches(problem) else 64) <= 1 << 33


# The first that applies and whose backend is there. Those of sm_90 are from benchmarks/results/gpu: an H100.
RULES = (
    Rule("triton", lambda gpu, _: not _nvidia(gpu), "CUDA C++ is for NVIDIA devices"),
    Rule(
        "triton",
        lambda gpu, p: gpu.arch == "sm_90" and p.operator.startswith("residual_"),
        "H100: residuals twice as fast as by CUDA C++",
    ),
    Rule(
        "cuda",
        lambda gpu, p: gpu.arch == "sm_90" and _launch_bound(p),
        "H100: the launches decide at this size, and take CUDA C++ 0.3 to 0.9 of the time",
    ),
    Rule("triton", lambda gpu, _: gpu.arch == "sm_90", "H100: at this size as fast as CUDA C++ or faster"),
    Rule("triton", lambda gpu, _: True, "the two have not been measured side by side; Triton is the older"),
    Rule("cuda", lambda gpu, _: _nvidia(gpu) and int(gpu.arch[3:].rstrip("af")) >= 80, "Triton is not there"),
)


def choose(gpu: Gpu, problem: Problem, able: frozenset[str]) -> Choice:
    """Which of the backends that are `able` to serve a device computes a problem on it; a pure function."""
    for rule in RULES:
        if rule.backend in able and rule.applies(gpu, problem):
            return Choice(rule.backend, rule.why)
    return Choice("reference", "there are no kernels for this device")


_cached_choice = functools.lru_cache(4096)(choose)


@functools.cache
def able(device_type: str) -> frozenset[str]:
    """The backends with kernels that serve a kind of device in this process."""
    return frozenset(
        name for name in _CANDIDATES.get(device_type, ()) if missing(name) is None and serves(name, device_type)
    )


@functools.cache
def gpu_of(index: int) -> Gpu:
    """A CUDA or ROCm device of this process."""
    properties: Any = torch.cuda.get_device_properties(index)
    arch = properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return Gpu(arch, properties.multi_processor_count)


def problem_of(operator: str, arguments: Sequence[Any]) -> Problem:
    """The problem that a call of an operator of fastvq.ops poses."""
    if operator == "ema_update_":
        x = codebook = arguments[0]
    else:
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        x, codebook = tensors[2:4] if operator.endswith("_backward") else tensors[:2]
    K = int(arguments[2]) if operator == "code_sums" else codebook.shape[-2]
    return Problem(operator, x.shape[:-1].numel(), K, x.shape[-1], str(x.dtype).removeprefix("torch."))


def backend_for(backend: str | None, device: torch.device, call: tuple[str, Sequence[Any]] | None = None) -> ModuleType:
    """The module that computes a call on `device`; `call` is the operator's name and its arguments.

    Raises:
        ValueError: the backend does not serve this kind of device.
        BackendUnavailableError: the backend was asked for by name and cannot serve in this process.
    """
    name, kind = requested(backend), device.type
    if name == "auto":
        name, why = automatic(kind)
        if why is not None:
            _warn_slow(kind, why)
        elif call is not None and len(able(kind)) > 1:
            name = _cached_choice(gpu_of(device.index or 0), problem_of(*call), able(kind)).backend
    else:
        why = missing(name)
        if why is not None:
            raise BackendUnavailableError(f"backend {name!r} is not available: {why}")
        if not serves(name, kind):
            raise ValueError(f"backend {name!r} does not serve tensors on {kind}")
    return _module(name)
