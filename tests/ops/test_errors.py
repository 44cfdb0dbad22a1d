"""Bad input is refused by name: which argument, what came, what is needed."""

import os
import subprocess
import sys

import pytest
import torch

import fastvq
from fastvq.backends import select

N, K, D, H, Q = 6, 5, 4, 3, 2


def rows(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


X, CODES, CODEBOOKS = rows(N, D), rows(K, D), rows(Q, K, D)
INDICES, MASK = rows(N, dtype=torch.int64), rows(N, dtype=torch.bool)


def search(x=X, codebook=CODES, **options):
    return fastvq.search(x, codebook, **options)


def vector_quantize(x=X, codebook=CODES, **options):
    return fastvq.vector_quantize(x, codebook, **options)


def residual_quantize(x=X, codebooks=CODEBOOKS, **options):
    return fastvq.residual_quantize(x, codebooks, **options)


def code_sums(x=X, indices=INDICES, codebook_size=K, **options):
    return fastvq.code_sums(x, indices, codebook_size, **options)


def ema_update_(**changes):
    state = {"codebook": CODES, "cluster_size": rows(K), "embed_avg": CODES, "counts": rows(K), "sums": CODES}
    options = {key: value for key, value in changes.items() if key not in state}
    state |= {key: value for key, value in changes.items() if key in state}
    return fastvq.ema_update_(*(t.clone() if isinstance(t, torch.Tensor) else t for t in state.values()), **options)


def ema_step_(x=X, indices=INDICES, **changes):
    state = {"codebook": CODES, "cluster_size": rows(K), "embed_avg": CODES}
    state |= {key: changes.pop(key) for key in state if key in changes}
    given = (t.clone() if isinstance(t, torch.Tensor) else t for t in state.values())
    return fastvq.ema_step_(*given, x, indices, **changes)


FUNCTIONS = {
    "search": search,
    "vector_quantize": vector_quantize,
    "residual_quantize": residual_quantize,
    "code_sums": code_sums,
    "ema_update_": lambda **options: ema_update_(**{"decay": 0.9} | options),
    "ema_step_": lambda **options: ema_step_(**{"decay": 0.9} | options),
}
# The name of the codebook argument, and the leading dimensions it has.
CODEBOOK = {"search": "codebook", "vector_quantize": "codebook", "residual_quantize": "codebooks"}


def refused(function, error, message, **arguments):
    with pytest.raises(error, match=message) as caught:
        function(**arguments)
    # Not some subclass that comes from somewhere below, and no second error behind the first.
    assert caught.type in (error, fastvq.BackendUnavailableError)
    assert "\n" not in str(caught.value)


def test_what_the_table_starts_from_is_accepted():
    for name, function in FUNCTIONS.items():
        function()
        if name != "ema_update_":
            function(x=rows(N, D))


# ---- rows and codes ---------------------------------------------------------------------------------------------

BAD_DTYPES = (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", BAD_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["search", "vector_quantize", "residual_quantize", "code_sums", "ema_step_"])
def test_rows_that_are_not_floating(name, dtype):
    refused(FUNCTIONS[name], TypeError, f"^x must be float32, .*; got {dtype}$", x=torch.ones(N, D).to(dtype))


@pytest.mark.parametrize("dtype", BAD_DTYPES, ids=str)
@pytest.mark.parametrize("name", CODEBOOK)
def test_codes_that_are_not_floating(name, dtype):
    codes = (CODEBOOKS if name == "residual_quantize" else CODES).to(dtype)
    argument = CODEBOOK[name]
    refused(FUNCTIONS[name], TypeError, f"^{argument} must be float32, .*; got {dtype}$", **{argument: codes})


@pytest.mark.parametrize("value", [None, [[1.0] * D] * N, 3.0, "rows"], ids=lambda v: type(v).__name__)
@pytest.mark.parametrize(
    ("name", "argument"),
    [
        *[(name, "x") for name in ("search", "vector_quantize", "residual_quantize", "code_sums", "ema_step_")],
        *CODEBOOK.items(),
        ("code_sums", "indices"),
        *[("ema_update_", key) for key in ("codebook", "cluster_size", "embed_avg", "counts", "sums")],
        *[("ema_step_", key) for key in ("codebook", "cluster_size", "embed_avg", "indices")],
    ],
)
def test_what_is_no_tensor(name, argument, value):
    message = f"^{argument} must be a torch.Tensor; got {type(value).__name__}$"
    refused(FUNCTIONS[name], TypeError, message, **{argument: value})


def codes_of(name, *shape):
    """A codebook of the shape, under one more leading dimension where there are stages."""
    return {CODEBOOK[name]: rows(*((Q, *shape) if name == "residual_quantize" else shape))}


@pytest.mark.parametrize("name", CODEBOOK)
def test_shapes_of_rows_and_codes(name):
    function, argument = FUNCTIONS[name], CODEBOOK[name]
    refused(function, ValueError, rf"^x must have D = {D} in its last dimension.*got \(6, 7\)", x=rows(N, 7))
    refused(function, ValueError, rf"^x must have D = 9 .*{argument}.*got \(6, 4\)", **codes_of(name, K, 9))
    refused(function, ValueError, f"^{argument} must hold at least one code.*K = 0", **codes_of(name, 0, D))
    refused(function, ValueError, r"^x must have shape \(\.\.\., D\).*without dimensions", x=rows())
    both = {"x": rows(N, 0), **codes_of(name, K, 0)}
    refused(function, ValueError, r"^x must have .*D at least 1; got \(6, 0\)", **both)
    refused(function, ValueError, rf"^{argument} must have shape .*K, D\).*; got", **{argument: rows(D)})
    refused(function, ValueError, rf"^{argument} must have shape .*K, D\).*; got", **{argument: rows(2, 2, 2, K, D)})


@pytest.mark.parametrize("name", CODEBOOK)
def test_a_codebook_a_head_needs_rows_a_head(name):
    codes = {CODEBOOK[name]: rows(*((H, Q, K, D) if name == "residual_quantize" else (H, K, D)))}
    function = FUNCTIONS[name]
    refused(
        function,
        ValueError,
        r"^x must have shape \(H, \.\.\., D\) with H = 3.*got \(2, 6, 4\)",
        x=rows(2, N, D),
        **codes,
    )
    refused(function, ValueError, r"^x must have shape \(H, \.\.\., D\) with H = 3.*got \(4,\)", x=rows(D), **codes)


def test_no_stages():
    refused(residual_quantize, ValueError, "^codebooks must hold at least one stage.*Q = 0", codebooks=rows(0, K, D))


@pytest.mark.parametrize("name", CODEBOOK)
def test_mixed_devices(name):
    argument = CODEBOOK[name]
    codes = (CODEBOOKS if name == "residual_quantize" else CODES).to("meta")
    refused(FUNCTIONS[name], ValueError, f"^{argument} must be on the device of x, cpu; got meta$", **{argument: codes})


def test_mixed_devices_of_other_arguments():
    meta = {"device": "meta"}
    message = "must be on the device of x, cpu; got meta$"
    refused(code_sums, ValueError, f"^indices {message}", indices=INDICES.to("meta"))
    refused(code_sums, ValueError, f"^mask {message}", mask=MASK.to("meta"))
    refused(vector_quantize, ValueError, f"^mask {message}", mask=MASK.to("meta"))
    for argument, shape in (("cluster_size", (K,)), ("embed_avg", (K, D)), ("counts", (K,)), ("sums", (K, D))):
        message = f"^{argument} must be on the device of codebook, cpu; got meta$"
        refused(ema_update_, ValueError, message, decay=0.9, **{argument: rows(*shape, **meta)})


@pytest.mark.parametrize("name", CODEBOOK)
def test_sparse_tensors(name):
    argument = CODEBOOK[name]
    codes = (CODEBOOKS if name == "residual_quantize" else CODES).to_sparse()
    refused(FUNCTIONS[name], TypeError, "^x must be .*got.*sparse", x=X.to_sparse())
    refused(FUNCTIONS[name], TypeError, f"^{argument} must be .*got.*sparse", **{argument: codes})


# ---- choices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODEBOOK)
def test_unknown_metric(name):
    message = "^metric must be one of euclidean, cosine, dot; got 'manhattan'$"
    refused(FUNCTIONS[name], ValueError, message, metric="manhattan")


def test_unknown_precision():
    refused(search, ValueError, "^precision must be one of exact, fast; got 'half'$", precision="half")


@pytest.mark.parametrize(
    ("argument", "value"),
    [("metric", None), ("metric", 2), ("precision", None), ("precision", 1)],
)
def test_choices_that_are_no_strings(argument, value):
    refused(search, TypeError, f"^{argument} must be a string.*got {type(value).__name__}$", **{argument: value})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_unknown_backend(name):
    names = "auto, reference, cpu, triton, cuda"
    refused(FUNCTIONS[name], ValueError, f"^backend must be one of {names}; got 'gpu'$", backend="gpu")
    refused(FUNCTIONS[name], TypeError, f"^backend must be a string, one of {names}; got int$", backend=3)


def test_unknown_backend_of_the_context_and_the_environment(monkeypatch):
    with pytest.raises(ValueError, match=r"^backend must be one of .*; got 'gpu'$"), fastvq.use_backend("gpu"):
        pass
    with pytest.raises(TypeError, match=r"^backend must be a string.*; got NoneType$"), fastvq.use_backend(None):
        pass
    monkeypatch.setenv("FASTVQ_BACKEND", "gpu")
    for function in FUNCTIONS.values():
        refused(function, ValueError, "^FASTVQ_BACKEND must be one of .*; got 'gpu'$")
    search(backend="reference")  # who names a backend does not ask the environment


@pytest.fixture
def _no_interpreter(monkeypatch):
    """As outside the tests, where Triton needs a device."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    select.missing.cache_clear()
    yield
    select.missing.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.usefixtures("_no_interpreter")
def test_backends_that_are_not_there_say_what_is_missing(name):
    for backend, missing in (("triton", "Triton"), ("cuda", "CUDA")):
        message = rf"^backend '{backend}' is not available: .*{missing}"
        refused(FUNCTIONS[name], fastvq.BackendUnavailableError, message, backend=backend)
        with fastvq.use_backend(backend):
            refused(FUNCTIONS[name], fastvq.BackendUnavailableError, message)


def test_a_build_without_the_extension_falls_back_with_one_warning(tmp_path):
    code = (
        "import sys, warnings\nsys.modules['fastvq._cpu'] = None\nimport torch, fastvq\n"
        "x, c = torch.randn(9, 4), torch.randn(5, 4)\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    assert torch.equal(fastvq.search(x, c), fastvq.search(x, c, backend='reference'))\n"
        "    fastvq.search(x, c)\n"
        "assert len(seen) == 1, seen\nassert 'slow reference backend' in str(seen[0].message)\n"
        "try:\n    fastvq.search(x, c, backend='cpu')\n"
        "except fastvq.BackendUnavailableError as error:\n    assert \"backend 'cpu' is not available\" in str(error)\n"
        "else:\n    raise SystemExit('not refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]


# ---- masks and indices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vector_quantize", "code_sums"])
def test_masks(name):
    function = FUNCTIONS[name]
    for dtype in (torch.float32, torch.int64, torch.uint8):
        refused(function, TypeError, f"^mask must be bool; got {dtype}$", mask=rows(N, dtype=dtype))
    for shape in ((N - 1,), (N, 1), (N, D), ()):
        message = rf"^mask must have shape \({N},\).*; got \({', '.join(map(str, shape))}"
        refused(function, ValueError, message, mask=rows(*shape, dtype=torch.bool))
    refused(function, TypeError, "^mask must be a torch.Tensor; got list$", mask=[True] * N)


def test_indices():
    for dtype in (torch.int32, torch.float32, torch.bool):
        refused(code_sums, TypeError, f"^indices must be int64; got {dtype}$", indices=rows(N, dtype=dtype))
    for shape in ((N - 1,), (N, 1), ()):
        message = rf"^indices must have shape \({N},\).*; got \({', '.join(map(str, shape))}"
        refused(code_sums, ValueError, message, indices=rows(*shape, dtype=torch.int64))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("index", [K, K + 1, 2**62])
def test_an_index_past_the_codebook(backend, index):
    message = rf"^indices must be below codebook_size = {K}; got {index}$"
    refused(code_sums, ValueError, message, indices=torch.tensor([0, 1, 2, 3, 4, index]), backend=backend)


def test_sizes_of_code_sums():
    for size in (0, -3):
        refused(code_sums, ValueError, f"^codebook_size must be at least 1; got {size}$", codebook_size=size)
    for size in (2.5, "5", None):
        message = f"^codebook_size must be an int.*got {type(size).__name__}$"
        refused(code_sums, TypeError, message, codebook_size=size)
    scalar = {"indices": rows(dtype=torch.int64)}
    refused(code_sums, ValueError, r"^x must have shape \(\.\.\., D\).*got \(\)$", x=rows(), **scalar)
    refused(code_sums, ValueError, r"^x must have .*D at least 1; got \(6, 0\)$", x=rows(N, 0))
    message = r"^x must have shape \(H, \.\.\., D\).*got \(4,\)$"
    refused(code_sums, ValueError, message, x=rows(D), per_head=True, **scalar)


# ---- numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["commitment_weight", "codebook_weight"])
@pytest.mark.parametrize("value", ["1", None, [1.0]], ids=lambda v: type(v).__name__)
def test_weights_that_are_no_numbers(argument, value):
    message = f"^{argument} must be a float.*got {type(value).__name__}$"
    refused(vector_quantize, TypeError, message, **{argument: value})


def test_decay_and_eps():
    for decay in (-0.1, 1.5, float("nan")):
        refused(ema_update_, ValueError, f"^decay must be from 0 to 1; got {decay}$", decay=decay)
    for eps in (-1e-9, float("nan")):
        refused(ema_update_, ValueError, f"^eps must be at least 0; got {eps}$", decay=0.9, eps=eps)
    for value in ("0.9", None):
        kind = type(value).__name__
        refused(ema_update_, TypeError, f"^decay must be a float.*got {kind}$", decay=value)
        refused(ema_update_, TypeError, f"^eps must be a float.*got {kind}$", decay=0.9, eps=value)


# ---- EMA state --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["cluster_size", "embed_avg", "counts", "sums"])
def test_shapes_and_dtypes_of_the_state(argument):
    right = (K,) if argument in ("cluster_size", "counts") else (K, D)
    for shape in ((K + 1,), (K, D + 1), (1, K), ()):
        wanted = ", ".join(map(str, right))
        message = rf"^{argument} must have shape \({wanted},?\), to go with codebook \(5, 4\); got \("
        refused(ema_update_, ValueError, message, decay=0.9, **{argument: rows(*shape)})
    for dtype in (torch.int64, torch.complex64):
        message = f"^{argument} must be float32, .*; got {dtype}$"
        refused(ema_update_, TypeError, message, decay=0.9, **{argument: rows(*right, dtype=dtype)})


def test_codebooks_of_the_update():
    message = r"^codebook must have shape \(K, D\) or \(H, K, D\); got \("
    for shape in ((D,), (), (1, 1, K, D)):
        refused(ema_update_, ValueError, message, decay=0.9, codebook=rows(*shape))
    message = "^codebook must hold at least one code.*K = 0"
    refused(ema_update_, ValueError, message, decay=0.9, codebook=rows(0, D))
    integer = {"codebook": CODES.long()}
    refused(ema_update_, TypeError, "^codebook must be float32, .*; got torch.int64$", decay=0.9, **integer)


def test_what_a_step_learns_from():
    for shape in ((N, D + 1), (N,), ()):
        refused(FUNCTIONS["ema_step_"], ValueError, "^x must have ", x=rows(*shape))
    refused(
        FUNCTIONS["ema_step_"],
        ValueError,
        "^x must have shape \\(H, ",
        codebook=rows(3, K, D),
        cluster_size=rows(3, K),
        embed_avg=rows(3, K, D),
    )
    refused(FUNCTIONS["ema_step_"], ValueError, "^indices must have shape ", indices=INDICES[:-1])
    refused(FUNCTIONS["ema_step_"], TypeError, "^indices must be int64; got torch.int32$", indices=INDICES.int())
    refused(FUNCTIONS["ema_step_"], TypeError, "^mask must be bool; got torch.float32$", mask=rows(N))
    refused(FUNCTIONS["ema_step_"], ValueError, "^mask must have shape ", mask=torch.ones(N + 1) > 0)
    refused(FUNCTIONS["ema_step_"], ValueError, "^decay must be from 0 to 1; got 2.0$", decay=2.0)
    refused(FUNCTIONS["ema_step_"], ValueError, "^cluster_size must have shape ", cluster_size=rows(K + 1))


def test_state_that_overlaps_itself():
    """An expanded tensor has one place for many values: no update in place can be right."""
    tensors = [rows(K, D), rows(K), rows(K, D), rows(K), rows(K, D)]
    for position, argument in enumerate(("codebook", "cluster_size", "embed_avg")):
        given = list(tensors)
        given[position] = given[position][:1].expand(given[position].shape)
        with pytest.raises(ValueError, match=f"^{argument} must not overlap itself"):
            fastvq.ema_update_(*given, decay=0.9)
    counts = torch.zeros(1).expand(K)
    with pytest.raises(ValueError, match=r"^counts must not overlap itself"):
        torch.ops.fastvq.ema_step_(*tensors[:3], counts, X, INDICES, None, 0.9, 1e-5, None)


def test_a_refused_update_has_written_nothing(backend):
    tensors = [torch.ones(K, D), torch.ones(K), torch.ones(K, D), torch.ones(K), torch.ones(K, D + 1)]
    with pytest.raises(ValueError, match=r"^sums must have shape"):
        fastvq.ema_update_(*tensors, decay=0.5, backend=backend)
    assert all(t.eq(1).all() for t in tensors)
