"""Masks as predicates over (q, k): which keys a query reads, with &, | and ~, a table, and its recognition.

`q` is the query's position counted in key coordinates: with s keys and t queries, query i stands at s - t + i
(aligned at the end, as in decoding with a cache).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import sympy
from sympy.logic.boolalg import Boolean

BoolArray = npt.NDArray[np.bool_]
Origin = Literal["constant", "parameters", "input"]

q, k = sympy.symbols("q k", integer=True)


@dataclass(frozen=True)
class Mask:
    """A sympy predicate: True where query `q` reads key `k`.

    `origin` says what the mask hangs on in the model. With "parameters" or "input" the model's own operand rules
    and the predicate is only what it was on the example.
    """

    name: str
    keep: Any
    origin: Origin = "constant"

    def __and__(self, other: Mask) -> Mask:
        return Mask(f"{_group(self)} & {_group(other)}", sympy.And(self.keep, other.keep), _join(self, other))

    def __or__(self, other: Mask) -> Mask:
        return Mask(f"{_group(self)} | {_group(other)}", sympy.Or(self.keep, other.keep), _join(self, other))

    def __invert__(self) -> Mask:
        return Mask(f"~{_group(self)}", sympy.Not(self.keep), self.origin)

    def __str__(self) -> str:
        return self.name

    @property
    def is_all(self) -> bool:
        """Every query reads every key."""
        return self.keep == sympy.true

    def holds(self, queries: npt.ArrayLike, keys: npt.ArrayLike) -> BoolArray:
        """The predicate at positions `queries` (key coordinates) and `keys`, broadcast against each other."""
        at_q, at_k = np.broadcast_arrays(np.asarray(queries), np.asarray(keys))
        value = sympy.lambdify((q, k), self.keep, "numpy")(at_q, at_k)
        return np.broadcast_to(np.asarray(value, dtype=bool), at_q.shape).copy()

    def table(self, queries: int, keys: int) -> BoolArray:
        """(queries, keys) booleans, aligned at the end."""
        return self.holds(np.arange(queries)[:, None] + keys - queries, np.arange(keys)[None])

    def with_origin(self, origin: Origin) -> Mask:
        """The same predicate, hanging on something else."""
        return Mask(self.name, self.keep, origin)


def _group(mask: Mask) -> str:
    """The name, in brackets where it is a composition."""
    plain = " & " not in mask.name and " | " not in mask.name
    return mask.name if plain else f"({mask.name})"


def _join(a: Mask, b: Mask) -> Origin:
    order: tuple[Origin, ...] = ("constant", "parameters", "input")
    return order[max(order.index(a.origin), order.index(b.origin))]


all_ = Mask("all", sympy.true)
causal = Mask("causal", sympy.Le(k, q))


def window(width: int) -> Mask:
    """The last `width` keys up to the query, and all later ones: use `causal & window(w)`."""
    return Mask(f"window({width})", sympy.Lt(q - k, width))


def around(width: int) -> Mask:
    """Keys nearer than `width` on either side: the symmetric window."""
    return Mask(f"around({width})", sympy.And(sympy.Lt(q - k, width), sympy.Lt(k - q, width)))


def chunk(size: int) -> Mask:
    """Keys in the query's own chunk of `size` positions."""
    return Mask(f"chunk({size})", sympy.Eq(sympy.floor(q / sympy.Integer(size)), sympy.floor(k / sympy.Integer(size))))


def sink(count: int) -> Mask:
    """The first `count` keys."""
    return Mask(f"sink({count})", sympy.Lt(k, count))


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
