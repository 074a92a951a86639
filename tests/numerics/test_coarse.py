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
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.coarse_cases import SCORED, Scored, drawn, errors, off
from codegen import chip, coarse_launch, launch, lists, lists_launch, oracle
from codegen.given import own_tables
from codegen.lists import Tiling
from codegen.loops import pattern
from codegen.options import Options
from codegen.schedule import Over
from codegen.select import Antidiagonal, Pooled, VerticalSlash
from codegen.spec import KernelSpec
from codegen.triton import arguments, source
from rewrite.mask import Mask, blocks, causal, window

ROOT = Path(__file__).parents[2]
RULES = (Antidiagonal(0.7, 32, 8), Pooled(share=0.4, block=32), VerticalSlash(20, 30, 50, 8))


def _masks() -> dict[str, Mask]:
    """Blocks, columns and diagonals as rules give them, and blocks beside what is solved."""
    made = np.random.default_rng(0)
    q, k = torch.randn(2, 3, 48, 8), torch.randn(2, 3, 48, 8)
    found = {"blocks": Pooled(count=2, block=8)(q, k).mask(), "lines": VerticalSlash(6, 5, 8, 2)(q, k).mask()}
    table = made.random((3, 6, 6)) < 0.4
    return found | {"blocks or near": causal & (blocks(table, 8) | window(5))}


COMPILED: tuple[KernelSpec, ...] = (
    *(
        KernelSpec(phase, dtype, dim, dim, group=group, tiles=(128, 128), block=block, stride=stride)
        for phase, dtype, dim, group, block, stride in (
            ("antidiagonal", "bf16", 128, 4, 128, 16),
            ("antidiagonal", "fp32", 128, 1, 1, 1),
            ("mass", "bf16", 128, 4, 128, 16),
            ("means", "bf16", 128, 4, 64, 1),
            ("columns", "bf16", 128, 4, 1, 1),
        )
    ),
    KernelSpec("listk", "fp32", 16, 16, pattern(_masks()["blocks"]), tiles=(16, 128), stages=1),
)
LISTED = {
    "blocks": Tiling(24, 40, 8, 16, 2, 3),
    "lines": Tiling(21, 45, 8, 8, 2, 3),
    "blocks or near": Tiling(48, 48, 15, 12, 1, 3),
}


def told(task: str, **env: str) -> Any:
    """What another process says: `interpreted` or `compiled` of this file."""
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    line = [sys.executable, "-W", "ignore", "-m", "tests.numerics.test_coarse", task]
    done = subprocess.run(line, cwd=ROOT, env={**plain, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    return told("interpreted", TRITON_INTERPRET="1", REATTN_CACHE=str(tmp_path_factory.mktemp("kernels")))


@pytest.mark.parametrize("case", SCORED, ids=str)
def test_scores_are_those_of_torch(interpreted: dict[str, dict[str, float]], case: Scored) -> None:
    found = interpreted[str(case)]
    assert set(found) == {"antidiagonal", "last row", "pooled", "columns", "diagonals"}
    assert all(e <= 1 for e in found.values()), found


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rules_choose_what_they_choose_in_torch_and_kernels_read_it(
    interpreted: dict[str, dict[str, float]], rule: Antidiagonal | Pooled | VerticalSlash
) -> None:
    found = interpreted[str(rule)]
    assert found["chosen otherwise"] == 0
    assert all(found[name] < 1 for name in "oqkv"), found


def test_lists_are_those_of_torch(interpreted: dict[str, dict[str, float]]) -> None:
    assert interpreted["lists"] == {name: 0 for name in LISTED}


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


def _chosen(rule: Antidiagonal | Pooled | VerticalSlash) -> dict[str, float]:
    """Tables that a rule finds by kernels and in torch, and attention with gradients on the tables as they are."""
    shapes = (2, 72, 32), (1, 168, 32), (1, 168, 32), (2, 72, 32)
    q, k, v, grad = (drawn(*shape, "fp32", i)[:1] for i, shape in enumerate(shapes))
    k = 2 * k
    found, same = rule(q, k), rule(q.double(), k.double())
    mine, theirs = found.selection, same.selection
    other = sum(int((mine.tables[n] != theirs.tables[n]).sum()) for n in mine.tables)
    options = Options(0.2)
    small = {phase: chip.Config(64, 32, 4, 1) for phase in ("forward", "dq", "dkdv")}
    o, lse = launch.forward(q, k, v, mine.algebra, options, small, mine.tables)
    backward = launch.backward(grad, q, k, v, o, lse, mine.algebra, options, False, small, mine.tables)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want, _ = oracle.attention(*leaves, theirs.mask(), options)
    grads = torch.autograd.grad(want, leaves, grad.double())
    wrong = {name: off(backward[name], g) for name, g in zip("qkv", grads, strict=True)}
    return {"chosen otherwise": other, "o": off(o, want.detach()), **wrong}


def _listed(name: str) -> int:
    """Counts and numbers of tiles that a kernel lists otherwise than torch, for loops over keys and over queries."""
    chosen, at, wrong = _masks()[name], LISTED[name], 0
    tables = own_tables(chosen, torch.device("cpu"))
    over: tuple[Over, Over] = ("k", "q")
    for each in over:
        assert lists_launch.refuse(chosen, at, torch.device("cpu")) is None
        mine, theirs = (way.lists(chosen, each, at, tables) for way in (lists_launch, lists))
        for n in ("full", "masked"):
            counts, numbers = getattr(theirs, f"{n}_counts"), getattr(theirs, n)
            wrong += int((getattr(mine, f"{n}_counts") != counts).sum())
            there = torch.arange(numbers.shape[-1]) < counts[..., None]
            wrong += int((getattr(mine, n)[..., : numbers.shape[-1]] != numbers)[there].sum())
    return wrong


def _compiled() -> dict[str, dict[str, Any]]:
    from codegen.compiled import compiled, resources

    found: dict[str, dict[str, Any]] = {}
    for on in (chip.HOPPER, chip.INSTINCT):
        for plain in COMPILED:
            rows = {"means": plain.block, "columns": 64}.get(plain.phase, 4096)
            spec = plain if plain.phase == "listk" else plain.with_config(chip.default(plain, rows, on))
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
    found = {str(case): errors(case) for case in SCORED} | {"lists": {name: _listed(name) for name in LISTED}}
    print(json.dumps(found | {str(rule): _chosen(rule) for rule in RULES}))


if __name__ == "__main__":
    main(*sys.argv[1:])
