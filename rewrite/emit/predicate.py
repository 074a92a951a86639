"""A mask of one head as nested lists that JSON holds and the runtime evaluates, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy

from rewrite.mask import Mask
from rewrite.mask.terms import FAR, At, Div, Mod, h, k, q

Tree = Any
"""A bool, or [operation, operands ...]: and, or, not; le, lt, eq, ne of integers; add, mul, div, mod, abs, at; q, k."""

_RELATIONS: tuple[tuple[Any, str, bool], ...] = (
    (sympy.Le, "le", False),
    (sympy.Lt, "lt", False),
    (sympy.Ge, "le", True),
    (sympy.Gt, "lt", True),
    (sympy.Eq, "eq", False),
    (sympy.Ne, "ne", False),
)


def tree(mask: Mask, head: int) -> Tree:
    """The predicate of one query head. ValueError where it hangs on more than the positions of query and key."""
    return _boolean(mask, mask.keep.subs(h, head))


def _boolean(mask: Mask, keep: Any) -> Tree:
    if keep in (sympy.true, sympy.false):
        return bool(keep)
    if isinstance(keep, sympy.Not):
        inner = _boolean(mask, keep.args[0])
        return not inner if isinstance(inner, bool) else ["not", inner]
    if isinstance(keep, (sympy.And, sympy.Or)):
        wants = isinstance(keep, sympy.And)
        parts = sorted((_boolean(mask, x) for x in keep.args), key=str)
        if (not wants) in parts:
            return not wants
        parts = [x for x in parts if x is not wants]
        return wants if not parts else parts[0] if len(parts) == 1 else ["and" if wants else "or", *parts]
    for kind, name, swapped in _RELATIONS:
        if isinstance(keep, kind):
            a, b = (_integer(mask, x) for x in (keep.args[::-1] if swapped else keep.args))
            if isinstance(a, int) and isinstance(b, int):
                return {"le": a <= b, "lt": a < b, "eq": a == b, "ne": a != b}[name]
            atom = _atom([name, a, b])
            return True if atom is not None and atom[1] >= FAR // 2 else [name, a, b]
    raise ValueError(f"{keep} is no comparison of integers")


def _integer(mask: Mask, x: Any) -> Tree:
    if isinstance(x, sympy.Integer):
        return int(x)
    if x in (q, k):
        return str(x)
    if isinstance(x, At):
        return _entry(mask, str(x.args[0]), [_integer(mask, i) for i in x.args[1:]])
    for kind, name in ((sympy.Add, "add"), (sympy.Mul, "mul"), (Div, "div"), (Mod, "mod"), (sympy.Abs, "abs")):
        if isinstance(x, kind):
            return _folded(name, [_integer(mask, part) for part in x.args])
    raise ValueError(f"mask {mask} hangs on {x}, not on the positions of query and key alone")


def _folded(name: str, parts: list[Tree]) -> Tree:
    if not all(isinstance(x, int) for x in parts):
        return [name, *parts]
    if name == "abs":
        return abs(parts[0])
    if name in ("div", "mod"):
        return parts[0] // parts[1] if name == "div" else parts[0] % parts[1]
    return sum(parts) if name == "add" else int(np.prod(parts))


def _entry(mask: Mask, name: str, index: list[Tree]) -> Tree:
    """An entry of a table: a number where the indices are, else what is left of the table, and the other indices."""
    table = np.asarray(mask.tables[name]).astype(np.int64)
    while index and isinstance(index[0], int):
        table, index = table[min(max(index[0], 0), len(table) - 1)], index[1:]
    if any(isinstance(i, int) for i in index):
        raise ValueError(f"mask {mask} reads its table {name} by a number behind a position")
    return ["at", table.tolist(), *index] if index else int(table)


@dataclass(frozen=True)
class Reach:
    """How far a causal query reads: the first `sink` keys and the last `window`, its own among them, at most. `exact`:
    just those."""

    sink: int
    window: int
    exact: bool = False


def reach(keep: Tree) -> Reach | None:
    """The bounds of a predicate under which no query reads a later key; None where it has none."""
    found = _reach(keep)
    if found is None:
        return None
    rest = [part for part in _parts("and", keep) if _atom(part) != ("after", 0)]
    atoms = [_atom(part) for part in (_parts("or", rest[0]) if len(rest) == 1 else ())]
    exact = bool(atoms) and all(atom is not None and atom[0] in ("far", "early") for atom in atoms)
    return Reach(found[0], max(found[1], 1), exact and found[1] > 0)


def _parts(name: str, keep: Tree) -> Iterator[Tree]:
    yield from keep[1:] if isinstance(keep, list) and keep[0] == name else [keep]


def _reach(keep: Tree) -> tuple[int, int] | None:
    """(sink, window)."""
    if isinstance(keep, bool):
        return None if keep else (0, 0)
    if keep[0] in ("and", "or"):
        parts = [_reach(part) for part in keep[1:]]
        some = [part for part in parts if part is not None]
        if keep[0] == "and":
            return min(some, key=sum, default=None)
        return (max(s for s, _ in some), max(w for _, w in some)) if len(some) == len(parts) else None
    kind, count = _atom(keep) or ("", 0)
    if kind in ("far", "near"):
        return 0, max(count, 0)
    return (max(count, 0), 0) if kind in ("early", "young") else None


def _atom(keep: Tree) -> tuple[str, int] | None:
    """What a comparison says: ("far", n) q - k < n, ("near", n) that and more; ("early", n) k < n, ("young", n) q < n;
    ("after", n) k - q <= n; None for anything else."""
    if not isinstance(keep, list) or keep[0] not in ("le", "lt", "eq"):
        return None
    if keep[0] == "eq":
        a, b = keep[1:]
        chunks = isinstance(a, list) and isinstance(b, list) and a[0] == b[0] == "div" and a[2] == b[2]
        return ("near", a[2]) if chunks and {str(a[1]), str(b[1])} == {"q", "k"} else None
    left, right = _linear(keep[1]), _linear(keep[2])
    if left is None or right is None:
        return None
    a, b, c = (x - y for x, y in zip(left, right, strict=True))
    most = -c - (keep[0] == "lt")  # a q + b k <= most
    if (a, b) == (1, -1):
        return "far", most + 1
    if (a, b) == (-1, 1):
        return "after", most
    if (a, b) == (0, 1):
        return "early", most + 1
    return ("young", most + 1) if (a, b) == (1, 0) else None


def _linear(x: Tree) -> tuple[int, int, int] | None:
    """An integer expression as (a, b, c): a q + b k + c."""
    if isinstance(x, int):
        return 0, 0, x
    if isinstance(x, str):
        return int(x == "q"), int(x == "k"), 0
    parts = [_linear(part) for part in x[1:]] if x[0] in ("add", "mul") else [None]
    known = [part for part in parts if part is not None]
    if len(known) != len(parts):
        return None
    if x[0] == "add":
        return sum(p[0] for p in known), sum(p[1] for p in known), sum(p[2] for p in known)
    factors = [p[2] for p in known if p[:2] == (0, 0)]
    rest = [p for p in known if p[:2] != (0, 0)]
    if len(rest) > 1:
        return None
    factor = int(np.prod(factors))
    base = rest[0] if rest else (0, 0, 1)
    return factor * base[0], factor * base[1], factor * base[2]
