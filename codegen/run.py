"""Launches one generated kernel, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from codegen.compiled import function, options
from codegen.spec import KernelSpec
from codegen.triton import arguments


def interpreting() -> bool:
    """Whether Triton was told to interpret kernels, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _names(spec: KernelSpec) -> tuple[str, ...]:
    return tuple(a.name for a in arguments(spec))


def run(spec: KernelSpec, grid: tuple[int, int, int], values: Mapping[str, Any]) -> None:
    """Launches the kernel over `grid`, its arguments taken from `values` by name, on the device of their tensors."""
    if all(grid):
        with torch.cuda.device_of(next(x for x in values.values() if isinstance(x, Tensor))):
            function(spec)[grid](*(values[name] for name in _names(spec)), **options(spec))
