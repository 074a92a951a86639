"""docs/kernels.md from the results of `bench.kernels`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def page(ran: Sequence[Row], made: Sequence[Row], limits: Mapping[str, int], left: int = 0) -> tuple[str, list[str]]:
    """The page, and what is wrong. `limits`: bytes of shared memory of a block by chip; `left`: what was not run."""
    wrong = [
        *(w for row in ran for w in _wrong_numbers(row)),
        *(w for row in made for w in _wrong_resources(row, limits[row["chip"]])),
    ]
    verdict = f"{len(wrong)} are wrong." if wrong else "nothing is wrong."
    verdict += f" {left} cases or kernels are not tried yet: the next run goes on there." if left else ""
    text = [
        "# Generated kernels, checked without a GPU",
        "",
        "`make kernels` writes this page. Each case is one attention: random inputs among NaN, outputs that hold NaN",
        "before the launch, run in Triton's interpreter and held to dense attention in float64. An error is given as a",
        "part of what rounding in the kernel's types may do to that number; 1 is the limit. Every kernel of a case, in",
        "the tiles that it has by default, is compiled for sm_90 and gfx942.",
        "",
        f"{len(ran)} cases and {len(made)} compiled kernels: {verdict}",
        "",
        *(f"- {sentence}" for sentence in wrong),
        *([""] if wrong else []),
        "## Largest error over its bound",
        "",
        *_errors(ran),
        "",
        "## Registers, bytes spilled and shared memory",
        "",
        f"A block has {' and '.join(f'{n:,} bytes on {c}' for c, n in limits.items())} of shared memory.",
        "Registers and spilled bytes are a thread's, on gfx942 vector registers and how many of them are spilled.",
        "",
        *_resources(made),
        "",
    ]
    return "\n".join(text), wrong


def _wrong_numbers(row: Row) -> list[str]:
    if "failed" in row:
        return [f"{row['title']}: {row['failed']}"]
    return [f"{row['title']}: {name} is off by {e} of its bound" for name, e in row["errors"].items() if not e <= 1]


def _wrong_resources(row: Row, limit: int) -> list[str]:
    if "failed" in row:
        return [f"{row['title']} for {row['chip']}: {row['failed']}"]
    found: list[str] = []
    if row["shared"] > limit:
        found.append(f"{row['title']} for {row['chip']} needs {row['shared']:,} bytes of shared memory")
    if row["chip"] == "sm_90" and row["spilled"] and tame(row["title"]):
        found.append(f"{row['title']} spills {row['spilled']} bytes")
    return found


def tame(title: str) -> bool:
    """Head dims of 64 and 128 in 16 bits, whose default tiles must not spill."""
    dims = re.search(r"dqk=(\d+)", title), re.search(r"dv=(\d+)", title)
    return "fp32" not in title and all(d is not None and int(d.group(1)) in (64, 128) for d in dims)


def _errors(ran: Sequence[Row]) -> list[str]:
    """A row for each phase and type: how many cases, and the worst of each result."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in ran:
        phase, dtype = row["title"].split()[:2]
        groups.setdefault((phase, dtype), []).append(row)
    names = list(dict.fromkeys(name for row in ran for name in row["errors"]))
    lines = [f"| phase | type | cases | {' | '.join(names)} |", "|---|---|---|" + "---|" * len(names)]
    for (phase, dtype), rows in sorted(groups.items()):
        worst = [max((row["errors"][n] for row in rows if n in row["errors"]), default=None) for n in names]
        cells = ["" if w is None else f"{w:.3f}" for w in worst]
        lines.append(f"| {phase} | {dtype} | {len(rows)} | {' | '.join(cells)} |")
    return lines


def _resources(made: Sequence[Row]) -> list[str]:
    kernels: dict[str, dict[str, Row]] = {}
    for row in made:
        kernels.setdefault(row["title"], {})[row["chip"]] = row
    chips = sorted({row["chip"] for row in made}, reverse=True)
    lines = ["| kernel | " + " | ".join(f"{c} registers / spilled | {c} shared" for c in chips) + " |"]
    lines.append("|---|" + "---|---|" * len(chips))
    for title in sorted(kernels):
        rows = [kernels[title].get(chip) for chip in chips]
        cells = [
            " | " if r is None or "failed" in r else f"{r['registers']} / {r['spilled']} | {r['shared']:,}"
            for r in rows
        ]
        lines.append(f"| {title.replace('|', chr(92) + '|')} | {' | '.join(cells)} |")
    return lines
