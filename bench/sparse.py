"""Held-out perplexity of the shipped models with fewer pairs of query and key: `python -m bench.sparse`.

Every figure is the perplexity of the converted model divided by the original's, on text that neither training nor
calibration has seen; caches are those that `generate` leaves behind. The page goes to standard output and, for a whole
run, into docs/sparse.md. With `--results FILE` what is measured is kept, line by line, and not measured again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from bench.graph import Source, source
from bench.ledger import Ledger, Measured, arguments
from bench.quality import CONTEXT, MODELS, ROOT
from passes.convert import Change
from passes.sparse import BlockSparse
from passes.sparse_shape import pairs
from rewrite.emit import emit_sparse
from rewrite.emit.validate import cache_bytes

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


METHODS = (
    Method("sink and window, the same for all heads", uniform=True, refit=False),
    Method("the same, W_o refitted", uniform=True, refit=True),
    Method("by head and layer", uniform=False, refit=False),
    Method("by head and layer, W_o refitted", uniform=False, refit=True),
)


@dataclass(frozen=True)
class Cache:
    """Of one mixture: the share of the source's pairs that it reads, and bytes that caches hold after generating."""

    model: str
    density: float
    pairs: float
    before: int
    after: int
    windows: tuple[str, ...]


Table = Mapping[tuple[str, float, str], Measured]


def measured(sources: Sequence[Source], densities: Sequence[float], ledger: Ledger) -> Table:
    """By (model, density, method)."""
    return {
        (one.name, density, method.label): ledger.measure(one, method.of(density))
        for one in sources
        for density in densities
        for method in METHODS
    }


def caches(one: Source, density: float) -> Cache:
    """The mixture emitted, and a text generated with it and with the original."""
    changes = one.convert(METHODS[-1].of(density))
    model: Any = one.program.module
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{one.name} is no model of transformers")
    given = one.program.kwargs
    emitted = emit_sparse(model, {n: (c.site, c.rewritten) for n, c in changes.items()}, given)
    if emitted.refused:
        raise ValueError(f"{one.name}: {emitted.refused}")
    ids = one.rows[:1, :PROMPT]
    held = [cache_bytes(_generated(m, ids)) for m in (model, emitted.model)]
    return Cache(one.name, density, _share(changes), held[0], held[1], tuple(_windows(c) for c in changes.values()))


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


def page(table: Table, found: Sequence[Cache], samples: int) -> str:
    """The text of docs/sparse.md."""
    densities = list(dict.fromkeys(d for _, d, _ in table))
    lines = [
        "# What fewer pairs of query and key cost",
        "",
        "Perplexity of the converted model divided by the original's, on the held-out text beside the models",
        f"(windows of {CONTEXT} tokens, float32), at a share of the pairs of query and key that causal attention reads of",
        f"{CONTEXT} tokens. Calibration: {samples} windows of {CONTEXT} tokens of other text; nothing was trained.",
        "`python -m bench.sparse` writes this page.",
        "",
        "The first row is the published way (StreamingLLM, arXiv 2309.17453): the first four tokens and one window for",
        "all heads of all layers. By head and layer: every kv head gets the whole context or one of nine windows, by what",
        "the attention's output loses on calibration text and what that is worth to the model's predictions; one total",
        "for all heads of all layers. W_o refitted: the output projection solved anew on the calibration.",
    ]
    for model in dict.fromkeys(m for m, _, _ in table):
        lines += ["", f"## {model}", "", "| method | " + " | ".join(f"{100 * d:g} %" for d in densities) + " |"]
        lines += ["|---|" + "---|" * len(densities)]
        for method in METHODS:
            cells = [f"{table[model, d, method.label].ratio:.3f}" for d in densities]
            lines.append(f"| {method.label} | " + " | ".join(cells) + " |")
    lines += ["", "## The cache", "", *_cache_lines(found)]
    return "\n".join(lines) + "\n"


def _cache_lines(found: Sequence[Cache]) -> list[str]:
    lines = [
        f"What `generate` holds after {PROMPT} tokens and {NEW} new ones, in float32. Heads that read a window hold",
        "four first tokens and the window; at longer texts they hold no more, and only those that read all grow.",
        "",
        "| model | density | pairs | cache | of the original | windows by layer and kv head |",
        "|---|---|---|---|---|---|",
    ]
    for c in found:
        share, kept = f"{100 * c.pairs:.1f} %", f"{100 * c.after / c.before:.0f} %"
        sizes = f"{c.before / 1024:.0f} → {c.after / 1024:.0f} KiB"
        lines.append(f"| {c.model} | {100 * c.density:g} % | {share} | {sizes} | {kept} | {', '.join(c.windows)} |")
    return lines


def main() -> None:
    """Measure, print, and write the page where everything was measured."""
    parser = arguments(__doc__)
    parser.add_argument("--density", type=float, action="append", help="share of the pairs, as 0.5")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kinds, densities = tuple(args.only or MODELS), tuple(args.density or DENSITIES)
    models: Path = args.models
    sources = [source(models, kind, args.samples, args.windows) for kind in kinds]
    table = measured(sources, densities, Ledger(args.results))
    found = [caches(one, density) for one in sources for density in densities]
    made = page(table, found, args.samples)
    print(made)
    if (kinds, densities, args.windows) == (MODELS, DENSITIES, None):
        (ROOT / "docs" / "sparse.md").write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
