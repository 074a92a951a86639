"""One operand: the piece of graph from its projections to the core, as a function of their outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx

from passes.canonicalise import by_value, is_sized, op_name, shape_of
from passes.find.anchor import FUSED, SOFTMAX, Scan
from passes.find.bits import spell
from passes.find.core import Side
from passes.find.execute import Piece
from passes.find.roots import NotLifted, Projection


@dataclass(frozen=True, eq=False)
class Stretch:
    """`run(u, weights)`: root outputs (positions, rows), side by side, to the operand (lead, token, feature)."""

    letter: str
    side: Side
    roots: tuple[Projection, ...]
    leaves: tuple[fx.Node, ...]
    """Parameters that act between projection and core: norm weights, added vectors."""
    piece: Piece
    positions: int
    rows: int

    def run(self, u: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """The operand in canonical axes."""
        parts = torch.split(u, [root.rows for root in self.roots], dim=1)
        values = [root.to_node(part) for root, part in zip(self.roots, parts, strict=True)]
        return self.side.canon(self.piece.one(*values, *weights))

    @property
    def node(self) -> fx.Node:
        """The operand of the core."""
        return self.side.node


def region(scan: Scan, letter: str, side: Side) -> Stretch:
    """Walk back from an operand to the projections."""
    roots, leaves = _walk(scan, letter, side.node)
    if not roots:
        raise NotLifted(f"{letter} is a parameter, not a projection of anything", side.node)
    counts = {root.positions for root in roots}
    if len(counts) > 1:
        raise NotLifted(f"{letter} joins several streams of tokens, of {_list(counts)} positions", side.node)
    piece = Piece(scan.graph, [*(root.node for root in roots), *leaves], [side.node])
    return Stretch(letter, side, tuple(roots), tuple(leaves), piece, counts.pop(), sum(root.rows for root in roots))


def _list(counts: set[int]) -> str:
    return " and ".join(str(n) for n in sorted(counts))


def _walk(scan: Scan, letter: str, start: fx.Node) -> tuple[list[Projection], list[fx.Node]]:
    roots: list[Projection] = []
    leaves: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack = [start]
    while stack:
        node = stack.pop()
        if node in seen or scan.graph.is_constant(node):
            continue
        seen.add(node)
        found = scan.root(node)
        if found is not None:
            roots.append(found)
        elif node in scan.graph.parameters:
            leaves.append(node)
        else:
            _stops(scan, letter, node)
            stack.extend(reversed(by_value(node)))
    order = scan.graph.order
    return sorted(roots, key=lambda root: order[root.node]), sorted(leaves, key=order.__getitem__)


def _stops(scan: Scan, letter: str, node: fx.Node) -> None:
    """Nodes that no walk passes."""
    name = op_name(node)
    if not is_sized(node):
        reason = f"{letter} is computed on as many tokens as their values decide, as a router's experts do"
        raise NotLifted(reason, node)
    if node.op == "placeholder":
        reason = f"{letter} hangs on the input `{node.name}` with no projection between, as a caller's positions do"
        raise NotLifted(reason, node)
    if node.op != "call_function":
        raise NotLifted(f"{letter} is computed by `{node.target}`, which cannot be run", node)
    if name == FUSED or name in SOFTMAX[:2]:
        raise NotLifted(f"{letter} reaches another attention before it reaches a projection", node)
    if scan.activations(node) is not None:
        raise NotLifted(f"{letter} is a product of two activations, not a projection", node)
    if name in ("linear", "addmm", "conv1d", "conv2d", "convolution"):
        raise NotLifted(_no_projection(letter, node), node)


def _no_projection(letter: str, node: fx.Node) -> str:
    """Why a product with a weight is none."""
    name, (x, weight) = op_name(node), node.args[:2]
    if name.startswith("conv") and isinstance(x, fx.Node) and isinstance(weight, fx.Node):
        groups, kernel = shape_of(x)[1] // shape_of(weight)[1], prod(shape_of(weight)[2:])
        if groups > 1:
            return f"{letter}'s projection is a convolution in {groups} groups, whose rows read different channels"
        if kernel > 1:
            return f"{letter}'s projection is a convolution over {kernel} neighbouring tokens"
    return f"the weight of {letter}'s projection (`{name}`) is no rearranged parameter"


def random(region_: Stretch, size: float, seed: int) -> Tensor:
    """Root outputs: normal, of a size."""
    return noise(region_.positions, region_.rows, size, seed)


def noise(positions_: int, rows: int, size: float, seed: int) -> Tensor:
    """(positions, rows), normal, of a size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(positions_, rows, dtype=torch.float64, generator=generator) * size


def positions(region_: Stretch, weights: Sequence[Tensor]) -> Tensor:
    """(lead, token): the position that each row of the operand reads."""
    low, high = random(region_, 1.0, 11), random(region_, 1.0, 12)

    def run(choice: Tensor) -> Tensor:
        return region_.run(torch.where(choice[:, None], high, low), weights)

    spelled = spell(region_.positions, run)
    letter = region_.letter
    if spelled.mixed.any():
        raise NotLifted(f"{letter} mixes tokens between projection and core", region_.node)
    still = spelled.item < 0
    if still.all(-1).any():
        raise NotLifted(f"rows of {letter} do not hang on the projection", region_.node)
    first = spelled.item.amax(-1)
    if ((spelled.item != first[..., None]) & ~still).any():
        raise NotLifted(f"attention over channels, not tokens: a row of {letter} reads several positions", region_.node)
    if still.any():
        raise NotLifted(f"{int(still.any((0, 1)).sum())} columns of {letter} are constant", region_.node)
    return first
