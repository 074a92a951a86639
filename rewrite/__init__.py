"""Rewrite the attention of a pretrained transformer: `from rewrite import convert, plan, check, GQA, MLA, BlockSparse`.

`from rewrite import attention` is the kernel alone, for tensors; masks for both are `from rewrite import causal, sink,
window` and the others of rewrite.mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from passes.gqa import GQA
    from passes.mla import MLA
    from passes.sparse import BlockSparse
    from rewrite.api import check, convert, plan
    from rewrite.attend import Alibi, attention
    from rewrite.errors import ReattnError
    from rewrite.mask import (
        all_,
        around,
        blocks,
        blocks_diagonal,
        causal,
        chunk,
        dilated,
        documents,
        global_,
        longformer,
        neighbourhood,
        prefix,
        sharded,
        sink,
        streaming,
        strided,
        window,
    )
    from rewrite.onnx.export import export_onnx

__all__ = [
    "GQA",
    "MLA",
    "Alibi",
    "BlockSparse",
    "ReattnError",
    "all_",
    "around",
    "attention",
    "blocks",
    "blocks_diagonal",
    "causal",
    "check",
    "chunk",
    "convert",
    "dilated",
    "documents",
    "export_onnx",
    "global_",
    "longformer",
    "neighbourhood",
    "plan",
    "prefix",
    "sharded",
    "sink",
    "streaming",
    "strided",
    "window",
]

_API = ("BlockSparse", "GQA", "MLA", "check", "convert", "plan")
_HOME = {
    **dict.fromkeys(_API, "rewrite.api"),
    "Alibi": "rewrite.attend",
    "ReattnError": "rewrite.errors",
    "attention": "rewrite.attend",
    "export_onnx": "rewrite.onnx.export",
}


def __getattr__(name: str) -> Any:
    """Names are loaded when they are first used, so that `import rewrite` needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module 'rewrite' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOME.get(name, "rewrite.mask")), name)
