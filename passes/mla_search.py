"""The setting with the least measured error: how much keys count beside values, and how many channels turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from passes.mla_absorb import Absorber, Setting
from passes.mla_shape import turning

FACTORS = (0.1, 1.0, 10.0)
"""Factors of the keys' errors that are measured first; then those between and beyond, while it helps."""
ALONE = 0.3
"""The factor where nothing is measured."""
GRID = 8
"""Splits whose expected loss is computed."""
Error = Callable[[Setting], float]


def settings(absorber: Absorber, total: int, factor: float, rope_dim: int | None, mean_phase: bool = True) -> Setting:
    """The split of `total` numbers with the least expected loss at a factor."""
    if rope_dim is not None:
        return Setting(factor, mean_phase, rope_dim)
    splits = grid(absorber, total)
    return min((Setting(factor, mean_phase, d) for d in splits), key=lambda s: absorber.loss(s, total))


def grid(absorber: Absorber, total: int) -> Sequence[int]:
    """Even numbers of turned channels from 0 to as many as there can be."""
    top = min(total - 1, turning(absorber.known.site)) // 2 * 2
    return sorted({round(i * top / GRID / 2) * 2 for i in range(GRID + 1)})


def search(absorber: Absorber, total: int, rope_dim: int | None, error: Error) -> Setting:
    """Factor, then stand-in, then split, each with the least measured error."""
    known: dict[Setting, float] = {}

    def best(candidates: Iterable[Setting]) -> Setting:
        for setting in candidates:
            if setting not in known:
                known[setting] = error(setting)
        return min(known, key=lambda s: known[s])

    def at(factor: float, mean_phase: bool = True) -> Setting:
        return settings(absorber, total, factor, rope_dim, mean_phase)

    now = best(at(f) for f in FACTORS)
    while True:
        here = now.factor
        now = best(at(here * step) for step in (10**-0.5, 10**0.5))
        if now.factor == here:
            break
    if not turning(absorber.known.site):
        return now
    now = best([at(now.factor, False)])
    if rope_dim is None:
        top = max(grid(absorber, total))
        step = max(2, top // GRID // 2 * 2)
        while step >= 2:
            near = (min(max(now.rope_dim + d, 0), top) for d in (-step, step))
            now = best([replace(now, rope_dim=d) for d in near])
            step = step // 4 * 2
    return now
