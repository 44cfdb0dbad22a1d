"""Triton kernels compiled for devices that are not there: what a call launches, and what each launch compiles to."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from fastvq.kernels import launch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastvq.backends import triton as backend
from fastvq.backends.reference import working_dtype


class Launch(NamedTuple):
    """One compilation: a kernel, and everything that Triton specialises it on."""

    arch: str
    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]  # argument: its type, "constexpr" for a constant
    constants: tuple[tuple[tuple[int, ...], Any], ...]  # path of an argument: its value
    attributes: tuple[tuple[tuple[int, ...], tuple[tuple[str, int], ...]], ...]  # path: divisibility by 16
    options: tuple[tuple[str, Any], ...]  # num_warps, num_stages, ...

    @property
    def named_constants(self) -> dict[str, Any]:
        """The constexprs by name."""
        return {self.kernel.arg_names[path[0]]: value for path, value in self.constants if len(path) == 1}

    def without_divisibility(self) -> Launch:
        """The same launch on pointers and sizes that nothing is known of."""
        return self._replace(attributes=())

    def __str__(self) -> str:
        constants = ", ".join(f"{name}={value}" for name, value in self.named_constants.items())
        types = ", ".join(kind for _, kind in self.signature if kind.startswith("*"))
        options = ", ".join(f"{name}={value}" for name, value in self.options)
        aligned = f"{len(self.attributes)} divisible by 16" if self.attributes else "nothing divisible"
        return f"{self.arch} {self.kernel.__name__}({types}; {constants}; {options}; {aligned})"


def target_of(arch: str) -> GPUTarget:
    """Triton's name of a device of `launch.DEVICES`."""
    device = launch.DEVICES[arch]
    return GPUTarget(device.backend, int(arch[3:]) if device.backend == "cuda" else arch, device.warp_size)


@functools.cache
def _binder(arch: str, kernel: JITFunction) -> tuple[Any, Callable[..., Any]]:
    backend = make_backend(target_of(arch))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def specialise(arch: str, kernel: JITFunction, *arguments: Any, **options: Any) -> Launch:
    """The compilation that Triton would do for a launch with these arguments on `arch`."""
    backend, bind = _binder(arch, kernel)
    bound, specialisation, chosen = bind(*arguments, **options)
    _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialisation, chosen)
    return Launch(
        arch,
        kernel,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple((path, tuple(map(tuple, pairs))) for path, pairs in attributes.items() if pairs),
        tuple(sorted(chosen.items())),
    )


def launches_of(arch: str, call: Callable[[], Any]) -> list[Launch]:
    """What host code launches on `arch`; `call` works on meta tensors, so it can neither compute nor wait."""
    found: dict[Launch, None] = {}

    def take(kernel: JITFunction, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        found[specialise(arch, kernel, *arguments, **options)] = None

    with launch.taken_by(take, launch.DEVICES[arch]):
        call()
    return list(found)


def operator_calls(x: Tensor, codebook: Tensor, metric: str, option: bool) -> list[Callable[[], Any]]:
    """A call of every operator on rows (N, D) and codes (K, D); `option`: distances, counts, a mask, a codebook a head.

    The residual quantiser has eight codebooks.
    """
    heads, index_shape = ((1,), (1, *x.shape[:-1])) if option else ((), x.shape[:-1])
    indices = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    mask = torch.empty(index_shape, dtype=torch.bool, device=x.device) if option else None
    of_heads = (x.view(*heads, *x.shape), codebook.view(*heads, *codebook.shape), indices.view(index_shape))
    rows, codes, chosen = of_heads
    sums = torch.empty(codes.shape, dtype=working_dtype(x), device=x.device)
    counts = sums[..., 0].contiguous()
    scalar = sums.new_empty(())
    gradients = rows, codes, chosen, mask, 1.0, 0.5, True, True
    codebooks = codebook.expand(8, *codebook.shape)
    stages = torch.empty(*x.shape[:-1], 8, dtype=torch.int64, device=x.device)
    return [
        lambda: backend.search(x, codebook, metric, option, "exact"),
        lambda: backend.vector_quantize(rows, codes, metric, 1.0, 0.5, mask),
        *([lambda: backend.vector_quantize_counted(rows, codes, metric, 1.0, 0.5, mask)] if option else []),
        lambda: backend.vector_quantize_backward(rows, scalar, *gradients),
        lambda: backend.code_sums(rows, chosen, codebook.shape[0], mask, option),
        lambda: backend.ema_update_(codes, counts, sums, counts, sums, 0.9, 1e-5),
        lambda: backend.residual_quantize(x, codebooks, metric),
        lambda: backend.residual_quantize_backward(x, sums.new_empty(8), x, codebooks, stages, True, True),
    ]


def compiled(what: Launch) -> Any:
    """Triton's CompiledKernel: `asm` by stage, `metadata.shared` in bytes."""
    attributes = {path: [list(pair) for pair in pairs] for path, pairs in what.attributes}
    source = ASTSource(what.kernel, dict(what.signature), dict(what.constants), attributes)
    return triton.compile(source, target=target_of(what.arch), options=dict(what.options))


def batches(launches: Iterable[Launch], most: int = 24) -> list[list[Launch]]:
    """The launches by architecture, in lists that a process takes at a time."""
    ordered = sorted(launches, key=lambda what: what.arch)
    by_arch = (list(some) for _, some in itertools.groupby(ordered, lambda what: what.arch))
    return [some[i : i + most] for some in by_arch for i in range(0, len(some), most)]


def tool(name: str) -> str:
    """cuobjdump or nvdisasm, as they come with Triton."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
