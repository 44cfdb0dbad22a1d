"""Triton's interpreter, cured: bfloat16, fused multiply-add and reductions over NaN as the devices compute them.

The interpreter keeps a bfloat16 as its bits in a uint16 and then adds and compares the bits. Here a handle of type
bfloat16 always holds float32 values that a bfloat16 can represent: whatever an operation leaves in it is rounded to
nearest even, and only loads, stores and bitcasts see bits.
"""

import functools
import os
import warnings

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceOps, TensorHandle


def widen(bits):
    """float32 values of bfloat16 bits, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values):
    """bfloat16 bits of float32 values, rounded to nearest even; a NaN stays one."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), bits >> 16 | 0x40, rounded).astype(np.uint16).reshape(np.shape(values))


def _to_odd(rounded, error):
    """`rounded`, whose exact value is rounded + error, to odd: then a second rounding, to fewer bits, is right."""
    bits = rounded.view(f"i{rounded.itemsize}")
    inexact = np.isfinite(rounded) & (error != 0) & (bits & 1 == 0)
    # Towards the exact value: away from zero where both have one sign, else towards zero; either way the bits turn odd.
    step = np.where((error > 0) == (rounded > 0), 1, -1).astype(bits.dtype)
    return np.where(inexact, bits + step, bits).view(rounded.dtype)


def fused(x, y, z):
    """x * y + z of float32 arrays, rounded once: in float64 the product is exact and the sum rounded to odd."""
    product, addend = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
    total = product + addend
    back = total - product  # two-sum: `error` is what the addition lost, exactly
    return _to_odd(total, (product - (total - back)) + (addend - back)).astype(np.float32)


def _is_bfloat16(dtype):
    return not isinstance(dtype.scalar, tl.pointer_type) and dtype.scalar == tl.bfloat16


def _cure_bfloat16():
    np_dtype, validate = interpreter._get_np_dtype, TensorHandle.__post_init__
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    cast, fabs = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fabs

    @functools.cache  # Triton makes a table of all dtypes each time it is asked for one
    def np_dtype_of_scalar(dtype):
        return np.dtype(np.float32) if _is_bfloat16(dtype) else np_dtype(dtype)

    def get_np_dtype(dtype):
        return np_dtype(dtype.scalar) if isinstance(dtype.scalar, tl.pointer_type) else np_dtype_of_scalar(dtype.scalar)

    def normalise(self):
        if not _is_bfloat16(self.dtype):
            return validate(self)
        self.data = widen(narrow(np.asarray(self.data, dtype=np.float32)))
        return None

    def create_masked_load(self, ptrs, mask, other, *rest):
        if not _is_bfloat16(ptrs.get_element_ty()):
            return load(self, ptrs, mask, other, *rest)
        bits = np.zeros(ptrs.data.shape, np.uint16) if other is None else narrow(other.data)
        bits = interpreter._interpreter.load(ptrs.data, mask.data, bits, np.dtype(np.uint16))
        return TensorHandle(widen(bits), tl.bfloat16)

    def create_masked_store(self, ptrs, value, mask, *rest):
        if not _is_bfloat16(value.dtype):
            return store(self, ptrs, value, mask, *rest)
        return interpreter._interpreter.store(ptrs.data, narrow(value.data), mask.data)

    def cast_impl(self, src, dst_type):
        if not (_is_bfloat16(src.dtype) or _is_bfloat16(dst_type)):
            return cast(self, src, dst_type)
        data = src.data.astype(get_np_dtype(dst_type))
        if src.data.dtype == np.float64:
            data = _to_odd(data, src.data - data)
        return TensorHandle(data, dst_type.scalar)

    def create_bitcast(self, src, dst_type):
        data = narrow(src.data) if _is_bfloat16(src.dtype) else src.data
        if _is_bfloat16(dst_type):
            return TensorHandle(widen(data.view(np.uint16)), tl.bfloat16)
        return TensorHandle(data.view(np_dtype(dst_type)), dst_type.scalar)

    def create_fabs(self, arg):
        return TensorHandle(np.abs(arg.data), tl.bfloat16) if _is_bfloat16(arg.dtype) else fabs(self, arg)

    def unsupported(name):
        original = getattr(InterpreterBuilder, name)

        def refuse(self, *arguments):
            if any(isinstance(a, TensorHandle) and _is_bfloat16(a.dtype) for a in arguments):
                raise NotImplementedError(f"{name} on bfloat16 is not cured")
            return original(self, *arguments)

        return refuse

    for name in ("create_fp_to_fp", "create_atomic_rmw", "create_atomic_cas", "create_dot_scaled"):
        if hasattr(InterpreterBuilder, name):  # the last one only since Triton 3.7
            setattr(InterpreterBuilder, name, unsupported(name))
    interpreter._get_np_dtype = get_np_dtype
    TensorHandle.__post_init__ = normalise
    InterpreterBuilder.create_masked_load = create_masked_load
    InterpreterBuilder.create_masked_store = create_masked_store
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_bitcast = create_bitcast
    InterpreterBuilder.create_fabs = create_fabs
    InterpreterBuilder.get_bf16 = lambda self, value: TensorHandle(np.array([value], np.float32), tl.bfloat16)


def _cure_fma():
    def create_fma(self, x, y, z):
        if z.data.dtype != np.float32 or _is_bfloat16(z.dtype):
            raise NotImplementedError(f"fma of {z.dtype} is not cured")
        return TensorHandle(fused(x.data, y.data, z.data), z.dtype.scalar)

    InterpreterBuilder.create_fma = create_fma


def _cure_reductions():
    """min and max pass NaN over, and give NaN where there is nothing else, without a warning."""
    apply, standard = ReduceOps.apply_impl, tl.standard
    ufuncs = {standard._elementwise_min: np.fmin, standard._elementwise_max: np.fmax}

    def apply_impl(self, operands):
        ufunc = ufuncs.get(self.combine_fn)
        if ufunc is None:
            return apply(self, operands)
        return self.min_max(operands[0], lambda data, axis, keepdims: ufunc.reduce(data, axis=axis, keepdims=keepdims))

    ReduceOps.apply_impl = apply_impl


def _cure_scalars():
    """Triton 3.6 makes a number of an array with one element by int(), which NumPy 2.4 refuses."""
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, *rest):
        patch(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor


def _patch_once():
    """A launch patches Triton's language for a module's functions once, not at each call that one makes of another."""
    patch, call = interpreter._patch_lang, GridExecutor.__call__
    patched = set()

    def patch_lang(fn):
        module = fn.__globals__["__name__"]
        if module in patched:
            return None
        patched.add(module)
        return patch(fn)

    def launch(self, *arguments, **options):
        try:
            call(self, *arguments, **options)
        finally:
            patched.clear()

    interpreter._patch_lang = patch_lang
    GridExecutor.__call__ = launch


def _silence_overflow():
    """Overflow and NaN are results, not faults; numpy would warn of them, and pytest make errors of the warnings."""
    call = GridExecutor.__call__

    def quiet(self, *arguments, **options):
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            call(self, *arguments, **options)

    GridExecutor.__call__ = quiet


def _one_value_an_address(at, bits, writers, what):
    """AssertionError where neighbours in order of address are two writers' different values for one address."""
    if np.unique(at).size == at.size:
        return
    order = np.lexsort((writers, at))
    at, bits, writers = at[order], bits[order], writers[order]
    raced = (at[1:] == at[:-1]) & (bits[1:] != bits[:-1]) & (writers[1:] != writers[:-1])
    assert not raced.any(), f"race: {what} store different values at {raced.sum()} addresses"


def _refuse_races():
    """The interpreter stores in order, lane after lane and program after program; a device in any."""
    store, call = InterpreterBuilder.create_masked_store, GridExecutor.__call__
    written = []  # by the launch under way: addresses, bits and programs

    def create_masked_store(self, ptrs, value, mask, *rest):
        alive = np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)  # else 0 and 1 are places
        at, values = ptrs.data[alive], np.broadcast_to(value.data, ptrs.data.shape)[alive]
        bits = np.ascontiguousarray(values).view(f"u{values.itemsize}").astype(np.uint64)
        _one_value_an_address(at, bits, np.arange(at.size), "lanes of one store")
        x, y, z = self.grid_idx
        written.append((at, bits, np.full(at.size, x + (y << 24) + (z << 44))))
        return store(self, ptrs, value, mask, *rest)

    def launch(self, *arguments, **options):
        written.clear()
        call(self, *arguments, **options)
        if written:
            _one_value_an_address(*map(np.concatenate, zip(*written, strict=True)), "programs")

    InterpreterBuilder.create_masked_store = create_masked_store
    GridExecutor.__call__ = launch


def cure():
    """Patch Triton's interpreter, once a process; the kernels in use must be its own."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "must be set before the kernels are imported"
    if not hasattr(InterpreterBuilder, "get_bf16"):
        for remedy in (_cure_bfloat16, _cure_fma, _cure_reductions, _cure_scalars):
            remedy()
        for help_of_tests in (_patch_once, _silence_overflow, _refuse_races):
            help_of_tests()
