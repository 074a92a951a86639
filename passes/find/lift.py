"""One anchor to one proven `Site`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from passes.canonicalise import is_absent
from passes.find.anchor import Anchor, Scan
from passes.find.core import core
from passes.find.draw import Draw
from passes.find.far import beyond
from passes.find.farther import confirm
from passes.find.law import Asked, Law, law, mask, mods, scale_of
from passes.find.leads import Leads, leads
from passes.find.names import module_path, where
from passes.find.operands import Triple, triple
from passes.find.output import ahead, output
from passes.find.region import positions, region
from passes.find.roots import NotLifted
from passes.find.streams import same_tokens
from passes.find.validate import Setting, validate
from rewrite.modules import common
from rewrite.site import Affine, Dense, Grouped, Operand, Proof, Site


@dataclass(frozen=True, eq=False)
class Region:
    """Node names of a site in the static graph, parallel with the operands' roots; a node whose weight is several
    tensors is named once for each of its parts."""

    q_roots: tuple[str, ...]
    k_roots: tuple[str, ...]
    v_roots: tuple[str, ...]
    core: str
    out: str | None


@dataclass(frozen=True, eq=False)
class Lifting:
    """A proven site and where it stands; `true_weights`: a number of it was read from the weights at hand."""

    site: Site
    place: Region
    true_weights: bool


def lift(scan: Scan, anchor: Anchor, key: str) -> Lifting:
    """Lift and prove, with drawn parameters; where that fails, once more with frozen ones at their value."""
    try:
        return _lift(scan, anchor, Draw(scan.graph), key)
    except NotLifted:
        frozen = Draw(scan.graph, keep_frozen=True)
        if not any(frozen.is_kept(p) for p in scan.graph.behind(anchor.node) if p in scan.graph.parameters):
            raise
        return _lift(scan, anchor, frozen, key)


def _lift(scan: Scan, anchor: Anchor, draw: Draw, key: str) -> Lifting:
    with torch.no_grad():
        told = describe(scan, anchor, draw, key)
        errors = validate(told.setting, told.site, told.law, told.factor)
        site = confirm(told.setting, replace(told.site, proof=replace(told.site.proof, errors=errors)))
    return Lifting(site, _region(scan, told), bool(told.setting.draw.true))


@dataclass(frozen=True, eq=False)
class Description:
    """A site not yet proven, with all that its proof runs; `factor` is what the scale took from the gains."""

    site: Site
    setting: Setting
    law: Law
    factor: float


def describe(scan: Scan, anchor: Anchor, draw: Draw, key: str) -> Description:
    """Read a site off its region."""
    middle = core(scan, anchor, draw)
    sides = zip("qkv", (middle.q, middle.k, middle.v), strict=True)
    regions = [region(scan, letter, side) for letter, side in sides]
    at = leads(middle, *(positions(r, draw(r.leaves)) for r in regions))
    asked = Asked(middle, at)
    draw, found = _law(asked, draw)
    parts, factor = _merged(triple(scan, regions, at, draw))
    on_input = any(leaf in scan.graph.inputs for leaf in middle.scores.leaves)
    predicate = mask(found, on_input)
    if not on_input:
        predicate = beyond(scan, anchor, draw, at, predicate)
    _ordered(at, parts, predicate.is_all and found.bias is None, anchor)
    site = Site(
        name=common([*(module_path(r.node) for x in regions for r in x.roots), module_path(anchor.node)]),
        q=parts.q,
        k=parts.k,
        v=parts.v,
        heads=parts.q.heads,
        kv_of=parts.kv_of,
        form=Dense(parts.k.heads) if parts.k.heads == parts.q.heads else Grouped(parts.k.heads),
        mask=predicate,
        scale=tuple(float(f"{x * factor:.12g}") for x in scale_of(found)),
        mods=mods(scan.graph, asked, found, draw, on_input and _bias_changes(asked, found, draw)),
        out=output(scan, middle, at, draw),
        cross=not same_tokens(scan.graph, regions[0].roots[0].source, regions[1].roots[0].source),
        proof=Proof((), (at.q_at.shape[1],), key),
        where=where(anchor.node),
    )
    return Description(site, Setting(scan.graph, middle, at, regions, draw), found, factor)


def _region(scan: Scan, told: Description) -> Region:
    """The site's nodes by name."""
    way = ahead(scan, told.setting.core.out.node)
    q, k, v = (tuple(r.node.name for r in x.roots for _ in r.parts) for x in told.setting.regions)
    return Region(q, k, v, told.setting.core.out.node.name, None if way is None else way.root.node.name)


def _law(asked: Asked, draw: Draw) -> tuple[Draw, Law]:
    """A scale that is computed from parameters needs their true values; everything else is drawn."""
    leaves = asked.core.scores.leaves
    found = law(asked, draw(leaves))
    weights = [leaf for leaf in leaves if leaf in draw.graph.parameters]
    if not weights:
        return draw, found
    other = law(asked, draw.change(1)(leaves))
    if torch.allclose(found.scale, other.scale, 1e-9) and found.cap == other.cap:
        return draw, found
    absent = [draw.graph.parameters[w] for w in weights if is_absent(draw.graph.weights[draw.graph.parameters[w]])]
    if absent:
        raise NotLifted(f"the scale of the scores is computed from {', '.join(absent)}, whose values are not given")
    draw = replace(draw, true=frozenset(weights))
    return draw, law(asked, draw(leaves))


def _merged(parts: Triple) -> tuple[Triple, float]:
    """Gains of q and k that are one number become a factor of the scale, unless a norm or a vector stands by."""
    q, by_q = _without_gain(parts.q)
    k, by_k = _without_gain(parts.k)
    return Triple(q, k, parts.v, parts.kv_of), by_q * by_k


def _without_gain(o: Operand) -> tuple[Operand, float]:
    values = o.gain.constant
    uniform = o.gain.tensor is None and bool(np.allclose(values, values.flat[0], rtol=1e-9))
    if o.norm is not None or o.shift is not None or not uniform or values.flat[0] == 0:
        return o, 1.0
    return replace(o, gain=Affine(np.ones(values.shape))), float(values.flat[0])


def _bias_changes(asked: Asked, found: Law, draw: Draw) -> bool:
    """The bias moves with the inputs, where both inputs leave it unmasked."""
    for seed in (1, 2):
        other = law(asked, draw.alter(seed)(asked.core.scores.leaves))
        both = found.keep & other.keep
        mine, its = (torch.zeros(()).double() if x.bias is None else x.bias for x in (found, other))
        if bool((((mine - its).abs() > 1e-9) & both).any()):
            return True
    return False


def _ordered(at: Leads, parts: Triple, plain: bool, anchor: Anchor) -> None:
    """Mask and rope speak of the core's order, caches of the tokens': they must be one, or not matter."""
    rising = all(bool((x[:, 1:] > x[:, :-1]).all()) for x in (at.q_at, at.k_at))
    if rising or (plain and parts.q.rope is None and parts.k.rope is None):
        return
    reason = "tokens are reordered between projection and core, and the mask or the rope tells them apart"
    raise NotLifted(reason, anchor.node)
