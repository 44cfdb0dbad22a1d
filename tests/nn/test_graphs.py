"""No host synchronisation in forward, so the layer compiles whole and exports."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from typing import Any

import pytest
import torch
from common import DIM, assert_same, pair, step
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

import fastvq

OPTIONS = {
    "ema": {},
    "straight through": {"rotation_trick": False},
    "cosine": {"use_cosine_sim": True},
    "dead codes": {"threshold_ema_dead_code": 3},
    "k-means": {"kmeans_init": True, "threshold_ema_dead_code": 3, "kmeans_iters": 2},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "heads": {"heads": 2, "codebook_dim": 3, "threshold_ema_dead_code": 3},
    "separate heads": {"heads": 2, "separate_codebook_per_head": True, "threshold_ema_dead_code": 3},
    "image": {"accept_image_fmap": True},
    "cross entropy": {"commitment_use_cross_entropy_loss": True, "heads": 2},
    "diversity": {"codebook_diversity_loss_weight": 0.1, "codebook_diversity_temperature": 2.0},
    "orthogonal": {
        "orthogonal_reg_weight": 0.1,
        "orthogonal_reg_active_codes_only": True,
        "orthogonal_reg_max_codes": 5,
    },
    "sampling": {"stochastic_sample_codes": True, "straight_through": True, "rotation_trick": False},
    "directional": {"directional_reparam": True, "threshold_ema_dead_code": 3},
    "affine": {"affine_param": True, "threshold_ema_dead_code": 3},
    "bridge": {"vq_bridge": nn.Linear(DIM, DIM)},
}
SYNCHRONISING = {
    *("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::is_nonzero"),
    *("aten::equal", "aten::unique_dim", "aten::_unique2", "aten::repeat_interleave.Tensor", "aten::bincount"),
}


class NoHostSync(TorchDispatchMode):
    """Fails on every operator whose result the host must wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name() not in SYNCHRONISING, f"{func.name()} waits for the device"
        if func.name().startswith("aten::index"):
            indices = [t for t in args[1] if t is not None] if isinstance(args[1], list | tuple) else []
            assert not any(t.dtype == torch.bool for t in indices), "indexing by a mask waits for the device"
        return func(*args, **(kwargs or {}))


def inputs(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    if name == "image":
        return torch.randn(2, DIM, 5, 4), {}
    return torch.randn(3, 15, DIM), {"mask": torch.arange(15) < torch.tensor([[15], [0], [9]])}


@pytest.mark.parametrize("forbidden", [bool, lambda t: t.item(), lambda t: t[t > 0], lambda t: t.nonzero()])
def test_the_detector_detects(forbidden: Any) -> None:
    with pytest.raises(AssertionError, match="waits for the device"), NoHostSync():
        forbidden(torch.ones(1))


@pytest.mark.parametrize(("name", "masked"), [*itertools.product(OPTIONS, ["", "mask"]), ("ema", "lens")])
def test_no_host_synchronisation(name: str, masked: str) -> None:
    layer, _ = pair(**OPTIONS[name])
    x, arguments = inputs(name)
    if masked == "lens" and arguments:
        arguments = {"lens": arguments["mask"].sum(1)}
    for _ in range(2):
        x = x.clone().requires_grad_()
        with NoHostSync():
            quantized, indices, loss = layer(x, **(arguments if masked else {}))
            (quantized.sum() + loss).backward()
    with NoHostSync():
        layer.get_output_from_indices(indices)
        for _ in range(2):
            if layer.heads == 1 and not layer.commitment_use_cross_entropy_loss:
                layer(x, topk=3, **(arguments if masked else {}))
            layer(x, indices=indices, **(arguments if masked else {}))
            layer.eval()(x, **(arguments if masked else {}))


@pytest.mark.parametrize("name", OPTIONS)
def test_compiles_whole(name: str) -> None:
    torch._dynamo.reset()
    plain, _ = pair(**OPTIONS[name])
    twin = copy.deepcopy(plain)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x, arguments = inputs(name)
    for _ in range(2):
        found = {name.replace("_orig_mod.", ""): value for name, value in step(compiled, x, **arguments).items()}
        assert_same(found, step(plain, x, **arguments))
    plain.eval(), compiled.eval()
    for mine, other in zip(compiled(x, **arguments), plain(x, **arguments), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(
    "layer",
    [
        fastvq.VectorQuantize(dim=DIM, codebook_size=9, decay=0.5),
        fastvq.VectorQuantize(dim=DIM, codebook_size=9, decay=0.5, threshold_ema_dead_code=3),
        fastvq.ResidualVQ(dim=DIM, codebook_size=9, decay=0.5, num_quantizers=1),
    ],
    ids=["ema", "dead codes", "one stage"],
)
def test_inductor_keeps_the_codes_that_backward_needs(layer: nn.Module) -> None:
    """The step overwrites them in the same graph, from which inductor drops copies: aot_eager does not."""
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True)
    for _ in range(2):
        x = torch.randn(3, 15, DIM)
        found = {name.replace("_orig_mod.", ""): value for name, value in step(compiled, x).items()}
        assert_same(found, step(layer, x))


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # by Dynamo
def test_an_in_place_optimizer_steps_between_two_graphs() -> None:
    """The graph breaks there, and where it must not the refusal names the step."""
    torch._dynamo.reset()
    options = {"learnable_codebook": True, "ema_update": False, "in_place_codebook_optimizer": partial(SGD, lr=1.0)}
    plain, _ = pair(**options)
    twin, _ = pair(**options)
    compiled, (x, _) = torch.compile(twin, backend="eager"), inputs("ema")
    for _ in range(2):
        found = {name.replace("_orig_mod.", ""): value for name, value in step(compiled, x).items()}
        assert_same(found, step(plain, x))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="_step_in_place"):
        torch.compile(pair(**options)[0], fullgraph=True, backend="eager")(x)


@pytest.mark.parametrize("name", [n for n in OPTIONS if n != "k-means"])
def test_exports(name: str) -> None:
    layer, _ = pair(**OPTIONS[name])
    x, arguments = inputs(name)
    layer.eval()
    exported = torch.export.export(layer, (x,), arguments).module()
    x = torch.randn(x.shape)
    for mine, other in zip(exported(x, **arguments), layer(x, **arguments), strict=True):
        torch.testing.assert_close(mine, other)


def test_exports_after_kmeans_and_with_any_batch_size() -> None:
    layer, _ = pair(kmeans_init=True)
    layer(torch.randn(4, 15, DIM))
    layer.eval()
    batch = {"x": {0: torch.export.Dim("batch", min=2, max=1024)}}
    exported = torch.export.export(layer, (torch.randn(4, 15, DIM),), dynamic_shapes=batch).module()
    x = torch.randn(9, 15, DIM)
    for mine, other in zip(exported(x), layer(x), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("name", ["ema", "learnable", "heads"])
def test_memory_does_not_grow_with_rows_times_codes(name: str) -> None:
    """No operator outside the backend returns a tensor of N x K, or of more than a few N x D and K x D."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                largest = max(largest, t.numel() if isinstance(t, Tensor) else 0)
            return out

    layer, _ = pair(**{"kmeans_init": True} | OPTIONS[name], codebook_size=500)
    x = torch.randn(1, 600, DIM, requires_grad=True)
    with Watch():
        quantized, _, loss = layer(x)
        (quantized.sum() + loss).backward()
    assert largest <= 600 * DIM * layer.heads
