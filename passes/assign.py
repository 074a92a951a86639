"""Which site gets which target, and which sites no target may touch because they share their weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from transformers import PreTrainedModel

from passes import Target
from passes.factor import LowRank
from passes.find import Found
from passes.mla import MLA
from passes.region import site_tensors
from rewrite.program import Program
from rewrite.select import select
from rewrite.site import Site


def assign(found: Found, target: Target, only: str = "*", skip: Sequence[str] = ()) -> dict[str, Target]:
    """The target of every chosen site. Settings given per layer count the sites in the order of the model."""
    chosen = select([s.name for s in found.sites], only, skip)
    sites = [s for s in found.sites if s.name in chosen]
    return {s.name: target.for_site(i, len(sites)) for i, s in enumerate(sites)}


def barred(found: Found) -> Mapping[str, str]:
    """Site -> why it must stay: another site computes with the same tensors, so they could only change together."""
    readers: dict[str, list[str]] = {}
    for site in found.sites:
        for tensor in site_tensors(site):
            readers.setdefault(tensor, []).append(site.name)
    reasons: dict[str, str] = {}
    for tensor, names in sorted(readers.items()):
        for name in names if len(names) > 1 else ():
            other = next(n for n in names if n != name)
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            reasons.setdefault(name, f"its tensor {tensor} is also read by {other}{more}, which would change with it")
    return reasons


def suited(targets: Mapping[str, Target], without: Collection[str]) -> dict[str, Target]:
    """The targets as they apply to each site: where nothing is cached a latent saves work, not memory."""
    return {n: LowRank(t) if n in without and isinstance(t, MLA) else t for n, t in targets.items()}


def uncached(program: Program, found: Found) -> frozenset[str]:
    """Sites that no cache serves: all of a module that generates nothing, and encoders."""
    if not isinstance(program.module, PreTrainedModel) or not program.module.can_generate():
        return frozenset(s.name for s in found.sites)
    return frozenset(s.name for s in found.sites if not holds_cache(s))


def holds_cache(site: Site) -> bool:
    """Self-attention whose first token reads a later one is an encoder's: it sees a text at once and keeps nothing."""
    return site.cross or not bool(site.mask.table(4, 4)[0, 1:].any())
