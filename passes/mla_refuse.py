"""Why a site's keys and values cannot become a latent, in a sentence with numbers and what would work."""

from __future__ import annotations

import numpy as np

from passes.gqa_refuse import one_number
from passes.mla_shape import features, turning
from rewrite.shared import shared
from rewrite.site import Latent, Operand, Refusal, Site


def refuse_site(site: Site, rebuilt: bool) -> str | None:
    """The first reason that applies whatever the size, or None."""
    reason = _refuse_parts(site) or _refuse_shared(site, rebuilt)
    return reason or _refuse_constants(site) or _refuse_rope(site, rebuilt)


def refuse_size(site: Site, rank: int, rope_dim: int | None, rebuilt: bool) -> str | None:
    """Why a latent of `rank` and `rope_dim` numbers does not fit the site."""
    have, turns = features(site), 0 if rebuilt else turning(site)
    if rope_dim is None and turns:
        return f"{turns} numbers of its keys are rotated by position; say how many stay so with rope_dim, 0 to {turns}"
    if (rope_dim or 0) > turns:
        what = "the rebuilt form rotates none apart" if rebuilt else f"of its keys {turns} numbers are rotated"
        return f"rope_dim is {rope_dim}, and {what}; possible: 0 to {turns}"
    if rank + (rope_dim or 0) > have:
        return f"{rank} and {rope_dim or 0} numbers are more than the {have} that it caches now"
    return None


def refuse_even(site: Site, rope_dim: int) -> str | None:
    """Why `rope_dim` numbers cannot be channels of evenly spaced frequencies."""
    pairs = 0 if site.k.rope is None else len(site.k.rope.pairs)
    fits = [2 * n for n in range(1, pairs + 1) if pairs % n == 0]
    if rope_dim in fits or (rope_dim == 0 and not pairs):
        return None
    return f"rope_dim is {rope_dim}, which takes no evenly spaced ones of its {pairs} frequencies; possible: {fits}"


def _refuse_parts(site: Site) -> str | None:
    if isinstance(site.form, Latent):
        return f"it caches a latent of {site.form.rank} and {site.form.rope_dim} numbers already"
    if isinstance(site.out, Refusal):
        return f"its output projection is not known ({site.out.reason}), and what errors cost is not either"
    few = shared(site) is not None
    for name, operand in _operands(site):
        if len(operand.roots) != 1 and not (few and operand is site.k):
            names = ", ".join(r.tensor for r in operand.roots)
            return f"its {name} come from {len(operand.roots)} projections ({names}); only one can be rewritten"
    if site.k.heads != site.v.heads:
        return f"keys have {site.k.heads} heads and values {site.v.heads}; only equal numbers are compressed together"
    return None


def _refuse_shared(site: Site, rebuilt: bool) -> str | None:
    few = shared(site)
    if few is None:
        return None
    if site.k.after is not None:
        return "its keys are scaled behind the rotation, and what turns of them is cached before it is scaled"
    if not rebuilt:
        return None
    held = f"{few.rank} and {len(few.dims)} shared numbers"
    return f'it caches a latent of {held} already, whose keys are expanded before they turn; form="absorbed" works'


def _refuse_constants(site: Site) -> str | None:
    for name, o in _operands(site):
        if o.token_gain is not None:
            return f"its {name} are scaled by a factor per position, which no latent of a token carries"
    if site.v.after is not None and not (one_number(site.v.after) and site.v.after.is_one):
        return "its values are scaled behind the projection, which the latent's readers do not know"
    for name, o in (("queries", site.q), ("keys", site.k)):
        if o.after is not None and not one_number(o.after):
            return f"its {name} are scaled after the rotation, dim by dim, which a shared latent cannot carry"
    return None


def _refuse_rope(site: Site, rebuilt: bool) -> str | None:
    q, k = site.q.rope, site.k.rope
    if site.v.rope is not None:
        return "its values are rotated by position, which a latent read at all positions cannot be"
    if (q is None) != (k is None):
        return f"only its {'keys' if q is None else 'queries'} are rotated by position"
    if q is None or k is None:
        return None
    if (q.table is not None or k.table is not None) and not rebuilt:
        return (
            f"its {len(k.pairs)} angles are a table that is not affine in the position, so that no channel can be "
            'cached turned; form="rebuilt" works'
        )
    if not np.array_equal(q.pairs, k.pairs) or not np.allclose(q.frequencies, k.frequencies, rtol=1e-6, atol=0):
        return "queries and keys are rotated by different frequencies"
    return None


def _operands(site: Site) -> tuple[tuple[str, Operand], ...]:
    return ("queries", site.q), ("keys", site.k), ("values", site.v)
