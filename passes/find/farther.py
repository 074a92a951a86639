"""A second length: the last token is put far out, where a rotation that changes with the length shows.

Angles hang on positions alone, and those stand in the graph as 0, 1, 2, ... So nothing is traced again: the last of
them is read as a far one, and all that is computed from it (angles, the largest position, a choice between two sets
of frequencies) comes out as in a text of that length, at the cost of the tokens that were traced. What Python itself
decides by the length while it is traced leaves nothing in this graph: the dynamic one stops where such a decision ends.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, fx

from codegen import eager
from passes.canonicalise import Graph, by_value
from passes.find.draw import Draw
from passes.find.execute import Piece, constant
from passes.find.region import Stretch, random
from passes.find.roots import NotLifted
from passes.find.validate import Setting, read
from rewrite.site import Operand, Site

LENGTHS = tuple(1 << n for n in range(20, 4, -1))
"""The longest that can be run is taken: tables of sines end somewhere."""
LIMIT = 1e-2
"""Frequencies read off a few tokens, of float32 tables even, are followed over up to a million."""


def confirm(setting: Setting, site: Site) -> Site:
    """The site with the second length in its proof, where positions stand behind an operand that can be moved.

    Raises where an operand is not what the description makes of it there. A factor per token that is 1 in all that
    was traced, and another number further out, becomes a `token_gain`.
    """
    operands: dict[str, Operand] = {}
    lengths: set[int] = set()
    for stretch in setting.regions:
        known = {"q": site.q, "k": site.k, "v": site.v}[stretch.letter]
        operands[stretch.letter], length = _confirmed(setting, site, stretch, known)
        lengths |= {length} - {0}
    proof = replace(site.proof, lengths=(*site.proof.lengths, *sorted(lengths)))
    return replace(site, **operands, proof=proof)


def _confirmed(setting: Setting, site: Site, stretch: Stretch, known: Operand) -> tuple[Operand, int]:
    """One operand and the length at which it was run; 0 where nothing in it can be moved."""
    at = setting.at
    take, where = {"q": (at.q, at.q_at), "k": (at.k, at.k_at), "v": (at.v, at.v_at)}[stretch.letter]
    tokens = where.shape[1]
    places = _positions(setting.graph, stretch, tokens)
    if not places or (known.rope is not None and known.rope.table is not None):
        return known, 0
    u = random(stretch, 1.0, 71)
    for length in LENGTHS:
        value = _run(setting.graph, stretch, setting.draw, u, {n: _moved(v, length) for n, v in places.items()})
        if value is None:
            continue
        blocks = take(value)[at.blocks]
        got = _emitted(setting, read(site), replace(known, token_gain=None), u[where[at.blocks[:, 0]]], length)
        got = got if stretch.letter == "q" else got[:, torch.as_tensor(site.kv_of)]
        gain = _gain(stretch, blocks, got, length)
        changes = known.token_gain is None and bool(((gain - 1).abs() > LIMIT).any())
        return (replace(known, token_gain=np.ones(tokens)) if changes else known), length
    return known, 0


def _positions(graph: Graph, stretch: Stretch, tokens: int) -> dict[fx.Node, Tensor]:
    """The constants behind an operand that count its tokens, and are computed from no other that does."""
    if tokens < 2:
        return {}
    behind = set[fx.Node]()
    stack = [x for node in stretch.piece.nodes for x in by_value(node) if graph.is_constant(x)]
    while stack:
        node = stack.pop()
        if node not in behind:
            behind.add(node)
            stack.extend(by_value(node))
    found: dict[fx.Node, Tensor] = {}
    moved = set[fx.Node]()
    for node in sorted(behind, key=graph.order.__getitem__):
        if any(x in moved for x in by_value(node)):
            moved.add(node)
        elif _counts(value := constant(graph, node), tokens):
            found[node] = value
            moved.add(node)
    return found


def _counts(value: object, tokens: int) -> bool:
    """c, c + 1, c + 2, ... along the last axis."""
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[-1] != tokens or value.is_complex():
        return False
    if value.dtype == torch.bool or not value.numel():
        return False
    return bool((value == value.reshape(-1)[0] + torch.arange(tokens)).all())


def _moved(value: Tensor, length: int) -> Tensor:
    """The last of the positions where the last token of a text of `length` tokens stands."""
    moved = value.clone()
    moved[..., -1] = value[..., 0] + length - 1
    return moved


def _run(graph: Graph, stretch: Stretch, draw: Draw, u: Tensor, moved: dict[fx.Node, Tensor]) -> Tensor | None:
    """The operand with moved positions; None where the graph does not reach as far."""
    farther = replace(graph, folded=dict(moved))
    try:
        piece = Piece(farther, stretch.piece.given, stretch.piece.wanted)
        return replace(stretch, piece=piece).run(u, draw(stretch.leaves))
    except (RuntimeError, IndexError):
        return None


def _emitted(setting: Setting, needed: set[str], known: Operand, u: Tensor, length: int) -> Tensor:
    """(block, head, t, d) by the description, the last token at the far position."""
    values = {name: setting.draw.one(node) for node, name in setting.graph.parameters.items() if name in needed}
    positions = torch.arange(u.shape[1])
    positions[-1] = length - 1
    return eager.operand(known, [u], values.__getitem__, positions)


def _gain(stretch: Stretch, blocks: Tensor, got: Tensor, length: int) -> Tensor:
    """(block, t): the factor of every token relative to the first; raises where it takes more than a factor.

    A factor alike for all tokens is one that the scale of the scores took over.
    """
    factor = (blocks * got).sum((1, 3)) / got.square().sum((1, 3)).clamp(min=1e-300)
    away = (blocks - factor[:, None, :, None] * got).abs().amax((0, 1, 3)) / blocks.abs().amax((0, 1, 3))
    worst = float(away.max())
    if not worst <= LIMIT:
        raise NotLifted(
            f"{stretch.letter} changes with the length: read off {blocks.shape[2]} tokens, its description is off by "
            f"{worst:.2g} in a text of {length} (limit {LIMIT:g}); a rotation that is fixed for all lengths would do",
            stretch.node,
        )
    return factor / factor[:, :1]
