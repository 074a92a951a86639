"""Plan: what a conversion would do to every site, from shapes alone; no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes import Target
from passes.assign import holds_cache
from passes.sizes import Source, count, describe, parameters, saved, shape
from passes.sparse_words import work
from passes.verdict import next_target, no_attention, nothing_applies, offer, require_space
from rewrite.errors import ReattnError
from rewrite.machine import Machine, this_machine
from rewrite.program import Program
from rewrite.record import to_json
from rewrite.report import Pair, SiteRow
from rewrite.runtimes import runtimes
from rewrite.site import Latent, Refusal, Sink, Site, Sparse
from rewrite.table import change, columns, fold, memory, number, size
from rewrite.text import mod_text, norm_text, rope_text

if TYPE_CHECKING:
    from passes.find import Found

__all__ = ["Plan", "make_plan", "no_attention", "nothing_applies", "require_space"]

BASE_MEMORY = 600_000_000
"""Bytes that Python with torch and transformers holds before a model is read."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What `plan` returns; `print` it. `sites` are proven; `refused` holds (name, reason) of what is no site."""

    source: Source
    target: tuple[str, ...]
    sites: tuple[Site, ...]
    after: tuple[Site, ...]
    """Shapes after the conversion; where nothing changes the same object as in `sites`."""
    refused: tuple[tuple[str, str], ...]
    why: Mapping[str, Refusal]
    """Reason, source line and nearest miss of every refused name."""
    rows: tuple[SiteRow, ...]
    context: int
    memory_needed: int
    here: Machine
    sizes: str = ""
    """How one total comes to the sites, where that is not for shapes to say."""

    @property
    def converted(self) -> int:
        """How many sites change."""
        return sum(row.converted for row in self.rows)

    @property
    def weights(self) -> Pair:
        """Bytes on disk."""
        return Pair(self.source.bytes, self.source.bytes - saved(self.sites, self.after) * self.source.each)

    @property
    def cache(self) -> Pair:
        """Bytes of the cache at `context` tokens, batch 1."""
        before = [self.context * r.cache_before for r in self.rows]
        after = [self.context * r.cache_after + r.cache_fixed for r in self.rows]
        each = self.source.each
        return Pair(each * sum(before), each * sum(min(pair) for pair in zip(before, after, strict=True)))

    @property
    def work(self) -> tuple[str, ...]:
        """What is saved where fewer pairs of query and key are read, and where no time is."""
        return work(self.sites, self.after, self.context)

    @property
    def runs_in(self) -> tuple[str, ...]:
        """What loads the result; each line is held by a test."""
        return runtimes({r.form for r in self.rows if r.converted})

    def emitted(
        self, forms: Mapping[str, tuple[str, str]], refused: Mapping[str, str], held: Mapping[str, int] | None = None
    ) -> Plan:
        """The plan with the form that each site got and what it costs; `refused`: name -> why no form computes it,
        `held`: numbers cached per token where a form holds more than was asked for."""
        rows: list[SiteRow] = []
        after: list[Site] = []
        for row, old, new in zip(self.rows, self.sites, self.after, strict=True):
            form, cost = forms.get(row.name, ("", row.note))
            stays = row.name in refused
            width = (held or {}).get(row.name, row.cache_after)
            made = replace(row, form=form, note=cost, cache_after=width)
            rows.append(_stay(row, refused[row.name]) if stays else made)
            after.append(old if stays else new)
        return replace(self, rows=tuple(rows), after=tuple(after))

    def found(self, sites: Mapping[str, Site]) -> Plan:
        """The plan with the shapes that a conversion came to: what calibration chooses is not known before."""
        pairs = zip(self.rows, self.sites, self.after, strict=True)
        changed = [(row, old, sites.get(row.name, new)) for row, old, new in pairs]
        rows = tuple(_row(o, n, self.source.generates, r.note) if r.name in sites else r for r, o, n in changed)
        planned, made = (sum(r.cache_after for r in some if r.name in sites) for some in (self.rows, rows))
        words = self.sizes
        fewer = any(isinstance(s.form, Sparse) for s in sites.values())
        if words and not fewer and len({r.cache_after for r in rows if r.name in sites}) > 1:
            words = f"sizes differ by site as measured: {made} numbers a token in all, {planned} planned"
        return replace(self, rows=rows, after=tuple(new for _, _, new in changed), sizes=words)

    def measured(self, errors: Mapping[str, float | None]) -> tuple[SiteRow, ...]:
        """The rows with the error of each site."""
        return tuple(replace(row, error=errors.get(row.name) if row.converted else None) for row in self.rows)

    def refusal(self) -> ReattnError | None:
        """The error that a conversion by this plan would end in, as it changes nothing; else None."""
        return nothing_applies(self)

    def json(self) -> str:
        """The plan as JSON."""
        return to_json(
            {
                "version": 1, "model": self.source, "target": self.target, "sites": self.rows,
                "refused": [{"name": n, **_refusal(self.why[n])} for n, _ in self.refused],
                "converted": self.converted, "weights": self.weights, "context": self.context, "cache": self.cache,
                "memory_needed": self.memory_needed, "runs_in": self.runs_in, "sizes": self.sizes,
                "work": self.work,
            }
        )  # fmt: skip

    def __str__(self) -> str:
        return "\n\n".join(part for part in (self._head(), self._table(), self._totals()) if part)

    def _head(self) -> str:
        s = self.source
        lines = [
            f"model    {s.label} · {s.architecture} · {number(s.parameters)} parameters · {s.kind} · "
            f"{size(s.bytes)} {s.held}",
            f"found    {count(len(self.sites), 'attention site')}, each proven"
            + (f"; {len(self.refused)} not recognised" if self.refused else ""),
        ]
        return "\n".join(lines)

    def _table(self) -> str:
        head = ["site", "now", "after", "cache/token", "parameters", ""]
        rows = [head if self.target else [*head[:2], "", *head[3:]]]
        alike = [(replace(r, name=""), details(site)) for r, site in zip(self.rows, self.sites, strict=True)]
        for name, at in fold([r.name for r in self.rows], alike):
            cells = _cells(self.rows[at], self.source.each, bool(self.target))
            rows.append([name, *cells] if self.target else [name, *cells, details(self.sites[at])])
        reasons = [(str(self.why[n]), self.why[n].where, self.why[n].nearest) for n, _ in self.refused]
        for name, at in fold([n for n, _ in self.refused], reasons):
            rows.append([name, "not recognised", "", "", "", reasons[at][0]])
        return columns(rows)

    def _totals(self) -> str:
        latent = any(isinstance(s.form, Latent) for s in self.after)
        free = offer(self.sites) if self.source.generates and not latent else None
        offered = [] if free is None else [f"offer    {free}"]
        if not self.target:
            to = next_target(self.sites, self.source.generates)
            offered += [] if to is None else [f"next     reattn plan {self.source.label} --to {to}"]
            return "\n".join(offered)
        w, c = self.weights, self.cache
        rows = [["", "now", "after"], ["weights", size(w.before), size(w.after), change(w.before, w.after)]]
        if c.before:
            note = f"at {self.context:,} tokens, batch 1, {self.source.kind}"
            rows.append(["kv cache", memory(c.before), memory(c.after), change(c.before, c.after), note])
        lines = [columns(rows, indent=0)]
        lines += [f"sizes    {self.sizes}"] if self.sizes else []
        lines += [f"{'work' if i == 0 else '':9}{line}" for i, line in enumerate(self.work)]
        lines += ["quality  lossy; `convert` measures it", *offered]
        for i, line in enumerate(self.runs_in):
            lines.append(("runs in  " if i == 0 else "         ") + line)
        lines += [self._needs(), f"{self.converted} of {len(self.rows) + len(self.refused)} converted."]
        if self.converted:
            to = " ".join(f"--to {t}" for t in self.target)
            lines.append(f"next     reattn convert {self.source.label} OUT {to} --calibrate TEXT --text OTHER_TEXT")
        return "\n".join(lines)

    def _needs(self) -> str:
        here, ram, disk = self.here, self.memory_needed, self.weights.after
        ok = "ok" if ram <= here.memory and disk <= here.disk else "NOT ENOUGH"
        less = "; from the weights alone it goes site by site in less" if ram > here.memory else ""
        return (
            f"needs    about {size(ram)} RAM · {size(disk)} free disk · no GPU"
            f"       this machine: {size(here.memory)} RAM, {size(here.disk)} disk free  {ok}{less}"
        )

    def explain(self, name: str) -> str:
        """Everything known about one site: the site on one line and what would happen to it, or why it is none."""
        for site, row in zip(self.sites, self.rows, strict=True):
            if site.name == name:
                proof = site.proof
                lines = [str(site), f"  at {site.where}" if site.where else ""]
                lines += [f"  proven at input size {s:g}: largest relative error {e:.1e}" for s, e in proof.errors]
                if self.target:
                    lines.append(f"  {row.before} → {row.after}" if row.converted else f"  unchanged: {row.note}")
                return "\n".join(line for line in lines if line)
        r = self.why[name]
        lines = [f"{name} is not recognised", f"  {r.reason}"]
        return "\n".join(
            [*lines, *([f"  at {r.where}"] if r.where else []), *([f"  nearest: {r.nearest}"] if r.nearest else [])]
        )


def make_plan(
    model: Any,
    program: Program,
    found: Found,
    targets: Mapping[str, Target],
    *,
    spelled: tuple[str, ...] = (),
    barred: Mapping[str, str] | None = None,
    context: int = 32_768,
    sizes: str = "",
) -> Plan:
    """The plan for `model` (module or path) whose sites were found; `targets` holds the target of every chosen site.

    `barred`: sites that no target may change, and why; `sizes` as in `Plan`. Raises where no attention was found.
    """
    source = describe(model, program.module)
    if not found.sites:
        raise no_attention(source, len(program.static.graph.nodes), found)
    outcomes = [_outcome(s, targets.get(s.name), bool(targets), (barred or {}).get(s.name)) for s in found.sites]
    after = tuple(new for new, _ in outcomes)
    rows = [_row(old, new, source.generates, note) for old, (new, note) in zip(found.sites, outcomes, strict=True)]
    return Plan(
        source=source,
        target=spelled,
        sites=found.sites,
        after=after,
        refused=tuple((r.name, r.refusal.reason) for r in found.refused),
        why={r.name: r.refusal for r in found.refused},
        rows=tuple(rows),
        context=context,
        memory_needed=_memory(source, found.sites),
        here=this_machine(Path.cwd()),
        sizes=sizes,
    )


def _outcome(site: Site, target: Target | None, wanted: bool, barred: str | None) -> tuple[Site, str]:
    if target is None:
        return site, "left out" if wanted else ""
    reason = barred or target.refuse(site)
    return (site, f"refused: {reason}") if reason else (target.after(site), "")


def _row(site: Site, new: Site, generates: bool, note: str) -> SiteRow:
    cached = generates and holds_cache(site)
    return SiteRow(
        name=site.name,
        converted=new is not site,
        before=shape(site),
        after=shape(new),
        cache_before=site.cache_per_token if cached else 0,
        cache_after=new.cache_per_token if cached else 0,
        cache_fixed=new.cache_fixed if cached else 0,
        parameters_before=parameters(site),
        parameters_after=parameters(new),
        note=note,
    )


def _stay(row: SiteRow, reason: str) -> SiteRow:
    return replace(
        row,
        converted=False,
        after=row.before,
        cache_after=row.cache_before,
        cache_fixed=0,
        parameters_after=row.parameters_before,
        form="",
        note=f"refused: {reason}",
    )


def _memory(source: Source, sites: tuple[Site, ...]) -> int:
    """The model in float32, its copy, and float64 statistics of the largest site: a few matrices of its widths."""
    widest = max((s.q.roots[0].columns + s.heads * (s.q.dim + s.v.dim) for s in sites), default=0)
    return BASE_MEMORY + 2 * source.parameters * max(4, source.each) + 8 * 3 * widest**2


def details(site: Site) -> str:
    """What else a site does, without names of tensors, so that layers read alike: mask=causal  rope=half(1e4)."""
    parts = [f"mask={site.mask}"]
    for letter, o in (("q", site.q), ("k", site.k)):
        parts += [f"{letter}_rope={rope_text(o.rope, o.dim)}"] if o.rope is not None else []
        parts += [f"{letter}_norm={norm_text(o.norm)}"] if o.norm is not None else []
    parts += ["sinks" if isinstance(mod, Sink) else mod_text(mod) for mod in site.mods]
    return "  ".join([*parts, *(["cross"] if site.cross else [])])


def _cells(row: SiteRow, each: int, wanted: bool) -> list[str]:
    def both(before: int, after: int, show: Any) -> str:
        return show(before) if before == after else f"{show(before)} → {show(after)}"

    cache = both(row.cache_before * each, row.cache_after * each, memory) if row.cache_before else "–"
    cache += f" + {memory(row.cache_fixed * each)} in all" if row.cache_fixed else ""
    after = row.after if row.converted else "unchanged"
    return [
        row.before,
        after if wanted else "",
        cache,
        both(row.parameters_before, row.parameters_after, number),
        row.remark,
    ]


def _refusal(r: Refusal) -> dict[str, str]:
    return {"reason": r.reason, "where": r.where, "nearest": r.nearest}
