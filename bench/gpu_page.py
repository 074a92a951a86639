"""bench/results/<date>-<gpu>.md from the rows of `bench.gpu`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from bench.gpu_cases import Shape

Row = dict[str, Any]
DENSE, FEWEST = 0.75, 0.05
"""Goals: of cuDNN's speed; the density down to which time may be at most `OVER` x density x dense time."""
OVER = 1.15


def page(rows: Sequence[Row], gpu: str) -> tuple[str, list[str]]:
    """The page, and what is wrong with numbers (not with speed)."""
    by_part: dict[str, list[Row]] = {}
    for row in rows:
        by_part.setdefault(row["key"].split()[0], []).append(row)
    wrong = [sentence for row in by_part.get("correct", []) for sentence in _wrong(row)]
    top = next((r["matmul"] for r in by_part.get("ceiling", []) if "matmul" in r), None)
    text = [f"# Generated kernels on {gpu}", "", *_correct(by_part.get("correct", []), wrong), ""]
    for row in by_part.get("ceiling", []):
        if "matmul" in row:
            text += [
                f"This GPU: {row['matmul']:.0f} TFLOP/s of bf16 products (8192^3), {row['copy']:.2f} TB/s of copies.",
                "",
            ]
    for backward in (False, True):
        text += _dense(by_part.get("dense", []), top, backward)
    text += _sparse(by_part.get("sparse", [])) + _select(by_part.get("select", []))
    text += _decode(by_part.get("decode", [])) + _build(by_part.get("build", []))
    failed = [r for r in rows if "failed" in r and not r["key"].startswith("correct")]
    text += ["## What did not run", "", *(f"- {r['key']}: {r['failed']}" for r in failed), ""] if failed else []
    return "\n".join(text), wrong


def _wrong(row: Row) -> list[str]:
    if "failed" in row:
        return [f"{row['key']}: {row['failed']}"]
    return [f"{row['key']}: {name} is off by {e} of its bound" for name, e in row["errors"].items() if not e <= 1]


def _correct(rows: Sequence[Row], wrong: Sequence[str]) -> list[str]:
    if not rows:
        return ["No case was checked."]
    worst = max((e for r in rows for e in r.get("errors", {}).values()), default=0.0)
    said = f"{len(rows)} cases against float64: {len(wrong)} wrong, largest error {worst:.3f} of its bound."
    return [said, *(f"- {sentence}" for sentence in wrong)]


def _shape(text: str) -> Shape:
    """A `Shape` from its line."""
    found = re.fullmatch(r"\d+x(\d+) heads (\d+)/(\d+) dim (\d+)", text)
    if found is None:
        raise ValueError(f"{text!r} is no shape")
    tokens, heads, kv_heads, dim = map(int, found.groups())
    return Shape(heads, kv_heads, dim, tokens)


def _grouped(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """By what was measured, then by whom."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        what, _, who = row["key"].partition(" ")[2].rpartition(" ")
        found.setdefault(what, {})[who] = row
    return found


def _dense(rows: Sequence[Row], top: float | None, backward: bool) -> list[str]:
    """TFLOP/s of causal attention, half of all pairs."""
    if not rows:
        return []
    way = "backward" if backward else "forward"
    people = ("ours", "flash", "cudnn", "flex")
    lines = [f"## Dense causal, {way}: TFLOP/s", ""]
    lines += [
        "| shape | ours | flash | cuDNN | FlexAttention | of cuDNN | of FlexAttention | of products |",
        "|---|" + "---|" * 7,
    ]
    met = [0, 0, 0]
    for what, by in _grouped(rows).items():
        work = _shape(what).flops(0.5, backward) / 1e9
        speeds = {who: work / by[who][way] for who in people if way in by.get(who, {})}
        mine = speeds.get("ours")
        cells = [f"{speeds[who]:.0f}" if who in speeds else "" for who in people]
        parts = [mine / speeds[p] if mine and p in speeds else None for p in ("cudnn", "flex")]
        parts.append(mine / top if mine and top else None)
        lines.append(f"| {what} | {' | '.join([*cells, *('' if p is None else f'{p:.2f}' for p in parts)])} |")
        met[0] += parts[0] is not None and parts[0] >= DENSE
        met[1] += parts[1] is not None and parts[1] >= 1
        met[2] += mine is not None
    lines += ["", f"At least {DENSE} of cuDNN in {met[0]}, at least FlexAttention in {met[1]} of {met[2]} rows.", ""]
    return lines


def _sparse(rows: Sequence[Row]) -> list[str]:
    """Milliseconds, and how they compare with density x dense time: density of all pairs, dense of causal's half."""
    found = _grouped(rows)
    base = found.get("causal", {}).get("ours", {})
    if not base or "failed" in base:
        return []
    lines = ["## Sparse masks: milliseconds", ""]
    lines += [
        "`of ideal`: our time over (pairs read / causal's pairs) x our dense time; 1 is all that skipping gives.",
        "",
    ]
    lines += [
        "| mask | of causal's pairs | forward | of ideal | FlexAttention | backward | of ideal | FlexAttention |",
        "|---|" + "---|" * 7,
    ]
    late = 0
    for name, by in found.items():
        mine, theirs = by.get("ours", {}), by.get("flex", {})
        if "forward" not in mine:
            continue
        share = mine["density"] / base["density"]
        cells = [name, f"{share:.3f}"]
        for way in ("forward", "backward"):
            ratio = mine[way] / (share * base[way])
            cells += [f"{mine[way]:.3f}", f"{ratio:.2f}", f"{theirs[way]:.3f}" if way in theirs else ""]
            late += way == "forward" and share >= FEWEST and ratio > OVER
        lines.append(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in cells)} |")
    lines += ["", f"Forward above {OVER} of ideal down to {FEWEST:.0%} of causal's pairs: {late} rows.", ""]
    return lines


def _select(rows: Sequence[Row]) -> list[str]:
    """Milliseconds of choosing and of attention over what is chosen, beside dense attention."""
    if not rows:
        return []
    lines = ["## Blocks chosen at run time: milliseconds, forward", ""]
    lines += [
        "`attention` makes its lists of tiles first, which `lists` is alone. `of dense`: choosing and attention over",
        "our dense time.",
        "",
    ]
    lines += [
        "| tokens | rule | tiles of causal's | choosing | lists | attention | dense | of dense |",
        "|---|---|" + "---|" * 6,
    ]
    for row in rows:
        if "choose" in row:
            rule = row["key"].split(maxsplit=2)[2]
            cells = [f"{row[n]:.3f}" for n in ("share", "choose", "lists", "attend", "dense")]
            cells.append(f"{(row['choose'] + row['attend']) / row['dense']:.2f}")
            lines.append(f"| {row['tokens']} | {rule} | {' | '.join(cells)} |")
    return [*lines, ""]


def _decode(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    lines = ["## One query, 4 rows of 32 heads over 8 kv heads of 128", ""]
    lines += ["| context | ours ms | SDPA ms | ours TB/s | SDPA TB/s |", "|---|---|---|---|---|"]
    for row in rows:
        if "ours" in row:
            cells = [f"{row[n]:.3f}" for n in ("ours", "sdpa", "ours TB/s", "sdpa TB/s")]
            lines.append(f"| {row['key'].split()[1]} | {' | '.join(cells)} |")
    return [*lines, ""]


def _build(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    lines = [
        "## To have a mask's loops: milliseconds",
        "",
        "| tokens | our schedule | create_block_mask, compiled |",
        "|---|---|---|",
    ]
    lines += [f"| {r['tokens']} | {r['ours']:.3f} | {r['flex']:.3f} |" for r in rows if "ours" in r]
    return [*lines, ""]
