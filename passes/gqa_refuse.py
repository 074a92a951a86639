"""Why a site cannot have fewer kv heads, in a sentence with numbers and what would work."""

from __future__ import annotations

import numpy as np

from passes.gqa_build import alike, own, same
from rewrite.site import Affine, Operand, Refusal, Root, Site


def refuse_site(site: Site, kv_heads: int) -> str | None:
    """The first reason that applies, or None."""
    reason = _refuse_count(site, kv_heads) or _refuse_output(site) or _refuse_projections(site)
    if reason is not None or kv_heads == site.k.heads:
        return reason
    return _refuse_rope(site) or _refuse_readers(site) or _refuse_constants(site)


def _refuse_count(site: Site, kv_heads: int) -> str | None:
    have = site.k.heads
    if have != site.v.heads:
        return f"keys have {have} heads and values {site.v.heads}; only equal numbers are merged"
    if kv_heads > have:
        return f"the attention has {have} kv heads, fewer than {kv_heads}; possible: {_divisors(have)}"
    if have % kv_heads:
        return f"{have} kv heads do not split into {kv_heads} equal groups; possible: {_divisors(have)}"
    return None


def _divisors(n: int) -> str:
    return ", ".join(str(i) for i in range(1, n + 1) if n % i == 0)


def _refuse_output(site: Site) -> str | None:
    if isinstance(site.out, Refusal):
        return f"its output projection is not known ({site.out.reason}), and merged values change it"
    return None


def _refuse_projections(site: Site) -> str | None:
    for name, operand in (("queries", site.q), ("keys", site.k), ("values", site.v)):
        if len(operand.roots) != 1:
            names = ", ".join(r.tensor for r in operand.roots)
            return f"its {name} come from {len(operand.roots)} projections ({names}); only one can be rewritten"
    for one, other, what in (
        ("k", "v", "keys and values"),
        ("q", "k", "queries and keys"),
        ("q", "v", "queries and values"),
    ):
        a, b = getattr(site, one), getattr(site, other)
        if _overlap(a, b):
            return f"{what} share rows of {a.roots[0].tensor}, and merging needs each to change by itself"
    for name, operand in (("queries", site.q), ("keys", site.k), ("values", site.v)):
        if len(np.unique(operand.rows)) != operand.rows.size:
            return f"heads of its {name} share rows of {operand.roots[0].tensor}, so one cannot change alone"
    return None


def _overlap(a: Operand, b: Operand) -> bool:
    def first(root: Root, rows: np.ndarray) -> set[int]:
        return set(root.starts[rows.reshape(-1)].tolist())

    ra, rb = a.roots[0], b.roots[0]
    return ra.tensor == rb.tensor and bool(first(ra, a.rows) & first(rb, b.rows))


def _refuse_rope(site: Site) -> str | None:
    q, k = site.q.rope, site.k.rope
    if site.v.rope is not None:
        return "its values are rotated by position, which no merge of heads commutes with"
    if (q is None) != (k is None):
        return f"only its {'keys' if q is None else 'queries'} are rotated by position"
    if q is None or k is None:
        return None
    if not np.array_equal(q.pairs, k.pairs) or not np.allclose(q.frequencies, k.frequencies, rtol=1e-6, atol=0):
        return "queries and keys are rotated by different frequencies"
    return None


def _refuse_readers(site: Site) -> str | None:
    counts = [site.kv_of.count(i) for i in range(site.k.heads)]
    if len(set(counts)) > 1:
        return f"kv heads are read by {min(counts)} to {max(counts)} query heads; only equal numbers are merged"
    return None


def _refuse_constants(site: Site) -> str | None:
    """Numbers outside the projections must not tell kv heads apart: they have no place in a merged head."""
    for name, o in (("queries", site.q), ("keys", site.k), ("values", site.v)):
        if o.shift is not None and (o.norm is None or not same(o.shift)):
            return f"a constant is added to its {name} after the projection, which merged heads cannot carry"
        if o.after is not None and not one_number(o.after):
            return f"its {name} are scaled after the rotation, dim by dim, which merged heads cannot carry"
    for name, o in (("keys", site.k), ("values", site.v)):
        if not alike(o.gain):
            return f"constant factors of its {name} differ from head to head, which merged heads cannot carry"
        if o.norm is not None and (o.norm.kind, o.norm.over) == ("l2", "row") and not own(o.gain):
            return f"its {name} are divided by the length of all {o.heads} heads, and no gain can make up for fewer"
    return None


def one_number(values: Affine) -> bool:
    """A constant that is alike for all heads and dims."""
    return values.tensor is None and bool(np.all(values.constant == values.constant.reshape(-1)[0]))
