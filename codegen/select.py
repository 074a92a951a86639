"""Which keys to read, found from the queries and keys themselves at run time: each rule gives a mask.

A rule looks at coarse scores, a part of the block rows at a time, so that nothing as large as all pairs of tokens is
held. What it gives is blocks, or columns and diagonals, and goes to the same schedule and kernels as any other mask.
Choosing costs time too: below about ten thousand tokens dense attention is usually faster than any of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rewrite.mask import Mask, at, blocks, causal, mask

ROWS = 16
"""Rows of blocks whose scores are held at once."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """Blocks of `size` x `size` tokens that are read: `counts` (b, h, rows) of them, and which, ascending, in `index`
    (b, h, rows, most); what stands behind a row's count means nothing. Both are int32. Row i holds query indices
    [i * size, (i + 1) * size)."""

    size: int
    queries: int
    keys: int
    counts: Tensor
    index: Tensor

    @property
    def density(self) -> float:
        """Chosen blocks of all that causality allows."""
        rows, before = self.counts.shape[-1], (self.keys - self.queries) // self.size
        allowed = sum(before + i + 1 for i in range(rows)) * self.counts[..., 0].numel()
        return float(self.counts.sum()) / max(1, allowed)

    def table(self) -> Tensor:
        """(b, h, rows, columns) booleans."""
        columns = -(-self.keys // self.size)
        real = torch.arange(self.index.shape[-1], device=self.index.device) < self.counts[..., None]
        found = torch.zeros(*self.counts.shape, columns + 1, dtype=torch.bool, device=self.index.device)
        return found.scatter_(-1, torch.where(real, self.index, columns).long(), True)[..., :columns]

    def mask(self) -> Mask:
        """Causal, within the blocks."""
        return causal & blocks(self.table().cpu().numpy(), self.size, self.keys - self.queries)


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
        s, cells = self.stride, self.block // self.stride
        factor = _scale(q, scale) / s
        # the last query of a group meets the group's first key: sums run along antidiagonals
        coarse_q, coarse_k = _groups(q, s, self.block).flip(-2).flatten(-2), _groups(k, s, self.block).flatten(-2)
        real_q, real_k = -(-q.shape[2] // s), -(-k.shape[2] // s)
        before = (k.shape[2] - q.shape[2]) // s

        def scores(first: int, last: int) -> Tensor:
            at_q = torch.arange(first * cells, last * cells, device=q.device)
            at_k = torch.arange(coarse_k.shape[2], device=q.device)
            seen = (at_k <= at_q[:, None] + before) & (at_k < real_k)
            products = factor * _products(coarse_q[:, :, first * cells : last * cells], coarse_k)
            mass = products.masked_fill(~seen, -math.inf).softmax(-1)
            mass = mass * (at_q < real_q)[:, None]
            return mass.unflatten(-1, (-1, cells)).sum(-1).unflatten(-2, (-1, cells)).sum(-2)

        return _chosen(q, k, self.block, scores, lambda p, forced: _until(p, forced, self.threshold))


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
        mean_q, mean_k = (_means(x, self.block) for x in (q, k))
        before = (k.shape[2] - q.shape[2]) // self.block

        def scores(first: int, last: int) -> Tensor:
            seen = torch.arange(mean_k.shape[2], device=q.device) <= before + _column(first, last, q)
            products = _scale(q, scale) * _products(mean_q[:, :, first:last], mean_k)
            return products.masked_fill(~seen, -math.inf).softmax(-1)

        return _chosen(q, k, self.block, scores, self._best)

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

    def __call__(self, q: Tensor, k: Tensor, scale: float | None = None) -> Mask:
        """The mask for queries (b, h, t, d) over keys (b, g, s, d); scores are scaled by 1 / sqrt(d) unless told."""
        q, keys = q[:, :, -self.last :], k.shape[2]
        at_q = torch.arange(keys - q.shape[2], keys, device=q.device)[:, None]
        at_k = torch.arange(keys, device=q.device)
        products = _scale(q, scale) * _products(q, k)
        mass = products.masked_fill(at_k > at_q, -math.inf).softmax(-1)
        # entry (q, distance) stands at key q - distance
        turned = mass.gather(-1, (at_q - at_k).clamp(min=0).expand_as(mass)) * (at_k <= at_q)
        tables = {
            "vertical": _best(mass.sum(-2), self.vertical, self.forced),
            "slash": _best(turned.sum(-2), self.slash, self.forced),
        }
        return mask(
            lambda b, h, q, k: (k <= q) & ((at("vertical", b, h, k) == 1) | (at("slash", b, h, q - k) == 1)),
            str(self),
            {name: table.to(torch.int8).cpu().numpy() for name, table in tables.items()},
        )


def _products(q: Tensor, k: Tensor) -> Tensor:
    """(b, h, rows, columns) in float32; the heads of a kv head become rows, so that no key is copied."""
    folded = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3) @ k.mT
    return folded.float().unflatten(2, (-1, q.shape[2])).flatten(1, 2)


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


def _column(first: int, last: int, like: Tensor) -> Tensor:
    return torch.arange(first, last, device=like.device)[:, None]


def _padded(x: Tensor, block: int) -> Tensor:
    """Whole blocks of tokens, zeros at the end."""
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % block))


def _groups(x: Tensor, stride: int, block: int) -> Tensor:
    """(b, h, groups, stride, d)."""
    return _padded(x, block).unflatten(2, (-1, stride))


def _means(x: Tensor, block: int) -> Tensor:
    """(b, h, blocks, d) in float32, of the tokens that are there."""
    sums = _padded(x, block).unflatten(2, (-1, block)).float().sum(3)
    there = torch.full((sums.shape[2], 1), float(block), device=x.device)
    there[-1] = x.shape[2] - block * (sums.shape[2] - 1)
    return sums / there


def _until(p: Tensor, forced: Tensor, threshold: float) -> Tensor:
    """The forced ones, then the best others, until their sum is `threshold` of the row's."""
    order = _falling(p.masked_fill(forced, math.inf))
    ranked = p.gather(-1, order).clamp(min=0)
    before = ranked.cumsum(-1) - ranked
    enough = threshold * ranked.sum(-1, keepdim=True)
    return forced | torch.zeros_like(forced).scatter_(-1, order, before < enough)


Scores = Callable[[int, int], Tensor]
"""Rows first .. last of blocks as (b, h, rows, columns)."""
Choice = Callable[[Tensor, Tensor], Tensor]
"""Of scores, -1 where nothing may be read, and what is read in any case: what is read."""


def _chosen(q: Tensor, k: Tensor, size: int, scores: Scores, choice: Choice) -> Blocks:
    """Chooses row by row among the blocks that causality allows."""
    queries, keys = q.shape[2], k.shape[2]
    if (keys - queries) % size:
        raise ValueError(
            f"blocks of {size} must end where the queries begin: {queries} queries over {keys} keys begin at "
            f"{keys - queries}"
        )
    parts = list(_packed(_rows(queries, keys, size, scores, choice)))
    most = max((index.shape[-1] for _, index in parts), default=0)
    index = [torch.nn.functional.pad(x, (0, most - x.shape[-1])) for _, x in parts]
    return Blocks(size, queries, keys, torch.cat([n for n, _ in parts], 2), torch.cat(index, 2))


def _rows(queries: int, keys: int, size: int, scores: Scores, choice: Choice) -> Iterator[Tensor]:
    before, rows = (keys - queries) // size, -(-queries // size)
    for first in range(0, rows, ROWS):
        p = scores(first, min(first + ROWS, rows))
        columns = torch.arange(p.shape[-1], device=p.device)
        own = before + _column(first, min(first + ROWS, rows), p)
        allowed = columns <= own
        forced = ((columns == own) | (columns == 0)).expand_as(p)
        yield choice(p.masked_fill(~allowed, -1.0), forced) & allowed


def _packed(tables: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(counts, index) of booleans (b, h, rows, columns)."""
    for table in tables:
        counts = table.sum(-1, dtype=torch.int32)
        order = _falling(table.to(torch.int8))
        yield counts, order[..., : int(counts.max())].to(torch.int32)
