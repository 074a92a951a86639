"""Caches of a module that hands its cache few numbers, shared by all heads, and expands what it reads back.

What it reads back is one token, whose expansion costs nothing; its attention kernel reads from what is held.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache

from rewrite.emit.runtime.latent import Latent
from rewrite.emit.runtime.latent_views import LatentView
from rewrite.emit.runtime.views import Passing


class SharedView(LatentView):
    """A cache as such a module sees it."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hold the latent, give back one token in place of all."""
        held, _ = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.latent.call.held = held
        return key_states[:, :, :1], value_states[:, :, :1]


class SharedPassing(Passing):
    """Stands where no cache is given and holds nothing."""

    def __init__(self, latent: Latent) -> None:
        super().__init__(())
        self.latent = latent

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Make the latent for the kernel, give back one token in place of all."""
        self.latent.call.held = self.latent.held(key_states, value_states)
        return key_states[:, :, :1], value_states[:, :, :1]


class EnterShared:
    """Forward pre-hook that runs first: the cache, or what stands in its place, as the classes above show it.
    `argument` is the cache's name and place."""

    def __init__(self, argument: list[Any]) -> None:
        self.name, self.place = argument

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Change the call as the class says."""
        latent: Latent = module.reattn
        latent.call.held = None
        by_place = len(args) > self.place
        given = args[self.place] if by_place else kwargs.get(self.name)
        view = SharedView(given, latent) if isinstance(given, Cache) else SharedPassing(latent)
        if by_place:
            return (*args[: self.place], view, *args[self.place + 1 :]), kwargs
        return args, {**kwargs, self.name: view}
