"""Pieces of the graph as functions, run in float64: equality then means 1e-9, and casts vanish."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from passes.canonicalise import Graph, by_value, op_name

WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
}
CPU = torch.device("cpu")


class Unknown(Exception):
    """A value was needed that nothing in the piece gives; `node` is where it comes from."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(node.name)
        self.node = node


def widen(value: Any) -> Any:
    """Float tensors as float64, complex ones as complex128, the rest as it is."""
    if isinstance(value, Tensor):
        wider = WIDER.get(value.dtype)
        return value if wider is None else value.to(wider)
    if isinstance(value, (tuple, list)):
        return type(value)(widen(x) for x in value) if type(value) in (tuple, list) else tuple(map(widen, value))
    return value


def _literal(x: Any) -> Any:
    """An argument that is no node: dtypes widened, devices brought home."""
    if isinstance(x, torch.dtype):
        return WIDER.get(x, x)
    if isinstance(x, torch.device):
        return CPU
    if isinstance(x, (list, tuple)):
        return type(x)(_literal(y) for y in x) if type(x) in (tuple, list) else x
    return x


def _first(x: Any, *_: Any, **__: Any) -> Any:
    return x


def _reshape(x: Tensor, size: Any, *_: Any) -> Tensor:
    # a view after a fused kernel may rely on that kernel's strides
    return x.reshape(size) if not isinstance(size, torch.dtype) else x


def _softmax(x: Tensor, dim: int, *_: Any, **__: Any) -> Tensor:
    return x.softmax(dim)


def _copy(x: Tensor, source: Tensor, *_: Any) -> Tensor:
    return source.to(WIDER.get(x.dtype, x.dtype)).expand(x.shape)


def _nothing(*_: Any, **__: Any) -> None:
    return None


INSTEAD: dict[str, Callable[..., Any]] = {
    "view": _reshape,
    "_unsafe_view": _reshape,
    "_softmax": _softmax,
    "softmax": _softmax,
    "copy": _copy,
    "dropout": _first,
    "_assert_tensor_metadata": _nothing,
    "_assert_scalar": _nothing,
    "_assert_async": _nothing,
    "lift_fresh_copy": _first,
    "empty": torch.zeros,
    "new_empty": torch.ops.aten.new_zeros,
    "empty_like": torch.ops.aten.zeros_like,
}


def _rms_norm(node: fx.Node) -> Callable[..., Any]:
    """Without an eps the op takes that of the dtype it was recorded in, not of float64."""
    recorded = torch.finfo(node.meta["val"].dtype).eps

    def run(x: Tensor, shape: Any, weight: Any = None, eps: Any = None) -> Tensor:
        return torch.nn.functional.rms_norm(x, shape, weight, recorded if eps is None else eps)

    return run


def _function(node: fx.Node) -> Callable[..., Any]:
    name = op_name(node)
    if name == "rms_norm":
        return _rms_norm(node)
    return INSTEAD.get(name, node.target)  # type: ignore[return-value]


class Piece:
    """The nodes between `given` and `wanted` as a function of the values of `given`.

    What hangs on nothing is computed once for the graph. Reaching anything else that has no value is `Unknown`.
    """

    def __init__(self, graph: Graph, given: Sequence[fx.Node], wanted: Sequence[fx.Node]) -> None:
        self.given, self.wanted = tuple(given), tuple(wanted)
        fixed: dict[fx.Node, Any] = {}
        moving = _between(graph, set(given), wanted, fixed)
        self._fixed = fixed
        self._steps = [(node, _function(node), _freeze(node.args), _freeze(node.kwargs)) for node in moving]

    @property
    def nodes(self) -> list[fx.Node]:
        """What runs on every call, in order."""
        return [step[0] for step in self._steps]

    def __call__(self, *values: Any) -> list[Any]:
        """The wanted values."""
        env = dict(self._fixed)
        env.update(zip(self.given, values, strict=True))
        for node, run, args, kwargs in self._steps:
            result = run(*_fill(args, env), **_fill(kwargs, env))
            env[node] = result if _is_wide(result) else widen(result)
        return [env[node] for node in self.wanted]

    def one(self, *values: Any) -> Any:
        """The first wanted value."""
        return self(*values)[0]


def _is_wide(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float64


def _freeze(args: Any) -> Any:
    """Literals made ready once; nodes stay."""
    if isinstance(args, fx.Node):
        return args
    if isinstance(args, dict):
        return {key: _freeze(x) for key, x in args.items() if key != "pin_memory"}
    if isinstance(args, (tuple, list)):
        return [_freeze(x) for x in args]
    return _literal(args)


def _fill(args: Any, env: dict[fx.Node, Any]) -> Any:
    if isinstance(args, fx.Node):
        return env[args]
    if isinstance(args, list):
        return [_fill(x, env) for x in args]
    if isinstance(args, dict):
        return {key: _fill(x, env) for key, x in args.items()}
    return args


def _between(graph: Graph, given: set[fx.Node], wanted: Iterable[fx.Node], fixed: dict[fx.Node, Any]) -> list[fx.Node]:
    """Nodes that need running, in order; constants met on the way go to `fixed`."""
    seen: set[fx.Node] = set()
    moving: list[fx.Node] = []
    stack = [node for node in wanted if node not in given]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if graph.is_constant(node):
            fixed[node] = constant(graph, node)
        elif node.op != "call_function":
            raise Unknown(node)
        else:
            moving.append(node)
            read = by_value(node)
            stack.extend(source for source in read if source not in given)
            fixed.update({x: stand_in(x) for x in node.all_input_nodes if x not in read and x not in fixed})
    return sorted(moving, key=graph.order.__getitem__)


def constant(graph: Graph, node: fx.Node) -> Any:
    """The value of a node that hangs on neither a parameter nor an input."""
    todo = [node]
    while todo:
        top = todo[-1]
        if top in graph.folded:
            todo.pop()
            continue
        missing = [x for x in _needed(top) if x not in graph.folded]
        if missing:
            todo.extend(missing)
        else:
            graph.folded[top] = _fold(graph, top)
            todo.pop()
    return graph.folded[node]


def _needed(node: fx.Node) -> list[fx.Node]:
    return by_value(node) if node.op == "call_function" else []


def _fold(graph: Graph, node: fx.Node) -> Any:
    if node.op == "placeholder":
        return widen(graph.constants[node])
    if node.op != "call_function":
        raise Unknown(node)
    read = set(by_value(node))
    env = {source: graph.folded[source] if source in read else stand_in(source) for source in node.all_input_nodes}
    args = _freeze(node.args)
    if node in graph.numbers:
        old, new = graph.numbers[node]
        args = [new if type(x) is int and x == old else x for x in args]
    return widen(_function(node)(*_fill(args, env), **_fill(_freeze(node.kwargs), env)))


def stand_in(node: fx.Node) -> Any:
    """Zeros in the shape and (widened) dtype of a node whose value is not read."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return value
    return torch.zeros(tuple(value.shape), dtype=WIDER.get(value.dtype, value.dtype))
