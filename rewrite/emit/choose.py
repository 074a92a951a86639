"""Which form each site gets, decided by building it and running the whole model against a reference."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rewrite.emit import runtime
from rewrite.emit.edits import edited
from rewrite.emit.files import dress
from rewrite.emit.observe import Log, observe
from rewrite.emit.stock import Field, Pairs, config_with, fields, rebuilt, smaller
from rewrite.emit.twin import as_before, in_float, put, table, twin
from rewrite.emit.validate import differs, kernels, too_much_held, unsteady
from rewrite.emit.view import Recipe, projections, recipes, small_tensors
from rewrite.heads import Rewritten
from rewrite.layout import Edits
from rewrite.modules import owner
from rewrite.site import Output, Site

Changes = Mapping[str, tuple[Site, Rewritten]]
"""Site name -> (the source's site, the target's result)."""


@dataclass(frozen=True, eq=False)
class Emitted:
    """The converted model, which form each site got, why not an earlier one, and the sites that stay as they are."""

    model: PreTrainedModel
    forms: Mapping[str, str]
    why: Mapping[str, Sequence[str]]
    refused: Mapping[str, str]
    held: Mapping[str, int] = field(default_factory=dict[str, int])
    """Numbers cached per token where the form holds more than the target asked for."""


@dataclass
class Work:
    """What emission knows while it decides; all models in it are float32."""

    model: PreTrainedModel
    changes: Changes
    inputs: Mapping[str, Any]
    full: Mapping[str, Edits]
    """Site name -> tensors of the source's shapes."""
    logs: Mapping[str, Log]
    unsteady: str | None = None
    """Why training steps are not compared."""
    same: tuple[str, ...] = ()
    """Sites that keep their number of heads: new weights in the old shapes."""
    stock: dict[str, Field] = field(default_factory=dict)
    last: bool = False
    recipes: dict[str, list[Recipe]] = field(default_factory=dict)
    """Site name -> recipes that are left to try, the best one first."""
    why: dict[str, list[str]] = field(default_factory=dict)

    def no(self, name: str, form: str, reason: str) -> None:
        """Note why a site cannot have a form."""
        self.why.setdefault(name, []).append(f"{form}: {reason}")

    def expanded(self, names: Sequence[str]) -> PreTrainedModel:
        """The reference: the model's own class with the rewritten weights at full width."""
        return twin(self.model, _joined(self.full, names), share=True)


def emit(model: PreTrainedModel, changes: Changes, inputs: Mapping[str, Any]) -> Emitted:
    """A new model with the rewritten sites; `model` is not written to.

    `changes` is site name -> (source site, rewritten). `inputs` are keyword arguments of one forward; they are padded
    on the left here. A site that no form computes exactly is left as it is, with its sentence in `refused`.
    """
    refused = {n: reason for n in changes if (reason := unfit(n, changes)) is not None}
    work = _prepare(model, {n: c for n, c in changes.items() if n not in refused}, padded(inputs))
    _choose_stock(work)
    _offer_recipes(work)
    _settle_recipes(work)
    chosen = {n: r[0] for n, r in work.recipes.items() if r}
    for name in work.changes:
        if name not in work.stock and name not in chosen and name not in work.same:
            refused[name] = "; ".join(work.why[name])
    forms = dict.fromkeys([*work.same, *work.stock], "stock") | {n: str(r["form"]) for n, r in chosen.items()}
    made = _build(work, list(work.stock), chosen, ship=True)
    problem = _problem(work, made, [*work.stock, *chosen]) if forms else None
    if problem is not None or isinstance(made, str):
        raise RuntimeError(f"what was proven before it was written out is wrong after: {problem}")
    as_before(made, model)
    # two ways of one form may be tried: what the first could not do is no news where the second can
    why = {n: [w for w in reasons if not w.startswith(f"{forms.get(n)}:")] for n, reasons in work.why.items()}
    if work.unsteady is not None:
        why |= {n: [*why.get(n, ()), work.unsteady] for n in forms}
    return Emitted(made, forms, why, refused)


def padded(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with the first row padded on the left, where there are tokens: a mask that is not bound shows."""
    out = dict(inputs)
    ids = out.get("input_ids")
    if isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[1] > 3:
        mask = out.get("attention_mask")
        mask = mask.clone() if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(ids)
        mask[0, : ids.shape[1] // 3] = 0
        out["attention_mask"] = mask
    return out


def unfit(name: str, changes: Changes) -> str | None:
    """Why a site cannot be emitted beside the others, whatever its form."""
    site, new = changes[name]
    if not isinstance(site.out, Output) and tuple(new.order) != tuple(range(site.heads)):
        return f"its heads cannot be permuted: {site.out}"
    mine = {r.tensor for o in (site.q, site.k, site.v) for r in o.roots}
    for other, (there, _) in changes.items():
        theirs = {r.tensor for o in (there.q, there.k, there.v) for r in o.roots}
        if other != name and mine & theirs:
            return f"its projection {min(mine & theirs)} also serves {other}"
    return None


def _joined(parts: Mapping[str, Edits], names: Sequence[str]) -> Edits:
    return {tensor: value for name in names for tensor, value in parts[name].items()}


def _prepare(model: PreTrainedModel, changes: Changes, inputs: Mapping[str, Any]) -> Work:
    source = in_float(model)
    tensors = table(source)
    full = {n: edited(site, new, tensors.__getitem__) for n, (site, new) in changes.items()}
    reference = twin(source, _joined(full, list(full)), share=True)
    same = tuple(n for n, (site, new) in changes.items() if site.k.heads == new.site.k.heads)
    logs = observe(reference, [s for s, _ in changes.values()], inputs)
    return Work(source, changes, inputs, full, logs, unsteady(reference, inputs), same)


def _pairs(changes: Changes) -> Pairs:
    return {n: (site, new.site) for n, (site, new) in changes.items()}


def forecast(model: PreTrainedModel, pairs: Pairs) -> dict[str, tuple[str, str]]:
    """Site name -> (form, why not an earlier one) from shapes alone, for a model whose parameters may be on meta.

    Between "grouped" and "view" only a run decides, so what is not stock is called "grouped or view" here.
    """
    same = [n for n, (site, new) in pairs.items() if site.k.heads == new.k.heads]
    taken, reasons = fields(model, pairs, same)
    forms: dict[str, tuple[str, str]] = {}
    for name, (site, new) in pairs.items():
        if name in same or name in taken:
            forms[name] = ("stock", "")
            continue
        made = projections(model, site, new)
        why = f"stock: {reasons[name]}"
        forms[name] = ("refused", f"{why}; view: {made}") if isinstance(made, str) else ("grouped or view", why)
    return forms


def _choose_stock(work: Work) -> None:
    """Sites whose own class takes the new number of heads; all of them, proven, or none."""
    taken, reasons = fields(work.model, _pairs(work.changes), work.same)
    for name, reason in reasons.items():
        work.no(name, "stock", reason)
    problem: str | None = None
    for work.last in (False, True) if taken else ():
        work.stock = taken
        made = _build(work, list(taken), {}, ship=False)
        problem = _problem(work, made, list(taken))
        if problem is None:
            return
    work.stock = {}
    for name in taken:
        work.no(name, "stock", str(problem))


def _offer_recipes(work: Work) -> None:
    """For each site that is not stock the recipes that its structure allows."""
    known = kernels(work.model)
    for name, (site, new) in work.changes.items():
        if name in work.stock or name in work.same:
            continue
        work.recipes[name], reasons = recipes(work.model, site, new.site, work.logs[owner(site)], known)
        for form, reason in reasons.items():
            work.no(name, form, reason)


def _settle_recipes(work: Work) -> None:
    """Try all first choices at once; where that fails, kind by kind, and drop the choices that fail alone."""
    while chosen := {n: r[0] for n, r in work.recipes.items() if r}:
        if _fails(work, chosen) is None:
            return
        kinds: dict[str, dict[str, Recipe]] = {}
        for name, recipe in chosen.items():
            kinds.setdefault(_kind(work, name, recipe), {})[name] = recipe
        dropped = False
        for group in kinds.values():
            problem = _fails(work, group)
            for name in group if problem is not None else ():
                work.no(name, group[name]["form"], str(problem))
                work.recipes[name].pop(0)
                dropped = True
        if not dropped:
            for name in chosen:
                work.no(name, chosen[name]["form"], "passes alone, but not beside the others")
                work.recipes[name].clear()


def _fails(work: Work, chosen: Mapping[str, Recipe]) -> str | None:
    made = _build(work, list(work.stock), chosen, ship=False)
    return _problem(work, made, [*work.stock, *chosen])


def _kind(work: Work, name: str, recipe: Recipe) -> str:
    """Recipes that differ only in where they stand are one kind."""
    owner = type(work.model.get_submodule(recipe["cache"])).__name__ if recipe.get("cache") else ""
    same = {k: recipe.get(k) for k in ("form", "keep", "of", "whole")}
    return owner + json.dumps([same, name.rpartition(".")[2]])


def _build(work: Work, stock: Sequence[str], chosen: Mapping[str, Recipe], *, ship: bool) -> PreTrainedModel | str:
    """The model with these forms. What ships is a copy of its own and made by the generated file's text."""
    edits = _joined(work.full, [*work.same, *stock, *chosen])
    if stock:
        small = smaller(_pairs(work.changes), {n: work.stock[n] for n in stock}, edits, last=work.last)
        if isinstance(small, str):
            return small
        made = rebuilt(work.model, config_with(work.model.config, work.stock), small)
    else:
        made = twin(work.model, edits, share=not ship)
    if not chosen:
        return made
    recipe = {"version": 1, "sites": list(chosen.values())}
    if ship:
        dress(made, recipe)
    else:
        runtime.install(made, recipe)
    tensors = table(work.model)
    for name in chosen:
        site, new = work.changes[name]
        for tensor, value in small_tensors(site, new.site, work.full[name], tensors).items():
            put(made, tensor, value)
    return made


def _problem(work: Work, made: PreTrainedModel | str, names: Sequence[str]) -> str | None:
    if isinstance(made, str):
        return made
    names = [*work.same, *names]
    found = differs(work.expanded(names), made, work.inputs, training=work.unsteady is None)
    if found is not None:
        return found
    slots = {
        next(iter(log.slots)): name
        for name in names
        if len((log := work.logs[owner(work.changes[name][0])]).slots) == 1
    }
    # a site that keeps its heads holds what its class holds, which may be more than them
    expected = {slot: work.changes[name][1].site.k.heads for slot, name in slots.items() if name not in work.same}
    return too_much_held(made, work.inputs, expected)
