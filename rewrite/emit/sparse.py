"""Form "sparse": the module runs its own forward and its kernel is given a mask and fewer keys (see runtime/sparse.py).

Proven in three steps: with masks that hide no more than the model's own the whole model must be the original in every
mode, which proves the wiring; with narrow masks it must say what the model says whose kernel is given the masks as
tables (`masked`), which proves the predicates; and its steps with a cache must say what one forward says, which proves
what the cache drops.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rewrite.emit import runtime
from rewrite.emit.choose import Changes, Emitted, padded, unfit
from rewrite.emit.edits import edited
from rewrite.emit.files import dress
from rewrite.emit.observe import Log, handed, observe
from rewrite.emit.predicate import reach, tree
from rewrite.emit.runtime.latent_entry import kernel_of
from rewrite.emit.runtime.sparse import both
from rewrite.emit.twin import as_before, in_float, table, twin
from rewrite.emit.validate import differs, differs_in_logits, inconsistent, unsteady
from rewrite.layout import Edits
from rewrite.mask import Mask, all_, causal, streaming
from rewrite.modules import owner
from rewrite.site import Site

Recipe = dict[str, Any]
RUNS = "reattn's operator where it is loaded, else torch in tiles"
UNASKED = "it computes its attention itself and asks for no kernel that could be given a mask"
MASKED = "reattn_masked"
"""The name under which the kernel of `masked` is registered."""


def emit_sparse(model: PreTrainedModel, changes: Changes, inputs: Mapping[str, Any]) -> Emitted:
    """A new model whose rewritten sites read fewer keys; `model` is not written to.

    `changes` is site name -> (source site, rewritten with another mask), `inputs` keyword arguments of one forward.
    """
    source, inputs = in_float(model), padded(inputs)
    logs = observe(source, [site for site, _ in changes.values()], inputs)
    refused: dict[str, str] = {}
    for name, (site, new) in changes.items():
        made = unfit(name, changes) or recipe(site, new.site.mask, logs[owner(site)], _beside(name, changes))
        if isinstance(made, str):
            refused[name] = f"sparse: {made}"
    work = _Work(source, {n: c for n, c in changes.items() if n not in refused}, logs, inputs)
    refused |= work.unproven()
    kept = {n: c for n, c in work.changes.items() if n not in refused}
    if not kept:
        return Emitted(model, {}, {n: (r,) for n, r in refused.items()}, refused)
    masks = {n: new.site.mask for n, (_, new) in kept.items()}
    made = twin(source, work.edits(list(kept)), share=False)
    dress(made, work.recipes(masks))
    problem = work.forgets(made) or work.says(masks, made)
    if problem is not None:
        raise RuntimeError(f"the model with its masks is not what was proven: {problem}")
    as_before(made, model)
    return Emitted(made, dict.fromkeys(kept, "sparse"), dict.fromkeys(kept, (RUNS,)), refused)


def forecast_sparse(sites: Mapping[str, Site]) -> dict[str, tuple[str, str]]:
    """Source sites by name -> (form, what it costs), before anything is run."""
    return dict.fromkeys(sites, ("sparse", RUNS))


def recipe(site: Site, mask: Mask, log: Log, beside: str = "") -> Recipe | str:
    """What the runtime needs to know of one site, or why it cannot be had."""
    reason = log.refusal(log.kernels, UNASKED) or (f"its module also holds {beside}" if beside else None)
    if reason is not None:
        return reason
    shown = {t.shape[1] for w in log.writes for t in (w.k, w.v)} or {site.k.heads}
    if not shown <= {site.k.heads, site.heads} or len(shown) > 1:
        return f"its cache is given {sorted(shown)} heads, the site has {site.k.heads} kv heads"
    per = site.heads // next(iter(shown))
    if site.kv_of != tuple(i // (site.heads // site.k.heads) for i in range(site.heads)):
        return f"its {site.heads} query heads do not read its {site.k.heads} kv heads in order"
    try:
        trees = [_shown_tree(site, mask, i) for i in range(site.heads)]
    except ValueError as why:
        return str(why)
    if any(trees[i] != trees[i - i % per] for i in range(site.heads)):
        return f"query heads that share a kv head have different masks, and {per} of them read one"
    groups: dict[str, Recipe] = {}
    for i in range(0, site.heads, per):
        found = reach(trees[i]) if looks_back(site) and trees[i] is not None else None
        group = groups.setdefault(
            str(trees[i]),
            {"heads": [], "queries": [], "keep": trees[i]}
            | {"sink": found.sink if found else 0, "window": found.window if found else None}
            | {"exact": bool(found and found.exact)},
        )
        group["heads"].append(i // per)
        group["queries"] += list(range(i, i + per))
    place = {"site": site.name, "form": "sparse", "module": owner(site), "mask": str(mask)}
    place |= {"algebra": None if None in trees or mask.apart else mask.spelled}
    return place | {"shift": begins(site), "groups": list(groups.values())}


def looks_back(site: Site) -> bool:
    """No query reads a later key."""
    return not site.cross and not bool(site.mask.table(8, 8)[0, 1:].any())


def begins(site: Site) -> bool:
    """The first key that the site's own mask shows is where a text begins, at any length."""
    return str(site.mask) in (str(causal), str(all_))


def _shown_tree(site: Site, mask: Mask, head: int) -> Any:
    """None where the mask is the model's own and it is not for a predicate to say what that is."""
    if mask == site.mask and (not begins(site) or mask.origin != "constant"):
        return None
    return tree(mask, head)


def _beside(name: str, changes: Changes) -> str:
    mine = owner(changes[name][0])
    return next((n for n, (site, _) in changes.items() if n != name and owner(site) == mine), "")


class _Work:
    """What emission knows while it decides; all models in it are float32."""

    def __init__(
        self, source: PreTrainedModel, changes: Changes, logs: Mapping[str, Log], inputs: Mapping[str, Any]
    ) -> None:
        self.source, self.changes, self.logs, self.inputs = source, changes, logs, inputs
        tensors = table(source)
        self.full = {n: edited(site, new, tensors.__getitem__) for n, (site, new) in changes.items()}
        whole = {n: torch.ones_like(x) if n == "attention_mask" else x for n, x in inputs.items()}
        # a class that does not read its own cache as it wrote it says nothing about what is dropped
        steady = [x for x in (inputs, whole) if source.can_generate() and inconsistent(source, x) is None]
        self.steady = steady[0] if steady else None
        self.trains = unsteady(source, inputs) is None

    def edits(self, names: Sequence[str]) -> Edits:
        """Tensors of the source that change with these sites."""
        return {tensor: value for name in names for tensor, value in self.full[name].items()}

    def recipes(self, masks: Mapping[str, Mask]) -> Recipe:
        """The recipe of the sites with these masks."""
        made = [recipe(self.changes[n][0], mask, self.logs[owner(self.changes[n][0])]) for n, mask in masks.items()]
        return {"version": 1, "sites": made}

    def built(self, masks: Mapping[str, Mask]) -> PreTrainedModel:
        """A copy of the source with the sites' masks, its tensors shared."""
        made = twin(self.source, self.edits(list(masks)), share=True)
        runtime.install(made, self.recipes(masks))
        return made

    def unproven(self) -> dict[str, str]:
        """Sites that do not compute what they should, with the sentence."""
        problem = self._wrong(list(self.changes))
        if problem is None:
            return {}
        kinds: dict[str, list[str]] = {}
        for name, (site, _) in self.changes.items():
            kinds.setdefault(type(self.source.get_submodule(owner(site))).__name__, []).append(name)
        out: dict[str, str] = {}
        for group in kinds.values() if len(kinds) > 1 else ():
            reason = self._wrong(group)
            out |= {name: f"sparse: {reason}" for name in group if reason is not None}
        return out or dict.fromkeys(self.changes, f"sparse: {problem}")

    def _wrong(self, names: list[str]) -> str | None:
        if not names:
            return None
        own = {n: self.changes[n][0].mask for n in names}
        problem = differs(
            twin(self.source, self.edits(names), share=True), self.built(own), self.inputs, training=self.trains
        )
        if problem is not None:
            return problem
        narrow = {n: narrowed(*self.changes[n][:1], self.changes[n][1].site.mask) for n in names}
        made = self.built(narrow)
        return self.says(narrow, made) or self.forgets(made)

    def forgets(self, made: PreTrainedModel) -> str | None:
        """Whether steps with a cache say something else than one forward."""
        return None if self.steady is None else inconsistent(made, self.steady)

    def says(self, masks: Mapping[str, Mask], made: PreTrainedModel) -> str | None:
        """Whether a model is not the one whose kernels are given the masks as tables."""
        reference = twin(self.source, self.edits(list(masks)), share=True)
        own = {n: (self.changes[n][0], mask) for n, mask in masks.items()}
        whole = {n: x for n, x in self.inputs.items() if n != "attention_mask"}
        for inputs in (self.inputs, whole) if "attention_mask" in self.inputs else (self.inputs,):
            with masked(reference, own, inputs):
                problem = differs_in_logits(reference, made, inputs)
            if problem is not None:
                return problem
        return None


def narrowed(site: Site, mask: Mask) -> Mask:
    """A mask of the same kind that hides much of a short text too: heads that read the last tokens read two or three
    and, where they read first ones, one; any other mask as it is."""
    if not looks_back(site):
        return mask
    found = [reach(tree(mask, i)) for i in range(site.heads)]
    if all(x is None for x in found):
        return mask
    widths = {w: 2 + i for i, w in enumerate(sorted({x.window for x in found if x is not None}))}
    sinks = [min(x.sink, 1) if x is not None else 0 for x in found]
    return mask & streaming(sinks, [None if x is None else min(x.window, widths[x.window]) for x in found])


def _begin(model: PreTrainedModel, site: Site, inputs: Mapping[str, Any]) -> Tensor | None:
    """(batch,) the first token of each row of the text that a site reads; None where rows begin at once."""
    name = "decoder_attention_mask" if model.config.is_encoder_decoder and looks_back(site) else "attention_mask"
    given = inputs.get(name) if begins(site) else None
    return given.int().argmax(-1) if isinstance(given, Tensor) and given.dim() == 2 else None


@contextmanager
def masked(
    model: PreTrainedModel, masks: Mapping[str, tuple[Site, Mask]], inputs: Mapping[str, Any]
) -> Generator[None]:
    """For a while the kernels of source sites, by name, are given masks as tables of all queries and keys: the plainest
    way, without a cache. Positions count from the first token of each row of `inputs`."""
    owners = {
        model.get_submodule(owner(site)): (site, mask, _begin(model, site, inputs)) for site, mask in masks.values()
    }

    def run(config: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, given: Tensor | None = None, **more: Any) -> Any:
        site, mask, begin = owners[module]
        keep = tables(mask, site.heads, q.shape[2], k.shape[2], begin)
        given = both(keep, given, q, config._attn_implementation == "eager")
        return kernel_of(module, config)(module, q, k, v, given, **more)

    with handed(owners, MASKED, run):
        yield


def tables(mask: Mask, heads: int, queries: int, keys: int, begin: Tensor | None = None) -> Tensor:
    """(rows, heads or 1, queries, keys) booleans of a mask, positions counted from the first token of each row."""
    rows = [0] if begin is None else begin.tolist()
    at_q, at_k = np.arange(queries)[:, None] + keys - queries, np.arange(keys)[None]
    return torch.from_numpy(np.stack([mask.by_head(at_q - r, at_k - r, heads) for r in rows]))
