"""Attention modules that cache a latent in place of keys and values.

The module runs its own forward up to its attention kernel. What it hands to its cache is not held: `Latent` makes one
vector a token of it, and that is held. What it hands to its kernel is read from the vectors, in one of two ways that
are equal but for rounding: expanded to keys and values (several queries: prefill, training), or absorbed (one query:
the heads of the query become rows over one wide head, and nothing is expanded). A module with a rope is given a table
that does not turn; the channels that keep a rope are turned here, with the table that was meant for the module.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, EncoderDecoderCache

from rewrite.emit.runtime.heads import Part
from rewrite.emit.runtime.views import CacheView, EncoderDecoderView, LayerView, pick

KERNEL = "reattn_latent"


class Call:
    """What the present call of a module was given: the rope of its queries, and whether a cache."""

    def __init__(self) -> None:
        self.cos: Tensor | None = None
        self.sin: Tensor | None = None
        self.cached = False


class Latent(nn.Module):
    """down (rank + rope_dim, features), read (h, rank, d), query_turn (h, rope_dim, d), up_v (h, dv, rank); see the
    docstring of each method for what it computes. `keep`: the heads to read of those that the module shows."""

    def __init__(self, sizes: dict[str, int], keep: list[int], like: Tensor) -> None:
        super().__init__()
        self.rank, self.rope_dim, self.heads = sizes["rank"], sizes["rope_dim"], sizes["heads"]
        self.keep = tuple(keep)
        self.call = Call()
        self.source: Any = None
        features = len(keep) * (sizes["dim"] + sizes["value_dim"])

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=like.dtype, device=like.device))

        self.down = empty(self.rank + self.rope_dim, features)
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
        """(batch, 1, tokens, rank + rope_dim): what is cached of keys and values (batch, heads, tokens, dim)."""
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


class LatentLayer(LayerView):
    """One layer of a cache, as a module reads it that looks into layers."""

    def __init__(self, inner: Any, rank: int) -> None:
        self.inner = inner
        self.rank = rank

    @property
    def keys(self) -> Tensor | None:
        """What is held."""
        return self.inner.keys if self.inner.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        """The part that values are read from."""
        return self.inner.keys[..., : self.rank] if self.inner.is_initialized else None


class LatentView(CacheView):
    """A cache as a module with a latent sees it: everything stands in `keys`, `values` are of width 0."""

    def __init__(self, inner: Cache, latent: Latent) -> None:
        self.inner = inner
        self.latent = latent

    @property
    def layers(self) -> list[LayerView]:
        """The layers, each as a view."""
        return [LatentLayer(layer, self.latent.rank) for layer in self.inner.layers]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hold the latent, give back all that is held and the part of it that values are read from."""
        new = self.latent.held(key_states, value_states)
        held, _ = self.inner.update(new, new[..., :0], layer_idx, *args, **kwargs)
        return held, held[..., : self.latent.rank]


class LatentPair(EncoderDecoderView):
    """The same for the pair of caches of a decoder with cross attention; the flags are the pair's own."""

    def __init__(self, inner: EncoderDecoderCache, latent: Latent) -> None:
        self.self_attention_cache = LatentView(inner.self_attention_cache, latent)
        self.cross_attention_cache = LatentView(inner.cross_attention_cache, latent)
        self.is_updated = inner.is_updated


class Enter:
    """Forward pre-hook of an attention module: its caches become views, its rope table one that does not turn.

    `rope` is the table's name, its place, which columns turn the cached channels, and the factor that cos and sin
    carry; None where the module has none."""

    def __init__(self, rope: dict[str, Any] | None) -> None:
        self.rope = rope

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Change the call as the class says."""
        latent: Latent = module.reattn
        latent.call.cached = False
        args = tuple(self._seen(a, latent) for a in args)
        kwargs = {n: self._seen(v, latent) for n, v in kwargs.items()}
        if self.rope is None:
            return args, kwargs
        name, place = self.rope["name"], self.rope["place"]
        if name in kwargs:
            return args, {**kwargs, name: self._still(kwargs[name], latent)}
        return (*args[:place], self._still(args[place], latent), *args[place + 1 :]), kwargs

    def _seen(self, value: Any, latent: Latent) -> Any:
        if not isinstance(value, Cache):
            return value
        latent.call.cached = True
        return LatentPair(value, latent) if isinstance(value, EncoderDecoderCache) else LatentView(value, latent)

    def _still(self, table: tuple[Tensor, Tensor], latent: Latent) -> tuple[Tensor, Tensor]:
        if self.rope is None:
            return table
        cos, sin = table
        columns, factor = self.rope["columns"], self.rope["factor"]
        latent.call.cos, latent.call.sin = cos[..., columns] / factor, sin[..., columns] / factor
        return torch.full_like(cos, factor), torch.zeros_like(sin)


class Shown:
    """A module as its attention kernel sees it, with another number of query heads to a kv head."""

    def __init__(self, module: nn.Module, groups: int) -> None:
        self.module = module
        self.num_key_value_groups = groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def latent_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> Any:
    """The attention function of such a module: the one that its model was told to use, on what the latent gives."""
    latent: Latent = module.reattn
    kernel = kernel_of(module, latent.source)
    held = key if latent.call.cached else latent.held(key, value)
    kwargs["scaling"] = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
    tokens = query.shape[2]
    if isinstance(tokens, torch.SymInt) or tokens != 1:
        q, k, v = latent.expanded(query, held)
        return kernel(Shown(module, 1), q, k, v, attention_mask, **kwargs)
    q, values = latent.absorbed(query), held[..., : latent.rank]
    if getattr(module, "sinks", None) is not None:
        out, weights = kernel(Shown(module, latent.heads), q, held, values, attention_mask, **kwargs)
        return torch.einsum("bthr,hdr->bthd", out, latent.up_v), weights
    kwargs["is_causal"] = False
    mask = attention_mask
    if mask is not None:
        mask = mask.expand(-1, latent.heads, -1, -1).transpose(1, 2)
    out, weights = kernel(Shown(module, 1), q.transpose(1, 2), held, values, mask, **kwargs)
    out = torch.einsum("bhtr,hdr->bthd", out, latent.up_v)
    return out, None if weights is None else weights.transpose(1, 2)


def kernel_of(module: nn.Module, config: Any) -> Any:
    """The attention function that a config names; "eager" is that of the module's own file."""
    name = config._attn_implementation
    if name == "eager":
        return getattr(sys.modules[type(module).__module__], "eager_attention_forward")  # noqa: B009
    return AttentionInterface()[name]


def install_latent(model: Part, recipe: dict[str, Any]) -> None:
    """One site with a latent."""
    module: Any = model.get_submodule(recipe["module"])
    like = next(p for p in module.parameters() if p.is_floating_point())
    module.reattn = Latent(recipe["sizes"], recipe["keep"], like)
    module.reattn.source = module.config
    module.config = copy.copy(module.config)
    # the module's own copy of the config alone names this kernel, so the model's choice stays the user's
    module.config._attn_implementation_internal = KERNEL
    module.register_forward_pre_hook(Enter(recipe["rope"]), with_kwargs=True)


AttentionInterface.register(KERNEL, latent_attention)
