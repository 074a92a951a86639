"""Which attentions of the zoo are found: capture, count by execution, find, and the lossless limit; `make coverage`.

Every model is one row of a JSON-lines file, so that a stopped run goes on where it was; docs/coverage.md is written
from all rows at the end.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from passes.find import find
from rewrite import GQA, ReattnError, convert
from rewrite.capture import capture
from tests.zoo import ENTRIES, REFUSED, Entry, count_by_execution

ROOT = Path(__file__).parents[1]
LIMIT = 1e-5
"""Largest relative difference of the outputs at the lossless limit, float32."""


class _Late(BaseException):
    """The time is over; no Exception, so that what tries another way on failures lets it through."""


@dataclass(frozen=True)
class Row:
    """What is known of one model. Text in `error` and `lossless_error` says why something is missing."""

    family: str
    name: str
    executed: int = 0
    proven: int = 0
    heads: int = 0
    """Query heads over all proven sites."""
    refused: list[str] = field(default_factory=list[str])
    error: str = ""
    lossless: float | None = None
    lossless_error: str = ""
    seconds: float = 0.0


def measure(entry: Entry, limit: int, lossless: bool) -> Row:
    """One model, within `limit` seconds; what goes wrong is text in the row."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise _Late(f"not done in {limit} s")

    signal.signal(signal.SIGALRM, stop)
    row, begun = Row(entry.family, entry.name), time.perf_counter()
    signal.alarm(limit)
    try:
        model, inputs = entry.build()
        row = replace(row, executed=count_by_execution(model, inputs))
        # a model with a config is captured as a user's would be: with no inputs given
        own = None if hasattr(model, "config") else inputs
        row, counts = _find(row, model, own)
        if lossless and row.proven:
            row = _lossless(row, model, inputs, own, counts)
    except (Exception, _Late) as error:
        row = replace(row, error=_sentence(error))
    finally:
        signal.alarm(0)
    return replace(row, seconds=round(time.perf_counter() - begun, 2))


def _find(row: Row, model: nn.Module, inputs: Any) -> tuple[Row, tuple[int, ...]]:
    """The row with what was found, and the kv heads of every site."""
    found = find(capture(model, inputs, dynamic=False).static)
    counts = tuple(site.kv_heads for site in found.sites)
    refused = [f"{r.name}: {r.refusal.reason}" for r in found.refused]
    heads = sum(site.heads for site in found.sites)
    return replace(row, proven=len(found.sites), heads=heads, refused=refused), counts


def _lossless(row: Row, model: nn.Module, inputs: Any, own: Any, counts: tuple[int, ...]) -> Row:
    """GQA to as many kv heads as each site has: the outputs must stay what they were."""
    try:
        made = convert(model, GQA(kv_heads=counts), inputs=own, check=False)
    except ReattnError as error:
        return replace(row, lossless_error=_sentence(error))
    with torch.no_grad():
        worst = max((_difference(a, b) for a, b in zip(_outputs(model, inputs), _outputs(made, inputs), strict=True)))
    return replace(row, lossless=worst)


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    # some mask at random, also outside training
    torch.manual_seed(0)
    result = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-12))


def _sentence(error: BaseException) -> str:
    text = str(error) if isinstance(error, (ReattnError, _Late)) else f"{type(error).__name__}: {error}"
    return " / ".join(line.strip() for line in text.splitlines()[:3])[:400]


def read(path: Path) -> dict[str, Row]:
    """Rows of earlier runs by name; a later row of a name stands for the earlier."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    known = {f.name for f in fields(Row)}
    return {row["name"]: Row(**{k: v for k, v in row.items() if k in known}) for row in map(json.loads, lines)}


def page(rows: Sequence[Row]) -> str:
    """docs/coverage.md."""
    families = list(dict.fromkeys(r.family for r in rows))
    lines = [
        "# Coverage",
        "",
        "Written by `make coverage`. Tiny models with random weights; *executed* is the number of attentions that one",
        "forward runs, counted without any graph; *proven* is the number of sites found and re-emitted exactly.",
        "*Lossless* counts the models that GQA to as many kv heads as they have leaves unchanged (relative difference",
        f"of the outputs at most {LIMIT:g}, float32).",
        "",
        f"{len(rows)} of the {len(ENTRIES) + len(REFUSED)} models of tests/zoo were measured. "
        f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}.",
        "",
        "| family | models | captured | attentions executed | proven | refused | models complete | lossless |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_family(name, [r for r in rows if r.family == name]) for name in families]
    lines += [_family("**all**", [r for r in rows if r.family != "hostile"]), ""]
    lines += ["The hostile models only look like attention that can be described: nothing in them may be proven.", ""]
    return "\n".join([*lines, *_listed(rows)]) + "\n"


def _family(name: str, rows: Sequence[Row]) -> str:
    complete = sum(r.proven == r.executed and not r.error for r in rows)
    measured = [r for r in rows if r.lossless is not None]
    equal = sum(r.lossless is not None and r.lossless <= LIMIT for r in rows)
    cells = [
        name, len(rows), sum(not r.error for r in rows), sum(r.executed for r in rows), sum(r.proven for r in rows),
        sum(len(r.refused) for r in rows), complete, f"{equal} of {len(measured)}" if measured else "-",
    ]  # fmt: skip
    return f"| {' | '.join(str(c) for c in cells)} |"


def _listed(rows: Sequence[Row]) -> list[str]:
    lines = ["## Not captured", "", *(f"- {r.name}: {r.error}" for r in rows if r.error), ""]
    lines += ["## Refused or missed", "", "| model | executed | proven | why |", "|---|---|---|---|"]
    for row in rows:
        if not row.error and row.proven != row.executed:
            reasons = Counter(text.split(": ", 1)[1] for text in row.refused)
            why = "; ".join(f"{reason} ({n})" for reason, n in reasons.items()) or "not anchored as many"
            lines.append(f"| {row.name} | {row.executed} | {row.proven} | {why.replace('|', '/')} |")
    odd = [r for r in rows if r.lossless_error or (r.lossless or 0.0) > LIMIT]
    return [*lines, "", "## Not lossless", "", *(f"- {r.name}: {r.lossless_error or f'{r.lossless:.1e}'}" for r in odd)]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing in the results, then write the page."""
    parser = argparse.ArgumentParser(prog="python -m bench.coverage", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="only these models, measured anew")
    parser.add_argument("--results", type=Path, default=ROOT / "out" / "coverage.jsonl")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "coverage.md")
    parser.add_argument("--limit", type=int, default=240, help="seconds for one model")
    parser.add_argument("--no-lossless", action="store_true", help="find only")
    chosen = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    entries = [e for e in (*ENTRIES, *REFUSED) if not chosen.names or e.name in chosen.names]
    known = {} if chosen.names else read(chosen.results)
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        if entry.name not in known:
            row = measure(entry, chosen.limit, not chosen.no_lossless)
            with chosen.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")
            print(entry.name, row.executed, row.proven, *row.refused[:1], row.error, file=sys.stderr)
    rows = read(chosen.results)
    ordered = [rows[e.name] for e in (*ENTRIES, *REFUSED) if e.name in rows]
    chosen.page.write_text(page(ordered), encoding="utf-8")


if __name__ == "__main__":
    main()
