"""The last step of a conversion: changes to a model of the source's kind, in the first form that computes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from passes.convert import named_tensors
from passes.lower import lower
from passes.lower_factored import unsplittable
from passes.lower_sparse import backends
from passes.plan import Plan, nothing_applies
from rewrite.emit import Emitted, emit_latent, emit_sparse, forecast_latent, forecast_sparse
from rewrite.emit import emit as emit_heads
from rewrite.emit import forecast as forecast_heads
from rewrite.emit.choose import Changes, padded
from rewrite.emit.deepseek import Layout, filled, layout
from rewrite.emit.factored import proven, shipped
from rewrite.emit.validate import differs_in_logits
from rewrite.heads import Change
from rewrite.program import Program
from rewrite.site import Factored, Latent, Site, Sparse

How = Literal["auto", "stock", "own"]
"""Of a latent: a class of the library that engines load, the model's own class with a modelling file, or the first
where an engine's sizes hold it without loss and the second else."""

PADDING = 1.25
"""How much wider than asked for a cache may be for the sake of an engine's sizes."""


def emit(program: Program, changes: Mapping[str, Change], planned: Plan, how: How = "auto") -> tuple[nn.Module, Plan]:
    """The new model, and the plan with the form that each site got. A module without a config becomes a graph."""
    pairs = {name: (c.site, c.rewritten) for name, c in changes.items() if c.rewritten.site is not c.site}
    stay = {name: "; ".join(c.rewritten.notes) for name, c in changes.items() if name not in pairs}
    if not isinstance(program.module, PreTrainedModel):
        graph, tensors = program.dynamic or program.static, named_tensors(program.module)
        cores = backends(graph, pairs)
        stay |= unsplittable(graph, pairs, tensors)
        stay |= {n: why.removeprefix("refused: ") for n, why in cores.items() if why.startswith("refused: ")}
        pairs = {name: pair for name, pair in pairs.items() if name not in stay}
        planned = planned.emitted({name: ("graph", cores.get(name, "")) for name in pairs}, stay)
        require(planned)
        return lower(graph, pairs, tensors), planned
    emitted = emit_changes(program.module, pairs, program, how)
    forms = {n: (f, "; ".join(emitted.why.get(n, ()))) for n, f in emitted.forms.items()}
    planned = planned.emitted(forms, {**stay, **emitted.refused}, emitted.held)
    require(planned)
    return emitted.model, planned


def emit_changes(model: PreTrainedModel, pairs: Changes, program: Program, how: How) -> Emitted:
    """By what the sites hold: latents in a cache, factors where nothing is cached, else heads."""
    if any(isinstance(new.site.form, Sparse) for _, new in pairs.values()):
        return emit_sparse(model, pairs, program.kwargs)
    latents = {n: pair for n, pair in pairs.items() if pair[1].latents is not None}
    factored = {n: pair for n, pair in pairs.items() if pair[1].factors is not None}
    if not factored:
        return _latent(model, pairs, program, how) if latents else emit_heads(model, pairs, program.kwargs)
    beside = proven(model, factored, program.kwargs)
    if not latents or not beside.recipes:
        emitted = _latent(model, latents, program, how) if latents else shipped(model, beside)
        return replace(emitted, refused={**beside.refused, **emitted.refused})
    emitted = emit_latent(model, latents, program.kwargs, beside)
    if emitted.forms:
        return emitted
    alone = shipped(model, beside)
    return replace(alone, refused={**emitted.refused, **alone.refused})


def _latent(model: PreTrainedModel, pairs: Changes, program: Program, how: How) -> Emitted:
    """The model's own class first: it is what a stock class is compared with."""
    own = emit_latent(model, pairs, program.kwargs)
    if how == "own" or not own.forms:
        return own
    if own.refused:
        stock: Emitted | str = f"{len(own.refused)} attentions of the model are not converted"
    else:
        stock = _stock(model, pairs, program, own, how)
    if isinstance(stock, Emitted):
        return stock
    if how == "stock":
        return Emitted(model, {}, {}, dict.fromkeys(pairs, f"stock: {stock}"))
    why = {n: (f"stock: {stock}", *own.why.get(n, ())) for n in own.forms}
    return Emitted(own.model, own.forms, why, own.refused)


def _stock(model: PreTrainedModel, pairs: Changes, program: Program, own: Emitted, how: How) -> Emitted | str:
    chosen = stock_layout(model, pairs, how)
    made = chosen if isinstance(chosen, str) else filled(model, pairs, chosen.sizes)
    if isinstance(chosen, str) or isinstance(made, str):
        return str(made)
    problem = differs_in_logits(own.model, made, padded(program.kwargs))
    if problem is not None:
        return problem
    held = dict.fromkeys(pairs, chosen.held)
    return Emitted(made, dict.fromkeys(pairs, "deepseek"), dict.fromkeys(pairs, chosen.notes), {}, held)


def stock_layout(model: PreTrainedModel, pairs: Changes, how: How) -> Layout | str:
    """At the sizes that engines take where those are not much larger than what was asked for; else, where the class
    itself was asked for, as small as the class can be."""
    asked = sum(new.site.cache_per_token for _, new in pairs.values()) / len(pairs)
    made = layout(model, pairs, engines=True)
    if isinstance(made, Layout) and made.held > PADDING * asked:
        made = f"engines take {made.held} numbers a token and layer, {asked:g} were asked for"
    if isinstance(made, str) and how == "stock":
        why, made = f"for transformers alone: {made}", layout(model, pairs, engines=False)
        return made if isinstance(made, str) else replace(made, notes=(why, *made.notes))
    return made


def forecast(module: nn.Module, pairs: Mapping[str, tuple[Site, Site]]) -> dict[str, tuple[str, str]]:
    """Which form each site will get, as far as shapes tell, and why not an earlier one."""
    if not isinstance(module, PreTrainedModel):
        return dict.fromkeys(pairs, ("graph", ""))
    latent = {n: old for n, (old, new) in pairs.items() if isinstance(new.form, Latent)}
    factored = [n for n, (_, new) in pairs.items() if isinstance(new.form, Factored)]
    sparse = {n: old for n, (old, new) in pairs.items() if isinstance(new.form, Sparse)}
    heads = {n: pair for n, pair in pairs.items() if n not in (*latent, *factored, *sparse)}
    made = forecast_heads(module, heads) | forecast_latent(module, latent) | forecast_sparse(sparse)
    return made | dict.fromkeys(factored, ("factored", ""))


def require(planned: Plan) -> None:
    """Raise where nothing was changed."""
    nothing = nothing_applies(planned)
    if nothing is not None:
        raise nothing
