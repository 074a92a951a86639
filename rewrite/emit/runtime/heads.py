"""Attention modules with fewer key and value heads than their class was written for.

The attention module runs its own forward; its projections hold each distinct head once and repeat it on the way out,
and the cache that it is given is wrapped so that each distinct head is held once. Two forms:

grouped   the module reads the distinct heads back, and its attention kernel shares each among several query heads
view      the module reads all heads back: less memory, no less time
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache

from rewrite.emit.runtime.views import CacheView, EncoderDecoderView, Passing, PassingPair


class Part:
    """Modules by the full model's paths, in the full model or in its base model (`prefix` then leads to that)."""

    def __init__(self, model: nn.Module, prefix: str) -> None:
        self.model = model
        self.prefix = prefix

    def holds(self, path: str) -> bool:
        """Whether the path lies in this part."""
        return path.startswith(self.prefix)

    def get_submodule(self, path: str) -> nn.Module:
        """The module at the full model's path."""
        return self.model.get_submodule(path[len(self.prefix) :])


class ShowHeads:
    """Forward pre-hook of an attention module: every cache among its arguments becomes a view."""

    def __init__(self, keep: list[int], of: list[int]) -> None:
        self.given = len(of)
        self.keep = tuple(keep)
        self.of = tuple(of)

    def seen(self, value: Any, of: tuple[int, ...]) -> Any:
        """A cache as a view, anything else as it is."""
        if isinstance(value, EncoderDecoderCache):
            return EncoderDecoderView(value, self.given, self.keep, of)
        return CacheView(value, self.given, self.keep, of) if isinstance(value, Cache) else value

    def shown(self, args: tuple[Any, ...], kwargs: dict[str, Any], of: tuple[int, ...]) -> Any:
        """All arguments with their caches as views."""
        return tuple(self.seen(a, of) for a in args), {n: self.seen(v, of) for n, v in kwargs.items()}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Change the call or its result as the class says."""
        return self.shown(args, kwargs, self.of)


class GroupHeads(ShowHeads):
    """The same, but the module reads back one head a group, also without a cache. `whole` names the kernels that
    cannot share a head among query heads: those read all heads. `argument` is the cache's name and place."""

    def __init__(self, keep: list[int], of: list[int], whole: list[str], argument: list[Any], pair: bool) -> None:
        super().__init__(keep, of)
        self.whole = tuple(whole)
        self.name, self.place = argument
        self.pair = pair

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Change the call or its result as the class says."""
        config: Any = module.config
        if config._attn_implementation in self.whole:
            return self.shown(args, kwargs, self.of)
        by_place = len(args) > self.place
        if (args[self.place] if by_place else kwargs.get(self.name)) is not None:
            return self.shown(args, kwargs, tuple(range(len(self.keep))))
        passing = PassingPair(self.keep) if self.pair else Passing(self.keep)
        if by_place:
            return (*args[: self.place], passing, *args[self.place + 1 :]), kwargs
        return args, {**kwargs, self.name: passing}


class RepeatRows:
    """Forward hook of a projection: its output channels, in runs (start, count) of those that it holds."""

    def __init__(self, runs: list[list[int]]) -> None:
        self.runs = tuple((start, count) for start, count in runs)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Change the call or its result as the class says."""
        return torch.cat([output[..., start : start + count] for start, count in self.runs], -1)


def shrink(model: Part, recipe: dict[str, Any]) -> None:
    """Give one projection its smaller tensors (their values come later) and say so in its attributes."""
    module = model.get_submodule(recipe["module"])
    for name, shape in recipe["tensors"].items():
        old = getattr(module, name)
        value = torch.empty(shape, dtype=old.dtype, device=old.device)
        setattr(module, name, nn.Parameter(value, requires_grad=old.requires_grad))
    for name, value in recipe["attributes"].items():
        setattr(module, name, value)


def install_heads(model: Part, recipe: dict[str, Any]) -> None:
    """One site with fewer heads: its projections, and the cache that its module is given."""
    for projection in recipe["projections"]:
        shrink(model, projection)
        model.get_submodule(projection["module"]).register_forward_hook(RepeatRows(projection["runs"]))
    for name in recipe["frozen"]:
        path, _, leaf = name.rpartition(".")
        getattr(model.get_submodule(path), leaf).requires_grad_(False)
    if recipe["cache"] is None:
        return
    module = model.get_submodule(recipe["cache"])
    hook = ShowHeads(recipe["keep"], recipe["of"])
    if recipe["form"] == "grouped":
        hook = GroupHeads(recipe["keep"], recipe["of"], recipe["whole"], recipe["argument"], recipe["pair"])
        module.num_key_value_groups = recipe["group"]
    module.register_forward_pre_hook(hook, with_kwargs=True)
