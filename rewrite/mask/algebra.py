"""`Mask`: a predicate with a name, what it hangs on, and the tables whose entries it reads."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import sympy

from rewrite.mask import spell
from rewrite.mask.terms import FIRST, PAST, At, Term, b, h, k, q

BoolArray = npt.NDArray[np.bool_]
Origin = Literal["constant", "parameters", "input"]
Table = npt.NDArray[Any]
"""Integers: one axis for each index that the predicate reads it by."""
SPELLED = 1024
"""Entries of the largest table that is written out where a mask is sent as text."""


@dataclass(frozen=True, eq=False)
class Mask:
    """A sympy predicate: True where query `q` of head `h` of row `b` reads key `k`, positions in key coordinates.

    `origin` says what the mask hangs on in the model. With "parameters" or "input" the model's own operand rules
    and the predicate is only what it was on the example. `tables` hold what comes from data: the predicate reads
    them by name (`at("window", h)`), so masks that differ in their numbers alone share one predicate, and one kernel.
    A table without entries, of as many axes, is declared: its numbers are given where the mask is used.
    """

    name: str
    keep: Any
    origin: Origin = "constant"
    tables: Mapping[str, Table] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, axes in self.axes.items():
            have = np.ndim(self.tables[name]) if name in self.tables else None
            if have != axes:
                what = "is not given" if have is None else f"has {have}"
                raise ValueError(f"mask {self.name} reads table {name} by {axes} indices, and it {what}")
        extra = set(self.tables) - set(self.axes)
        if extra:
            raise ValueError(f"mask {self.name} does not read its tables {', '.join(sorted(extra))}")
        # torch.compile reads them off the object, and cannot follow their making
        _ = self.apart, self.spelled, self.declared

    def __and__(self, other: Mask) -> Mask:
        return _join("&", self, other)

    def __or__(self, other: Mask) -> Mask:
        return _join("|", self, other)

    def __invert__(self) -> Mask:
        return Mask(f"~{_group(self.name)}", sympy.Not(self.keep), self.origin, self.tables)

    def __str__(self) -> str:
        return self.name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self.content == other.content

    def __hash__(self) -> int:
        return hash(self.content)

    @cached_property
    def content(self) -> tuple[Any, ...]:
        """All of the mask as one hashable value, its tables as hashes."""
        return self.name, self.keep, self.origin, tuple((n, _digest(self.tables[n])) for n in sorted(self.tables))

    @cached_property
    def text(self) -> str:
        """Algebra that `parse` reads back to the same predicate: the name, spelled out where the name is a user's."""
        from rewrite.mask.read import parse

        try:
            same = parse(self.name, self.tables).keep == self.keep
        except ValueError:
            same = False
        return self.name if same else spell.boolean(self.keep, spell.ALGEBRA)

    @cached_property
    def spelled(self) -> str:
        """The predicate as algebra over b, h, q and k, whatever the mask is called, with its small tables as JSON:
        `q - k < window[h] where {"window": [8, 64]}`. Those that are `apart` must be given beside it."""
        text = spell.boolean(self.keep, spell.ALGEBRA)
        small = {n: np.asarray(self.tables[n]).tolist() for n in sorted(self.tables) if n not in self.apart}
        return f"{text} where {json.dumps(small)}" if small else text

    @cached_property
    def apart(self) -> tuple[str, ...]:
        """Tables that are too large to be spelled, or declared."""
        return tuple(n for n in sorted(self.tables) if not 0 < np.size(self.tables[n]) <= SPELLED)

    @cached_property
    def axes(self) -> dict[str, int]:
        """By how many indices each table is read."""
        return {str(x.args[0]): len(x.args) - 1 for x in self.keep.atoms(At)}

    @cached_property
    def declared(self) -> tuple[str, ...]:
        """Tables without entries, whose numbers are given where the mask is used."""
        return tuple(n for n in sorted(self.tables) if not np.size(self.tables[n]))

    @property
    def is_all(self) -> bool:
        """Every query reads every key."""
        return self.keep == sympy.true

    @cached_property
    def per_head(self) -> bool:
        """Heads differ."""
        return h in self.keep.free_symbols

    @cached_property
    def per_row(self) -> bool:
        """Rows of the batch differ."""
        return b in self.keep.free_symbols

    def holds(
        self,
        queries: npt.ArrayLike,
        keys: npt.ArrayLike,
        head: npt.ArrayLike = 0,
        row: npt.ArrayLike = 0,
        offset: int = 0,
    ) -> BoolArray:
        """The predicate at positions `queries` (key coordinates) and `keys`; all broadcast against each other.

        `offset` is the position of the first query, which only a mask aligned at the first token asks for.
        """
        return spell.holds(self.keep, self.tables, queries, keys, head, row, offset)

    def table(self, queries: int, keys: int, head: int = 0, row: int = 0) -> BoolArray:
        """(queries, keys) booleans of one head and row, aligned at the end."""
        start = keys - queries
        return self.holds(np.arange(queries)[:, None] + start, np.arange(keys)[None], head, row, start)

    def density(self, queries: int, keys: int, heads: int | None = None, rows: int | None = None) -> Fraction:
        """Share of all pairs that is allowed, exactly; the mean over heads and rows of the batch, if they differ."""
        from rewrite.mask.density import density

        return density(self, queries, keys, heads, rows)

    def implies(self, other: Mask) -> bool | None:
        """Whether `other` allows every pair that this one allows, at any length; None where it is not decided."""
        from rewrite.mask.compare import implies

        return implies(self, other)

    def equals(self, other: Mask) -> bool | None:
        """Whether both allow the same pairs at any length; None where it is not decided. `==` compares texts."""
        from rewrite.mask.compare import equals

        return equals(self, other)

    def draw(self, queries: int = 24, keys: int | None = None, head: int = 0, row: int = 0) -> str:
        """A picture in text: queries down, keys to the right."""
        from rewrite.mask.draw import draw

        return draw(self, queries, keys, head, row)

    def svg(self, queries: int = 32, keys: int | None = None, head: int = 0, row: int = 0) -> str:
        """A picture as SVG."""
        from rewrite.mask.draw import svg

        return svg(self, queries, keys, head, row)

    def heads(self, count: int) -> range:
        """Of `count` query heads those that need looking at: all, or the first where they are alike."""
        return range(count if self.per_head else 1)

    def by_head(self, queries: npt.ArrayLike, keys: npt.ArrayLike, count: int) -> BoolArray:
        """(heads or 1, ...): `holds` for each of `count` query heads, for one where they are alike."""
        return np.stack([self.holds(queries, keys, head) for head in self.heads(count)])

    def with_origin(self, origin: Origin) -> Mask:
        """The same predicate, hanging on something else."""
        return Mask(self.name, self.keep, origin, self.tables)

    def named(self, name: str) -> Mask:
        """The same predicate under another name."""
        return Mask(name, self.keep, self.origin, self.tables)


def mask(
    rule: Callable[[Term, Term, Term, Term], Any], name: str | None = None, tables: Mapping[str, Table] | None = None
) -> Mask:
    """A mask from a Python function of b, h, q, k: `mask(lambda b, h, q, k: (q - k < 8) | (k % 4 == 0))`.

    Comparisons are joined with & | ~ in brackets; `at("width", h)` reads a table of `tables`.
    """
    try:
        keep = rule(Term(b), Term(h), Term(q), Term(k))
    except TypeError as error:
        raise TypeError(
            f"the mask's rule cannot be read: {error}; join comparisons with & | ~, each in brackets"
        ) from None
    keep = sympy.sympify(keep)
    text = spell.boolean(keep, spell.ALGEBRA)
    return Mask(name or text, keep, "constant", dict(tables or {}))


def _join(sign: str, left: Mask, right: Mask) -> Mask:
    right = apart(left, right)
    order: tuple[Origin, ...] = ("constant", "parameters", "input")
    keep = (sympy.And if sign == "&" else sympy.Or)(left.keep, right.keep)
    read = {str(x.args[0]) for x in keep.atoms(At)}
    return Mask(
        f"{_group(left.name)} {sign} {_group(right.name)}",
        keep,
        order[max(order.index(left.origin), order.index(right.origin))],
        {name: table for name, table in {**left.tables, **right.tables}.items() if name in read},
    )


def apart(left: Mask, right: Mask) -> Mask:
    """`right` with those tables renamed whose names stand for other numbers in `left`."""
    for name in right.tables:
        if name in left.tables and not _same(left.tables[name], right.tables[name]):
            stem = _stem(name)
            taken = {_stem(x) for x in (*left.tables, *right.tables)}
            fresh = next(f"{stem}_{i}" for i in range(2, len(taken) + 3) if f"{stem}_{i}" not in taken)
            return apart(left, _renamed(right, stem, fresh))
    return right


def _renamed(mask: Mask, stem: str, fresh: str) -> Mask:
    new = {x: fresh + x.removeprefix(stem) if _stem(x) == stem else x for x in mask.tables}
    keep = mask.keep.subs({sympy.Symbol(x): sympy.Symbol(y) for x, y in new.items() if x != y})
    # a name before a bracket is a function of the library
    name = re.sub(rf"\b{stem}({FIRST}|{PAST})?\b(?!\()", rf"{fresh}\1", mask.name)
    return Mask(name, keep, mask.origin, {new[x]: table for x, table in mask.tables.items()})


def _stem(table: str) -> str:
    return table.removesuffix(FIRST).removesuffix(PAST)


def _same(a: Table, b_: Table) -> bool:
    return a is b_ or np.array_equal(a, b_)


def _group(name: str) -> str:
    """The name, in brackets where it is a composition or a comparison."""
    return f"({name})" if re.search(r" [&|] |[<>=]", name) else name


def _digest(table: Table) -> str:
    data = np.ascontiguousarray(table)
    return hashlib.sha256(f"{data.dtype}{data.shape}".encode() + data.tobytes()).hexdigest()[:16]
