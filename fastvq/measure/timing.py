"""Timing: contenders take turns, so that a slow moment of the machine hits all of them alike."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

TURN = 0.15  # seconds: long beside the milliseconds for which another's threads may still spin
MANY = 5  # calls of a turn, from which on the first does not count

Turn = Callable[[], list[float]]  # some calls of one contender, milliseconds each


@dataclass(frozen=True)
class Work:
    """One call of what is measured, on data made before, and what happens before each call outside the time."""

    call: Callable[[], object]
    before: Callable[[], object] = lambda: None

    def once(self) -> float:
        """Milliseconds of one call."""
        self.before()
        start = time.perf_counter()
        self.call()
        return (time.perf_counter() - start) * 1e3

    def turn(self) -> list[float]:
        """Calls for `TURN` seconds. Among many the first does not count: it finds the caches as another left them."""
        deadline = time.perf_counter() + TURN
        times = [self.once()]
        while time.perf_counter() < deadline:
            times.append(self.once())
        return times[1:] if len(times) >= MANY else times


def interleave(turns: Mapping[str, Turn], seconds: float, rounds: int = 3) -> dict[str, list[float]]:
    """Milliseconds of every call, sorted, by contender: A B C A B C ...

    Args:
        turns: each contender's turn, by name; each is taken once before, to warm up.
        seconds: for all rounds together.
        rounds: how many there are at least, whatever they take.
    """
    for turn in turns.values():
        turn()
    times: dict[str, list[float]] = {name: [] for name in turns}
    deadline = time.perf_counter() + seconds
    for done in itertools.count():
        if done >= rounds and time.perf_counter() > deadline:
            break
        for name, turn in turns.items():
            times[name] += turn()
    return {name: sorted(values) for name, values in times.items()}


def percentile(values: Sequence[float], percent: int) -> float:
    """The nearest-rank percentile of sorted values."""
    return values[max(0, -(-len(values) * percent // 100) - 1)]


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each contender's times."""
    return {name: statistics.median(values) for name, values in times.items()}
