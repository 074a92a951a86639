"""One watched run: which module is given a site's cache, where in the cache it writes, and what."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, EncoderDecoderCache, PreTrainedModel

from rewrite.emit.runtime import CacheView, EncoderDecoderView
from rewrite.emit.runtime.latent_entry import kernel_of
from rewrite.emit.validate import greedy
from rewrite.modules import caches_raw, key_norm_module, owner
from rewrite.site import Site

WATCHED = "reattn_watched"
"""The name under which a kernel is registered that notes its calls."""


@dataclass(frozen=True)
class Write:
    """One call of `update`: half is "" for a plain cache, "self" or "cross" for a pair."""

    half: str
    layer: int
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Table:
    """A pair (cos, sin) among a module's arguments, by name and place, as it was given or as one complex tensor."""

    name: str
    place: int
    cos: Tensor
    sin: Tensor


@dataclass
class Log:
    """What one module did with the caches it was given."""

    called: int = 0
    pair: bool = False
    """Whether the cache came as a pair, for self and cross attention."""
    argument: tuple[str, int] = ("", 0)
    """Name and place of the cache among the arguments."""
    writes: list[Write] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    """Rope tables among the arguments."""
    normed: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    """Key norms that are modules: the shapes they were given, call by call."""
    kernels: int = 0
    """How often the module asked for its attention kernel by the name in its config and called it."""

    @property
    def slots(self) -> set[tuple[str, int]]:
        """(half, layer) written to."""
        return {(w.half, w.layer) for w in self.writes}

    @property
    def layer(self) -> tuple[str, int] | None:
        """The one (half, layer) written to, where it is one."""
        return next(iter(self.slots)) if len(self.slots) == 1 else None

    def refusal(self, seen: object, without: str) -> str | None:
        """Why the module cannot be given another cache or kernel; `without` says what it means that nothing was
        `seen`."""
        if not self.called:
            return "not called by the example"
        if not seen:
            return without
        if len(self.slots) > 1:
            return f"writes cache layers {' and '.join(str(layer) for _, layer in sorted(self.slots))}"
        return None


class Witness(CacheView):
    """Shows a cache as it is and notes what is written."""

    def __init__(self, inner: Cache, log: Log, half: str = "") -> None:
        self.inner = inner
        self.log = log
        self.half = half

    @property
    def layers(self) -> list[Any]:
        """The cache's own."""
        return self.inner.layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As the cache itself, and note it."""
        self.log.writes.append(Write(self.half, layer_idx, key_states.detach(), value_states.detach()))
        return self.inner.update(key_states, value_states, layer_idx, *args, **kwargs)


class PairWitness(EncoderDecoderView):
    """The same for a pair of caches."""

    def __init__(self, inner: EncoderDecoderCache, log: Log) -> None:
        self.self_attention_cache = Witness(inner.self_attention_cache, log, "self")
        self.cross_attention_cache = Witness(inner.cross_attention_cache, log, "cross")
        self.is_updated = inner.is_updated


def _noted(value: Any, log: Log) -> Any:
    if isinstance(value, EncoderDecoderCache):
        log.pair = True
        return PairWitness(value, log)
    return Witness(value, log) if isinstance(value, Cache) else value


def _tables(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Table]:
    """Arguments that are two tensors whose squares add up to one number, or one complex tensor of one size."""
    names = [n for n in inspect.signature(module.forward).parameters if n not in ("args", "kwargs")]
    given = [(n, i, v) for i, (n, v) in enumerate(zip(names, args, strict=False))]
    given += [(n, names.index(n) if n in names else len(names), v) for n, v in kwargs.items()]
    parts = [(n, i, (v.real, v.imag) if isinstance(v, Tensor) and v.is_complex() else v) for n, i, v in given]
    return [Table(n, i, v[0].detach(), v[1].detach()) for n, i, v in parts if _turns(v)]


def _turns(value: Any) -> bool:
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(isinstance(x, Tensor) for x in value):
        return False
    a, b = value
    if not a.is_floating_point() or a.shape != b.shape or a.dim() != 3 or not a.numel():
        return False
    size = a.double().square() + b.double().square()
    return bool((size - size.flatten()[0]).abs().max() <= 1e-5 * size.flatten()[0].abs())


def _place(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, int] | None:
    """Where the cache stands among the arguments of a call."""
    names = [n for n in inspect.signature(module.forward).parameters if n not in ("args", "kwargs")]
    for i, value in enumerate(args):
        if isinstance(value, Cache):
            return names[i], i
    for name, value in kwargs.items():
        if isinstance(value, Cache):
            return name, names.index(name) if name in names else len(names)
    return None


@contextmanager
def _watching(model: nn.Module, paths: Sequence[str], norms: Mapping[str, str]) -> Generator[dict[str, Log]]:
    """`norms`: key norm -> the module whose log it stands in."""
    logs = {path: Log() for path in dict.fromkeys(paths)}
    handles: list[Any] = []

    def watch(log: Log) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            log.called += 1
            log.argument = _place(module, args, kwargs) or log.argument
            log.tables += _tables(module, args, kwargs)
            return tuple(_noted(a, log) for a in args), {n: _noted(v, log) for n, v in kwargs.items()}

        return hook

    try:
        for path, log in logs.items():
            handles.append(model.get_submodule(path).register_forward_pre_hook(watch(log), with_kwargs=True))
        for path, held in norms.items():
            shapes = logs[held].normed.setdefault(path, [])
            handles.append(model.get_submodule(path).register_forward_pre_hook(_shapes_into(shapes)))
        with _kernels_watched({model.get_submodule(path): log for path, log in logs.items()}):
            yield logs
    finally:
        for handle in handles:
            handle.remove()


def _shapes_into(shapes: list[tuple[int, ...]]) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        shapes.append(tuple(args[0].shape))

    return hook


@contextmanager
def handed(modules: Iterable[nn.Module], name: str, run: Callable[..., Any]) -> Generator[None]:
    """For a while the configs of modules that ask for their kernel by name ask for `name`, and
    `run(config, module, ...)` is what they get, told the config that they had."""
    before: dict[nn.Module, Any] = {}

    def called(module: Any, *args: Any, **kwargs: Any) -> Any:
        return run(before[module], module, *args, **kwargs)

    AttentionInterface.register(name, called)
    try:
        for module in modules:
            config: Any = getattr(module, "config", None)
            if isinstance(getattr(config, "_attn_implementation", None), str):
                before[module] = config
                module.config = copy.copy(config)
                module.config._attn_implementation_internal = name
        yield
    finally:
        for module, config in before.items():
            module.config = config


def _kernels_watched(logs: Mapping[nn.Module, Log]) -> AbstractContextManager[None]:
    """For a while the modules' configs name a kernel that notes its calls and hands them on."""

    def watch(config: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        logs[module].kernels += 1
        return kernel_of(module, config)(module, *args, **kwargs)

    return handed(logs, WATCHED, watch)


def observe(model: PreTrainedModel, sites: Sequence[Site], inputs: Mapping[str, Any]) -> dict[str, Log]:
    """Owner path -> what happened while two tokens were generated (in one forward where the model generates none)."""
    paths = [owner(s) for s in sites]
    norms = {key_norm_module(s): owner(s) for s in sites if caches_raw(s)}
    with torch.no_grad(), _watching(model, paths, norms) as logs:
        if model.can_generate():
            try:
                greedy(model, inputs, 2)
                return logs
            # a model that cannot generate from these inputs is watched in a forward, as one that never generates
            except Exception:
                logs = None
    if logs is None or not model.can_generate():
        with torch.no_grad(), _watching(model, paths, norms) as logs:
            model(**inputs)
    return logs
