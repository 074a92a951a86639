"""Which site gets which target, and which sites no target may touch because they share their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from passes import Target
from passes.find import Found
from passes.region import site_tensors
from rewrite.program import Program
from rewrite.select import select
from rewrite.site import Latent, Site


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


def uncached(program: Program, found: Found, target: Target) -> Mapping[str, str]:
    """Site -> why it gets no latent: there is no cache that could hold it."""
    sites = [s for s in found.sites if target.refuse(s) is None and isinstance(target.after(s).form, Latent)]
    if not isinstance(program.module, PreTrainedModel) or not program.module.can_generate():
        why = f"{type(program.module).__name__} generates nothing and so caches nothing; fewer kv heads (gqa) save work"
        return {s.name: why for s in sites}
    why = "an encoder sees all tokens at once and caches nothing; fewer kv heads (gqa) save work"
    return {s.name: why for s in sites if not holds_cache(s)}


def holds_cache(site: Site) -> bool:
    """Self-attention whose first token reads a later one is an encoder's: it sees a text at once and keeps nothing."""
    return site.cross or not bool(site.mask.table(4, 4)[0, 1:].any())
