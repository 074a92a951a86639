"""A site's low-rank projections as tensors of the checkpoint: which rows of a tensor stay, and which come from latents.

before: u = W x          after: c = down x,   u[rest] = W[rest] x,   u[rows] = up c
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rewrite.heads import Factor, Factors, Rewritten
from rewrite.layout import only_root
from rewrite.site import IntArray, Operand, Root, Site, Tensors

Shape = Callable[[str], Sequence[int]]
"""State-dict name -> shape."""


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of one tensor that come from one latent."""

    rows: IntArray
    factor: Factor
    lender: str | None
    """The tensor beside which `down` is held, where that is another one."""


@dataclass(frozen=True, eq=False)
class Cut:
    """One tensor: a matrix of `count` rows of `inputs` numbers, or its transpose."""

    tensor: str
    bias: str | None
    transposed: bool
    count: int
    inputs: int
    parts: tuple[Part, ...]

    @property
    def rest(self) -> IntArray:
        """Rows that stay."""
        made = np.concatenate([p.rows for p in self.parts])
        return np.setdiff1d(np.arange(self.count), made, assume_unique=True)

    @property
    def order(self) -> IntArray:
        """For every row its place among the rows that stay and the parts' rows behind them."""
        place = np.empty(self.count, dtype=np.int64)
        place[np.concatenate([self.rest, *(p.rows for p in self.parts)])] = np.arange(self.count)
        return place

    def matrix(self, tensor: Tensor) -> Tensor:
        """The tensor as (count, inputs)."""
        flat = tensor.detach().reshape(-1)
        return flat.view(self.inputs, self.count).T if self.transposed else flat.view(self.count, self.inputs)


def site_cuts(site: Site, new: Rewritten, tensors: Tensors) -> tuple[Cut, ...] | str:
    """The tensors of a site that are cut."""
    return () if new.factors is None else cuts(site, new.factors, lambda name: tensors(name).shape)


def cuts(site: Site, factors: Factors, shape: Shape) -> tuple[Cut, ...] | str:
    """The tensors that change, or why one of them is no matrix whose rows could be told apart."""
    found: list[Cut] = []
    for operand, factor in ((site.k, factors.k), (site.v, factors.v)):
        if factor is None:
            continue
        root = only_root(operand)
        one = _cut(root, operand, factor, shape)
        if isinstance(one, str):
            return one
        if found and found[0].tensor == root.tensor:
            found = [_merged(found[0], one, factors.shared)]
        elif found and factors.shared:
            found.append(_merged(one, None, True, lender=found[0].tensor))
        else:
            found.append(one)
    return tuple(found)


def _cut(root: Root, operand: Operand, factor: Factor, shape: Shape) -> Cut | str:
    numbers, starts = int(np.prod(shape(root.tensor))), root.starts[operand.rows.reshape(-1)]
    transposed = root.stride != 1
    count = root.stride if transposed else numbers // root.columns
    rows = starts if transposed else starts // root.columns
    whole = (
        count * root.columns == numbers
        and int(rows.max()) < count
        and (transposed or not (starts % root.columns).any())
    )
    if not whole:
        return f"{root.tensor} of shape {tuple(shape(root.tensor))} is no matrix of {root.columns} inputs"
    return Cut(root.tensor, root.bias, transposed, count, root.columns, (_part(rows, factor.up, factor.down),))


def _part(rows: IntArray, up: Tensor, down: Tensor, lender: str | None = None) -> Part:
    """With its rows in the order in which the tensor has them."""
    order = np.argsort(rows)
    return Part(rows[order], Factor(up[torch.from_numpy(order)], down), lender)


def _merged(first: Cut, second: Cut | None, shared: bool, lender: str | None = None) -> Cut:
    """Two parts of one tensor, of one latent as one part; or a part with its lender."""
    (part,) = first.parts
    if second is None:
        parts = (Part(part.rows, part.factor, lender),)
    elif shared:
        up = torch.cat([part.factor.up, second.parts[0].factor.up])
        parts = (_part(np.concatenate([part.rows, second.parts[0].rows]), up, part.factor.down),)
    else:
        parts = (part, *second.parts)
    return Cut(first.tensor, first.bias, first.transposed, first.count, first.inputs, parts)
