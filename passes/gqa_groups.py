"""Which kv heads go together: the cheapest splits into equal groups, by the sum of a cost per group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations
from math import comb, prod

Group = tuple[int, ...]
Grouping = tuple[Group, ...]
ALL = 400
"""Up to so many splits every one is looked at."""


def neighbours(heads: int, groups: int) -> Grouping:
    """Equal groups of consecutive heads."""
    size = heads // groups
    return tuple(tuple(range(i * size, (i + 1) * size)) for i in range(groups))


def cheapest(heads: int, groups: int, cost: Callable[[Group], float], most: int) -> tuple[Grouping, ...]:
    """At most `most` splits, the cheapest first; neighbours are among them where there is room for two."""
    size = heads // groups
    known = cache(cost)

    def total(split: Grouping) -> float:
        return sum(known(g) for g in split)

    if _count(heads, size) <= ALL:
        found = set(_splits(tuple(range(heads)), size))
    else:
        found = _searched(heads, size, known, total)
    ordered = sorted(found, key=lambda split: (total(split), split))[:most]
    plain = neighbours(heads, groups)
    return tuple(ordered) if plain in ordered or most == 1 else (*ordered[: most - 1], plain)


def _count(heads: int, size: int) -> int:
    return prod(comb(left - 1, size - 1) for left in range(heads, 0, -size))


def _splits(left: Group, size: int) -> Iterator[Grouping]:
    if not left:
        yield ()
        return
    for rest in combinations(left[1:], size - 1):
        group = (left[0], *rest)
        for others in _splits(tuple(i for i in left if i not in group), size):
            yield (group, *others)


def _searched(
    heads: int, size: int, cost: Callable[[Group], float], total: Callable[[Grouping], float]
) -> set[Grouping]:
    """Greedy and neighbours as starts, then exchanges of two heads while any helps; the last optimum's neighbours
    are candidates too."""
    found: set[Grouping] = set()
    for split in (_greedy(heads, size, cost), neighbours(heads, heads // size)):
        best = split
        while True:
            near = min(_exchanges(best), key=lambda s: (total(s), s))
            if total(near) >= total(best):
                break
            best = near
        found |= {best, *sorted(_exchanges(best), key=lambda s: (total(s), s))[:20]}
    return found


def _greedy(heads: int, size: int, cost: Callable[[Group], float]) -> Grouping:
    left, groups = list(range(heads)), list[Group]()
    while left:
        group: Group = (left[0],)
        while len(group) < size:
            group = min((tuple(sorted((*group, i))) for i in left if i not in group), key=lambda g: (cost(g), g))
        groups.append(group)
        left = [i for i in left if i not in group]
    return tuple(sorted(groups))


def _exchanges(split: Grouping) -> Iterator[Grouping]:
    for a, b in combinations(range(len(split)), 2):
        for i in split[a]:
            for j in split[b]:
                first = tuple(sorted((set(split[a]) - {i}) | {j}))
                second = tuple(sorted((set(split[b]) - {j}) | {i}))
                rest = (g for n, g in enumerate(split) if n not in (a, b))
                yield tuple(sorted((first, second, *rest)))
