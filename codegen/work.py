"""A piece of block-sparse attention in terms of tensors: which rows of queries, which keys, what is added to scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor

from codegen.options import Options
from codegen.pieces import Manner, Piece, Run, Shape, pieces
from rewrite.mask import Mask
from rewrite.site import IntArray


def exact(q: Tensor) -> torch.dtype:
    """What sums are made in."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Work:
    """A piece in terms of tensors. Rows of a kv head are (head, query), the queries of the first head first."""

    piece: Piece
    mask: Mask
    options: Options
    group: int
    dtype: torch.dtype

    @property
    def runs(self) -> tuple[Run, ...]:
        """What the queries read."""
        return self.piece.runs

    @property
    def parts(self) -> tuple[tuple[Run, ...], ...]:
        """Runs that are read at once: many short ones are, for a copy of their keys costs less than as many calls."""
        length = sum(run.last - run.first for run in self.runs)
        scattered = len(self.runs) > 2 and length < SHORT * len(self.runs)
        return (self.runs,) if scattered else tuple((run,) for run in self.runs)

    @property
    def folded(self) -> int:
        """Query heads that become rows."""
        return min(self.group, self.piece.heads[1] - self.piece.heads[0])

    @property
    def stacked(self) -> bool:
        """Several tiles of one row: tensors are (g, tiles, rows, c), so that what a head reads again stays near."""
        return self.piece.count > 1

    def _part(self, x: Tensor) -> Tensor:
        """(b, h, queries, c), (h, tiles, queries, c) in a stack: a view of x (b, h, t, c)."""
        piece, (first, last) = self.piece, self.piece.queries
        part = x[slice(*piece.rows), slice(*piece.heads), first : first + piece.count * (last - first)]
        return part[0].unflatten(1, (piece.count, -1)) if self.stacked else part

    def queries(self, x: Tensor) -> Tensor:
        """(b, g, rows, c) of the piece from x (b, h, t, c)."""
        return self.fold(self._part(x))

    def put(self, x: Tensor, value: Tensor) -> None:
        """Sets what `queries` gives."""
        part = self._part(x)
        if self.stacked and self.folded > 1:
            value = value.unflatten(2, (self.folded, -1)).transpose(1, 2)
        part.copy_(value.reshape(part.shape))

    def fold(self, x: Tensor) -> Tensor:
        """Heads of a kv head to rows."""
        if self.folded == 1:
            return x
        if self.stacked:
            return x.unflatten(0, (-1, self.folded)).transpose(1, 2).flatten(2, 3)
        return x.unflatten(1, (-1, self.folded)).flatten(2, 3)

    def read(self, x: Tensor, part: Sequence[Run]) -> Tensor:
        """(b, g, keys, c) of some runs."""
        return self.keys(x, part[0]) if len(part) == 1 else torch.cat([self.keys(x, run) for run in part], -2)

    def hidden(self, part: Sequence[Run]) -> Tensor | None:
        """What `added` is over some runs."""
        if len(part) == 1:
            return self.added(part[0])
        return torch.cat([self.added(run, sparse=False) for run in part], -1)

    def keys(self, x: Tensor, run: Run) -> Tensor:
        """(b, g, keys, c) of a run, a view of x (b, g, s, c)."""
        piece, (first, last) = self.piece, self.piece.heads
        of = slice(first // self.group, (last - 1) // self.group + 1)
        if not self.stacked:
            return x[slice(*piece.rows), of, run.first : run.last]
        part = x[piece.rows[0], of, run.first : run.last + (piece.count - 1) * run.step]
        if run.step == 0:
            return part[:, None].expand(-1, piece.count, -1, -1)
        return part.unfold(1, run.last - run.first, run.step).transpose(2, 3)

    @overload
    def added(self, run: Run) -> Tensor | None: ...

    @overload
    def added(self, run: Run, sparse: Literal[False]) -> Tensor: ...

    def added(self, run: Run, sparse: bool = True) -> Tensor | None:
        """What is added to scores, -inf where nothing is read: (b or 1, g or 1, rows, keys). Nothing where it is 0 and
        `sparse`."""
        if self.options.bias is None and self.options.slopes is None:
            if sparse and not run.masked:
                return None
            size = self.piece.count * (self.piece.queries[1] - self.piece.queries[0]) * (run.last - run.first)
            x = (_few if size <= FEW else _hidden)(self.mask, self.piece, run, self.dtype)
        else:
            x = self._biased(run)
        heads = x.shape[1]
        x = x.transpose(0, 1) if self.stacked else x
        return x.repeat(1, 1, self.folded, 1) if heads == 1 < self.folded else self.fold(x)

    def _biased(self, run: Run) -> Tensor:
        """(b, h or 1, t, s): bias and slopes, -inf where nothing is read."""
        bias, slopes, piece = self.options.bias, self.options.slopes, self.piece
        x = _hidden(self.mask, piece, run, self.dtype)
        if slopes is not None:
            at_q, at_k = _positions(piece, run, run.first, run.last)
            back = torch.from_numpy(at_q - at_k).to(self.dtype)
            x = x - slopes[slice(*piece.heads), None, None].to(self.dtype) * back
        if bias is not None:
            x = x + torch.cat([biased(bias, piece, run, i) for i in range(piece.count)])
        return x


SHORT = 256
"""Mean keys of runs below which they are read at once."""
FEW = 4096
"""Pairs of a run up to which what hides them is kept: the layers of a model ask for the same when they decode."""


def _hidden(mask: Mask, piece: Piece, run: Run, dtype: torch.dtype) -> Tensor:
    """(b, h or 1, t, s), tiles of a stack for b: 0, and -inf where nothing is read."""
    heads = np.arange(*piece.heads)[:, None, None] if mask.per_head else 0
    shape = piece.count, np.size(heads), piece.queries[1] - piece.queries[0], run.last - run.first
    x = torch.zeros(*shape, dtype=dtype)
    for first, last in run.masked:
        at = _positions(piece, run, first, last)
        keep = torch.from_numpy(mask.holds(*at, heads, piece.rows[0], piece.offset))
        x[..., first - run.first : last - run.first].masked_fill_(~keep, -torch.inf)
    return x


_few = lru_cache(maxsize=256)(_hidden)


def _positions(piece: Piece, run: Run, first: int, last: int) -> tuple[IntArray, IntArray]:
    """Queries (b, 1, t, 1) and keys (b, 1, 1, s) of every tile of the stack."""
    tile = np.arange(piece.count)[:, None, None, None]
    queries = np.arange(*piece.queries) + piece.offset
    return queries[:, None] + tile * len(queries), np.arange(first, last) + tile * run.step


def biased(bias: Tensor, piece: Piece, run: Run, tile: int = 0) -> Tensor:
    """The part of a bias that belongs to a tile of a piece and to a run; sizes of 1 stay. A view."""
    x = bias.reshape(*(1,) * (4 - bias.ndim), *bias.shape)
    first, last = piece.queries
    later, run = tile * (last - first), run.moved(tile * run.step)
    at = (piece.rows, piece.heads, (first + later, last + later), (run.first, run.last))
    return x[tuple(slice(*span) if size > 1 else slice(None) for span, size in zip(at, x.shape, strict=True))]


def works(q: Tensor, k: Tensor, mask: Mask, options: Options, manner: Manner) -> Iterator[Work]:
    """The pieces of a call, each query in one."""
    group = q.shape[1] // k.shape[1]
    spans = tuple(options.spans(q.shape[0], q.shape[2], k.shape[2]))
    for piece in pieces(mask, Shape(spans, q.shape[1], group), manner):
        yield Work(piece, mask, options, group, exact(q))
