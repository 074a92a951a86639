"""A model cut short: its own class with its first layers and few tokens of its vocabulary, with their true weights.

A checkpoint that does not fit into memory is never a model here. What has to be seen by running a model (that the form
in which a site is written computes what it should) is seen on this one: it holds a site of every kind that the whole
model has, at full width. Which numbers of the config say how many layers and tokens there are is found by building the
class with other ones and looking which shapes change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from rewrite.checkpoint import Checkpoint
from rewrite.emit.stock import Shapes, built, config_at, configs, shapes_of
from rewrite.errors import Refused
from rewrite.opened import in_float32
from rewrite.site import Site
from rewrite.source import empty

VOCABULARY = 512
"""Tokens that are left of a larger vocabulary."""


def kinds(sites: Sequence[Site]) -> dict[str, str]:
    """Site -> the first site with an equal region: what is true of the form of one is true of the other."""
    first: dict[str, str] = {}
    return {s.name: first.setdefault(s.proof.region, s.name) for s in sites}


def shortened(full: PreTrainedModel, needed: set[str]) -> PreTrainedModel:
    """The class of `full` with as few layers as hold the tensors `needed`, in float32, its parameters on meta."""
    config = _few_tokens(full, _few_layers(full, needed))
    return in_float32(empty(type(full), config).eval(), copied=False)  # pyright: ignore[reportReturnType]


def _numbers(config: PreTrainedConfig, word: str) -> Iterator[tuple[tuple[str, ...], str, int]]:
    """(path, name, value) of the whole numbers whose name holds a word."""
    for path, part in configs(config):
        for name, value in vars(part).items():
            if word in name and type(value) is int and value > 1 and not name.startswith("_"):
                yield path, name, value


def _few_layers(full: PreTrainedModel, needed: set[str]) -> PreTrainedConfig:
    """The config with every number of layers as small as it can be while all needed tensors are there."""
    config, old = copy.deepcopy(full.config), shapes_of(full)
    for path, name, value in list(_numbers(config, "layer")):
        for count in range(1, value):
            less = _with(config, path, name, value, count)
            new = _shapes(full, less)
            if new is not None and needed <= new.keys() < old.keys() and all(old[n] == s for n, s in new.items()):
                config = less
                break
    return config


def _few_tokens(full: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedConfig:
    old = _shapes(full, config)
    for path, name, value in list(_numbers(config, "vocab")):
        if value <= VOCABULARY:
            continue
        less = _with(config, path, name, value, VOCABULARY)
        part = config_at(less, path)
        for special, at in list(vars(part).items()):
            # padding must be a token that there is
            if special.endswith("token_id") and type(at) is int and at >= VOCABULARY:
                setattr(part, special, None)
        new = _shapes(full, less)
        if new is not None and old is not None and _cut_in_rows(old, new):
            config, old = less, new
    return config


def _cut_in_rows(old: Shapes, new: Shapes) -> bool:
    return old.keys() == new.keys() and all(s[1:] == old[n][1:] for n, s in new.items())


def _with(config: PreTrainedConfig, path: tuple[str, ...], name: str, value: int, count: int) -> PreTrainedConfig:
    """The config with one number less, and lists that have one entry for each of it cut."""
    made = copy.deepcopy(config)
    part = config_at(made, path)
    setattr(part, name, count)
    for other, entries in list(vars(part).items()):
        if isinstance(entries, (list, tuple)) and len(entries) == value:
            setattr(part, other, entries[:count])
    return made


def _shapes(full: PreTrainedModel, config: PreTrainedConfig) -> Shapes | None:
    try:
        return shapes_of(built(type(full), config))
    # a config that the class rejects, in whatever way, is no candidate
    except Exception:
        return None


def aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Parameter -> all names that it has."""
    names: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), []).append(name)
    return {name: tuple(group) for group in names.values() for name in group}


def fill(model: nn.Module, held: Checkpoint) -> None:
    """Give every parameter on meta its values, as float32, from the file that holds it under one of its names.

    Raises where the files name or shape their tensors otherwise than the class.
    """
    for name, others in aliases(model).items():
        value: Tensor = model.get_parameter(name)
        if value.is_meta:
            _put(model, others, _read(others, value, held).to(value.dtype), value.requires_grad)


def _read(names: tuple[str, ...], like: Tensor, held: Checkpoint) -> Tensor:
    name = next((n for n in names if held.shape(n) is not None), None)
    shape = None if name is None else held.shape(name)
    if name is None or shape is None or len(shape) != like.dim() or tuple(like.shape[1:]) != shape[1:]:
        have = "is missing" if shape is None else f"is {list(shape)}"
        raise Refused(
            "stream",
            f"{held.folder} cannot be converted piece by piece",
            f"its class holds {names[0]} {list(like.shape)}, which in the files {have}",
            "leave --memory away, where the model fits into memory",
        )
    return held.tensor(name, like.shape[0] if like.dim() else None)


def _put(model: nn.Module, names: tuple[str, ...], value: Tensor, trained: bool) -> None:
    made = nn.Parameter(value, requires_grad=trained and value.is_floating_point())
    for name in names:
        path, leaf = name.rpartition(".")[::2]
        setattr(model.get_submodule(path), leaf, made)


Read = Callable[[str], Tensor]


def in_float(held: Checkpoint) -> Read:
    """Tensors of the files by name, one at a time, as the model would compute with them."""

    def read(name: str) -> Tensor:
        value = held.tensor(name)
        return value.float() if value.is_floating_point() and value.dtype.itemsize < 4 else value

    return read
