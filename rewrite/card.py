"""The files that tell of a conversion, in its folder: reattn.toml, report.json, report.html and README.md."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rewrite.report import Report, SiteRow, site_table
from rewrite.table import change, fold


def write_card(folder: Path, report: Report, licence: str = "") -> None:
    """Write the four files beside the weights. They hold no date, so that equal runs leave equal bytes."""
    files = {
        "reattn.toml": recipe(report),
        "report.json": report.json(),
        "report.html": page(report),
        "README.md": card(report, licence, *_classes(folder)),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def recipe(report: Report) -> str:
    """Everything that the run depended on, as TOML."""
    lines = [
        "# what made this folder; the same values make the same bytes on the same machine",
        "version = 1",
        f"model   = {{ path = {_toml(report.model)}, sha256 = {_toml(report.fingerprint)} }}",
        f"target  = {_toml(report.target)}",
        f"only    = {_toml(report.only)}",
        f"skip    = {_toml(report.skip)}",
        f"seed    = {report.seed}",
        f"tune    = {report.tune}",
    ]
    if report.calibration is not None:
        c = report.calibration
        lines.append(
            f"calibration = {{ path = {_toml(c.source)}, sha256 = {_toml(c.sha256)}, "
            f"samples = {c.samples}, length = {c.length}, tokens = {c.tokens} }}"
        )
    lines.append("made_by = { " + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in report.made_by) + " }")
    return "\n".join(lines) + "\n"


def _toml(value: str | Sequence[str]) -> str:
    # a JSON string is a TOML basic string, but for DEL, which JSON leaves as it is
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def command(report: Report, out: str = "OUT") -> str:
    """The command line that repeats the run."""
    words = ["reattn convert", report.model, out, *(f"--to {t}" for t in report.target)]
    if report.calibration is not None:
        c = report.calibration
        words += [f"--calibrate {c.source}", f"--calibrate-samples {c.samples}", f"--calibrate-length {c.length}"]
    words += [f"--only '{report.only}'"] if report.only != "*" else []
    words += [f"--skip '{s}'" for s in report.skip]
    words += [f"--tune {report.tune}"] if report.tune else []
    words += [f"--seed {report.seed}"] if report.seed else []
    return " ".join(words)


def _classes(folder: Path) -> tuple[str, str]:
    """The Auto class that a folder with its own modelling file is loaded with, "" for an ordinary checkpoint; and the
    class that its config names, which is not always that of the source."""
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    models = sorted(k for k in config.get("auto_map", {}) if k.startswith("AutoModel"))
    return models[-1] if models else "", str((config.get("architectures") or [""])[0])


def card(report: Report, licence: str = "", auto: str = "", kind: str = "") -> str:
    """The model card. `licence` is that of the base model, copied where its card names one; `auto` is the Auto class
    that runs the folder's own modelling file, "" where there is none, `kind` the class of an ordinary checkpoint."""
    loader, trust = (auto, ", trust_remote_code=True") if auto else (kind or report.architecture, "")
    head = ["---", "library_name: transformers", f"base_model: {json.dumps(report.model, ensure_ascii=False)}"]
    head += [f"license: {licence}"] if licence else []
    head += ["tags: [reattn]", "---", ""]
    body = [
        f"# {Path(report.model).name}, attention rewritten: {report.made}",
        "",
        f"Made by [reattn](reattn.toml) from `{report.model}` ({report.architecture}): "
        f"{report.converted} of {len(report.sites)} attentions converted{_cache(report.sites)}.",
        "",
        "## How to load",
        "",
        "```python",
        f"from transformers import {loader}",
        "",
        f'model = {loader}.from_pretrained("path/to/this/folder"{trust})',
        "```",
        "",
        "## What it costs",
        "",
        "```",
        report.checked.text() if report.checked is not None else "not checked",
        "```",
        "",
        "Calibration: "
        + (
            f"`{report.calibration.source}`, {report.calibration.tokens:,} tokens."
            if report.calibration
            else "none; converted from the weights alone."
        ),
        "",
        "## Sites",
        "",
        "```",
        site_table(report.sites),
        "```",
        "",
        "## Repeat it",
        "",
        "```",
        command(report),
        "```",
    ]
    return "\n".join(head + body) + "\n"


def _cache(sites: Sequence[SiteRow]) -> str:
    before, after = sum(s.cache_before for s in sites), sum(s.cache_after for s in sites)
    beside = " a token of long texts" if any(s.cache_fixed for s in sites) else ""
    return f", kv cache {change(before, after)}{beside}" if before else ""


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .2rem .6rem; }
tr:nth-child(even) { background: #8881; } pre { overflow-x: auto; background: #8881; padding: .8rem; }
.bar { background: #c60; height: .7rem; display: inline-block; } .same { opacity: .6; }
.failed { color: #b00; font-weight: bold; }
"""


def page(report: Report) -> str:
    """One HTML file without network: sites with bars for their errors, and what check measured."""
    title = html.escape(f"{report.model}: {report.made}")
    failed = report.checked is not None and bool(report.checked.failures)
    return "\n".join(
        [
            f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>',
            f"<style>{_STYLE}</style>",
            f"<h1>{title}</h1>",
            f'<p class="{"failed" if failed else "done"}">{html.escape(report.result())}</p>',
            "<h2>Measured</h2>",
            f"<pre>{html.escape(report.checked.text() if report.checked else 'not checked')}</pre>",
            "<h2>Sites</h2>",
            "<table><tr><th>site<th>now<th>after<th>numbers/token<th>error<th></tr>",
            *_html_rows(report.sites),
            "</table>",
            "<h2>Notes</h2>",
            f"<ul>{''.join(f'<li>{html.escape(n)}' for n in report.notes) or '<li>none'}</ul>",
            "<h2>Recipe</h2>",
            f"<pre>{html.escape(recipe(report))}</pre></html>\n",
        ]
    )


def _html_rows(sites: Sequence[SiteRow]) -> list[str]:
    top = max((s.error or 0.0 for s in sites), default=0.0) or 1.0
    alike = [replace(s, name="") for s in sites]
    rows: list[str] = []
    for name, at in fold([s.name for s in sites], alike):
        s = sites[at]
        bar = "" if s.error is None else _bar(s.error, s.error / top)
        cells = [name, s.before, s.after if s.converted else "unchanged", f"{s.cache_before} → {s.cache_after}"]
        text = "".join(f"<td>{html.escape(c)}" for c in cells)
        rows.append(f'<tr class="{"" if s.converted else "same"}">{text}<td>{bar}<td>{html.escape(s.remark)}</tr>')
    return rows


def _bar(error: float, share: float) -> str:
    return f'<span class="bar" style="width:{10 * share:.2f}rem"></span> {error:.2g}'
