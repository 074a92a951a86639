"""The setting with the least measured error: how much keys count beside values, and how many channels turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

import torch

from passes.mla_absorb import Absorber, Setting
from passes.mla_shape import Shape, features, lossless, turning
from rewrite.site import Site

FACTORS = (0.1, 1.0, 10.0)
"""Factors of the keys' errors that are measured first; then those between and beyond, while it helps."""
ALONE = 0.3
"""The factor where nothing is measured."""
WIDENINGS = 6
"""Steps beyond the first factors."""
GRID = 8
"""Splits whose expected loss is computed."""
WIDE = 1024
"""Features beyond which few settings are tried."""
WIDE_FACTORS = (0.3, 1.0, 3.0)


class Factored(Protocol):
    """What a factor of the keys' errors is a part of."""

    @property
    def factor(self) -> float:
        """The factor."""
        ...


S = TypeVar("S", bound=Factored)


def settings(absorber: Absorber, total: int, factor: float, rope_dim: int | None, mean_phase: bool = True) -> Setting:
    """The split of `total` numbers with the least expected loss at a factor."""
    if rope_dim is not None:
        return Setting(factor, mean_phase, rope_dim)
    splits = grid(absorber, total)
    return min((Setting(factor, mean_phase, d) for d in splits), key=lambda s: absorber.loss(s, total))


def resized(absorber: Absorber, setting: Setting, total: int, other: int) -> set[Setting]:
    """What a setting found at `total` numbers becomes at another: as many turn in proportion, or as the expected loss
    says."""
    top = max(grid(absorber, other))
    scaled = min(top, round(setting.rope_dim * other / total / 2) * 2)
    return {replace(setting, rope_dim=scaled), settings(absorber, other, setting.factor, None, setting.mean_phase)}


def grid(absorber: Absorber, total: int) -> Sequence[int]:
    """Even numbers of turned channels from 0 to as many as there can be; of wide sites fewer."""
    points = GRID // 2 if wide(absorber.known.site) else GRID
    top = min(total - 1, turning(absorber.known.site)) // 2 * 2
    return sorted({round(i * top / points / 2) * 2 for i in range(points + 1)})


def wide(site: Site) -> bool:
    """Every trial takes seconds."""
    return features(site) > WIDE


def enough(absorber: Absorber, keep: float) -> Shape:
    """The least shape of which no more than 1 - `keep` of what the output hangs on is lost."""
    full = lossless(absorber.known.site, False)
    shapes: list[Shape] = []
    nothing: float | None = None
    for rope_dim in grid(absorber, full.total):
        losses = absorber.losses(Setting(ALONE, True, rope_dim))
        nothing = float(losses[0]) if nothing is None else nothing
        fits = losses <= (1 - keep) * nothing
        if bool(fits.any()):
            shapes.append(Shape(max(int(fits.to(torch.int8).argmax()), 1), rope_dim))
    least = min(shapes, key=lambda s: s.total, default=full)
    return least if least.total < full.total else full


@dataclass
class Trials(Generic[S]):
    """Settings and their measured errors."""

    error: Callable[[S], float]
    known: dict[S, float] = field(default_factory=dict)

    def best(self, candidates: Iterable[S]) -> S:
        """The best so far, these included."""
        for setting in candidates:
            if setting not in self.known:
                self.known[setting] = self.error(setting)
        return min(self.known, key=lambda s: self.known[s])


def search(absorber: Absorber, total: int, rope_dim: int | None, error: Callable[[Setting], float]) -> Setting:
    """Factor, then stand-in, then split, each with the least measured error."""
    trials = Trials(error)
    if wide(absorber.known.site):
        start = settings(absorber, total, 1.0, rope_dim)
        now = trials.best(replace(start, factor=f) for f in WIDE_FACTORS)
        step = max(grid(absorber, total)) // GRID // 2 * 2
        near = () if rope_dim is not None or not step else (-step, step)
        return trials.best(
            replace(now, rope_dim=min(max(now.rope_dim + d, 0), max(grid(absorber, total)))) for d in near
        )
    now = search_factor(trials, lambda factor: settings(absorber, total, factor, rope_dim))
    if not turning(absorber.known.site):
        return now
    now = trials.best([settings(absorber, total, now.factor, rope_dim, False)])
    if rope_dim is not None:
        return now
    top = max(grid(absorber, total))
    step = max(2, top // GRID // 2 * 2)
    while step >= 2:
        near = (min(max(now.rope_dim + d, 0), top) for d in (-step, step))
        now = trials.best([replace(now, rope_dim=d) for d in near])
        step = step // 4 * 2
    return now


def search_factor(trials: Trials[S], at: Callable[[float], S]) -> S:
    """Wide steps first, then narrower ones around the best, as far as they help."""
    now = trials.best(at(f) for f in FACTORS)
    for _ in range(WIDENINGS):
        here = now.factor
        now = trials.best(at(here * step) for step in (10**-0.5, 10**0.5))
        if now.factor == here:
            break
    return now
