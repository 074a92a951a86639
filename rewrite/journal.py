"""What a long conversion has finished, in a folder, so that the same command goes on from there after it was killed.

Every item is one file whose name ends in the sha256 of what it stands for. A file gets that name only when it is whole
and on disk, so that there is no list that could disagree with it; a damaged one is found by its hash and made again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from rewrite.folder import hash_into, sync


class Journal:
    """The finished items in `folder`. Several processes may write different items at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[str, Path] = {}

    def find(self, item: str) -> Path | None:
        """The item's file, verified once; None where it is not finished."""
        if item not in self.known:
            for path in sorted(self.folder.glob(f"{item}.*.done")):
                if hash_of(path) == path.name.split(".")[-2]:
                    self.known[item] = path
                    break
                path.unlink()
        return self.known.get(item)

    def put(self, item: str, write: Callable[[Path], str]) -> Path:
        """Let `write` make a file, synced, and give its sha256; it counts as finished from one moment to the next."""
        unfinished = self.folder / f"{item}.{os.getpid()}.unfinished"
        unfinished.unlink(missing_ok=True)
        digest = write(unfinished)
        path = self.folder / f"{item}.{digest}.done"
        os.replace(unfinished, path)
        sync(self.folder)
        self.known[item] = path
        return path

    def note(self, name: str, digest: str) -> None:
        """Note that a file elsewhere is whole, and its hash."""
        (self.folder / f"{name}.{digest}.elsewhere").touch()
        sync(self.folder)

    def noted(self, path: Path) -> str | None:
        """The hash of a file elsewhere that was noted and still has it, else None."""
        for mark in sorted(self.folder.glob(f"{path.name}.*.elsewhere")):
            digest = mark.name.split(".")[-2]
            if path.is_file() and hash_of(path) == digest:
                return digest
            mark.unlink()
        return None


def hash_of(path: Path) -> str:
    """sha256 of a file."""
    state = hashlib.sha256()
    hash_into(state, path)
    return state.hexdigest()
