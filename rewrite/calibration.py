"""What a user gives as calibration - texts, token tensors, dictionaries, any iterable - as batches for the graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewrite.errors import BadUsage

Batch = dict[str, Tensor]
TOKENS_A_BATCH = 4096


@dataclass(frozen=True)
class Windows:
    """How tokens are cut: `length` tokens a window, at most `samples` windows, `rows` windows a batch."""

    length: int
    samples: int = 128
    rows: int | None = None

    @property
    def batch_rows(self) -> int:
        """Windows in one batch."""
        return self.rows or max(1, TOKENS_A_BATCH // self.length)


def batches(given: Any, example: Mapping[str, Any], windows: Windows, tokenizer: Any | None) -> list[Batch]:
    """Batches by input name. Text and token tensors are cut into windows; dictionaries are taken as they are.

    `example` are the model's example inputs by name: every one called `...input_ids` gets the tokens, every
    `...attention_mask` gets ones, and anything else cannot be made of text.
    """
    items: list[Any] = [given] if isinstance(given, (str, Path, Tensor, Mapping)) else list(_iterate(given))
    if not items:
        raise BadUsage("calibration", "the calibration is empty", "give at least one text")
    if all(isinstance(i, Mapping) for i in items):
        return [{k: v for k, v in i.items() if isinstance(v, Tensor)} for i in items]
    if all(isinstance(i, tuple) for i in items):
        return [dict(zip(example, i, strict=False)) for i in items]
    floats = [i for i in items if isinstance(i, Tensor) and i.is_floating_point()]
    if floats and len(example) == 1:
        return [{next(iter(example)): f} for f in floats]
    return _of_tokens(_tokens(items, tokenizer), example, windows)


def _iterate(given: Any) -> Iterable[Any]:
    if not isinstance(given, Iterable):
        raise BadUsage(
            "calibration",
            f"{type(given).__name__} is no calibration",
            "give texts, token tensors or dictionaries of inputs",
        )
    return given


def _tokens(items: list[Any], tokenizer: Any | None) -> Tensor:
    """One long row of tokens; texts are joined by the tokenizer's end token, as in training."""
    rows: list[Tensor] = []
    for item in items:
        if isinstance(item, Tensor):
            rows.append(item.reshape(-1).long())
        elif isinstance(item, (str, Path)):
            rows.append(_encoded(item.read_text("utf-8") if isinstance(item, Path) else item, tokenizer))
        else:
            raise BadUsage("calibration", f"a {type(item).__name__} among the calibration is neither text nor tokens")
    return torch.cat(rows)


def _encoded(text: str, tokenizer: Any | None) -> Tensor:
    if tokenizer is None:
        raise BadUsage(
            "tokenizer",
            "the calibration is text, and the model has no tokenizer beside it",
            "give token tensors, or load the model from a folder with a tokenizer",
        )
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    end = tokenizer.eos_token_id
    return torch.tensor(ids if end is None else [*ids, end], dtype=torch.long)


def _of_tokens(tokens: Tensor, example: Mapping[str, Any], windows: Windows) -> list[Batch]:
    count = min(windows.samples, len(tokens) // windows.length)
    if count == 0:
        raise BadUsage(
            "calibration",
            f"{len(tokens)} tokens do not fill one window of {windows.length}",
            f"give at least {windows.length} tokens, or a shorter calibration length",
        )
    rows = tokens[: count * windows.length].view(count, windows.length)
    return [_batch(part, example) for part in rows.split(windows.batch_rows)]


def _batch(rows: Tensor, example: Mapping[str, Any]) -> Batch:
    batch: Batch = {}
    for name, value in example.items():
        if name.endswith("input_ids"):
            batch[name] = rows
        elif name.endswith("attention_mask"):
            batch[name] = torch.ones_like(rows)
        elif isinstance(value, Tensor):
            raise BadUsage(
                "calibration",
                f"the model also reads '{name}', which cannot be made of text",
                f"give dictionaries with {', '.join(example)} as calibration",
            )
    return batch
