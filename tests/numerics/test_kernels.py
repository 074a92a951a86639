"""Generated kernels: their numbers in Triton's interpreter against float64, and what they take when compiled.

Triton decides at import whether it interprets, so both run in processes of their own. The fixed sample here covers
every form of kernel text; `make kernels` runs the whole table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.kernel_cases import DIMS, MASKS, MODIFIERS, Case, table
from bench.kernel_page import page

ROOT = Path(__file__).parents[2]
SAMPLES: dict[str, tuple[Case, ...]] = {
    "prefill": (
        Case("prefill", "fp32", (64, 64), (2, 2), (1, 70, 90), "causal"),
        Case("prefill", "fp16", (64, 64), (7, 1), (1, 40, 40), "sink|window"),
        Case("prefill", "fp16", (96, 40), (4, 2), (2, 33, 50), "all", ("softcap",), lengths=True),
        Case("prefill", "bf16", (32, 32), (4, 2), (1, 40, 24), "causal", ("alibi", "sinks")),
        Case("prefill", "fp16", (16, 48), (4, 2), (3, 33, 75), "window", ("row-bias", "sinks"), lengths=True),
        Case("prefill", "fp32", (72, 64), (2, 1), (1, 48, 48), "strided", ("alibi", "softcap")),
        Case("prefill", "fp16", (32, 32), (4, 2), (1, 64, 64), "documents"),
        Case("prefill", "fp16", (32, 32), (4, 2), (1, 64, 80), "streaming", ("bias",)),
        Case("prefill", "fp16", (192, 128), (2, 2), (1, 48, 48), "chunk"),
        Case("prefill", "fp16", (80, 64), (2, 1), (1, 40, 40), "causal", latent=True),
    ),
    "decode": (
        Case("decode", "fp16", (64, 64), (8, 2), (2, 1, 161), "sink|window", ("sinks",), lengths=True),
        Case("decode", "fp32", (32, 32), (4, 4), (1, 3, 97), "streaming"),
        Case("decode", "bf16", (80, 48), (7, 1), (1, 2, 128), "causal", ("alibi", "softcap")),
        Case("decode", "fp16", (144, 128), (20, 1), (1, 2, 70), "causal", latent=True),
        Case("decode", "fp16", (32, 32), (2, 1), (3, 1, 97), "negated", ("row-bias",), lengths=True),
    ),
    "backward": (
        Case("backward", "fp32", (64, 64), (4, 2), (1, 50, 70), "causal"),
        Case("backward", "fp16", (48, 32), (7, 1), (2, 40, 40), "sink|window", ("sinks",), lengths=True),
        Case("backward", "fp16", (32, 32), (4, 2), (1, 40, 24), "causal", ("bias", "softcap")),
        Case("backward", "bf16", (32, 32), (2, 2), (3, 33, 50), "window", ("alibi", "row-bias"), lengths=True),
        Case("backward", "fp32", (32, 16), (4, 2), (1, 48, 48), "streaming", ("alibi",)),
        Case("backward", "fp16", (32, 32), (2, 1), (1, 64, 64), "documents"),
        Case("backward", "fp16", (32, 32), (1, 1), (1, 64, 64), "dilated"),
    ),
    "listed": (
        Case("prefill", "fp16", (32, 32), (2, 2), (1, 64, 64), "blocks&causal"),
        Case("decode", "fp16", (32, 32), (2, 1), (2, 1, 97), "blocks"),
        Case("backward", "fp32", (32, 32), (2, 1), (2, 50, 64), "blocks", lengths=True),
    ),
}
COMPILED = (
    Case("prefill", "bf16", (64, 64), (4, 4), (1, 64, 64), "causal"),
    Case("prefill", "fp16", (128, 128), (8, 2), (1, 64, 64), "sink|window"),
    Case("decode", "bf16", (128, 128), (8, 2), (1, 1, 64), "causal"),
    Case("backward", "bf16", (128, 128), (8, 2), (1, 64, 64), "causal"),
)


def told(task: str, cases: tuple[Case, ...], **env: str) -> dict[str, dict[str, Any]]:
    """What another process says of each case: `interpreted` or `compiled` of this file's `main`."""
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    names = [str(c) for c in cases]
    line = [sys.executable, "-W", "ignore", "-m", "tests.numerics.test_kernels", task, json.dumps(names)]
    done = subprocess.run(line, cwd=ROOT, env={**plain, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every sample, by one process: a start costs as much as a sample."""
    every = tuple(c for sample in SAMPLES.values() for c in sample)
    return told("interpreted", every, TRITON_INTERPRET="1", REATTN_CACHE=str(tmp_path_factory.mktemp("kernels")))


@pytest.mark.parametrize("sample", SAMPLES)
def test_kernels_compute_attention(sample: str, computed: dict[str, dict[str, Any]]):
    found = {str(c): computed[str(c)] for c in SAMPLES[sample]}
    wrong = {case: errors for case, errors in found.items() if not all(e <= 1 for e in errors.values())}
    assert not wrong


def test_what_compiled_kernels_take(tmp_path: Path, golden: Callable[[str], None]):
    """Registers, spilled bytes and shared memory on sm_90, by the pinned compiler; wgmma and asynchronous copies."""
    found = told("compiled", COMPILED, REATTN_CACHE=str(tmp_path), TRITON_CACHE_DIR=str(tmp_path))
    for title, kernel in found.items():
        assert kernel["shared"] <= 232_448, title
        assert kernel["spilled"] == 0, title
        assert kernel["shared"] == kernel["expected"] or title.startswith(("delta", "combine")), title
        if title.startswith(("forward", "dq", "dkdv")):
            assert kernel["wgmma"], title
            assert kernel["copies"], title
    golden("\n".join(f"{title}: {kernel['text']}" for title, kernel in found.items()))


def test_the_other_makers_chip(tmp_path: Path):
    found = told("foreign", COMPILED[:1], REATTN_CACHE=str(tmp_path), TRITON_CACHE_DIR=str(tmp_path))
    assert all(kernel["registers"] > 0 and kernel["shared"] <= 65_536 for kernel in found.values())


def test_the_table_covers_what_it_says():
    cases = table()
    assert len(cases) >= 200
    assert len({str(c) for c in cases}) == len(cases)
    for phase in ("prefill", "decode", "backward"):
        mine = [c for c in cases if c.phase == phase]
        assert {c.mask for c in mine} == set(MASKS)
        assert {m for c in mine for m in c.modifiers} == set(MODIFIERS)
        assert {c.dtype for c in mine} == {"fp16", "bf16", "fp32"}
        assert {c.dims for c in mine} >= set(DIMS)
        assert any(c.lengths and c.sizes[0] > 2 for c in mine)
        assert {c.heads[0] // c.heads[1] for c in mine} >= {1, 2, 3, 4, 7}


def test_what_is_wrong_is_said():
    title = "forward bf16 dqk=64 dv=64"
    good = {"title": "prefill fp16 x", "errors": {"o": 0.5}}
    fits = {"title": title, "chip": "sm_90", "registers": 200, "spilled": 0, "shared": 1000}
    limits = {"sm_90": 232_448}
    assert page([good], [fits], limits)[1] == []
    assert page([{**good, "errors": {"o": 1.5}}], [], limits)[1] == ["prefill fp16 x: o is off by 1.5 of its bound"]
    assert page([{**good, "errors": {"o": float("nan")}}], [], limits)[1]
    assert page([], [{**fits, "spilled": 8}], limits)[1] == [f"{title} spills 8 bytes"]
    assert page([], [fits], {"sm_90": 999})[1] == [f"{title} for sm_90 needs 1,000 bytes of shared memory"]


def _compiled(case: Case, name: str) -> dict[str, dict[str, Any]]:
    from bench.kernels import specs
    from codegen.chip import HOPPER, INSTINCT, shared
    from codegen.compiled import compiled, resources

    found: dict[str, dict[str, Any]] = {}
    for spec in specs(case, HOPPER if name == HOPPER.name else INSTINCT):
        used, ptx = resources(spec, name), compiled(spec, name).asm.get("ptx", "")
        found[str(spec)] = {
            "text": str(used), "registers": used.registers, "spilled": used.spilled, "shared": used.shared,
            "expected": shared(spec), "wgmma": "wgmma.mma_async" in ptx, "copies": "cp.async" in ptx,
        }  # fmt: skip
    return found


def main(task: str, names: str) -> None:
    """Runs in a process of its own and prints a line of JSON."""
    from bench.kernels import interpreted

    every = {str(c): c for c in (*COMPILED, *(c for sample in SAMPLES.values() for c in sample))}
    cases = [every[name] for name in json.loads(names)]
    if task == "interpreted":
        print(json.dumps({str(c): interpreted(c) for c in cases}))
    else:
        chip = "gfx942" if task == "foreign" else "sm_90"
        print(json.dumps({title: kernel for c in cases for title, kernel in _compiled(c, chip).items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
