"""A file in ONNX Runtime against the model in torch, which computes its attention in its own way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rewrite.errors import CheckFailed
from rewrite.onnx.caches import Slot
from rewrite.onnx.run import Decoder
from rewrite.onnx.tracing import Traced, outputs_of, takes

LIMITS = {torch.float32: 1e-4, torch.float16: 2e-2}
"""Largest difference allowed, relative to the largest number of the output."""
PADDED = ((0, 3), (7, 1, 1, 1, 2))
"""Tokens of padding row by row, and the new tokens of every step."""
SINGLE = ((0,), (4, 1, 3))
SHAPES = ((1, 13), (3, 6))
"""(batch, tokens) at which a model without a cache is compared."""

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Agreement:
    """The largest difference, relative, over so many runs."""

    worst: float
    runs: int


def check_file(path: Path) -> None:
    """The specification's own checker, by path: shapes are inferred, and a file may be larger than 2 GB."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except onnx.checker.ValidationError as why:
        raise CheckFailed(
            "onnx", "the checker of ONNX refuses the file", str(why).strip().splitlines()[0], "please report it"
        ) from why


def check_decoding(path: Path, model: Any, slots: Sequence[Slot], *, contrib: bool) -> Agreement:
    """Prefill and decoding, padded and not; logits and all that is cached."""
    decoder, found = Decoder(path), list[float]()
    bound = max((slot.bound or 0 for slot in slots), default=0)
    for padding, steps in (PADDED, SINGLE):
        if bound:  # a few tokens, then enough to drop some, then steps behind that
            steps = (2, bound + 2, *steps[1:])
        if contrib and len(padding) > 1:  # the operator takes several new tokens behind a past of one row alone
            steps = (steps[0], *(1 for n in steps[1:] for _ in range(n)))
        found.append(_text(decoder, model, slots, padding, steps))
    return Agreement(max(found), len(PADDED[1]) + len(SINGLE[1]))


def _text(decoder: Decoder, model: Any, slots: Sequence[Slot], padding: Sequence[int], steps: Sequence[int]) -> float:
    """The largest difference over one text, taken in by these steps; at its end all that is cached is compared."""
    decoder.reset()
    cache, kind = DynamicCache(), next(p.dtype for p in model.parameters() if p.is_floating_point())
    worst, where, real = 0.0, "", np.zeros((1, 0), bool)
    for ids, mask in _tokens(padding, steps, int(model.config.get_text_config().vocab_size)):
        got = decoder.step(ids.numpy(), mask.numpy())
        wanted = _torch_step(model, ids, mask, cache)
        real = mask.bool().numpy()
        fresh = real[:, -ids.shape[1] :]
        where = f"{len(ids)} rows, {ids.shape[1]} new tokens, {mask.shape[1] - ids.shape[1]} cached"
        worst = max(worst, _same("logits", got[fresh], wanted.numpy()[fresh], kind, where))
    for name, ours, theirs in _held(decoder, cache, slots):
        # where tokens were dropped, only rows without padding hold the same ones in the same places
        alike = real if ours.shape[2] == real.shape[1] else real.all(1)
        worst = max(worst, _same(name, ours.swapaxes(1, 2)[alike], theirs.swapaxes(1, 2)[alike], kind, where))
    return worst


def _tokens(padding: Sequence[int], steps: Sequence[int], vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(new tokens, mask of all) step by step."""
    ids = torch.randint(0, vocabulary, (len(padding), sum(steps)), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    done = 0
    for count in steps:
        yield ids[:, done : done + count], mask[:, : done + count]
        done += count


def _torch_step(model: Any, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    more: dict[str, Any] = {"position_ids": places} if takes(model, "position_ids") else {}
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more).logits


def _held(decoder: Decoder, cache: DynamicCache, slots: Sequence[Slot]) -> Iterator[tuple[str, Array, Array]]:
    at, layers = 0, list[Any](cache.layers)
    for layer, slot in zip(layers, slots, strict=True):
        parts: list[Any] = [layer.keys, layer.values]
        if slot.bound is not None:
            parts = [x[:, 0].unflatten(1, (-1, slot.tensors[0][0])).transpose(1, 2) for x in parts]
        if slot.rank is not None:
            parts = [parts[0][..., : slot.rank], parts[0][..., slot.rank :]]
        for part, _ in zip(parts, slot.tensors, strict=False):
            ours = decoder.held[at].numpy()
            ours = ours[:, :, : decoder.length] if decoder.shared else ours
            yield decoder.slots[at].present, ours, part.numpy()
            at += 1


def check_plain(path: Path, model: nn.Module, traced: Traced) -> Agreement:
    """A model without a cache, at other batch sizes and lengths than it was traced at; with padding where it has a
    mask."""
    session: Any = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (shapes,), found = traced.shapes, list[float]()
    wanted = {given.name for given in session.get_inputs()}
    for batch, tokens in SHAPES:
        sizes = {"batch": batch, "sequence": tokens}
        inputs = {n: _resized(v, s, sizes) for n, v, s in zip(traced.inputs, traced.args, shapes, strict=True)}
        mask = inputs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and not mask.is_floating_point():
            mask[0, -2:] = 0
        feeds = {n: v.numpy() for n, v in inputs.items() if n in wanted}
        got = session.run(list(traced.outputs), feeds)
        with torch.no_grad():
            theirs = outputs_of(model(**{**traced.named, **inputs}))
        for (name, tensor), ours in zip(theirs, got, strict=True):
            if tensor.is_floating_point():
                found.append(_same(name, ours, tensor.numpy(), tensor.dtype, f"{batch} rows, {tokens} tokens"))
    return Agreement(max(found, default=0.0), len(SHAPES))


def _resized(value: Tensor, shape: Mapping[int, str], sizes: Mapping[str, int]) -> Tensor:
    for axis, name in shape.items():
        value = value.index_select(axis, torch.arange(sizes[name]) % value.shape[axis])
    return value.clone()


def _same(name: str, ours: Array, theirs: Array, kind: torch.dtype, where: str) -> float:
    limit = LIMITS[kind]
    if ours.shape != theirs.shape:
        raise CheckFailed("onnx", f"{name} is {ours.shape} in ONNX Runtime, {theirs.shape} in torch", f"at {where}")
    scale = float(np.abs(theirs).max(initial=0)) or 1.0
    apart = float(np.abs(ours.astype(np.float64) - theirs).max(initial=0)) / scale
    if not apart <= limit:
        raise CheckFailed(
            "onnx",
            f"{name} differs by {apart:.2g} between ONNX Runtime and torch, limit {limit:g}",
            f"at {where}; no file is left under the name",
        )
    return apart
