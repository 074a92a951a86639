"""Masks that look causal at the traced length but have a window or a chunk that is wider.

The number stands in the mask's own graph: read as 3 and as 4 it shows, and what it does there it does at its size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from torch import fx

from passes.canonicalise import by_value, op_name
from passes.find.anchor import Anchor, Scan
from passes.find.core import core
from passes.find.draw import Draw
from passes.find.law import Asked, law
from passes.find.leads import Leads
from passes.find.roots import NotLifted
from rewrite.mask import BoolArray, Mask, around, causal, chunk, window

NEAR = (3, 4)
WIDE = 1 << 30
LAYOUT = ("slice", "view", "reshape", "expand", "unsqueeze", "arange", "full", "select", "_to_copy")
Family = Callable[[int], Mask]
FAMILIES: tuple[Family, ...] = (
    lambda width: causal & window(width),
    around,
    lambda size: causal & chunk(size),
    chunk,
)


def beyond(scan: Scan, anchor: Anchor, draw: Draw, at: Leads, named: Mask) -> Mask:
    """The mask with windows and chunks that the traced length does not show."""
    tokens = at.q_at.shape[1]
    if tokens <= max(NEAR) + 1 or named.keep not in (causal.keep, True):
        return named
    numbers: dict[int, list[fx.Node]] = {}
    for node in _constants(scan, anchor):
        for x in node.args:
            if type(x) is int and tokens - 1 <= abs(x) < WIDE and op_name(node) not in LAYOUT:
                numbers.setdefault(x, []).append(node)
    for number, nodes in numbers.items():
        tables = [_table(scan, anchor, draw, at, nodes, number, near) for near in NEAR]
        wider = _family(abs(number), tables, named)
        if wider is not None:
            return wider
    return named


def _constants(scan: Scan, anchor: Anchor) -> list[fx.Node]:
    """Nodes behind the mask that hang on nothing."""
    if anchor.above is None:
        mask = anchor.node.kwargs.get("attn_mask", anchor.node.args[3] if len(anchor.node.args) > 3 else None)
        stack, cut = ([mask] if isinstance(mask, fx.Node) else []), None
    else:
        stack, cut = [anchor.node], anchor.above.node
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node not in seen and node is not cut:
            seen.add(node)
            stack.extend(by_value(node))
    return sorted((node for node in seen if scan.graph.is_constant(node)), key=scan.graph.order.__getitem__)


def _table(
    scan: Scan, anchor: Anchor, draw: Draw, at: Leads, nodes: list[fx.Node], number: int, near: int
) -> BoolArray | None:
    """The mask (queries, keys) with a number read as a small one; None where blocks or heads differ."""
    read_as = near if number > 0 else -near
    graph = replace(scan.graph, folded={}, numbers=dict.fromkeys(nodes, (number, read_as)))
    changed = Draw(graph, draw.keep_frozen, draw.true, draw.seed)
    try:
        middle = core(Scan(graph, scan.roots, scan.mixing), anchor, changed)
        keep = law(Asked(middle, at), changed(middle.scores.leaves)).keep.flatten(0, 1).numpy()
    except (NotLifted, RuntimeError, IndexError):
        return None
    return np.asarray(keep[0], dtype=np.bool_) if bool((keep == keep[:1]).all()) else None


def _family(number: int, tables: list[BoolArray | None], named: Mask) -> Mask | None:
    """The family that both tables belong to, a step apart, at the number itself."""
    first, second = tables
    if first is None or second is None:
        return None
    queries, keys = first.shape
    for family in FAMILIES:
        widths = [
            [w for w in range(1, keys) if np.array_equal(family(w).table(queries, keys), table)]
            for table in (first, second)
        ]
        steps = [a for a in widths[0] if a + 1 in widths[1]]
        if steps:
            mask = family(number + steps[0] - NEAR[0])
            return mask if np.array_equal(mask.table(queries, keys), named.table(queries, keys)) else None
    return None
