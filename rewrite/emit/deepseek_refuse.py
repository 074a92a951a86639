"""Why an attention, or a whole model, cannot be one of the stock DeepSeek-V3 class: a sentence, or None."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from rewrite.emit.deepseek_rows import uniform
from rewrite.heads import Rewritten
from rewrite.mask import causal
from rewrite.site import Operand, Output, Sink, Site, Softcap

NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "rms_norm_eps",
    "hidden_act",
    "max_position_embeddings",
)
"""Numbers of the source's config that the class is built from."""


def refuse_model(model: PreTrainedModel) -> str | None:
    """What its config and the type of its weights say."""
    config: Any = model.config
    if torch.float16 in {config.dtype, *(p.dtype for p in model.parameters())}:
        return (
            "float16 cannot hold the class's latent norm: the latent rows are scaled by 2^-36, and its smallest number "
            "is 2^-24; load the model in bfloat16"
        )
    lacking = [n for n in NEEDED if getattr(config, n, None) is None]
    if lacking:
        return f"its config names no {', '.join(lacking)}, of which a DeepSeek-V3 decoder is built"
    return None


def layer_of(site: Site) -> str | None:
    """The decoder layer that holds all of the site's tensors: "model.layers.3"."""
    places = {".".join(t.split(".")[:3]) for t in owned(site)}
    place = places.pop()
    return place if not places and place.startswith("model.layers.") else None


def owned(site: Site) -> set[str]:
    """Parameters that the site's attention takes with it."""
    names = {r.tensor for o in (site.q, site.k, site.v) for r in o.roots}
    return names | ({site.out.root.tensor} if isinstance(site.out, Output) else set())


def refuse_sites(model: PreTrainedModel, changes: Mapping[str, tuple[Site, Rewritten]]) -> str | None:
    """What the converted attentions say, one by one and together."""
    for name, (site, new) in changes.items():
        reason = _refuse(site, new)
        if reason is not None:
            return f"{name}: {reason}"
    config: Any = model.config
    wanted = [f"model.layers.{i}" for i in range(config.num_hidden_layers)]
    found = [layer_of(site) for site, _ in changes.values()]
    without = [w for w in wanted if w not in found]
    if without:
        count = f"{len(without)} of {len(wanted)} layers have no converted attention"
        return f"{count} ({', '.join(without[:4])}); the class has latents in every layer, so convert all of them"
    if len(found) != len(wanted):
        return f"{len(found)} attentions in {len(wanted)} layers; the class has one in each"
    heads = {site.heads for site, _ in changes.values()}
    if len(heads) > 1:
        return f"layers have {min(heads)} to {max(heads)} query heads; the class has one number for all"
    return None


def _refuse(site: Site, new: Rewritten) -> str | None:
    if new.latents is None:
        return "it caches no latent, and the class holds nothing else"
    if new.latents.up_k is not None:
        return "its keys are rebuilt from the latent and rotated then; the class rotates other channels: use absorbed"
    if site.cross or site.mask.keep != causal.keep:
        what = "another sequence" if site.cross else f"keys by the mask {site.mask}"
        return f"it reads {what}; the class reads every token up to the query (causal)"
    return _refuse_mods(site) or _refuse_between(site) or _refuse_bias(site, new)


def _refuse_mods(site: Site) -> str | None:
    for mod in site.mods:
        if isinstance(mod, Softcap):
            return f"its scores are capped at {mod.cap:g}; the class has no cap"
        if isinstance(mod, Sink):
            return "a sink takes part of the probability; the class has none"
        return f"a bias from {mod.origin} is added to its scores; the class has none"
    return None


def _refuse_between(site: Site) -> str | None:
    """What stands between projections and core must be a rope, uniform factors or nothing."""
    for name, o in (("queries", site.q), ("keys", site.k), ("values", site.v)):
        if len(o.roots) != 1:
            return f"its {name} come from {len(o.roots)} projections; the class is made of one"
        if o.norm is not None:
            return (
                f"its {name} pass an {o.norm.kind} norm behind the projection, and what the class caches is linear in "
                f"the layer's input; emit it with its own modelling file"
            )
        if o.shift is not None:
            return f"a constant is added to its {name}; the class has no place for it"
        if o.token_gain is not None or uniform(o.after) is None:
            return f"its {name} are scaled by position or channel behind the rotation; the class scales all alike"
    if site.v.rope is not None or uniform(site.v.after) != 1.0:
        return "its values are rotated or scaled; in the class they are not"
    tables = [o for o in (site.q, site.k) if o.rope is not None and o.rope.table is not None]
    return "its rotation is not by the token's position; the class's is" if tables else None


def _refuse_bias(site: Site, new: Rewritten) -> str | None:
    def biased(o: Operand) -> bool:
        return any(r.bias is not None for r in o.roots)

    names = [n for n, o in (("queries", site.q), ("keys", site.k), ("values", site.v)) if biased(o)]
    if not isinstance(site.out, Output):
        return f"its output projection is not known: {site.out}"
    if site.out.root.bias is not None or new.weights.out_bias is not None:
        names.append("output")
    if names:
        return f"its {', '.join(names)} have a bias; engines build this class without, and leave such tensors unread"
    return None
