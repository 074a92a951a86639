"""How many attentions a model runs, counted from one real forward: no graph is involved, so it can judge the finder.

A fused attention op counts one. Otherwise a softmax (or exp) of a product of two computed tensors counts, once a
product of two computed tensors consumes it. Computed means: hangs on an input, or came out of a product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FUSED = ("_scaled_dot_product", "scaled_dot_product", "_native_multi_head_attention", "_transformer_encoder_layer")
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "dot", "linear", "matmul", "convolution", "_grouped_mm"}
CLEARING = ("layer_norm", "group_norm", "batch_norm", "rms_norm", "embedding")
SOFTMAX = {"_softmax", "_safe_softmax", "softmax", "exp"}


@dataclass(frozen=True)
class _Mark:
    """What is known of a storage."""

    computed: bool = False
    scores: bool = False
    """Holds a product of two computed tensors, whatever was done to it since."""
    softmaxes: frozenset[int] = frozenset()


@dataclass
class _Counter(TorchDispatchMode):
    marks: dict[int, _Mark] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)
    softmaxes: int = 0
    fused: int = 0
    consumed: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def of(self, tensor: Tensor) -> _Mark:
        return self.marks.get(tensor.untyped_storage()._cdata, _Mark())

    def set(self, tensor: Tensor, mark: _Mark) -> None:
        storage = tensor.untyped_storage()
        self.kept.append(storage)  # kept, so that no later storage takes its identity
        self.marks[storage._cdata] = mark

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if not func.is_view:
            mark = self.judge(func._schema.name.split("::")[-1].rstrip("_"), inputs)
            # what is written in place also hangs on what stood there before: `judge` saw it among the inputs
            for tensor in [*outputs, *(inputs[:1] if func._schema.is_mutable else [])]:
                self.set(tensor, mark)
        return result

    def judge(self, name: str, inputs: list[Tensor]) -> _Mark:
        marks = [self.of(t) for t in inputs]
        computed = any(m.computed for m in marks)
        if name.startswith(FUSED):
            self.fused += 1
            return _Mark(computed=True)
        if name in PRODUCTS:
            pair = marks[-2:] if name in {"addmm", "baddbmm", "addbmm"} else marks[:2]
            both = len(pair) == 2 and all(m.computed for m in pair)
            if both:
                self.consumed |= pair[0].softmaxes | pair[1].softmaxes
            return _Mark(computed=True, scores=both)
        if any(word in name for word in CLEARING):
            return _Mark(computed=computed)
        if name in SOFTMAX:
            if not marks[0].scores:
                return _Mark(computed=computed)
            self.softmaxes += 1
            return _Mark(computed=True, softmaxes=frozenset({self.softmaxes}))
        return _Mark(computed, any(m.scores for m in marks), frozenset().union(*(m.softmaxes for m in marks)))


def count_by_execution(model: nn.Module, inputs: tuple[Any, ...] | Mapping[str, Any]) -> int:
    """Attentions that one forward executes."""
    args: tuple[Any, ...] = () if isinstance(inputs, Mapping) else tuple(inputs)
    kwargs: dict[str, Any] = dict(inputs) if isinstance(inputs, Mapping) else {}
    counter = _Counter()
    for tensor in tree_leaves((args, kwargs)):
        if isinstance(tensor, Tensor):
            counter.set(tensor, _Mark(computed=True))
    with torch.no_grad(), counter:
        model(*args, **kwargs)
    return counter.fused + len(counter.consumed)
