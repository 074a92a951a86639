"""What each step of the latent conversion is worth, on held-out text: `python -m bench.ablation` writes
docs/ablation.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench.graph import source
from bench.ledger import Ledger, arguments
from bench.quality import CONTEXT, MODELS, ROOT
from passes.mla import MLA

CACHES = (0.25, 0.125)


def steps(cache: float) -> Mapping[str, MLA]:
    """Label -> target: the default, and the default without one of its steps."""
    whole = MLA(cache=cache)
    return {
        "all steps (the default)": whole,
        "the same rank for every layer (spread=False)": replace(whole, spread=False),
        "no Gauss-Newton steps (polish=0)": replace(whole, polish=0),
        "neither (spread=False, polish=0)": replace(whole, spread=False, polish=0),
        "neither, and the output projection as it was (refit=False)": replace(whole, spread=False, refit=False),
        "neither, and turned channels by index (even=True, polish=0)": replace(whole, even=True, polish=0),
    }


def table(models: Path, kinds: Sequence[str], samples: int, windows: int | None, ledger: Ledger) -> str:
    """Markdown: a line per step, a column per model and share."""
    columns = [(kind, cache) for kind in kinds for cache in CACHES]
    lines = [
        "| | " + " | ".join(f"{kind} {100 * cache:g} %" for kind, cache in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    cells: dict[str, list[str]] = {}
    for kind in kinds:
        model = source(models, kind, samples, windows)
        for cache in CACHES:
            for label, target in steps(cache).items():
                apt = not (target.even and model.found.sites[0].k.rope is None)
                cells.setdefault(label, []).append(f"{ledger.measure(model, target).ratio:.3f}" if apt else "–")
    return "\n".join([*lines, *(f"| {label} | {' | '.join(row)} |" for label, row in cells.items())])


def page(made: str, samples: int) -> str:
    """The text of docs/ablation.md."""
    return f"""# What each step of the latent is worth

Perplexity of the converted model divided by the original's, on the held-out text beside the models (windows of
{CONTEXT} tokens, float32), absorbed form, {samples} windows of calibration. Nothing was trained. `python -m
bench.ablation` writes this page; [mla.md](mla.md) has the weights-only rows.

{made}
"""


def main() -> None:
    """Measure, print, and write the page where everything was measured."""
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    kinds = tuple(args.only or MODELS)
    made = table(args.models, kinds, args.samples, args.windows, Ledger(args.results))
    print(made)
    if (kinds, args.windows) == (MODELS, None):
        (ROOT / "docs" / "ablation.md").write_text(page(made, args.samples), encoding="utf-8")


if __name__ == "__main__":
    main()
