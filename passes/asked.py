"""What was asked of one model, as data: which sites get which target, from what text, and how that is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from passes import Target
from passes.assign import assign, barred, suited, uncached
from passes.emit import How
from passes.find import Found
from passes.plan import Plan, make_plan, no_attention
from passes.sizes import describe
from passes.spread import open_shares, settled, words
from passes.tune import Tuning
from rewrite.calibration import Batch, Windows, batches
from rewrite.opened import Opened
from rewrite.program import Program
from rewrite.report import Calibration, Checked, Report
from rewrite.save import made_by
from rewrite.site import Site
from rewrite.spell import spell

Inputs = tuple[Any, ...] | dict[str, Any] | None
"""Example inputs: positional, or by keyword."""


@dataclass(frozen=True, eq=False)
class Asked:
    """One target, on the sites of one model that the globs `only` and `skip` leave."""

    target: Target | None
    inputs: Inputs
    only: str = "*"
    skip: tuple[str, ...] = ()
    opened: Opened | None = None
    calibration: Any = None
    windows: Windows | None = None
    out: Path | None = None
    tuning: Tuning | None = None
    how: How = "auto"

    def targets(self, program: Program, found: Found) -> dict[str, Target]:
        """The target of every site that can have it."""
        shared, chosen = barred(found), self.assigned(program, found)
        sites = {s.name: s for s in found.sites}
        fit = {n: t for n, t in chosen.items() if n not in shared and t.refuse(sites[n]) is None}
        # a stock class has one rank for all layers
        return settled(found.sites, fit, open_shares(found.sites, fit)) if self.how == "stock" else fit

    def assigned(self, program: Program, found: Found) -> dict[str, Target]:
        """The target of every chosen site."""
        if self.target is None:
            return {}
        return suited(assign(found, self.target, self.only, self.skip), uncached(program, found))

    def pairs(self, program: Program, found: Found) -> dict[str, tuple[Site, Site]]:
        """Every site that can have the target, and its new shape."""
        targets = self.targets(program, found)
        return {s.name: (s, targets[s.name].after(s)) for s in found.sites if s.name in targets}

    def plan(self, model: Any, program: Program, found: Found, context: int = 32_768) -> Plan:
        """What would be done, site by site."""
        label = self.opened.folder if self.opened is not None and self.opened.folder is not None else model
        if not found.sites:
            raise no_attention(describe(label, program.module), len(program.static.graph.nodes), found)
        chosen = self.assigned(program, found)
        spelled = (spell(self.target),) if self.target is not None else ()
        why = barred(found)
        sizes = words(found.sites, {n: t for n, t in chosen.items() if n not in why}, alike=self.how == "stock")
        return make_plan(label, program, found, chosen, spelled=spelled, barred=why, context=context, sizes=sizes)

    def batches(self, program: Program) -> list[Batch] | None:
        """The calibration for this model's inputs; at the traced size where the model takes no other."""
        if self.calibration is None or self.windows is None or self.opened is None:
            return None
        names = [str(n) for n in program.static.graph_signature.user_inputs if isinstance(n, str)]
        example = dict(zip(names, [*program.args, *program.kwargs.values()], strict=False))
        windows = self.windows
        if program.dynamic is None:
            rows, tokens = next(a.shape[:2] for a in example.values() if isinstance(a, Tensor) and a.dim() > 1)
            windows = Windows(tokens, windows.samples, rows)
        return batches(self.calibration, example, windows, self.opened.tokenizer)

    def key(self, seed: int, used: Calibration | None) -> str:
        """What a conversion hangs on, line by line: one that differs is another conversion."""
        lines = {
            "model": "" if self.opened is None else self.opened.fingerprint,
            "target": "" if self.target is None else spell(self.target),
            "only": self.only,
            "skip": " ".join(self.skip),
            "emit": self.how,
            "text": "" if used is None else f"{used.sha256}, {used.samples} windows of {used.length}",
            "tune": "" if self.tuning is None else str(self.tuning.steps),
            "seed": str(seed),
            "with": " ".join(f"{name} {version}" for name, version in made_by()),
        }
        return "".join(f"{name:8} {value}\n" for name, value in lines.items())

    def report(
        self,
        planned: Plan,
        used: Calibration | None,
        errors: Mapping[str, float | None],
        notes: Sequence[str],
        checked: Checked | None,
        seed: int,
    ) -> Report:
        """What was done."""
        if self.opened is None:
            raise ValueError("a report is of a model that was opened")
        return Report(
            version=1,
            model=self.opened.label,
            architecture=type(self.opened.working).__name__,
            fingerprint=self.opened.fingerprint,
            target=() if self.target is None else (spell(self.target),),
            tune=0 if self.tuning is None else self.tuning.steps,
            only=self.only,
            skip=self.skip,
            seed=seed,
            calibration=used,
            sites=planned.measured(errors),
            checked=checked,
            notes=(*((planned.sizes,) if planned.sizes else ()), *dict.fromkeys(notes)),
            made_by=made_by(),
        )
