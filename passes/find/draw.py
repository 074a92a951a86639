"""Values for what a region hangs on: drawn parameters, example inputs, altered inputs. All deterministic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from passes.canonicalise import Graph, by_value, is_absent, shape_of
from passes.find.execute import WIDER, widen


@dataclass(frozen=True, eq=False)
class Draw:
    """Fills placeholders. Parameters are drawn, because weights of 1 and biases of 0 hide structure.

    `keep_frozen`: parameters that never train keep their value: sine tables that are parameters must not be noise.
    `true`: parameters that keep their value, because a number of the site is computed from them.
    `altered`: inputs are other ones than the example; 0 is the example.
    """

    graph: Graph
    keep_frozen: bool = False
    true: frozenset[fx.Node] = frozenset()
    seed: int = 0
    altered: int = 0

    def change(self, seed: int) -> Draw:
        """Other parameters."""
        return replace(self, seed=seed)

    def alter(self, seed: int) -> Draw:
        """Other inputs."""
        return replace(self, altered=seed)

    def __call__(self, nodes: Sequence[fx.Node]) -> list[Tensor]:
        """The values of placeholders."""
        return [self.one(node) for node in nodes]

    def one(self, node: fx.Node) -> Tensor:
        """The value of one placeholder."""
        if node in self.graph.parameters:
            return self._parameter(node)
        value = self.graph.inputs[node]
        fresh = not isinstance(value, Tensor) or is_absent(value)
        if self.altered == 0 and not fresh:
            return widen(value.detach())
        return _other(node, self.altered, None if fresh else value)

    def is_kept(self, node: fx.Node) -> bool:
        """The parameter counts as a constant of the graph."""
        value = self.graph.weights[self.graph.parameters[node]]
        return self.keep_frozen and not value.requires_grad and not is_absent(value)

    def _parameter(self, node: fx.Node) -> Tensor:
        name = self.graph.parameters[node]
        value = self.graph.weights[name]
        if not is_absent(value) and (node in self.true or self.is_kept(node)):
            return widen(value.detach())
        return torch.rand(shape_of(node), dtype=torch.float64, generator=_seeded(shape_of(node), self.seed)) + 0.5


def _seeded(shape: Sequence[int], seed: int) -> torch.Generator:
    # by shape, not by name: equal regions of different layers see equal numbers
    return torch.Generator().manual_seed(1 + 7919 * seed + 31 * sum(i * n for i, n in enumerate(shape, 1)))


def _other(node: fx.Node, seed: int, example: Tensor | None) -> Tensor:
    """Another input of the node's dtype: booleans and 0/1 integers flip, other integers stay below their largest."""
    meta: Tensor = node.meta["val"]
    generator = _seeded(tuple(meta.shape), seed + 100)
    if meta.dtype.is_floating_point or meta.dtype.is_complex:
        return torch.randn(tuple(meta.shape), dtype=WIDER.get(meta.dtype, meta.dtype), generator=generator)
    if meta.dtype == torch.bool:
        return torch.rand(tuple(meta.shape), generator=generator) < 0.7
    if example is None:
        return torch.ones(tuple(meta.shape), dtype=meta.dtype)
    top = int(example.max()) + 1 if example.numel() else 1
    drawn = torch.rand(tuple(meta.shape), generator=generator)
    return ((drawn < 0.7) if top <= 2 else (drawn * top)).to(meta.dtype)


def behind(graph: Graph, node: fx.Node, cut: Sequence[fx.Node]) -> list[fx.Node]:
    """The parameters and inputs that a value hangs on, not looking behind `cut`."""
    seen, stack, leaves = set(cut), [node], []
    while stack:
        top = stack.pop()
        if top in seen or graph.is_constant(top):
            continue
        seen.add(top)
        if top.op == "placeholder":
            leaves.append(top)
        stack.extend(by_value(top))
    return sorted(leaves, key=graph.order.__getitem__)
