"""Translation validation: a site counts only when it re-emits its region."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from codegen import eager
from passes.canonicalise import Graph
from passes.find.core import Core
from passes.find.draw import Draw
from passes.find.execute import Piece
from passes.find.law import Asked, Law, law
from passes.find.leads import Leads
from passes.find.region import Stretch, noise
from passes.find.roots import NotLifted
from rewrite.site import Operand, Site

SIZES = (1e-3, 1.0, 3.0)
"""Inputs of size 1e-3 show an eps, 3 a cap."""
LIMIT = 1e-5


@dataclass(frozen=True, eq=False)
class Setting:
    """All that validation runs: the regions, the core, which leads are which."""

    graph: Graph
    core: Core
    at: Leads
    regions: Sequence[Stretch]
    draw: Draw


def validate(setting: Setting, site: Site, found: Law, factor: float) -> tuple[tuple[float, float], ...]:
    """Errors at several input sizes, and under altered inputs; above the limit, a refusal. `factor` is what the
    scale took from the gains of q and k."""
    asked = Asked(setting.core, setting.at)
    errors = [(size, _error(setting, site, found, setting.draw, size)) for size in SIZES]
    leaves = setting.core.scores.leaves
    if any(leaf in setting.graph.inputs for leaf in leaves):
        for seed in (1, 2):
            other = setting.draw.alter(seed)
            _holds(setting, site, asked, other, factor)
    worst = max(error for _, error in errors)
    if not worst <= LIMIT:
        raise NotLifted(
            f"the description does not reproduce the region: relative error {worst:.2g}, limit {LIMIT:.0e}",
            setting.core.anchor.node,
        )
    return tuple(errors)


def _holds(setting: Setting, site: Site, asked: Asked, other: Draw, factor: float) -> None:
    """Under other inputs mask and bias are read again; scale and cap must not move."""
    found = law(asked, other(setting.core.scores.leaves))
    scale = torch.tensor(site.scale, dtype=torch.float64)
    if not torch.allclose(found.scale * factor, scale.expand_as(found.scale), 1e-9, 1e-12):
        raise NotLifted("the scale is computed from the input", setting.core.anchor.node)
    error = _error(setting, site, found, other, 1.0)
    if not error <= LIMIT:
        raise NotLifted(f"with other inputs the description is off by {error:.2g}", setting.core.anchor.node)


def _error(setting: Setting, site: Site, found: Law, draw: Draw, size: float) -> float:
    """Largest difference between region and re-emission, relative to the region's largest value."""
    u = _filled(setting.regions, size)
    expected = region_output(setting, u, draw)
    got = emitted(setting, site, found, u, draw)
    read = found.keep.any(-1)[..., None]
    difference = torch.where(read, (expected - got).abs(), 0.0)
    scale = torch.where(read, expected.abs(), 0.0).max()
    return float(difference.max() / scale.clamp(min=1e-300))


def _filled(regions: Sequence[Stretch], size: float) -> dict[str, Tensor]:
    """Root outputs of each operand, side by side; operands that share a projection share its output."""
    known: dict[fx.Node, Tensor] = {}
    for region in regions:
        for root in region.roots:
            if root.node not in known:
                known[root.node] = noise(root.positions, root.rows, size, 60 + len(known))
    return {region.letter: torch.cat([known[root.node] for root in region.roots], dim=1) for region in regions}


def region_output(setting: Setting, u: dict[str, Tensor], draw: Draw) -> Tensor:
    """The graph itself from root outputs to the core's result, (block, h, t, d)."""
    given: dict[fx.Node, Tensor] = {}
    for region in setting.regions:
        parts = torch.split(u[region.letter], [root.rows for root in region.roots], dim=1)
        given.update({root.node: root.to_node(part) for root, part in zip(region.roots, parts, strict=True)})
    leaves = [leaf for region in setting.regions for leaf in region.leaves]
    leaves = list(dict.fromkeys([*leaves, *setting.core.scores.leaves]))
    node = setting.core.out.node
    piece = Piece(setting.graph, [*given, *leaves], [node])
    value = setting.core.out.canon(piece.one(*given.values(), *draw(leaves)))
    return setting.at.out(value)[setting.at.blocks]


def emitted(setting: Setting, site: Site, found: Law, u: dict[str, Tensor], draw: Draw) -> Tensor:
    """The same from the site alone; mask and bias are operands."""
    at, blocks = setting.at, setting.at.blocks[:, 0]
    values = {name: draw.one(node) for node, name in setting.graph.parameters.items() if name in read(site)}

    def side(o: Operand, letter: str, where: Tensor) -> Tensor:
        gathered = u[letter][where[blocks]]
        return eager.operand(o, [gathered], values.__getitem__)

    q, k, v = side(site.q, "q", at.q_at), side(site.k, "k", at.k_at), side(site.v, "v", at.v_at)
    keep = found.keep | ~found.keep.any(-1, keepdim=True)
    return eager.attention(site, q, k, v, mask=keep, bias=found.bias, tensors=values.__getitem__)


def read(site: Site) -> set[str]:
    """The tensors that gains, shifts and sinks of a site read."""
    parts = [x for o in (site.q, site.k, site.v) for x in (o.gain, o.shift, o.after)]
    parts += [mod.logits for mod in site.mods if hasattr(mod, "logits")]  # type: ignore[union-attr]
    return {part.tensor for part in parts if part is not None and part.tensor is not None}
