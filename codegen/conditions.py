"""What a conjunction asks of the fixed position alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from codegen.bounds import Span, solve, spread
from codegen.integers import FALSE, TRUE, Int, at_most, both, maximum, minimum, number
from rewrite.mask.clauses import Clause, Form, form, symbols


def implied(clause: Clause, x: Any) -> tuple[Form, ...]:
    """What a lower and an upper bound on one term say together: no x between them, no pair."""
    found: list[Form] = []
    for i, a in enumerate(clause.atoms):
        for b in clause.atoms[i + 1 :]:
            shared = [t for t, w in a.weights if x in symbols(t) and b.terms.get(t, 0) * w < 0]
            for t in shared:
                wa, wb = abs(a.terms[t]), abs(b.terms[t])
                weights = {key: wb * w for key, w in a.weights}
                for key, w in b.weights:
                    weights[key] = weights.get(key, 0) + wa * w
                made = form(weights, wb * a.constant + wa * b.constant)
                if made.weights and not made.has(x):
                    found.append(made)
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Fixed:
    """Only from `low` to `high` can a pair be allowed, and only if `may`; all of the tile meets it if `must`."""

    low: Int
    high: Int
    may: Int
    must: Int


def fixed(own: Sequence[Form], hidden: Sequence[Form], y: Any, tile: Span) -> Fixed:
    """Conditions without x, `own` ones and those that only follow (`hidden`)."""
    lows, highs, may, must = [tile.low], [tile.high], [TRUE], [TRUE]
    for atom in (*own, *hidden):
        mine = atom in own
        if not atom.has(y):
            value = spread(atom.weights, atom.constant, {})
            holds = FALSE if value is None else at_most(number(0), value.low)
            may += [] if value is None else [holds]
            must += [holds] if mine else []
            continue
        solved = solve(Clause((atom,)), y, {})
        ends = [s.low for s in solved.lower], [s.low for s in solved.upper]
        if solved.known and solved.period is None:
            lows += ends[0]
            highs += ends[1]
            if mine:
                must += [at_most(e, tile.low) for e in ends[0]] + [at_most(tile.high, e) for e in ends[1]]
        elif mine:
            value = spread(atom.weights, atom.constant, {y: tile})
            must.append(FALSE if value is None else at_most(number(0), value.low))
            may += [] if value is None else [at_most(number(0), value.high)]
    return Fixed(maximum(*lows), minimum(*highs), both(*may), both(*must))
