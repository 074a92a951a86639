"""The core of one attention in canonical axes: q (g, t, d), k (g, s, d), v (g, s, d), scores (g, t, s), any layout."""

from __future__ import annotations

import string
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx

from passes.canonicalise import Graph, by_value, op_name, shape_of
from passes.find.anchor import Anchor, Scan, single
from passes.find.bits import spell
from passes.find.draw import Draw, behind
from passes.find.execute import Piece
from passes.find.product import Letters, Product, arrange
from passes.find.roots import NotLifted
from passes.find.scores import Fused, Scores, Written, written

LATE = 12


@dataclass(frozen=True, eq=False)
class Side:
    """A node of the core and how its axes become (lead, token, feature)."""

    node: fx.Node
    letters: Letters
    lead: tuple[str, ...]
    token: str
    features: tuple[str, ...]
    sizes: dict[str, int]
    repeat: int = 1
    """How often a fused op repeats each head of k and v."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(lead, tokens, features)."""
        count = [prod(self.sizes[c] for c in part) for part in (self.lead, (self.token,), self.features)]
        return count[0], count[1], count[2]

    def canon(self, value: Tensor) -> Tensor:
        """The node's value as (lead, token, feature)."""
        if self.repeat > 1:
            value = value.repeat_interleave(self.repeat, dim=-3)
        order = (*self.lead, self.token, *self.features)
        return arrange(value, self.letters, order, self.sizes).reshape(self.shape)

    def spread(self, value: Tensor) -> Tensor:
        """(lead, token, feature) as the node's own value; every axis must be its own."""
        order = (*self.lead, self.token, *self.features)
        full = value.reshape([self.sizes[c] for c in order])
        return full.permute([order.index(c) for c in self.letters if c is not None]).reshape(shape_of(self.node))


@dataclass(frozen=True, eq=False)
class Core:
    """Operands, result and scores; row (g, t) of the scores is row `out_rows[g, t]` of the result, with v `v_of[g]`."""

    anchor: Anchor
    q: Side
    k: Side
    v: Side
    out: Side
    scores: Scores
    out_rows: Tensor
    v_of: Tensor


def core(scan: Scan, anchor: Anchor, draw: Draw) -> Core:
    """The canonical core of an anchor."""
    return _fused(scan, anchor) if anchor.above is None else _written(scan, anchor, draw)


def _fused(scan: Scan, anchor: Anchor) -> Core:
    node = anchor.node
    q, k, v = (x for x in node.args[:3])
    assert isinstance(q, fx.Node)
    assert isinstance(k, fx.Node)
    assert isinstance(v, fx.Node)
    rank = len(shape_of(q))
    batch = string.ascii_lowercase[: rank - 2]
    grouped = bool(node.kwargs.get("enable_gqa", node.args[7] if len(node.args) > 7 else False))
    repeat = shape_of(q)[-3] // shape_of(k)[-3] if grouped and rank > 2 else 1
    shapes = {"q": shape_of(q), "k": shape_of(k), "v": shape_of(v)}
    sizes = {c: max(s[-rank:][i] for s in shapes.values() if len(s) == rank) for i, c in enumerate(batch)}
    sizes |= {"X": shapes["q"][-2], "Y": shapes["k"][-2], "Z": shapes["q"][-1], "W": shapes["v"][-1]}
    lead = tuple(batch)

    def side(x: fx.Node, token: str, feature: str, again: int) -> Side:
        shape = list(shape_of(x))
        if again > 1:
            shape[-3] *= again
        names = [*batch[len(batch) - len(shape) + 2 :], token, feature]
        letters = tuple(c if n == sizes[c] else None for c, n in zip(names, shape, strict=True))
        return Side(x, letters, lead, token, (feature,), sizes, again)

    sides = side(q, "X", "Z", 1), side(k, "Y", "Z", repeat), side(v, "Y", "W", repeat)
    out = side(node, "X", "W", 1)
    groups, tokens, _ = out.shape
    given = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
    mask = given if isinstance(given, fx.Node) else None
    if mask is not None:
        single(scan, mask)
    scores = Fused(scan.graph, node, mask, tuple(sizes[c] for c in batch), (groups, tokens, sizes["Y"]))
    rows = torch.arange(groups * tokens).reshape(groups, tokens)
    return Core(anchor, *sides, out, scores, rows, torch.arange(groups))


def _written(scan: Scan, anchor: Anchor, draw: Draw) -> Core:
    above, below = anchor.above, anchor.below
    assert above is not None
    assert below is not None
    stage = written(scan.graph, anchor.node, above, draw)
    first = stage.key in above.only(False)
    if not first and stage.key not in above.only(True):
        raise NotLifted("the softmax does not run over an axis of keys alone", anchor.node)
    q_node, k_node, lq, lk = (above.a, above.b, above.la, above.lb) if first else (above.b, above.a, above.lb, above.la)
    keys, mine = above.only(not first), above.only(first)
    if len(keys) > 1 or not mine:
        raise NotLifted(f"the scores have {len(keys)} axes of keys and {len(mine)} of queries", above.node)
    lead = tuple(c for c in above.lo if c not in (stage.key, mine[-1]))
    summed = tuple(above.contracted(first))
    q = Side(q_node, lq, lead, mine[-1], summed, above.sizes)
    k = Side(k_node, lk, lead, stage.key, summed, above.sizes)
    table = Side(above.node, above.lo, lead, mine[-1], (stage.key,), above.sizes)
    scores = stage.arranged(table)
    v, out, rows = _mixing(scan, anchor, below, scores, draw)
    tokens = q.shape[1]
    v_of = rows // out.shape[1]
    if (v_of != v_of[:, :1]).any() and tokens > 1:
        raise NotLifted("query rows of one head meet several heads of v", below.node)
    return Core(anchor, q, k, v, out, scores, rows, v_of[:, 0])


def _mixing(scan: Scan, anchor: Anchor, below: Product, scores: Written, draw: Draw) -> tuple[Side, Side, Tensor]:
    """The second product: v, the result, and which of its rows each row of the scores makes."""
    first = leads_to(scan.graph, below.a, anchor.node)
    if first == leads_to(scan.graph, below.b, anchor.node):
        raise NotLifted("both sides of the product below the softmax come from it", below.node)
    p_node, v_node, lp, lv = (below.a, below.b, below.la, below.lb) if first else (below.b, below.a, below.lb, below.la)
    summed, features = below.contracted(first), below.only(not first)
    mine = [c for c in lp if c in below.only(first)]
    if len(summed) != 1 or not mine:
        raise NotLifted(f"the product with v sums over {len(summed)} axes", below.node)
    lead = tuple(c for c in below.lo if c not in (mine[-1], *features))
    p = Side(p_node, lp, lead, mine[-1], (summed[0],), below.sizes)
    v = Side(v_node, lv, lead, summed[0], tuple(features), below.sizes)
    out = Side(below.node, below.lo, lead, mine[-1], tuple(features), below.sizes)
    weights, rows = _rows(scan.graph, scores, p, draw)
    if not torch.allclose(weights.sum(-1), torch.ones(()).double(), rtol=1e-6) and op_name(anchor.node) == "exp":
        out = _late(scan, below, out)
    return v, out, rows


def _rows(graph: Graph, scores: Written, p: Side, draw: Draw) -> tuple[Tensor, Tensor]:
    """Probabilities on random scores, and for each row of the scores its row of the probabilities."""
    raw = scores.stage.start
    leaves = behind(graph, p.node, [raw])
    piece = Piece(graph, [raw, *leaves], [p.node])
    values = draw(leaves)
    shape = scores.stage.rows
    fillings = [torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]

    def run(choice: Tensor) -> Tensor:
        mixed = torch.where(choice[:, None], fillings[1], fillings[0])
        return p.canon(piece.one(scores.stage.from_rows(mixed), *values))

    spelled = spell(shape[0], run)
    if scores.shape()[2] == 1:
        raise NotLifted("with one key a softmax gives 1 whatever the scores: give inputs of more tokens", p.node)
    if spelled.mixed.any():
        raise NotLifted("rows of the scores are mixed between the softmax and the product with v", p.node)
    item = spelled.item.reshape(-1, spelled.item.shape[-1]).amax(-1)
    where_from = torch.full((shape[0],), -1)
    where_from[item[item >= 0]] = torch.arange(item.numel())[item >= 0]
    rows = where_from[scores.row_of].reshape(scores.shape()[:2])
    if (rows < 0).any() or item.numel() != rows.numel():
        raise NotLifted("rows of the scores do not all reach the product with v", p.node)
    return run(torch.zeros(shape[0], dtype=torch.bool)), rows


def _late(scan: Scan, below: Product, out: Side) -> Side:
    """A division after the second product belongs to the softmax."""
    node = below.node
    for _ in range(LATE):
        users = [user for user in node.users if node in by_value(user)]
        late = [user for user in users if op_name(user) in ("div", "mul")]
        if late and shape_of(late[0]) == shape_of(below.node):
            return Side(late[0], out.letters, out.lead, out.token, out.features, out.sizes)
        if len(users) != 1 or scan.root(users[0]) is not None:
            break
        node = users[0]
    raise NotLifted("the rows of the exponentials are not divided by their sum", below.node)


def leads_to(graph: Graph, node: fx.Node, target: fx.Node) -> bool:
    """`target` stands behind `node`."""
    floor = graph.order[target]
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        top = stack.pop()
        if top is target:
            return True
        if top in seen or graph.order[top] < floor:
            continue
        seen.add(top)
        stack.extend(by_value(top))
    return False
