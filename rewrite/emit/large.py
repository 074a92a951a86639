"""The forms of emission for a model that is never held: what its files will hold, name by name.

`full` lies on meta and says names, shapes and config. That a form computes what it should was seen on the model cut
short (rewrite/short.py), whose emission is `proven`; here each site gets the form of the first site of its kind, and
its own tensors, by the same functions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM, PreTrainedModel

from rewrite.cuts import site_cuts
from rewrite.emit import factored, latent, sparse
from rewrite.emit.choose import Changes, Emitted, padded
from rewrite.emit.deepseek import Layout, attention, scaled
from rewrite.emit.deepseek_refuse import layer_of
from rewrite.emit.edits import edited, per_query_head
from rewrite.emit.factored import module_tensors
from rewrite.emit.files import dress
from rewrite.emit.latent import factor_of
from rewrite.emit.observe import Log, observe
from rewrite.emit.stock import Field, Pairs, built, config_with, fields, smaller
from rewrite.emit.twin import table, twin
from rewrite.emit.validate import kernels
from rewrite.emit.view import Recipe, recipes, small_tensors
from rewrite.errors import Refused
from rewrite.modules import owner
from rewrite.site import Affine, Output, Site, Tensors

Made = Callable[[str], Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Large:
    """A model to be written. `model` lies on meta: its class, its config and the names and shapes of its tensors."""

    model: PreTrainedModel
    site_of: Mapping[str, str]
    """Tensor -> the site that may give it anew."""
    made: Made
    """Site -> its tensors."""
    scaled: Mapping[str, float] = field(default_factory=dict[str, float])
    """Tensor -> what it is multiplied by."""


@dataclass(frozen=True, eq=False)
class Proven:
    """The emission of the model cut short, and which of its sites stands for which."""

    model: PreTrainedModel
    """The source cut short, in float32."""
    inputs: Mapping[str, Any]
    emitted: Emitted
    near: Changes
    """Changes of the sites that it holds."""
    kind: Mapping[str, str]
    """Site of the full model -> the site of the short one that has its form."""

    def form(self, name: str) -> str:
        """The form that a site gets."""
        return self.emitted.forms[self.kind[name]]


def touched(site: Site) -> set[str]:
    """Every tensor of the source that a conversion of the site may change."""
    names: set[str | None] = set()
    for operand in (site.q, site.k, site.v):
        names |= {r.tensor for r in operand.roots} | {r.bias for r in operand.roots}
        names |= {a.tensor for a in (operand.gain, operand.shift, operand.after) if isinstance(a, Affine)}
    names |= {a.tensor for a in per_query_head(site)}
    if isinstance(site.out, Output):
        names |= {site.out.root.tensor, site.out.root.bias}
    return {n for n in names if n}


def own(full: PreTrainedModel, changes: Changes, names: Sequence[str], proven: Proven, tensors: Tensors) -> Large:
    """The model in its own class: every form but deepseek. `names` are the sites that get one."""
    pairs: Pairs = {n: (site, new.site) for n in names for site, new in [changes[n]]}
    same = [n for n, (old, new) in pairs.items() if old.k.heads == new.k.heads and proven.form(n) == "stock"]
    stock = {n: pair for n, pair in pairs.items() if proven.form(n) == "stock" and n not in same}
    taken, reasons = fields(full, stock, same)
    for name in stock:
        if name not in taken:
            raise _unlike(name, reasons[name])
    made = twin(full, {}, share=True) if not taken else built(type(full), config_with(full.config, taken))
    made.tie_weights()
    if hasattr(full, "generation_config"):
        made.generation_config = copy.deepcopy(full.generation_config)
    told = _recipes(full, changes, [n for n in names if n not in taken and n not in same], proven)
    if told:
        with torch.device("meta"):
            dress(made, {"version": 1, "sites": list(told.values())})
    make = _Own(full, changes, tensors, taken, told, _last(proven, taken, tensors))
    site_of = {tensor: n for n in names for tensor in touched(pairs[n][0])}
    roots = {f"{owner(pairs[n][0])}.reattn.": n for n in told if told[n]["form"] == "latent"}
    there = list(made.state_dict())
    roots |= {f"{p['module']}.": n for n in told for p in told[n].get("projections", ())}
    site_of |= {tensor: n for tensor in there for root, n in roots.items() if tensor.startswith(root)}
    return Large(made, {t: n for t, n in site_of.items() if t in there}, make)


@dataclass(frozen=True, eq=False)
class _Own:
    """A site's tensors in the model's own class, in float32."""

    full: PreTrainedModel
    changes: Changes
    tensors: Tensors
    taken: Mapping[str, Field]
    told: Mapping[str, Recipe]
    last: bool

    def __call__(self, name: str) -> Mapping[str, Tensor]:
        site, new = self.changes[name]
        edits = edited(site, new, self.tensors)
        if name in self.taken:
            less = smaller({name: (site, new.site)}, {name: self.taken[name]}, edits, last=self.last)
            if isinstance(less, str):
                raise _unlike(name, less)
            return less
        if name not in self.told or self.told[name]["form"] == "sparse":
            return edits
        if new.factors is not None:
            known = table(self.full)
            found = site_cuts(site, new, known.__getitem__)
            paths = tuple(f"{p['module']}." for p in self.told[name]["projections"])
            return edits | module_tensors(found, edits, {n: self.tensors(n) for n in known if n.startswith(paths)})
        if new.latents is None:
            return small_tensors(site, new.site, edits, table(self.full))
        inner = latent.module_tensors(site, new.latents, factor_of(site, self.told[name]["rope"]))
        return edits | {f"{owner(site)}.reattn.{n}": value for n, value in inner.items()}


def _last(proven: Proven, taken: Mapping[str, Field], tensors: Tensors) -> bool:
    """Which of equal heads stays: the one that makes the tensors which were proven."""
    known = table(proven.emitted.model)
    for name, (site, new) in proven.near.items():
        if name in taken:
            made = smaller({name: (site, new.site)}, {name: taken[name]}, edited(site, new, tensors), last=False)
            if isinstance(made, str) or any(not torch.equal(v, known[n]) for n, v in made.items()):
                return True
    return False


def _recipes(full: PreTrainedModel, changes: Changes, names: Sequence[str], proven: Proven) -> dict[str, Recipe]:
    """Site -> what the runtime is told of it: the recipe of the proven site with this site's names and sizes."""
    if not names:
        return {}
    shown: dict[str, Recipe] = {r["site"]: r for r in proven.emitted.model.config.reattn["sites"]}
    form = proven.form(names[0])
    logs = {} if form == "factored" else _logs(proven, rewritten=form not in ("latent", "sparse"))
    told: dict[str, Recipe] = {}
    known = table(full)
    for name in names:
        site, new = changes[name]
        first = proven.near[proven.kind[name]][0]
        log = None if form == "factored" else _renamed(logs[owner(first)], owner(first), owner(site))
        if log is None:
            cut = site_cuts(site, new, known.__getitem__)
            made = factored.recipe(full, site, cut or f"{name} has no factors")
        elif new.latents is not None:
            made = latent.recipe(full, site, new.latents, log)
        elif form == "sparse":
            made = sparse.recipe(site, new.site.mask, log)
        else:
            wanted = shown[first.name]
            found, reasons = recipes(full, site, new.site, log, kernels(proven.model))
            alike = [r for r in found if all(r.get(k) == wanted.get(k) for k in ("form", "whole", "keep", "of"))]
            made = alike[0] if alike else "; ".join(reasons.values()) or f"it is not like {first.name}"
        if isinstance(made, str):
            raise _unlike(name, made)
        told[name] = made
    return told


def _logs(proven: Proven, *, rewritten: bool) -> Mapping[str, Log]:
    model, sites = proven.model, [site for site, _ in proven.near.values()]
    if rewritten:
        values = table(model)
        edits = {t: v for site, new in proven.near.values() for t, v in edited(site, new, values.__getitem__).items()}
        model = twin(model, edits, share=True)
    return observe(model, sites, padded(proven.inputs))


def _renamed(log: Log, old: str, new: str) -> Log:
    """What the module `old` did, as if `new` had."""
    return replace(log, normed={f"{new}{path.removeprefix(old)}": shapes for path, shapes in log.normed.items()})


def _unlike(name: str, reason: str) -> Refused:
    return Refused(
        "stream",
        f"{name} cannot be written as the sites of its kind are",
        reason,
        "leave --memory away, where the model fits into memory",
    )


def stock(full: PreTrainedModel, changes: Changes, planned: Layout) -> Large:
    """The stock DeepSeek-V3 class."""
    made = built(DeepseekV3ForCausalLM, planned.config)
    made.generation_config = copy.deepcopy(full.generation_config)
    layers = {layer_of(site) or "": n for n, (site, _) in changes.items()}

    def make(name: str) -> Mapping[str, Tensor]:
        site, new = changes[name]
        return {n: value.float() for n, value in attention(site, new, planned.sizes).items()}

    names = [n for n, _ in made.named_parameters()]
    of_site = {n: layers[n.partition(".self_attn.")[0]] for n in names if ".self_attn." in n}
    factors = {n: planned.sizes.residual for n in names if scaled(n) and planned.sizes.residual != 1.0}
    return Large(made, of_site, make, factors)
