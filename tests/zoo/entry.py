"""One model of the zoo: how it is built, and with what it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Call = tuple[nn.Module, tuple[Any, ...] | dict[str, Any]]
"""The model in eval mode and its inputs: positional as a tuple, by keyword as a dict."""


@dataclass(frozen=True)
class Entry:
    """A model and its inputs, made anew by every `build()`; equal each time."""

    family: str
    name: str
    build: Callable[[], Call]


def settled(model: nn.Module) -> nn.Module:
    """Eval mode, and noise on every trained parameter: weights of 1 and biases of 0 would hide structure."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter += (0.1 * noise).to(parameter.dtype)
    return model.eval()
