"""One group of heads attending under its mask, by the kernel that the model was told to use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewrite.emit.runtime.latent import Shown
from rewrite.emit.runtime.sparse import TILE, Given, Group, Hand, both, columns, holds
from rewrite.emit.runtime.views import pick


class ShownGroup(Shown):
    """A module as its kernel sees it, with some of its query heads alone."""

    def __init__(self, module: Any, group: Group) -> None:
        super().__init__(module, len(group.queries) // len(group.heads))
        sinks = getattr(module, "sinks", None)
        if isinstance(sinks, Tensor):
            self.sinks = sinks[list(group.queries)]


def of_group(kwargs: dict[str, Any], group: Group, rows: slice, keys: list[slice] | Tensor | None) -> dict[str, Any]:
    """A kernel's keyword arguments for some heads, queries and keys: what each head has of its own."""
    made = dict(kwargs)
    if isinstance(made.get("s_aux"), Tensor):
        made["s_aux"] = made["s_aux"][list(group.queries)]
    bias = made.get("position_bias")
    if isinstance(bias, Tensor):
        bias = pick(bias, group.queries) if bias.shape[1] > 1 else bias
        bias = bias if bias.shape[2] == 1 else bias[:, :, rows]
        made["position_bias"] = taken(bias, keys)
    return made


def taken(x: Tensor, keys: list[slice] | Tensor | None) -> Tensor:
    """Some keys along the last axis."""
    if keys is None:
        return x
    if isinstance(keys, Tensor):
        return x[..., keys]
    return x[..., keys[0]] if len(keys) == 1 else torch.cat([x[..., part] for part in keys], -1)


def some(x: Tensor, keys: list[slice] | Tensor) -> Tensor:
    """Some tokens of x (batch, heads, tokens, dim)."""
    if isinstance(keys, Tensor):
        return x[:, :, keys]
    return x[:, :, keys[0]] if len(keys) == 1 else torch.cat([x[:, :, part] for part in keys], 2)


class Attend:
    """The kernel of a call, and how it is called for one group of heads."""

    def __init__(
        self, module: Any, name: str, kernel: Any, call: Given, given: Tensor | None, kwargs: dict[str, Any]
    ) -> None:
        self.module, self.kernel, self.call, self.given, self.kwargs = module, kernel, call, given, kwargs
        self.additive = name == "eager"

    def mask_of(self, group: Group) -> Tensor | None:
        """The model's own mask as the group's heads see it."""
        given = self.given
        return given if given is None or given.shape[1] == 1 else pick(given, group.queries)

    def dense(self, group: Group, q: Tensor, k: Tensor, v: Tensor) -> Any:
        """All queries and all keys at once."""
        given, rows = self.mask_of(group), slice(0, q.shape[2])
        kwargs = of_group(self.kwargs, group, rows, None)
        if group.keep is None:
            return self.kernel(ShownGroup(self.module, group), q, k, v, given, **kwargs)
        keep = self._keep(group, rows, torch.arange(k.shape[2], device=k.device))
        return self._called(group, q, k, v, both(keep, given, q, self.additive), kwargs)

    def tiled(self, group: Group, q: Tensor, k: Tensor, v: Tensor) -> Any:
        """A tile of queries after the other, each with the keys that one of it may read."""
        given, outs, total = self.mask_of(group), list[Tensor](), q.shape[2]
        at = torch.arange(k.shape[2], device=k.device)
        for start in range(0, total, TILE):
            rows = slice(start, min(start + TILE, total))
            if self.call.starts is None:
                keys: list[slice] | Tensor = columns(rows, self.call.past, group, k.shape[2])
                keep = self._keep(group, rows, torch.cat([at[part] for part in keys]))
            else:
                keys, keep = [slice(0, k.shape[2])], self._keep(group, rows, at)
            own = None if given is None else taken(given[:, :, rows], keys)
            if group.window is None or own is not None:
                seen = keep if own is None else keep & (own if own.dtype == torch.bool else True)
                # a tile of padding reads nothing, and a kernel wants a key
                read = seen.flatten(0, -2).any(0).nonzero()[:, 0] if bool(seen.any()) else at[:1]
                keys, keep = at[torch.cat([at[part] for part in keys])][read], keep[..., read]
                own = None if own is None else own[..., read]
            mask = both(keep, own, q, False)
            kwargs = of_group(self.kwargs, group, rows, keys)
            outs.append(self._called(group, q[:, :, rows], some(k, keys), some(v, keys), mask, kwargs)[0])
        return torch.cat(outs, 1), None

    def held(self, group: Group, q: Tensor, hand: Hand) -> Any:
        """Queries behind a cache that holds a part of the keys."""
        given, rows = self.mask_of(group), slice(0, q.shape[2])
        kwargs, call = of_group(self.kwargs, group, rows, None), self.call
        if group.keep is None or (q.shape[2] == 1 and group.exact and given is None):
            return self.kernel(ShownGroup(self.module, group), q, hand.k, hand.v, given, **kwargs)
        at = hand.first + torch.arange(hand.k.shape[2] - hand.sinks, device=q.device)
        if not hand.sinks:
            keep, own = self._keep(group, rows, at), None if given is None else given[..., at - call.offset]
            return self._called(group, q, hand.k, hand.v, both(keep, own, q, self.additive), kwargs)
        begin = 0 if call.starts is None else call.starts[:, :, -1:]
        early = begin + torch.arange(hand.sinks, device=q.device)
        where = early.reshape(-1, 1, 1, hand.sinks)
        at = torch.cat([where, at.expand(len(where), 1, 1, -1)], -1)
        counts = torch.cat([where < hand.first, torch.ones_like(at[..., hand.sinks :], dtype=torch.bool)], -1)
        keep = self._keep(group, rows, at) & counts
        own = None
        if given is not None:
            shape = (max(len(at), len(given)), *given.shape[1:3], at.shape[-1])
            places = (at - call.offset).clamp(0, given.shape[-1] - 1).expand(shape)
            own = given.expand(shape[0], -1, -1, -1).gather(-1, places)
        return self._called(group, q, hand.k, hand.v, both(keep, own, q, self.additive), kwargs)

    def _keep(self, group: Group, rows: slice, at: Tensor) -> Tensor:
        """(batch or 1, 1, queries, keys): the group's predicate, positions counted from what a query may see first."""
        past = self.call.past
        q = (past + torch.arange(rows.start, rows.stop, device=at.device))[:, None]
        begin = self.call.starts
        if begin is not None:
            begin = begin if begin.shape[2] == 1 else begin[:, :, rows]
            q, at = q - begin, at - begin
        keep = holds(group.keep, q, at)
        return keep if keep.dim() == 4 else keep[None, None]

    def _called(self, group: Group, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, kwargs: dict[str, Any]) -> Any:
        return self.kernel(ShownGroup(self.module, group), q, k, v, mask, **kwargs)
