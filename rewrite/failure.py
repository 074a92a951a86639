"""Why torch.export stopped: in which module, at which source line, and what to do about it."""

from __future__ import annotations

import linecache
import os
from collections.abc import Iterator
from types import FrameType

import torch
from torch import nn

from rewrite.errors import ReattnError, Refused

REMEDIES = (
    (
        ("_detect_is_causal_mask",),
        "the mask's values are looked at while tracing; pass is_causal=True (or tgt_is_causal=True) beside the mask",
    ),
    (
        ("dynamic_frequency_update",),
        "the rotation gets other frequencies as the text grows, so none can be taken for fixed; "
        "a rope_type with fixed ones (default, linear, yarn, llama3) would do",
    ),
    (("NoneType",), "an argument that was left out is needed: give inputs={...} with it, for instance attention_mask"),
    (
        ("data-dependent", "DataDependent", "unbacked", ".item()", "nonzero"),
        "a tensor's value decides what runs next; give inputs that do not need it, or make the branch depend on shapes",
    ),
    (
        ("pytree", "not supported as an output", "Unsupported output", "unsupported output", "DynamicCache"),
        "an output is neither tensors nor a container of them; return tensors (for a cache: use_cache=False)",
    ),
)
"""Words of torch's own message or of the stack -> what mends it."""


def describe(module: nn.Module, failure: Exception) -> ReattnError:
    """The error to show for a failed export."""
    if isinstance(failure, ReattnError):
        return failure
    frames = [frame for frame in _frames(failure) if not frame[0].f_code.co_filename.startswith(_ours())]
    where = _module_path(module, [frame for frame, _ in frames])
    text = _message(failure)
    seen = text + " ".join(frame.f_code.co_name for frame, _ in frames)
    lines = [text, *_line(frames)]
    lines += [advice for words, advice in REMEDIES if any(word in seen for word in words)][:1] or [
        "give inputs that take the common path: inputs=(...), or mend the line"
    ]
    return Refused("capture", f"torch.export stopped in {where}", *lines)


def _message(failure: Exception) -> str:
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    first = " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else "no message"
    return f"{type(failure).__name__}: {first[:300]}"


def _frames(failure: BaseException) -> list[tuple[FrameType, int]]:
    """Frames of the failure and of what caused it, the outermost first."""
    found: list[tuple[FrameType, int]] = []
    seen: set[int] = set()
    at: BaseException | None = failure
    chain: list[BaseException] = []
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        chain.append(at)
        at = at.__cause__ or at.__context__
    for error in reversed(chain):
        trace = error.__traceback__
        while trace is not None:
            found.append((trace.tb_frame, trace.tb_lineno))
            trace = trace.tb_next
    return found


def _ours() -> str:
    return os.path.dirname(os.path.abspath(__file__)) + os.sep


def _line(frames: list[tuple[FrameType, int]]) -> Iterator[str]:
    """The innermost line outside torch; inside torch.nn where the model is made of nothing else."""
    torch_home = os.path.dirname(str(torch.__file__)) + os.sep
    outside = [f for f in frames if not f[0].f_code.co_filename.startswith((torch_home, "<"))]
    outside = [f for f in outside if f"{os.sep}contextlib.py" not in f[0].f_code.co_filename and _in_module(f[0])]
    library = [f for f in frames if f"{os.sep}nn{os.sep}modules{os.sep}" in f[0].f_code.co_filename]
    library = [f for f in library if f[0].f_code.co_name not in {"_call_impl", "_wrapped_call_impl"}]
    for frame, number in (outside or library)[-1:]:
        path = frame.f_code.co_filename
        source = linecache.getline(path, number).strip()
        yield f"at {os.path.basename(path)}:{number}: `{source}`"


def _in_module(frame: FrameType) -> bool:
    """Some caller is a module's forward: the model's code, not the caller's."""
    at: FrameType | None = frame
    while at is not None:
        if isinstance(at.f_locals.get("self"), nn.Module):
            return True
        at = at.f_back
    return False


def _module_path(module: nn.Module, frames: list[FrameType]) -> str:
    """The innermost module of the model whose code was running."""
    paths = {id(m): path for path, m in module.named_modules()}
    for frame in reversed(frames):
        path = paths.get(id(frame.f_locals.get("self")))
        if path:
            return path
    return type(module).__name__
