"""Where a node comes from: module path and source line."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import fx

FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def where(node: fx.Node) -> str:
    """The innermost source line of a node, "modeling_x.py:212"; "" where the graph holds none."""
    frames = FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    path, line = frames[-1]
    return f"{path.replace(chr(92), '/').rsplit('/', 1)[-1]}:{line}"


def module_path(node: fx.Node) -> str:
    """The deepest module that was running: "model.layers.3.self_attn.q_proj"; "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]) for entry in stack.values()]
    return paths[-1].removeprefix("L['self'].") if paths else ""


def owner(path: str, tensor: str) -> str:
    """The module that owns a projection: that of its tensor, if the node ran in it; else ""."""
    parent = tensor.rpartition(".")[0]
    return parent if parent and path == parent else ""


def numbered(names: Sequence[str]) -> list[str]:
    """Names made distinct: "#1", "#2", ... follow where several are equal."""
    seen: dict[str, int] = {}
    out: list[str] = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(f"{name}#{seen[name]}" if names.count(name) > 1 else name)
    return out
