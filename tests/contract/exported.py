"""An emitted model through torch.export, run at a length that it was not exported at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def run_exported(model: PreTrainedModel, given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits of the model and of its export, without a cache, for 13 tokens of twice the text."""
    tokens = torch.export.Dim("tokens", min=2, max=32)
    text = {n: v for n, v in given.items() if isinstance(v, torch.Tensor)}
    shapes = {n: {1: tokens} for n in text} | {"use_cache": None}
    exported = torch.export.export(model, (), {**text, "use_cache": False}, dynamic_shapes=shapes, strict=False)
    longer = {n: torch.cat([v, v], 1)[:, :13] for n, v in text.items()}
    return model(**longer).logits, exported.module()(**longer, use_cache=False).logits
