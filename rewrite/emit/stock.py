"""Form "stock": the model's own class, built from a config with another number of kv heads.

Which config field that is, is found by building on the meta device and looking which shapes change.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from rewrite.emit.edits import dropped, shrinking, without
from rewrite.emit.twin import put, table
from rewrite.layout import Edits, only_root
from rewrite.site import Site

Shapes = dict[str, tuple[int, ...]]
Pairs = Mapping[str, tuple[Site, Site]]
"""Site name -> (the source's site, what becomes of it)."""


@dataclass(frozen=True, eq=False)
class Field:
    """A number in the config: `path` leads to the config that holds it, `shapes` are the parameters that follow it."""

    path: tuple[str, ...]
    name: str
    value: int
    head_dim: int
    shapes: Shapes

    def __str__(self) -> str:
        return ".".join((*self.path, self.name))


def built(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The class on the meta device: shapes and modules, no memory."""
    with torch.device("meta"), no_init_weights():
        return kind(copy.deepcopy(config))


def shapes_of(model: nn.Module) -> Shapes:
    """Parameter shapes by name."""
    return {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}


def fields(model: PreTrainedModel, pairs: Pairs, same: Sequence[str] = ()) -> tuple[dict[str, Field], dict[str, str]]:
    """(site name -> field that makes it stock, site name -> why there is none); `same` sites need no field."""
    old = shapes_of(model)
    taken: dict[str, Field] = {}
    reasons: dict[str, str] = {}
    tried: dict[tuple[tuple[str, ...], str, int], Shapes | None] = {}
    for name, (site, new) in pairs.items():
        if name in taken or name in same:
            continue
        for path, spelling, field in _candidates(model.config, site.k.heads):
            key = (path, field, new.k.heads)
            if key not in tried:
                tried[key] = _effect(model, old, path, field, new.k.heads)
            follows = tried[key]
            if not follows or only_root(site.k).tensor not in follows:
                continue
            served = [n for n, (s, _) in pairs.items() if only_root(s.k).tensor in follows]
            why = _fits(pairs, served, follows, spelling)
            if why is None:
                taken |= dict.fromkeys(served, Field(path, field, new.k.heads, site.k.dim, follows))
                break
            reasons[name] = why
        else:
            reasons.setdefault(name, "its class has no field for the number of kv heads")
    return taken, {n: r for n, r in reasons.items() if n not in taken}


def _candidates(config: PreTrainedConfig, heads: int) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """(path, spelling, field) of every integer that equals the kv heads; those that speak of keys come first."""
    for path, part in configs(config):
        names = [n for n, v in vars(part).items() if type(v) is int and v == heads and not n.startswith("_")]
        for name in sorted(names, key=lambda n: ("kv" not in n and "key_value" not in n, n)):
            yield path, ".".join((*path, name)), name


def configs(config: PreTrainedConfig, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], PreTrainedConfig]]:
    """The config and those nested in it, each with its path."""
    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from configs(value, (*path, name))


def config_with(config: PreTrainedConfig, taken: Mapping[str, Field]) -> PreTrainedConfig:
    """The config with every field's number, and the head width beside it."""
    made = copy.deepcopy(config)
    for field in taken.values():
        part = config_at(made, field.path)
        setattr(part, field.name, field.value)
        # written out, or a reader that derives it from the number of heads could take another
        if not _told(part, "head_dim"):
            part.head_dim = field.head_dim
    return made


def _told(config: PreTrainedConfig, name: str) -> bool:
    """Whether the config has a value of this name; one that differs from layer to layer cannot be read, but is told."""
    try:
        return getattr(config, name, None) is not None
    except RuntimeError:
        return True


def config_at(config: PreTrainedConfig, path: tuple[str, ...]) -> Any:
    """The nested config of a path."""
    part: Any = config
    for name in path:
        part = getattr(part, name)
    return part


def _effect(model: PreTrainedModel, old: Shapes, path: tuple[str, ...], field: str, value: int) -> Shapes | None:
    """Parameters whose shape follows the field; None where the model with it cannot be built or is another model."""
    try:
        config = copy.deepcopy(model.config)
        setattr(config_at(config, path), field, value)
        new = shapes_of(built(type(model), config))
    # a config that the class rejects, in whatever way, is no candidate
    except Exception:
        return None
    return {n: s for n, s in new.items() if s != old[n]} if new.keys() == old.keys() else None


def _fits(pairs: Pairs, served: Sequence[str], follows: Shapes, field: str) -> str | None:
    """Why the field cannot serve these sites: it must change their k and v and nothing else, to one number."""
    counts = sorted({pairs[n][1].k.heads for n in served})
    if len(counts) > 1:
        return f"{field} is one number for all layers, these keep {', '.join(map(str, counts))} kv heads"
    explained: set[str] = set()
    for name in served:
        site, _ = pairs[name]
        explained |= shrinking(site)
        for tensor in {only_root(o).tensor for o in (site.k, site.v)}:
            if tensor not in follows:
                return f"{tensor} does not follow {field}"
    others = sorted(set(follows) - explained)
    if others:
        return (
            f"{others[0]} follows {field} too ({len(others)} parameters that are no keys or values of a converted site)"
        )
    return None


def smaller(pairs: Pairs, taken: Mapping[str, Field], full: Edits, *, last: bool) -> Edits | str:
    """The edited tensors in the shapes that the new config asks for; which of equal heads stays is `last`."""
    out = dict(full)
    for name, field in taken.items():
        site, new = pairs[name]
        for tensor, gone in dropped(site, new.kv_of, last=last).items():
            if tensor not in field.shapes:
                continue
            made = without(full[tensor], gone, field.shapes[tensor])
            if made is None:
                return f"{tensor} cannot take the shape {field.shapes[tensor]}"
            out[tensor] = made
    return out


def rebuilt(model: PreTrainedModel, config: PreTrainedConfig, edits: Mapping[str, Tensor]) -> PreTrainedModel:
    """The model's class built anew from `config`; everything that `edits` does not give is copied from the model."""
    made = built(type(model), config)
    values = table(model)
    for name in table(made):
        value = edits[name] if name in edits else values[name].detach().clone()
        put(made, name, nn.Parameter(value, requires_grad=values[name].requires_grad) if _is(values[name]) else value)
    for (_, here), (_, there) in zip(model.named_modules(), made.named_modules(), strict=True):
        for name, value in vars(here).items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                setattr(there, name, value.clone())
    made.tie_weights()
    made.train(model.training)
    made.generation_config = copy.deepcopy(model.generation_config)
    return made


def _is(value: Tensor) -> bool:
    return isinstance(value, nn.Parameter)
