"""What a conversion did and what it cost, as one dataclass; text and JSON here, the folder's files in card.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rewrite.record import from_json, to_json
from rewrite.table import change, columns, fold, memory, number


@dataclass(frozen=True)
class SiteRow:
    """One site, before and after: plan and report show the same rows. Cache in numbers per token."""

    name: str
    converted: bool
    before: str
    after: str
    cache_before: int
    cache_after: int
    parameters_before: int
    parameters_after: int
    form: str = ""
    """How it is emitted: stock, grouped, view or graph."""
    note: str = ""
    """Why it stays, or what its form costs."""
    error: float | None = None
    """Squared error of the attention's output relative to its energy, on the calibration text."""
    cache_fixed: int = 0
    """Numbers that the cache holds beside them however long the text is: of heads that read its last tokens alone."""

    @property
    def remark(self) -> str:
        """Form and note in one cell: stock, or grouped (why not stock)."""
        return f"{self.form} ({self.note})" if self.form and self.note else self.form or self.note


@dataclass(frozen=True)
class Pair:
    """A figure of the original and of the converted model."""

    before: float
    after: float


@dataclass(frozen=True)
class Checked:
    """What `check` measured; None is what could not be measured, and then `notes` says why."""

    tokens: int
    """Predicted tokens that the figures are over; 0 where outputs were compared on example inputs."""
    perplexity: Pair | None
    rise: tuple[float, float] | None
    """95 % interval of the relative perplexity rise, paired over windows of text."""
    same_next: float | None
    """Share of positions at which both models hold the same token most likely."""
    divergence: float | None
    """Kullback-Leibler divergence of the converted from the original next-token distribution, nats per token."""
    difference: float
    """Largest difference of the outputs, relative to the largest output."""
    lossless: float | None
    """The same after a conversion at the setting that loses nothing."""
    lossless_limit: float
    parameters: Pair
    cache: Pair | None
    """Bytes that the cache held after generating, in the type that the check computed in."""
    kind: str
    """That type: float32."""
    cache_tokens: int
    """Tokens that this cache was for."""
    max_loss: float | None
    broken: str = ""
    """The sentence why the output is broken: not a number, or of another shape."""
    notes: tuple[str, ...] = ()

    @property
    def loss(self) -> float | None:
        """The relative rise of perplexity."""
        return self.perplexity.after / self.perplexity.before - 1 if self.perplexity else None

    @property
    def failures(self) -> tuple[str, ...]:
        """A sentence for everything that makes the run fail."""
        found = [self.broken] if self.broken else []
        if self.lossless is not None and not self.lossless <= self.lossless_limit:
            found.append(
                f"at the setting that loses nothing outputs differ by {self.lossless:.2g}, limit "
                f"{self.lossless_limit:.2g}: this is an error of reattn, not of the target"
            )
        loss = self.loss
        if self.max_loss is not None and loss is not None and not loss <= self.max_loss:
            found.append(f"perplexity rose {100 * loss:.1f} %, limit {100 * self.max_loss:g} %")
        if self.max_loss is not None and loss is None and not self.broken:
            found.append(f"perplexity was not measured, so nothing is known of its limit, {100 * self.max_loss:g} %")
        return tuple(found)

    def text(self) -> str:
        """The table of `reattn check`."""
        rows = [["", "original", "converted", "change"], *self._quality(), *self._sizes()]
        lines = [columns(rows, indent=0)]
        lines += [f"note     {note}" for note in self.notes]
        return "\n".join(lines)

    def _quality(self) -> list[list[str]]:
        rows: list[list[str]] = []
        if self.perplexity is not None:
            rows.append(["perplexity", f"{self.perplexity.before:.4g}", f"{self.perplexity.after:.4g}", self._rise()])
        if self.same_next is not None:
            rows.append(["same next token", "100 %", f"{100 * self.same_next:.1f} %"])
        if self.divergence is not None:
            rows.append(["KL divergence", "0", f"{self.divergence:.4f} nats"])
        rows.append(["outputs", "", f"{self.difference:.2g}", "largest difference, relative"])
        if self.lossless is not None:
            ok = self.lossless <= self.lossless_limit
            verdict = "ok: wiring is right; the loss is the target's" if ok else "FAILED: this is an error of reattn"
            rows.append(["outputs, lossless limit", "", f"{self.lossless:.0e}", verdict])
        return rows

    def _rise(self) -> str:
        text = change(1, 1 + (self.loss or 0))
        if self.rise is not None:
            low, high = (change(1, 1 + x).removesuffix(" %") for x in self.rise)
            text += f"  (95 %: {low} … {high})"
        if self.max_loss is not None:
            text += f"   limit +{100 * self.max_loss:g} %"
            text += "   FAILED" if not (self.loss or 0) <= self.max_loss else "   ok"
        return text

    def _sizes(self) -> list[list[str]]:
        p = self.parameters
        rows = [["parameters", number(p.before), number(p.after), change(p.before, p.after)]]
        if self.cache is not None:
            c = self.cache
            label = f"kv cache, {self.cache_tokens} tokens"
            rows.append(
                [label, memory(c.before), memory(c.after), f"{change(c.before, c.after)}  measured in {self.kind}"]
            )
        return rows


@dataclass(frozen=True)
class Calibration:
    """The text that the conversion saw."""

    source: str
    sha256: str
    tokens: int
    samples: int
    length: int


@dataclass(frozen=True)
class Report:
    """Everything about one conversion. It holds no time and no place, so that equal runs leave equal bytes."""

    version: int
    model: str
    architecture: str
    fingerprint: str
    """sha256 over the source's files of weights and config; empty for a live module."""
    target: tuple[str, ...]
    """As written on the command line: gqa:8."""
    only: str
    skip: tuple[str, ...]
    seed: int
    calibration: Calibration | None
    sites: tuple[SiteRow, ...]
    checked: Checked | None
    notes: tuple[str, ...]
    made_by: tuple[tuple[str, str], ...]
    """(package, version)."""
    tune: int = 0
    """Steps of local tuning at every site; figures of a tuned model are not those of the closed form."""
    files: tuple[tuple[str, str], ...] = ()
    """(file, sha256) of what lies in the folder, but for what is made of this report; empty where none was written."""

    @property
    def converted(self) -> int:
        """How many sites changed."""
        return sum(row.converted for row in self.sites)

    @property
    def made(self) -> str:
        """The target, and whether it was tuned: gqa:3, tuned 200 steps."""
        return ", ".join(self.target) + (f", tuned {self.tune} steps" if self.tune else "")

    def json(self) -> str:
        """The report as JSON; `Report.read` gives it back."""
        return to_json(self)

    @staticmethod
    def read(text: str) -> Report:
        """The report that `json` wrote; ValueError where a field is missing or of another type."""
        return from_json(Report, text)

    def text(self) -> str:
        """The report as a page of text."""
        head = [
            f"model    {self.model} · {self.architecture}",
            f"target   {self.made}",
            f"text     {self._calibrated()}",
        ]
        parts = ["\n".join(head), site_table(self.sites)]
        if self.checked is not None:
            parts.append(self.checked.text())
            parts += [p for p in (self._worst(),) if p]
        parts.append("\n".join([*(f"note     {n}" for n in self.notes), self.result()]))
        return "\n\n".join(parts)

    def __str__(self) -> str:
        return self.text()

    def _calibrated(self) -> str:
        if self.calibration is None:
            return "none: converted from the weights alone; calibration text loses less"
        return f"{self.calibration.source}, {self.calibration.tokens:,} tokens"

    def result(self) -> str:
        """The last line: how it went."""
        stay = len(self.sites) - self.converted
        line = f"result   {self.converted} of {len(self.sites)} sites converted" + (
            ", the rest unchanged" if stay else ""
        )
        failures = self.checked.failures if self.checked else ()
        return f"result   FAILED: {'; '.join(failures)}" if failures else line

    def worst(self, count: int = 3) -> tuple[SiteRow, ...]:
        """The converted sites with the largest error, largest first."""
        known = [row for row in self.sites if row.converted and row.error is not None]
        return tuple(sorted(known, key=lambda row: -(row.error or 0.0))[:count])

    def _worst(self) -> str:
        rows = self.worst()
        if not rows:
            return ""
        top = rows[0].error or 1.0
        lines = [["worst sites", "error"]]
        lines += [[r.name, f"{r.error:.2g}", "▇" * max(1, round(8 * (r.error or 0) / top))] for r in rows]
        return columns(lines, indent=0) + "\n" + self.suggestion()

    def suggestion(self) -> str:
        """What to leave out first: the sites whose error stands out, with the words to type."""
        rows = self.worst(2)
        if len(rows) < 2 or self.converted < 3:
            return ""
        before = sum(r.cache_before for r in self.sites)
        kept = {r.name for r in rows}
        after = sum(r.cache_before if r.name in kept else r.cache_after for r in self.sites)
        skips = " ".join(f"--skip '{r.name}'" for r in rows)
        effect = f"cache {change(before, after)}" if before else "fewer sites"
        return f"leave these two out first: {effect}      {skips}"


def site_table(sites: Sequence[SiteRow]) -> str:
    """The rows as a table, equal neighbours folded."""
    rows = [["site", "now", "after", "numbers/token", "error", ""]]
    # sites with errors of their own are shown one by one
    alike = [replace(s, name="" if s.error is None else s.name) for s in sites]
    for name, at in fold([s.name for s in sites], alike):
        s = sites[at]
        cache = f"{s.cache_before} → {s.cache_after}" if s.converted else str(s.cache_before)
        cache += f" + {s.cache_fixed} in all" if s.cache_fixed else ""
        after = s.after if s.converted else "unchanged"
        rows.append([name, s.before, after, cache, "" if s.error is None else f"{s.error:.2g}", s.remark])
    return columns(rows)
