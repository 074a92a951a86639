"""Tables to masks: the library mask that a table is, or the table itself as a predicate."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import sympy
from sympy.logic.boolalg import Boolean

from rewrite.mask.algebra import BoolArray, Mask
from rewrite.mask.library import all_, around, causal, chunk, sink, window
from rewrite.mask.terms import k, q


def listed(table: BoolArray) -> Mask:
    """An unnamed table as a predicate: one interval of keys after another for each query. It says nothing beyond it."""
    queries, keys = table.shape
    rows: list[Boolean] = []
    for i, row in enumerate(table):
        runs = [sympy.And(sympy.Ge(k, first), sympy.Le(k, last)) for first, last in _runs(row)]
        at: Any = sympy.Eq(q, i + keys - queries)
        rows.append(sympy.And(at, sympy.Or(*runs)))
    return Mask(f"table({queries}x{keys})", sympy.Or(*rows))


def _runs(row: BoolArray) -> Iterator[tuple[int, int]]:
    for value, group in itertools.groupby(range(len(row)), key=lambda j: bool(row[j])):
        if value:
            members = list(group)
            yield members[0], members[-1]


def recognise(table: BoolArray) -> Mask | None:
    """The library mask that equals `table` (queries, keys), or None. The simplest is tried first."""
    for mask in _candidates(table):
        if np.array_equal(mask.table(*table.shape), table):
            return mask
    return None


def _candidates(table: BoolArray) -> Iterator[Mask]:
    keys = table.shape[1]
    yield all_
    yield causal
    if not table.any():
        return
    back = _reach(table)
    yield causal & window(back)
    yield around(back)
    sizes = {int(table[:, 0].sum())} if table.shape[0] == keys else set(range(2, min(keys, 64)))
    for size in sorted(sizes - {0}):
        yield causal & chunk(size)
        yield chunk(size)
    runs = list(_runs(table[-1]))
    if len(runs) == 2 and runs[0][0] == 0:
        yield causal & (window(keys - runs[1][0]) | sink(runs[0][1] + 1))
    first = list(_runs(table[0]))
    if len(first) == 1 and first[0][0] == 0:
        yield causal | sink(first[0][1] + 1)


def _reach(table: BoolArray) -> int:
    """1 + the largest distance back to a key that is read."""
    queries, keys = table.shape
    at_q, at_k = np.nonzero(table)
    return int(max(1, (at_q + keys - queries - at_k).max() + 1))
