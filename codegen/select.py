"""Which keys to read, found from the queries and keys themselves at run time: each rule gives a mask.

A rule looks at coarse scores, a part of the block rows at a time, so that nothing as large as all pairs of tokens is
held: by generated kernels on a GPU (codegen/coarse_launch.py), else in torch (codegen/coarse.py). The choice among
them is torch on the same device: sorts of a row's scores, running sums, the largest so many. What comes out is blocks,
or columns and diagonals, as tables that kernels read where they lie; the host waits for none of it.
Choosing costs time too: below about ten thousand tokens dense attention is usually faster than any of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codegen import coarse, coarse_launch
from codegen.coarse import Scores
from codegen.lists import packed
from rewrite.mask import Mask, Term, at, mask
from rewrite.mask.terms import offset


@dataclass(frozen=True, eq=False)
class Selection:
    """A mask whose tables are on the device where they were found: `attention(q, k, v, found.algebra,
    tables=found.tables)`. `algebra` only declares them, so it is the same object for every selection of one rule."""

    algebra: Mask
    tables: Mapping[str, Tensor]

    @property
    def selection(self) -> Selection:
        """Itself, as blocks have one."""
        return self

    def mask(self) -> Mask:
        """The mask with its tables on the host, which waits for the device: to look at, to keep, to draw."""
        numbers = {name: table.to(torch.int8).cpu().numpy() for name, table in self.tables.items()}
        return Mask(self.algebra.name, self.algebra.keep, "constant", numbers)


@dataclass(frozen=True, eq=False)
class Blocks:
    """Blocks of `size` x `size` tokens that are read: `table` (b, h, rows, columns) booleans, on the device of the
    queries. Row i holds query indices [i * size, (i + 1) * size)."""

    size: int
    queries: int
    keys: int
    table: Tensor

    @property
    def counts(self) -> Tensor:
        """Blocks of each row, (b, h, rows) int32."""
        return self.table.sum(-1, dtype=torch.int32)

    @property
    def index(self) -> Tensor:
        """Which, ascending: (b, h, rows, most) int32, for which the host waits; what stands behind a row's count means
        nothing."""
        return packed(self.table, int(self.counts.max()))

    @property
    def density(self) -> float:
        """Chosen blocks of all that causality allows."""
        rows, before = self.table.shape[2], (self.keys - self.queries) // self.size
        allowed = sum(before + i + 1 for i in range(rows)) * self.table[..., 0, 0].numel()
        return float(self.table.sum()) / max(1, allowed)

    @property
    def selection(self) -> Selection:
        """Causal, within the blocks, for kernels."""
        return Selection(_within(self.size), {"block": self.table})

    def mask(self) -> Mask:
        """Causal, within the blocks, on the host."""
        return self.selection.mask()


@cache
def _within(size: int) -> Mask:
    """Blocks by rows that count from the first query, so that one kernel serves every part of a prompt."""
    rows = Term(offset)
    return mask(
        lambda b, h, q, k: (k <= q) & (at("block", b, h, (q - rows) // size, k // size) == 1),
        f"causal & blocks of {size}",
        {"block": np.empty((0, 0, 0, 0), np.int8)},
    )


@cache
def _lines(name: str) -> Mask:
    return mask(
        lambda b, h, q, k: (k <= q) & ((at("vertical", b, h, k) == 1) | (at("slash", b, h, q - k) == 1)),
        name,
        {table: np.empty((0, 0, 0), np.int8) for table in ("vertical", "slash")},
    )


@dataclass(frozen=True)
class Antidiagonal:
    """XAttention (arXiv:2503.16428): a block's score is the mass on every `stride`-th antidiagonal of it. The best
    blocks of a row are read until they hold `threshold` of its mass; the first and the diagonal one always are."""

    threshold: float = 0.9
    block: int = 128
    stride: int = 16

    def __str__(self) -> str:
        return f"antidiagonal(threshold={self.threshold:g}, block={self.block}, stride={self.stride})"

    def __call__(self, q: Tensor, k: Tensor, scale: float | None = None) -> Blocks:
        """Blocks for queries (b, h, t, d) over keys (b, g, s, d); scores are scaled by 1 / sqrt(d) unless told."""
        if self.block % self.stride:
            raise ValueError(f"blocks of {self.block} are no multiple of the stride {self.stride}")
        factor = _scale(q, scale) / self.stride
        way = _way(coarse_launch.refuse(q, factor, self.block, self.stride))
        scores = way.antidiagonal(q, k, factor, self.block, self.stride)
        return _chosen(q, k, self.block, way.ROWS, scores, lambda p, forced: _until(p, forced, self.threshold))


@dataclass(frozen=True)
class Pooled:
    """Blocks by the product of their mean query and mean key, the best `count` or the best `share` of each row's (the
    block-sparse pattern of MInference, arXiv:2407.02490, takes 100 blocks of 64). A single key that matters does not
    show in a mean."""

    count: int | None = None
    share: float | None = None
    block: int = 64

    def __str__(self) -> str:
        kept = f"count={self.count}" if self.share is None else f"share={self.share:g}"
        return f"pooled({kept}, block={self.block})"

    def __call__(self, q: Tensor, k: Tensor, scale: float | None = None) -> Blocks:
        """Blocks for queries (b, h, t, d) over keys (b, g, s, d); scores are scaled by 1 / sqrt(d) unless told."""
        if (self.count is None) == (self.share is None):
            raise ValueError(f"{self} needs either a count of blocks or a share of them")
        factor = _scale(q, scale)
        way = _way(coarse_launch.refuse(q, factor))
        scores = way.pooled(q, k, factor, self.block)
        return _chosen(q, k, self.block, way.ROWS, scores, self._best)

    def _best(self, p: Tensor, forced: Tensor) -> Tensor:
        allowed = (p > -1).sum(-1, keepdim=True)
        count = torch.full_like(allowed, self.count or 0) if self.share is None else torch.ceil(self.share * allowed)
        order = _falling(p.masked_fill(forced, math.inf))
        rank = order.argsort(-1)
        return forced | (rank < count)


@dataclass(frozen=True)
class VerticalSlash:
    """MInference (arXiv:2407.02490): columns and diagonals with the most mass in the `last` queries' attention, the
    first columns and the nearest diagonals (`forced`) always among them."""

    vertical: int = 1000
    slash: int = 6096
    last: int = 64
    forced: int = 30

    def __str__(self) -> str:
        return f"vertical_slash({self.vertical}, {self.slash}, last={self.last}, forced={self.forced})"

    def __call__(self, q: Tensor, k: Tensor, scale: float | None = None) -> Selection:
        """For queries (b, h, t, d) over keys (b, g, s, d); scores are scaled by 1 / sqrt(d) unless told."""
        factor, last = _scale(q, scale), q[:, :, -self.last :]
        many = last.shape[2] > coarse_launch.MOST_QUERIES
        way = coarse if many else _way(coarse_launch.refuse(q, factor))
        vertical, slash = way.columns(last, k, factor)
        tables = {
            "vertical": _best(vertical, self.vertical, self.forced),
            "slash": _best(slash, self.slash, self.forced),
        }
        return Selection(_lines(str(self)), tables)


def _way(refused: str | None) -> Any:
    """Who scores: generated kernels where they can, else torch, on whichever device."""
    return coarse_launch if refused is None else coarse


def _best(mass: Tensor, count: int, forced: int) -> Tensor:
    """The first `forced` and the best others, `count` in all, as booleans."""
    mass = mass.clone()
    mass[..., :forced] = math.inf
    top = mass.topk(min(max(count, forced), mass.shape[-1]), -1).indices
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, top, True)


def _falling(x: Tensor) -> Tensor:
    """Places by falling value, equals in their order."""
    return torch.sort(x, dim=-1, descending=True, stable=True).indices


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _until(p: Tensor, forced: Tensor, threshold: float) -> Tensor:
    """The forced ones, then the best others, until their sum is `threshold` of the row's."""
    order = _falling(p.masked_fill(forced, math.inf))
    ranked = p.gather(-1, order).clamp(min=0)
    before = ranked.cumsum(-1) - ranked
    enough = threshold * ranked.sum(-1, keepdim=True)
    return forced | torch.zeros_like(forced).scatter_(-1, order, before < enough)


Choice = Callable[[Tensor, Tensor], Tensor]
"""Of scores, -1 where nothing may be read, and what is read in any case: what is read."""


def _chosen(q: Tensor, k: Tensor, size: int, held: int, scores: Scores, choice: Choice) -> Blocks:
    """Chooses row by row among the blocks that causality allows, `held` rows at once; the device is not waited for."""
    queries, keys = q.shape[2], k.shape[2]
    if (keys - queries) % size:
        raise ValueError(
            f"blocks of {size} must end where the queries begin: {queries} queries over {keys} keys begin at "
            f"{keys - queries}"
        )
    before, rows = (keys - queries) // size, -(-queries // size)
    found: list[Tensor] = []
    for first in range(0, rows, held):
        last = min(first + held, rows)
        p = scores(first, last)
        columns = torch.arange(p.shape[-1], device=p.device)
        own = before + torch.arange(first, last, device=p.device)[:, None]
        allowed = columns <= own
        forced = ((columns == own) | (columns == 0)).expand_as(p)
        found.append(choice(p.masked_fill(~allowed, -1.0), forced) & allowed)
    return Blocks(size, queries, keys, torch.cat(found, 2))
