"""Kernels as files: written to a cache, imported, and compiled ahead of time for a chip that need not be there."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codegen.spec import KernelSpec
from codegen.triton import arguments, source

FUSION = True
"""Products and sums in one rounding, said out loud: compilers disagree on the default."""


def cache() -> Path:
    """The folder of kernels: $REATTN_CACHE, or .cache/reattn in the home folder."""
    return Path(os.environ.get("REATTN_CACHE") or Path.home() / ".cache" / "reattn")


def written(spec: KernelSpec) -> Path:
    """The kernel's file, named by its text too, so that two versions of this package can share a cache."""
    text = source(spec)
    path = cache() / "kernels" / f"{spec.name}_{hashlib.sha256(text.encode()).hexdigest()[:8]}.py"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
            file.write(text)
        os.replace(file.name, path)
    return path


@functools.cache
def function(spec: KernelSpec) -> Any:
    """The kernel itself: what `triton.jit` made of the file, or its interpreter under TRITON_INTERPRET=1."""
    path = written(spec)
    found = importlib.util.spec_from_file_location(path.stem, path)
    if found is None or found.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return getattr(module, spec.name)


def options(spec: KernelSpec) -> dict[str, Any]:
    """What a launch or a compilation is told besides the arguments."""
    return {"num_warps": spec.warps, "num_stages": spec.stages, "enable_fp_fusion": FUSION}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers a thread, bytes spilled a thread, bytes of shared memory a block."""

    registers: int
    spilled: int
    shared: int

    def __str__(self) -> str:
        return f"{self.registers} registers, {self.spilled} spilled, {self.shared:,} shared"


def compiled(spec: KernelSpec, chip: str = "sm_90") -> Any:
    """Triton's compiled kernel for "sm_90" or "gfx942", as if pointers and heads were aligned to 16 bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    taken = arguments(spec)
    signature = {a.name: a.type for a in taken}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(taken) if a.aligned}
    text = ASTSource(fn=function(spec), signature=signature, constexprs={}, attrs=aligned)
    target = GPUTarget("hip", chip, 64) if chip.startswith("gfx") else GPUTarget("cuda", int(chip[3:]), 32)
    return triton.compile(text, target=target, options=options(spec))


def resources(spec: KernelSpec, chip: str = "sm_90") -> Resources:
    """Compiles the kernel and reads what it takes off the binary."""
    made = compiled(spec, chip)
    if chip.startswith("gfx"):
        text = made.asm["amdgcn"]
        return Resources(
            _number(r"\.vgpr_count:\s+(\d+)", text), _number(r"\.vgpr_spill_count:\s+(\d+)", text), made.metadata.shared
        )
    usage = _cuobjdump(made.asm["cubin"])
    return Resources(_number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage), made.metadata.shared)


def _cuobjdump(cubin: bytes) -> str:
    """The tool that Triton's wheel brings, on a binary in a file."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's report says nothing like {pattern}")
    return int(found.group(1))
