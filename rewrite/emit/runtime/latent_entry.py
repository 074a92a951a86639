"""What stands before a module with a latent and before its attention kernel."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, EncoderDecoderCache

from rewrite.emit.runtime.heads import Part
from rewrite.emit.runtime.latent import KeyNorm, Latent, Rebuilt, Shown
from rewrite.emit.runtime.latent_shared import EnterShared, SharedPassing, SharedView
from rewrite.emit.runtime.latent_views import LatentPair, LatentView, Show

KERNEL = "reattn_latent"


class Enter:
    """Forward pre-hook of an attention module: its caches become views, its rope table one that does not turn.

    `rope` is the table's name, its place, which columns turn the cached channels and which way, and the factor that
    cos and sin, or one complex number, carry; None where the module has none."""

    def __init__(self, rope: dict[str, Any] | None) -> None:
        self.rope = rope

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Change the call as the class says."""
        latent: Latent = module.reattn
        latent.call.cached, latent.call.filled = False, None
        args = tuple(self._seen(a, latent) for a in args)
        kwargs = {n: self._seen(v, latent) for n, v in kwargs.items()}
        if self.rope is None:
            return args, kwargs
        name, place = self.rope["name"], self.rope["place"]
        if name in kwargs:
            return args, {**kwargs, name: self._still(kwargs[name], latent)}
        return (*args[:place], self._still(args[place], latent), *args[place + 1 :]), kwargs

    def _seen(self, value: Any, latent: Latent) -> Any:
        if not isinstance(value, Cache) or isinstance(value, SharedView | SharedPassing):
            return value
        latent.call.cached = True
        return LatentPair(value, latent) if isinstance(value, EncoderDecoderCache) else LatentView(value, latent)

    def _still(self, table: Any, latent: Latent) -> Any:
        if self.rope is None:
            return table
        cos, sin = (table.real, table.imag) if isinstance(table, Tensor) else table
        columns, factor = self.rope["columns"], self.rope["factor"]
        latent.call.cos, latent.call.sin = cos[..., columns] / factor, sin[..., columns] * (self.rope["sign"] / factor)
        if isinstance(table, Tensor):
            return torch.full_like(table, factor)
        return torch.full_like(cos, factor), torch.zeros_like(sin)


def latent_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> Any:
    """The attention function of such a module: the one that its model was told to use, on what the latent gives."""
    latent: Latent = module.reattn
    kernel = kernel_of(module, latent.source)
    held = latent.call.held
    if held is None:
        held = key if latent.call.cached else latent.held(key, value)
    latent.call.held = None
    kwargs["scaling"] = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
    tokens = query.shape[2]
    if isinstance(tokens, torch.SymInt) or tokens != 1:
        q, k, v = latent.expanded(query, held)
        return kernel(Shown(module, 1), q, k, v, attention_mask, **kwargs)
    return latent.decoded(module, kernel, query, held, attention_mask, kwargs)


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
    if recipe["rebuilt"]:
        module.reattn = Rebuilt(recipe["sizes"], recipe["keep"], like, recipe["rope"])
        norm = recipe["key_norm"]
        if norm is not None:
            module.reattn.norm = KeyNorm(model.get_submodule(norm["module"]), norm["shape"], norm["factor"])
    else:
        module.reattn = Latent(recipe["sizes"], recipe["keep"], like)
    if recipe["shown"] is not None:
        show = Show(module.reattn, recipe["shown"]["readers"], recipe["shown"]["argument"], recipe["shown"]["pair"])
        module.register_forward_pre_hook(show, with_kwargs=True)
        return
    module.reattn.source = module.config
    module.config = copy.copy(module.config)
    # the module's own copy of the config alone names this kernel, so the model's choice stays the user's
    module.config._attn_implementation_internal = KERNEL
    if recipe["shared"] is not None:
        module.register_forward_pre_hook(EnterShared(recipe["shared"]["argument"]), with_kwargs=True)
    module.register_forward_pre_hook(Enter(recipe["rope"]), with_kwargs=True)


AttentionInterface.register(KERNEL, latent_attention)
