"""The latent's lossless limit over the library's types: `python -m bench.latent` writes docs/latent.md.

Every type of the zoo that generates text, at `mla:cache=1` absorbed and rebuilt, which must be the model itself, and at
`mla:cache=0.25`, whose cache must hold what the plan says. Weights alone decide; nothing is calibrated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils import logging

from bench.emission import ROOT, entries, plain
from passes.assign import barred, uncached
from passes.convert import named_tensors
from passes.find import Found, find
from passes.mla import MLA
from rewrite.capture import capture
from rewrite.emit import Emitted, emit_latent
from rewrite.emit.choose import padded
from rewrite.emit.validate import cache_bytes, greedy, relative
from rewrite.errors import ReattnError
from rewrite.heads import Rewritten
from rewrite.layout import gather
from rewrite.program import Program
from rewrite.site import Site
from tests.zoo import BY_NAME, Entry

STEPS = 20
FORMS = ("absorbed", "rebuilt")
LIMIT = 1e-5


@dataclass
class Row:
    """One type: largest difference of the logits at the limit by form, sites that have it, and what is held."""

    name: str
    sites: int = 0
    errors: dict[str, float] = field(default_factory=dict[str, float])
    tokens: bool = True
    converted: dict[str, int] = field(default_factory=dict[str, int])
    held: float | None = None
    """Bytes at a quarter over the original's, measured."""
    planned: float | None = None
    why: list[str] = field(default_factory=list[str])

    @property
    def wrong(self) -> bool:
        """Emitted, and not what it should be."""
        exact = all(e <= LIMIT for e in self.errors.values()) and self.tokens
        return not exact or (
            self.held is not None and self.planned is not None and abs(self.held - self.planned) > 1e-6
        )


def measure(entry: Entry) -> Row | None:
    """One type; None where it generates no text."""
    row = Row(plain(entry))
    model, given = entry.build()
    if not isinstance(model, PreTrainedModel) or not isinstance(given, dict) or not model.can_generate():
        return None
    try:
        program = capture(model, given, dynamic=False)
        found = find(program.static)
        row.sites = len(found.sites)
        for form in FORMS:
            _at_the_limit(row, program, found, form)
        _at_a_quarter(row, program, found)
    except ReattnError as error:
        row.why.append(str(error).splitlines()[0])
    return row


def _emitted(program: Program, found: Found, target: MLA) -> tuple[Emitted | None, list[str], list[Site]]:
    """The emission, why sites are left alone, and the sites that got a latent."""
    model: Any = program.module
    stay = {**dict.fromkeys(uncached(program, found), "it caches nothing"), **barred(found)}
    changes: dict[str, tuple[Site, Rewritten]] = {}
    why: list[str] = []
    for site in found.sites:
        reason = stay.get(site.name) or target.refuse(site)
        if reason is None:
            changes[site.name] = site, target.rewrite(site, gather(site, named_tensors(model)), None)
        else:
            why.append(reason)
    if not changes:
        return None, why, []
    made = emit_latent(model, changes, program.kwargs)
    return made, [*why, *made.refused.values()], [changes[n][0] for n in made.forms]


def _at_the_limit(row: Row, program: Program, found: Found, form: Any) -> None:
    made, why, sites = _emitted(program, found, MLA(cache=1.0, form=form))
    row.why += [w for w in why if w not in row.why]
    row.converted[form] = len(sites)
    if made is None or not sites:
        return
    model: Any = program.module
    given = padded(program.kwargs)
    expected, got = greedy(model, given, STEPS), greedy(made.model, given, STEPS)
    row.errors[form] = max(relative(a, b) for a, b in zip(expected.logits, got.logits, strict=True))
    row.tokens = row.tokens and torch.equal(expected.sequences, got.sequences)


def _at_a_quarter(row: Row, program: Program, found: Found) -> None:
    target = MLA(cache=0.25)
    made, _, sites = _emitted(program, found, target)
    if made is None or not sites or len(sites) != sum(s.cross or not s.mask.table(2, 2)[0, 1] for s in found.sites):
        return
    model: Any = program.module
    given = padded(program.kwargs)
    before, after = (cache_bytes(greedy(m, given, 4).past_key_values) for m in (model, made.model))
    row.held = after / before if before else None
    # cross attention holds as many tokens as the encoder gave, so that its layers count by their own lengths
    if not any(s.cross for s in found.sites):
        row.planned = sum(target.after(s).cache_per_token for s in sites) / sum(s.cache_per_token for s in sites)


def page(rows: Sequence[Row]) -> str:
    """The text of docs/latent.md."""
    done = [r for r in rows if any(r.converted.values())]
    wrong = [r.name for r in done if r.wrong]
    whole = [r for r in done if r.converted.get("absorbed")]
    lines = [
        "# The latent at its lossless limit, by model type",
        "",
        f"Written by `python -m bench.latent`. Tiny random models, one row padded on the left, {STEPS} greedy tokens.",
        "*absorbed*, *rebuilt*: largest relative difference of the logits at `mla:cache=1`, and the sites. *Held*:",
        "bytes of the cache at `mla:cache=0.25` over those of the original: as planned, but for cross attention.",
        f"torch {torch.__version__}, transformers {transformers.__version__}.",
        "",
        f"{len(done)} of {len(rows)} types get a latent, {len(whole)} absorbed; wrong: {', '.join(wrong) or 'none'}.",
        "",
        "| type | sites | absorbed | rebuilt | tokens | held | why not |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [f"{r.errors[f]:.0e} ({r.converted[f]})" if f in r.errors else "-" for f in FORMS]
        tokens = "equal" if r.errors and r.tokens else "differ" if r.errors else "-"
        held = "-" if r.held is None else f"{r.held:.3f}"
        lines.append(f"| {r.name} | {r.sites} | {' | '.join(cells)} | {tokens} | {held} | {'; '.join(r.why)} |")
    return "\n".join(lines) + "\n"


def known(results: Path | None) -> Mapping[str, Row]:
    """What an earlier run has left in its file."""
    lines = results.read_text("utf-8").splitlines() if results is not None and results.exists() else []
    return {row.name: row for row in (Row(**json.loads(line)) for line in lines)}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="types (all)")
    parser.add_argument("--results", type=Path, help="a file of rows that are known; new ones are added")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    done = dict(known(args.results))
    wanted = [BY_NAME[n] for n in args.names if n in BY_NAME] or [
        e for e in entries() if not args.names or plain(e) in args.names
    ]
    rows: list[Row] = []
    for entry in wanted:
        row = done.get(plain(entry)) or measure(entry)
        if row is None:
            continue
        rows.append(row)
        if args.results is not None and row.name not in done:
            with args.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")
        print(f"{row.name}: {row.errors} {row.converted} {row.held} {row.planned} {row.why}", flush=True)
    if args.write:
        (ROOT / "docs" / "latent.md").write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
