"""The output projection: integers put in the core's result, run to the next root, say which column each becomes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from passes.canonicalise import by_value, is_tensor, op_name, shape_of
from passes.find.anchor import FAR, FUSED, Scan
from passes.find.core import Core
from passes.find.draw import Draw, behind
from passes.find.execute import WIDER, Piece, Unknown
from passes.find.leads import Leads
from passes.find.roots import Projection
from rewrite.site import Output, Refusal


@dataclass(frozen=True, eq=False)
class Ahead:
    """The next projection among the users of the core, and the nodes on the way."""

    root: Projection
    path: tuple[fx.Node, ...]


def ahead(scan: Scan, start: fx.Node) -> Ahead | None:
    """Breadth first from the core's result to the next projection, if it stands before the next attention."""
    previous: dict[fx.Node, fx.Node] = {}
    queue = deque([start])
    while queue and len(previous) < FAR:
        node = queue.popleft()
        for user in node.users:
            if user in previous or node not in by_value(user) or not is_tensor(user):
                continue
            previous[user] = node
            found = scan.root(user)
            if found is not None:
                return Ahead(found, tuple(_back(previous, node, start)))
            if op_name(user) != FUSED and scan.activations(user) is None:
                queue.append(user)
    return None


def _back(previous: dict[fx.Node, fx.Node], node: fx.Node, start: fx.Node) -> list[fx.Node]:
    path: list[fx.Node] = []
    while node is not start:
        path.append(node)
        node = previous[node]
    return path[::-1]


def output(scan: Scan, core: Core, at: Leads, draw: Draw) -> Output | Refusal:
    """The exact map into the output projection, or the sentence why there is none."""
    way = ahead(scan, core.out.node)
    if way is None:
        return Refusal("no projection follows the core")
    if len(way.root.parts) != 1:
        return Refusal("the output projection is put together from several tensors")
    arrived = _arrived(scan, core, way, draw)
    if isinstance(arrived, Refusal):
        return arrived
    lead, tokens, dim = core.out.shape
    codes = torch.arange(1, lead * tokens * dim + 1).reshape(lead, tokens, dim)
    mine = at.out(codes)[at.blocks]
    place = torch.full((lead * tokens * dim + 1,), -1)
    flat = arrived.reshape(-1)
    known = (flat >= 1) & (flat <= lead * tokens * dim)
    place[flat[known]] = torch.nonzero(known).reshape(-1)
    where = place[mine]
    columns, positions = where % arrived.shape[1], where // arrived.shape[1]
    alike = (columns == columns[:1, :, :1]).all() and (positions == positions[:, :1, :, :1]).all()
    exact = (where >= 0).all() and alike
    if not exact or int(known.sum()) != mine.numel():
        return _blocked(way)
    return Output(way.root.parts[0], columns[0, :, 0].numpy().astype(np.int64))


def _arrived(scan: Scan, core: Core, way: Ahead, draw: Draw) -> Tensor | Refusal:
    """(positions, columns) integers that the projection reads, -1 for what is none of the core's."""
    start = core.out.node
    lead, tokens, dim = core.out.shape
    codes = torch.arange(1, lead * tokens * dim + 1, dtype=torch.float64).reshape(lead, tokens, dim)
    others = _beside(scan, start, way)
    try:
        leaves = [x for x in behind(scan.graph, way.root.source, [start, *others])]
        piece = Piece(scan.graph, [start, *others, *leaves], [way.root.source])
        noise = [_noise(node) for node in others]
        value = way.root.of_source(piece.one(core.out.spread(codes), *noise, *draw(leaves)))
    except (Unknown, RuntimeError) as error:
        return Refusal(f"the way from the core to the output projection cannot be run: {error}")
    whole = torch.where(value == value.round(), value, -1.0)
    return whole.clamp(min=-1.0).to(torch.int64)


def _beside(scan: Scan, start: fx.Node, way: Ahead) -> list[fx.Node]:
    """Other activations that join on the way."""
    on_way = {start, *way.path, way.root.node}
    found: list[fx.Node] = []
    for node in (*way.path, way.root.source):
        reads = by_value(node) if node is not start else []
        found.extend(x for x in reads if x not in on_way and not _from(x, start) and scan.graph.on_inputs(x))
    return list(dict.fromkeys(found))


def _from(node: fx.Node, start: fx.Node) -> bool:
    """`start` stands a few steps behind `node`."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack and len(seen) < FAR:
        top = stack.pop()
        if top is start:
            return True
        if top not in seen:
            seen.add(top)
            stack.extend(by_value(top))
    return False


def _noise(node: fx.Node) -> Tensor:
    value = node.meta["val"]
    generator = torch.Generator().manual_seed(51)
    if not value.dtype.is_floating_point:
        return torch.ones(shape_of(node), dtype=value.dtype)
    return torch.rand(shape_of(node), dtype=WIDER.get(value.dtype, value.dtype), generator=generator) * 0.5 + 0.2


def _blocked(way: Ahead) -> Refusal:
    """Name what stands between."""
    layout = ("view", "transpose", "permute", "reshape", "clone", "contiguous", "_unsafe_view", "dropout")
    names = [op_name(node) for node in way.path if op_name(node) not in layout]
    between = ", ".join(f"`{name}`" for name in dict.fromkeys(names)) or "a rearrangement across tokens"
    return Refusal(f"between the core and the output projection stands {between}")
