"""Runs of tiles: of one conjunction, their unions, what of them is masked, and the periodic ones between them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from codegen.bounds import Period, Span, solve
from codegen.conditions import fixed, implied
from codegen.integers import (
    ONE,
    TRUE,
    ZERO,
    Int,
    add,
    at_most,
    both,
    ceil,
    floor,
    less,
    maximum,
    minimum,
    minus,
    name,
    number,
    product,
    rest,
    where,
)
from rewrite.mask.clauses import Clause
from rewrite.mask.terms import k, q

Ends = tuple[Int, Int]
"""From, up to and without. Empty where both are one."""
TILE = name("tile")


@dataclass(frozen=True)
class Window:
    """Positions begin, ..., begin + length - 1, again every `size`."""

    begin: Int
    length: Int
    size: int


@dataclass(frozen=True)
class Run:
    """What one conjunction gives: `visit` in tiles, `every` in positions (all pairs allowed), and its period."""

    visit: Ends
    every: Ends
    period: Period | None = None
    some: Window | None = None
    all: Window | None = None

    @property
    def whole(self) -> Run:
        """Without the period: every tile between the ends, all masked."""
        return replace(self, every=(ZERO, ZERO), period=None)


def clause_run(clause: Clause, over: Literal["k", "q"]) -> Run:
    """Solve a conjunction for the looped position. Positions count from the looped axis' own beginning."""
    x, y = (k, q) if over == "k" else (q, k)
    begin, past = (name("q0"), name("q1")) if over == "k" else (name("k0"), name("k1"))
    size, shift = (name("N"), ZERO) if over == "k" else (name("T"), name("offset"))
    tile = Span(begin, add(past, -1))
    own = [a for a in clause.atoms if not a.has(x)]
    asked = fixed(own, implied(clause, x), y, tile)
    clipped = Span(asked.low, asked.high)
    every = solve(clause, x, {y: tile})
    some = every if clipped == tile else solve(clause, x, {y: clipped})

    low = maximum(ZERO, *(minus(s.low, shift) for s in some.lower))
    high = maximum(minimum(size, *(add(minus(s.high, shift), 1) for s in some.upper)), low)
    may = both(asked.may, at_most(asked.low, asked.high) if clipped != tile else TRUE)
    window = _window(some.period, shift, outer=True)
    if window is not None:
        may = both(may, less(ZERO, window.length))
    first = floor(low, TILE)
    # an empty run inside a tile would round to that tile
    there = may if low is ZERO else both(may, less(low, high))
    visit = first, where(there, ceil(high, TILE), first)

    inner = maximum(ZERO, *(minus(s.high, shift) for s in every.lower))
    end = maximum(minimum(size, *(add(minus(s.low, shift), 1) for s in every.upper)), inner)
    end = where(asked.must, end, inner) if every.known else inner
    return Run(visit, (inner, end), some.period, window, _window(every.period, shift, outer=False))


def _window(period: Period | None, shift: Int, outer: bool) -> Window | None:
    """Where some, or every, position of the fixed tile finds x."""
    if period is None:
        return None
    c, u, v = period.centre, period.u, period.v
    low, high = (add(c.low, u.low), add(c.high, v.high)) if outer else (add(c.high, u.high), add(c.low, v.low))
    return Window(minus(low, shift), add(minus(high, low), 1), period.size)


def union(runs: list[Run]) -> tuple[list[Ends], list[Ends]]:
    """Disjoint runs of tiles in order: all visited ones, and those that need no masking (within the others)."""
    begins, ends = _sorted([r.visit[0] for r in runs]), _sorted([r.visit[1] for r in runs])
    visited: list[Ends] = []
    for i, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        visited.append((maximum(begin, ends[i - 1]) if i else begin, end))
    every = [r.every for r in runs if r.every[0] is not r.every[1]]
    begins, ends = _sorted([e[0] for e in every]), _sorted([e[1] for e in every])
    joined: list[Ends] = []
    for begin, end in zip(begins, ends, strict=True):
        if joined:
            # runs that touch are one before they are rounded: a tile may lie half in each
            before, until = joined[-1]
            touch = at_most(begin, until)
            joined[-1] = before, where(touch, before, until)
            begin = where(touch, before, begin)
        joined.append((begin, end))
    full: list[Ends] = []
    for begin, end in joined:
        first = ceil(begin, TILE)
        full.append((first, maximum(floor(end, TILE), first)))
    return visited, full


def masked_of(visited: list[Ends], full: list[Ends]) -> list[Ends]:
    """What is visited and not full, in order."""
    begins = _sorted([*(v[0] for v in visited), *(f[1] for f in full)])
    ends = _sorted([*(f[0] for f in full), *(v[1] for v in visited)])
    return list(zip(begins, ends, strict=True))


def _sorted(values: list[Int]) -> list[Int]:
    """A sorting network of minima and maxima (Batcher's odd-even merges)."""
    out = list(values)
    n, p = len(out), 1
    while p < n:
        step = p
        while step >= 1:
            for j in range(step % p, n - step, 2 * step):
                for i in range(j, min(j + step, n - step)):
                    if i // (2 * p) == (i + step) // (2 * p):
                        out[i], out[i + step] = minimum(out[i], out[i + step]), maximum(out[i], out[i + step])
            step //= 2
        p *= 2
    return out


def hull(runs: list[Run], over: Literal["k", "q"]) -> Ends:
    """From the first tile that any conjunction visits to the last."""
    begin = minimum(*(r.visit[0] for r in runs))
    # an empty run may stand anywhere, also beyond the end
    end = minimum(maximum(*(r.visit[1] for r in runs)), ceil(name("N" if over == "k" else "T"), TILE))
    return begin, maximum(begin, end)


Numbers = tuple[Int, Int, Int, Int, Int]


def periodic(run: Run, visited: list[Ends]) -> tuple[list[Numbers], list[Numbers]]:
    """Segments (full, masked) of a periodic conjunction between what the others visit."""
    if run.some is None or run.all is None:
        return [], []
    size = run.some.size
    divides = at_most(rest(number(size), TILE), ZERO)
    period = where(divides, floor(number(size), TILE), ONE)
    base = floor(run.some.begin, TILE)
    reach = add(minus(floor(add(run.some.begin, run.some.length, -1), TILE), base), 1)
    # a window that is empty here and there still divides by its width
    width = where(divides, maximum(minimum(reach, period), ONE), ONE)
    # as many tiles wholly inside the smaller window as the larger one touches are the same tiles
    inside = minus(floor(add(run.all.begin, run.all.length), TILE), ceil(run.all.begin, TILE))
    always = at_most(number(size), run.all.length)
    full_ones = where(always, ONE, where(divides, at_most(width, inside), ZERO))

    def hits(begin: Int, end: Int) -> Numbers:
        at = rest(minus(begin, base), period)
        in_group = less(at, width)
        start = minus(begin, at)
        start, skip = where(in_group, start, add(start, period)), where(in_group, at, ZERO)
        return start, minus(_before(end, base, period, width), _before(begin, base, period, width)), period, width, skip

    first, last = ceil(run.every[0], TILE), floor(run.every[1], TILE)
    full: list[Numbers] = []
    masked: list[Numbers] = []
    edges = [ZERO, *(e for v in visited for e in v)]
    for begin, end in zip(edges[::2], [*edges[1::2], run.visit[1]], strict=True):
        begin = maximum(begin, run.visit[0])
        end = maximum(minimum(end, run.visit[1]), begin)
        middle = minimum(maximum(first, begin), end)
        until = maximum(minimum(last, end), middle)
        for a, b in ((begin, middle), (until, end)):
            if a is not b:
                masked.append(hits(a, b))
        if middle is not until:
            start, count, *others = hits(middle, until)
            whole = product(full_ones, count)
            full.append((start, whole, others[0], others[1], others[2]))
            masked.append((start, minus(count, whole), others[0], others[1], others[2]))
    return full, masked


def _before(t: Int, base: Int, period: Int, width: Int) -> Int:
    """Tiles of the groups below t, counted from base."""
    away = minus(t, base)
    return add(product(floor(away, period), width), minimum(rest(away, period), width))
