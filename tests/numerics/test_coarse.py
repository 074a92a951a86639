"""Kernels that choose: their scores in Triton's interpreter against torch, what is chosen, attention over it on tables
that are given beside the mask, and what the kernels take when compiled.

Triton decides at import whether it interprets, so both run in processes of their own. Tensors are slices of larger ones
that hold NaN, and what is made empty holds NaN.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from codegen import chip, coarse, coarse_launch, launch, oracle
from codegen.options import Options
from codegen.select import Antidiagonal, Blocks, Pooled, VerticalSlash
from codegen.spec import KernelSpec
from codegen.triton import arguments, source

ROOT = Path(__file__).parents[2]
CLOSE = 1e-5
"""Sums of up to a few dozen probabilities, whose logits are float32 sums: 4e-6 at the most where all is well."""


@dataclass(frozen=True)
class Case:
    """Heads of queries and keys, tokens of both, a head's dim, and blocks of groups."""

    dtype: torch.dtype
    heads: tuple[int, int]
    tokens: tuple[int, int]
    dim: int
    block: int
    stride: int


SCORED = (
    Case(torch.float32, (4, 2), (200, 200), 64, 32, 8),
    Case(torch.float16, (3, 1), (130, 194), 40, 64, 4),
    Case(torch.bfloat16, (2, 2), (70, 70), 72, 16, 16),
    Case(torch.float16, (4, 4), (40, 168), 96, 128, 16),
    Case(torch.float32, (2, 1), (41, 33), 16, 8, 1),
    Case(torch.bfloat16, (2, 1), (650, 650), 16, 48, 3),
)
RULES = (Antidiagonal(0.7, 32, 8), Pooled(share=0.4, block=32), VerticalSlash(20, 30, 50, 8))
COMPILED: tuple[KernelSpec, ...] = tuple(
    KernelSpec(phase, dtype, dim, dim, group=group, tiles=(128, 128), block=block, stride=stride)
    for phase, dtype, dim, group, block, stride in (
        ("antidiagonal", "bf16", 128, 4, 128, 16),
        ("antidiagonal", "fp32", 128, 1, 1, 1),
        ("mass", "bf16", 128, 4, 128, 16),
        ("means", "bf16", 128, 4, 64, 1),
        ("columns", "bf16", 128, 4, 1, 1),
    )
)


def drawn(heads: int, tokens: int, dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    """(2, heads, tokens, dim) as a slice of what holds NaN."""
    room = torch.full((2, tokens + 2, heads, dim), torch.nan, dtype=dtype)
    room[:, 1:-1] = torch.randn(2, tokens, heads, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return room[:, 1:-1].transpose(1, 2)


def told(task: str, **env: str) -> Any:
    """What another process says: `interpreted` or `compiled` of this file."""
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    line = [sys.executable, "-W", "ignore", "-m", "tests.numerics.test_coarse", task]
    done = subprocess.run(line, cwd=ROOT, env={**plain, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return told("interpreted", TRITON_INTERPRET="1", REATTN_CACHE=str(tmp_path_factory.mktemp("kernels")))


@pytest.mark.parametrize("what", ["antidiagonal", "last rows", "pooled", "columns", "diagonals"])
def test_scores_are_those_of_torch(interpreted: dict[str, float], what: str) -> None:
    errors = {case: e for case, e in interpreted.items() if case.startswith(what)}
    assert len(errors) == (len(SCORED) if what != "last rows" else 5)
    assert all(e <= CLOSE for e in errors.values()), errors


def test_rules_choose_what_they_choose_in_torch_and_kernels_read_it(interpreted: dict[str, float]) -> None:
    for rule in RULES:
        assert interpreted[f"chosen otherwise {rule}"] == 0
        assert all(interpreted[f"{name} {rule}"] < 1e-5 for name in "oqkv"), rule


def test_kernels_for_chips_that_are_not_here(tmp_path: Path) -> None:
    """No spills in 16 bits, products by wgmma with copies ahead, shared memory within a block's."""
    found = told("compiled", REATTN_CACHE=str(tmp_path), TRITON_CACHE_DIR=str(tmp_path))
    limits = {c.name: c.shared for c in (chip.HOPPER, chip.INSTINCT)}
    assert len(found) == 2 * len(COMPILED)
    for title, kernel in found.items():
        assert kernel["shared"] <= limits[title.split()[0]], title
        assert kernel["spilled"] == 0, title
        if title.startswith("sm_90 antidiagonal") and "fp32" not in title:
            assert kernel["wgmma"], title
            assert kernel["copies"], title


def test_a_spec_says_all_of_a_kernel() -> None:
    spec = COMPILED[0]
    assert source(spec) == source(COMPILED[0].with_tiles(spec.tiles, spec.warps, spec.stages))
    assert len({s.name for s in COMPILED}) == len(COMPILED)
    for each in COMPILED:
        assert f"def {each.name}(" in source(each)
        assert str(each) in source(each)
        body = source(each).split("):", 1)[1]
        assert all(re.search(rf"\b{a.name}\b", body) for a in arguments(each)), each
    with pytest.raises(ValueError, match="blocks of 48 in groups of 16 do not divide tiles of 128 groups"):
        KernelSpec("mass", "fp32", 64, 64, tiles=(16, 128), block=48, stride=16)
    with pytest.raises(ValueError, match="diagonals of 64 queries need tiles of as many keys, and these have 32"):
        KernelSpec("columns", "fp32", 64, 64, tiles=(64, 32))


def test_what_kernels_do_not_score_is_left_to_torch() -> None:
    q = torch.zeros(1, 1, 8, 16)
    assert "the queries are on cpu" in str(coarse_launch.refuse(q, 1.0))
    q = torch.zeros(1, 1, 8, 16, device="meta")
    assert not launch.interpreting()
    assert "the queries are on meta" in str(coarse_launch.refuse(q, 1.0))


def _scored(case: Case) -> dict[str, float]:
    (heads, kv_heads), (queries, keys) = case.heads, case.tokens
    q, k = drawn(heads, queries, case.dim, case.dtype, 1), 2 * drawn(kv_heads, keys, case.dim, case.dtype, 2)
    exact = q.double(), k.double()
    rows, scale = -(-queries // case.block), case.dim**-0.5
    told = scale / case.stride, case.block, case.stride
    want = _real(coarse.antidiagonal(*exact, *told)(0, rows))
    mine = coarse_launch.antidiagonal(q, k, *told)
    found = {"antidiagonal": _off(mine(0, rows), want)}
    if rows > 2:
        found["last rows"] = _off(mine(2, rows), want[:, :, 2:])
    pooled = (way.pooled(*x, scale, case.block)(0, rows) for way, x in ((coarse_launch, (q, k)), (coarse, exact)))
    found["pooled"] = _off(next(pooled), _real(next(pooled)))
    last = q[:, :, -min(queries, 60) :]
    for name, a, b in zip(
        ("columns", "diagonals"),
        coarse_launch.columns(last, k, scale),
        coarse.columns(*_reading(last.double(), exact[1]), scale),
        strict=True,
    ):
        found[name] = _off(a, b)
    return found


def _reading(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Without queries that stand before the first key, which torch's softmax gives NaN."""
    return q[:, :, max(0, q.shape[2] - k.shape[2]) :], k


def _real(scores: Tensor) -> Tensor:
    """Rows that may read nothing hold NaN in torch: 0 in kernels, and nothing of them is chosen."""
    return scores.nan_to_num(0.0)


def _off(mine: Tensor, theirs: Tensor) -> float:
    assert mine.dtype == torch.float32
    return float((mine - theirs).abs().amax())


def _chosen(rule: Antidiagonal | Pooled | VerticalSlash) -> dict[str, float]:
    """Tables that a rule finds by kernels and in torch, and attention with gradients on the tables as they are."""
    shapes = (4, 100, 32), (2, 196, 32), (2, 196, 32), (4, 100, 32)
    q, k, v, grad = (drawn(*shape, torch.float32, i)[:1] for i, shape in enumerate(shapes))
    k = 2 * k
    found, same = rule(q, k), rule(q.double(), k.double())
    mine, theirs = (x.selection if isinstance(x, Blocks) else x for x in (found, same))
    other = sum(int((mine.tables[n] != theirs.tables[n]).sum()) for n in mine.tables)
    options = Options(0.2)
    small = {phase: chip.Config(64, 32, 4, 1) for phase in ("forward", "dq", "dkdv")}
    o, lse = launch.forward(q, k, v, mine.algebra, options, small, mine.tables)
    backward = launch.backward(grad, q, k, v, o, lse, mine.algebra, options, False, small, mine.tables)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want, _ = oracle.attention(*leaves, theirs.mask(), options)
    grads = torch.autograd.grad(want, leaves, grad.double())
    errors = {"o": _off(o, want.detach())}
    errors |= {name: _off(backward[name], g) / float(g.abs().amax()) for name, g in zip("qkv", grads, strict=True)}
    return {"chosen otherwise": other, **errors}


def _compiled() -> dict[str, dict[str, Any]]:
    from codegen.compiled import compiled, resources

    found: dict[str, dict[str, Any]] = {}
    for on in (chip.HOPPER, chip.INSTINCT):
        for plain in COMPILED:
            rows = {"means": plain.block, "columns": 64}.get(plain.phase, 4096)
            spec = plain.with_config(chip.default(plain, rows, on))
            used, ptx = resources(spec, on.name), compiled(spec, on.name).asm.get("ptx", "")
            found[f"{on.name} {spec}"] = {
                "spilled": used.spilled,
                "shared": used.shared,
                "wgmma": "wgmma.mma_async" in ptx,
                "copies": "cp.async" in ptx,
            }
    return found


def main(task: str) -> None:
    """Runs in a process of its own and prints a line of JSON."""
    torch.set_num_threads(1)
    if task == "compiled":
        print(json.dumps(_compiled()))
        return
    torch.use_deterministic_algorithms(True)
    found = {f"{name} {case}": e for case in SCORED for name, e in _scored(case).items()}
    print(json.dumps(found | {f"{name} {rule}": e for rule in RULES for name, e in _chosen(rule).items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
