"""Random masks: comparisons of q, k, h with divisions, remainders, tables and absolute values, joined at random."""

from __future__ import annotations

from typing import Any

import numpy as np
import sympy

from rewrite.mask import Mask, Term, at, b, documents, h, k, mask, q

TABLES = {"width": np.array([2, 7, 0]), "shift": np.array([[1, -3, 4], [0, 5, 2]])}
SPANS = documents([[4, 1, 6, 30], [9, 2, 3, 3]])


def random_mask(rng: np.random.Generator) -> Mask:
    """Up to four comparisons; one in six joined with documents of two rows."""
    keep = _tree(rng, int(rng.integers(1, 5)))
    names = {str(x.args[0]) for x in keep.atoms(type(at("width", h).value))}
    found = mask(lambda *_: keep, "random", {n: t for n, t in TABLES.items() if n in names})
    if rng.random() < 1 / 6:
        found = found & SPANS if rng.random() < 0.7 else found | SPANS
    return found


def _tree(rng: np.random.Generator, leaves: int) -> Any:
    if leaves == 1:
        found = _comparison(rng)
        return sympy.Not(found) if rng.random() < 0.15 else found
    left = int(rng.integers(1, leaves))
    join = sympy.And if rng.random() < 0.55 else sympy.Or
    found = join(_tree(rng, left), _tree(rng, leaves - left))
    return sympy.Not(found) if rng.random() < 0.1 else found


def _comparison(rng: np.random.Generator) -> Any:
    one, two = _atom(rng), _atom(rng)
    number = int(rng.integers(-12, 13))
    kind = int(rng.integers(0, 10))
    if kind < 6:
        return (one < two + number, one <= two + number, one > two - number, one >= number - two)[kind % 4]
    if kind == 6:
        return one == two + (number // 4)
    if kind == 7:
        return one != two + (number // 4)
    if kind == 8:
        return abs(one - two) < abs(number)
    return abs(one - two) > abs(number) // 2


def _atom(rng: np.random.Generator) -> Term:
    x = Term((q, k)[int(rng.integers(2))])
    kind = int(rng.integers(0, 12))
    c, o = int(rng.integers(1, 9)), int(rng.integers(-9, 10))
    if kind < 4:
        return x
    if kind == 4:
        return x * int(rng.integers(-2, 4)) + o
    if kind in (5, 6):
        return (x + o) // c
    if kind == 7:
        return (x + o) % c
    if kind == 8:
        return ((x + o) // c + Term(h)) % int(rng.integers(1, 5)) + 0 * c
    if kind == 9:
        return x + at("width", h)
    if kind == 10:
        return (Term(q) - Term(k) + o) % c if rng.random() < 0.7 else (Term(q) + 2 * Term(k) + o) // c
    return at("shift", b, h) + Term(h)
