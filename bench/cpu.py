"""Sparse prefill on a CPU: what a mask's density is worth in time. `python -m bench.cpu --write` writes docs/cpu.md.

CPU seconds of one thread (other work on the machine does not count as time, but shares caches and clock), every form in
turn, round after round: ratios are taken within a round, and their median is shown.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from codegen import cpu, oracle
from codegen.options import Options
from rewrite.mask import Mask, all_, causal, sink, window

ROOT = Path(__file__).parent.parent
TOKENS, HEADS, DIM, SINK, WIDTH = 16384, 8, 64, 64, 1024
WIDTHS = (4096, 2048, 1024, 512)
DENSE, FLEX = "torch, dense causal", "FlexAttention, compiled"
SAMPLED = 61
"""Every so many queries are compared with the oracle."""


def near(width: int) -> Mask:
    """The mask of the bench."""
    return causal & (window(width) | sink(SINK))


def density(width: int) -> float:
    """Allowed pairs of all that causality allows."""
    pairs = sum(min(at + 1, width + min(SINK, max(0, at + 1 - width))) for at in range(TOKENS))
    return pairs / (TOKENS * (TOKENS + 1) / 2)


def seconds(run: Callable[[], Any]) -> float:
    """CPU seconds of the process."""
    start = time.process_time()
    run()
    return time.process_time() - start


def flex(q: Tensor, k: Tensor, v: Tensor) -> tuple[Callable[[], Tensor], float, float]:
    """FlexAttention on the same mask; CPU seconds of its block mask, and wall seconds of its compiler."""

    def allowed(b: Tensor, h: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
        return (k_at <= q_at) & ((q_at - k_at < WIDTH) | (k_at < SINK))

    made: list[Any] = []
    mask_seconds = seconds(
        lambda: made.append(create_block_mask(allowed, None, None, TOKENS, TOKENS, device="cpu", BLOCK_SIZE=128))
    )
    compiled = torch.compile(flex_attention)
    start = time.perf_counter()
    with torch.no_grad():
        compiled(q, k, v, block_mask=made[0])
    return lambda: compiled(q, k, v, block_mask=made[0]), mask_seconds, time.perf_counter() - start


def error(q: Tensor, k: Tensor, v: Tensor, o: Tensor, mask: Mask) -> float:
    """The largest difference from the oracle in float64, over some queries of the first two heads."""
    rows = torch.arange(0, TOKENS, SAMPLED)
    keep = torch.from_numpy(mask.holds(rows.numpy()[:, None], torch.arange(TOKENS).numpy()[None]))
    bias = torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, -torch.inf)
    exact, _ = oracle.attention(
        q[:, :2, rows].double(), k[:, :2].double(), v[:, :2].double(), all_, Options(DIM**-0.5, bias=bias)
    )
    return float((o[:, :2, rows].double() - exact).abs().max())


def measured(rounds: int, with_flex: bool) -> tuple[dict[str, list[float]], list[str]]:
    """CPU seconds by form, and what else is to be said."""
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, TOKENS, DIM, generator=make) for _ in range(3))
    runs: dict[str, Callable[[], Any]] = {
        DENSE: lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    }
    for width in WIDTHS:
        runs[ours(width)] = partial(cpu.forward, q, k, v, near(width), Options(DIM**-0.5))
    worst = max(error(q, k, v, runs[ours(width)]()[0], near(width)) for width in WIDTHS)
    notes = [f"Largest difference from attention in float64, over every {SAMPLED}th query: {worst:.1e}."]
    if with_flex:
        runs[FLEX], mask_seconds, compiling = flex(q, k, v)
        notes.append(
            f"FlexAttention besides takes {mask_seconds:.1f} CPU-s for its block mask at this length, "
            f"and {compiling:.0f} s of wall time to compile."
        )
    found: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for name, run in runs.items():
                took = seconds(run)
                found[name] += [took] if turn else []
    return found, notes


def ours(width: int) -> str:
    """The label of a row of ours."""
    return f"ours, window({width:,}) and sink({SINK})"


def page(found: Mapping[str, Sequence[float]], notes: Sequence[str]) -> str:
    """The text of docs/cpu.md."""
    lines = [
        "# Sparse attention on a CPU",
        "",
        "Written by `python -m bench.cpu --write`. Causal attention with a window and a sink (the first keys), "
        f"{TOKENS:,} tokens,",
        f"{HEADS} heads of {DIM}, float32, one thread. CPU seconds, medians of {len(found[DENSE])} rounds; every form "
        "runs in every round, and ratios",
        "are taken within a round. Density: allowed pairs of those that dense causal attention computes.",
        f"torch {torch.__version__}, {platform.machine()}.",
        "",
        "| | density | CPU-s | times faster than dense | CPU-s / density, to their mean |",
        "|---|---|---|---|---|",
    ]
    per = {w: statistics.median(t / density(w) for t in found[ours(w)]) for w in WIDTHS}
    mean = statistics.geometric_mean(per.values())
    order = [(DENSE, 1.0, None), *((ours(w), density(w), per[w] / mean) for w in WIDTHS)]
    if FLEX in found:
        order.append((f"{FLEX}, window({WIDTH:,}) and sink({SINK})", density(WIDTH), None))
    for label, share, cost in order:
        times = found[FLEX] if label.startswith(FLEX) else found[label]
        ratio = statistics.median(d / t for d, t in zip(found[DENSE], times, strict=True))
        cells = f"{100 * share:.1f} %", f"{statistics.median(times):.2f}", f"{ratio:.2f}"
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {'–' if cost is None else f'{cost:.2f}'} |")
    if FLEX in found:
        beside = statistics.median(f / t for f, t in zip(found[FLEX], found[ours(WIDTH)], strict=True))
        notes = [f"Ours is {beside:.2f} times as fast as compiled FlexAttention on the same mask.", *notes]
    return "\n".join([*lines, "", *notes]) + "\n"


def main() -> None:
    """Entry of `python -m bench.cpu`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-flex", action="store_true", help="without FlexAttention, which needs a C++ compiler")
    parser.add_argument("--write", action="store_true", help="write docs/cpu.md")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    text = page(*measured(chosen.rounds, not chosen.no_flex))
    print(text)
    if chosen.write:
        (ROOT / "docs" / "cpu.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
