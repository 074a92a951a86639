"""A cache layer whose heads hold different numbers of tokens: all, or each row's first ones and the last ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rewrite.emit.runtime.sparse import Group, Hand, Sparse
from rewrite.emit.runtime.views import CacheView, EncoderDecoderView, pick


class BoundedLayer(DynamicLayer):
    """Keys and values of all groups of heads, one group after the other, in one tensor (batch, 1, rows, dim): so what a
    cache does with its layers' batches, devices and bytes needs no second way. Within a group a row is a head of a
    token, tokens in order, each row's own first ones before the last ones."""

    is_croppable = False

    def __init__(self, groups: list[Group], sliding: int | None) -> None:
        super().__init__()
        self.groups = groups
        self.cumulative_length = 0
        self.is_sliding = sliding is not None  # which layers of a model are built one mask for
        self.sliding_window = sliding

    def most(self, group: Group) -> int | None:
        """Tokens that a group needs of the past, at most: its first ones, and the last but the next query's own."""
        return None if group.window is None else group.sink + group.window - 1

    def state(self, group: Group, length: int) -> tuple[int, int]:
        """(first ones held apart, position of the first of the others) after so many tokens."""
        most = self.most(group)
        if most is None or group.window is None or length <= most:
            return 0, 0
        return group.sink, length - group.window + 1

    def append(self, k: Tensor, v: Tensor, starts: Tensor | None) -> list[Hand]:
        """Add tokens, k and v (batch, heads, tokens, dim) of all heads. Gives what each group has at hand for them, and
        holds of it what later tokens need. `starts` (batch,): where each row begins."""
        old, length = self.cumulative_length, self.cumulative_length + k.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        hands: list[Hand] = []
        parts: list[tuple[Tensor, Tensor]] = []
        sides: tuple[Any, ...] = ((self.keys, k), (self.values, v))
        place = 0
        for group in self.groups:
            n = len(group.heads)
            apart, first = self.state(group, old)
            rows = n * (apart + old - first)
            both = [
                torch.cat([held[:, 0, place : place + rows].unflatten(1, (-1, n)), rows_of(pick(new, group.heads))], 1)
                if old
                else rows_of(pick(new, group.heads))
                for held, new in sides
            ]
            place += rows
            hands.append(Hand(both[0].transpose(1, 2), both[1].transpose(1, 2), first, apart))
            parts.append((self.cut(both[0], group, old, length, starts), self.cut(both[1], group, old, length, starts)))
        self.keys, self.values = (
            torch.cat([x.flatten(1, 2) for x in side], 1)[:, None] for side in zip(*parts, strict=True)
        )
        self.cumulative_length = length
        return hands

    def cut(self, hand: Tensor, group: Group, old: int, length: int, starts: Tensor | None) -> Tensor:
        """What is held of x (batch, tokens, heads, dim) at hand."""
        apart, first = self.state(group, length)
        before, since = self.state(group, old)
        if not apart and not first:
            return hand
        rest = hand[:, before + first - since :]
        if not group.sink:
            return rest
        if starts is None:
            return torch.cat([hand[:, : group.sink], rest], 1)
        # a row's own first tokens may still come: each is taken when it leaves the last ones
        early = starts[:, None] + torch.arange(group.sink, device=hand.device)
        place = torch.where(early < since, torch.arange(group.sink, device=hand.device), before + early - since)
        place = place.clamp(0, hand.shape[1] - 1)[..., None, None].expand(-1, -1, *hand.shape[2:])
        return torch.cat([hand.gather(1, place), rest], 1)

    def get_seq_length(self) -> int:
        """Tokens seen, held or not."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, first key) of the mask that the model makes: of all tokens, or of its own window."""
        length, window = self.cumulative_length, self.sliding_window
        if window is None:
            return length + query_length, 0
        offset = max(length - window + 1, 0)
        return (window - 1 if length >= window else length) + query_length, offset

    def get_max_length(self) -> int:
        """No longest text, or the model's own window."""
        return -1 if self.sliding_window is None else self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        """What is dropped cannot be got back."""
        if tokens_to_remove:
            raise ValueError(
                "heads of this cache hold the last tokens alone, so tokens cannot be taken back: generate without an "
                "assistant and without prompt lookup"
            )


def rows_of(x: Tensor) -> Tensor:
    """(batch, tokens, heads, dim)."""
    return x.transpose(1, 2)


class SparseView(CacheView):
    """A cache as a module with masks of its own sees it: a layer that may grow without end becomes a bounded one."""

    def __init__(self, inner: Any, sparse: Sparse) -> None:
        self.inner = inner
        self.sparse = sparse

    @property
    def layers(self) -> list[Any]:
        """As the cache has it."""
        return self.inner.layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Give back what is given: the kernel reads what is at hand, and writes what is to be held."""
        call = self.sparse.call
        layer = bounded(self.inner, layer_idx, self.sparse)
        if layer is not None:
            past = layer.get_seq_length()
            # a static layer counts on in the tensor that it gives
            call.past = past.clone() if isinstance(past, Tensor) else past
            call.offset = layer.get_mask_sizes(key_states.shape[2])[1]
        if not isinstance(layer, BoundedLayer):
            return self.inner.update(key_states, value_states, layer_idx, *args, **kwargs)
        call.layer, call.new = layer, (key_states, value_states)
        return key_states, value_states


class SparsePair(EncoderDecoderView):
    """The same for the pair of caches of a decoder with cross attention; the flags are the pair's own."""

    def __init__(self, inner: Any, sparse: Sparse) -> None:
        self.self_attention_cache = SparseView(inner.self_attention_cache, sparse)
        self.cross_attention_cache = inner.cross_attention_cache
        self.is_updated = inner.is_updated


def bounded(cache: Any, layer_idx: int, sparse: Sparse) -> Any:
    """The cache's layer; a dynamic one in its place becomes bounded where some head needs less than all tokens."""
    while len(cache.layers) <= layer_idx and cache.layer_class_to_replicate is DynamicLayer:
        cache.layers.append(DynamicLayer())
    layer: Any = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if not sparse.bounded or type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        return layer
    made = BoundedLayer(sparse.groups, getattr(layer, "sliding_window", None))
    if layer.is_initialized and layer.get_seq_length():
        if layer.keys.shape[2] < layer.get_seq_length():
            raise ValueError("this cache was filled by another model, which has already dropped tokens that are needed")
        made.append(layer.keys, layer.values, None)
    cache.layers[layer_idx] = made
    return made
