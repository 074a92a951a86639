"""Forms "grouped" and "view": the module runs its own forward, distinct heads are held once.

projections: fewer rows, repeated on the way out        cache: one head a group goes in
grouped: the attention kernel reads one head a group     view: it reads all heads
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from rewrite.emit.edits import head_gains, repeated_rows
from rewrite.emit.observe import Log
from rewrite.layout import kv_slots
from rewrite.modules import owner
from rewrite.site import IntArray, Site

Recipe = dict[str, Any]


def recipes(
    model: nn.Module, site: Site, new: Site, log: Log, kernels: Sequence[str]
) -> tuple[list[Recipe], dict[str, str]]:
    """(the site's recipes, those that save time first; form -> why it is not among them)."""
    why = "not called by the example" if not log.called else _one_place(log)
    made = projections(model, site, new) if why is None else why
    if isinstance(made, str):
        return [], {"view": made}
    base: Recipe = {"site": site.name, "projections": made, "frozen": sorted({n for n, _ in head_gains(site)})}
    if not log.writes:
        return [base | {"form": "view", "cache": None}], {}
    of = heads_shown(site, new, [(w.k, w.v) for w in log.writes])
    if isinstance(of, str):
        return [], {"view": of}
    keep = [of.index(i) for i in range(max(of) + 1)]
    base |= {"cache": owner(site), "keep": keep, "of": of}
    view = base | {"form": "view"}
    refusal = _ungrouped(model.get_submodule(owner(site)), site, keep, of)
    if refusal is not None:
        return [view], {"grouped": refusal}
    shared = {"form": "grouped", "group": site.heads // len(keep), "argument": list(log.argument), "pair": log.pair}
    # whether the model's own eager function shares heads is seen by running both
    ways = [whole for whole in ([], ["eager"]) if set(kernels) - set(whole)]
    return [base | shared | {"whole": whole} for whole in ways] + [view], {}


def _one_place(log: Log) -> str | None:
    if len(log.slots) <= 1:
        return None
    names = " and ".join(f"{half} {layer}".strip() for half, layer in sorted(log.slots))
    return f"writes cache layers {names}"


def _ungrouped(module: nn.Module, site: Site, keep: Sequence[int], of: Sequence[int]) -> str | None:
    """Why the attention kernel cannot share the heads that are held."""
    if not hasattr(getattr(module, "config", None), "_attn_implementation"):
        return "its module does not choose its attention kernel from a config"
    reads = list(of) if len(of) == site.heads else [of[g] for g in site.kv_of]
    group = site.heads // len(keep)
    if site.heads % len(keep) or reads != [j // group for j in range(site.heads)]:
        return f"its {site.heads} query heads do not share {len(keep)} kv heads in order"
    return None


def heads_shown(site: Site, new: Site, seen: Sequence[tuple[Tensor, Tensor]]) -> list[int] | str:
    """For each head that the module gives to its cache the number of the head that it equals."""
    shown = kv_slots(site, new.kv_of)
    order = list(dict.fromkeys(shown))
    guesses = [[order.index(s) for s in shown]]
    count = {t.shape[1] for pair in seen for t in pair}
    if count == {site.heads} and site.heads != len(shown):
        guesses = [[order.index(s) for s in new.kv_of]]
    if count != {len(guesses[0])}:
        return f"its cache is given {sorted(count)} heads, the site has {len(shown)} kv heads"
    for of in guesses:
        first = [of.index(i) for i in of]
        if all(_close(t, t[:, first]) for pair in seen for t in pair):
            return of
    return "the heads given to the cache are not those of the projections: something between makes them differ"


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * a.abs().max().clamp_min(1e-30))


def projections(model: nn.Module, site: Site, new: Site) -> list[Recipe] | str:
    """The projections with fewer rows, each with its new shapes and the runs by which it repeats them."""
    table: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    maps = repeated_rows(site, new.kv_of, table.__getitem__)
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


def small_tensors(site: Site, new: Site, full: Mapping[str, Tensor], tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The edited tensors as the recipe's projections hold them: without their repeats."""
    maps = repeated_rows(site, new.kv_of, tables.__getitem__)
    if isinstance(maps, str):
        raise ValueError(maps)
    out = dict(full)
    for name, (axis, source) in maps.items():
        out[name] = full[name].index_select(axis, _index(np.unique(source), full[name]))
    return out


def _index(values: IntArray, like: Tensor) -> Tensor:
    import torch

    return torch.from_numpy(values).to(like.device)
