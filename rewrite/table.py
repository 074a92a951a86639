"""Text for people: sizes with units, aligned columns, equal neighbours folded to one row."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

_DECIMAL = ("B", "kB", "MB", "GB", "TB")
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")


def _scaled(value: float, step: int, units: Sequence[str]) -> str:
    power = 0
    while abs(value) >= step and power < len(units) - 1:
        value, power = value / step, power + 1
    digits = f"{value:.1f}".removesuffix(".0") if abs(value) < 100 else f"{value:.0f}"
    return f"{digits} {units[power]}"


def size(count: float) -> str:
    """Bytes on disk and in files, in powers of ten: 13.5 GB."""
    return _scaled(count, 1000, _DECIMAL)


def memory(count: float) -> str:
    """Bytes of a cache, in powers of two: 16 GiB."""
    return _scaled(count, 1024, _BINARY)


def number(count: float) -> str:
    """A count of parameters: 6.74 B, 41.9 M, 96."""
    for power, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= power:
            return f"{count / power:.3g}{unit}"
    return f"{count:g}"


def change(before: float, after: float) -> str:
    """The change in percent with its sign: −75 %."""
    if before == 0:
        return ""
    percent = 100 * (after / before - 1)
    if abs(percent) < 0.05:
        return "±0 %"
    digits = f"{abs(percent):.0f}" if abs(percent) >= 10 else f"{abs(percent):.1f}"
    return ("+" if percent > 0 else "−") + digits + " %"


def columns(rows: Sequence[Sequence[str]], *, indent: int = 2, gap: int = 2) -> str:
    """Rows as aligned columns; the last column is not padded, empty columns vanish."""
    if not rows:
        return ""
    width = max(len(row) for row in rows)
    full = [[*row, *[""] * (width - len(row))] for row in rows]
    kept = [i for i in range(width) if any(row[i] for row in full)]
    wide = [max(len(row[i]) for row in full) for i in kept]
    lines = [(" " * gap).join(row[i].ljust(w) for i, w in zip(kept, wide, strict=True)).rstrip() for row in full]
    return "\n".join(" " * indent + line for line in lines)


def ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as text: 0..3,5,7..9."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ",".join(f"{p[0]}..{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def fold(names: Sequence[str], contents: Sequence[Hashable]) -> list[tuple[str, int]]:
    """One row for sites that are alike: (name with {ranges}, index of the first), in order of first appearance.

    before: layers.0.attn, layers.1.attn, layers.2.attn   (alike)
    after:  layers.{0..2}.attn
    """
    rows = [(name, i) for i, name in enumerate(names)]
    while True:
        best = min((_fold_at(rows, contents, at) for at in range(_numbers(rows))), key=len, default=rows)
        if len(best) >= len(rows):
            return rows
        rows = best


_NUMBER = re.compile(r"(?<![\w{,.#])\d+(?![\w}])|(?<=\.)(?<!\.\.)\d+(?![\w}])")


def _numbers(rows: Sequence[tuple[str, int]]) -> int:
    return max((len(_NUMBER.findall(name)) for name, _ in rows), default=0)


def _fold_at(rows: Sequence[tuple[str, int]], contents: Sequence[Hashable], at: int) -> list[tuple[str, int]]:
    """Fold over the number at position `at` of the names."""
    groups: dict[Hashable, list[tuple[int, int]]] = {}
    for row, (name, first) in enumerate(rows):
        found = list(_NUMBER.finditer(name))
        if at >= len(found):
            groups[name, None, contents[first]] = [(row, -1)]
            continue
        hit = found[at]
        groups.setdefault((name[: hit.start()], name[hit.end() :], contents[first]), []).append((row, int(hit[0])))
    folded: list[tuple[str, int]] = []
    for key, members in groups.items():
        name, first = rows[members[0][0]]
        if len(members) > 1 and isinstance(key, tuple):
            name = f"{key[0]}{{{ranges([n for _, n in members])}}}{key[1]}"
        folded.append((name, first))
    return folded
