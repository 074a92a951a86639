"""Every generated kernel against float64 in Triton's interpreter, and compiled: `python -m bench.kernels`.

Neither needs a GPU. Results are kept by the kernels' text in out/kernels, so that a run that was stopped goes on where
it was, and docs/kernels.md is written from them with `--write`. What a compiled kernel may use of the chip is part of
the result: no spills in the default tiles of head dims 64 and 128, shared memory within a block's limit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.kernel_cases import Case, inputs, table
from codegen.chip import HOPPER, INSTINCT, Chip, Config, default
from codegen.spec import KernelSpec, Phase

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "out" / "kernels"
PAGE = ROOT / "docs" / "kernels.md"
SMALL = {phase: Config(32, 16, 4, 1) for phase in ("forward", "dq", "dkdv")} | {"decode": Config(16, 16, 4, 1)}
"""Tiles in the interpreter: several of each in few tokens."""
PHASES: dict[str, tuple[Phase, ...]] = {
    "prefill": ("forward",),
    "decode": ("decode", "combine"),
    "backward": ("delta", "dkdv", "dq"),
}
CHIPS = (HOPPER, INSTINCT)
LONG = 4096
"""Queries of a prefill for which tiles are chosen; the kernel serves every length."""


def specs(case: Case, on: Chip = HOPPER) -> list[KernelSpec]:
    """The kernels of a case in the default tiles of a chip, as they run there."""
    import torch

    from codegen.launch import Call

    x = inputs(case)
    queries = case.sizes[1] if case.phase == "decode" else LONG
    heads, dim = x.q.shape[1], x.q.shape[-1]
    q = torch.empty(1, heads, queries, dim, dtype=x.q.dtype, device="meta")
    call = Call(q, x.k, x.v, x.mask, x.options, {})
    found: list[KernelSpec] = []
    for phase in PHASES[case.phase]:
        if phase in ("combine", "delta"):
            more = case.lengths and phase == "delta"
            found.append(KernelSpec(phase, case.dtype, case.dims[1], case.dims[1], lengths=more))
        elif phase in ("forward", "decode"):
            found.append(call.spec(phase, latent=case.latent))
        else:
            found.append(call.spec(phase, dbias=phase == "dq" and "bias" in case.modifiers))
    rows = [call.rows(spec.packed) for spec in found]
    placed = [spec.with_config(default(spec, n, on)) for spec, n in zip(found, rows, strict=True)]
    return [replace(spec, upcast=False) for spec in placed]  # as it is outside the interpreter


def interpreted(case: Case) -> dict[str, float]:
    """Largest error over its bound of each result of a case, in Triton's interpreter."""
    import torch

    from bench.kernel_reference import expected
    from codegen import launch

    torch.use_deterministic_algorithms(True)  # tensors that are made empty hold NaN
    x = inputs(case)
    heads = case.heads[0] // case.heads[1]
    small = SMALL | ({"forward": Config(16, 16, 4, 1)} if case.phase == "prefill" and heads == 1 else {})
    backward = case.phase == "backward"
    with torch.no_grad():
        o, lse = launch.forward(x.q, x.k, x.v, x.mask, x.options, small)
        found = {"o": o, "lse": lse}
        if backward:
            asked = "bias" in case.modifiers
            found |= launch.backward(x.grad, x.q, x.k, x.v, o, lse, x.mask, x.options, asked, small)
    wanted = expected(x, backward, truncated=launch.interpreting())
    return {name: round(value.excess(found[name]), 4) for name, value in wanted.items()}


def digest(case: Case) -> str:
    """What an interpreted result hangs on: the case and the texts of its kernels."""
    from codegen.triton import source

    return hashlib.sha256("".join([str(case), *map(source, specs(case))]).encode()).hexdigest()[:16]


def kept(name: str) -> dict[str, dict[str, Any]]:
    """Earlier results by their key; what failed is tried again."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(KEPT.glob(f"{name}-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "failed" not in row:
                found[row["key"]] = row
    return found


def work(name: str, share: str, todo: Iterable[tuple[str, str, Callable[[], dict[str, Any]]]]) -> None:
    """Does what is not kept yet of every n-th task, (key, title, function) each, and keeps it line by line."""
    part, parts = map(int, share.split("/"))
    done = kept(name)
    KEPT.mkdir(parents=True, exist_ok=True)
    with (KEPT / f"{name}-{part}.jsonl").open("a", encoding="utf-8") as file:
        for i, (key, title, task) in enumerate(todo):
            if i % parts != part or key in done:
                continue
            begin = time.process_time()
            row = {"key": key, "title": title, **task()}
            file.write(json.dumps({**row, "seconds": round(time.process_time() - begin, 2)}) + "\n")
            file.flush()


def interpret(share: str, cases: Sequence[Case]) -> None:
    """One worker over cases; TRITON_INTERPRET=1 must be set."""

    def task(case: Case) -> dict[str, Any]:
        try:
            return {"errors": interpreted(case)}
        except Exception as error:  # a case that fails is a row of the result, not the end of it
            return {"errors": {}, "failed": f"{type(error).__name__}: {error}"[:400]}

    work("interpreted", share, ((digest(c), str(c), lambda c=c: task(c)) for c in cases))


def compile_all(share: str, cases: Sequence[Case]) -> None:
    """One worker over the kernels of cases, for each chip."""
    from codegen.compiled import resources

    def task(spec: KernelSpec, chip: Chip) -> dict[str, Any]:
        try:
            used = resources(spec, chip.name)
        except Exception as error:  # likewise
            return {"chip": chip.name, "failed": f"{type(error).__name__}: {error}"[:400]}
        return {"chip": chip.name, "registers": used.registers, "spilled": used.spilled, "shared": used.shared}

    todo = [(key, str(spec), lambda spec=spec, chip=chip: task(spec, chip)) for key, spec, chip in kernels(cases)]
    work("compiled", share, todo)


def kernels(cases: Sequence[Case]) -> list[tuple[str, KernelSpec, Chip]]:
    """Every kernel of cases once for each chip, with a key that hangs on its text."""
    from codegen.triton import source

    unique = dict.fromkeys((spec, chip) for chip in CHIPS for case in cases for spec in specs(case, chip))
    return [(f"{hashlib.sha256(source(s).encode()).hexdigest()[:16]}-{c.name}", s, c) for s, c in unique]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is left, in two processes, and writes the page. 1 where a kernel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="cases whose line holds this")
    parser.add_argument("--write", action="store_true", help="write docs/kernels.md")
    parser.add_argument("--interpret", metavar="I/N", help="one worker of the interpreter")
    parser.add_argument("--compile", metavar="I/N", help="one worker of the compiler")
    parser.add_argument("--processes", type=int, default=2)
    told = parser.parse_args(arguments)
    cases = [c for c in table() if told.only in str(c)]
    if told.interpret:
        interpret(told.interpret, cases)
    elif told.compile:
        compile_all(told.compile, cases)
    else:
        for kind in ("interpret", "compile"):
            _processes(kind, told.processes, told.only)
        return _page(cases, told.write)
    return 0


def _processes(kind: str, count: int, only: str) -> None:
    """Workers of one kind, all at once."""
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env = plain | ({"TRITON_INTERPRET": "1"} if kind == "interpret" else {})
    line = [sys.executable, "-m", "bench.kernels", "--only", only]
    started = [subprocess.Popen([*line, f"--{kind}", f"{i}/{count}"], env=env, cwd=ROOT) for i in range(count)]
    codes = [process.wait() for process in started]
    if any(codes):
        raise SystemExit(f"a worker of {kind} ended with {max(codes)}")


def _page(cases: Sequence[Case], write: bool) -> int:
    from bench.kernel_page import page

    ran, built = kept("interpreted"), kept("compiled")
    keys = {digest(c) for c in cases}
    rows = [row for key, row in ran.items() if key in keys]
    wanted = [key for key, _, _ in kernels(cases)]
    made = [built[key] for key in wanted if key in built]
    left = len(keys) - len(rows) + len(wanted) - len(made)
    text, wrong = page(rows, made, {c.name: c.shared for c in CHIPS}, left)
    if write:
        PAGE.write_text(text, encoding="utf-8")
    print(text if wrong or not write else f"wrote {PAGE}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
