"""Caches that hold a latent, as one attention module sees them: read by a kernel, or as expanded heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache

from rewrite.emit.runtime.latent import Latent
from rewrite.emit.runtime.views import CacheView, EncoderDecoderView, LayerView, Passing


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
        layer: Any = self.inner.layers[layer_idx]
        self.latent.call.filled = layer.get_seq_length() if layer.is_compileable else None
        return held, held[..., : self.latent.rank]


class LatentPair(EncoderDecoderView):
    """The same for the pair of caches of a decoder with cross attention; the flags are the pair's own."""

    def __init__(self, inner: EncoderDecoderCache, latent: Latent) -> None:
        self.self_attention_cache = LatentView(inner.self_attention_cache, latent)
        self.cross_attention_cache = LatentView(inner.cross_attention_cache, latent)
        self.is_updated = inner.is_updated


class ShownLayer(LatentLayer):
    """The same for a module that computes its attention itself: the heads are expanded."""

    def __init__(self, inner: Any, show: Show) -> None:
        self.inner = inner
        self.show = show

    @property
    def keys(self) -> Tensor | None:
        """Keys of all heads."""
        return self.show.heads(self.inner.keys)[0] if self.inner.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        """Values of all heads."""
        return self.show.heads(self.inner.keys)[1] if self.inner.is_initialized else None


class ShownView(LatentView):
    """The same for a module that computes its attention itself."""

    def __init__(self, inner: Cache, show: Show) -> None:
        super().__init__(inner, show.latent)
        self.show = show

    @property
    def layers(self) -> list[LayerView]:
        """The layers, each as a view."""
        return [ShownLayer(layer, self.show) for layer in self.inner.layers]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hold the latent, give back the heads that are expanded from it."""
        held, _ = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return self.show.heads(held)


class ShownPair(LatentPair):
    """The same for a pair of caches."""

    def __init__(self, inner: EncoderDecoderCache, show: Show) -> None:
        self.self_attention_cache = ShownView(inner.self_attention_cache, show)
        self.cross_attention_cache = ShownView(inner.cross_attention_cache, show)
        self.is_updated = inner.is_updated


class Through(Passing):
    """Stands where no cache is given and holds nothing: what comes in goes out as a latent would give it back."""

    def __init__(self, show: Show) -> None:
        super().__init__(())
        self.show = show

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The heads that are expanded from the latent."""
        return self.show.heads(self.show.latent.held(key_states, value_states))


class ThroughPair(EncoderDecoderCache):
    """The same in place of a pair of caches."""

    def __init__(self, show: Show) -> None:
        self.self_attention_cache = Through(show)
        self.cross_attention_cache = Through(show)
        self.is_updated = {}


class Show:
    """Forward pre-hook of a module that computes its attention itself, without a rope: it reads expanded heads.

    `readers` names a query head of every head that the module shows, `argument` the cache's name and place."""

    def __init__(self, latent: Latent, readers: list[int], argument: list[Any], pair: bool) -> None:
        self.latent = latent
        self.readers = readers
        self.name, self.place = argument
        self.pair = pair

    def heads(self, held: Tensor) -> tuple[Tensor, Tensor]:
        """(k, v) (batch, shown heads, tokens, dim) from what is held."""
        c = held[:, 0]
        k = torch.einsum("bsr,hrd->bhsd", c, self.latent.read[self.readers])
        return k, torch.einsum("bsr,hdr->bhsd", c, self.latent.up_v[self.readers])

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Change the call as the class says."""
        by_place = len(args) > self.place
        given = args[self.place] if by_place else kwargs.get(self.name)
        if isinstance(given, EncoderDecoderCache):
            view: Any = ShownPair(given, self)
        elif given is not None:
            view = ShownView(given, self)
        else:
            view = ThroughPair(self) if self.pair else Through(self)
        if by_place:
            return (*args[: self.place], view, *args[self.place + 1 :]), kwargs
        return args, {**kwargs, self.name: view}
