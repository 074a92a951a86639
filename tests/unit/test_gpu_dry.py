"""The GPU bench's measurements where there is no GPU: on tiny shapes, on tensors of the CPU, with kernels in Triton's
interpreter and a clock that says one millisecond. Numbers mean nothing here; that every part gives rows does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bench import gpu, gpu_cases
from bench.gpu_page import page
from codegen import tune

ROOT = Path(__file__).parents[2]
PARTS = tuple(part for part in gpu.PARTS if part != "ceiling")
"""Without products and copies as large as a chip."""


class OnCpu(TorchFunctionMode):
    """Whatever is asked of CUDA is made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        told = {name: "cpu" if value == "cuda" else value for name, value in (kwargs or {}).items()}
        return func(*("cpu" if isinstance(x, str) and x == "cuda" else x for x in args), **told)


def test_every_part_measures(tmp_path: Path) -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "REATTN_CACHE": str(tmp_path)}
    line = [sys.executable, "-W", "ignore", "-m", "tests.unit.test_gpu_dry", str(tmp_path / "rows.jsonl")]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["key"].split()[0] for row in rows} == set(PARTS)
    failed = {row["key"]: row["failed"] for row in rows if "failed" in row}
    # what no CPU has
    assert all("cudnn" in key or "does not support backward on CPU" in why for key, why in failed.items()), failed
    text, wrong = page(rows, "none")
    assert not wrong
    for title in ("Dense causal, backward", "Sparse masks", "Blocks chosen at run time", "One query", "a mask's loops"):
        assert f"## {title}" in text or title in text
    assert "| 96 | vertical_slash(1000, 6096, last=64, forced=30) | 1.000 | 1.000 |" in text


def main(path: str) -> None:
    """Runs in a process of its own, with Triton interpreting."""
    import triton.testing
    from torch.nn.attention import flex_attention

    patch = pytest.MonkeyPatch()
    tiny = gpu_cases.Shape(4, 2, 16, 96)
    few = dict(list(gpu_cases.sparse_masks(96).items())[-3:-1])
    patch.setattr(triton.testing, "do_bench", lambda run, **_: (run(), 1.0)[1])
    for name in ("_MANY", "_FEW", "_DKDV"):
        patch.setattr(tune, name, getattr(tune, name)[:1])
    patch.setattr(gpu_cases, "TOKENS", 96)
    patch.setattr(gpu_cases, "_flex", lambda: (flex_attention.flex_attention, flex_attention.create_block_mask))
    patch.setattr(gpu, "dense_shapes", lambda longest: [tiny])
    patch.setattr(gpu, "sparse_masks", lambda tokens: few)
    patch.setattr(gpu, "SCORED", gpu.SCORED[:1])
    for name, value in (("SPARSE", tiny), ("CONTEXTS", (70,)), ("BUILT", (96,)), ("SELECTED", (96,))):
        patch.setattr(gpu, name, value)
    torch.set_num_threads(1)
    book = gpu.Notebook(Path(path), float("inf"))
    with OnCpu():
        for key, task in gpu.tasks(PARTS, 96, 1):
            book.measure(key, task)


if __name__ == "__main__":
    main(*sys.argv[1:])
