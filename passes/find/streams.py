"""Do two projections read the same tokens? Self-attention does, whatever norm or bottleneck stands before either."""

from __future__ import annotations

import heapq

from torch import fx

from passes.canonicalise import Graph, by_value, is_tensor, shape_of

FAR = 400


def same_tokens(graph: Graph, a: fx.Node, b: fx.Node) -> bool:
    """One value that all of `a` comes from is also one that all of `b` comes from, token for token."""
    return bool(set(_necks(graph, a)) & set(_necks(graph, b)))


def _necks(graph: Graph, start: fx.Node) -> list[fx.Node]:
    """Activations with as many tokens as `start` through which everything on the way to it passes, nearest first."""
    tokens = shape_of(start)[:-1]
    necks: list[fx.Node] = []
    queue = [(-graph.order[start], start.name, start)]
    known = {start}
    for _ in range(FAR):
        if not queue:
            break
        if len(queue) == 1 and _carries(queue[0][2], tokens):
            necks.append(queue[0][2])
        _, _, node = heapq.heappop(queue)
        for source in by_value(node):
            if source not in known and graph.on_inputs(source):
                known.add(source)
                heapq.heappush(queue, (-graph.order[source], source.name, source))
    return necks


def _carries(node: fx.Node, tokens: tuple[int, ...]) -> bool:
    """A float tensor with the same number of tokens."""
    if not is_tensor(node) or not node.meta["val"].dtype.is_floating_point:
        return False
    count = 1
    for n in tokens:
        count *= n
    mine = 1
    for n in shape_of(node)[:-1]:
        mine *= n
    return mine == count
