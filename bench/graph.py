"""A model converted in its captured graph, and the graph's perplexity: no emission, so any form can be measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import Node

from bench.quality import CONTEXT, held_out, perplexity
from codegen.latent import attention
from passes import Target
from passes.calibrate import Stream
from passes.convert import convert_sites, named_tensors
from passes.find import Found, find
from passes.mla_basis import of_tokens
from passes.moments import SiteBatch
from passes.region import Machine, Slice, slice_of, twins
from passes.trial import heads_outputs, inner, uniform
from passes.tune import Tuning
from rewrite.calibration import Batch, Windows, batches
from rewrite.capture import capture
from rewrite.heads import Change, Latents
from rewrite.layout import expanded
from rewrite.opened import open_model
from rewrite.program import Program
from rewrite.site import Site, Tensors

ROWS = 16
"""Windows that run at once."""


@dataclass(frozen=True, eq=False)
class Source:
    """A model of a folder, captured, with its calibration and the text that it is measured on."""

    name: str
    program: Program
    found: Found
    calibration: Sequence[Batch]
    rows: Tensor
    """(windows, CONTEXT) held-out tokens; windows of calibration are as long"""
    base: float
    """Perplexity as it is"""

    def refusal(self, target: Target) -> str | None:
        """Why the target does not fit some site."""
        reasons = (t.refuse(s) for s, t in zip(self.found.sites, self._each(target), strict=True))
        return next((r for r in reasons if r is not None), None)

    def convert(self, target: Target, calibrated: bool = True, tuning: Tuning | None = None) -> Mapping[str, Change]:
        """Every site rewritten, as `passes.convert` does it but for the measured errors; weights only where not
        `calibrated`."""
        names = [s.name for s in self.found.sites]
        targets = dict(zip(names, self._each(target), strict=True))
        given = self.calibration if calibrated else None
        return convert_sites(self.program, self.found, targets, given, lambda *_: None, tuning, measure=False)

    def ratio(self, changes: Mapping[str, Change], windows: int | None = None) -> float:
        """Perplexity of the converted model over the original's; on the first `windows` of the text."""
        if windows is None:
            return self.perplexity(changes, self.rows) / self.base
        some = self.rows[:windows]
        return self.perplexity(changes, some) / perplexity(self.program.module, some)

    def perplexity(self, changes: Mapping[str, Change], rows: Tensor) -> float:
        """Every token but the first of a window predicted, in float32."""
        loss = 0.0
        for part in rows.split(ROWS):
            logits = self._logits(changes, part)[:, :-1].flatten(0, 1)
            loss += float(nn.functional.cross_entropy(logits, part[:, 1:].flatten())) * len(part)
        return math.exp(loss / len(rows))

    def _each(self, target: Target) -> list[Target]:
        sites = self.found.sites
        return [target.for_site(i, len(sites)) for i in range(len(sites))]

    @property
    def _tensors(self) -> Tensors:
        return named_tensors(self.program.module)

    def _slices(self) -> tuple[Machine, list[Slice]]:
        running = self.program.dynamic or self.program.static
        machine = Machine(running, self.program.module)
        twin = twins(self.program.static.graph, running.graph)
        pairs = zip(self.found.sites, self.found.regions, strict=True)
        return machine, sorted((slice_of(machine, s, r, twin) for s, r in pairs), key=lambda p: machine.place[p.out])

    def _leave(self, stream: Stream, part: Slice, change: Change) -> None:
        made = change.rewritten
        edits = expanded(part.site, made.weights, made.site.kv_of, self._tensors)
        latents = made.latents
        stream.leave(part, edits, inner(made) if latents is None else _inner(part.site, latents, self.rows.shape[1]))

    def _logits(self, changes: Mapping[str, Change], ids: Tensor) -> Tensor:
        machine, slices = self._slices()
        scores = _scores(machine, ids)
        end = Slice(self.found.sites[0], (), (scores,), {}, scores, scores)
        stream = Stream(machine, [{"input_ids": ids}], [*slices, end], self._tensors)
        for part in slices:
            if part.site.name in changes:
                stream.reach(part)
                self._leave(stream, part, changes[part.site.name])
        stream.reach(end)
        return stream.envs[0][scores]


def source(models: Path, kind: str, samples: int, windows: int | None = None) -> Source:
    """The shipped model `kind`, with `samples` windows of calibration and `windows` of held-out text, None for all."""
    opened = open_model(models / kind)
    program = capture(opened.working, None)
    cut = Windows(CONTEXT, samples)
    given = batches(models / "calibration.txt", {"input_ids": 0}, cut, opened.tokenizer)
    rows = held_out(models / kind, models / "held_out.txt")[:windows]
    return Source(kind, program, find(program.static), given, rows, perplexity(opened.working, rows))


def _inner(site: Site, latents: Latents, length: int) -> Callable[[SiteBatch], Tensor]:
    if site.mods or site.mask.origin != "constant":
        return lambda batch: heads_outputs(latents, batch)
    return lambda batch: _direct(latents, batch, length)


def _direct(latents: Latents, batch: SiteBatch, length: int) -> Tensor:
    """(tokens, h, dv) in float32, where the mask hangs on positions alone; windows of `length` tokens, which a
    projection that takes rows of tokens gives one after the other."""

    def apart(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1).unflatten(0, (-1, length)).transpose(1, 2).float()

    site = batch.site
    seen = torch.from_numpy(site.mask.table(length, length))
    added = torch.zeros(length, length).masked_fill(~seen, -torch.inf)
    q = apart(batch.q) * uniform(site.q.after) * uniform(site.k.after)
    k = batch.k if latents.key_norm is None else batch.raw_k
    z = attention(latents, site, q, of_tokens(apart(k), apart(batch.v), batch.back), added=added)
    return z.transpose(1, 2).flatten(0, 1)


def _scores(machine: Machine, ids: Tensor) -> Node:
    """The output that scores the next token: (b, t, vocabulary)."""
    out = next(n for n in machine.nodes if n.op == "output")
    values = [(n, n.meta.get("val")) for n in out.all_input_nodes]
    return next(n for n, v in values if isinstance(v, Tensor) and v.dim() == ids.dim() + 1)
