"""Arguments of the class we stand in for that have no meaning here yet: refused by name, never ignored."""

from __future__ import annotations


def _is_default(value: object, default: object) -> bool:
    return value is default or (
        isinstance(value, int | float) and isinstance(default, int | float) and value == default
    )


def refuse(owner: str, **arguments: tuple[object, object]) -> None:
    """Refuse each argument whose value is not its default.

    Args:
        owner: the class or method, for the message.
        arguments: name = (value, default).

    Raises:
        NotImplementedError: names the first such argument, its value and its default.
    """
    for name, (value, default) in arguments.items():
        if not _is_default(value, default):
            given = f"{value!r}" if isinstance(value, bool | int | float | str) else f"a {type(value).__name__}"
            raise NotImplementedError(f"{owner} does not support {name} yet: it must be {default!r}; got {given}")
