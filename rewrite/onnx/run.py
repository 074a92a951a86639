"""Decoding with a file of ours: numpy and onnxruntime alone, no torch.

from rewrite.onnx.run import Decoder, generate
tokens = generate(Decoder("model.onnx"), [[464, 2068, 7586]], 100)

python -m rewrite.onnx.run model.onnx --new 100 464 2068 7586
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from rewrite.errors import BadUsage
from rewrite.onnx import names

Array = np.ndarray[Any, np.dtype[Any]]
ROOM = 256
"""Tokens by which a shared buffer grows when it is full."""
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class Slot:
    """One cached tensor: its names as input and output, and (heads, width)."""

    past: str
    present: str
    heads: int
    width: int
    kind: type[np.generic]

    def empty(self, batch: int, tokens: int) -> Any:
        """Room for some tokens."""
        return ort.OrtValue.ortvalue_from_numpy(np.zeros((batch, self.heads, tokens, self.width), self.kind))


class Decoder:
    """A file and its cache. `step` takes any number of new tokens; `reset` empties the cache."""

    def __init__(self, path: str | Path, *, threads: int = 0, providers: Sequence[str] = ("CPUExecutionProvider",)):
        """`threads` 0: onnxruntime's own choice."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self.session: Any = ort.InferenceSession(str(path), options, providers=list(providers))
        meta = self.session.get_modelmeta().custom_metadata_map
        self.shared = meta.get(names.SHARED) == "yes"
        self.numbers: list[int] = json.loads(meta.get(names.CACHE, "[]"))
        self.recipe, self.report = meta.get(names.RECIPE, ""), meta.get(names.REPORT, "")
        self.slots = [_slot(given) for given in self.session.get_inputs() if given.name.startswith("past_key_values.")]
        if not self.slots:
            raise BadUsage("onnx", f"{path} takes no cache, so it decodes nothing", "run it with onnxruntime itself")
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.length = 0
        self.held: list[Any] = []

    @property
    def capacity(self) -> int:
        """Tokens that the cache has room for; what is not shared has no room to spare."""
        return int(self.held[0].shape()[2]) if self.held else 0

    @property
    def cache_bytes(self) -> int:
        """Bytes of the tokens that are cached; the room behind them is not counted."""
        found = 0
        for slot, held in zip(self.slots, self.held, strict=False):
            batch, heads, tokens, width = held.shape()
            tokens = self.length if self.shared else tokens
            found += batch * heads * tokens * width * np.dtype(slot.kind).itemsize
        return found

    def reserve(self, batch: int, tokens: int) -> None:
        """Make room for `tokens` in all, where the file writes its cache in place."""
        if not self.shared or (self.held and tokens <= self.capacity):
            return
        made: list[Any] = []
        for at, slot in enumerate(self.slots):
            buffer = np.zeros((batch, slot.heads, tokens, slot.width), slot.kind)
            if self.held:
                buffer[:, :, : self.length] = self.held[at].numpy()[:, :, : self.length]
            made.append(ort.OrtValue.ortvalue_from_numpy(buffer))
        self.held = made

    def step(self, input_ids: Array, attention_mask: Array, position_ids: Array | None = None) -> Array:
        """Logits (batch, tokens, vocabulary) of new tokens (batch, tokens). The mask (batch, cached + new) holds 0 for
        padding; positions are counted from it where they are not given."""
        batch, tokens = input_ids.shape
        if attention_mask.shape != (batch, self.length + tokens):
            raise BadUsage(
                "onnx",
                f"the mask is {attention_mask.shape}, for {self.length} cached and {tokens} new tokens of {batch} rows",
                f"give ({batch}, {self.length + tokens})",
            )
        if position_ids is None:
            position_ids = np.maximum(attention_mask.cumsum(1) - 1, 0)[:, -tokens:]
        if self.shared and self.length + tokens > self.capacity:
            self.reserve(batch, -(-(self.length + tokens) // ROOM) * ROOM)
        elif not self.held:
            self.held = [slot.empty(batch, 0) for slot in self.slots]
        feeds = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        logits = self._bound(feeds) if self.shared else self._run(feeds)
        self.length += tokens
        return logits

    def _feeds(self, feeds: dict[str, Array]) -> dict[str, Any]:
        wanted = {given.name for given in self.session.get_inputs()}
        given = {n: np.ascontiguousarray(v, np.int64) for n, v in feeds.items() if n in wanted}
        return {n: ort.OrtValue.ortvalue_from_numpy(v) for n, v in given.items()}

    def _run(self, feeds: dict[str, Array]) -> Array:
        past = {slot.past: held for slot, held in zip(self.slots, self.held, strict=True)}
        outputs = ["logits", *(slot.present for slot in self.slots)]
        logits, *self.held = self.session.run_with_ort_values(outputs, {**self._feeds(feeds), **past})
        return logits.numpy()

    def _bound(self, feeds: dict[str, Array]) -> Array:
        """Past and present are one buffer, so that the file writes in place."""
        binding = self.session.io_binding()
        for name, value in self._feeds(feeds).items():
            binding.bind_ortvalue_input(name, value)
        for slot, held in zip(self.slots, self.held, strict=True):
            binding.bind_ortvalue_input(slot.past, held)
            binding.bind_ortvalue_output(slot.present, held)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()


def _slot(given: Any) -> Slot:
    layer = given.name.removeprefix("past_key_values")
    return Slot(given.name, f"present{layer}", given.shape[1], given.shape[3], TYPES[given.type])


def generate(
    decoder: Decoder,
    input_ids: Sequence[Sequence[int]] | Array,
    new_tokens: int,
    *,
    attention_mask: Sequence[Sequence[int]] | Array | None = None,
    stop: Collection[int] = (),
    choose: Callable[[Array], Array] | None = None,
) -> Array:
    """(batch, tokens + new): a batch of equally long prompts, padded on the left where the mask is 0, and what follows.

    `choose` picks the next tokens (batch,) of logits (batch, vocabulary): the likeliest, unless given. A row that gave
    a token of `stop` repeats it; all rows that did end the text.
    """
    ids = np.asarray(input_ids, np.int64)
    if ids.ndim != 2 or not ids.size:
        raise BadUsage("onnx", f"input_ids are of shape {ids.shape}", "give rows of tokens: [[464, 2068]]")
    mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask, np.int64)
    decoder.reset()
    decoder.reserve(len(ids), ids.shape[1] + new_tokens)
    ended, fresh = np.zeros(len(ids), bool), ids
    for _ in range(new_tokens):
        logits = decoder.step(fresh, mask)[:, -1]
        chosen = logits.argmax(-1) if choose is None else choose(logits)
        chosen = np.where(ended, ids[:, -1], chosen)
        fresh = chosen[:, None].astype(np.int64)
        ids, mask = np.concatenate([ids, fresh], 1), np.concatenate([mask, np.ones_like(fresh)], 1)
        ended |= np.isin(chosen, list(stop))
        if ended.all():
            break
    return ids


def main() -> None:
    """Continue tokens and print them."""
    parser = argparse.ArgumentParser(description="Continue tokens with an ONNX file.")
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=int, nargs="+")
    parser.add_argument("--new", type=int, default=20)
    given = parser.parse_args()
    print(*generate(Decoder(given.model), [given.tokens], given.new)[0])


if __name__ == "__main__":
    main()
