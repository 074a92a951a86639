"""One budget for several sites: who gets how much of it, by what each loses at each size."""

from __future__ import annotations

from collections.abc import Mapping


def spread(errors: Mapping[str, Mapping[int, float]], total: int) -> dict[str, int]:
    """Site -> its size, all sizes together at most `total`, with the least sum of errors.

    `errors`: site -> size -> error. Errors of different sites compare only as parts of what the next reader sees: the
    squared error of the attention's output over the energy of the residual stream behind it. The answer is exact, and
    of equal sums the one that uses less. Raises ValueError where even the smallest sizes are too many.
    """
    least = sum(min(sizes) for sizes in errors.values())
    if least > total:
        raise ValueError(f"{len(errors)} sites need at least {least} numbers, and the budget is {total}")
    room = total - least
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
    _, chosen = min(best.values(), key=lambda state: state[0])
    return dict(zip(errors, chosen, strict=True))


def _undominated(states: dict[int, tuple[float, tuple[int, ...]]]) -> dict[int, tuple[float, tuple[int, ...]]]:
    """Those with less error than every state that uses no more."""
    kept: dict[int, tuple[float, tuple[int, ...]]] = {}
    lowest = float("inf")
    for used in sorted(states):
        if states[used][0] < lowest:
            kept[used] = states[used]
            lowest = states[used][0]
    return kept
