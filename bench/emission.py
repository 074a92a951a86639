"""Emission over the library's types: GQA at half the kv heads against the same model with its heads made equal.

`python -m bench.emission` measures every type of the zoo that generates text and writes docs/emission.md. Folders are
loaded again in one process in which this project cannot be imported.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from passes.find import find
from rewrite.capture import capture
from rewrite.emit import emit
from rewrite.emit.choose import padded
from rewrite.emit.edits import edited
from rewrite.emit.files import auto_classes
from rewrite.emit.twin import table, twin
from rewrite.emit.validate import cache_bytes, greedy, relative
from rewrite.heads import Rewritten
from rewrite.layout import gather
from rewrite.site import Output, Site
from tests import bare
from tests.contract.by_hand import keep
from tests.zoo import ENTRIES, Entry

ROOT = Path(__file__).parents[1]
STEPS = 12
UNSTEADY = "training steps are not compared"
LOADER = """
import json, pathlib, sys
import torch, transformers
transformers.logging.set_verbosity_error()
for line in sys.stdin:
    top = pathlib.Path(line.strip())
    known = torch.load(top / "expected.pt", weights_only=False)
    try:
        auto = getattr(transformers, known["auto"])
        model, info = auto.from_pretrained(top / "half.of.it", trust_remote_code=True, output_loading_info=True)
        assert not any(info.values()), f"keys do not agree: {info}"
        out = model.eval().generate(**known["given"], **known["settings"])
        error = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(known["logits"], out.logits))
        same = torch.equal(out.sequences, known["tokens"])
        found = "" if same and error <= 1e-5 else f"logits differ by {error:.0e}"
    except Exception as error:
        found = f"{type(error).__name__}: {error}".split(chr(10))[0][:200]
    print(json.dumps([top.name, found]), flush=True)
"""


@dataclass
class Row:
    """One model type: which forms its sites got, and how far what came out is from the reference."""

    family: str
    name: str
    forms: dict[str, int] = field(default_factory=dict[str, int])
    refused: list[str] = field(default_factory=list[str])
    error: float | None = None
    tokens: bool | None = None
    bytes: float | None = None
    """What is held of the original's cache; None where it holds none."""
    folder: str = "-"
    left: int = 0
    """Attentions that are not lifted, so that they stay as they are."""
    note: str = ""

    @property
    def right(self) -> bool:
        """Whether everything that was emitted is what it should be."""
        exact = self.error is not None and self.error <= 1e-5 and bool(self.tokens) and self.folder == ""
        # less than a half is right too: a class that repeats its heads before it caches them held too much before
        return exact and (self.bytes is None or self.bytes <= 0.5 or bool(self.refused or self.left))


def plain(entry: Entry) -> str:
    """The entry's name without its attention kernel."""
    return entry.name.removesuffix("-sdpa").removesuffix("-eager")


def entries() -> list[Entry]:
    """One entry of the zoo a type: emission tries both kernels whichever the model comes with."""
    return list({plain(entry): entry for entry in reversed(ENTRIES)}.values())[::-1]


def halved(site: Site, model: PreTrainedModel) -> Rewritten:
    """The first kv head of each two, weights as they are."""
    return keep(site, site.k.heads // 2, gather(site, table(model).__getitem__))


def measure(entry: Entry, folder: Path) -> Row | None:
    """One type; None where it has no text to generate."""
    row = Row(entry.family, plain(entry))
    model, given = entry.build()
    if not isinstance(model, PreTrainedModel) or not isinstance(given, dict) or not model.can_generate():
        return None
    inputs = padded(given)
    try:
        found = find(capture(model, given, dynamic=False).static)
        sites = [s for s in found.sites if s.k.heads % 2 == 0 and isinstance(s.out, Output)]
        row.left = len(found.refused)
        row.note = f"{row.left} attentions not lifted" if row.left else ""
        changes = {s.name: (s, halved(s, model)) for s in sites}
        if not changes:
            row.note = "nothing to convert"
            return row
        _compare(row, model, changes, inputs, folder / row.name)
    # a type that cannot be measured is a row that says so
    except Exception as error:
        row.note = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
    return row


def _compare(
    row: Row, model: PreTrainedModel, changes: Mapping[str, tuple[Site, Rewritten]], inputs: dict[str, Any], top: Path
) -> None:
    made = emit(model, changes, inputs)
    row.forms = dict(Counter(made.forms.values()))
    row.refused = sorted(set(made.refused.values()))
    # whatever form a site has, this is said of it last
    row.note = "; ".join(filter(None, [row.note, *{w for why in made.why.values() for w in why if UNSTEADY in w}]))
    edits: dict[str, torch.Tensor] = {}
    for name in made.forms:
        edits |= edited(*changes[name], table(model).__getitem__)
    reference = twin(model, edits, share=True)
    with torch.no_grad():
        expected, out = greedy(reference, inputs, STEPS), greedy(made.model, inputs, STEPS)
    row.error = max(relative(a, b) for a, b in zip(expected.logits, out.logits, strict=True))
    row.tokens = torch.equal(expected.sequences, out.sequences)
    before = cache_bytes(expected.past_key_values)
    row.bytes = cache_bytes(out.past_key_values) / before if before else None
    if not made.forms:
        return
    made.model.save_pretrained(top / "half.of.it")
    auto = next(iter(auto_classes(type(model), model.config)), "AutoModel")
    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": STEPS, "min_new_tokens": STEPS}
    settings |= {"return_dict_in_generate": True, "output_logits": True, "use_cache": True}
    for token in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        if getattr(model.generation_config, token, None) is None:
            settings[token] = 0
    given = {n: v for n, v in inputs.items() if n not in ("labels", "use_cache")}
    known = {"given": given, "settings": settings, "auto": auto}
    torch.save(known | {"logits": out.logits, "tokens": out.sequences}, top / "expected.pt")


class Reader:
    """A process that loads folders and cannot import this project: one for all, starting it takes longest."""

    def __enter__(self) -> Reader:
        self.child = subprocess.Popen(bare.command(LOADER), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.child.communicate()

    def load(self, row: Row, folder: Path) -> None:
        """Load what `measure` wrote of this type, and note whether it is what was written."""
        if self.child.stdin is None or self.child.stdout is None or not (folder / row.name / "expected.pt").exists():
            return
        print(folder / row.name, file=self.child.stdin, flush=True)
        line = next((line for line in self.child.stdout if line.startswith("[")), '["", "the process ended"]')
        row.folder = json.loads(line)[1]


def page(rows: Sequence[Row]) -> str:
    """docs/emission.md."""
    lines = [
        "# Emission: GQA at half the kv heads, by model type",
        "",
        "Written by `python -m bench.emission`. Tiny random models; the reference is the model's own class at full",
        f"width with equal heads. {STEPS} greedy tokens, one row left padded; folders loaded in a process in which",
        "this project cannot be imported. Bytes: what is held of the original's cache.",
        "",
        *_summary(rows),
        "",
        "| type | family | forms | logits differ by | tokens | bytes | folder | note |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_line(r) for r in rows)]) + "\n"


def _summary(rows: Sequence[Row]) -> list[str]:
    out: list[str] = []
    for family in dict.fromkeys(r.family for r in rows):
        mine = [r for r in rows if r.family == family]
        done = [r for r in mine if r.forms]
        wrong = ", ".join(r.name for r in done if not r.right) or "none"
        out.append(f"- {family}: {len(done)} of {len(mine)} types emitted, wrong: {wrong}")
    return out


def _line(r: Row) -> str:
    forms = ", ".join(f"{n} {form}" for form, n in r.forms.items()) or "-"
    error = "-" if r.error is None else f"{r.error:.0e}"
    share = "-" if r.bytes is None else f"{r.bytes:.3f}"
    folder = {"": "equal", "-": "-"}.get(r.folder, r.folder)
    note = "; ".join([*r.refused, r.note]).strip("; ").replace("|", "/")
    tokens = {None: "-", True: "equal", False: "differ"}[r.tokens]
    return f"| {r.name} | {r.family} | {forms} | {error} | {tokens} | {share} | {folder} | {note} |"


def main() -> None:
    """Measure the types named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="types of the zoo; all by default")
    parser.add_argument("--write", action="store_true", help="write docs/emission.md")
    wanted = parser.parse_args()
    logging.set_verbosity_error()
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as place, Reader() as reader:
        for entry in entries():
            row = None if wanted.names and plain(entry) not in wanted.names else measure(entry, Path(place))
            if row is not None:
                reader.load(row, Path(place))
                rows[row.name] = row
                print(_line(row), flush=True)
    print("\n".join(_summary(list(rows.values()))))
    if wanted.write:
        (ROOT / "docs" / "emission.md").write_text(page(list(rows.values())), encoding="utf-8")


if __name__ == "__main__":
    main()
