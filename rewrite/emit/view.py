"""Form "view": the module untouched, distinct heads held once in its projections and once in the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from rewrite.emit.edits import repeated_rows
from rewrite.heads import Rewritten
from rewrite.layout import kv_slots
from rewrite.site import IntArray, Site

Recipe = dict[str, Any]


def view(
    model: nn.Module, site: Site, new: Rewritten, seen: Sequence[tuple[Tensor, Tensor]], cache: str | None
) -> Recipe | str:
    """The recipe of a site, or why it cannot be one.

    `cache` is the module that is given the site's cache, `seen` the (k, v) which it handed to `update` in a model
    whose heads are already equal: the heads that are held are those that really agree there.
    """
    made = projections(model, site, new)
    if isinstance(made, str):
        return made
    if cache is None:
        return {"form": "view", "site": site.name, "projections": made, "cache": None, "keep": [], "of": []}
    of = heads_shown(site, new, seen)
    if isinstance(of, str):
        return of
    keep = [of.index(i) for i in range(max(of) + 1)]
    return {"form": "view", "site": site.name, "projections": made, "cache": cache, "keep": keep, "of": of}


def heads_shown(site: Site, new: Rewritten, seen: Sequence[tuple[Tensor, Tensor]]) -> list[int] | str:
    """For each head that the module gives to its cache the number of the head that it equals."""
    shown = kv_slots(site, new.site.kv_of)
    order = list(dict.fromkeys(shown))
    guesses = [[order.index(s) for s in shown]]
    count = {t.shape[1] for pair in seen for t in pair}
    if count == {site.heads} and site.heads != len(shown):
        guesses = [[order.index(s) for s in new.site.kv_of]]
    if count != {len(guesses[0])}:
        return f"its cache is given {sorted(count)} heads, the site has {len(shown)} kv heads"
    for of in guesses:
        first = [of.index(i) for i in of]
        if all(_close(t, t[:, first]) for pair in seen for t in pair):
            return of
    return "the heads given to the cache are not those of the projections: something between makes them differ"


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * a.abs().max().clamp_min(1e-30))


def projections(model: nn.Module, site: Site, new: Rewritten) -> list[Recipe] | str:
    """The projections with fewer rows, each with its new shapes and the runs by which it repeats them."""
    table: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    maps = repeated_rows(site, new.site.kv_of, table.__getitem__)
    if isinstance(maps, str):
        return maps
    made: dict[str, Recipe] = {}
    for name, (axis, source) in maps.items():
        path, leaf = name.rpartition(".")[::2]
        module = model.get_submodule(path)
        if leaf not in dict(module.named_parameters(recurse=False)):
            return f"{name} is no parameter of its own"
        kept, index = np.unique(source, return_inverse=True)
        shape = list(table[name].shape)
        shape[axis] = len(kept)
        entry = made.setdefault(path, {"module": path, "tensors": {}, "runs": runs(index)})
        if entry["runs"] != runs(index):
            return f"the parameters of {path} repeat in different orders"
        entry["tensors"][leaf] = shape
        entry["attributes"] = widths(module, len(source), len(kept))
    if not all(_is_projection(model.get_submodule(path)) for path in made):
        return f"{', '.join(made)}: no module that is called for its projection alone"
    return list(made.values())


def _is_projection(module: nn.Module) -> bool:
    return not list(module.children()) and len(dict(module.named_parameters(recurse=False))) <= 2


def widths(module: nn.Module, old: int, new: int) -> dict[str, int]:
    """Attributes that say how many channels come out. `out_features` where there is one; else all that agree,
    and the run that every emission must pass tells whether one of them meant something else."""
    names = [n for n, v in vars(module).items() if type(v) is int and v == old]
    if "out_features" in names:
        names = ["out_features"]
    return {n: new for n in names[:1]}


def runs(index: IntArray) -> list[list[int]]:
    """[start, count] of consecutive numbers, in order."""
    cuts = np.flatnonzero(np.diff(index) != 1) + 1
    return [[int(part[0]), len(part)] for part in np.split(index, cuts)]


def small_tensors(site: Site, new: Rewritten, full: Mapping[str, Tensor], tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The edited tensors as the recipe's projections hold them: without their repeats."""
    maps = repeated_rows(site, new.site.kv_of, tables.__getitem__)
    if isinstance(maps, str):
        raise ValueError(maps)
    out = dict(full)
    for name, (axis, source) in maps.items():
        out[name] = full[name].index_select(axis, _index(np.unique(source), full[name]))
    return out


def _index(values: IntArray, like: Tensor) -> Tensor:
    import torch

    return torch.from_numpy(values).to(like.device)
