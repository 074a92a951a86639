"""Safetensors files: headers verified before anything else reads them, single tensors read, files streamed to disk.

The rules of a file: 8 bytes of header length, JSON, then tensors without hole or overlap up to the last byte.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from rewrite.errors import Refused

if TYPE_CHECKING:
    import io

    from torch import Tensor, dtype

HEADER_LIMIT = 100_000_000
"""Bytes of a header that are read at most; the library's own limit."""

BLOCK = 1 << 23
"""Numbers that are held while a tensor is copied."""

BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "C64": 8, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
"""Bytes per number of each type that a file may hold."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: bytes begin..end counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A verified header; the first tensor's data lie at `start` of the file."""

    path: Path
    start: int
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def _corrupt(path: Path, *lines: str) -> Refused:
    return Refused("safetensors", f"{path} is damaged", *lines, "download the file again, or save the model anew")


def read_header(path: Path) -> Header:
    """Read and verify the header of a safetensors file against the file's own length."""
    length = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise _corrupt(path, f"it is {length} bytes long; 8 bytes of header length come first")
        count = int.from_bytes(head, "little")
        if count > HEADER_LIMIT:
            raise _corrupt(path, f"its header claims {count:,} bytes; at most {HEADER_LIMIT:,} are read")
        if 8 + count > length:
            raise _corrupt(path, f"its header claims {count:,} bytes; only {length - 8:,} follow (truncated)")
        raw = _parse(path, file.read(count))
    metadata = _metadata(path, raw.pop("__metadata__", {}))
    entries = {name: _entry(path, name, value) for name, value in raw.items()}
    _verify_layout(path, entries, length - 8 - count)
    return Header(path, 8 + count, entries, metadata)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(n for n in names if names.count(n) > 1)
            raise _corrupt(path, f"its header lists '{twice}' twice")
        return found

    try:
        raw = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as why:
        raise _corrupt(path, f"its header is not JSON: {why}") from why
    if not isinstance(raw, dict):
        raise _corrupt(path, f"its header is a JSON {type(raw).__name__}, not an object")
    unwritable = next((name for name in raw if not is_text(name)), None)
    if unwritable is not None:
        raise _corrupt(path, f"its header names a tensor {unwritable!a}, which is no text")
    return cast("dict[str, Any]", raw)


def is_text(name: str) -> bool:
    """Whether a name can be printed and written: half of a pair of surrogates cannot."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return name.isprintable()


def _metadata(path: Path, raw: Any) -> dict[str, str]:
    if not isinstance(raw, dict):
        raise _corrupt(path, "its metadata are not a JSON object")
    for key, value in cast("dict[str, Any]", raw).items():
        if not isinstance(value, str):
            raise _corrupt(path, f"its metadata hold {key} = {value!r}; only text is allowed")
    return cast("dict[str, str]", raw)


def _entry(path: Path, name: str, raw: Any) -> Entry:
    value: dict[str, Any] = cast("dict[str, Any]", raw) if isinstance(raw, dict) else {}
    dtype, shape, offsets = value.get("dtype"), _counts(value.get("shape")), _counts(value.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        raise _corrupt(path, f"tensor '{name}' has no valid dtype, shape and data_offsets")
    if dtype not in BYTES:
        raise Refused(
            "safetensors",
            f"{path} holds a type that is not read",
            f"tensor '{name}' is {dtype}",
            "use: " + "  ".join(BYTES),
        )
    wanted = BYTES[dtype] * prod(shape)
    if offsets[1] - offsets[0] != wanted:
        held = f"{offsets[1] - offsets[0]:,}"
        raise _corrupt(path, f"tensor '{name}' is {dtype} {list(shape)}: {wanted:,} bytes, but its offsets span {held}")
    return Entry(dtype, shape, offsets[0], offsets[1])


def _counts(raw: Any) -> tuple[int, ...] | None:
    """A list of numbers, none negative; None for anything else (true is no number)."""
    if not isinstance(raw, list):
        return None
    items = cast("list[Any]", raw)
    return tuple(items) if all(type(n) is int and n >= 0 for n in items) else None


def _verify_layout(path: Path, entries: Mapping[str, Entry], held: int) -> None:
    """No overlap, no hole, and the data end where the file ends."""
    at, last = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < at:
            raise _corrupt(path, f"tensors '{last}' and '{name}' overlap by {at - entry.begin:,} bytes")
        if entry.begin > at:
            raise _corrupt(path, f"a hole of {entry.begin - at:,} bytes lies before tensor '{name}'")
        at, last = entry.end, name
    if held < at:
        raise _corrupt(
            path, f"its tensors need {at:,} bytes, only {held:,} are there: {at - held:,} missing (truncated)"
        )
    if held > at:
        raise _corrupt(path, f"{held - at:,} bytes follow the last tensor")


def read_tensor(header: Header, name: str, rows: int | None = None) -> Tensor:
    """One tensor, or its first `rows`, read from its own bytes of the file and from no other."""
    import torch

    entry = header.entries[name]
    shape = entry.shape if rows is None else (rows, *entry.shape[1:])
    tensor = torch.empty(shape, dtype=_kinds()[entry.dtype])
    with header.path.open("rb") as file:
        file.seek(header.start + entry.begin)
        if tensor.numel():
            _fill(header, file, _bytes_of(tensor))
    return tensor


def read_pieces(header: Header, name: str, numbers: int = BLOCK) -> Iterator[Tensor]:
    """A tensor as flat pieces of at most `numbers`, each read into the same memory: use one before asking for more."""
    import torch

    entry = header.entries[name]
    left = prod(entry.shape)
    buffer = torch.empty(min(left, numbers), dtype=_kinds()[entry.dtype])
    with header.path.open("rb") as file:
        file.seek(header.start + entry.begin)
        while left:
            piece = buffer[: min(left, len(buffer))]
            _fill(header, file, _bytes_of(piece))
            yield piece
            left -= len(piece)


def _fill(header: Header, file: BinaryIO, held: memoryview) -> None:
    got = cast("io.BufferedReader", file).readinto(held)
    if got != len(held):
        raise _corrupt(header.path, f"it ends {len(held) - got:,} bytes early: it was cut while it was read")


def _bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's own memory; numpy has no bfloat16, so it goes by bytes."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _kinds() -> dict[str, dtype]:
    import torch

    return {
        "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
        "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
        "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn, "C64": torch.complex64, "U16": torch.uint16,
        "U32": torch.uint32, "U64": torch.uint64, "F8_E8M0": torch.float8_e8m0fnu,
    }  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """A tensor to be written: its shape is known before its values are."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the values."""
        return BYTES[self.dtype] * prod(self.shape)


def spec(name: str, tensor: Tensor) -> Spec:
    """The spec of a tensor at hand."""
    return Spec(name, letter(tensor.dtype), tuple(tensor.shape))


def letter(kind: dtype) -> str:
    """The name that files have for a type: BF16."""
    return next(letters for letters, known in _kinds().items() if known == kind)


def type_of(letters: str) -> dtype:
    """The type that files call so."""
    return _kinds()[letters]


def write(
    path: Path,
    specs: Sequence[Spec],
    read: Callable[[str], Tensor | Iterable[Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Stream tensors to a safetensors file, one in memory at a time; gives the sha256 of the file.

    `read` gives a tensor, or the pieces of a large one in order. The bytes depend on specs and values alone. Wider
    types come first, so that every tensor lies aligned.
    """
    ordered = sorted(specs, key=lambda s: (-BYTES[s.dtype], s.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    at = 0
    for s in ordered:
        header[s.name] = {"dtype": s.dtype, "shape": list(s.shape), "data_offsets": [at, at + s.bytes]}
        at += s.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    state = hashlib.sha256()
    with path.open("xb") as file:

        def put(part: Any) -> None:
            state.update(part)
            file.write(part)

        put(len(text).to_bytes(8, "little"))
        put(text)
        for s in ordered:
            for part in _parts(s, read(s.name)):
                put(part)
        file.flush()
        os.fsync(file.fileno())
    return state.hexdigest()


def _parts(wanted: Spec, given: Tensor | Iterable[Tensor]) -> Iterator[memoryview]:
    """The bytes of a tensor or of its pieces, verified against what was announced."""
    import torch

    if isinstance(given, torch.Tensor):
        held = given.detach().cpu().contiguous()
        if spec(wanted.name, held) != wanted:
            raise ValueError(f"{wanted.name} was announced as {wanted}, and is {spec(wanted.name, held)}")
        if held.numel():
            yield _bytes_of(held)
        return
    count = 0
    for piece in given:
        if letter(piece.dtype) != wanted.dtype:
            raise ValueError(f"{wanted.name} was announced as {wanted}, and a piece is {piece.dtype}")
        count += piece.numel() * BYTES[wanted.dtype]
        if piece.numel():
            yield _bytes_of(piece)
    if count != wanted.bytes:
        raise ValueError(f"{wanted.name} was announced as {wanted}, and its pieces are {count} bytes")


def split(sizes: Sequence[tuple[str, int]], limit: int = 5_000_000_000) -> tuple[tuple[str, ...], ...]:
    """Names per shard, in the order given, each shard at most `limit` bytes (a larger tensor stands alone)."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, count in sizes:
        if shards[-1] and held + count > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += count
    return tuple(tuple(s) for s in shards)
