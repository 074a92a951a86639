"""The cache of a model while it is traced: its layers hold what the file takes in, and then what it gives out.

A layer is a few tensors (batch, heads, tokens, width): keys and values, or the latent and the part that keeps a rope.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


@dataclass(frozen=True)
class Slot:
    """What one layer caches: (heads, width) of each of its tensors; `rank` where the first is a latent; `bound` where
    it holds so many tokens at most, of which the first `sink` are each row's own first ones."""

    tensors: tuple[tuple[int, int], ...]
    rank: int | None = None
    sink: int = 0
    bound: int | None = None

    @property
    def numbers(self) -> int:
        """Numbers cached per token."""
        return sum(heads * width for heads, width in self.tensors)


class Grown(DynamicLayer):
    """Past and new tokens are concatenated. `keys` and `values` are the layer's two tensors, `held` all it has."""

    def __init__(self, slot: Slot, past: Sequence[Tensor]) -> None:
        super().__init__()
        self.slot = slot
        self.held = list(past)
        self.is_initialized = True
        self._show()

    def _show(self) -> None:
        # a latent without a rope is one tensor; what stands for the other is never read
        self.keys, self.values = self.held[0], self.held[-1]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hold the new tokens, give back all. The new latent comes with its rope part behind it, in one tensor."""
        new = [key_states, value_states]
        if self.slot.rank is not None:
            new = [key_states[..., : self.slot.rank], key_states[..., self.slot.rank :]]
        self.held = [self._joined(old, more) for old, more in zip(self.held, new, strict=False)]
        self._show()
        return self.held[0], self.held[-1]

    def _joined(self, old: Tensor, new: Tensor) -> Tensor:
        return torch.cat([old, new], dim=-2)

    def get_seq_length(self) -> int:
        """Tokens held; an empty past is of length 0 in the file, so no case is made of it here."""
        return self.held[0].shape[-2]


class Written(Grown):
    """The past is a buffer with room at its end, of which `filled` tokens are there; new ones are written behind them.
    ONNX Runtime does so in place where it is told that past and present are one buffer."""

    is_compileable = True

    def __init__(self, slot: Slot, past: Sequence[Tensor], filled: Any) -> None:
        super().__init__(slot, past)
        self.filled = filled

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As the class says."""
        found = super().update(key_states, value_states)
        self.filled = self.filled + key_states.shape[-2]
        return found

    def _joined(self, old: Tensor, new: Tensor) -> Tensor:
        at = torch.full((new.shape[0],), self.filled, dtype=torch.int64)
        how: Any = {"axis": -2, "mode": "linear"}
        return torch.onnx.ops.symbolic("TensorScatter", (old, new, at), how, dtype=old.dtype, shape=old.shape)

    def get_seq_length(self) -> int:
        """Tokens filled."""
        return self.filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The whole buffer: the mask says what of it is filled."""
        return self.held[0].shape[-2], 0


class Handed(Written):
    """The buffers go as they are to an operator that writes and reads them; what it gives back is put into `held`.
    `new` are the keys and values that it is to write."""

    new: tuple[Tensor, Tensor]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Give back the new tokens alone."""
        self.new = self.keys, self.values = key_states, value_states
        self.filled = self.filled + key_states.shape[-2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """What will be filled."""
        return self.filled + query_length, 0
