"""Each operator declared once: schema, argument checks, fake function, dispatch, gradient.

The operators take tensors as the user has them, any leading shape and any strides; a backend receives exactly the
arguments of the schema less the last one, which names the backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvq.backends import plain, select
from fastvq.backends.reference import working_dtype
from fastvq.direct import Differentiable, Operator

METRICS = ("euclidean", "cosine", "dot")
PRECISIONS = ("exact", "fast")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_lib = torch.library.Library("fastvq", "DEF")

# ---- argument checks --------------------------------------------------------------------------------------------


def _shape(t: Tensor) -> str:
    return "(" + ", ".join(str(s) for s in t.shape) + ("," if t.dim() == 1 else "") + ")"


def check_tensors(**values: object) -> None:
    """TypeError unless each value is a tensor that lies in strided memory."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")
        if value.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor (torch.strided); got {value.layout}")


def check_numbers(**values: object) -> None:
    """TypeError unless each value is a real number."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
            raise TypeError(f"{name} must be a float; got {type(value).__name__}")


def check_integers(**values: object) -> None:
    """TypeError unless each value is an integer."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{name} must be an integer; got {type(value).__name__}")


def check_strings(**values: object) -> None:
    """TypeError unless each value is a string."""
    for name, value in values.items():
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a string; got {type(value).__name__}")


def check_backend(backend: object) -> None:
    """TypeError or ValueError unless `backend` is None or a backend's name."""
    if backend is not None:
        select.check_name(backend)


def _check_float(name: str, t: Tensor) -> None:
    if t.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64; got {t.dtype}")


def _check_device(name: str, t: Tensor, like_name: str, like: Tensor) -> None:
    if t.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}; got {t.device}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def _check_shape(name: str, t: Tensor, want: torch.Size | tuple[int, ...], why: str) -> None:
    if tuple(t.shape) != tuple(want):
        raise ValueError(f"{name} must have shape {tuple(want)}, {why}; got {_shape(t)}")


def _check_rows_and_codebook(x: Tensor, codebook: Tensor, name: str, dims: tuple[int, int], layout: str) -> None:
    """x (..., D) against codebook (..., K, D); `dims` without and with the leading heads."""
    _check_float("x", x)
    _check_float(name, codebook)
    _check_device(name, codebook, "x", x)
    if codebook.dim() not in dims:
        raise ValueError(f"{name} must have shape {layout}; got {_shape(codebook)}")
    if x.dim() == 0:
        raise ValueError(f"x must have shape (..., D) with D = {codebook.shape[-1]}; got a tensor without dimensions")
    if codebook.shape[-2] == 0:
        raise ValueError(f"{name} must hold at least one code; got shape {_shape(codebook)}, so K = 0")
    if x.shape[-1] == 0:
        raise ValueError(f"x must have shape (..., D) with D at least 1; got {_shape(x)}")
    if x.shape[-1] != codebook.shape[-1]:
        raise ValueError(
            f"x must have D = {codebook.shape[-1]} in its last dimension, as {name} {_shape(codebook)} has; "
            f"got {_shape(x)}"
        )
    if codebook.dim() == dims[1] and (x.dim() < 2 or x.shape[0] != codebook.shape[0]):
        raise ValueError(
            f"x must have shape (H, ..., D) with H = {codebook.shape[0]}, as {name} {_shape(codebook)} has a codebook "
            f"a head; got {_shape(x)}"
        )


def _check_mask(mask: Tensor | None, x: Tensor) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool; got {mask.dtype}")
    _check_shape("mask", mask, x.shape[:-1], "that of x without its last dimension")
    _check_device("mask", mask, "x", x)


def _check_search(x: Tensor, codebook: Tensor, metric: str) -> None:
    _check_rows_and_codebook(x, codebook, "codebook", (2, 3), "(K, D) or (H, K, D)")
    _check_choice("metric", metric, METRICS)


def _check_code_sums(x: Tensor, indices: Tensor, codebook_size: int, mask: Tensor | None, per_head: bool) -> None:
    _check_float("x", x)
    if x.dim() < (2 if per_head else 1) or x.shape[-1] == 0:
        layout = "(H, ..., D)" if per_head else "(..., D)"
        raise ValueError(f"x must have shape {layout} with D at least 1; got {_shape(x)}")
    if indices.dtype != torch.int64:
        raise TypeError(f"indices must be int64; got {indices.dtype}")
    _check_shape("indices", indices, x.shape[:-1], "that of x without its last dimension")
    _check_device("indices", indices, "x", x)
    if codebook_size < 1:
        raise ValueError(f"codebook_size must be at least 1; got {codebook_size}")
    _check_mask(mask, x)


def _check_apart(name: str, t: Tensor) -> None:
    strides = t.stride()
    if 0 in strides and any(s == 0 and size > 1 for s, size in zip(strides, t.shape, strict=True)):
        raise ValueError(f"{name} must not overlap itself, being updated in place; got strides {strides}")


def _check_ema(
    codebook: Tensor, cluster_size: Tensor, embed_avg: Tensor, counts: Tensor, sums: Tensor, decay: float, eps: float
) -> None:
    if codebook.dim() not in (2, 3):
        raise ValueError(f"codebook must have shape (K, D) or (H, K, D); got {_shape(codebook)}")
    if codebook.shape[-2] == 0:
        raise ValueError(f"codebook must hold at least one code; got shape {_shape(codebook)}, so K = 0")
    shape, sizes = codebook.shape, codebook.shape[:-1]
    for name, tensor, want in (
        ("codebook", codebook, shape),
        ("cluster_size", cluster_size, sizes),
        ("embed_avg", embed_avg, shape),
        ("counts", counts, sizes),
        ("sums", sums, shape),
    ):
        _check_float(name, tensor)
        if tensor.shape != want:  # asked here: the words take longer than the question
            _check_shape(name, tensor, want, f"to go with codebook {_shape(codebook)}")
        _check_device(name, tensor, "codebook", codebook)
    for name, tensor in (("codebook", codebook), ("cluster_size", cluster_size), ("embed_avg", embed_avg)):
        _check_apart(name, tensor)
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay must be from 0 to 1; got {decay}")
    if not eps >= 0.0:
        raise ValueError(f"eps must be at least 0; got {eps}")


def _check_ema_step(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor,
    counts: Tensor,
    x: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    decay: float,
    eps: float,
) -> None:
    _check_ema(codebook, cluster_size, embed_avg, counts, codebook, decay, eps)
    _check_apart("counts", counts)
    _check_rows_and_codebook(x, codebook, "codebook", (2, 3), "(K, D) or (H, K, D)")
    _check_code_sums(x, indices, codebook.shape[-2], mask, codebook.dim() == 3)


def _check_residual(x: Tensor, codebooks: Tensor, metric: str) -> None:
    _check_rows_and_codebook(x, codebooks, "codebooks", (3, 4), "(Q, K, D) or (H, Q, K, D)")
    if codebooks.shape[-3] == 0:
        raise ValueError(f"codebooks must hold at least one stage; got shape {_shape(codebooks)}, so Q = 0")
    _check_choice("metric", metric, METRICS)


# ---- declaration ------------------------------------------------------------------------------------------------


direct: dict[str, Operator] = {}  # how fastvq itself calls each operator


def _declare(schema: str, check: Any, fake: Any) -> None:
    """Define one operator: `check` runs before every call, traced or real; `fake` gives the outputs' shapes."""
    name = schema[: schema.index("(")]
    anyone: Any = getattr(plain, name, None)
    _lib.define(schema)

    def run(*args: Any) -> Any:
        *arguments, backend = args
        check(*arguments)
        serving = select.backend_for(backend, arguments[0].device, None if anyone else (name, arguments))
        serve: Any = getattr(serving, name, None)
        if serve is not None:
            return serve(*arguments)
        with select.use_backend(select.requested(backend)):  # for the operators that it calls
            return anyone(*arguments)

    def trace(*args: Any) -> Any:
        *arguments, backend = args
        select.requested(backend)
        check(*arguments)
        return fake(*arguments)

    _lib.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastvq::{name}", trace, lib=_lib)
    direct[name] = Operator(name, run)


def _differentiate(name: str, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Give an operator a gradient, by the two functions that `torch.library.register_autograd` takes."""
    torch.library.register_autograd(f"fastvq::{name}", backward, setup_context=setup, lib=_lib)
    direct[name] = Differentiable(name, direct[name].run, setup, backward)


# search -----------------------------------------------------------------------------------------------------------


def _check_search_call(x: Tensor, codebook: Tensor, metric: str, return_distance: bool, precision: str) -> None:
    _check_search(x, codebook, metric)
    _check_choice("precision", precision, PRECISIONS)


def _search_fake(
    x: Tensor, codebook: Tensor, metric: str, return_distance: bool, precision: str
) -> tuple[Tensor, Tensor]:
    indices = x.new_empty(x.shape[:-1], dtype=torch.int64)
    distances = x.new_empty(x.shape[:-1] if return_distance else (0,), dtype=working_dtype(x, codebook))
    return indices, distances


_declare(
    "search(Tensor x, Tensor codebook, str metric, bool return_distance, str precision, str? backend)"
    " -> (Tensor, Tensor)",
    _check_search_call,
    _search_fake,
)

# vector_quantize --------------------------------------------------------------------------------------------------


def _check_vector_quantize(
    x: Tensor, codebook: Tensor, metric: str, commitment_weight: float, codebook_weight: float, mask: Tensor | None
) -> None:
    _check_search(x, codebook, metric)
    _check_mask(mask, x)


def _vector_quantize_fake(
    x: Tensor, codebook: Tensor, metric: str, commitment_weight: float, codebook_weight: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape[:-1], dtype=torch.int64),
        x.new_empty((), dtype=working_dtype(x, codebook)),
    )


_declare(
    "vector_quantize(Tensor x, Tensor codebook, str metric, float commitment_weight, float codebook_weight,"
    " Tensor? mask, str? backend) -> (Tensor, Tensor, Tensor)",
    _check_vector_quantize,
    _vector_quantize_fake,
)


def _vector_quantize_counted_fake(x: Tensor, codebook: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    counts = codebook.new_empty(codebook.shape[:-1], dtype=torch.int64)
    return *_vector_quantize_fake(x, codebook, *rest), counts


# An operator of its own, since a fourth output takes a small call some 2 us, and 7 where there is a gradient.
_declare(
    "vector_quantize_counted(Tensor x, Tensor codebook, str metric, float commitment_weight, float codebook_weight,"
    " Tensor? mask, str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _check_vector_quantize,
    _vector_quantize_counted_fake,
)


def _check_nothing(*arguments: Any) -> None:
    """Operators that autograd or a layer calls, with what a forward one has checked and given."""


def _gradients_fake(x: Tensor, codebook: Tensor, need_x: bool, need_codebook: bool) -> tuple[Tensor, Tensor]:
    """A gradient that is not needed is an empty tensor."""
    return x.new_empty(x.shape if need_x else (0,)), codebook.new_empty(codebook.shape if need_codebook else (0,))


def _or_none(gradient: Tensor, needed: bool) -> Tensor | None:
    return gradient if needed else None


def _vector_quantize_backward_fake(
    grad_quantized: Tensor, grad_loss: Tensor, x: Tensor, codebook: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return _gradients_fake(x, codebook, *rest[-2:])


_declare(
    "vector_quantize_backward(Tensor grad_quantized, Tensor grad_loss, Tensor x, Tensor codebook, Tensor indices,"
    " Tensor? mask, float commitment_weight, float codebook_weight, bool need_x, bool need_codebook, str? backend)"
    " -> (Tensor, Tensor)",
    _check_nothing,
    _vector_quantize_backward_fake,
)


def _vector_quantize_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, codebook, _, ctx.commitment_weight, ctx.codebook_weight, mask, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1::2])  # indices, and counts if there are
    ctx.set_materialize_grads(False)  # or zeros are made for these too
    ctx.save_for_backward(x, codebook, output[1], mask)


def _vector_quantize_grad(
    ctx: Any, grad_quantized: Tensor | None, _: Any, grad_loss: Tensor | None, *counts: Any
) -> tuple[Tensor | None, ...]:
    x, codebook, indices, mask = ctx.saved_tensors
    if grad_quantized is None:
        grad_quantized = torch.zeros_like(x)
    if grad_loss is None:
        grad_loss = x.new_zeros((), dtype=working_dtype(x, codebook))
    need_x, need_codebook = ctx.needs_input_grad[:2]
    weights = ctx.commitment_weight, ctx.codebook_weight
    grad_x, grad_codebook = direct["vector_quantize_backward"](
        grad_quantized, grad_loss, x, codebook, indices, mask, *weights, need_x, need_codebook, ctx.backend
    )
    return _or_none(grad_x, need_x), _or_none(grad_codebook, need_codebook), None, None, None, None, None


for _name in ("vector_quantize", "vector_quantize_counted"):
    _differentiate(_name, _vector_quantize_setup, _vector_quantize_grad)


def _no_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Nothing is kept: there is no gradient to compute."""


def _refuse_second_derivative(ctx: Any, *gradients: Any) -> Any:
    raise RuntimeError("fastvq operators have no second derivatives")


_differentiate("vector_quantize_backward", _no_setup, _refuse_second_derivative)

# code_sums --------------------------------------------------------------------------------------------------------


def _code_sums_fake(
    x: Tensor, indices: Tensor, codebook_size: int, mask: Tensor | None, per_head: bool
) -> tuple[Tensor, Tensor]:
    heads = tuple(x.shape[:1]) if per_head else ()
    dtype = working_dtype(x)
    return (
        x.new_empty((*heads, codebook_size), dtype=dtype),
        x.new_empty((*heads, codebook_size, x.shape[-1]), dtype=dtype),
    )


_declare(
    "code_sums(Tensor x, Tensor indices, int codebook_size, Tensor? mask, bool per_head, str? backend)"
    " -> (Tensor, Tensor)",
    _check_code_sums,
    _code_sums_fake,
)

# ema_update_ ------------------------------------------------------------------------------------------------------

_declare(
    "ema_update_(Tensor(a!) codebook, Tensor(b!) cluster_size, Tensor(c!) embed_avg, Tensor counts, Tensor sums,"
    " float decay, float eps, str? backend) -> ()",
    _check_ema,
    lambda *arguments: None,
)

_declare(
    "ema_step_(Tensor(a!) codebook, Tensor(b!) cluster_size, Tensor(c!) embed_avg, Tensor(d!) counts, Tensor x,"
    " Tensor indices, Tensor? mask, float decay, float eps, str? backend) -> ()",
    _check_ema_step,
    lambda *arguments: None,
)

# residual_quantize ------------------------------------------------------------------------------------------------


def _residual_quantize_fake(x: Tensor, codebooks: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor]:
    stages = codebooks.shape[-3]
    return (
        x.new_empty(x.shape),
        x.new_empty((*x.shape[:-1], stages), dtype=torch.int64),
        x.new_empty((stages,), dtype=working_dtype(x, codebooks)),
    )


_declare(
    "residual_quantize(Tensor x, Tensor codebooks, str metric, str? backend) -> (Tensor, Tensor, Tensor)",
    _check_residual,
    _residual_quantize_fake,
)


def _residual_quantize_backward_fake(
    grad_quantized: Tensor, grad_losses: Tensor, x: Tensor, codebooks: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return _gradients_fake(x, codebooks, *rest[-2:])


_declare(
    "residual_quantize_backward(Tensor grad_quantized, Tensor grad_losses, Tensor x, Tensor codebooks,"
    " Tensor indices, bool need_x, bool need_codebooks, str? backend) -> (Tensor, Tensor)",
    _check_nothing,
    _residual_quantize_backward_fake,
)


def _residual_quantize_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, codebooks, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, codebooks, output[1])


def _residual_quantize_grad(
    ctx: Any, grad_quantized: Tensor | None, _: Any, grad_losses: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, codebooks, indices = ctx.saved_tensors
    if grad_quantized is None:
        grad_quantized = torch.zeros_like(x)
    if grad_losses is None:
        grad_losses = x.new_zeros(codebooks.shape[-3], dtype=working_dtype(x, codebooks))
    need_x, need_codebooks = ctx.needs_input_grad[:2]
    grad_x, grad_codebooks = direct["residual_quantize_backward"](
        grad_quantized, grad_losses, x, codebooks, indices, need_x, need_codebooks, ctx.backend
    )
    return _or_none(grad_x, need_x), _or_none(grad_codebooks, need_codebooks), None, None


_differentiate("residual_quantize", _residual_quantize_setup, _residual_quantize_grad)
_differentiate("residual_quantize_backward", _no_setup, _refuse_second_derivative)

# what a layer learns from, and the rotated gradients of several stages ------------------------------------------------

_declare(
    "finite_code_sums(Tensor x, Tensor indices, int codebook_size, Tensor? mask, bool per_head, str? backend)"
    " -> (Tensor, Tensor)",
    _check_nothing,
    _code_sums_fake,
)
_declare(
    "residual_code_sums(Tensor x, Tensor codebooks, Tensor indices, str? backend) -> (Tensor, Tensor)",
    _check_nothing,
    lambda x, codebooks, indices: (
        x.new_empty(codebooks.shape[:-1], dtype=working_dtype(x, codebooks)),
        x.new_empty(codebooks.shape, dtype=working_dtype(x, codebooks)),
    ),
)
_declare(
    "rotate_back(Tensor gradient, Tensor x, Tensor codes, Tensor? indices, str? backend) -> Tensor",
    _check_nothing,
    lambda gradient, x, codes, indices: x.new_empty(x.shape),
)

# a copy that compilers leave alone -----------------------------------------------------------------------------------


def _copied_grad(ctx: Any, gradient: Tensor) -> Tensor:
    return gradient


# torch 2.13's inductor takes `clone` for nothing, and hands backward the codes that the same graph has overwritten.
_lib.define("copied(Tensor x) -> Tensor")
_lib.impl("copied", Tensor.clone, "CompositeExplicitAutograd")
torch.library.register_fake("fastvq::copied", Tensor.clone, lib=_lib)
torch.library.register_autograd("fastvq::copied", _copied_grad, setup_context=_no_setup, lib=_lib)


def copied(x: Tensor) -> Tensor:
    """`x.clone()`, in a compiled graph too."""
    copy: Tensor = torch.ops.fastvq.copied(x) if torch.compiler.is_compiling() else x.clone()
    return copy
