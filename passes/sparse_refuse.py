"""Why a site cannot read fewer keys in the way that was asked for, with numbers and what would work."""

from __future__ import annotations

import numpy as np

from rewrite.emit.predicate import tree
from rewrite.emit.sparse import looks_back
from rewrite.mask import Mask, causal
from rewrite.mask.terms import At, h
from rewrite.shared import shared
from rewrite.site import Factored, Latent, Site

LOOKED = 96
"""Tokens of the text on which masks are compared where algebra does not decide."""


def refuse_site(site: Site) -> str | None:
    """Why no mask of another kind fits."""
    if site.cross:
        return "it reads another text, in which no position is a query's own: masks by distance say nothing there"
    if isinstance(site.form, (Latent, Factored)) or shared(site) is not None:
        return "its heads share what they cache, so they cannot hold different tokens: convert the model it came from"
    return None


def refuse_mask(site: Site, mask: Mask) -> str | None:
    """Why this mask cannot stand in place of the site's own."""
    if mask.per_row:
        return f"the mask {mask} differs from row to row of a batch; a model's mask is one for all rows"
    wrong = _tables(site, mask)
    if wrong is not None:
        return wrong
    try:
        trees = [tree(mask, i) for i in mask.heads(site.heads)]
    except ValueError as why:
        return str(why)
    for i, own in enumerate(trees):
        first = site.kv_of.index(site.kv_of[i])
        if own != trees[first]:
            return (
                f"query heads {first} and {i} read kv head {site.kv_of[i]} and have different masks: give the heads "
                "of a group one"
            )
    return _outside(site, mask) or _empty(site, mask)


def within(site: Site, mask: Mask) -> Mask:
    """The mask where algebra says that it hides all that the site's own does; else both, which is the same where it
    does and no more where it does not."""
    return mask if mask == site.mask or implied(mask, site.mask) else (site.mask & mask)


def implied(mask: Mask, other: Mask) -> bool:
    """Whether algebra says that `other` shows all that `mask` does."""
    return mask.implies(other) is True


def _tables(site: Site, mask: Mask) -> str | None:
    for entry in sorted(mask.keep.atoms(At), key=str):
        name = str(entry.args[0])
        have = np.shape(mask.tables[name])[0]
        if entry.args[1] == h and have != site.heads:
            return f"the mask's table {name} is for {have} heads, the site has {site.heads} query heads"
    return None


def _outside(site: Site, mask: Mask) -> str | None:
    """A pair that the site's own mask hides and this one shows."""
    if mask == site.mask or implied(mask, site.mask):
        return None
    own = site.mask.table(LOOKED, LOOKED)
    for i in mask.heads(site.heads):
        at_q, at_k = np.nonzero(mask.table(LOOKED, LOOKED, i) & ~own)
        if not len(at_q):
            continue
        q, k = int(at_q[0]), int(at_k[0])
        if looks_back(site) and k > q:
            return f"under {mask} token {q} would read token {k}, which comes after it: write {causal & mask}"
        return f"under {mask} query {q} would read key {k}, which the site's own mask {site.mask} hides"
    return None


def _empty(site: Site, mask: Mask) -> str | None:
    own, itself = site.mask.table(LOOKED, LOOKED), "causal & window(1)" if looks_back(site) else "around(1)"
    for i in mask.heads(site.heads):
        none = np.flatnonzero(own.any(1) & ~(mask.table(LOOKED, LOOKED, i) & own).any(1))
        if len(none):
            return (
                f"under {mask} query {int(none[0])} would read nothing: let every token read itself, {mask} | {itself}"
            )
    return None
