"""Attention modules that cache a latent in place of keys and values.

The module runs its own forward up to its attention kernel. What it hands to its cache is not held: `Latent` makes one
vector a token of it, and that is held. What it hands to its kernel is read from the vectors, in one of two ways that
are equal but for rounding: expanded to keys and values (several queries: prefill, training), or absorbed (one query:
the heads of the query become rows over one wide head, and nothing is expanded). A module with a rope is given a table
that does not turn; the channels that keep a rope are turned here, with the table that was meant for the module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rewrite.emit.runtime.views import pick


class Call:
    """What the present call of a module was given: the rope of its queries, and whether a cache."""

    def __init__(self) -> None:
        self.cos: Tensor | None = None
        self.sin: Tensor | None = None
        self.cached = False
        self.filled: Any = None
        self.held: Tensor | None = None

    def last(self, held: Tensor, q: Tensor) -> Any:
        """Where the last query stands among the held tokens: at their end, or before places not yet filled."""
        return held.shape[2] - 1 if self.filled is None else self.filled - 1


class Shown:
    """A module as its attention kernel sees it, with another number of query heads to a kv head."""

    def __init__(self, module: nn.Module, groups: int) -> None:
        self.module = module
        self.num_key_value_groups = groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class Latent(nn.Module):
    """down (rank + rope_dim, features), read (h, rank, d), query_turn (h, rope_dim, d), up_v (h, dv, rank); see the
    docstring of each method for what it computes. `keep`: the heads to read of those that the module shows."""

    def __init__(self, sizes: dict[str, int], keep: list[int], like: Tensor) -> None:
        super().__init__()
        self.rank, self.rope_dim, self.heads = sizes["rank"], sizes["rope_dim"], sizes["heads"]
        self.keep = tuple(keep)
        self.call = Call()
        self.source: Any = None

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=like.dtype, device=like.device))

        self.down = empty(self.rank + self.rope_dim, sizes["features"])
        self.read = empty(self.heads, self.rank, sizes["dim"])
        self.up_v = empty(self.heads, sizes["value_dim"], self.rank)
        if self.rope_dim:
            self.query_turn = empty(self.heads, self.rope_dim, sizes["dim"])

    def turned(self, x: Tensor) -> Tensor:
        """x (batch, heads, tokens, rope_dim), channel pairs (2j, 2j + 1) turned by the call's rope."""
        cos, sin = self.call.cos, self.call.sin
        if cos is None or sin is None:
            raise ValueError("this attention was given no rope table")
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)

    def held(self, k: Tensor, v: Tensor) -> Tensor:
        """(batch, 1, tokens, rank + rope_dim): what is cached of keys and values (batch, heads, tokens, dim), or of the
        two parts of what they share, each as one head."""
        k, v = pick(k, self.keep), pick(v, self.keep)
        y = torch.cat((k.transpose(1, 2).flatten(2), v.transpose(1, 2).flatten(2)), -1)
        c = nn.functional.linear(y, self.down)[:, None]
        if not self.rope_dim:
            return c
        return torch.cat((c[..., : self.rank], self.turned(c[..., self.rank :])), -1)

    def expanded(self, q: Tensor, held: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(q, k, v) head by head: q and k (batch, h, tokens, d + rope_dim), v (batch, h, tokens, dv)."""
        c = held[:, 0, :, : self.rank]
        k = torch.einsum("bsr,hrd->bhsd", c, self.read)
        v = torch.einsum("bsr,hdr->bhsd", c, self.up_v)
        if not self.rope_dim:
            return q, k, v
        r = held[..., self.rank :].expand(-1, self.heads, -1, -1)
        moving = self.turned(torch.einsum("bhtd,hpd->bhtp", q, self.query_turn))
        return torch.cat((q, moving), -1), torch.cat((k, r), -1), v

    def absorbed(self, q: Tensor) -> Tensor:
        """(batch, h, tokens, rank + rope_dim): queries that meet what is held as it is."""
        still = torch.einsum("bhtd,hrd->bhtr", q, self.read)
        if not self.rope_dim:
            return still
        return torch.cat((still, self.turned(torch.einsum("bhtd,hpd->bhtp", q, self.query_turn))), -1)

    def decoded(self, module: Any, kernel: Any, q: Tensor, held: Tensor, mask: Tensor | None, kwargs: Any) -> Any:
        """One query: (result, weights) of the kernel with nothing expanded; heads stand as rows over one wide head,
        but for a kernel that has a number of its own for each head (sinks)."""
        q, values = self.absorbed(q), held[..., : self.rank]
        if getattr(module, "sinks", None) is not None:
            out, weights = kernel(Shown(module, self.heads), q, held, values, mask, **kwargs)
            return torch.einsum("bthr,hdr->bthd", out, self.up_v), weights
        kwargs["is_causal"] = False
        bias = kwargs.get("position_bias")
        if bias is not None:
            kwargs["position_bias"] = bias.expand(-1, self.heads, -1, -1).transpose(1, 2)
        if mask is not None:
            mask = mask.expand(-1, self.heads, -1, -1).transpose(1, 2)
        out, weights = kernel(Shown(module, 1), q.transpose(1, 2), held, values, mask, **kwargs)
        out = torch.einsum("bhtr,hdr->bthd", out, self.up_v)
        return out, None if weights is None else weights.transpose(1, 2)


CHUNK = 1024
"""Tokens whose keys are rebuilt at a time while one query is decoded."""


class KeyNorm:
    """The norm of a module's keys, taken out of its place: there it gives back what it is given, and what the module
    caches are raw keys. `shape` says how it takes them: "row" (batch, tokens, g * d), "tokens" (batch, tokens, g, d) or
    "heads" (batch, g, tokens, d). `factor` stands behind it."""

    def __init__(self, norm: nn.Module, shape: str, factor: float) -> None:
        self.norm, self.shape, self.factor = norm, shape, factor
        norm.register_forward_hook(lambda _, given, __: given[0])

    def normed(self, k: Tensor) -> Tensor:
        """k (batch, g, tokens, d) as the module's norm makes it."""
        if self.shape == "heads":
            return self.norm.forward(k) * self.factor
        k = k.transpose(1, 2)
        made = self.norm.forward(k.flatten(2)).view(k.shape) if self.shape == "row" else self.norm.forward(k)
        return made.transpose(1, 2) * self.factor


class Rebuilt(Latent):
    """The latent alone is held; keys are expanded from it and turned at every step. `pairs` (2, n): the dims of a
    head that turn together, `turns` (n,) by how much a token, `kv_of` the kv head of every query head."""

    def __init__(self, sizes: dict[str, int], keep: list[int], like: Tensor, rope: dict[str, Any] | None) -> None:
        super().__init__({**sizes, "rope_dim": 0}, keep, like)
        del self.read
        shape = (len(keep), sizes["dim"], self.rank)
        self.up_k = nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device))
        self.pairs = None if rope is None else rope["pairs"]
        self.turns = None if rope is None else rope["turns"]
        self.norm: KeyNorm | None = None

    def queries(self, q: Tensor) -> Tensor:
        """q (batch, h, tokens, d) turned by the call's rope."""
        cos, sin = self.call.cos, self.call.sin
        return q if cos is None or sin is None else self._turn(q, cos[:, None].to(q.dtype), sin[:, None].to(q.dtype))

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = self.pairs or ([], [])
        a, b = x[..., first], x[..., second]
        out = x.clone()
        out[..., first] = a * cos - b * sin
        out[..., second] = b * cos + a * sin
        return out

    def keys(self, c: Tensor, start: int, last: Any) -> Tensor:
        """(batch, h, tokens, d): `grouped_keys`, one for every query head."""
        k = self.grouped_keys(c, start, last)
        groups = self.heads // k.shape[1]
        return k.repeat_interleave(groups, 1) if groups > 1 else k

    def grouped_keys(self, c: Tensor, start: int, last: Any) -> Tensor:
        """(batch, g, tokens, d): keys of some held tokens, the first of which stands at `start` among all that are
        held; the call's last query stands at `last`. Tokens are taken to follow one another without gaps."""
        k = torch.einsum("bsr,gdr->bgsd", c, self.up_k)
        k = k if self.norm is None else self.norm.normed(k)
        cos, sin = self.call.cos, self.call.sin
        if cos is not None and sin is not None:
            away = torch.arange(start, start + c.shape[1], device=c.device) - last
            turns = torch.tensor(self.turns, dtype=torch.float32, device=c.device)
            angle = away[:, None].float() * turns
            near, far = (cos[:, -1:], sin[:, -1:]), (angle.cos(), angle.sin())
            cos, sin = near[0] * far[0] - near[1] * far[1], near[1] * far[0] + near[0] * far[1]
            k = self._turn(k, cos[:, None].to(k.dtype), sin[:, None].to(k.dtype))
        return k

    def expanded(self, q: Tensor, held: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(q, k, v) head by head, all turned."""
        c = held[:, 0]
        k = self.keys(c, 0, self.call.last(held, q))
        return self.queries(q), k, torch.einsum("bsr,hdr->bhsd", c, self.up_v)

    def decoded(self, module: Any, kernel: Any, q: Tensor, held: Tensor, mask: Tensor | None, kwargs: Any) -> Any:
        """One query: keys are rebuilt a chunk at a time, so that those of all tokens are never held together."""
        c, last, turned = held[:, 0], self.call.last(held, q), self.queries(q)
        parts = [turned @ self.keys(x, i * CHUNK, last).transpose(-1, -2) for i, x in enumerate(c.split(CHUNK, 1))]
        p = probabilities(module, torch.cat(parts, -1), mask, kwargs)
        out = torch.einsum("bhtr,hdr->bthd", p @ held[..., : self.rank], self.up_v)
        return out, p


def probabilities(module: Any, products: Tensor, mask: Tensor | None, kwargs: Any) -> Tensor:
    """(batch, h, 1, tokens) as an attention kernel makes them of products of queries and keys."""
    scores = products * kwargs["scaling"]
    cap, sinks, bias = kwargs.get("softcap"), getattr(module, "sinks", None), kwargs.get("position_bias")
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores if bias is None else scores + bias
    if mask is not None:
        mask = mask[..., : scores.shape[-1]]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat((scores, sinks.reshape(1, -1, 1, 1).expand(len(scores), -1, 1, 1)), -1)
    p = scores.float().softmax(-1).to(products.dtype)
    p = p[..., :-1] if sinks is not None else p
    return nn.functional.dropout(p, kwargs.get("dropout", 0.0), module.training)
