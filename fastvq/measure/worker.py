"""Processes to measure in, each with its own environment: malloc's settings and the instruction set are read once."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

from fastvq.measure.timing import Turn, Work

# glibc gives large blocks back to the system and faults them in again at every call; the naive version suffers most.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 26)}
# Every large block is mapped by itself, so that the resident set is what is alive, not what malloc holds back.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
ALLOCATORS: dict[str, dict[str, str]] = {"default": {}, "kept": KEEP_MEMORY}


class Worker:
    """A child that calls functions of ours, with as many torch threads as this process. Use it in a `with`."""

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        # Not `-m`: the work that is held must be in the module that unpickling finds.
        code = "from fastvq.measure import worker; worker.serve()"
        command = [sys.executable, "-c", code, str(torch.get_num_threads())]
        self._process = subprocess.Popen(
            command, env={**os.environ, **(environment or {})}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            self._process.kill()
        self._process.communicate()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function of a module returns there.

        Raises:
            RuntimeError: it failed there, or the process died; the message tells how.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            pickle.dump((function, arguments), stdin)
            stdin.flush()
            failure, result = pickle.load(stdout)
        except (EOFError, BrokenPipeError) as error:
            status = self._process.wait()
            raise RuntimeError(f"the process that ran {function.__name__}{arguments} died: {status}") from error
        if failure is not None:
            raise RuntimeError(f"{function.__name__}{arguments} failed:\n{failure}")
        return result

    def turn(self, make: Callable[..., Work], *arguments: Any) -> Turn:
        """Make work there; the turn that it takes."""
        number = self.call(_hold, make, arguments)
        return lambda: self.call(_turn, number)


_held: list[Work] = []


def _hold(make: Callable[..., Work], arguments: tuple[Any, ...]) -> int:
    _held.append(make(*arguments))
    return len(_held) - 1


def _turn(number: int) -> list[float]:
    return _held[number].turn()


def serve() -> None:
    """Answer calls until there are no more. Standard output is for answers alone: what is printed goes to the other."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    torch.set_num_threads(int(sys.argv[1]))
    while True:
        try:
            function, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        failure, result = None, None
        try:
            result = function(*arguments)
        except Exception:
            failure = traceback.format_exc()
        pickle.dump((failure, result), answers)
        answers.flush()
