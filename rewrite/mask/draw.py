"""A mask as a picture: queries down, keys to the right."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rewrite.mask.algebra import Mask

SHADES = "·░▒▓█"
"""From nothing allowed to everything; the first and the last are exact."""


def shares(mask: Mask, queries: int, keys: int, cells: int, head: int, row: int) -> Any:
    """(rows, columns) share of allowed pairs in each cell; a cell is one pair up to `cells` of them."""
    table = mask.table(queries, keys, head, row).astype(float)
    for axis, length in enumerate((queries, keys)):
        step = -(-length // cells)
        starts = np.arange(0, length, step)
        sizes = np.diff(starts, append=length)
        table = np.add.reduceat(table, starts, axis=axis) / (sizes[:, None] if axis == 0 else sizes)
    return table


def draw(mask: Mask, queries: int = 24, keys: int | None = None, head: int = 0, row: int = 0, cells: int = 48) -> str:
    """Lines of text, one character a cell."""
    found = shares(mask, queries, keys or queries, cells, head, row)
    last = len(SHADES) - 1
    index = np.where(found <= 0, 0, np.where(found >= 1, last, np.clip(np.ceil(found * (last - 1)), 1, last - 1)))
    return "\n".join("".join(SHADES[int(i)] for i in line) for line in index)


def svg(mask: Mask, queries: int = 32, keys: int | None = None, head: int = 0, row: int = 0, cells: int = 64) -> str:
    """The same as a drawing of rectangles, one for each run of equal cells in a line."""
    found = shares(mask, queries, keys or queries, cells, head, row)
    high, wide = found.shape
    title = f"{mask} at {queries} queries, {keys or queries} keys".replace("&", "&amp;").replace("<", "&lt;")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" shape-rendering="crispEdges">',
        f"<title>{title}</title>",
        f'<rect width="{wide}" height="{high}" fill="#eee"/>',
    ]
    for y, line in enumerate(found):
        edges = [0, *(np.flatnonzero(np.diff(line)) + 1).tolist(), wide]
        for begin, end in itertools.pairwise(edges):
            if line[begin] > 0:
                opacity = "" if line[begin] == 1 else f' fill-opacity="{line[begin]:.3g}"'
                parts.append(f'<rect x="{begin}" y="{y}" width="{end - begin}" height="1" fill="#246"{opacity}/>')
    return "\n".join([*parts, "</svg>"])
