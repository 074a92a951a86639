"""A mask's loops as Triton text: what `codegen.schedule` derived, in the words that a kernel is made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from codegen.schedule import Segment, predicate, schedule
from rewrite.mask import Mask


@dataclass(frozen=True)
class Loop:
    """Segments of tile numbers, (start, count, step) each, and whether the last ones come from a list."""

    name: str
    segments: tuple[tuple[str, str, int], ...]
    listed: bool

    def bounds(self) -> list[str]:
        """Statements that count the loop's tiles: `<name>_end` is their number."""
        lines: list[str] = []
        ends: list[str] = []
        for i, (start, count, _) in enumerate(self.segments):
            lines += [f"{self.name}_start_{i} = {start}", f"{self.name}_count_{i} = {count}"]
            ends.append(f"{self.name}_count_{i}")
        if self.listed:
            lines.append(f"{self.name}_count_listed = tl.load({self.name}_counts + list_row)")
            ends.append(f"{self.name}_count_listed")
        for i in range(len(ends)):
            lines.append(f"{self.name}_end_{i} = " + (f"{self.name}_end_{i - 1} + " if i else "") + ends[i])
        lines.append(f"{self.name}_end = " + (f"{self.name}_end_{len(ends) - 1}" if ends else "0"))
        return lines

    def tile(self) -> list[str]:
        """Statements that turn the loop's counter `i` into the tile's `number`."""
        forms = [f"{self.name}_start_{j} + {_times(self._since(j), step)}" for j, (_, _, step) in enumerate(self.segments)]
        if self.listed:
            first = self._since(len(self.segments))
            listed = f"tl.load({self.name}_list + list_row.to(tl.int64) * {self.name}_width + {first}"
            # Beyond the list there is nothing to read; the other segments' tiles come before it.
            guard = f", mask={first} >= 0, other=0)" if self.segments else ")"
            forms.append(listed + guard)
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
    """The two loops of a kernel, the predicate of the masked one (None: all pairs), and the tables they read."""

    full: Loop
    masked: Loop
    keep: str | None
    tables: tuple[str, ...]
    listed: bool


def _times(text: str, step: int) -> str:
    return text if step == 1 else f"{text} * {step}"


@cache
def loops(mask: Mask, over: Literal["k", "q"]) -> Loops:
    """The loops over key tiles of a query tile ("k"), or over query tiles of a key tile ("q")."""
    found = schedule(mask, over)
    return Loops(
        full=Loop("full", _texts(found.full), found.listed),
        masked=Loop("masked", _texts(found.masked), found.listed),
        keep=None if mask.is_all else predicate(mask, "triton"),
        tables=tuple(getattr(mask, "tables", {})),
        listed=found.listed,
    )


def _texts(segments: tuple[Segment, ...]) -> tuple[tuple[str, str, int], ...]:
    return tuple((s.start.text("triton"), s.count.text("triton"), s.step) for s in segments)
