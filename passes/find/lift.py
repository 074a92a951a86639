"""One anchor to one proven `Site`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from passes.canonicalise import shape_of
from passes.find.anchor import Anchor, Scan
from passes.find.core import core
from passes.find.draw import Draw
from passes.find.law import Asked, law, mask, mods, scale_of
from passes.find.leads import Leads, leads
from passes.find.names import common, module_path, where
from passes.find.operands import Triple, triple
from passes.find.output import ahead, output
from passes.find.region import Region, positions, region
from passes.find.roots import NotLifted, transparent
from passes.find.streams import same_tokens
from passes.find.validate import Setting, validate
from rewrite.site import Affine, Dense, Grouped, Operand, Proof, Site


@dataclass(frozen=True, eq=False)
class Place:
    """Node names of a site in the static graph, parallel with the operands' roots; a node whose weight is several
    tensors is named once for each of its parts."""

    q_roots: tuple[str, ...]
    k_roots: tuple[str, ...]
    v_roots: tuple[str, ...]
    core: str
    out: str | None


def lift(scan: Scan, anchor: Anchor, key: str) -> tuple[Site, Place]:
    """Lift and prove, with drawn parameters; where that fails, once more with frozen ones at their value."""
    try:
        return _lift(scan, anchor, Draw(scan.graph), key)
    except NotLifted:
        frozen = Draw(scan.graph, keep_frozen=True)
        if not any(frozen.is_kept(p) for p in scan.graph.behind(anchor.node) if p in scan.graph.parameters):
            raise
        return _lift(scan, anchor, frozen, key)


def _lift(scan: Scan, anchor: Anchor, draw: Draw, key: str) -> tuple[Site, Place]:
    with torch.no_grad():
        middle = core(scan, anchor, draw)
        regions = [region(scan, letter, side, draw) for letter, side in zip("qkv", (middle.q, middle.k, middle.v))]
        at = leads(middle, *(positions(r, draw(r.leaves)) for r in regions))
        asked = Asked(middle, at)
        leaves = middle.scores.leaves
        found = law(asked, draw(leaves))
        parts = triple(scan, regions, at, draw)
        scale = _true_scale(scan, asked, draw, scale_of(found))
        parts, factor = _merged(parts)
        on_input = any(leaf in scan.graph.inputs for leaf in leaves)
        predicate = mask(found, on_input)
        _ordered(at, parts, predicate.is_all and not found.bias)
        tokens = at.q_at.shape[1]
        site = Site(
            name=common([*(module_path(r.node) for x in regions for r in x.roots), module_path(anchor.node)]),
            q=parts.q,
            k=parts.k,
            v=parts.v,
            heads=parts.q.heads,
            kv_of=parts.kv_of,
            form=Dense(parts.k.heads) if parts.k.heads == parts.q.heads else Grouped(parts.k.heads),
            mask=predicate,
            scale=tuple(x * factor for x in scale),
            mods=mods(scan.graph, asked, found, draw, on_input and _bias_changes(asked, draw)),
            out=output(scan, middle, at, draw),
            cross=not same_tokens(scan, regions[0].roots[0].source, regions[1].roots[0].source),
            proof=Proof((), (tokens,), key),
            where=where(anchor.node),
        )
        setting = Setting(scan.graph, middle, at, regions, draw)
        errors = validate(setting, site, found)
    way = ahead(scan, middle)
    nodes = [tuple(r.node.name for r in x.roots for _ in r.parts) for x in regions]
    place = Place(*nodes, core=middle.out.node.name, out=None if way is None else way.root.node.name)
    return replace(site, proof=Proof(errors, (tokens,), key)), place
