"""What local tuning adds, on held-out text: `python -m bench.tuned` writes docs/tuned.md.

Every target as it is, and followed by 200 steps of Adam per site on that site's own output. Figures with and without
tuning stand in one line only as before and after of the same target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.graph import source
from bench.ledger import Ledger, Measured, arguments
from bench.quality import CONTEXT, MODELS, ROOT
from passes.gqa import GQA
from passes.mla import MLA

STEPS = 200
SAMPLES = 220
"""Windows of calibration, all that the text gives: steps fit what few windows happen to hold."""


@dataclass(frozen=True)
class Case:
    """One line: a target under its name."""

    label: str
    target: Any
    bare: Any | None
    """The target without its Gauss-Newton steps, where it has some"""


CASES = (
    *(Case(f"GQA, 6 to {n} kv heads", GQA(n), GQA(n, polish=0)) for n in (3, 2, 1)),
    *(Case(f"mean-pooled GQA, 6 to {n} kv heads", GQA(n, method="mean", refit=False), None) for n in (3, 2, 1)),
    *(Case(f"MLA, {100 * c:g} % of the cache", MLA(cache=c), MLA(cache=c, polish=0)) for c in (0.25, 0.125)),
)


@dataclass(frozen=True)
class Row:
    """A case on a model: its closed form alone, as it is without tuning, and tuned."""

    bare: Measured | None
    before: Measured
    after: Measured

    def cells(self) -> list[str]:
        """The figures of a line."""
        excess = self.before.ratio - 1
        left = f"{(self.after.ratio - 1) / excess:.2f}" if excess > 5e-4 else "–"
        known = self.before.converting and self.after.converting
        took = f"{(self.after.converting - self.before.converting) / self.after.sites:.0f}" if known else "–"
        ratios = [f"{m.ratio:.4f}" if m else "–" for m in (self.bare, self.before, self.after)]
        return [*ratios, left, took]


Table = Mapping[tuple[str, str], Row]
"""By (model, label)."""


def measured(models: Path, kinds: Sequence[str], samples: int, windows: int | None, ledger: Ledger) -> Table:
    """Every case on every model."""
    table: dict[tuple[str, str], Row] = {}
    for kind in kinds:
        model = source(models, kind, samples, windows)
        for case in CASES:
            bare = None if case.bare is None else ledger.measure(model, case.bare)
            before, after = (ledger.measure(model, case.target, tune=steps) for steps in (0, STEPS))
            table[kind, case.label] = Row(bare, before, after)
    return table


def tables(table: Table) -> str:
    """Markdown: a table per model."""
    parts: list[str] = []
    for kind in dict.fromkeys(kind for kind, _ in table):
        lines = [
            f"## {kind}\n",
            "| target | closed form | as it is | tuned | excess left | tuning, CPU-s per site |",
            "|---|---|---|---|---|---|",
            *(f"| {label} | " + " | ".join(row.cells()) + " |" for (own, label), row in table.items() if own == kind),
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def page(made: str, samples: int) -> str:
    """The text of docs/tuned.md."""
    return f"""# What local tuning adds

Perplexity of the converted model divided by the original's, on the held-out text beside the models (windows of
{CONTEXT} tokens, float32), before and after `tune={STEPS}`: so many steps of Adam per site, along its gradient's axes,
on the site's projections, against the original attention's output on {samples} windows of calibration, which the
conversion without tuning has too; site after site in the memory of one. No gradient leaves a site. *Closed form*:
without the Gauss-Newton steps on the output's error that end a conversion by default (`polish=0` leaves them out; mean
pooling has none). *Excess left*: of what the conversion as it is loses, the part that is still lost: less where the
form before it is further from the least error that its sizes allow. Steps learn what the windows of calibration hold,
so that more text helps where more steps do not. Mean pooling is the start that uptraining usually takes; beside it is
what the same steps make of it. One process on one core; `python -m bench.tuned` writes this page.

What keeps more than half of the Llama's excess with fewer kv heads is its last attention, which alone, from 6 to 3,
takes the perplexity to 1.0096 times. Measured once, there, 200 steps of 16 windows that are neighbours in the text
leave 1.0064, of 16 from all over it 1.0062, of 32 the same, of 64 and half as long again 1.0061, and 1,000 steps of 16
1.0060. Where the steps have 1,024 windows, most of them text that the model was trained on, it is 1.0053; with 880
beside the 220 of calibration, which the model wrote itself, on from places in these, it is 1.0056, with 2,640 of its
own 1.0057. Constants on queries, keys, values and the output, which the model does not have, leave 1.0062. Divergence
of the model's own predictions in place of the output's error needs much text, and every later layer in each step:
1.0087 with the 220 windows, 1.0051 with 1,000 more, 1.0042 with 4,000 and 1,000 steps. The error together with its
Fisher metric, six gradients drawn for each token, leaves 1.0063, and 1.0053 with the 880 windows. Of the fifteen ways
to pair six heads, tuned alike, the best leaves 1.0056, the worst 1.0090, and the one that the closed form finds in
1,024 windows, tuned on these, 1.0070: the output's error does not tell these apart. Part of what is left is how the
error happens to lie to the words that come next, and that no step on the output's error sees.

{made}
"""


def main() -> None:
    """Measure, print, and write the page where everything was measured."""
    parser = arguments(__doc__)
    parser.set_defaults(samples=SAMPLES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    kinds = tuple(args.only or MODELS)
    made = tables(measured(args.models, kinds, args.samples, args.windows, Ledger(args.results)))
    print(made)
    if (kinds, args.windows) == (MODELS, None):
        (ROOT / "docs" / "tuned.md").write_text(page(made, args.samples), encoding="utf-8")


if __name__ == "__main__":
    main()
