"""What a class looks like: a digest of its code, blind to comments, docstrings and layout."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import io
import textwrap
import tokenize

_SKIPPED = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def _docstring_lines(source: str) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            lines.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def _code(cls: type) -> str:
    source = textwrap.dedent(inspect.getsource(cls))
    documentation = _docstring_lines(source)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    text = "".join(t.string for t in tokens if t.type not in _SKIPPED and t.start[0] not in documentation)
    # Python 3.12 cuts f-strings into tokens and drops the spaces between: so does this, for every version.
    return "".join(text.split())


@functools.cache
def digest(*classes: type) -> str | None:
    """Sixteen hexadecimal digits of the code of these classes, or None where their source cannot be had."""
    try:
        return hashlib.sha256("\n".join(map(_code, classes)).encode()).hexdigest()[:16]
    except (OSError, TypeError, SyntaxError):
        return None
