"""A mask's loops as Triton text: what `codegen.schedule` derived, in the words that a kernel is made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

import numpy as np

from codegen.predicate import predicate
from codegen.schedule import schedule
from rewrite.mask import At, Mask, spell

TABLE = "table_"
"""Begins the names of tables in kernels, whose own variables have other names."""


@dataclass(frozen=True)
class Loop:
    """Segments of tile numbers as texts (start, count, step, width, skip); `listed`: then those of a list."""

    name: str
    segments: tuple[tuple[str, ...], ...]
    listed: bool

    def bounds(self) -> list[str]:
        """Statements that count the loop's tiles: `<name>_end` is their number."""
        lines: list[str] = []
        counts = [f"tl.maximum({count}, 0)" for _, count, *_ in self.segments]
        if self.listed:
            counts.append(f"tl.load({self.name}_counts + list_row)")
        for i, count in enumerate(counts):
            before = f"{self.name}_end_{i - 1} + " if i else ""
            lines.append(f"{self.name}_end_{i} = {before}{count}")
        return [*lines, f"{self.name}_end = {self.name}_end_{len(counts) - 1}"]

    def starts(self) -> list[str]:
        """Statements that name where segments begin."""
        return [f"{self.name}_start_{i} = {start}" for i, (start, *_) in enumerate(self.segments)]

    def tile(self) -> list[str]:
        """Statements that turn the loop's counter `i` into the tile's number `number`."""
        forms = [f"{self.name}_start_{j} + {_since_start(self._since(j), s)}" for j, s in enumerate(self.segments)]
        if self.listed:
            first = self._since(len(self.segments))
            # Before the list's own turn there is nothing to read.
            guard = f", mask={first} >= 0, other=0)" if self.segments else ")"
            forms.append(f"tl.load({self.name}_list + list_row.to(tl.int64) * {self.name}_width + {first}{guard}")
        text = forms[-1]
        for j in range(len(forms) - 2, -1, -1):
            text = f"tl.where(i < {self.name}_end_{j}, {forms[j]}, {text})"
        return [f"number = {text}"]

    def _since(self, j: int) -> str:
        return f"(i - {self.name}_end_{j - 1})" if j else "i"

    @property
    def empty(self) -> bool:
        """The loop has no tile at any length."""
        return not self.segments and not self.listed


@dataclass(frozen=True)
class Loops:
    """The two loops of a kernel, what both are made of, and the predicate of the masked one (None: all pairs)."""

    shared: tuple[str, ...]
    full: Loop
    masked: Loop
    keep: str | None
    listed: bool


def _since_start(i: str, segment: tuple[str, ...]) -> str:
    """Tiles from the segment's first to its i-th: groups of `width`, every `step`, without `skip` of the first."""
    _, _, step, width, skip = segment
    if width == "1":
        return i if step == "1" else f"{i} * ({step})"
    at = i if skip == "0" else f"({i} + {skip})"
    return f"{at} // ({width}) * ({step}) + {at} % ({width})"


@cache
def loops(mask: Mask, over: Literal["k", "q"]) -> Loops:
    """The loops over key tiles of a query tile ("k"), or over query tiles of a key tile ("q")."""
    found = schedule(mask, over)
    shared, texts = found.program("triton")
    full, masked = tuple(texts[: len(found.full)]), tuple(texts[len(found.full) :])
    keep = None if mask.is_all else predicate(mask, "triton")
    return Loops(
        tuple(shared), Loop("full", full, found.listed), Loop("masked", masked, found.listed), keep, found.listed
    )


@lru_cache(maxsize=1024)
def pattern(mask: Mask) -> Mask:
    """The mask without its numbers: what a kernel's text depends on. Masks that differ in tables alone share it."""
    names = {At: lambda *args: At(type(args[0])(TABLE + str(args[0])), *args[1:])}
    keep = mask.keep.replace(At, names[At])
    tables = {TABLE + name: np.empty((0,) * np.ndim(table), np.int32) for name, table in mask.tables.items()}
    return Mask(spell.boolean(keep, spell.ALGEBRA), keep, "constant", tables)


def table_axes(mask: Mask) -> dict[str, int]:
    """A pattern's tables and by how many indices each is read."""
    return {name: np.ndim(mask.tables[name]) for name in sorted(mask.tables)}
