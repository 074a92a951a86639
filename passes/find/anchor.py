"""Anchors: a fused attention, or a softmax (or exp) with one product of activations above and one below."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from torch import fx

from passes.canonicalise import Graph, by_value, is_sized, is_tensor, op_name, shape_of
from passes.find import product
from passes.find.names import where
from passes.find.product import Product
from passes.find.roots import NotLifted, Projection, projection, transparent
from rewrite.site import Refusal

FUSED = "scaled_dot_product_attention"
SOFTMAX = ("softmax", "_softmax", "exp")
FAR = 60


@dataclass(frozen=True, eq=False)
class Anchor:
    """One attention: `node` is the softmax, exp or fused op; the products stand above and below a softmax."""

    node: fx.Node
    above: Product | None = None
    below: Product | None = None


@dataclass(frozen=True, eq=False)
class Near:
    """An anchor that cannot be lifted, and why."""

    node: fx.Node
    reason: str


@dataclass(frozen=True, eq=False)
class Scan:
    """A graph with what is known of its nodes, so that nothing is asked twice."""

    graph: Graph
    roots: dict[fx.Node, Projection | None] = field(default_factory=dict)
    mixing: dict[fx.Node, Product | None] = field(default_factory=dict)

    def root(self, node: fx.Node) -> Projection | None:
        """The projection that a node is."""
        return projection(self.graph, node, self.roots) if self._fixed(node) else None

    def activations(self, node: fx.Node) -> Product | None:
        """The product of two activations that a node is: a side without inputs counts if a projection made it."""
        if node not in self.mixing:
            found = product.read(self.graph, node) if self._fixed(node) else None
            if found is not None and (self.root(node) or not (self._active(found.a) and self._active(found.b))):
                found = None
            self.mixing[node] = found
        return self.mixing[node]

    def _fixed(self, node: fx.Node) -> bool:
        """A call whose sizes the data do not decide: no other is a product that can be read."""
        return node.op == "call_function" and is_sized(node) and all(map(is_sized, node.all_input_nodes))

    def _active(self, node: fx.Node) -> bool:
        return self.graph.on_inputs(node) or (self.graph.on_parameters(node) and self._projected(node))

    def _projected(self, node: fx.Node) -> bool:
        """A projection stands behind a value that hangs on parameters alone: queries that are learned."""
        seen, stack = {node}, [node]
        while stack:
            top = stack.pop()
            if self.root(top) is not None:
                return True
            fresh = [x for x in top.all_input_nodes if x not in seen and self.graph.on_parameters(x)]
            seen.update(fresh)
            stack.extend(fresh)
        return False


def anchors(scan: Scan) -> list[Anchor | Near]:
    """Every attention of the graph in order, with those that stand too strangely to be lifted."""
    found: list[Anchor | Near] = []
    for node in scan.graph.nodes:
        name = op_name(node)
        if name == FUSED:
            found.append(Anchor(node))
        elif name in SOFTMAX and not scan.graph.is_constant(node):
            found.extend(_softmax(scan, node))
    return found


def _softmax(scan: Scan, node: fx.Node) -> list[Anchor | Near]:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    above, other = search_up(scan, source)
    below = _below(scan, node)
    if not above:
        mixed = isinstance(below, Product) and other is not None and _mixes_scores(scan, other)
        return [Near(node, f"heads are mixed between the first product and the softmax{_by(other)}")] if mixed else []
    is_exp = op_name(node) == "exp"
    if is_exp and (len(above) > 1 or not isinstance(below, Product)):
        return []
    if isinstance(below, fx.Node):
        return [Near(node, f"heads are mixed between the softmax and the product with v{_by(below)}")]
    if below is None:
        return []
    if len(above) > 1:
        return [Near(node, many_products(len(above)))]
    if other is not None:
        return [] if is_exp else [Near(node, FROM_ACTIVATION)]
    return [Anchor(node, above[0], below)]


def _mixes_scores(scan: Scan, node: fx.Node) -> bool:
    """A projection that reads a product of activations and gives a table of the same two last axes."""
    root = scan.root(node)
    products = [] if root is None else search_up(scan, root.source)[0]
    return any(shape_of(found.node)[-2:] == shape_of(node)[-2:] for found in products)


def _by(node: fx.Node | None) -> str:
    return "" if node is None else f", by `{op_name(node)}`"


FROM_ACTIVATION = "the bias is computed from the query or from another activation"


def many_products(count: int) -> str:
    """The sentence for scores with several products of activations behind them."""
    return f"the scores are a sum over {count} products (relative position read by the query)"


def search_up(scan: Scan, start: fx.Node, stop: fx.Node | None = None) -> tuple[list[Product], fx.Node | None]:
    """The products of activations behind a value, and a projection of activations met beside them."""
    products: list[Product] = []
    beside: fx.Node | None = None
    seen, stack = {start}, [start]
    while stack:
        node = stack.pop()
        if node is stop:
            continue
        found = scan.activations(node)
        if found is not None:
            products.append(found)
            continue
        if scan.root(node) is not None or op_name(node) == FUSED:
            beside = node if scan.graph.on_inputs(node) else beside
            continue
        fresh = [x for x in by_value(node) if x not in seen and not scan.graph.is_constant(x)]
        seen.update(fresh)
        stack.extend(fresh)
    return products, beside


def _below(scan: Scan, start: fx.Node) -> Product | fx.Node | None:
    """The next product of activations among the users, or the projection that stands in the way."""
    blocked: fx.Node | None = None
    seen, queue = {start}, deque([start])
    while queue and len(seen) < FAR:
        node = queue.popleft()
        for user in node.users:
            if user in seen or node not in by_value(user):
                continue
            seen.add(user)
            found = scan.activations(user)
            if found is not None:
                return found
            if scan.root(user) is not None:
                blocked = blocked or user
            elif op_name(user) not in (*SOFTMAX, FUSED) and user.op == "call_function":
                queue.append(user)
    return blocked


def nearest(scan: Scan) -> Refusal | None:
    """Where no attention stands: the closest thing to one, two products of activations with something else between."""
    for node in scan.graph.nodes:
        if scan.activations(node) is None:
            continue
        chain = _between_products(scan, node)
        if chain is not None:
            telling = [x for x in chain if _tells(scan, x)] or chain
            names = ", ".join(op_name(x) for x in telling) or "nothing"
            at = telling[-1] if telling else node
            place = where(at)
            return Refusal(
                "no softmax stands between two products of activations",
                place,
                f"product, {names}, product: wanted softmax, found {op_name(at)}" + (f" at {place}" if place else ""),
            )
    return None


def _tells(scan: Scan, node: fx.Node) -> bool:
    """Not layout, and not a constant scale or shift."""
    if transparent(scan.graph, node) is not node:
        return False
    plain = ("mul", "div", "add", "sub", "transpose", "permute", "view", "reshape", "expand", "masked_fill", "where")
    return op_name(node) not in plain


def _between_products(scan: Scan, start: fx.Node) -> list[fx.Node] | None:
    """The shortest chain of nodes from one product to the next, without a softmax or a projection."""
    chains: deque[list[fx.Node]] = deque([[start]])
    seen = {start}
    while chains and len(seen) < FAR:
        chain = chains.popleft()
        for user in chain[-1].users:
            if user in seen or not is_tensor(user):
                continue
            seen.add(user)
            if scan.activations(user) is not None:
                return chain[1:]
            if scan.root(user) is None and op_name(user) not in SOFTMAX:
                chains.append([*chain, user])
    return None


def single(scan: Scan, start: fx.Node) -> None:
    """A fused op's mask must not hang on activations."""
    products, beside = search_up(scan, start)
    if products or beside is not None:
        raise NotLifted(FROM_ACTIVATION, start)
