"""Masks that a block-sparse target makes, the pairs of query and key that they leave, and what a cache needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from rewrite.emit.predicate import reach, tree
from rewrite.emit.sparse import looks_back
from rewrite.mask import Mask, around, at, causal, h, sink, streaming, window
from rewrite.mask.terms import FAR, Term
from rewrite.site import Site, Sparse

LEVELS = 128
"""Pairs of one kv head are counted in this part of the whole context's."""


def static_mask(site: Site, width: int, sinks: int) -> Mask:
    """The first `sinks` keys and those nearer than `width`; of a causal site none behind the query."""
    near = window(width) if looks_back(site) else around(width)
    near = near | sink(sinks) if sinks else near
    return causal & near if looks_back(site) else near


def mixture(site: Site, sinks: Sequence[int], windows: Sequence[int | None]) -> Mask:
    """For each kv head its first keys and those nearer than its window, None for what the site itself reads."""
    many = [sinks[g] for g in site.kv_of]
    widths = [windows[g] for g in site.kv_of]
    if looks_back(site):
        made = streaming(many, widths)
    else:
        far = np.array([FAR if w is None else w for w in widths])
        made = around(at("window", Term(h)), {"window": far}) | sink(at("sink", Term(h)), {"sink": np.array(many)})
    made = made.named(spelled(sinks, windows))
    return made if str(site.mask) in ("causal", "all") else (site.mask & made).named(f"{site.mask} & {made.name}")


def spelled(sinks: Sequence[int], windows: Sequence[int | None]) -> str:
    """`streaming(4, 16/all/64/64)`: the sink and the window of every kv head."""
    first = "/".join(map(str, dict.fromkeys(sinks))) if len(set(sinks)) == 1 else "/".join(map(str, sinks))
    return f"streaming({first}, {'/'.join('all' if w is None else str(w) for w in windows)})"


def own_window(site: Site) -> int | None:
    """How many of the last keys the site itself reads, None for all."""
    found = reach(tree(site.mask, 0)) if looks_back(site) else None
    return None if found is None or found.sink else found.window


def changed(site: Site, mask: Mask) -> Site:
    """The site with another mask."""
    return replace(site, mask=mask, form=Sparse(site.kv_heads, held(site, mask)))


def held(site: Site, mask: Mask) -> tuple[int | None, ...]:
    """Tokens that each kv head's cache needs, at most; nothing where all need all."""
    if not looks_back(site):
        return ()
    first = [site.kv_of.index(g) for g in range(site.k.heads)]
    found = [reach(tree(mask, i)) for i in first]
    most = tuple(None if x is None else x.sink + x.window - 1 for x in found)
    return () if all(n is None for n in most) else most


@lru_cache(maxsize=256)
def pairs(mask: Mask, tokens: int, heads: int) -> float:
    """Pairs of query and key that one head reads of a text, the mean over heads."""
    return float(mask.density(tokens, tokens, heads if mask.per_head else None)) * tokens**2


def streaming_pairs(tokens: int, sinks: int, width: int | None) -> int:
    """Pairs of a causal head with these first and last keys, exactly."""
    seen = np.arange(1, tokens + 1)
    near = seen if width is None else np.minimum(seen, width)
    return int((near + np.minimum(seen - near, sinks)).sum())


def around_pairs(tokens: int, sinks: int, width: int | None) -> int:
    """The same of a head that looks both ways."""
    if width is None:
        return tokens * tokens
    at_q = np.arange(tokens)
    low, high = np.maximum(at_q - width + 1, 0), np.minimum(at_q + width, tokens)
    return int((high - low + np.minimum(low, sinks) + np.maximum(min(sinks, tokens) - high, 0)).sum())


def cost(site: Site, tokens: int, sinks: int, width: int | None) -> int:
    """Pairs of one kv head's queries with these keys, in parts of the whole context's; at least 1."""
    count = streaming_pairs if looks_back(site) else around_pairs
    whole = own_window(site)
    near = whole if width is None else width if whole is None else min(width, whole)
    each = count(tokens, sinks if near is not None else 0, near) / count(tokens, 0, None)
    return max(1, round(LEVELS * each * site.heads / site.k.heads))


def widest(site: Site, tokens: int, sinks: int, share: float) -> int:
    """The widest window, alike for all heads, that leaves at most this share of the site's own pairs; at least 1."""
    count = streaming_pairs if looks_back(site) else around_pairs
    limit = share * count(tokens, 0, own_window(site))
    low, high = 1, tokens
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(tokens, sinks, middle) <= limit else (low, middle - 1)
    return low
