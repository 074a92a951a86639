"""Held-out perplexity of the shipped models with a latent cache, ours beside the published: `python -m bench.mla`.

Every figure is the perplexity of the converted model divided by the original's, on text that neither training nor
calibration has seen. Models are run as captured graphs. The tables go to standard output and, for a whole run, into
docs/mla.md. With `--results FILE` what is measured is kept, line by line, and not measured again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.graph import Source, source
from bench.ledger import Ledger, Measured, arguments
from bench.peers import CARE, MHA2MLA, JointSVD, TransMLA, mha2mla, transmla
from bench.quality import CONTEXT, MODELS, ROOT
from passes.mla import MLA
from rewrite.site import Site

CACHES = (0.5, 0.25, 0.125, 0.0625)
SCREEN = 16
"""Windows of calibration and of held-out text on which a published method's settings are compared."""
Made = Callable[[float, Site], Sequence[Any]]
TURNING = (0.2, 0.9)
"""Shares of a cache between which MHA2MLA's turning numbers are tried."""


@dataclass(frozen=True)
class Method:
    """One row: its targets for a cache and a site of the model, one per setting; the best setting is shown."""

    label: str
    made: Made
    refit: bool = False
    calibrated: bool = True
    ours: bool = False


def _joint(cache: float, _site: Site) -> Sequence[Any]:
    return (JointSVD(cache),)


def _care(cache: float, _site: Site) -> Sequence[Any]:
    return CARE(cache), CARE(cache, apart=True)


def _transmla(cache: float, site: Site) -> Sequence[Any]:
    settings = ((1, 1),) if site.k.rope is None else transmla.SETTINGS
    return [TransMLA(cache, fold=f, collapse=c) for f, c in settings]


def _mha2mla(cache: float, site: Site) -> Sequence[Any]:
    if site.k.rope is None:
        return ()
    all_turn = cache * (site.k.dim + site.v.dim) / 2
    some = [n for n in mha2mla.SETTINGS if TURNING[0] <= n / all_turn <= TURNING[1]]
    return [MHA2MLA(cache, pairs=n) for n in some]


def _rebuilt(cache: float, site: Site) -> Sequence[Any]:
    return () if site.k.rope is None else (MLA(cache=cache, form="rebuilt"),)


METHODS = (
    Method("joint SVD, weights only", _joint, calibrated=False),
    Method("joint SVD, W_o refitted", _joint, refit=True),
    Method("CARE", _care),
    Method("CARE, W_o refitted", _care, refit=True),
    Method("TransMLA", _transmla),
    Method("TransMLA, W_o refitted", _transmla, refit=True),
    Method("MHA2MLA", _mha2mla),
    Method("MHA2MLA, W_o refitted", _mha2mla, refit=True),
    Method("ours, weights only", lambda cache, _: (MLA(cache=cache),), calibrated=False, ours=True),
    Method("ours, closed form (polish=0)", lambda cache, _: (MLA(cache=cache, polish=0),), ours=True),
    Method("ours", lambda cache, _: (MLA(cache=cache),), ours=True),
    Method("ours, keys rebuilt", _rebuilt, ours=True),
)


Table = Mapping[tuple[str, float, str], Measured]


@dataclass(frozen=True)
class Wanted:
    """What is measured: `windows` of held-out text, None for all."""

    models: Path
    kinds: Sequence[str]
    caches: Sequence[float]
    methods: Sequence[Method]
    samples: int
    windows: int | None


def measured(wanted: Wanted, ledger: Ledger) -> Table:
    """By (model, cache, method); what no setting of a method fits is missing."""
    table: dict[tuple[str, float, str], Measured] = {}
    for kind in wanted.kinds:
        whole = source(wanted.models, kind, wanted.samples, wanted.windows)
        small = replace(whole, calibration=_first(whole, SCREEN))
        for cache in wanted.caches:
            for method in wanted.methods:
                target = _best(ledger, whole, small, method, cache)
                if target is None:
                    continue
                target = replace(target, refit=True) if method.refit else target
                table[kind, cache, method.label] = ledger.measure(whole, target, method.calibrated)
    return table


def _first(whole: Source, windows: int) -> list[dict[str, torch.Tensor]]:
    rows = torch.cat([b["input_ids"] for b in whole.calibration])[:windows]
    return [{"input_ids": rows}]


def _best(ledger: Ledger, whole: Source, small: Source, method: Method, cache: float) -> Any | None:
    """The setting with the least perplexity of those that fit, judged on held-out text before any refit."""
    fit = [t for t in method.made(cache, whole.found.sites[0]) if whole.refusal(t) is None]
    if len(fit) < 2:
        return fit[0] if fit else None
    return min(fit, key=lambda t: ledger.measure(small, t, method.calibrated, SCREEN).ratio)


def tables(table: Table) -> str:
    """Markdown: per model a line for each method, a column for each cache, and what ours leaves of the others'."""
    kinds, caches = (list(dict.fromkeys(key[i] for key in table)) for i in (0, 1))
    parts: list[str] = []
    for kind in kinds:
        lines = [
            f"## {kind}\n",
            "| method | " + " | ".join(f"{cache:.4g} %" for cache in (100 * float(c) for c in caches)) + " |",
            "|---|" + "---|" * len(caches),
        ]
        for method in METHODS:
            row = [table.get((str(kind), float(c), method.label)) for c in caches]
            if any(row):
                form = " (keys rebuilt)" if any(m.rebuilt for m in row if m) and not method.ours else ""
                cells = [f"{m.ratio:.3f}" if m else "–" for m in row]
                lines.append(f"| {method.label}{form} | " + " | ".join(cells) + " |")
        for label, rebuilt in (("absorbable", False), ("with rebuilt keys", True)):
            cells = [_share(table, str(kind), float(c), rebuilt) for c in caches]
            if any(c != "–" for c in cells):
                lines.append(f"| *our excess over the best other's, {label}* | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _share(table: Table, kind: str, cache: float, rebuilt: bool) -> str:
    ours = table.get((kind, cache, "ours, keys rebuilt" if rebuilt else "ours"))
    others = [table.get((kind, cache, m.label)) for m in METHODS if not m.ours]
    least = min((m.ratio - 1 for m in others if m and m.rebuilt == rebuilt), default=0.0)
    return f"{(ours.ratio - 1) / least:.2f}" if ours is not None and least > 5e-4 else "–"


def page(made: str, samples: int) -> str:
    """The text of docs/mla.md."""
    return f"""# What a latent cache costs

Perplexity of the converted model divided by the original's, on the held-out text beside the models (windows of
{CONTEXT} tokens, float32), at a share of the source's cached numbers per token and layer. Calibration: {samples}
windows of {CONTEXT} tokens of other text; nothing was trained. `python -m bench.mla` writes this page.

The published methods are written anew from their descriptions in `bench/peers/`: the joint singular value decomposition
of the stacked key and value projections; CARE (arXiv 2603.17946), the same in the metric of the inputs, keys and values
together or apart, one rank for all layers; TransMLA (arXiv 2502.07864), the best of six settings of folding; MHA2MLA
(arXiv 2502.14837), the best number of turning pairs. Settings are chosen on held-out text, which favours them. Behind a
qk-norm TransMLA and MHA2MLA work on the normed keys, which is kinder than what was published. None of them refits the
output projection: those rows add it, to be fair. Keys rebuilt: the cache holds a latent alone, and keys are expanded,
normed and turned at every step; all other rows decode in the latent space.

"Ours" with calibration spreads the total over the layers and ends in at most five Gauss-Newton steps per site
(`polish=0` leaves them out); the published methods have one rank for all layers, as `spread=False` gives ours
(`python -m bench.ablation`). The last lines divide what ours loses by what the best of the others loses, its output
projection refitted or not.

{made}
"""


def main() -> None:
    """Measure, print, and write the page where everything was measured."""
    parser = arguments(__doc__)
    parser.add_argument("--ratio", type=float, action="append", help="share of the source's cache, as 0.25")
    parser.add_argument("--part", choices=("ours", "published"), help="only these methods")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kinds, caches = tuple(args.only or MODELS), tuple(args.ratio or CACHES)
    methods = [m for m in METHODS if args.part is None or m.ours == (args.part == "ours")]
    wanted = Wanted(args.models, kinds, caches, methods, args.samples, args.windows)
    made = tables(measured(wanted, Ledger(args.results)))
    print(made)
    if (kinds, caches, args.part, args.windows) == (MODELS, CACHES, None, None):
        (ROOT / "docs" / "mla.md").write_text(page(made, args.samples), encoding="utf-8")


if __name__ == "__main__":
    main()
