"""Generated kernels on a GPU, in one call: `python -m bench.gpu` checks their numbers first, then times them.

Rows are kept in out/gpu as they are measured, so that a call with `--minutes` stops in time and the next one goes on.
The page is bench/results/<date>-<gpu>.md. Beside ours: PyTorch's dense attention (flash, cuDNN), FlexAttention with
the same mask, and this GPU's own matrix products, of which all speeds are fractions.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bench.coarse_cases import SCORED, errors
from bench.gpu_cases import (
    Rule,
    Shape,
    clustered,
    dense_shapes,
    flex,
    rules,
    sdpa,
    sparse_masks,
    streaming_heads,
    tensors,
)
from bench.gpu_page import page
from bench.kernel_cases import Case, inputs, table
from codegen.options import Options
from rewrite import mask as masks
from rewrite.mask import Mask, causal

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "out" / "gpu"
RESULTS = ROOT / "bench" / "results"
PARTS = ("correct", "ceiling", "dense", "sparse", "select", "decode", "build")
Row = dict[str, Any]
SPARSE = Shape(16, 4, 128, 32_768)
CONTEXTS = (8192, 32_768, 131_072)
BUILT = (32_768, 131_072)
SELECTED = (32_768, 131_072)
"""Tokens of a prompt whose blocks are chosen at run time."""


@dataclass
class Notebook:
    """Rows measured so far on this GPU, by key, in a file that grows; and when to stop."""

    path: Path
    until: float
    rows: dict[str, Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self.rows[row["key"]] = row

    def measure(self, key: str, task: Callable[[], Row]) -> None:
        """Runs what is not measured yet while there is time; what fails is a row that says so."""
        if key in self.rows or time.monotonic() > self.until:
            return
        try:
            row = {"key": key, **task()}
        except Exception as error:  # a peer that cannot run a shape must not end the call
            row = {"key": key, "failed": f"{type(error).__name__}: {error}"[:300]}
            torch.cuda.empty_cache()
        self.rows[key] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def milliseconds(run: Callable[[], Any], rep: int = 60) -> float:
    """Median time of a call on the GPU."""
    from triton.testing import do_bench

    found: Any = do_bench(run, warmup=20, rep=rep, return_mode="median")
    return float(found)


def correct(case: Case) -> Row:
    """Largest error over its bound of every result of a case, in the default tiles on the GPU."""
    from bench.kernel_reference import expected
    from codegen import launch

    torch.use_deterministic_algorithms(True, warn_only=True)  # tensors that are made empty hold NaN
    x = inputs(case, "cuda")
    backward = case.phase == "backward"
    with torch.no_grad():
        o, lse = launch.forward(x.q, x.k, x.v, x.mask, x.options)
        found = {"o": o, "lse": lse}
        if backward:
            found |= launch.backward(x.grad, x.q, x.k, x.v, o, lse, x.mask, x.options, "bias" in case.modifiers)
    torch.use_deterministic_algorithms(False)
    on_cpu = inputs(case)
    return {"errors": {name: round(value.excess(found[name]), 4) for name, value in expected(on_cpu, backward).items()}}


def ceiling() -> Row:
    """TFLOP/s of a large matrix product in bf16, and TB/s of a copy."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    matmul = 2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9
    copy = 2 * source.numel() * 2 / milliseconds(lambda: target.copy_(source)) / 1e9
    return {"matmul": round(matmul, 1), "copy": round(copy, 3)}


def ours(shape: Shape, mask: Mask) -> Row:
    """Milliseconds of our kernels, forward and backward, in the tiles that are fastest for causal attention."""
    from codegen import launch

    q, k, v = (x.detach() for x in tensors(shape))
    options = Options(scale=shape.scale)
    configs = launch.tune(q, k, v, causal, options, True)
    row: Row = {"tiles": {phase: list(c) for phase, c in configs.items()}}
    row["forward"] = milliseconds(lambda: launch.forward(q, k, v, mask, options, configs))
    o, lse = launch.forward(q, k, v, mask, options, configs)
    grad = torch.randn_like(o)
    told = (grad, q, k, v, o, lse, mask, options, False, configs)
    row["backward"] = milliseconds(lambda: launch.backward(*told))
    return row


def peer(shape: Shape, attend: Callable[..., Any], gradients: bool) -> Row:
    """Milliseconds of another implementation."""
    q, k, v = tensors(shape)
    with torch.no_grad():
        row: Row = {"forward": milliseconds(lambda: attend(q, k, v))}
    if gradients:
        o = attend(q, k, v)
        grad = torch.randn_like(o)
        row["backward"] = milliseconds(lambda: torch.autograd.grad(o, (q, k, v), grad, retain_graph=True))
    return row


def dense(shape: Shape) -> Iterator[tuple[str, Callable[[], Row]]]:
    """(who, measurement) of dense causal attention."""
    yield "ours", lambda: ours(shape, causal)
    yield "flash", lambda: peer(shape, sdpa("flash", shape), True)
    yield "cudnn", lambda: peer(shape, sdpa("cudnn", shape), True)
    yield "flex", lambda: peer(shape, flex(shape, causal)[0], True)


def density(mask: Mask, tokens: int) -> float:
    """Pairs read over all pairs."""
    return float(mask.density(tokens, tokens))


def sparse(shape: Shape, mask: Mask) -> Iterator[tuple[str, Callable[[], Row]]]:
    """(who, measurement) on a sparse mask."""
    share = density(mask, shape.tokens)
    yield "ours", lambda: {**ours(shape, mask), "density": share}
    yield "flex", lambda: peer(shape, flex(shape, mask)[0], True)


def select(rule: Rule, shape: Shape) -> Row:
    """Milliseconds of a rule's choice, of the lists made of it, of attention over it (its lists included), and of our
    dense attention; and the tiles that it visits as a share of causal attention's."""
    from codegen import launch
    from codegen.given import tiling
    from codegen.lists import lists

    q, k, v = clustered(shape)
    options = Options(scale=shape.scale)
    configs = launch.tune(q, k, v, causal, options)
    found = rule(q, k).selection
    call = launch.Call(q, k, v, found.algebra, options, configs, found.tables)
    spec = call.spec("forward", latent=False)
    made = call.lists(spec)
    visited = float(made["full_counts"].sum() + made["masked_counts"].sum())
    whole = lists(causal, "k", tiling(causal, spec, q, k))
    seen = float(whole.full_counts.sum() + whole.masked_counts.sum()) * shape.heads * shape.batch
    return {
        "choose": milliseconds(lambda: rule(q, k)),
        "lists": milliseconds(lambda: replace(call).lists(spec)),
        "attend": milliseconds(lambda: launch.forward(q, k, v, found.algebra, options, configs, found.tables)),
        "dense": milliseconds(lambda: launch.forward(q, k, v, causal, options, configs)),
        "share": visited / seen,
        "tokens": shape.tokens,
    }


def decode(context: int) -> Row:
    """Milliseconds and TB/s of one query a row over a long context: ours, and PyTorch's."""
    from codegen import launch

    q = torch.randn(4, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(4, 8, context, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    options = Options(scale=128**-0.5)
    launch.tune(q, k, v, causal, options)
    mine = milliseconds(lambda: launch.forward(q, k, v, causal, options))
    attend = torch.nn.functional.scaled_dot_product_attention
    theirs = milliseconds(lambda: attend(q, k, v, scale=options.scale, enable_gqa=True))
    size = (k.numel() + v.numel()) * 2
    return {"ours": mine, "sdpa": theirs, "ours TB/s": size / mine / 1e9, "sdpa TB/s": size / theirs / 1e9}


def build(tokens: int) -> Row:
    """Milliseconds to have a mask's loops: our schedule from nothing, FlexAttention's block mask."""
    from codegen.schedule import schedule

    mask = causal & (masks.sink(64) | masks.window(1024))
    begin = time.perf_counter()
    schedule(mask, "k")
    mine = 1e3 * (time.perf_counter() - begin)
    shape = Shape(1, 1, 64, tokens)
    make = flex(shape, mask)[1]
    return {"ours": mine, "flex": milliseconds(make), "tokens": tokens}


def tasks(parts: Sequence[str], longest: int, count: int) -> Iterator[tuple[str, Callable[[], Row]]]:
    """(key, measurement) of the parts, correctness first."""
    for part in PARTS:
        if part in parts:
            for key, task in _part(part, longest, count):
                yield f"{part} {key}".strip(), task


Tasks = Iterator[tuple[str, Callable[[], Row]]]


def _part(part: str, longest: int, count: int) -> Tasks:
    if part == "correct":
        yield from _checks(count)
    elif part == "ceiling":
        yield "", ceiling
    elif part == "dense":
        for shape in dense_shapes(longest):
            yield from ((f"{shape} {who}", task) for who, task in dense(shape))
    elif part == "sparse":
        named = sparse_masks(SPARSE.tokens) | {"half of the heads streaming": streaming_heads(SPARSE)}
        for name, mask in {"causal": causal, **named}.items():
            yield from ((f"{name} {who}", task) for who, task in sparse(SPARSE, mask))
    elif part == "select":
        yield from _choices()
    else:
        sizes, task = (CONTEXTS, decode) if part == "decode" else (BUILT, build)
        for size in sizes:
            yield str(size), lambda size=size: task(size)


def _checks(count: int) -> Tasks:
    """Kernels of attention, then those that choose."""
    cases = table()
    for case in cases[:: max(1, len(cases) // count)]:
        yield str(case), lambda case=case: correct(case)
    for scored in SCORED:
        yield str(scored), lambda scored=scored: {"errors": errors(scored, "cuda")}


def _choices() -> Tasks:
    for tokens in SELECTED:
        shape = replace(SPARSE, tokens=tokens)
        for rule in rules():
            yield f"{tokens} {rule}", lambda rule=rule, shape=shape: select(rule, shape)


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(description="check generated kernels on this GPU, then time them")
    made.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    made.add_argument("--minutes", type=float, default=60.0, help="start nothing new after so long")
    made.add_argument("--longest", type=int, default=65_536, help="tokens of the longest dense table row")
    made.add_argument("--cases", type=int, default=60, help="how many cases are checked")
    made.add_argument("--fresh", action="store_true", help="forget earlier rows")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, writes the page, and says 1 where a number is wrong, 2 where nothing can be measured."""
    told = parser().parse_args(arguments)
    parts = told.parts.split(",")
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        print(f"no part is called {', '.join(unknown)}; there are {', '.join(PARTS)}")
        return 2
    if not torch.cuda.is_available():
        print("no GPU is at hand: `python -m bench.kernels` checks the kernels without one")
        return 2
    gpu = torch.cuda.get_device_name().replace(" ", "-")
    path = KEPT / f"{gpu}.jsonl"
    if told.fresh:
        path.unlink(missing_ok=True)
    book = Notebook(path, time.monotonic() + 60 * told.minutes)
    for key, task in tasks(parts, told.longest, told.cases):
        book.measure(key, task)
    text, wrong = page(list(book.rows.values()), gpu)
    RESULTS.mkdir(parents=True, exist_ok=True)
    target = RESULTS / f"{datetime.date.today()}-{gpu}.md"
    target.write_text(text, encoding="utf-8")
    print(f"wrote {target}; {len(wrong)} results are wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
