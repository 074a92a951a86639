"""What the exporter is shown: tensors in, tensors out, with names for them and for every axis that moves."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rewrite.errors import BadUsage, Refused
from rewrite.examples import Inputs, given, propose
from rewrite.failure import describe
from rewrite.onnx import names
from rewrite.onnx.caches import Grown, Handed, Slot, Written
from rewrite.onnx.sparse import Bounded
from rewrite.onnx.stage import Stage, staged

BATCH, TOKENS, PAST, ROOM = 2, 3, 5, 4
"""Sizes while tracing: all sums differ, and none is 1, so that no two axes are taken for one and none is fixed."""


@dataclass(frozen=True, eq=False)
class Traced:
    """A module for the exporter, its example, and the names of inputs, outputs and of moving axes."""

    module: nn.Module
    args: tuple[Any, ...]
    shapes: tuple[Any, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    slots: tuple[Slot, ...] = ()
    """What each layer caches; empty where nothing is cached."""
    named: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Every argument of the model by name, where nothing is cached."""

    def named_input(self, argument: str, *place: int) -> str:
        """The input's name of a tensor at a place in an argument of the module's forward."""
        if argument == "past":
            return names.past(*place)
        return self.inputs[place[0]] if place else argument


class Decoding(nn.Module):
    """A language model as a function of tokens and cache: (logits, all that is cached)."""

    def __init__(self, model: nn.Module, stage: Stage, slots: Sequence[Slot], positions: bool) -> None:
        super().__init__()
        self.model, self.stage, self.slots, self.positions = model, stage, slots, positions

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[list[Tensor]]) -> Any:
        """One step: any number of new tokens behind any number of cached ones."""
        filled = attention_mask.shape[1] - input_ids.shape[1]
        layers: list[Any] = [self._layer(slot, held, filled) for slot, held in zip(self.slots, past, strict=True)]
        self.stage.cache = Cache(layers=layers)
        more = {"position_ids": position_ids} if self.positions else {}
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=self.stage.cache, use_cache=True, **more
        )
        return out.logits, [layer.held for layer in layers]

    def _layer(self, slot: Slot, held: list[Tensor], filled: Any) -> Grown:
        if slot.bound is not None:
            return Bounded(slot, held, filled)
        if self.stage.form == "shared":
            return Written(slot, held, filled)
        return Handed(slot, held, filled) if self.stage.form == "contrib" else Grown(slot, held)


class Plain(nn.Module):
    """A model without a cache, called by its arguments' names: the tensors of what it gives."""

    def __init__(self, model: nn.Module, named: Mapping[str, Any], arguments: Sequence[str]) -> None:
        super().__init__()
        self.model, self.named, self.arguments = model, named, arguments

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What the model gives for these tensors, in the order of `outputs_of`."""
        given = dict(zip(self.arguments, tensors, strict=True))
        return tuple(value for _, value in outputs_of(self.model(**{**self.named, **given})))


def decodes(model: nn.Module) -> bool:
    """Whether a model generates text with a cache of its own."""
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        return False
    if getattr(model.config, "is_encoder_decoder", False):
        raise Refused(
            "onnx",
            f"{type(model).__name__} is an encoder and a decoder, which are two graphs",
            "export its encoder alone: export_onnx(model.get_encoder(), path)",
        )
    return takes(model, "input_ids")


def takes(model: nn.Module, argument: str) -> bool:
    """Whether a model's forward has an argument of this name."""
    return argument in inspect.signature(model.forward).parameters


def learn(model: Any, vocabulary: int) -> list[Slot]:
    """What each layer caches, read from a run with an ordinary cache."""
    for at, layer in enumerate(DynamicCache(config=model.config.get_text_config()).layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise Refused(
                "onnx",
                f"layer {at} of its cache is a {type(layer).__name__}, which holds more than keys and values",
                "only attention with keys and values, or with a latent, is written to a file",
            )
    # windows are in the mask: a file holds what is behind them too, as an ordinary cache does
    stage = Stage(cache=DynamicCache())
    ids = torch.arange(BATCH * TOKENS).reshape(BATCH, TOKENS) % vocabulary
    given = {"attention_mask": torch.ones_like(ids), "past_key_values": stage.cache, "use_cache": True}
    with staged(model, stage):
        try:
            model(input_ids=ids, **given)
        except Exception as failure:  # the model's own code may raise anything
            raise describe(model, failure) from failure
    return stage.slots()


def decoding(model: Any, stage: Stage) -> Traced:
    """A language model for the exporter."""
    if not takes(model, "attention_mask"):
        raise Refused("onnx", f"{type(model).__name__} takes no attention_mask, so padding could not be told")
    config = model.config.get_text_config()
    slots = learn(model, int(config.vocab_size))
    if not slots:
        raise Refused("onnx", f"{type(model).__name__} filled no cache", "it may have been saved with use_cache=False")
    stage.boolean = any(slot.bound is not None for slot in slots)
    shared = stage.form in ("shared", "contrib")
    length = PAST + TOKENS + ROOM if shared else PAST
    lengths = [length if slot.bound is None else min(slot.bound, PAST) for slot in slots]
    ids = torch.arange(BATCH * TOKENS).reshape(BATCH, TOKENS) % int(config.vocab_size)
    mask = torch.ones(BATCH, PAST + TOKENS, dtype=torch.int64)
    positions = torch.arange(PAST, PAST + TOKENS).expand(BATCH, -1).contiguous()
    kind = next(p.dtype for p in model.parameters() if p.is_floating_point())
    past = [
        [torch.zeros(BATCH, g, n, d, dtype=kind) for g, d in slot.tensors]
        for n, slot in zip(lengths, slots, strict=True)
    ]
    tokens = {0: "batch", 1: "sequence"}
    held = [{0: "batch", 2: _past(slot, shared)} for slot in slots]
    every = [[axes for _ in slot.tensors] for axes, slot in zip(held, slots, strict=True)]
    shapes = (tokens, {0: "batch", 1: "total"}, tokens, every)
    places = [(layer, part) for layer, slot in enumerate(slots) for part in range(len(slot.tensors))]
    return Traced(
        Decoding(model, stage, slots, takes(model, "position_ids")),
        (ids, mask, positions, past),
        shapes,
        ("input_ids", "attention_mask", "position_ids", *(names.past(*at) for at in places)),
        ("logits", *(names.present(*at) for at in places)),
        tuple(slots),
    )


def _past(slot: Slot, shared: bool) -> str:
    if slot.bound is not None:
        return f"held_{slot.bound}"
    return "capacity" if shared else "past"


def plain(model: nn.Module, inputs: Any) -> Traced:
    """Any other model for the exporter: encoders, vision models, modules with example inputs."""
    example = _example(model, inputs)
    parameters = list(inspect.signature(model.forward).parameters)
    named: dict[str, Any] = {**dict(zip(parameters, example.args, strict=False)), **example.kwargs}
    moving = dict(zip(named, example.moving, strict=True))
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if not tensors:
        raise BadUsage("inputs", "the example inputs hold no tensor", "give tensors by position or by name")
    shapes = tuple({axis: _axis(axis) for axis in moving[name]} for name in tensors)
    with torch.no_grad():
        found = outputs_of(model(**named))
    outputs = tuple(name for name, _ in found)
    module = Plain(model, named, list(tensors))
    return Traced(module, tuple(tensors.values()), (shapes,), tuple(tensors), outputs, named=named)


def _axis(axis: int) -> str:
    return ("batch", "sequence")[axis]


def _example(model: nn.Module, inputs: Any) -> Inputs:
    """The caller's inputs, or what the config asks for: with a mask where the model takes one beside tokens."""
    if inputs is not None:
        return given(model, inputs)
    calls = list(propose(model))
    wanted = {"attention_mask"} & inspect.signature(model.forward).parameters.keys()
    best = next((c for c in calls if "input_ids" in c.kwargs and wanted <= c.kwargs.keys()), None)
    return best or calls[0]


def outputs_of(value: Any) -> list[tuple[str, Tensor]]:
    """(name, tensor) of all that a model gives: by its own names, or output, output_1 ..."""
    leaves, _ = tree_flatten_with_path(dict(value) if isinstance(value, Mapping) else value)
    found: list[tuple[str, Tensor]] = []
    for path, leaf in leaves:
        if isinstance(leaf, Tensor):
            keys = [str(getattr(step, "key", getattr(step, "idx", ""))) for step in path]
            name = ".".join(keys)
            found.append((name if name and not name.isdecimal() else f"output_{name}" if name else "output", leaf))
    return found
