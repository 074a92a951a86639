"""Copies of a model that differ in a few tensors: the original is never written to."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def table(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by state-dict name, tied ones under each of their names."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))


def put(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace one parameter or buffer by name."""
    path, leaf = name.rpartition(".")[::2]
    module = model.get_submodule(path)
    old: Tensor = getattr(module, leaf)
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad)
    setattr(module, leaf, value)


def twin(model: PreTrainedModel, edits: Mapping[str, Tensor], *, share: bool) -> PreTrainedModel:
    """A deep copy with some tensors replaced; with `share` the others are the original's own, for reading only."""
    old = table(model)
    memo: dict[int, Any] = {id(p): p for n, p in old.items() if share or n in edits}
    # hooks of a running observation must not travel into a copy, so copies are made before any are set
    made = copy.deepcopy(model, memo)
    for name, value in edits.items():
        put(made, name, value.to(old[name].device))
    return made


def share_alike(made: PreTrainedModel, model: PreTrainedModel) -> None:
    """Let `made` have the tensors of `model` itself wherever they are the same, for reading only."""
    old = table(model)
    for name, value in table(made).items():
        if name in old and value is not old[name] and value.dtype == old[name].dtype and torch.equal(value, old[name]):
            value.data = old[name].data


def in_float(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself where its parameters are float32 or wider, else a float32 copy: emissions are compared there."""
    if all(p.dtype in (torch.float32, torch.float64) for p in model.parameters() if p.is_floating_point()):
        return model
    made = copy.deepcopy(model)
    for module in made.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            if value.is_floating_point():
                setattr(module, name, nn.Parameter(value.detach().float(), requires_grad=value.requires_grad))
    made.config.dtype = torch.float32
    return made


def as_before(made: PreTrainedModel, model: PreTrainedModel) -> None:
    """Give the parameters of `made` the dtypes of those of the same name in `model`; buffers keep theirs."""
    old = table(model)
    for module_name, module in made.named_modules():
        for name, value in list(module.named_parameters(recurse=False)):
            like = old.get(f"{module_name}.{name}" if module_name else name)
            if like is not None and like.dtype != value.dtype:
                setattr(module, name, nn.Parameter(value.detach().to(like.dtype), requires_grad=value.requires_grad))
    made.tie_weights()
    made.config.dtype = model.config.dtype
