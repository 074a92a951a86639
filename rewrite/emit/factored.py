"""Form "factored": where nothing is cached, the projections of keys and values go through few numbers of a token.

The modules that project are replaced in their places (see runtime/factored.py), all else runs as it did. Proven on the
whole model against its own class with the same matrices multiplied out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rewrite.cuts import Cut, site_cuts
from rewrite.emit import runtime
from rewrite.emit.choose import Changes, Emitted, padded, unfit
from rewrite.emit.edits import edited
from rewrite.emit.files import dress
from rewrite.emit.twin import as_before, in_float, put, table, twin
from rewrite.emit.validate import differs, unsteady
from rewrite.emit.view import runs
from rewrite.layout import Edits
from rewrite.modules import owner
from rewrite.site import Site

Recipe = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Proven:
    """Recipes that compute what they should, the source's tensors that change beside them, what the new modules hold,
    and why other sites have none."""

    recipes: Mapping[str, Recipe]
    edits: Edits
    tensors: Mapping[str, Tensor]
    refused: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def install(self, made: PreTrainedModel) -> None:
        """Fill a model in which the recipes are installed."""
        for name, value in self.tensors.items():
            put(made, name, value)


@dataclass
class _Work:
    source: PreTrainedModel
    changes: Changes
    recipes: dict[str, Recipe] = field(default_factory=dict[str, Recipe])
    edits: dict[str, Edits] = field(default_factory=dict[str, Edits])
    tensors: dict[str, Edits] = field(default_factory=dict[str, Edits])
    refused: dict[str, str] = field(default_factory=dict[str, str])

    def differs(self, names: list[str], inputs: Mapping[str, Any], training: bool) -> str | None:
        """What is wrong with these sites in their new form; the same numbers at full width say what is right."""
        edits = {n: x for name in names for n, x in self.edits[name].items()}
        made = twin(self.source, edits, share=True)
        runtime.install(made, {"version": 1, "sites": [self.recipes[n] for n in names]})
        self.proven(names).install(made)
        return differs(twin(self.source, edits, share=True), made, inputs, training=training)

    def proven(self, names: list[str], *notes: str) -> Proven:
        """What is known of these sites."""
        edits = {n: x for name in names for n, x in self.edits[name].items()}
        tensors = {n: x for name in names for n, x in self.tensors[name].items()}
        return Proven({n: self.recipes[n] for n in names}, edits, tensors, self.refused, notes)


def shipped(model: PreTrainedModel, done: Proven) -> Emitted:
    """A model of its own, made by the generated file's text."""
    why = {n: (r,) for n, r in done.refused.items()}
    if not done.recipes:
        return Emitted(model, {}, why, done.refused)
    made = twin(in_float(model), done.edits, share=False)
    dress(made, {"version": 1, "sites": list(done.recipes.values())})
    done.install(made)
    as_before(made, model)
    like(made, model, done)
    return Emitted(
        made, dict.fromkeys(done.recipes, "factored"), why | dict.fromkeys(done.recipes, done.notes), done.refused
    )


def like(made: PreTrainedModel, model: PreTrainedModel, done: Proven) -> None:
    """Give what the new modules hold the dtype of the projections that stood in their places."""
    old = table(model)
    for recipe in done.recipes.values():
        for one in recipe["projections"]:
            weight = old[f"{one['module']}.weight"]
            for name, value in list(made.get_submodule(one["module"]).named_parameters()):
                kind = nn.Parameter(value.detach().to(weight.dtype), requires_grad=weight.requires_grad)
                path, _, leaf = f"{one['module']}.{name}".rpartition(".")
                setattr(made.get_submodule(path), leaf, kind)


def proven(model: PreTrainedModel, changes: Changes, inputs: Mapping[str, Any]) -> Proven:
    """The recipes of all sites that have one, held against the whole model."""
    source, inputs = in_float(model), padded(inputs)
    work, tensors = _Work(source, changes), table(source)
    for name, (site, new) in changes.items():
        made = unfit(name, changes) or recipe(source, site, site_cuts(site, new, tensors.__getitem__))
        if isinstance(made, str):
            work.refused[name] = f"factored: {made}"
            continue
        work.recipes[name] = made
        work.edits[name] = edited(site, new, tensors.__getitem__)
        work.tensors[name] = module_tensors(site_cuts(site, new, tensors.__getitem__), work.edits[name], tensors)
    names = list(work.recipes)
    shaky = unsteady(source, inputs) if names else None
    if names and work.differs(names, inputs, shaky is None) is not None:
        names = _alone(work, names, inputs, shaky is None)
    return work.proven(names, *([shaky] if shaky else []))


def _alone(work: _Work, names: list[str], inputs: Mapping[str, Any], training: bool) -> list[str]:
    """The sites of those kinds of modules that pass without the others; why the others do not goes to `refused`."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        module = work.source.get_submodule(owner(work.changes[name][0]))
        kinds.setdefault(type(module).__name__, []).append(name)
    passed: list[str] = []
    for group in kinds.values():
        problem = work.differs(group, inputs, training)
        work.refused |= dict.fromkeys(group, f"factored: {problem}") if problem is not None else {}
        passed += group if problem is None else []
    problem = work.differs(passed, inputs, training) if passed and len(kinds) > 1 else None
    if problem is not None:
        work.refused |= dict.fromkeys(passed, f"factored: passes alone, but not beside the others: {problem}")
        return []
    return passed


def recipe(model: nn.Module, site: Site, found: tuple[Cut, ...] | str) -> Recipe | str:
    """What the runtime needs to know of one site, or why it cannot be had."""
    if isinstance(found, str):
        return found
    projections: list[Recipe] = []
    for cut in found:
        path, _, leaf = cut.tensor.rpartition(".")
        module = model.get_submodule(path)
        own = {n for n, _ in module.named_parameters()}
        if (
            leaf != "weight"
            or own - {"weight", "bias"}
            or list(module.children())
            or cut.bias not in (None, f"{path}.bias")
        ):
            return f"{cut.tensor} belongs to no module that does nothing but project"
        parts = [{"rank": len(p.factor.down), "rows": len(p.rows), "lender": _module(p.lender)} for p in cut.parts]
        sizes = {"inputs": cut.inputs, "rest": len(cut.rest), "bias": cut.count if "bias" in own else 0}
        sizes["axis"] = 1 if module.get_parameter(leaf).dim() > 2 else -1
        projections.append({"module": path, **sizes, "parts": parts, "runs": runs(cut.order)})
    return {"site": site.name, "form": "factored", "projections": projections}


def _module(tensor: str | None) -> str | None:
    return None if tensor is None else tensor.rpartition(".")[0]


def module_tensors(found: tuple[Cut, ...] | str, edits: Edits, tensors: Mapping[str, Tensor]) -> Edits:
    """What the new modules hold, by its name in the model."""
    if isinstance(found, str):
        raise ValueError(found)
    out: Edits = {}
    for cut in found:
        path, old = cut.tensor.rpartition(".")[0], tensors[cut.tensor]
        held: Edits = {f"up.{i}": p.factor.up for i, p in enumerate(cut.parts)}
        held |= {f"down.{i}": p.factor.down for i, p in enumerate(cut.parts) if p.lender is None}
        if len(cut.rest):
            held["rest"] = cut.matrix(edits.get(cut.tensor, old))[torch.from_numpy(cut.rest)]
        bias = f"{path}.bias"
        if bias in tensors:
            held["bias"] = edits.get(bias, tensors[bias]).detach()
        out |= {f"{path}.{n}": x.to(old.dtype).to(old.device).contiguous().clone() for n, x in held.items()}
    return out
