"""Converted sites on disk: a mapping that holds one in memory at a time, and that outlives its process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from rewrite.heads import Change, Rewritten
from rewrite.journal import Journal
from rewrite.site import Site
from rewrite.stored import restored, stored
from rewrite.weights import read_header, read_tensor, spec, write

TEXT = "reattn"
"""The metadata of a site's file that holds what is no tensor."""


class SavedChanges(MutableMapping[str, Change]):
    """Site name -> its change, for the sites of one conversion. What is set is on disk when setting returns."""

    def __init__(self, journal: Journal, sites: Mapping[str, Site]) -> None:
        self.journal = journal
        self.sites = sites
        self.item = {name: f"site-{i:05}" for i, name in enumerate(sites)}

    def __getitem__(self, name: str) -> Change:
        path = self.journal.find(self.item[name])
        if path is None:
            raise KeyError(name)
        header = read_header(path)
        text = json.loads(header.metadata[TEXT])
        tensors = {n: read_tensor(header, n) for n in header.entries}
        return Change(self.sites[name], restored(text["made"], tensors, self.sites[name]), text["error"])

    def __setitem__(self, name: str, change: Change) -> None:
        text, tensors = stored(change.rewritten, change.site)
        metadata = {TEXT: json.dumps({"site": name, "made": text, "error": change.error}, sort_keys=True)}
        specs = [spec(n, t) for n, t in tensors.items()]

        def put(path: Path) -> str:
            return write(path, specs, tensors.__getitem__, metadata)

        self.journal.put(self.item[name], put)

    def __contains__(self, name: object) -> bool:
        return name in self.item and self.journal.find(self.item[str(name)]) is not None

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.sites if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{name} is finished, and what is finished is not taken back")


class Pairs(Mapping[str, tuple[Site, Rewritten]]):
    """Site name -> (source's site, rewritten) of some changes, read when asked for."""

    def __init__(self, changes: Mapping[str, Change], names: list[str]) -> None:
        self.changes, self.names = changes, names

    def __getitem__(self, name: str) -> tuple[Site, Rewritten]:
        if name not in self.names:
            raise KeyError(name)
        change = self.changes[name]
        return change.site, change.rewritten

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: Any) -> bool:
        return name in self.names
