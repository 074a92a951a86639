"""Emission of a model that is never held: the forms are found on the model cut short and given to all sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from passes.emit import How, emit_changes, require, stock_layout
from passes.plan import Plan
from passes.saved import Pairs
from rewrite.checkpoint import Checkpoint
from rewrite.emit import large
from rewrite.emit.choose import padded
from rewrite.emit.deepseek import Layout, filled
from rewrite.emit.large import Large, Proven
from rewrite.emit.stock import fields
from rewrite.emit.twin import share_alike
from rewrite.emit.validate import differs_in_logits
from rewrite.heads import Change
from rewrite.program import Program
from rewrite.short import in_float, kinds


def emit_large(
    program: Program, short: Program, changes: Mapping[str, Change], planned: Plan, how: How, held: Checkpoint
) -> tuple[Large, Plan]:
    """What will be written of `program`'s model, whose parameters lie on meta, and the plan with the forms.

    `short` is the same model cut short, with weights; its sites have the names that they have in the full model.
    """
    stay: dict[str, str] = {}
    sites = {}
    for name, change in changes.items():
        sites[name] = change.site
        if change.rewritten.site is change.site:
            stay[name] = "; ".join(change.rewritten.notes)
    pairs = Pairs(changes, [n for n in sites if n not in stay])
    proven = _proven(short, pairs, kinds([sites[n] for n in pairs]))
    refused = {n: proven.emitted.refused[k] for n, k in proven.kind.items() if k in proven.emitted.refused}
    names = [n for n in pairs if n not in refused]
    require(planned.emitted({n: ("", "") for n in names}, {**stay, **refused}))
    chosen = _stock(program, short, pairs, proven, refused, how)
    if isinstance(chosen, Layout):
        made = large.stock(program.module, pairs, chosen)  # pyright: ignore[reportArgumentType]
        forms = dict.fromkeys(names, ("deepseek", "; ".join(chosen.notes)))
        return made, planned.emitted(forms, stay, dict.fromkeys(names, chosen.held))
    if chosen and how == "stock":
        require(planned.emitted({}, dict.fromkeys(pairs, f"stock: {chosen}")))
    why = {n: (*((f"stock: {chosen}",) if chosen else ()), *proven.emitted.why.get(proven.kind[n], ())) for n in names}
    why |= _why(program, pairs, {n: why[n] for n in names if proven.form(n) in ("grouped", "view")})
    made = large.own(program.module, pairs, names, proven, in_float(held))  # pyright: ignore[reportArgumentType]
    forms = {n: (proven.form(n), "; ".join(why[n])) for n in names}
    return made, planned.emitted(forms, {**stay, **refused})


def _proven(short: Program, pairs: Pairs, kind: dict[str, str]) -> Proven:
    """The emission of the sites that the model cut short holds, in its own class."""
    there = dict(short.module.named_parameters(remove_duplicate=False))
    near = {n: p for n in pairs if (p := pairs[n])[0].q.roots[0].tensor in there}
    emitted = emit_changes(short.module, near, short, "own")  # pyright: ignore[reportArgumentType]
    share_alike(emitted.model, short.module)  # pyright: ignore[reportArgumentType]
    return Proven(short.module, short.kwargs, emitted, near, kind)  # pyright: ignore[reportArgumentType]


def _why(program: Program, pairs: Pairs, given: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Why the class has no field for some sites, in the numbers of the full model."""
    shapes = {n: (site, new.site) for n in pairs for site, new in [pairs[n]]}
    same = [n for n, (old, new) in shapes.items() if old.k.heads == new.k.heads]
    _, known = fields(program.module, shapes, same)  # pyright: ignore[reportArgumentType]
    return {
        name: tuple(f"stock: {known[name]}" if why.startswith("stock:") and name in known else why for why in reasons)
        for name, reasons in given.items()
    }


def _stock(
    program: Program, short: Program, pairs: Pairs, proven: Proven, refused: Mapping[str, str], how: How
) -> Layout | str:
    """The stock class of latents, or why not; "" where there are no latents."""
    if how == "own" or all(new.latents is None for _, new in proven.near.values()):
        return ""
    if refused:
        return f"{len(refused)} attentions of the model are not converted"
    chosen = stock_layout(program.module, pairs, how)  # pyright: ignore[reportArgumentType]
    if isinstance(chosen, str):
        return chosen
    made = filled(short.module, proven.near, chosen.sizes, share=True)  # pyright: ignore[reportArgumentType]
    problem = made if isinstance(made, str) else differs_in_logits(proven.emitted.model, made, padded(short.kwargs))
    return chosen if problem is None else problem
