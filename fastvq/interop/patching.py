"""`patch` and `unpatch`: a quantiser that is known gets a subclass of its class that searches with fastvq.

The object stays, and with it every reference to it, its parameters, buffers and hooks. A class is known by where it is
defined, by its name and by a digest of its code; where one of these differs it is left alone.
"""

from __future__ import annotations

import copyreg
import functools
import importlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any, cast

from torch import nn

from fastvq.interop.fingerprint import digest

# The package that a class is defined in -> its distribution; `fastvq.interop.PACKAGE` knows its classes.
LIBRARIES = {
    "audiocraft": "audiocraft",
    "dac": "descript-audio-codec",
    "diffusers": "diffusers",
    "encodec": "encodec",
    "moshi": "moshi",
    "snac": "snac",
    "transformers": "transformers",
    "vector_quantize_pytorch": "vector-quantize-pytorch",
}
_LIKE_A_QUANTISER = re.compile("quanti[sz]|codebook", re.IGNORECASE)


@dataclass(frozen=True)
class Client:
    """A class of another library that fastvq can stand in for."""

    path: str  # module and name
    fast: type[FastModule]  # what overrides the client's methods
    digests: tuple[str, ...]  # of the code of the class and of those in `uses`, in the versions that are known
    uses: tuple[str, ...] = ()  # classes of the same module on whose code the override relies

    @property
    def names(self) -> tuple[str, ...]:
        """The class and those that it uses, without the module."""
        return (self.path.rpartition(".")[2], *self.uses)

    def found_digest(self) -> str | None:
        """The digest of the classes as they are installed."""
        module = importlib.import_module(self.path.rpartition(".")[0])
        return digest(*(getattr(module, name) for name in self.names))


def by_path(clients: Iterable[Client]) -> dict[str, Client]:
    """The clients of a library, by their paths."""
    return {client.path: client for client in clients}


class FastModule(nn.Module):
    """What all replaced modules have in common; the first line of a subclass's docstring is what the report says."""

    whole = False  # whether parts of a module that must stay as it is must stay as they are too
    client_class: type[nn.Module]
    used_classes: tuple[type, ...]  # those of `Client.uses`

    @classmethod
    def take_over(cls, module: nn.Module) -> str | None:
        """Turn a module of `client_class` into one of this class; or leave it, and say why."""
        cast(Any, module).__class__ = cls
        return None

    def give_back(self) -> None:
        """Undo `take_over`."""
        cast(Any, self).__class__ = self.client_class

    def _get_name(self) -> str:
        return f"{self.client_class.__name__}[fastvq]"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # This class is made at run time: a pickle names the client's, and the copy is patched again where it can be.
        make, arguments, *state = cast(tuple[Any, ...], super().__reduce_ex__(max(2, int(protocol))))
        if make is cast(Any, copyreg).__newobj__ and arguments == (type(self),):
            make, arguments = _new, (self.client_class,)
        return (make, arguments, *state)


def _new(client_class: type[nn.Module]) -> nn.Module:
    client = known(client_class)
    usable = client is not None and differs(client) is None
    made: Any = fast_class(client_class) if usable else client_class
    return cast(nn.Module, made.__new__(made))


@functools.cache
def library(package: str) -> ModuleType:
    """The file of fastvq.interop that knows a package's classes."""
    return importlib.import_module(f"fastvq.interop.{package}")


def known(cls: type) -> Client | None:
    """The client that a class is, by its name."""
    package = cls.__module__.partition(".")[0]
    if package not in LIBRARIES:
        return None
    return library(package).CLIENTS.get(f"{cls.__module__}.{cls.__qualname__}")


def version(package: str) -> str:
    """The installed version of a package's distribution."""
    try:
        return metadata.version(LIBRARIES[package])
    except metadata.PackageNotFoundError:
        return "unknown"


def differs(client: Client) -> str | None:
    """How the installed class differs from those that are known, or None."""
    if client.found_digest() in client.digests:
        return None
    package = client.path.partition(".")[0]
    what = " or ".join(client.names)
    return f"{LIBRARIES[package]} {version(package)} has another {what} than fastvq knows"


_fast_classes: dict[type, type[FastModule]] = {}


def fast_class(client_class: type[nn.Module]) -> type[FastModule]:
    """The subclass of a known class that takes its place; of the same name, for whoever goes by names."""
    if client_class in _fast_classes:
        return _fast_classes[client_class]
    client = known(client_class)
    if client is None:
        raise ValueError(f"client_class must be a class that fastvq knows; got {client_class.__qualname__}")
    fast, module = client.fast, importlib.import_module(client_class.__module__)
    members = {
        "client_class": client_class,
        "used_classes": tuple(getattr(module, name) for name in client.uses),
        "__module__": fast.__module__,
        "__doc__": fast.__doc__,
    }
    return _fast_classes.setdefault(client_class, type(client_class.__name__, (fast, client_class), members))


@dataclass(frozen=True)
class PatchedModule:
    """What became of one module."""

    name: str  # as in `named_modules`
    class_name: str
    done: bool  # replaced (or, by `unpatch`, restored)
    why: str  # what is done in its place, or why it was left alone


@dataclass(frozen=True)
class PatchReport:
    """What `patch` or `unpatch` did to the quantisers of a model; `str` gives a table."""

    modules: tuple[PatchedModule, ...]
    verb: str = "replaced"

    @property
    def done(self) -> tuple[PatchedModule, ...]:
        """The modules that were replaced (or restored)."""
        return tuple(m for m in self.modules if m.done)

    @property
    def left_alone(self) -> tuple[PatchedModule, ...]:
        """Those that were not, each with the reason."""
        return tuple(m for m in self.modules if not m.done)

    def __str__(self) -> str:
        lines = [f"fastvq {self.verb} {len(self.done)} modules, left {len(self.left_alone)} alone"]
        rows = [
            (m.name or "(the model)", m.class_name, f"{self.verb}: {m.why}" if m.done else f"left alone: {m.why}")
            for m in self.modules
        ]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
        lines += [f"  {name:{widths[0]}}  {cls:{widths[1]}}  {what}" for name, cls, what in rows]
        return "\n".join(lines)


def patch(model: nn.Module) -> PatchReport:
    """Replace every quantiser that fastvq knows in a live model, in place.

    Outputs, losses, gradients and state_dict stay what they are, but that codes are the nearest in exact arithmetic:
    they differ from the client's only where its rounding decided. Modules stay instances of their class, and may be
    copied, pickled and patched again. docs/migration.md lists the libraries and classes.

    Args:
        model: any module; also a quantiser itself.

    Returns:
        The modules that look like quantisers, each with what was done, or why it was left alone.

    Raises:
        TypeError: `model` is no torch.nn.Module.
    """
    _check(model)
    modules: list[PatchedModule] = []
    candidates, wholes = list(modules), list(modules)
    for name, module in list(model.named_modules()):
        cls = type(module)
        whole = next((w for w in wholes if _within(name, w.name)), None)
        if whole is not None and known(cls) is not None:
            why = f"part of {whole.name or 'the model'}, which is left alone"
            modules.append(PatchedModule(name, _class_name(cls), False, why))
            continue
        outcome = _patch_one(module)
        if outcome is not None:
            modules.append(PatchedModule(name, _class_name(cls), *outcome))
            client = known(cls)
            if client is not None and client.fast.whole and not outcome[0]:
                wholes.append(modules[-1])
        elif _LIKE_A_QUANTISER.search(cls.__name__) and not cls.__module__.startswith("fastvq."):
            candidates.append(PatchedModule(name, _class_name(cls), False, "not known to fastvq"))
    names = [m.name for m in modules]
    modules += [m for m in candidates if not any(_within(m.name, n) or _within(n, m.name) for n in names)]
    return PatchReport(tuple(modules))


def unpatch(model: nn.Module) -> PatchReport:
    """Give every module that `patch` (or a registered class) replaced its own class back, in place.

    Args:
        model: any module; one that was never patched stays as it is.

    Returns:
        The modules that were restored.

    Raises:
        TypeError: `model` is no torch.nn.Module.
    """
    _check(model)
    modules = []
    for name, module in list(model.named_modules()):
        if isinstance(module, FastModule):
            module.give_back()
            modules.append(PatchedModule(name, _class_name(type(module)), True, "its own class"))
    return PatchReport(tuple(modules), "restored")


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")


def _class_name(cls: type) -> str:
    if issubclass(cls, FastModule):
        cls = cls.client_class
    return f"{cls.__module__.partition('.')[0]}.{cls.__qualname__}"


def _within(inner: str, outer: str) -> bool:
    return not outer or inner == outer or inner.startswith(outer + ".")


def _patch_one(module: nn.Module) -> tuple[bool, str] | None:
    """Whether the module was replaced, and by what or why not; None where it is no known quantiser."""
    cls: type[nn.Module] = type(module)
    if isinstance(module, FastModule):
        return True, _summary(cls)
    client = known(cls)
    if client is None:
        base = next((b for b in cls.__mro__[1:] if known(b) is not None), None)
        return None if base is None else (False, f"a subclass of {base.__name__}, which may do other things")
    why = differs(client) or fast_class(cls).take_over(module)
    return (False, why) if why is not None else (True, _summary(type(module)))


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").partition("\n")[0].rstrip(".")
