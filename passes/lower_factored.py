"""Write low-rank projections into a captured graph: the product with a tensor becomes products with its factors.

    before: u = linear(x, W, b)
    after:  u = index_select(cat(linear(x, W[rest]), linear(linear(x, down), up)), -1, order) + b

What stands for the product may be a linear, a product with the transposed matrix, a convolution of width one or an
einsum; what reads the tensor in another way is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from rewrite.cuts import Cut, site_cuts
from rewrite.heads import Rewritten
from rewrite.site import Site, Tensors

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.mm.default)
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default)


@dataclass(frozen=True)
class Product:
    """x times a tensor as one node of the graph gives it; `axis` is where features lie. `einsum` holds the subscripts
    of x, of the tensor and of the result."""

    node: Node
    x: Node
    bias: Node | None
    axis: int = -1
    einsum: tuple[str, str, str] | None = None


def unsplittable(
    program: ExportedProgram, changes: Mapping[str, tuple[Site, Rewritten]], tensors: Tensors
) -> dict[str, str]:
    """Sites whose projections the graph computes in a way that cannot be split, and why."""
    factored = {n: pair for n, pair in changes.items() if pair[1].factors is not None}
    out: dict[str, str] = {}
    if not factored:
        return out
    module = program.module()
    for name, (site, new) in factored.items():
        found = site_cuts(site, new, tensors)
        products = [found] if isinstance(found, str) else [p for cut in found for p in _products(module, cut)]
        reason = next((p for p in products if isinstance(p, str)), None)
        out |= {} if reason is None else {name: reason}
    return out


def split(module: GraphModule, found: tuple[Cut, ...], full: Mapping[str, Tensor]) -> None:
    """Replace every product with a cut tensor; `full` are the tensors at full width."""
    made: dict[tuple[str, Node], Node] = {}
    held = {cut.tensor: _hold(module, cut, full[cut.tensor]) for cut in found}
    products = [(cut, p) for cut in found for p in _products(module, cut) if isinstance(p, Product)]
    place = {node: i for i, node in enumerate(module.graph.nodes)}
    # what one product makes a later one reads
    for cut, product in sorted(products, key=lambda pair: place[pair[1].node]):
        with module.graph.inserting_before(product.node):
            write = _Writer(module, cut, product)
            y = write.einsum(held[cut.tensor][0], made) if product.einsum else write.rows(held[cut.tensor], made)
        product.node.replace_all_uses_with(y)
        module.graph.erase_node(product.node)
    for cut in found:
        for read in _reads(module, cut.tensor):
            for user in list(read.users):
                module.graph.erase_node(user)
            module.graph.erase_node(read)
        path, _, leaf = cut.tensor.rpartition(".")
        delattr(module.get_submodule(path), leaf)


def _reads(module: GraphModule, tensor: str) -> list[Node]:
    return [n for n in module.graph.nodes if n.op == "get_attr" and n.target == tensor]


def _products(module: GraphModule, cut: Cut) -> list[Product | str]:
    """All products with a tensor, also with its transpose."""
    shape = _shape(module, cut)
    out: list[Product | str] = []
    for read in _reads(module, cut.tensor):
        for user in read.users:
            if len(shape) == 2 and _swaps(user):
                out += [_product(node, user, cut, shape, not cut.transposed) for node in user.users]
            else:
                out.append(_product(user, read, cut, shape, cut.transposed))
    return out


def _swaps(node: Node) -> bool:
    """A transpose of a matrix."""
    rest = list(node.args[1:])
    if node.target is aten.transpose.int:
        return rest in ([0, 1], [1, 0], [-1, -2], [-2, -1])
    return node.target is aten.t.default or (node.target is aten.permute.default and rest == [[1, 0]])


def _product(node: Node, read: Node, cut: Cut, shape: Sequence[int], transposed: bool) -> Product | str:
    """What a node computes of a tensor that is inputs by rows where it is `transposed`, or why it cannot be split."""
    args: Any = node.args
    bias = args[2] if len(args) > 2 else None
    if node.target is aten.linear.default and args[1] is read and not transposed:
        return Product(node, args[0], bias)
    if node.target in PRODUCTS and args[1] is read and transposed:
        return Product(node, args[0], None)
    if node.target is aten.addmm.default and args[2] is read and transposed and not node.kwargs:
        return Product(node, args[1], args[0])
    if node.target in CONVOLUTIONS and args[1] is read and _pointwise(node, shape):
        return Product(node, args[0], bias, axis=1)
    if node.target is aten.einsum.default and len(args[1]) == 2 and read in args[1]:
        return _einsum(node, read, cut, transposed)
    return f"its {cut.tensor} is read by {node.target}, which is no product that could be split"


def _pointwise(node: Node, shape: Sequence[int]) -> bool:
    """A convolution that only projects: width, stride and groups of one, no padding."""
    args: Any = node.args[3:]
    given = [x for arg in args[:4] for x in (arg if isinstance(arg, (list, tuple)) else [arg])]
    padding = args[1] if len(args) > 1 else [0]
    return all(n == 1 for n in shape[2:]) and not any(padding) and all(x in (0, 1) for x in given)


def _einsum(node: Node, read: Node, cut: Cut, transposed: bool) -> Product | str:
    """Inputs and outputs must be axes of their own, the one before the other, and all of the tensor one part."""
    args: Any = node.args
    subscripts, _, out = args[0].replace(" ", "").partition("->")
    first, second = subscripts.split(",")
    x, w = (first, second) if args[1][1] is read else (second, first)
    free = "".join(c for c in w if c in out and c not in x)
    inputs = "".join(c for c in w if c in x and c not in out)
    ordered = inputs + free if transposed else free + inputs
    if "." in subscripts or not out or w != ordered or len(cut.parts) != 1 or len(cut.rest):
        return f"its {cut.tensor} is read by einsum({args[0]}), whose axes do not part its rows from its inputs"
    return Product(node, args[1][0] if args[1][1] is read else args[1][1], None, einsum=(x, w, out))


def _shape(module: GraphModule, cut: Cut) -> list[int]:
    path, _, leaf = cut.tensor.rpartition(".")
    return list(getattr(module.get_submodule(path), leaf).shape)


def _hold(module: GraphModule, cut: Cut, full: Tensor) -> list[tuple[str, str]]:
    """Give the owner of a tensor its rows that stay and its factors: the names of (down, up) of every part."""
    path, _, leaf = cut.tensor.rpartition(".")
    owner = module.get_submodule(path)
    old: Tensor = getattr(owner, leaf)

    def keep(name: str, value: Tensor) -> None:
        value = value.to(old.dtype).to(old.device).contiguous().clone()
        if isinstance(old, nn.Parameter):
            owner.register_parameter(name, nn.Parameter(value, requires_grad=old.requires_grad))
        else:
            owner.register_buffer(name, value)

    if len(cut.rest):
        keep(f"{leaf}_rest", cut.matrix(full)[torch.from_numpy(cut.rest)])
    names: list[tuple[str, str]] = []
    for i, part in enumerate(cut.parts):
        tail = f"_{i}" if len(cut.parts) > 1 else ""
        names.append((f"{part.lender or cut.tensor}_down{tail}", f"{cut.tensor}_up{tail}"))
        keep(f"{leaf}_up{tail}", part.factor.up)
        if part.lender is None:
            keep(f"{leaf}_down{tail}", part.factor.down)
    if not np.array_equal(cut.order, np.arange(cut.count)):
        owner.register_buffer(f"{leaf}_order", torch.from_numpy(cut.order), persistent=False)
    return names


@dataclass(frozen=True)
class _Writer:
    """Nodes of one product, written where it stands."""

    module: GraphModule
    cut: Cut
    product: Product

    def rows(self, names: list[tuple[str, str]], made: dict[tuple[str, Node], Node]) -> Node:
        """Features last, or moved there for a convolution and back."""
        graph, axis = self.module.graph, self.product.axis
        x = self.product.x if axis == -1 else graph.call_function(aten.transpose.int, (self.product.x, axis, -1))
        pieces = [self._linear(x, f"{self.cut.tensor}_rest")] if len(self.cut.rest) else []
        for down, up in names:
            # a key of what is read, not of its moved copy: two projections of one input share the latent
            if (down, self.product.x) not in made:
                made[down, self.product.x] = self._linear(x, down)
            pieces.append(self._linear(made[down, self.product.x], up))
        y = pieces[0] if len(pieces) == 1 else graph.call_function(aten.cat.default, (pieces, -1))
        if not np.array_equal(self.cut.order, np.arange(self.cut.count)):
            order = graph.get_attr(f"{self.cut.tensor}_order")
            y = graph.call_function(aten.index_select.default, (y, -1, order))
        if self.product.bias is not None:
            y = graph.call_function(aten.add.Tensor, (y, self.product.bias))
        return y if axis == -1 else graph.call_function(aten.transpose.int, (y, axis, -1))

    def einsum(self, names: tuple[str, str], made: dict[tuple[str, Node], Node]) -> Node:
        """Both factors as einsums over the axes that the tensor had."""
        x, w, out = self.product.einsum or ("", "", "")
        (down, up), new = names, _unused(x + w + out)
        inputs, free = "".join(c for c in w if c in x), "".join(c for c in w if c not in x)
        left = "".join(c for c in x if c not in inputs) + new
        sizes = dict(zip(w, _shape(self.module, self.cut), strict=True))
        key = f"{down} {[x.index(c) for c in inputs]}", self.product.x
        if key not in made:
            shaped = self._view(down, [-1, *(sizes[c] for c in inputs)])
            made[key] = self._einsum(f"{x},{new}{inputs}->{left}", [self.product.x, shaped])
        shaped = self._view(up, [*(sizes[c] for c in free), -1])
        return self._einsum(f"{left},{free}{new}->{out}", [made[key], shaped])

    def _linear(self, x: Node, weight: str) -> Node:
        graph = self.module.graph
        return graph.call_function(aten.linear.default, (x, graph.get_attr(weight)))

    def _einsum(self, equation: str, operands: list[Node]) -> Node:
        return self.module.graph.call_function(aten.einsum.default, (equation, operands))

    def _view(self, name: str, shape: list[int]) -> Node:
        graph = self.module.graph
        return graph.call_function(aten.view.default, (graph.get_attr(name), shape))


def _unused(letters: str) -> str:
    return next(c for c in "zyxwvutsrqponmlkjihgfedcba" if c not in letters)
