"""Held-out perplexity of the shipped models with fewer pairs of query and key: `python -m bench.sparse`.

Every figure is the perplexity of the converted model divided by the original's, on text that neither training nor
calibration has seen; caches are those that `generate` leaves behind. The page goes to standard output and, for all
models and densities, into docs/sparse.md. With `--results FILE` what is measured is kept, and not measured again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from bench.graph import Source, source
from bench.ledger import arguments
from bench.quality import CONTEXT, MODELS, ROOT
from passes.sparse import BlockSparse
from passes.sparse_shape import pairs
from rewrite.emit import emit_sparse
from rewrite.emit.validate import cache_bytes
from rewrite.heads import Change

DENSITIES = (0.5, 0.25)
PROMPT, NEW = 192, 63
"""Tokens of a text, and those that are generated behind them: as many as the models were trained on."""


@dataclass(frozen=True)
class Method:
    """One row of the table at a density."""

    label: str
    uniform: bool
    refit: bool

    def of(self, density: float) -> BlockSparse:
        """The target."""
        return BlockSparse(density=density, uniform=self.uniform, refit=self.refit, context=CONTEXT)


OURS = Method("by kv head and layer, W_o refitted", uniform=False, refit=True)
METHODS = (
    Method("sink and window, the same for all heads", uniform=True, refit=False),
    Method("the same, W_o refitted", uniform=True, refit=True),
    OURS,
)


@dataclass(frozen=True)
class Row:
    """One converted model: its perplexity over the original's, the share of the original's pairs that it reads, and of
    ours the bytes that both caches hold after generating, with the windows of every layer."""

    model: str
    density: float
    method: str
    windows: int
    ratio: float
    pairs: float
    before: int = 0
    after: int = 0
    chosen: tuple[str, ...] = ()


def measured(one: Source, density: float, method: Method) -> Row:
    """Convert, and run."""
    changes = one.convert(method.of(density))
    row = Row(one.name, density, method.label, len(one.rows), one.ratio(changes), _share(changes))
    if method is not OURS:
        return row
    before, after = caches(one, changes)
    return replace(row, before=before, after=after, chosen=tuple(_windows(c) for c in changes.values()))


def caches(one: Source, changes: Mapping[str, Change]) -> tuple[int, int]:
    """Bytes of the original's cache and of the emitted model's after one text."""
    model: Any = one.program.module
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{one.name} is no model of transformers")
    emitted = emit_sparse(model, {n: (c.site, c.rewritten) for n, c in changes.items()}, one.program.kwargs)
    if emitted.refused:
        raise ValueError(f"{one.name}: {emitted.refused}")
    before, after = (cache_bytes(_generated(m, one.rows[:1, :PROMPT])) for m in (model, emitted.model))
    return before, after


def _generated(model: PreTrainedModel, ids: torch.Tensor) -> Any:
    generate: Any = model.generate
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        return generate(ids, **settings, return_dict_in_generate=True).past_key_values


def _share(changes: Mapping[str, Change]) -> float:
    counts = [
        [pairs(site.mask, CONTEXT, site.heads) * site.heads for site in (c.site, c.rewritten.site)]
        for c in changes.values()
    ]
    return sum(after for _, after in counts) / sum(before for before, _ in counts)


def _windows(change: Change) -> str:
    return str(change.rewritten.site.mask).rpartition(", ")[2].rstrip(")")


class Kept:
    """Rows in a file of json lines where there is one."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        lines = file.read_text("utf-8").splitlines() if file is not None and file.exists() else []
        rows = [replace(row, chosen=tuple(row.chosen)) for row in (Row(**json.loads(x)) for x in lines)]
        self.rows = {(r.model, r.density, r.method, r.windows): r for r in rows}

    def measure(self, one: Source, density: float, method: Method) -> Row:
        """From the file, or measured and written to it."""
        key = (one.name, density, method.label, len(one.rows))
        if key not in self.rows:
            self.rows[key] = row = measured(one, density, method)
            print(row, file=sys.stderr, flush=True)
            if self.file is not None:
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
        return self.rows[key]


def page(rows: Sequence[Row], samples: int) -> str:
    """The text of docs/sparse.md."""
    table = {(r.model, r.density, r.method): r for r in rows}
    densities = sorted({r.density for r in rows}, reverse=True)
    lines = [
        "# What fewer pairs of query and key cost",
        "",
        "Perplexity of the converted model divided by the original's, on held-out text beside the models",
        f"({rows[0].windows} windows of {CONTEXT} tokens, float32), at a share of the pairs of query and key that",
        f"causal attention reads of {CONTEXT} tokens. Calibration: {samples} windows of {CONTEXT} tokens of other",
        "text; nothing was trained. `python -m bench.sparse` writes this page.",
        "",
        "The first row is the published way (StreamingLLM, arXiv 2309.17453): the first four tokens and one window",
        "for all heads of all layers. By kv head and layer: every kv head gets the whole context or one of nine",
        "windows, by what the attention's output loses on calibration text and what that is worth to the model's",
        "predictions; one total for all heads of all layers. W_o refitted: the output projection solved anew on the",
        "calibration. A dash was not measured.",
    ]
    for model in dict.fromkeys(r.model for r in rows):
        lines += ["", f"## {model}", "", "| method | " + " | ".join(f"{100 * d:g} %" for d in densities) + " |"]
        lines += ["|---|" + "---|" * len(densities)]
        for method in METHODS:
            found = [table.get((model, d, method.label)) for d in densities]
            cells = ["–" if row is None else f"{row.ratio:.3f}" for row in found]
            lines.append(f"| {method.label} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "## The cache", "", *_cache_lines([r for r in rows if r.before])]) + "\n"


def _cache_lines(rows: Sequence[Row]) -> list[str]:
    lines = [
        f"What `generate` holds after {PROMPT} tokens and {NEW} new ones, in float32. Heads that read a window hold",
        "four first tokens and the window; at longer texts they hold no more, and only those that read all grow.",
        "",
        "| model | density | pairs | cache | of the original | windows by layer, kv head by kv head |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        share, kept = f"{100 * row.pairs:.1f} %", f"{100 * row.after / row.before:.0f} %"
        sizes = f"{row.before / 1024:.0f} → {row.after / 1024:.0f} KiB"
        lines.append(
            f"| {row.model} | {100 * row.density:g} % | {share} | {sizes} | {kept} | {', '.join(row.chosen)} |"
        )
    return lines


def main() -> None:
    """Measure, print, and write the page where everything was measured."""
    parser = arguments(__doc__)
    parser.add_argument("--density", type=float, action="append", help="share of the pairs, as 0.5")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kinds, densities = tuple(args.only or MODELS), tuple(args.density or DENSITIES)
    models: Path = args.models
    kept = Kept(args.results)
    sources = [source(models, kind, args.samples, args.windows) for kind in kinds]
    found = {(o.name, d, m.label): kept.measure(o, d, m) for d in densities for o in sources for m in METHODS}
    rows = [found[o.name, d, m.label] for o in sources for d in densities for m in METHODS]
    made = page(rows, args.samples)
    print(made)
    if (kinds, densities) == (MODELS, DENSITIES):
        (ROOT / "docs" / "sparse.md").write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
