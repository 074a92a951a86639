"""Which item an output element reads, spelled in bits: log2(n) + 3 runs for n items, whatever acts within one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Spelled:
    """`item` of each element, -1 where no item moves it; `mixed` where several items do."""

    item: Tensor
    mixed: Tensor


def spell(count: int, run: Callable[[Tensor], Tensor]) -> Spelled:
    """`run(choice)` computes with item i taken from filling B where choice[i], else from A. In run j the items
    with bit j set come from B: an element that reads one item equals its A or its B value, and the bits name it."""
    index = torch.arange(count)
    low = run(torch.zeros(count, dtype=torch.bool))
    high = run(torch.ones(count, dtype=torch.bool))
    item = torch.zeros(low.shape, dtype=torch.int64)
    mixed = torch.zeros(low.shape, dtype=torch.bool)
    moved = ~_same(low, high)
    for bit in range((count - 1).bit_length()):
        value = run((index >> bit) & 1 == 1)
        is_high, is_low = _same(value, high), _same(value, low)
        mixed |= ~(is_high | is_low)
        item += (is_high & moved).to(torch.int64) << bit
    # ids beyond the count cannot be spelled by one item, and a last, random choice must be foretold
    mixed |= item >= count
    choice = torch.rand(count, generator=torch.Generator().manual_seed(9)) < 0.5
    mixed |= ~_same(run(choice), torch.where(choice[item.clamp(max=count - 1)], high, low))
    return Spelled(torch.where(moved, item, -1), mixed)


def _same(a: Tensor, b: Tensor) -> Tensor:
    scale = torch.maximum(a.abs(), b.abs()).clamp(min=1e-300)
    return (a == b) | ((a - b).abs() <= 1e-11 * scale) | (a.isnan() & b.isnan())
