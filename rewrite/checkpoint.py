"""Checkpoint folders: which path is a model, which weights it holds, and what is refused before anything reads them.

Tensor names are never made into paths, names of shards only when they are bare; nothing pickled is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rewrite.errors import Refused
from rewrite.weights import BYTES, Entry, Header, is_text, read_header, read_pieces, read_tensor

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = ("BF16", "F16", "F32", "F64")
"""Types of weights that are computed with."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
"""Endings of weight files that are not read."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config and weights: every header verified, no weight read."""

    folder: Path
    headers: tuple[Header, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(e.end - e.begin for h in self.headers for e in h.entries.values())

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum((e.end - e.begin) // BYTES[e.dtype] for h in self.headers for e in h.entries.values())

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Types of the tensors, the one with most bytes first."""
        total: dict[str, int] = {}
        for entry in (e for h in self.headers for e in h.entries.values()):
            total[entry.dtype] = total.get(entry.dtype, 0) + entry.end - entry.begin
        return tuple(sorted(total, key=lambda d: (-total[d], d)))

    @cached_property
    def where(self) -> Mapping[str, Header]:
        """Tensor -> the file that holds it."""
        return {name: header for header in self.headers for name in header.entries}

    def entry(self, name: str) -> Entry | None:
        """Type, shape and place of a tensor; None where no file holds it."""
        return self.where[name].entries[name] if name in self.where else None

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The tensor's shape; None where no file holds it."""
        entry = self.entry(name)
        return None if entry is None else entry.shape

    def tensor(self, name: str, rows: int | None = None) -> Tensor:
        """One tensor, or its first `rows`, read from its own bytes of the file and from no other."""
        return read_tensor(self.where[name], name, rows)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """One tensor in flat pieces that share their memory."""
        return read_pieces(self.where[name], name)


def locate(model: Path) -> Path:
    """The config that a path means, a folder or a config itself; raises where it is none. Weights are not looked at."""
    if not model.exists():
        raise Refused(
            "not-a-model",
            f"there is no folder {model}",
            "models are read from disk; to fetch one: hf download NAME --local-dir FOLDER",
        )
    config = model if model.is_file() and model.suffix == ".json" else model / "config.json"
    if not config.is_file():
        names = sorted(p.name for p in model.iterdir())[:6] if model.is_dir() else []
        held = f"it holds {', '.join(names)}" if names else "it is empty" if model.is_dir() else "it is a file"
        raise Refused(
            "not-a-model",
            f"{model} is not a model folder: no config.json",
            held,
            "give the folder that save_pretrained wrote",
        )
    try:
        parsed = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as why:
        raise Refused("not-a-model", f"{config} is not JSON", str(why), "download the file again") from why
    if not isinstance(parsed, dict):
        raise Refused("not-a-model", f"{config} is not a JSON object", "download the file again")
    return config


def open_checkpoint(model: Path) -> Checkpoint | None:
    """The folder's weights, verified; None where a config stands alone. Raises for what is damaged or pickled."""
    locate(model)
    if model.is_file():
        return None
    single, index = model / "model.safetensors", model / "model.safetensors.index.json"
    if single.exists():
        return Checkpoint(model, (read_header(_regular(single)),))
    if index.exists():
        return Checkpoint(model, _read_shards(model, index))
    stray = sorted(p.name for p in model.iterdir() if p.suffix == ".safetensors")
    if stray:
        raise Refused(
            "no-weights",
            f"{model} has no model.safetensors and no index",
            f"it holds {', '.join(stray[:4])}",
            "rename the one file to model.safetensors, or save the model anew",
        )
    pickled = sorted(p.name for p in model.iterdir() if p.suffix in PICKLED and "training_args" not in p.name)
    if pickled:
        raise Refused(
            "pickled-weights",
            f"{model} holds only pickled weights: {', '.join(pickled[:4])}",
            "a pickle can run any code when it is read, so none is read here",
            "where you trust it, load it in Python with the model's own class, and save it once as safetensors:",
            f"model.save_pretrained('{model}-safe')",
        )
    return None


def require_checkpoint(model: Path) -> Checkpoint:
    """The folder's verified weights; raises where there are none."""
    found = open_checkpoint(model)
    if found is None:
        raise Refused(
            "no-weights",
            f"{model} has a config but no weights, so there is nothing to convert",
            f"its plan can be made: reattn plan {model}",
        )
    return found


def _regular(path: Path) -> Path:
    """A file in its own folder; a link may lead to another one there, or to where the hub's cache keeps its files."""
    if not path.is_file():
        raise Refused("no-weights", f"{path} is no file", "download it again")
    if path.is_symlink():
        home, target = path.parent.resolve(), path.resolve()
        blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
        if target.parent not in (home, blobs):
            raise Refused(
                "linked-weights",
                f"{path} is a link that leads out of the model's folder",
                f"it leads to {target}",
                "put the file itself there: cp --remove-destination",
            )
    return path


def _read_shards(folder: Path, index: Path) -> tuple[Header, ...]:
    weight_map = _weight_map(_regular(index))
    headers: dict[str, Header] = {}
    found: dict[str, str] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise _bad_index(index, f"it lists {shard}, which is not in the folder")
        headers[shard] = read_header(_regular(folder / shard))
        for name in headers[shard].entries:
            if name in found:
                raise _bad_index(index, f"tensor '{name}' is in two of its files: {found[name]} and {shard}")
            found[name] = shard
    for name, shard in weight_map.items():
        if name not in headers[shard].entries:
            raise _bad_index(index, f"tensor '{name}' is not in {shard}")
    return tuple(headers.values())


def _weight_map(index: Path) -> dict[str, str]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise _bad_index(index, f"it lists {next(n for n in names if names.count(n) > 1)!a} twice")
        return found

    try:
        raw = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as why:
        raise _bad_index(index, f"it is not JSON: {why}") from why
    table = cast("dict[str, Any]", raw).get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(table, dict) or not table:
        raise _bad_index(index, "it has no weight_map")
    if "metadata" not in raw:
        raise _bad_index(index, 'it has no "metadata", which transformers needs to load it')
    for name, shard in cast("dict[str, Any]", table).items():
        if not is_text(name):
            raise _bad_index(index, f"it names a tensor {name!a}, which is no text")
        if not isinstance(shard, str) or not _bare(shard):
            what = ascii(shard)[:300]
            raise _bad_index(index, f"tensor '{name}' points to {what}; a bare name ending in .safetensors is wanted")
    return cast("dict[str, str]", table)


def _bad_index(index: Path, why: str) -> Refused:
    return Refused("safetensors", f"{index} is damaged", why, "download the file again, or save the model anew")


def _bare(name: str) -> bool:
    return (
        name.endswith(".safetensors")
        and not set(name) & {"/", "\\", "\0", ":"}
        and not name.startswith(".")
        and is_text(name)
        and len(name.encode("utf-8")) <= 255
    )


def require_floats(held: Checkpoint, names: Iterable[str]) -> None:
    """Raise where weights that are computed with are no plain floating numbers: quantised ones mean other numbers."""
    for name in names:
        entry = held.entry(name)
        if entry is not None and entry.dtype not in FLOATS:
            raise Refused(
                "wrong-dtype",
                f"{held.folder} holds weights that are no floating numbers: {name} is {entry.dtype}",
                f"read are: {'  '.join(FLOATS)}",
                "of a quantised model convert the original, and quantise the result",
            )
