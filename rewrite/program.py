"""A captured model: the same computation as two exported graphs, and the inputs that they were traced with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram


@dataclass(frozen=True, eq=False)
class Program:
    """What capture gives; every later step reads it and none changes it."""

    module: nn.Module
    """As given, or as built from a folder: parameters may lie on the meta device."""
    static: ExportedProgram
    """Canonical aten graph at concrete sizes (batch 2, about 10 tokens): attention is lifted from this one."""
    dynamic: ExportedProgram | None
    """The same with dynamic batch and sequence: this one is run and emitted."""
    frozen: str | None
    """Why `dynamic` is missing, or which axis of it kept its traced size; None where nothing is frozen."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    """The example inputs that both graphs were traced with."""
