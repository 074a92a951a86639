"""A model with our attention in place of its own, for as long as it is traced. What it caches, and whether it reads
that as it is, is asked of the model by running it, never looked up."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from rewrite.errors import Refused
from rewrite.onnx import attention, sparse
from rewrite.onnx.caches import Handed, Slot

KERNEL = "reattn_onnx"
"""The name under which transformers finds our attention while a model is traced."""


@dataclass
class Stage:
    """The attention of one trace: `form` says which, `cache` is the one that the model was given, `seen` the layers of
    the cache that reached a kernel, with the rank where that was a latent."""

    form: str = "matmul"
    cache: Cache | None = None
    seen: dict[int, int | None] = field(default_factory=dict[int, "int | None"])
    bounded: dict[int, Slot] = field(default_factory=dict[int, Slot])
    """The layers that drop tokens."""
    boolean: bool = False
    """Whether the model makes masks of booleans: what is read tile by tile is a quarter of the bytes then."""

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **given: Any
    ) -> tuple[Tensor, None]:
        """The attention function, as transformers calls it."""
        scaling = given.get("scaling")
        options = {
            "scaling": query.shape[-1] ** -0.5 if scaling is None else scaling,
            "softcap": given.get("softcap"),
            "position_bias": given.get("position_bias"),
            "sinks": getattr(module, "sinks", None),
        }
        _require_mask(module, query, attention_mask, given)
        own = getattr(module, "reattn", None)
        if hasattr(own, "groups"):
            return self._sparse(own, module, query, key, value, attention_mask, options), None
        mask = _additive(attention_mask, query.dtype)
        if own is not None:
            return self._latent(own, query, key, mask, options), None
        return self._plain(module, query, key, value, mask, options), None

    def _plain(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Any
    ) -> Tensor:
        layer = self._layer(module, key, value)
        if isinstance(layer, Handed):
            return attention.contrib(query, layer, mask, options)
        plain = options["sinks"] is None and options["position_bias"] is None
        how = attention.operator if self.form == "attention" and plain else attention.grouped
        return how(query, key, value, mask, options)

    def _sparse(
        self, own: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Any
    ) -> Tensor:
        """Attention under masks of the module's own, on what is at hand."""
        reason = sparse.refuse(own)
        if reason is not None:
            raise Refused(
                "onnx", f"{type(module).__name__}: {reason}", "one mask for all heads of a layer can be written"
            )
        if own.call.layer is not None:  # an ordinary run, in which the module's own layer waits for its kernel
            at = next(i for i, layer in enumerate(self._layers()) if layer is own.call.layer)
            self.bounded[at] = sparse.slot_of(own, key, value)
            return attention.grouped(query, key, value, _additive(mask, query.dtype), options)
        layer = next((x for x in self._layers() if x.keys is key), None)
        out = sparse.tiled(own, layer, mask, query, key, value, options) if self.form == "matmul" else None
        if out is not None:
            return out
        mask = sparse.masked(own, layer, _additive(mask, query.dtype), query, key)
        return self._plain(module, query, key, value, mask, options)

    def _latent(self, latent: Any, query: Tensor, key: Tensor, mask: Tensor | None, options: Any) -> Tensor:
        given, latent.call.held = latent.call.held, None
        held = key if given is None else given
        at, layer = self._found(held)
        self.seen[at] = latent.rank
        if hasattr(latent, "up_k"):
            return attention.rebuilt(latent, query, held[..., : latent.rank], mask, options)
        return attention.absorbed(latent, query, held[..., : latent.rank], layer.values, mask, options)

    def _layer(self, module: nn.Module, key: Tensor, value: Tensor) -> Any:
        """The cache's layer that is read; None where nothing is cached."""
        if self.cache is None:
            return None
        for at, layer in enumerate(self._layers()):
            if layer.keys is key:
                self.seen[at] = None
                return layer
        held = [x.keys.shape[1] * x.keys.shape[3] + x.values.shape[1] * x.values.shape[3] for x in self._filled()]
        read = key.shape[1] * key.shape[3] + value.shape[1] * value.shape[3]
        if held and read > held[-1]:
            raise Refused(
                "onnx",
                f"{type(module).__name__} caches {held[-1]} numbers a token and expands them to {read} at every step",
                "nothing that is cached is expanded in a file of ours: convert(model, MLA(cache=1.0), emit='own') "
                "gives a latent model in absorbed form, without loss",
            )
        if self.form == "contrib":
            raise Refused(
                "onnx",
                f"{type(module).__name__} changes what its cache gives it, so no operator can take the cache as it is",
                "form 'shared' writes in place too",
            )
        return None

    def _layers(self) -> list[Any]:
        return [] if self.cache is None else list(self.cache.layers)

    def _filled(self) -> list[Any]:
        return [layer for layer in self._layers() if layer.keys is not None]

    def _found(self, held: Tensor) -> tuple[int, Any]:
        for at, layer in enumerate(self._layers()):
            if layer.keys is held:
                return at, layer
        raise Refused("onnx", "a latent is read that lies in no cache", "give the model in evaluation mode")

    def slots(self) -> list[Slot]:
        """What each layer caches, after a run with an ordinary cache."""
        found: list[Slot] = []
        for at, layer in enumerate(self._layers()):
            if at in self.bounded:
                found.append(self.bounded[at])
                continue
            if not all(isinstance(x, Tensor) and x.dim() == 4 for x in (layer.keys, layer.values)):
                raise Refused("onnx", f"layer {at} of its cache was not filled", "every layer has to cache something")
            rank = self.seen.get(at)
            width = layer.keys.shape[3]
            if rank is None:
                found.append(Slot(tuple((x.shape[1], x.shape[3]) for x in (layer.keys, layer.values))))
            else:
                rope = ((1, width - rank),) if width > rank else ()
                found.append(Slot(((1, rank), *rope), rank))
        return found


def _require_mask(module: Any, query: Tensor, mask: Tensor | None, given: dict[str, Any]) -> None:
    causal = given.get("is_causal")
    causal = getattr(module, "is_causal", False) if causal is None else causal
    one = not isinstance(query.shape[2], torch.SymInt) and query.shape[2] == 1
    if causal and mask is None and not one:
        raise Refused(
            "onnx",
            f"{type(module).__name__} leaves the order of tokens to its kernel and gives it no mask",
            "a file of ours reads a mask: the model's class has to make one by transformers' masking_utils",
        )


def _boolean(*given: Any, **named: Any) -> Tensor | None:
    """transformers' mask of booleans, which is made even where a kernel could do without."""
    return sdpa_mask(*given, **{**named, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def _additive(mask: Tensor | None, kind: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, torch.zeros((), dtype=kind), torch.finfo(kind).min)


SETTINGS = {"_attn_implementation_internal": KERNEL, "_experts_implementation_internal": "batched_mm"}
"""What a config says while its model is traced. Experts in one product: the others look at what each is given."""


@contextmanager
def staged(model: nn.Module, stage: Stage) -> Generator[None]:
    """The model computes its attention by `stage`, in evaluation mode, without gradients; then all is as it was."""
    before = [(c, n, v) for c in _configs(model) for n in SETTINGS if (v := getattr(c, n, None)) is not None]
    flags = [(m, m.training) for m in model.modules()]
    AttentionInterface.register(KERNEL, stage.attend)
    AttentionMaskInterface.register(KERNEL, _boolean if stage.boolean else eager_mask)
    model.eval()
    try:
        for config, name, _ in before:
            setattr(config, name, SETTINGS[name])
        with torch.no_grad():
            yield
    finally:
        AttentionInterface.register(KERNEL, _gone)
        for config, name, value in before:
            setattr(config, name, value)
        for module, training in flags:
            module.training = training


def _configs(model: nn.Module) -> list[Any]:
    """Every config that a module of the model reads, and those nested in them."""
    found: dict[int, Any] = {}
    todo: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    while todo:
        config = todo.pop()
        if hasattr(config, "to_dict") and id(config) not in found:
            found[id(config)] = config
            todo += [v for n, v in vars(config).items() if not n.startswith("_")]
    return list(found.values())


def _gone(*_: Any, **__: Any) -> Any:
    raise RuntimeError(f"the attention '{KERNEL}' exists only while a model is traced")
