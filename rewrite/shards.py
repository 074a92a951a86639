"""Weights written shard by shard: tensors of converted sites as they are made, all others copied in bounded pieces.

What the files hold, in which order and in which file, follows from shapes alone, so it is settled before a weight is
read, and a run that was interrupted goes on with the shard at which it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rewrite.checkpoint import Checkpoint
from rewrite.emit.large import Large
from rewrite.errors import Refused
from rewrite.folder import sync
from rewrite.journal import Journal
from rewrite.save import SHARD
from rewrite.short import aliases
from rewrite.weights import BYTES, Spec, split, type_of, write

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, eq=False)
class Layout:
    """Every tensor of the output, and the file that it goes to."""

    specs: tuple[Spec, ...]
    copied: Mapping[str, str]
    """Tensor -> the name that it has in the source."""
    files: Mapping[str, tuple[str, ...]]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(s.bytes for s in self.specs)


def lay_out(large: Large, source: torch.nn.Module, held: Checkpoint) -> Layout:
    """`source` is the model that `held` holds, on meta. Of tied tensors one is written."""
    common = held.dtypes[0]
    known, mine = aliases(source), aliases(large.model)
    specs: list[Spec] = []
    copied: dict[str, str] = {}
    for name, value in large.model.state_dict().items():
        here = [n for n in (name, *known.get(name, ())) if held.entry(n) is not None]
        if _again(name, mine, [s.name for s in specs]):
            continue
        entry = held.entry(here[0]) if here else None
        specs.append(Spec(name, entry.dtype if entry else common, tuple(value.shape)))
        if here:
            copied[name] = here[0]
        elif name not in large.site_of:
            raise Refused("stream", f"no file of {held.folder} holds {name}", "download the checkpoint again")
    shards = split([(s.name, s.bytes) for s in specs], SHARD)
    count = len(shards)
    names = (
        [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] if count > 1 else ["model.safetensors"]
    )
    return Layout(tuple(specs), copied, dict(zip(names, shards, strict=True)))


def _again(name: str, mine: Mapping[str, tuple[str, ...]], written: Sequence[str]) -> bool:
    return any(other in written for other in mine.get(name, ()))


class Source:
    """Reads the output's tensors, from what the sites became and from the source's files."""

    def __init__(self, large: Large, layout: Layout, held: Checkpoint) -> None:
        self.large, self.layout, self.held = large, layout, held
        self.specs = {s.name: s for s in layout.specs}
        self.made: tuple[str, Mapping[str, Tensor]] = ("", {})

    def __call__(self, name: str) -> Tensor | Iterable[Tensor]:
        """One tensor, or its pieces."""
        site = self.large.site_of.get(name)
        if site is not None:
            if self.made[0] != site:
                # the tensors of one site are asked for one after the other, so it is held until another one's turn
                self.made = ("", {})
                self.made = (site, self.large.made(site))
            if name in self.made[1]:
                return self.made[1][name].to(type_of(self.specs[name].dtype))
        return self._copied(name)

    def _copied(self, name: str) -> Iterator[Tensor]:
        spec, origin = self.specs[name], self.layout.copied[name]
        if self.held.shape(origin) != spec.shape:
            have = list(self.held.shape(origin) or ())
            raise Refused("stream", f"{origin} is {have} in the files, {list(spec.shape)} is wanted")
        factor = self.large.scaled.get(name)
        for piece in self.held.pieces(origin):
            yield piece if factor is None else (piece.float() * factor).to(piece.dtype)


def write_shards(
    folder: Path, layout: Layout, read: Source, journal: Journal, tell: Callable[[str, int, int], None]
) -> dict[str, str]:
    """Write the files that are not there yet, each whole or not at all, and the index. Gives the hash of each."""
    for path in folder.iterdir():
        if path.name not in layout.files:
            path.unlink()
    hashes: dict[str, str] = {}
    for done, (file, names) in enumerate(layout.files.items()):
        tell(file, done, len(layout.files))
        digest = journal.noted(folder / file)
        if digest is None:
            unfinished = folder / f"{file}.unfinished"
            unfinished.unlink(missing_ok=True)
            digest = write(unfinished, [read.specs[n] for n in names], read)
            unfinished.replace(folder / file)
            sync(folder)
            journal.note(file, digest)
        hashes[file] = digest
    if len(layout.files) > 1:
        (folder / INDEX).write_text(_index(layout), encoding="utf-8")
    return hashes


def _index(layout: Layout) -> str:
    numbers = sum(s.bytes // BYTES[s.dtype] for s in layout.specs)
    where = {name: file for file, names in layout.files.items() for name in names}
    index = {"metadata": {"total_parameters": numbers, "total_size": layout.bytes}, "weight_map": where}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"
