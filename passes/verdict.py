"""What a plan comes to where nothing can be done: no attention, no target that applies, no room."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from passes.sizes import Source, count
from rewrite.errors import OutOfSpace, ReattnError, Refused
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
