"""Any model as two exported graphs: a static one to lift attention from, a dynamic one to run and to emit.

Both are plain aten graphs: no parameter is allocated for them, nothing in them is in place, nothing is nested.
"""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from rewrite.errors import Refused
from rewrite.examples import Inputs, caching, given, propose
from rewrite.failure import describe
from rewrite.program import Program
from rewrite.source import build


def capture(
    model: nn.Module | str | Path,
    inputs: tuple[Any, ...] | dict[str, Any] | None = None,
    *,
    weights: bool = False,
    dynamic: bool = True,
) -> Program:
    """Trace a module, a checkpoint folder or a config.json; `inputs` are needed only where no config names them.

    `weights` loads a folder's weights; without it parameters stay on meta. `dynamic=False` makes the static graph
    alone, in half the time: enough for a plan.
    """
    module = build(model, weights=weights) if isinstance(model, (str, Path)) else _module(model)
    with _evaluating(module):
        example, static = _static(module, inputs)
        moving, frozen = _dynamic(module, example) if dynamic else (None, "the dynamic graph was not asked for")
    return Program(module, static, moving, frozen, example.args, example.kwargs)


def _module(model: object) -> nn.Module:
    if isinstance(model, nn.Module):
        # torch.compile wraps a module in one that cannot be traced again
        return getattr(model, "_orig_mod", model)
    raise Refused(
        "not-a-model",
        f"{type(model).__name__} is no torch.nn.Module and no path",
        "give a module, or the folder of a Hugging Face checkpoint",
    )


@contextmanager
def _evaluating(module: nn.Module) -> Generator[None]:
    """Eval mode, without gradients, without a cache; all of it is put back as it was."""
    flags, silent = [(m, m.training) for m in module.modules()], logging.root.manager.disable
    module.eval()
    caches = caching(module)
    try:
        for config in caches:
            config.use_cache = False
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.ERROR)
            # torch says much of its own insides, and prints whole graphs when it fails; the error tells what matters
            with redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(silent)
        for m, training in flags:
            m.training = training
        for config in caches:
            config.use_cache = True


def _static(module: nn.Module, inputs: Any) -> tuple[Inputs, ExportedProgram]:
    """The first way of calling the model that exports; where none does, the first failure is told."""
    failure: Exception | None = None
    for example in [given(module, inputs)] if inputs is not None else propose(module):
        example = _beside(module, example)
        try:
            return example, _export(module, example, None)
        except Exception as error:  # tracing runs the model's own code, which may raise anything
            # a missing argument is mended by a later call, whose own failure is then the one to tell
            failure = error if failure is None or "NoneType" in str(failure) else failure
    if failure is None:
        raise AssertionError("propose gives at least one call")
    raise describe(module, failure) from failure


def _beside(module: nn.Module, example: Inputs) -> Inputs:
    """The inputs on the parameters' device, floating ones in the parameters' type where they were made here."""
    first = next((p for p in module.parameters() if p.is_floating_point()), None)
    if first is None:
        return example
    device = torch.device("cpu") if first.is_meta else first.device

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        made = not example.loose and value.is_floating_point()
        return value.to(device, first.dtype if made else value.dtype)

    args, kwargs = tree_map(move, (example.args, example.kwargs))
    return Inputs(args, kwargs, example.moving, example.loose)


def _dynamic(module: nn.Module, example: Inputs) -> tuple[ExportedProgram | None, str | None]:
    """The graph with dynamic batch and sequence, and what stayed fixed in it."""
    failure: Exception | None = None
    for dim in (Dim.DYNAMIC, Dim.AUTO):
        try:
            program = _export(module, example, _shapes(module, example, dim))
        except Exception as error:  # as above; the second way is more lenient
            failure = error
        else:
            return program, _frozen(program, example)
    first = str(failure).strip().splitlines()[0][:200]
    return None, f"no axis can be dynamic: {first}"


def _shapes(module: nn.Module, example: Inputs, dim: Any) -> dict[str, Any]:
    """What torch.export wants as `dynamic_shapes`: by parameter of forward, in the structure of the arguments."""
    leaves, structure = tree_flatten((example.args, example.kwargs))
    other = Dim.AUTO if example.loose else Dim.STATIC
    specs = [
        {axis: dim if axis in moving else other for axis in range(value.dim())} if isinstance(value, Tensor) else None
        for value, moving in zip(leaves, example.moving, strict=True)
    ]
    args, kwargs = tree_unflatten(specs, structure)
    return inspect.signature(module.forward).bind(*args, **kwargs).arguments


def _frozen(program: ExportedProgram, example: Inputs) -> str | None:
    """The sentence on axes that kept their traced size although they were to be dynamic, or None."""
    placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    stuck: list[str] = []
    for name, moving in zip(program.graph_signature.user_inputs, example.moving, strict=False):
        node = placeholders.get(str(name))
        shape = getattr(node.meta.get("val"), "shape", ()) if node is not None else ()
        stuck += [f"axis {a} of {name} stayed {shape[a]}" for a in moving if a < len(shape) and _fixed(shape[a])]
    return f"the model fixes a size while it is traced: {', '.join(stuck)}" if stuck else None


def _fixed(size: Any) -> bool:
    """A number, also where it is still held as a symbol that was found to be one."""
    return not isinstance(size, torch.SymInt) or size.node.maybe_as_int() is not None


def _export(module: nn.Module, example: Inputs, shapes: Any) -> ExportedProgram:
    with _allocated(module) as phantom:
        program = torch.export.export(
            module, example.args, example.kwargs, dynamic_shapes=shapes, strict=False
        ).run_decompositions({})  # an empty table: in-place ops and nesting go, attention and softmax stay
    for name, parameter in phantom.items():
        # what stood in for a tensor without values is of no use after tracing
        if name in program.state_dict:
            program.state_dict[name] = parameter
    _require_plain(program)
    return program


@contextmanager
def _allocated(module: nn.Module) -> Generator[Mapping[str, Tensor]]:
    """While tracing, tensors on meta stand on the CPU without memory, so that they may meet real buffers and inputs.

    Gives the tensors on meta by their names in the state dict.
    """
    places = [
        (table, key, value, f"{path}.{key}" if path else key)
        for path, owner in module.named_modules()
        for table in (owner._parameters, owner._buffers)  # pyright: ignore[reportPrivateUsage]
        for key, value in table.items()
        if value is not None and value.is_meta
    ]
    fakes: dict[int, Tensor] = {}
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with mode:
        for _, _, value, _ in places:
            if id(value) not in fakes:
                fake = torch.empty(value.shape, dtype=value.dtype, device="cpu")
                trained = isinstance(value, nn.Parameter)
                fakes[id(value)] = nn.Parameter(fake, value.requires_grad) if trained else fake
    try:
        for table, key, value, _ in places:
            table[key] = fakes[id(value)]  # pyright: ignore[reportArgumentType]
        yield {name: value for _, _, value, name in places}
    finally:
        for table, key, value, _ in places:
            table[key] = value  # pyright: ignore[reportArgumentType]


def _require_plain(program: ExportedProgram) -> None:
    for node in program.graph.nodes:
        if isinstance(node.target, HigherOrderOperator):
            raise Refused("capture", f"the graph holds control flow ({node.target}), which is not looked into")
        schema = getattr(node.target, "_schema", None)
        if node.op == "call_function" and schema is not None and schema.is_mutable:
            raise Refused("capture", f"the graph writes in place ({node.target}), so its data flow is hidden")
