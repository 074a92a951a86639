"""Held-out perplexity of the shipped models with fewer kv heads, method by method: `python -m bench.quality`.

Every figure is the perplexity of the converted model divided by the original's, on text that neither training nor
calibration has seen. The table goes to standard output and, for a whole run, into docs/quality.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rewrite import GQA, convert

ROOT = Path(__file__).parent.parent
MODELS = ("llama", "qwen3", "gpt2")
HEADS = (3, 2, 1)
CONTEXT = 256


@dataclass(frozen=True)
class Method:
    """One row of the table for a number of kv heads."""

    label: str
    method: str = "default"
    refit: bool = True
    calibrated: bool = True
    polish: int = 5

    def of(self, kv_heads: int) -> GQA:
        """The target."""
        return GQA(kv_heads, method=self.method, refit=self.refit, polish=self.polish)  # type: ignore[arg-type]


METHODS = (
    Method("mean pooling", method="mean", refit=False),
    Method("aligned mean pooling", method="aligned", refit=False),
    Method("aligned mean pooling, refitted", method="aligned"),
    Method("default, weights only", calibrated=False),
    Method("default, closed form alone (polish=0)", polish=0),
    Method("default"),
)
Ratios = Mapping[tuple[str, int, str], float]


def converted(folder: Path, method: Method, kv_heads: int, calibration: Path, samples: int) -> nn.Module:
    """The model of a folder with fewer kv heads."""
    given = calibration if method.calibrated else None
    return convert(folder, method.of(kv_heads), calibration=given, samples=samples, length=CONTEXT, check=False)


def perplexity(model: nn.Module, rows: Tensor) -> float:
    """Every token but the first of a window predicted, in float32."""
    model = model.float().eval()
    total = 0.0
    with torch.no_grad():
        for part in rows.split(16):
            logits = model(input_ids=part, use_cache=False).logits[:, :-1]
            total += float(nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())) * len(part)
    return math.exp(total / len(rows))


def held_out(folder: Path, text: Path) -> Tensor:
    """(windows, CONTEXT) tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(text.read_text("utf-8"), verbose=False)["input_ids"])
    return ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def known(results: Path | None) -> dict[tuple[str, int, str], float]:
    """What an earlier run has left in its file: a line of JSON a cell."""
    lines = results.read_text("utf-8").splitlines() if results is not None and results.exists() else []
    return {(kind, heads, label): ratio for kind, heads, label, ratio in map(json.loads, lines)}


def measured(
    models: Path, kinds: Sequence[str], heads: Sequence[int], samples: int, results: Path | None = None
) -> tuple[Ratios, dict[str, float]]:
    """Perplexity ratios by (model, kv heads, method), and the originals' perplexities."""
    ratios = known(results)
    base: dict[str, float] = {}
    for kind in kinds:
        rows = held_out(models / kind, models / "held_out.txt")
        base[kind] = perplexity(AutoModelForCausalLM.from_pretrained(models / kind), rows)
        for kv_heads in heads:
            for method in METHODS:
                if (kind, kv_heads, method.label) in ratios:
                    continue
                start = time.perf_counter()
                model = converted(models / kind, method, kv_heads, models / "calibration.txt", samples)
                ratio = perplexity(model, rows) / base[kind]
                ratios[kind, kv_heads, method.label] = ratio
                took = time.perf_counter() - start
                if results is not None:
                    with results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps([kind, kv_heads, method.label, ratio]) + "\n")
                print(f"{kind} {kv_heads} {method.label}: {ratio:.4f} ({took:.0f} s)", file=sys.stderr, flush=True)
    return ratios, base


def table(ratios: Ratios, base: Mapping[str, float], heads: Sequence[int]) -> str:
    """Markdown: a line per method, a column per model and number of kv heads; then what the default leaves."""
    columns = [(kind, n) for kind in base for n in heads]
    lines = [
        "| method | " + " | ".join(f"{kind} 6 to {n}" for kind, n in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for method in METHODS:
        cells = [f"{ratios[kind, n, method.label]:.3f}" for kind, n in columns]
        lines.append(f"| {method.label} | " + " | ".join(cells) + " |")
    for other, text in ((METHODS[1], "aligned"), (METHODS[2], "aligned and refitted")):
        cells = [_share(ratios, kind, n, other.label) for kind, n in columns]
        lines.append(f"| *default's excess of {text}'s* | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _share(ratios: Ratios, kind: str, heads: int, other: str) -> str:
    excess = ratios[kind, heads, other] - 1
    return f"{(ratios[kind, heads, METHODS[-1].label] - 1) / excess:.2f}" if excess > 0 else "-"


def page(made: str, base: Mapping[str, float], samples: int) -> str:
    """The text of docs/quality.md."""
    originals = ", ".join(f"{kind} {value:.2f}" for kind, value in base.items())
    return f"""# What fewer kv heads cost

Perplexity of the converted model divided by the original's, on the held-out text beside the models (windows of
{CONTEXT} tokens, weights rounded to bfloat16 as they are saved, computed in float32).
Originals: {originals}. 6 kv heads before; 3, 2 and 1 are 50, 33 and 17 % of the cache.
Calibration: {samples} windows of {CONTEXT} tokens of other text. `make bench-quality` writes this page.

{made}

The default is closed forms, then at most five damped Gauss-Newton steps per site on the error of that site's own output
over the calibration text: no backward pass through the model, nothing outside the site changes, and the steps are kept
only where they help on tokens that did not fit. `polish=0` leaves them out; its row shows what they are worth: little
without norms, much behind a qk-norm.
"""


def main() -> None:
    """Measure, print, and write the page where everything was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / "examples" / "models")
    parser.add_argument("--only", choices=MODELS, action="append")
    parser.add_argument("--heads", type=int, action="append")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--results", type=Path, help="a file of cells that are known; new ones are added")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kinds, heads = tuple(args.only or MODELS), tuple(args.heads or HEADS)
    ratios, base = measured(args.models, kinds, heads, args.samples, args.results)
    made = table(ratios, base, heads)
    print(made)
    if kinds == MODELS and heads == HEADS:
        (ROOT / "docs" / "quality.md").write_text(page(made, base, args.samples), encoding="utf-8")


if __name__ == "__main__":
    main()
