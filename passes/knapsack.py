"""One budget for several sites: who gets how much of it, by what each loses at each size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

NOTHING = 1e-9
"""Error relative to the largest below which nothing is left to lose."""


def spread(errors: Mapping[str, Mapping[int, float]], total: int) -> dict[str, int]:
    """Site -> its size, all sizes together at most `total`, with the least sum of errors.

    `errors`: site -> size -> error, in one unit for all sites (`passes/spread.py` makes it so). The answer is exact, of
    equal sums the one that uses less. Raises ValueError where even the smallest sizes are too many.
    """
    least = sum(min(sizes) for sizes in errors.values())
    if least > total:
        raise ValueError(f"{len(errors)} sites need at least {least} numbers, and the budget is {total}")
    states = frontier(errors, total - least)
    _, chosen = min(states.values(), key=lambda state: state[0])
    return dict(zip(errors, chosen, strict=True))


def frontier(errors: Mapping[str, Mapping[int, float]], room: int) -> dict[int, tuple[float, tuple[int, ...]]]:
    """All that is worth having: how much more than their smallest sizes all use, at most `room`, -> (the least sum of
    errors, the sizes), each with less error than those that use less."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for sizes in errors.values():
        low = min(sizes)
        more: dict[int, tuple[float, tuple[int, ...]]] = {}
        for used, (error, chosen) in best.items():
            for size, own in sizes.items():
                now = used + size - low
                if now <= room and (now not in more or error + own < more[now][0]):
                    more[now] = (error + own, (*chosen, size))
        best = _undominated(more)
    return best


def between(measured: Mapping[int, float], step: int) -> dict[int, float]:
    """The measured errors, and between two measured sizes those that lie on a line of their logarithm, `step` apart;
    none larger than that of a smaller size."""
    sizes = sorted(measured)
    floor = NOTHING * max(measured.values())
    errors: dict[int, float] = {}
    lowest = math.inf
    for size in sizes:
        lowest = min(lowest, measured[size])
        errors[size] = lowest
    for low, high in pairwise(sizes):
        first, last = (math.log(max(errors[n], floor, 1e-300)) for n in (low, high))
        for size in range(low + step, high, step):
            errors[size] = math.exp(first + (last - first) * (size - low) / (high - low))
    return dict(sorted(errors.items()))


def _undominated(states: dict[int, tuple[float, tuple[int, ...]]]) -> dict[int, tuple[float, tuple[int, ...]]]:
    """Those with less error than every state that uses no more."""
    kept: dict[int, tuple[float, tuple[int, ...]]] = {}
    lowest = float("inf")
    for used in sorted(states):
        if states[used][0] < lowest:
            kept[used] = states[used]
            lowest = states[used][0]
    return kept
