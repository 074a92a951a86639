"""What a plan comes to where nothing can be done: no attention, no target that applies, no room."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from passes.assign import holds_cache
from passes.gqa import GQA
from passes.mla import MLA
from passes.sizes import Source, count
from rewrite.errors import OutOfSpace, ReattnError, Refused
from rewrite.site import Latent, Site
from rewrite.table import size

if TYPE_CHECKING:
    from passes.find import Found
    from passes.plan import Plan


def no_attention(source: Source, nodes: int, found: Found) -> Refused:
    """The error for a model without a single proven attention, with the nearest misses."""
    lines: list[str] = []
    for r in found.refused[:3]:
        near = f"; {r.refusal.nearest}" if r.refusal.nearest else ""
        where = f"   ({r.refusal.where})" if r.refusal.where else ""
        lines.append(f"nearest: {r.name}: {r.refusal.reason}{near}{where}")
    if not lines:
        lines.append("nothing comes near: no softmax between two products, no scaled_dot_product_attention")
    lines.append("if this is attention with another normaliser, add a rule: CONTRIBUTING, 'a lifting rule'")
    return Refused("no-attention", f"found no attention in {source.architecture} ({nodes} nodes searched)", *lines)


def nothing_applies(plan: Plan) -> ReattnError | None:
    """The error for a target that changes no site; None where it changes one."""
    if not plan.target or plan.converted:
        return None
    counts = Counter(row.note.removeprefix("refused: ") for row in plan.rows)
    lines = [why if len(counts) == 1 else f"{n} × {why}" for why, n in counts.items() if why]
    return Refused(
        "refused",
        f"{' '.join(plan.target)} applies to none of {count(len(plan.rows), 'site')}",
        *lines,
        f"list them: reattn plan {plan.source.label}",
    )


def offer(sites: Sequence[Site]) -> str | None:
    """What a latent holds without any loss, in a line, where that is less than the cache holds now: keys and values
    that do not turn are a linear function of what their projections read, often of half as many numbers."""
    target, holding = MLA(cache=1.0), [s for s in sites if holds_cache(s)]
    fits = [s for s in holding if not isinstance(s.form, Latent) and target.refuse(s) is None]
    least = {s.name: target.after(s).cache_per_token / s.cache_per_token for s in fits}
    smaller = [share for share in least.values() if share < 1]
    if not smaller:
        return None
    share = ceil(1000 * max(smaller)) / 1000
    many = count(len(smaller), "site")
    return f"mla:cache={share:g} at {many} loses nothing: what they cache is a linear function of fewer numbers"


def next_target(sites: Sequence[Site], generates: bool) -> str | None:
    """What to plan for where no target was given: the first that fits some site."""
    if any(GQA(1).refuse(s) is None for s in sites):
        return "gqa:N"
    half = MLA(cache=0.5)
    fits = generates and any(holds_cache(s) and half.refuse(s) is None for s in sites)
    return "mla:cache=0.5" if fits else None


def require_space(plan: Plan, out: Path) -> None:
    """Raise before any work where memory or disk cannot hold the result."""
    free = shutil.disk_usage(out.absolute().parent).free
    if plan.weights.after > free:
        raise OutOfSpace(
            "disk",
            f"the result needs {size(plan.weights.after)}, {size(free)} are free in {out.absolute().parent}",
            "free some, or write elsewhere",
        )
    if plan.memory_needed > plan.here.memory:
        raise OutOfSpace(
            "memory",
            f"needs about {size(plan.memory_needed)} of memory, {size(plan.here.memory)} are free",
            "close what else runs, or use a machine with more",
        )
