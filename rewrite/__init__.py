"""Rewrite the attention of a pretrained transformer: `from rewrite import convert, plan, check, GQA, MLA`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from passes.gqa import GQA
    from passes.mla import MLA
    from rewrite.api import check, convert, plan
    from rewrite.errors import ReattnError
    from rewrite.onnx.export import export_onnx

__all__ = ["GQA", "MLA", "ReattnError", "check", "convert", "export_onnx", "plan"]

_HOME = {"ReattnError": "rewrite.errors", "export_onnx": "rewrite.onnx.export"}


def __getattr__(name: str) -> Any:
    """Names are loaded when they are first used, so that `import rewrite` needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module 'rewrite' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOME.get(name, "rewrite.api")), name)
