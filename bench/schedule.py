"""What a mask's loops cost before any attention is: `python -m bench.schedule --write` writes docs/schedule.md.

A schedule is derived once for a mask and holds for every length; torch's `create_block_mask`, uncompiled as documented,
looks at every pair of every length. Each of its runs is a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codegen.integers import surely
from codegen.lists import Tiling, lists
from codegen.schedule import Schedule, derived, schedule
from rewrite.mask import Mask, blocks, causal, documents, parse, sharded, sink, window
from rewrite.mask.clauses import clauses

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "schedule.md"
TOKENS = 2**20
TILE = 128
SEEN = (4096, 8192, 16384)
"""Lengths at which every pair can be looked at."""
CLOSED: tuple[Mask, ...] = (
    causal,
    causal & window(1024),
    causal & (window(1024) | sink(64)),
    causal & sharded(64, 16, 8),
    causal & documents([1000 + 37 * i for i in range(200)]),
)
RULES: dict[str, Callable[..., Any]] = {
    str(CLOSED[0]): lambda b, h, q, k: k <= q,
    str(CLOSED[1]): lambda b, h, q, k: (k <= q) & (q - k < 1024),
    str(CLOSED[2]): lambda b, h, q, k: (k <= q) & ((q - k < 1024) | (k < 64)),
}
"""The same masks as torch's functions."""


def cpu(work: Callable[[], Any], times: int) -> float:
    """Median CPU-seconds of one call."""
    spent: list[float] = []
    for _ in range(times):
        start = time.process_time()
        work()
        spent.append(time.process_time() - start)
    return float(np.median(spent))


def shown(mask: Mask) -> str:
    """In a cell of a table."""
    return f"`{mask}`".replace("|", "\\|")


def first(mask: Mask) -> Schedule:
    """Derived anew, with nothing remembered but sympy's own caches."""
    for remembered in (derived, clauses, surely):
        remembered.cache_clear()
    return schedule(mask, "k")


def tiles_of(mask: Mask, found: Schedule) -> int:
    """Tiles that all query tiles of a million tokens visit, evaluated one by one."""
    total = 0
    for q0 in range(0, TOKENS, TILE):
        one = found.evaluate(TILE, q0=q0, q1=q0 + TILE, N=TOKENS, tables=mask.tables)
        total += sum(map(len, (*one.full, *one.masked)))
    return total


def closed_row(mask: Mask) -> str:
    """One line of the first table."""
    first(mask)
    derive = cpu(lambda: first(mask), 9)
    found = schedule(mask, "k")
    again = cpu(lambda: [schedule(mask, "k") for _ in range(1000)], 5) / 1000
    tiles = tiles_of(mask, found)
    each = cpu(lambda: tiles_of(mask, found), 1) / (TOKENS // TILE)
    return f"| {shown(mask)} | {derive * 1e3:.2f} ms | {again * 1e6:.1f} us | {each * 1e6:.1f} us | {tiles:,} |"


def seen(name: str, tokens: int) -> None:
    """One `create_block_mask`, in this process: CPU-seconds and added peak memory on standard output."""
    from torch.nn.attention.flex_attention import create_block_mask

    create_block_mask(RULES[name], None, None, 256, 256, device="cpu")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    create_block_mask(RULES[name], None, None, tokens, tokens, device="cpu")
    spent = time.process_time() - start
    print(spent, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def seen_row(name: str) -> str:
    """One line of the second table."""
    cells: list[str] = []
    for tokens in SEEN:
        command = [sys.executable, "-m", "bench.schedule", "--seen", name, "--tokens", str(tokens)]
        said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
        cells.append(f"{float(said[0]):.2f} s, {float(said[1]) / 2**20:.2f} GB")
    mask = parse(name)
    found = first(mask)
    same = cpu(lambda: evaluated(mask, found, SEEN[-1]), 9)
    return f"| {shown(mask)} | {' | '.join(cells)} | {same * 1e3:.2f} ms |"


def evaluated(mask: Mask, found: Schedule, tokens: int) -> None:
    """All query tiles at once, which only this page needs: kernels evaluate their own."""
    q0 = np.arange(0, tokens, TILE)
    found.arrays(q0, q0 + TILE, 0, 0, tokens, tokens, 0, TILE, 0, 0, mask.tables)


def lists_row(tokens: int, heads: int) -> str:
    """One line of the third table: a tenth of all blocks, causal."""
    count = tokens // TILE
    table = np.random.default_rng(0).random((heads, count, count)) < 0.1
    mask = causal & blocks(table, TILE)
    at = Tiling(tokens, tokens, TILE, TILE, heads=heads)
    lists(mask, "k", Tiling(TILE, TILE, TILE, TILE, heads=heads))
    spent = cpu(lambda: lists(mask, "k", at), 3)
    pairs = heads * count * count
    return f"| {tokens:,} | {heads} | {pairs:,} | {spent * 1e3:.1f} ms | {spent / pairs * 1e9:.0f} ns |"


def page() -> str:
    """All of docs/schedule.md."""
    return "\n".join(
        [
            "# What a mask's loops cost\n",
            f"Written by `python -m bench.schedule --write`. CPU-seconds, one thread; tiles of {TILE} queries and "
            f"{TILE} keys. torch {torch.__version__}, {platform.machine()}.\n",
            f"A mask of {TOKENS:,} tokens. A schedule is derived once in a process, whatever the lengths; from then on "
            "it is looked up. Kernels evaluate it for their own tile, the CPU back end in Python. It holds no memory "
            "that grows with the length.\n",
            "| mask | derived once | looked up | one tile of queries in Python | tiles visited of all queries |",
            "|---|---|---|---|---|",
            *map(closed_row, CLOSED),
            "\n`create_block_mask`, uncompiled, in a process of its own: CPU-seconds and added peak memory. Beside it "
            f"all query tiles of {SEEN[-1]:,} tokens from the schedule.\n",
            f"| mask | {' | '.join(f'{n:,} tokens' for n in SEEN)} | schedule, {SEEN[-1]:,} |",
            "|---|" + "---|" * (len(SEEN) + 1),
            *map(seen_row, RULES),
            "\nIts time and memory grow fourfold with twice the tokens; at a million tokens they would be "
            f"{(TOKENS // SEEN[-1]) ** 2:,} times those of {SEEN[-1]:,}.\n",
            f"Index lists, for masks whose blocks come from data (here a tenth of all, causal, {TILE} x {TILE}):\n",
            "| tokens | heads | pairs of tiles | lists built in | each pair |",
            "|---|---|---|---|---|",
            *(lists_row(n, heads) for n, heads in ((16384, 8), (65536, 8), (131072, 8))),
            "",
        ]
    )


def main() -> None:
    """`--write` writes the page, without it is printed."""
    parser = argparse.ArgumentParser(description="What a mask's loops cost")
    parser.add_argument("--write", action="store_true", help="write docs/schedule.md")
    parser.add_argument("--seen", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=SEEN[0], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.seen:
        seen(asked.seen, asked.tokens)
    elif asked.write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())


if __name__ == "__main__":
    main()
