"""Form "latent": the module runs its own forward, its cache holds one vector a token (see runtime/latent.py).

Proven in two steps: with latents that lose nothing the whole model must be the original in every mode, which proves
the wiring; then the model with its real latents must say the same with its cache as without, which proves the reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rewrite.emit import runtime
from rewrite.emit.choose import Changes, Emitted, padded, unfit
from rewrite.emit.edits import edited
from rewrite.emit.factored import Proven, like
from rewrite.emit.files import dress
from rewrite.emit.observe import Log, Table, observe
from rewrite.emit.twin import as_before, in_float, put, table, twin
from rewrite.emit.validate import differs, inconsistent, latents_held
from rewrite.exact import exact_latents, exact_rebuilt, exact_shared
from rewrite.heads import Latents, Rewritten
from rewrite.modules import key_norm_module, owner
from rewrite.shared import shared
from rewrite.site import FloatArray, Rope, Site

UNWRITTEN = "it writes no cache, so there is nothing to make smaller"

Recipe = dict[str, Any]


def emit_latent(
    model: PreTrainedModel, changes: Changes, inputs: Mapping[str, Any], beside: Proven | None = None
) -> Emitted:
    """A new model whose rewritten sites cache their latents; `model` is not written to.

    `changes` is site name -> (source site, rewritten with latents), `inputs` keyword arguments of one forward, `beside`
    the model's sites that cache nothing.
    """
    source, inputs = in_float(model), padded(inputs)
    logs = observe(source, [site for site, _ in changes.values()], inputs)
    refused: dict[str, str] = {}
    sites: set[str] = set()
    for name, (site, new) in changes.items():
        made = unfit(name, changes) or recipe(source, site, _exact(site, new), logs[owner(site)])
        if isinstance(made, str):
            refused[name] = f"latent: {made}"
        else:
            sites.add(name)
    refused |= _unproven(source, {n: c for n, c in changes.items() if n in sites}, logs, inputs)
    kept = {n: c for n, c in changes.items() if n not in refused}
    if not kept:
        return Emitted(model, {}, {n: (r,) for n, r in refused.items()}, refused)
    made = _shipped(source, kept, logs, beside)
    held = {log.layer: new.latents for site, new in kept.values() if (log := logs[owner(site)]).layer is not None}
    # a class that does not read its own cache as it wrote it says nothing about the latents
    steady = inconsistent(source, inputs) is None
    problem = (inconsistent(made, inputs) if steady else None) or latents_held(
        made, inputs, {n: x.rank + x.rope_dim for n, x in held.items() if x is not None}
    )
    if problem is not None:
        raise RuntimeError(f"the model with its latents does not read them as it wrote them: {problem}")
    as_before(made, model)
    forms, why = dict.fromkeys(kept, "latent"), {n: _stays(site) for n, (site, _) in kept.items()}
    if beside is None:
        return Emitted(made, forms, why, refused)
    like(made, model, beside)
    return Emitted(made, forms | dict.fromkeys(beside.recipes, "factored"), why, {**refused, **beside.refused})


def forecast_latent(model: PreTrainedModel, sites: Mapping[str, Site]) -> dict[str, tuple[str, str]]:
    """Source sites by name -> (form, what it costs), before anything is run."""
    if not model.can_generate():
        return dict.fromkeys(sites, ("refused", "latent: it generates nothing and caches nothing"))
    why = "stock: its class caches what it cached"
    return {name: ("latent", "; ".join([why, *_stays(site)])) for name, site in sites.items()}


def _stays(site: Site) -> tuple[str, ...]:
    """What the file holds that nothing is read from any more."""
    few = shared(site)
    if few is None:
        return ()
    name = few.up.tensor.removeprefix(f"{owner(site)}.")
    return (f"{name} stays in the file: the module expands one token with it, and the kernel reads the latent",)


def recipe(model: PreTrainedModel, site: Site, latents: Latents, log: Log) -> Recipe | str:
    """What the runtime needs to know of one site, or why it cannot be had."""
    reason = log.refusal(log.writes, UNWRITTEN)
    if reason is not None:
        return reason
    keep = _keep(site, log)
    if isinstance(keep, str):
        return keep
    shown = _shown(model.get_submodule(owner(site)), site, latents, log)
    if isinstance(shown, str):
        return shown
    rope: Recipe | None = None
    if site.k.rope is not None:
        wanted = site.k.rope.frequencies if latents.up_k is not None else latents.frequencies.numpy()
        found = _columns(site.k.rope, log.tables, wanted)
        if isinstance(found, str):
            return found
        rope = found
        if latents.up_k is not None:
            rope |= {"pairs": site.k.rope.pairs.T.tolist(), "turns": site.k.rope.frequencies.tolist()}
    sizes = {"rank": latents.rank, "rope_dim": latents.rope_dim, "heads": site.heads}
    few = shared(site)
    features = len(keep) * (site.k.dim + site.v.dim) if few is None else few.width
    sizes |= {"dim": site.k.dim, "value_dim": site.v.dim, "features": features}
    if latents.up_k is not None and site.kv_of != tuple(i // (site.heads // site.k.heads) for i in range(site.heads)):
        return f"its {site.heads} query heads do not read its {site.k.heads} kv heads in order"
    place = {
        "site": site.name,
        "form": "latent",
        "module": owner(site),
        "rebuilt": latents.up_k is not None,
        "key_norm": None,
        "shown": shown,
        "shared": None if few is None else {"argument": list(log.argument)},
    }
    if latents.key_norm is not None:
        norm = _key_norm(site, log, factor_of(site, rope))
        if isinstance(norm, str):
            return norm
        place |= {"key_norm": norm}
    return place | {"sizes": sizes, "keep": keep, "rope": rope}


def _key_norm(site: Site, log: Log, factor: float) -> Recipe | str:
    """How the module that norms the keys takes them."""
    path, g, d = key_norm_module(site), site.k.heads, site.k.dim
    given = log.normed.get(path, [])
    calls = [s[1:] for s in given]
    if len(given) != log.called:
        return f"its key norm '{path}' ran {len(given)} times in {log.called} calls"
    for shape, fits in (
        ("row", lambda s: len(s) == 2 and s[1] == g * d),
        ("tokens", lambda s: len(s) == 3 and s[1:] == (g, d)),
        ("heads", lambda s: len(s) == 3 and s[::2] == (g, d)),
    ):
        if all(fits(s) for s in calls):
            return {"module": path, "shape": shape, "factor": factor}
    return f"its key norm '{path}' is given {sorted(set(given))}, not {g} heads of {d} of every token"


def factor_of(site: Site, rope: Recipe | None) -> float:
    """What the keys and queries that the module shows are multiplied by: it stands in its rope's table or behind it."""
    turned = 1.0 if rope is None else float(rope["factor"])
    return turned if site.k.after is None else float(site.k.after.constant.reshape(-1)[0])


def _shown(module: nn.Module, site: Site, latents: Latents, log: Log) -> Recipe | str | None:
    """How a module that asks for no kernel is shown expanded heads: memory is saved, time is not. None for others."""
    if log.kernels:
        return None
    kind = type(module).__name__
    if shared(site) is not None:
        return f"{kind} computes its attention itself and asks for no kernel that could read a latent"
    if site.k.rope is not None or latents.up_k is not None:
        return f"{kind} computes its attention itself and asks for no kernel that could read a latent under a rope"
    readers = [site.kv_of.index(i) for i in range(site.k.heads)]
    if {t.shape[1] for w in log.writes for t in (w.k, w.v)} == {site.heads}:
        readers = list(range(site.heads))
    return {"readers": readers, "argument": list(log.argument), "pair": log.pair}


def _keep(site: Site, log: Log) -> list[int] | str:
    """Which of the heads that the module shows are the site's kv heads."""
    few = shared(site)
    if few is not None:
        given = {(w.k.shape[1], w.k.shape[3], w.v.shape[3]) for w in log.writes}
        if given == {(1, few.rank, len(few.dims))}:
            return [0]
        widths = f"{few.rank} and {len(few.dims)} numbers that its heads share"
        return f"its cache is given (heads, widths) {sorted(given)}, not the {widths}"
    shown = {t.shape[1] for w in log.writes for t in (w.k, w.v)}
    if shown == {site.k.heads}:
        return list(range(site.k.heads))
    if shown == {site.heads}:
        return [site.kv_of.index(i) for i in range(site.k.heads)]
    return f"its cache is given {sorted(shown)} heads, the site has {site.k.heads} kv heads"


def _columns(rope: Rope, tables: list[Table], wanted: FloatArray) -> Recipe | str:
    """Which columns of the module's rope table turn by the wanted frequencies, and the factor that the table has."""
    if not tables:
        return "its rope table is not among its arguments, so that the cached channels could not be turned by it"
    longest = max(tables, key=lambda t: t.cos.shape[1])
    turns = torch.complex(longest.cos.double(), longest.sin.double())[-1]
    factor = float(turns[0, 0].abs())
    step = (turns[1:] / turns[:-1]).angle().mean(0).numpy()
    pairs, table = rope.frequencies, longest
    ways = [(place, sign) for place in ([*range(len(pairs))], [2 * j for j in range(len(pairs))]) for sign in (1, -1)]
    for place, sign in ways:
        if max(place) < len(step) and np.allclose(sign * step[place], pairs, rtol=1e-3, atol=1e-5):
            columns = [place[int(np.abs(pairs - f).argmin())] for f in wanted]
            where = {"name": table.name, "place": table.place, "columns": columns}
            return where | {"sign": sign, "factor": round(factor, 6)}
    return f"the columns of its rope table '{table.name}' do not turn by the {len(pairs)} frequencies of its keys"


def _unproven(
    source: PreTrainedModel, changes: Changes, logs: Mapping[str, Log], inputs: Mapping[str, Any]
) -> dict[str, str]:
    """Sites that are not the original's even with latents that lose nothing, with the sentence."""
    exact = {n: (site, replace(new, latents=_exact(site, new))) for n, (site, new) in changes.items()}
    if not exact or differs(source, _built(source, exact, logs), inputs) is None:
        return {}
    kinds: dict[str, dict[str, Any]] = {}
    for name, change in exact.items():
        kinds.setdefault(type(source.get_submodule(owner(change[0]))).__name__, {})[name] = change
    out: dict[str, str] = {}
    for group in kinds.values():
        problem = differs(source, _built(source, group, logs), inputs)
        out |= {name: f"latent: {problem}" for name in group if problem is not None}
    return out or dict.fromkeys(exact, "latent: passes alone, but not beside the others")


def _exact(site: Site, new: Rewritten) -> Latents:
    """Latents of the same kind that lose nothing."""
    few, held = shared(site), _of(new)
    if few is not None:
        return exact_shared(site, few, new.weights)
    return exact_latents(site) if held.up_k is None else replace(exact_rebuilt(site), key_norm=held.key_norm)


def _built(source: PreTrainedModel, changes: Changes, logs: Mapping[str, Log]) -> PreTrainedModel:
    """A copy of the source with the sites' latents, its other tensors shared."""
    made, recipes = twin(source, {}, share=True), _recipes(source, changes, logs)
    runtime.install(made, recipes)
    _fill(made, changes, recipes)
    return made


def _shipped(
    source: PreTrainedModel, changes: Changes, logs: Mapping[str, Log], beside: Proven | None
) -> PreTrainedModel:
    """A model of its own, made by the generated file's text."""
    tensors, edits = table(source), dict[str, Tensor]() if beside is None else dict(beside.edits)
    for site, new in changes.values():
        edits |= edited(site, new, tensors.__getitem__)
    made, recipes = twin(source, edits, share=False), _recipes(source, changes, logs)
    others = [] if beside is None else [*beside.recipes.values()]
    dress(made, {**recipes, "sites": [*recipes["sites"], *others]})
    _fill(made, changes, recipes)
    if beside is not None:
        beside.install(made)
    return made


def _recipes(source: PreTrainedModel, changes: Changes, logs: Mapping[str, Log]) -> Recipe:
    made: list[Recipe] = []
    for site, new in changes.values():
        one = recipe(source, site, _of(new), logs[owner(site)])
        if isinstance(one, str):
            raise ValueError(f"{site.name}: {one}")
        made.append(one)
    return {"version": 1, "sites": made}


def _of(new: Rewritten) -> Latents:
    if new.latents is None:
        raise ValueError(f"{new.site.name} has no latents")
    return new.latents


def _fill(made: PreTrainedModel, changes: Changes, recipes: Recipe) -> None:
    for one in recipes["sites"]:
        site, new = changes[one["site"]]
        for name, value in module_tensors(site, _of(new), factor_of(site, one["rope"])).items():
            put(made, f"{owner(site)}.reattn.{name}", value)


def module_tensors(site: Site, latents: Latents, factor: float) -> dict[str, Tensor]:
    """The runtime module's parameters. A factor that the rope's table carries, or that stands behind the rope, is in
    the keys and queries that the module shows, but not in those that the latents are made for."""
    down = torch.cat([latents.down, latents.turn])
    few = shared(site)
    # of what is shared the part that turns is a key as it is
    keys = slice(site.k.heads * site.k.dim) if few is None else slice(few.rank, None)
    down[:, keys] /= factor
    out = {"down": down, "up_v": latents.up_v}
    if latents.up_k is not None:
        # behind a norm the factor would have no effect: there the runtime puts it on what the norm gives
        out["up_k"] = latents.up_k * (factor if latents.key_norm is None else 1.0)
        return {name: value.float().contiguous() for name, value in out.items()}
    out["read"] = latents.read * factor
    if latents.rope_dim:
        out["query_turn"] = latents.query_turn * factor
    return {name: value.float().contiguous() for name, value in out.items()}
