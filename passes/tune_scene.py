"""What tuning looks at: many windows of the calibration, held as what attention reads.

Where the mask hangs on positions alone and nothing else meets the scores, it is one table for all windows, no
probability of the original is needed, and one fused kernel computes the attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from codegen.eager import rotated
from codegen.latent import features
from passes import Stats
from passes.mla_scene import Scene, scenes, split
from passes.moments import SiteBatch, windowed
from passes.trial import uniform
from rewrite.heads import Weights
from rewrite.site import Operand, Site

TOKENS = 1 << 15
"""Calibration tokens of a site that are held with a mask for each of them."""
NUMBERS = 1 << 27
"""Keys and values that are held where one mask serves all: half a gigabyte."""


@dataclass(frozen=True, eq=False)
class RowScene(Scene):
    """A scene with the rows of the projections, (b, heads, tokens, d) for q, k and v, queries as in `q`."""

    rows: tuple[Tensor, Tensor, Tensor]


def fuses(site: Site) -> bool:
    """Whether one table of positions is all that is added to the scores."""
    return not site.mods and site.mask.origin == "constant" and not site.mask.per_head


def fused(site: Site, q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
    """(b, h, t, dv) attention of q (b, h, t, d) on k (b, h, s, d) and v (b, h, s, dv), turned already."""
    scale = torch.as_tensor(site.scale, dtype=q.dtype).expand(site.heads)[:, None, None]
    width, values = max(q.shape[-1], v.shape[-1]), v.shape[-1]
    # the kernel that holds no scores takes one width for all
    q, k, v = (x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1])) for x in (q * scale, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=added, scale=1.0)[..., :values]


def staged(stats: Stats, site: Site, source: Weights) -> Iterator[RowScene]:
    """The calibration, a scene a batch."""
    if fuses(site):
        width = site.k.heads * site.k.dim + site.v.heads * site.v.dim
        yield from _fused_scenes(stats, site, source, max(TOKENS, NUMBERS // width))
        return
    for scene, batch in zip(scenes(stats, source, TOKENS), stats.batches(), strict=False):
        yield _with_rows(scene, windowed(batch))


def _fused_scenes(stats: Stats, site: Site, source: Weights, limit: int) -> Iterator[RowScene]:
    share, seen = min(1.0, limit / max(stats.tokens, 1)), 0
    factor = uniform(site.q.after) * uniform(site.k.after)
    for whole in stats.batches():
        batch = windowed(whole)
        (b, _, t, _), s = batch.q.shape, batch.k.shape[2]
        take = max(1, round(b * share))
        q, k, v = (x[:take].float() for x in (batch.q * factor, batch.k, batch.v))
        at, keys_at = torch.arange(s - t, s), torch.arange(s)
        table = torch.from_numpy(site.mask.table(s, s))[s - t :]
        added = torch.zeros(t, s).masked_fill(~table, -torch.inf).expand(take, site.heads, t, s)
        turned_q = q if site.q.rope is None else rotated(site.q.rope, q, at)
        turned_k = k if site.k.rope is None else rotated(site.k.rope, k, keys_at)
        kv = list(site.kv_of)
        z = fused(site, turned_q, turned_k[:, kv], v[:, kv], added)
        out = torch.einsum("bhtd,ohd->bto", z, source.out.float())
        keep, judges = split(batch, slice(0, take), seen)
        y = batch.y[:take].float()
        scene = Scene(
            site,
            q=q,
            y=y,
            raw=y if site.k.norm is None else features(batch.raw_k, batch.v)[:take].float(),
            added=added,
            sink=None,
            p=added,  # nobody asks: the fused kernel has given what the original's probabilities give
            out=out if source.out_bias is None else out + source.out_bias.float(),
            at=at,
            keep=keep,
            judges=judges,
        )
        yield _with_rows(scene, batch)
        seen += take


def _with_rows(scene: Scene, batch: SiteBatch) -> RowScene:
    """The scene of a batch, with its rows."""
    site, take, past = scene.site, len(scene.q), batch.k.shape[2] - batch.q.shape[2]

    def rows(which: str, operand: Operand) -> Tensor:
        return batch.u[which][:take][..., torch.from_numpy(operand.rows)].transpose(1, 2).float()

    seen = scene.y.shape[1]
    u = rows("q", site.q)[:, :, scene.at - past], rows("k", site.k)[:, :, :seen], rows("v", site.v)[:, :, :seen]
    return RowScene(**vars(scene), rows=u)
