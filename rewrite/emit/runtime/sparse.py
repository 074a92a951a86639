"""Attention modules that read fewer keys: a mask of their own, head by head, beside what the model masks.

The module runs its own forward up to its attention kernel; the kernel that its model was told to use is then given
only keys that some query may read, and a mask. Positions count from the first key that a query may see, so that
padding on the left moves nothing. Heads with one mask are a group and run together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewrite.emit.runtime.views import pick

TILE = 256
"""Queries that are looked at together: what none of them reads is left out."""


def number(tree: Any, q: Tensor, k: Tensor) -> Any:
    """An integer expression, nested lists [operation, operands...], over the positions q and k."""
    if not isinstance(tree, list):
        return {"q": q, "k": k}.get(tree, tree) if isinstance(tree, str) else tree
    name, *rest = tree
    if name == "at":
        table = torch.tensor(rest[0], device=k.device)
        return table[tuple(number(i, q, k).clamp(0, n - 1) for i, n in zip(rest[1:], table.shape, strict=True))]
    first, *others = [number(part, q, k) for part in rest]
    if name == "abs":
        return first.abs()
    for other in others:
        if name == "add":
            first = first + other
        elif name == "mul":
            first = first * other
        else:
            first = torch.div(first, other, rounding_mode="floor") if name == "div" else torch.remainder(first, other)
    return first


def holds(tree: Any, q: Tensor, k: Tensor) -> Tensor:
    """Where queries at positions q read keys at positions k, broadcast against each other, by a predicate in lists."""
    if isinstance(tree, bool):
        return torch.full(torch.broadcast_shapes(q.shape, k.shape), tree, device=k.device)
    name, *rest = tree
    if name == "not":
        return ~holds(rest[0], q, k)
    if name in ("and", "or"):
        first, *others = [holds(part, q, k) for part in rest]
        for other in others:
            first = first & other if name == "and" else first | other
        return first
    a, b = (number(part, q, k) for part in rest)
    compared = {"le": a <= b, "lt": a < b, "eq": a == b, "ne": a != b}[name]
    return compared if isinstance(compared, Tensor) else torch.full_like(q + k, compared, dtype=torch.bool)


@dataclass(frozen=True)
class Group:
    """Heads with one mask: `heads` of those that the module shows its cache, the query heads that read them, and the
    predicate (None: the model's own mask alone). No query reads a key that is neither one of the first `sink` nor
    nearer than `window`, where that is no None; `exact`: it reads all of those that stand before it."""

    heads: tuple[int, ...]
    queries: tuple[int, ...]
    keep: Any
    sink: int
    window: int | None
    exact: bool


@dataclass
class Hand:
    """Keys and values (batch, heads, tokens, dim) of a group as they are at hand while a cache is written. The last of
    them stand one after the other from position `first` on; the `sinks` before them are each row's own first ones, of
    which those that stand before `first` count."""

    k: Tensor
    v: Tensor
    first: int
    sinks: int


class Given:
    """What the present call of a module was given: tokens for a cache's layer that its kernel is to write, how many
    there were before, the first that the model's mask counts, and where each row begins."""

    def __init__(self) -> None:
        self.layer: Any = None
        self.new: tuple[Tensor, ...] = ()
        self.past: Any = 0
        self.offset = 0
        self.starts: Tensor | None = None


class Sparse:
    """The masks of one module. `shift`: the first key that the model's own mask shows is where a text begins, from
    which positions count. `algebra`: the masks of all heads as the operator reads them, None where it does not."""

    def __init__(self, groups: list[dict[str, Any]], shift: bool, algebra: str | None, source: Any) -> None:
        names = ("keep", "sink", "window", "exact")
        self.groups = [Group(tuple(g["heads"]), tuple(g["queries"]), *(g[n] for n in names)) for g in groups]
        self.shift = shift
        self.algebra = algebra
        self.source = source
        self.call = Given()
        order = [h for group in self.groups for h in group.queries]
        self.order = None if order == sorted(order) else tuple(order.index(h) for h in range(len(order)))
        self.heads = sum(len(group.heads) for group in self.groups)

    @property
    def bounded(self) -> bool:
        """Whether some head needs less than the whole context."""
        return any(group.window is not None for group in self.groups)

    def queries(self, x: Tensor, group: Group) -> Tensor:
        """The group's query heads."""
        return x if len(self.groups) == 1 else pick(x, group.queries)

    def shown(self, x: Tensor, group: Group) -> Tensor:
        """The group's keys or values of all that the kernel is given, once each or once for every query head."""
        if len(self.groups) == 1:
            return x
        return pick(x, group.heads if x.shape[1] == self.heads else group.queries)

    def joined(self, outs: list[Tensor]) -> Tensor:
        """(batch, tokens, heads, dim) of all heads, from those of the groups."""
        out = outs[0] if len(outs) == 1 else torch.cat(outs, 2)
        return out if self.order is None else pick(out.transpose(1, 2), self.order).transpose(1, 2)


def visible(mask: Tensor) -> Tensor:
    """A mask (batch, heads or 1, queries, keys) of booleans, or one that is added to scores, as booleans."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def starts(mask: Tensor | None) -> Tensor | None:
    """(batch, 1, queries, 1): the first key that each query may see."""
    return None if mask is None else visible(mask).any(1, keepdim=True).int().argmax(-1, keepdim=True)


def as_given(keep: Tensor, like: Tensor, additive: bool) -> Tensor:
    """A mask of booleans as the kernel takes it."""
    if not additive:
        return keep
    return torch.zeros(keep.shape, dtype=like.dtype, device=like.device).masked_fill(~keep, torch.finfo(like.dtype).min)


def both(keep: Tensor, given: Tensor | None, like: Tensor, additive: bool) -> Tensor:
    """What `keep` allows of what the model's own mask gives."""
    if given is None:
        return as_given(keep, like, additive)
    if given.dtype == torch.bool:
        return as_given(keep & given, like, additive)
    return torch.where(keep, given, torch.finfo(given.dtype).min)


def columns(rows: slice, past: int, group: Group, keys: int) -> list[slice]:
    """Which keys, 0, 1, ..., the queries of a tile may read by the group's bounds: one range, or two."""
    if group.window is None:
        return [slice(0, keys)]
    low, high = max(0, past + rows.start - group.window + 1), min(keys, past + rows.stop)
    return [slice(0, high)] if low <= group.sink else [slice(0, group.sink), slice(low, high)]
