"""Rewrite the attention of a pretrained transformer: `from rewrite import convert, plan, check, GQA, MLA`.

`from rewrite import attention` is the kernel alone, for tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from passes.gqa import GQA
    from passes.mla import MLA
    from rewrite.api import check, convert, plan
    from rewrite.attend import Alibi, attention
    from rewrite.errors import ReattnError

__all__ = ["GQA", "MLA", "Alibi", "ReattnError", "attention", "check", "convert", "plan"]

_HOME = {"Alibi": "rewrite.attend", "ReattnError": "rewrite.errors", "attention": "rewrite.attend"}


def __getattr__(name: str) -> Any:
    """Names are loaded when they are first used, so that `import rewrite` needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module 'rewrite' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOME.get(name, "rewrite.api")), name)
