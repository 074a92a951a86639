"""What one step of tuning looks at: windows from all over the calibration, as one scene.

Neighbours of a text say much the same, and few tokens make a gradient whose noise some hundred steps cannot even out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from passes.moments import SCORES
from passes.tune_scene import RowScene

TOKENS = 1 << 13
"""Queries of one step, at the most, where a window has no more."""
Lot = Sequence[tuple[RowScene, int]]
"""Windows of one step: scenes, and places in them."""


def lots_of(stage: Sequence[RowScene], steps: int, seed: int) -> list[Lot]:
    """The windows of every step: all that fit, shuffled, over and over; those of one lot are alike in shape. No step
    where none fit."""
    alike: dict[Any, list[tuple[RowScene, int]]] = {}
    for scene in stage:
        fit = scene.fits.any(1).nonzero().flatten().tolist()
        if fit:
            alike.setdefault((*scene.at.tolist(), scene.y.shape[1]), []).extend((scene, i) for i in fit)
    draw = torch.Generator().manual_seed(seed)
    lots: list[Lot] = []
    while alike and len(lots) < steps:
        lots += _epoch(list(alike.values()), draw)
    return lots[:steps]


def _epoch(alike: Sequence[Lot], draw: torch.Generator) -> list[Lot]:
    """Every window once."""
    lots: list[Lot] = []
    for windows in alike:
        order = torch.randperm(len(windows), generator=draw)
        count = min(len(windows), -(-len(windows) * len(windows[0][0].at) // TOKENS))
        lots += [[windows[i] for i in some.tolist()] for some in order.tensor_split(count)]
    return [lots[i] for i in torch.randperm(len(lots), generator=draw).tolist()]


def joined(lot: Lot) -> Iterator[RowScene]:
    """The windows of a step as one scene, or as several where there are many scores."""
    held = max(1, SCORES // lot[0][0].added[0].numel())
    for first in range(0, len(lot), held):
        yield _scene(lot[first : first + held])


def _scene(lot: Lot) -> RowScene:
    """Windows as one scene; what is one table for all of them is not copied."""
    first = lot[0][0]

    def together(of: Callable[[RowScene], Tensor]) -> Tensor:
        one = of(first)
        if one.stride(0) == 0:
            return one[:1].expand(len(lot), *one.shape[1:])
        return torch.stack([of(scene)[i] for scene, i in lot])

    names = ("q", "y", "raw", "added", "out", "keep", "judges")
    parts: dict[str, Any] = {n: together(attrgetter(n)) for n in names}
    q, k, v = (together(lambda scene, at=at: scene.rows[at]) for at in range(3))
    sink = None if first.sink is None else together(attrgetter("sink"))
    # nobody who learns asks for the original's probabilities, which are as many as the scores
    return replace(first, **parts, p=parts["added"], rows=(q, k, v), sink=sink)
