"""Caches as one attention module sees them: less is held than is shown."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache


def pick(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Heads of x (batch, heads, tokens, dim) by number; the regular cases without an index tensor."""
    n = len(heads)
    if heads == tuple(range(x.shape[1])):
        return x
    distinct = max(heads) + 1
    if n > distinct and n % distinct == 0 and heads == tuple(i // (n // distinct) for i in range(n)):
        return x[:, :, None].expand(-1, -1, n // distinct, -1, -1).flatten(1, 2)
    step = heads[1] - heads[0] if n > 1 else 1
    if step > 0 and heads == tuple(range(heads[0], heads[0] + n * step, step)):
        return x[:, heads[0] : heads[-1] + 1 : step]
    return torch.stack([x[:, i] for i in heads], 1)


class LayerView:
    """One layer of a cache, with all heads shown."""

    def __init__(self, inner: Any, of: tuple[int, ...]) -> None:
        self.inner = inner
        self.of = of

    @property
    def keys(self) -> Tensor | None:
        """Keys of all heads."""
        return self.inner.keys if not self.inner.is_initialized else pick(self.inner.keys, self.of)

    @property
    def values(self) -> Tensor | None:
        """Values of all heads."""
        return self.inner.values if not self.inner.is_initialized else pick(self.inner.values, self.of)

    @property
    def is_initialized(self) -> bool:
        """As the cache has it."""
        return self.inner.is_initialized

    @property
    def is_sliding(self) -> bool:
        """As the cache has it."""
        return self.inner.is_sliding

    @property
    def is_compileable(self) -> bool:
        """As the cache has it."""
        return self.inner.is_compileable

    def get_seq_length(self) -> int:
        """As the cache has it."""
        return self.inner.get_seq_length()

    def get_max_length(self) -> int:
        """As the cache has it."""
        return self.inner.get_max_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As the cache has it."""
        return self.inner.get_mask_sizes(query_length)


class CacheView(Cache):
    """A cache as one module sees it: of `given` heads those in `keep` are held, `of` says which one is shown where."""

    def __init__(self, inner: Cache, given: int, keep: tuple[int, ...], of: tuple[int, ...]) -> None:
        self.inner = inner  # no super().__init__(): a view holds no layers
        self.given = given
        self.keep = keep
        self.of = of

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # asked for while a copy is being made: there is nothing to look into yet
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def layers(self) -> list[LayerView]:
        """The layers, each as a view."""
        return [LayerView(layer, self.of) for layer in self.inner.layers]

    @property
    def layer_class_to_replicate(self) -> Any:
        """As the cache has it."""
        return self.inner.layer_class_to_replicate

    @property
    def offloading(self) -> bool:
        """As the cache has it."""
        return self.inner.offloading

    def __len__(self) -> int:
        return len(self.inner)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hold one head of each group, give back what is shown."""
        if key_states.shape[1] != self.given:
            raise ValueError(
                f"this cache view was made for {self.given} heads, the module shows {key_states.shape[1]}: "
                "tensor parallel is not possible here"
            )
        k, v = pick(key_states, self.keep), pick(value_states, self.keep)
        k, v = self.inner.update(k, v, layer_idx, *args, **kwargs)
        return pick(k, self.of), pick(v, self.of)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """As the cache has it."""
        return self.inner.get_seq_length(layer_idx)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """As the cache has it."""
        return self.inner.get_max_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As the cache has it."""
        return self.inner.get_mask_sizes(query_length, layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """As the cache has it."""
        return self.inner.get_query_offset(layer_idx)

    def has_previous_state(self, *args: Any, **kwargs: Any) -> bool:
        """As the cache has it."""
        return self.inner.has_previous_state(*args, **kwargs)

    def get_conv_state(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """As the cache has it."""
        return self.inner.get_conv_state(*args, **kwargs)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the cache has it."""
        return self.inner.update_conv_state(*args, **kwargs)

    def get_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """As the cache has it."""
        return self.inner.get_recurrent_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the cache has it."""
        return self.inner.update_recurrent_state(*args, **kwargs)

    @property
    def is_compileable(self) -> bool:
        """As the cache has it."""
        return self.inner.is_compileable

    @property
    def is_initialized(self) -> bool:
        """As the cache has it."""
        return self.inner.is_initialized

    @property
    def is_sliding(self) -> list[bool]:
        """As the cache has it."""
        return self.inner.is_sliding

    @property
    def is_linear(self) -> list[bool]:
        """As the cache has it."""
        return self.inner.is_linear


class EncoderDecoderView(EncoderDecoderCache):
    """The same for the pair of caches of a decoder with cross attention; the flags are the pair's own."""

    def __init__(self, inner: EncoderDecoderCache, given: int, keep: tuple[int, ...], of: tuple[int, ...]) -> None:
        self.self_attention_cache = CacheView(inner.self_attention_cache, given, keep, of)
        self.cross_attention_cache = CacheView(inner.cross_attention_cache, given, keep, of)
        self.is_updated = inner.is_updated


class Passing(Cache):
    """Stands where no cache is given and holds nothing: what comes in goes out, one head of each group."""

    def __init__(self, keep: tuple[int, ...]) -> None:
        self.keep = keep
        self.layers = []
        self.layer_class_to_replicate = None
        self.offloading = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hold one head of each group, give back what is shown."""
        return pick(key_states, self.keep), pick(value_states, self.keep)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """As the cache has it."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As the cache has it."""
        return query_length, 0


class PassingPair(EncoderDecoderCache):
    """The same in place of a pair of caches."""

    def __init__(self, keep: tuple[int, ...]) -> None:
        self.self_attention_cache = Passing(keep)
        self.cross_attention_cache = Passing(keep)
        self.is_updated = {}
