"""A `Site` on one line, and lists of sites with equal neighbours folded to a range."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rewrite.site import Affine, Bias, Factored, Latent, Mod, Norm, Operand, Output, Rope, Site, Softcap, Sparse

NUMBER = re.compile(r"\d+")


def number(x: float, exact: bool = False) -> str:
    """4 significant digits, or all of them: 0.0884, 1e+04 as 1e4."""
    if exact:
        return repr(float(x))
    text = f"{x:.4g}"
    return re.sub(r"e([+-])0*(\d+)", lambda m: f"e{'-' if m[1] == '-' else ''}{m[2]}", text)


def _base(x: float, exact: bool) -> str:
    """Round bases as people write them: 1e4, 5e5."""
    if exact:
        return number(x, True)
    short = f"{x:.4g}" if x < 1000 else f"{x:.4e}"
    return re.sub(r"\.?0*e\+?0*(\d+)", r"e\1", short) if "e" in short else short


def rope_text(rope: Rope, dim: int, exact: bool = False) -> str:
    """`half(1e4)`; the width follows where only a part of the head turns: `interleaved(1e4, 8 of 16)`."""
    inside = [_base(rope.base, exact)] if rope.base is not None else []
    if rope.table is not None:
        inside.append("table")
    elif rope.base is None:
        inside.append("frequencies")
    if rope.width != dim:
        inside.append(f"{rope.width} of {dim}")
    if rope.table is None and np.any(rope.start):
        inside.append("start=" + ",".join(number(x, exact) for x in dict.fromkeys(rope.start.tolist())))
    return f"{rope.style}({', '.join(inside)})"


def norm_text(norm: Norm, exact: bool = False) -> str:
    """`rms(head, 1e-6)`."""
    return f"{norm.kind}({norm.over}, {number(norm.eps, exact)})"


def affine_text(values: Affine, exact: bool = False) -> str:
    """`1 + 1*model.norm.weight`; a range where constants differ."""

    def spread(x: np.ndarray) -> str:
        low, high = float(x.min()), float(x.max())
        return number(low, exact) if low == high else f"{number(low, exact)}..{number(high, exact)}"

    if values.tensor is None or values.factor is None:
        return spread(values.constant)
    return f"{spread(values.constant)}+{spread(values.factor)}*{values.tensor}"


def mod_text(mod: Mod, exact: bool = False) -> str:
    """`softcap(50)`, `bias(constant, alibi)`, `sink(..)`."""
    if isinstance(mod, Softcap):
        return f"softcap({number(mod.cap, exact)})"
    if isinstance(mod, Bias):
        slopes = "" if mod.slopes is None else ", alibi"
        return f"bias({mod.origin}{slopes})"
    return f"sink({affine_text(mod.logits, exact)})"


def _operand(letter: str, o: Operand, exact: bool) -> list[str]:
    out: list[str] = []
    if o.norm is not None:
        out.append(f"{letter}_norm={norm_text(o.norm, exact)}")
    if not o.gain.is_one:
        out.append(f"{letter}_gain={affine_text(o.gain, exact)}")
    if o.shift is not None:
        out.append(f"{letter}_shift={affine_text(o.shift, exact)}")
    if o.after is not None:
        out.append(f"{letter}_after={affine_text(o.after, exact)}")
    if o.token_gain is not None:
        out.append(f"{letter}_token_gain={affine_text(Affine(o.token_gain), exact)}")
    return out


def _ropes(site: Site, exact: bool) -> list[str]:
    texts = {x: None if o.rope is None else rope_text(o.rope, o.dim, exact) for x, o in (("q", site.q), ("k", site.k))}
    if site.q.rope == site.k.rope or texts["q"] == texts["k"]:
        return [] if texts["q"] is None else [f"rope={texts['q']}"]
    return [f"{letter}_rope={text}" for letter, text in texts.items() if text is not None]


def _kv_of(site: Site) -> list[str]:
    """Nothing where query heads take kv heads in order."""
    group = site.heads // max(1, site.k.heads)
    plain = site.kv_of == tuple(h // max(1, group) for h in range(site.heads))
    return [] if plain else ["kv_of=" + ",".join(map(str, site.kv_of))]


def _held(site: Site) -> list[str]:
    """What the cache holds of a token."""
    if isinstance(site.form, Factored):
        ranks = "/".join("dense" if r is None else str(r) for r in site.form.ranks)
        return [f"kv_heads={site.kv_heads}", f"ranks={ranks}"]
    if isinstance(site.form, Sparse):
        held = dict.fromkeys("all" if n is None else str(n) for n in site.form.held)
        each = held if len(held) == 1 else ["all" if n is None else str(n) for n in site.form.held]
        open_ = [] if site.form.density is None else [f"density={number(site.form.density, True)}"]
        return [f"kv_heads={site.kv_heads}", *([f"held={','.join(each)}"] if held else []), *open_]
    if not isinstance(site.form, Latent):
        return [f"kv_heads={site.kv_heads}"]
    turned = [f"rope_dim={site.form.rope_dim}"] if site.form.rope_dim else []
    return [f"rank={site.form.rank}", *turned, *(["rebuilt"] if site.form.rebuilt else [])]


def site_text(site: Site, exact: bool = False) -> str:
    """All of the line but the name."""
    form = type(site.form).__name__.lower()
    width = f"{site.heads}x{site.q.dim}" + (f"/{site.v.dim}" if site.v.dim != site.q.dim else "")
    origin = "" if site.mask.origin == "constant" else f" ({site.mask.origin})"
    parts = [
        *_held(site),
        f"heads={width}",
        *_kv_of(site),
        f"scale={','.join(number(x, exact) for x in site.scale)}",
        f"mask={str(site.mask).replace(' ', '')}{origin}",
        *_ropes(site, exact),
        *(text for letter, o in (("q", site.q), ("k", site.k), ("v", site.v)) for text in _operand(letter, o, exact)),
        *(f"{mod_text(mod, exact)}" for mod in site.mods),
        *([] if isinstance(site.out, Output) else [f'out=none "{site.out}"']),
        *(["cross"] if site.cross else []),
    ]
    return f"attn {form} " + "  ".join(parts)


def site_line(site: Site, exact: bool = False) -> str:
    """`%name = attn <form> key=value ...`; nothing hidden but None."""
    return f"%{site.name} = {site_text(site, exact)}"


@dataclass(frozen=True)
class Fold:
    """Equal neighbours: a folded name and the members."""

    name: str
    sites: tuple[Site, ...]


def fold(sites: Sequence[Site]) -> tuple[Fold, ...]:
    """Neighbours that read alike but for the numbers in their names, as one."""
    runs: list[list[Site]] = []
    for site in sites:
        if runs and _alike(runs[-1][-1]) == _alike(site):
            runs[-1].append(site)
        else:
            runs.append([site])
    return tuple(Fold(fold_names([site.name for site in run]), tuple(run)) for run in runs)


def _alike(site: Site) -> str:
    return NUMBER.sub("#", site.name) + " " + NUMBER.sub("#", site.name).join(_without_own_names(site))


def _without_own_names(site: Site) -> list[str]:
    """The text with the site's own layer number taken out of the tensor names in it."""
    text = site_text(site)
    layers = re.findall(r"[A-Za-z_][\w.]*\.\d+\.[\w.]*", text)
    for name in layers:
        text = text.replace(name, NUMBER.sub("#", name))
    return [text]


def fold_names(names: Iterable[str]) -> str:
    """`model.layers.{0..31}.self_attn`; the first and a count where the names differ in more than one number."""
    listed = list(names)
    if len(listed) == 1:
        return listed[0]
    numbers = [[int(x) for x in NUMBER.findall(name)] for name in listed]
    shape = NUMBER.split(listed[0])
    changing = [i for i, column in enumerate(zip(*numbers, strict=False)) if len(set(column)) > 1]
    if any(NUMBER.split(name) != shape for name in listed) or len(changing) != 1:
        return f"{listed[0]} and {len(listed) - 1} more"
    at = changing[0]
    column = [row[at] for row in numbers]
    run = column == list(range(column[0], column[0] + len(column)))
    inside = f"{column[0]}..{column[-1]}" if run else ",".join(map(str, column))
    pieces = [str(x) for x in numbers[0]]
    pieces[at] = "{" + inside + "}"
    return shape[0] + "".join(number_ + text for number_, text in zip(pieces, shape[1:], strict=True))


def lines(sites: Sequence[Site], exact: bool = False) -> list[str]:
    """One line for each fold."""
    return [f"%{group.name} = {site_text(group.sites[0], exact)}" for group in fold(sites)]
