"""Masks of a module's own, and a cache that keeps each row's first tokens and the last ones, as the file computes them.

What is at hand for a call are the tokens that were held and the new ones. Where none was dropped yet, the slot of a
token is its position; after that the first slots are each row's own first tokens and the others are the last ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewrite.emit.runtime.sparse import Sparse, holds, starts
from rewrite.errors import Refused
from rewrite.onnx.attention import OPTIONS
from rewrite.onnx.caches import Grown, Slot
from rewrite.onnx.functions import DOMAIN, VERSION


class Bounded(Grown):
    """A layer that drops tokens; `seen` were there before the call. `keys` and `values` are all that is at hand, and
    what is held of it is decided when the mask tells where each row begins."""

    def __init__(self, slot: Slot, past: list[Tensor], seen: Any) -> None:
        super().__init__(slot, past)
        self.seen = seen

    def get_seq_length(self) -> int:
        """Tokens seen, held or not."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All tokens: the mask of those at hand is picked from it."""
        return self.seen + query_length, 0


def refuse(sparse: Sparse) -> str | None:
    """Why a module's masks are not written."""
    if sparse.bounded and len(sparse.groups) > 1:
        return f"its heads have {len(sparse.groups)} masks, of which some drop tokens: their caches differ in length"
    return None


def masked(sparse: Sparse, layer: Any, given: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask (batch, heads or 1, tokens, keys at hand) to add, of the model's own (batch, 1, tokens, all) and the
    module's; what is held of a bounded layer is decided on the way."""
    begin = starts(given) if sparse.shift else None
    if isinstance(layer, Bounded):
        return _bounded(sparse, layer, given, begin, query)
    past = 0 if layer is None else key.shape[2] - query.shape[2]
    at = torch.arange(key.shape[2])
    keeps = [_keep(group.keep, past, at, begin, query) for group in sparse.groups]
    if all(keep is None for keep in keeps):
        return given
    every = [torch.ones((1, 1, 1, 1), dtype=torch.bool) if keep is None else keep for keep in keeps]
    if len(every) == 1:
        return _hidden(every[0], given, query)
    shape = (query.shape[0], 1, query.shape[2], key.shape[2])
    heads = {head: keep for group, keep in zip(sparse.groups, every, strict=True) for head in group.queries}
    return _hidden(torch.cat([heads[h].expand(shape) for h in range(query.shape[1])], 1), given, query)


TILE = 128
"""Queries that share the keys of their windows, where a window is as wide: more of them multiply keys that some do not
read, fewer are short products."""


def tiled(
    sparse: Sparse, layer: Any, given: Tensor | None, query: Tensor, key: Tensor, value: Tensor, options: OPTIONS
) -> Tensor | None:
    """(batch, tokens, heads, dv) of query, tile by tile on the keys that it may read; None where that is not all that
    the kernel is asked for, or where more than first tokens and a window decides what is read."""
    plain = all(options[name] is None for name in ("softcap", "position_bias", "sinks"))
    if not isinstance(layer, Bounded) or given is None or given.dtype != torch.bool or not plain:
        return None
    (group,) = sparse.groups
    if not group.exact:
        return None
    window = group.window or 0
    total = layer.seen + query.shape[2]
    away = torch.full((1,), total - key.shape[2], dtype=torch.int64)
    # a row begins where its last query sees the first key; the queries before it that are no padding see the same one
    begin = starts(given[:, :, -1:]) if sparse.shift else None
    row = torch.zeros((query.shape[0], 1, 1, 1), dtype=torch.int64) if begin is None else begin.long()
    layer.held = [_held(layer, x, row, away, total) for x in layer.held]
    early, place = _early(row, group.sink, away, key.shape[2])
    inputs = (query * options["scaling"], key, value, given, row, early, place)
    lowest = torch.full((), torch.finfo(query.dtype).min, dtype=query.dtype)
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::TiledAttention",
        (*inputs, lowest),
        {"sink": group.sink, "window": window, "tile": min(TILE, window)},
        dtype=query.dtype,
        shape=(query.shape[0], query.shape[2], query.shape[1], value.shape[3]),
        version=VERSION,
    )


def _early(row: Tensor, sink: int, away: Tensor, hand: Any) -> tuple[Tensor, Tensor]:
    """(batch, sink): the positions of each row's own first tokens, and the places where they are at hand; any place for
    those that a row of padding has not got yet."""
    early = row[:, 0, 0] + torch.arange(sink)
    place = torch.where((away > 0) & (early < away + sink), torch.arange(sink), early - away)
    return early, place.clamp(max=hand - 1)


def _keep(tree: Any, past: Any, at: Tensor, begin: Tensor | None, query: Tensor) -> Tensor | None:
    """(batch or 1, 1, tokens, keys): what a predicate allows; positions count from where a row begins."""
    if tree is None:
        return None
    q = (past + torch.arange(query.shape[2]))[:, None]
    keep = holds(tree, q, at) if begin is None else holds(tree, q - begin, at - begin)
    return keep if keep.dim() == 4 else keep[None, None]


def _hidden(keep: Tensor, given: Tensor | None, query: Tensor) -> Tensor:
    lowest = torch.finfo(query.dtype).min
    return torch.where(keep, torch.zeros((), dtype=query.dtype) if given is None else given, lowest)


def _bounded(
    sparse: Sparse, layer: Bounded, given: Tensor | None, begin: Tensor | None, query: Tensor
) -> Tensor | None:
    (group,) = sparse.groups
    hand, total = layer.held[0].shape[2], layer.seen + query.shape[2]
    away = torch.full((1,), total - hand, dtype=torch.int64)
    slots = torch.arange(hand)
    row = torch.zeros((1, 1, 1, 1), dtype=torch.int64) if begin is None else begin[:, :, -1:].long()
    first = away + group.sink
    apart = (slots < group.sink) & (away > 0)
    at = torch.where(apart, row + slots, slots + away)
    counts = ~apart | (at < first)
    layer.held = [_held(layer, x, row, away, total) for x in layer.held]
    keep = _keep(group.keep, layer.seen, at, begin, query)
    keep = counts if keep is None else keep & counts
    if given is None:
        return _hidden(keep, None, query)
    places = at.clamp(min=0).expand(given.shape[0], 1, given.shape[2], -1)
    return _hidden(keep, given.gather(-1, torch.minimum(places, torch.full((1,), total - 1))), query)


def _held(layer: Bounded, hand: Tensor, row: Tensor, away: Tensor, total: Any) -> Tensor:
    """Of (batch, heads, at hand, width) what later tokens need; its length is the file's to know."""
    sink, bound = layer.slot.sink, layer.slot.bound or 0
    _, place = _early(row, sink, away, hand.shape[2])
    dropped = torch.full((1,), total, dtype=torch.int64) > bound
    index = torch.where(dropped, place, torch.arange(sink)).expand(hand.shape[0], -1)
    inputs, attributes = (hand, index) if sink else (hand,), {"bound": bound}
    name = "KeepFirstAndLast" if sink else "KeepLast"
    made: Any = torch.onnx.ops.symbolic
    return made(f"{DOMAIN}::{name}", inputs, attributes, dtype=hand.dtype, shape=hand.shape, version=VERSION)


def slot_of(sparse: Sparse, key: Tensor, value: Tensor) -> Slot:
    """What a bounded layer caches."""
    (group,) = sparse.groups
    if group.window is None:
        raise Refused("onnx", "this layer drops no tokens")
    tensors = ((key.shape[1], key.shape[3]), (value.shape[1], value.shape[3]))
    return Slot(tensors, sink=group.sink, bound=group.sink + group.window - 1)
