"""Find every attention of a graph: anchor, walk back to the projections, lift by running, prove by re-emission."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.export import ExportedProgram

from passes.canonicalise import canonicalise
from passes.find.alike import Text, carried, text
from passes.find.anchor import Anchor, Near, Scan, anchors, nearest
from passes.find.execute import Unknown
from passes.find.lift import Lifting, Region, lift
from passes.find.names import module_path, numbered, where
from passes.find.roots import NotLifted
from rewrite.site import Refusal, Site


@dataclass(frozen=True)
class Refused:
    """An attention that is left as it is, and why."""

    name: str
    refusal: Refusal


@dataclass(frozen=True)
class Found:
    """Proven sites with their regions, and what was refused. `nearest` is set where no attention stands."""

    sites: tuple[Site, ...]
    regions: tuple[Region, ...]
    refused: tuple[Refused, ...]
    nearest: Refusal | None = None


def find(ep: ExportedProgram) -> Found:
    """Sites of a static export that went through `run_decompositions({})`. Weights may be fake: they are drawn."""
    threads = torch.get_num_threads()
    # the probes are thousands of small products: on a busy machine threads that wait for each other cost 30 times more
    torch.set_num_threads(1)
    try:
        return _find(ep)
    finally:
        torch.set_num_threads(threads)


def _find(ep: ExportedProgram) -> Found:
    scan = Scan(canonicalise(ep))
    met = anchors(scan)
    cache: dict[str, tuple[Text, Lifting | NotLifted]] = {}
    results = [_result(scan, anchor, cache) for anchor in met]
    names = numbered([(r.site.name if isinstance(r, Lifting) else r.name) or "attention" for r in results])
    lifted = [
        (replace(r.site, name=name), r.place) for r, name in zip(results, names, strict=True) if isinstance(r, Lifting)
    ]
    refused = [replace(r, name=name) for r, name in zip(results, names, strict=True) if isinstance(r, Refused)]
    sites, regions = tuple(site for site, _ in lifted), tuple(place for _, place in lifted)
    return Found(sites, regions, tuple(refused), None if met else nearest(scan))


def _result(scan: Scan, anchor: Anchor | Near, cache: dict[str, tuple[Text, Lifting | NotLifted]]) -> Lifting | Refused:
    """One anchor lifted, carried over from an equal region, or refused."""
    if isinstance(anchor, Near):
        return Refused(module_path(anchor.node), Refusal(anchor.reason, where(anchor.node)))
    mine = text(scan, anchor)
    if mine.key in cache:
        twin, known = cache[mine.key]
        lifting = known if isinstance(known, NotLifted) else carried(scan, known, twin, mine, anchor)
    else:
        lifting = _attempt(scan, anchor, mine.key)
        if isinstance(lifting, NotLifted) or not lifting.true_weights:
            cache[mine.key] = mine, lifting
    if isinstance(lifting, NotLifted):
        return Refused(module_path(anchor.node), Refusal(lifting.reason, lifting.at or where(anchor.node)))
    return lifting


def _attempt(scan: Scan, anchor: Anchor, key: str) -> Lifting | NotLifted:
    try:
        return lift(scan, anchor, key)
    except NotLifted as reason:
        return reason
    except Unknown as missing:
        return NotLifted(f"the region needs the value of `{missing.node.name}`, which nothing in it gives", anchor.node)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
        # an op that cannot be run alone, in float64 or on other sizes; one attention less, not no plan at all
        return NotLifted(f"the region cannot be run: {str(error).splitlines()[0]}", anchor.node)


__all__ = ["Found", "Refused", "Region", "find"]
