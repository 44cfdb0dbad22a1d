"""vector-quantize-pytorch: its modules become fastvq's of the same name, on the same parameters and buffers.

The arguments that a module was made with are read from its attributes, and proven: the client's own class, made with
them once more, must have the same attributes.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

import fastvq
from fastvq.interop.patching import Client, FastModule, by_path, fast_class, known

Arguments = dict[str, Any]

_OWN = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training", "_client")
_IN_PLACE = "in_place_codebook_optimizer"  # holds the parameters themselves


class Converted(FastModule):
    """A client's module that holds fastvq's state, and what it held before beside parameters, buffers and modules."""

    whole = True
    our_class: type[nn.Module]
    _client: dict[str, Any]

    @classmethod
    def take_over(cls, module: nn.Module) -> str | None:
        """Turn the module and those within into fastvq's, or say why not."""
        name = cls.client_class.__name__
        arguments = ARGUMENTS[name](cast(Any, module))
        # As the client does it, silent faults too: only the speed is to change.
        compat = {} if name in _NEVER_WRONG else {"strict_compat": True}
        with torch.random.fork_rng(devices=[]):
            twin = cls.client_class(**arguments)
            try:
                ours = cls.our_class(**arguments, **compat)
                ours.load_state_dict(module.state_dict())  # what fastvq keeps beside its tensors follows from them
            except (ValueError, RuntimeError) as error:
                return " ".join(str(error).split())
        why = _difference(module, twin)
        if why is None:
            _convert(module, ours)
        return why

    def give_back(self) -> None:
        """Be the client's again, with the parameters, buffers, modules and hooks of now."""
        kept = self._client
        own = {**self._parameters, **self._buffers}
        device = next((t.device for t in own.values() if t is not None), None)
        tensors = {
            kind: {n: own[n] if n in own else _on(device, t) for n, t in kept[kind].items()}
            for kind in ("_parameters", "_buffers")
        }
        modules = {name: self._modules.get(name, module) for name, module in kept["_modules"].items()}
        hooks = {name: value for name, value in vars(self).items() if _is_hook(name)}
        state = {**kept, **tensors, "_modules": modules, **hooks, "training": self.training}
        self.__dict__.clear()
        self.__dict__.update(state)
        cast(Any, self).__class__ = self.client_class

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        return (_new, (self.client_class, self.our_class), *state)


def _new(client_class: type[nn.Module], our_class: type[nn.Module]) -> nn.Module:
    made: Any = _converted(client_class, our_class)
    return cast(nn.Module, made.__new__(made))


def _on(device: torch.device | None, tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or device is None else tensor.to(device)


def _is_hook(name: str) -> bool:
    return name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called", "_backward_hook"))


_classes: dict[tuple[type, type], type[Converted]] = {}


def _converted(client_class: type[nn.Module], our_class: type[nn.Module]) -> type[Converted]:
    """The class of a client's module that has become one of ours; also for parts that are never patched alone."""
    pair = (client_class, our_class)
    if pair not in _classes:
        client = known(client_class)
        if client is not None and client.fast.our_class is our_class:  # type: ignore[attr-defined]
            _classes[pair] = cast(type[Converted], fast_class(client_class))
        else:
            members = {
                "client_class": client_class,
                "our_class": our_class,
                "__doc__": f"{our_class.__name__} of fastvq",
            }
            _classes[pair] = type(client_class.__name__, (Converted, our_class, client_class), members)
    return _classes[pair]


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("fastvq.")


def _convert(module: nn.Module, ours: nn.Module) -> None:
    """Give `module` the attributes of `ours`, with its own parameters, buffers, modules and hooks."""
    for name, part in ours._modules.items():
        theirs = module._modules.get(name)
        if part is None or theirs is None or isinstance(theirs, FastModule):
            continue  # what two modules share is converted by now
        _convert(theirs, part)
    ours._modules.update({n: module._modules[n] for n in ours._modules if n in module._modules})
    if not _is_ours(ours):
        return
    own = {**module._parameters, **module._buffers}
    like = next((t for t in own.values() if t is not None), torch.empty(0))
    for kind in ("_parameters", "_buffers"):
        mine = vars(ours)[kind]
        for name, tensor in mine.items():
            mine[name] = own[name] if name in own else _on(like.device, tensor)
    hooks = {name: value for name, value in vars(module).items() if _is_hook(name)}
    kept = {name: value for name, value in vars(module).items() if name not in hooks}
    for kind in ("_parameters", "_buffers", "_modules"):  # of what stays, the names
        kept[kind] = {name: None if name in _members(ours) else value for name, value in kept[kind].items()}
    state = {**vars(ours), **hooks, "training": module.training, "_client": kept}
    if kept.get(_IN_PLACE) is not None:
        state[_IN_PLACE] = kept[_IN_PLACE]
    client_class = type(module)
    module.__dict__.clear()
    module.__dict__.update(state)
    cast(Any, module).__class__ = _converted(client_class, type(ours))


def _members(module: nn.Module) -> set[str]:
    return {*module._parameters, *module._buffers, *module._modules}


def _plain(module: nn.Module) -> dict[str, Any]:
    return {n: v for n, v in vars(module).items() if n not in _OWN and not _is_hook(n) and n != _IN_PLACE}


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor) or isinstance(other, Tensor):
        return isinstance(value, Tensor) and isinstance(other, Tensor) and value.shape == other.shape
    if type(value) is not type(other):
        return False
    if isinstance(value, partial):
        return value.func is other.func and value.args == other.args and _same(value.keywords, other.keywords)
    if isinstance(value, types.FunctionType):
        return value.__code__ is other.__code__
    if isinstance(value, (list, tuple)):
        return len(value) == len(other) and all(map(_same, value, other))
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(_same(v, other[k]) for k, v in value.items())
    return not isinstance(value, (bool, int, float, str, type(None), torch.dtype)) or value == other


def _difference(module: nn.Module, twin: nn.Module, where: str = "") -> str | None:
    """What tells a module from one that was made with the arguments read from it, or None."""
    if type(module) is not type(twin):
        return f"{where or 'it'} is a {type(module).__name__}, not the {type(twin).__name__} that its arguments make"
    mine, its = _plain(module), _plain(twin)
    for name in mine.keys() | its.keys():
        if name not in mine or name not in its or not _same(mine[name], its[name]):
            return f"{where}{name} is {mine.get(name)!r}, where its other attributes make it {its.get(name)!r}"
    for kind in ("_parameters", "_buffers"):
        for name, tensor in vars(twin)[kind].items():
            found = vars(module)[kind].get(name)
            if tensor is not None and (found is None or found.shape != tensor.shape):
                return f"{where}{name} has not the shape {tuple(tensor.shape)} that its attributes make"
    if module._modules.keys() != twin._modules.keys():
        return f"{where or 'it'} has other modules than its arguments make"
    for name, part in module._modules.items():
        other = twin._modules[name]
        if part is not None and other is not None and not isinstance(part, FastModule):
            why = _difference(part, other, f"{where}{name}.")
            if why is not None:
                return why
    return None


# ---- the arguments that a module was made with ------------------------------------------------------------------


def _read(module: Any, *names: str) -> Arguments:
    return {name: getattr(module, name) for name in names}


def _without(arguments: Arguments, *names: str) -> Arguments:
    return {name: value for name, value in arguments.items() if name not in names}


def _vector_quantize(m: Any) -> Arguments:
    book = m._codebook
    affine = ("sync_affine_param", "affine_param_batch_decay", "affine_param_codebook_decay")
    return {
        **_read(m, "dim", "codebook_size", "heads", "separate_codebook_per_head", "eps", "use_cosine_sim"),
        **_read(m, "freeze_codebook", "channel_last", "accept_image_fmap", "accept_3d_fmap", "commitment_weight"),
        **_read(m, "commitment_use_cross_entropy_loss", "orthogonal_reg_weight", "orthogonal_reg_active_codes_only"),
        **_read(m, "orthogonal_reg_max_codes", "codebook_diversity_loss_weight", "codebook_diversity_temperature"),
        **_read(m, "rotation_trick", "directional_reparam", "directional_reparam_variance", "learnable_codebook"),
        **_read(m, "manual_in_place_optimizer_update", "sync_update_v", "return_zeros_for_masked_padding"),
        **_read(m, "route_gradients_to_input"),
        **_read(book, "decay", "kmeans_iters", "threshold_ema_dead_code", "sample_codebook_temp", "ema_update"),
        **_read(book, "manual_ema_update", "vq_bridge", "affine_param"),
        **(_read(book, *affine) if book.affine_param else {}),
        "codebook_dim": book.embed.shape[-1],
        "layernorm_after_project_in": isinstance(m.project_in, nn.Sequential) and len(m.project_in) > 1,
        "straight_through": book.gumbel_sample.keywords["straight_through"],
        "stochastic_sample_codes": book.gumbel_sample.keywords["stochastic"],
        "sync_codebook": book.use_ddp,
        "sync_kmeans": not book.use_ddp or book.sample_fn.__name__ == "sample_vectors_distributed",
        "kmeans_init": not bool(book.initted),
    }


_ONE = ("num_codebooks", "keep_num_codebooks_dim", "has_projections")  # a residual stage has one codebook
_DROPOUT = ("quantize_dropout", "quantize_dropout_cutoff_index", "quantize_dropout_multiple_of")


def _width(m: Any, default: int) -> int:
    """The channels of the input of a module with or without projections."""
    return cast(int, m.project_in.in_features) if m.has_projections else default


def _residual_vq(m: Any) -> Arguments:
    shared = ("dim", "codebook_size", "codebook_dim", "heads", "accept_image_fmap", "return_zeros_for_masked_padding")
    return {
        **_without(_vector_quantize(m.layers[0]), *shared),
        **_read(m, "num_quantizers", "codebook_dim", "shared_codebook", "diveq", "accept_image_fmap", *_DROPOUT),
        **_read(m, "implicit_neural_codebook", "beam_size", "eval_beam_size", "return_zeros_for_masked_padding"),
        "dim": _width(m, m.codebook_dim),
        "codebook_size": tuple(m.codebook_sizes),
        "mlp_kwargs": _network(m.mlps[0]) if m.implicit_neural_codebook and len(m.mlps) else {},
        "beam_score_quantizer_weights": m.beam_score_weights.tolist(),
        "quant_grad_frac": 0.0 if m.diveq else m.quant_grad_frac,
    }


def _network(m: Any) -> Arguments:
    first = m.layers[0][0]
    return {"dim_hidden": first.out_features, "depth": len(m.layers)}


def _random_projection(m: Any) -> Arguments:
    own = ("dim", "codebook_size", "codebook_dim", "heads", "use_cosine_sim", "separate_codebook_per_head")
    return {
        **_without(_vector_quantize(m.vq), *own),
        "dim": m.rand_projs.shape[1],
        "codebook_size": m.vq.codebook_size,
        "codebook_dim": m.rand_projs.shape[2],
        "num_codebooks": m.num_codebooks,
        "norm": isinstance(m.norm, nn.LayerNorm),
    }


def _sim_vq(m: Any) -> Arguments:
    plain = type(m.code_transform) is nn.Linear and m.code_transform.bias is None
    return {
        **_read(m, "codebook_size", "channel_first", "rotation_trick", "input_to_quantize_commit_loss_weight"),
        **_read(m, "commitment_weight"),
        "dim": m.code_transform.out_features if plain else m.codebook.shape[-1],
        "frozen_codebook_dim": m.frozen_codebook.shape[-1],
        "codebook_transform": None if plain else m.code_transform,
    }


def _residual_sim_vq(m: Any) -> Arguments:
    return {**_sim_vq(m.layers[0]), **_read(m, "num_quantizers", *_DROPOUT)}


def _lfq(m: Any) -> Arguments:
    cosine = type(m.project_in).__name__ == "CosineSimLinear"
    return {
        **_read(m, "dim", "codebook_size", "entropy_loss_weight", "commitment_loss_weight", "diversity_gamma"),
        **_read(m, "num_codebooks", "keep_num_codebooks_dim", "codebook_scale", "frac_per_sample_entropy"),
        **_read(m, "has_projections", "soft_clamp_input_value", "channel_first", "experimental_softplus_entropy_loss"),
        **_read(m, "entropy_loss_offset", "spherical", "force_quantization_f32", "orthogonal_rotation"),
        "straight_through_activation": m.activation,
        "projection_has_bias": getattr(m.project_out, "bias", None) is not None,
        "cosine_sim_project_in": cosine,
        "cosine_sim_project_in_scale": m.project_in.scale if cosine else None,
    }


def _residual_lfq(m: Any) -> Arguments:
    return {
        **_without(_lfq(m.layers[0]), "codebook_scale", *_ONE),
        **_read(m, "num_quantizers", *_DROPOUT),
        "dim": _width(m, m.layers[0].dim),
    }


def _fsq(m: Any) -> Arguments:
    return {
        **_read(m, "dim", "num_codebooks", "keep_num_codebooks_dim", "scale", "allowed_dtypes", "channel_first"),
        **_read(m, "return_indices", "force_quantization_f32", "preserve_symmetry", "noise_dropout"),
        **_read(m, "bound_hard_clamp", "orthogonal_rotation"),
        "levels": m._levels.tolist(),
        "projection_has_bias": getattr(m.project_in, "bias", None) is not None,
    }


def _residual_fsq(m: Any) -> Arguments:
    first = m.layers[0]
    return {
        **_without(_fsq(first), "preserve_symmetry", "channel_first", *_ONE),
        **_read(m, "levels", "num_quantizers", "is_channel_first", *_DROPOUT),
        "dim": _width(m, first.dim),
        "soft_clamp_input_value": None if first.bound_hard_clamp else m.soft_clamp_input_value,
    }


def _grouped(of_group: Callable[[Any], Arguments]) -> Callable[[Any], Arguments]:
    return lambda m: {
        **_without(of_group(m.rvqs[0]), "accept_image_fmap"),
        **_read(m, "dim", "groups", "accept_image_fmap"),
    }


ARGUMENTS: dict[str, Callable[[Any], Arguments]] = {
    "VectorQuantize": _vector_quantize,
    "ResidualVQ": _residual_vq,
    "GroupedResidualVQ": _grouped(_residual_vq),
    "RandomProjectionQuantizer": _random_projection,
    "SimVQ": _sim_vq,
    "ResidualSimVQ": _residual_sim_vq,
    "LFQ": _lfq,
    "ResidualLFQ": _residual_lfq,
    "GroupedResidualLFQ": _grouped(_residual_lfq),
    "FSQ": _fsq,
    "ResidualFSQ": _residual_fsq,
    "GroupedResidualFSQ": _grouped(_residual_fsq),
}


_NEVER_WRONG = ("SimVQ", "ResidualSimVQ", "FSQ")  # fastvq's have no strict_compat


def _client(file: str, name: str, digests: tuple[str, ...], uses: tuple[str, ...] = ()) -> Client:
    our_class = getattr(fastvq, name)
    members = {"our_class": our_class, "__module__": __name__, "__doc__": f"fastvq.{name}"}
    fast = type(f"Fast{name}", (Converted, our_class), members)
    return Client(f"vector_quantize_pytorch.{file}.{name}", fast, digests, uses)


CLIENTS = by_path(
    [
        _client("vector_quantize_pytorch", "VectorQuantize", ("967a4d720425419f",), ("Codebook",)),
        _client("residual_vq", "ResidualVQ", ("ba84b1762168f44a",), ("MLP", "VectorQuantize")),
        _client("residual_vq", "GroupedResidualVQ", ("02c046df0d5bc338",), ("ResidualVQ",)),
        _client("random_projection_quantizer", "RandomProjectionQuantizer", ("4afdd494ee40ef97",), ("VectorQuantize",)),
        _client("sim_vq", "SimVQ", ("81bcea197125cd41",)),
        _client("residual_sim_vq", "ResidualSimVQ", ("00bae042a8503ca6",), ("SimVQ",)),
        _client("lookup_free_quantization", "LFQ", ("818ab8506f3260e5",), ("CosineSimLinear",)),
        _client("residual_lfq", "ResidualLFQ", ("def86915f4610c26",), ("LFQ",)),
        _client("residual_lfq", "GroupedResidualLFQ", ("fd1f4a990bf799ac",), ("ResidualLFQ",)),
        _client("finite_scalar_quantization", "FSQ", ("afced9a84cd7d7c7",)),
        _client("residual_fsq", "ResidualFSQ", ("4729618d4806418a",), ("FSQ",)),
        _client("residual_fsq", "GroupedResidualFSQ", ("8e2c2ed011517873",), ("ResidualFSQ",)),
    ]
)
