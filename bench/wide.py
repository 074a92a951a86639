"""One attention layer as wide as Llama 3 8B's, converted: `python -m bench.wide` writes docs/wide.md with `--write`.

32 query heads and 8 kv heads of 128 on 4096 inputs, random weights, inputs whose covariance falls as 1 / i. What is
timed is what `convert` asks of a target, `rewrite`, with calibration as the stream gives it: hidden states are held,
and queries, keys, values and attention are computed from them each time they are asked for. Summing the moments is a
part of calibration and is timed apart.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.memory import memory, reset_peak
from codegen.eager import rotated
from passes.gqa import GQA
from passes.mla import MLA
from passes.moments import NEEDS, SiteBatch
from passes.refit import output_error
from passes.seen import sdpa_probabilities
from passes.trial import heads_outputs
from rewrite.heads import Heads, Latents, Rewritten, Weights
from rewrite.mask import causal
from rewrite.site import Affine, Grouped, Operand, Output, Proof, Root, Rope, Site

ROOT = Path(__file__).parent.parent
WIDTH, HEADS, KV_HEADS, DIM, BASE = 4096, 32, 8, 128, 500_000.0
LENGTH = 2048
QUERIES = 512
FALL, WEIGHT_FALL = -0.5, -0.25
"""Powers of i by which inputs and the columns of q, k and v fall."""
SPREAD = 1.4
"""Root mean square of queries and keys: scores have the standard deviation 2."""


def layer() -> Site:
    """The site, without a model around it."""
    rope = Rope(np.stack([np.arange(DIM // 2), np.arange(DIM // 2) + DIM // 2], 1), _frequencies(), np.zeros(DIM // 2))

    def operand(name: str, heads: int, turns: bool) -> Operand:
        rows = heads * DIM
        root = Root(f"{name}.weight", np.arange(rows) * WIDTH, 1, WIDTH)
        one = Affine(np.ones((heads, DIM)))
        return Operand((root,), np.arange(rows).reshape(heads, DIM), one, rope=rope if turns else None)

    inner = HEADS * DIM
    return Site(
        name="layer",
        q=operand("q", HEADS, True),
        k=operand("k", KV_HEADS, True),
        v=operand("v", KV_HEADS, False),
        heads=HEADS,
        kv_of=tuple(h * KV_HEADS // HEADS for h in range(HEADS)),
        form=Grouped(KV_HEADS),
        mask=causal,
        scale=(DIM**-0.5,),
        mods=(),
        out=Output(Root("o.weight", np.arange(WIDTH) * inner, 1, inner), np.arange(inner).reshape(HEADS, DIM)),
        cross=False,
        proof=Proof((), (), ""),
    )


def _frequencies() -> np.ndarray[Any, np.dtype[np.float64]]:
    return BASE ** (-np.arange(DIM // 2) / (DIM // 2))


def random_weights() -> Weights:
    """Weights of the layer."""
    make = torch.Generator().manual_seed(0)
    at = torch.arange(1, WIDTH + 1).double()
    size = SPREAD / float((at ** (2 * FALL + 2 * WEIGHT_FALL)).sum()) ** 0.5

    def heads(count: int) -> Heads:
        weight = torch.randn(count, DIM, WIDTH, generator=make, dtype=torch.float32).double()
        return Heads(weight * at**WEIGHT_FALL * size, None, torch.ones(count, DIM, dtype=torch.float64))

    out = torch.randn(WIDTH, HEADS, DIM, generator=make, dtype=torch.float32).double() / (HEADS * DIM) ** 0.5
    return Weights(heads(HEADS), heads(KV_HEADS), heads(KV_HEADS), out, None)


@dataclass(frozen=True, eq=False)
class Windows:
    """`Stats` of the layer: hidden states are held, all else is computed when asked for, one batch at a time."""

    site: Site
    weights: Weights
    inputs: Sequence[Tensor]
    """(windows, tokens, width) each, in single precision"""
    moments: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def _rope(self) -> Rope:
        rope = self.site.q.rope
        if rope is None:
            raise ValueError("the layer has a rope")
        return rope

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return sum(x.shape[0] * x.shape[1] for x in self.inputs)

    def sum_up(self, needs: frozenset[str]) -> None:
        """Sum those moments that are not there yet."""
        lacking = sorted(needs - set(self.moments))
        for batch in self.batches() if lacking else ():
            for name in lacking:
                term = NEEDS[name](batch)
                self.moments[name] = self.moments[name] + term if name in self.moments else term

    def batches(self) -> Iterator[SiteBatch]:
        """What the weights see."""
        for x in self.inputs:
            yield self._batch(x)

    def share(self, items: Sequence[Any], work: Callable[[Any], Sequence[Any]]) -> Iterator[Sequence[Any]]:
        """One process does all."""
        return map(work, items)

    @property
    def alone(self) -> Windows:
        """One process does all."""
        return self

    def attend(self, weights: Weights, kv_of: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
        """The heads' outputs with other weights, and the original's output."""
        for x in self.inputs:
            own = self._batch(x, weights, kv_of)
            yield _heads_outputs(own, kv_of), self._out(self._batch(x))

    def latent(self, latents: Latents) -> Iterator[tuple[Tensor, Tensor]]:
        """The heads' outputs with a latent, and the original's output."""
        for batch in self.batches():
            yield heads_outputs(latents, batch), self._out(batch)

    def _batch(self, x: Tensor, weights: Weights | None = None, kv_of: tuple[int, ...] | None = None) -> SiteBatch:
        w, of = self.weights if weights is None else weights, list(kv_of or self.site.kv_of)
        rope = self._rope
        u = {n: (x @ h.weight.flatten(0, 1).float().T).double() for n, h in (("q", w.q), ("k", w.k), ("v", w.v))}
        q, k, v = (part.unflatten(-1, (-1, DIM)).transpose(1, 2) for part in u.values())
        at = torch.arange(x.shape[1])

        turned: list[Tensor] = []

        def part(windows: slice, queries: Tensor | None) -> Tensor:
            turned[:] = turned or (rotated(rope, q.float(), at), rotated(rope, k.float(), at)[:, of])
            return sdpa_probabilities(turned[0], turned[1], v, is_causal=True, windows=windows, queries=queries)

        return SiteBatch(self.site, u, q, k, v, lambda: part(slice(None), None), None, part)

    def _out(self, batch: SiteBatch) -> Tensor:
        return torch.einsum("nhd,ohd->no", _heads_outputs(batch, self.site.kv_of), self.weights.out)


def _heads_outputs(batch: SiteBatch, kv_of: tuple[int, ...]) -> Tensor:
    """(tokens, h, d) some queries at a time."""
    some = torch.arange(batch.q.shape[2]).split(QUERIES)
    v = batch.v[:, list(kv_of)]
    return torch.cat([batch.some(slice(None), at) @ v for at in some], 2).transpose(1, 2).flatten(0, 1)


def windows(count: int, length: int, seed: int) -> list[Tensor]:
    """Hidden states, one window a batch."""
    make = torch.Generator().manual_seed(seed)
    size = torch.arange(1, WIDTH + 1) ** FALL
    return [torch.randn(1, length, WIDTH, generator=make) * size for _ in range(count)]


@dataclass(frozen=True)
class Timed:
    """One `rewrite`. Memory in bytes above what the process held when it began, and in all above the imports."""

    target: str
    tokens: int
    seconds: float
    cpu: float
    peak: int
    whole: int
    error: float
    shape: str
    notes: tuple[str, ...]


def timed(target: Any, stats: Windows | None, site: Site, weights: Weights, unseen: Windows, base: int) -> Timed:
    """Time and peak of a rewrite, and its error on tokens that calibration has not seen."""
    held = reset_peak()
    begun, cpu = time.perf_counter(), time.process_time()
    made: Rewritten = target.rewrite(site, weights, stats)
    seconds, spent = time.perf_counter() - begun, time.process_time() - cpu
    peak = memory("VmHWM")
    new = made.latents
    trials = unseen.latent(new) if new is not None else unseen.attend(made.weights, made.site.kv_of)
    error = output_error(trials, made.weights)
    shape = f"{new.rank} + {new.rope_dim}" if new is not None else f"{made.site.k.heads} kv heads"
    tokens = 0 if stats is None else stats.tokens
    return Timed(repr(target), tokens, seconds, spent, peak - held, peak - base, error, shape, made.notes)


def page(rows: Sequence[Timed], tokens: int, summed: tuple[float, float], unseen: int) -> str:
    """The text of docs/wide.md."""
    lines = [
        "# Converting one layer as wide as Llama 3 8B's",
        "",
        f"Written by `python -m bench.wide --write`. {HEADS} query heads and {KV_HEADS} kv heads of {DIM} on",
        f"{WIDTH} inputs, a rope of base {BASE:.0f}, random weights; inputs whose covariance falls as 1 / i,",
        f"{tokens} of them in windows of {LENGTH}, one a batch. Error: squared, of the attention's output over its",
        f"energy, on {unseen} tokens that calibration has not seen. Random scores attend nearly evenly: the error says",
        "that the calibrated way was gone to its end, not what a trained model loses.",
        "",
        "Timed is `rewrite`: the search over measured trials, the closed form and the refit of the output projection,",
        "with queries, keys, values and attention of every window computed anew each time they are asked for. Not in",
        f"it: reading the weights, and summing the moments, a part of calibration ({summed[0]:.0f} s,",
        f"{summed[1]:.0f} s of processor). Memory: the peak of the process above its imports, the layer's weights in",
        "float64 and all inputs included, and of that what `rewrite` added.",
        "",
        f"{torch.get_num_threads()} threads on {os.cpu_count()} cores with a load of {os.getloadavg()[1]:.1f}, these",
        f"threads included; torch {torch.__version__}, {platform.machine()}. Beside others wall time says little.",
        "",
        "| target | tokens | shape | seconds | processor s | peak GB | of it added | error | notes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [r.target, str(r.tokens or "–"), r.shape, f"{r.seconds:.1f}", f"{r.cpu:.1f}"]
        cells += [f"{r.whole / 1e9:.2f}", f"{r.peak / 1e9:.2f}", f"{r.error:.3g}", "; ".join(r.notes)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--gqa", action="store_true", help="merging to 4 kv heads too, which takes minutes")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    base, site, weights = memory("VmRSS"), layer(), random_weights()
    stats = Windows(site, weights, windows(args.tokens // LENGTH, LENGTH, 1))
    unseen = Windows(site, weights, windows(1, LENGTH, 2))
    targets: list[tuple[Any, bool]] = [(MLA(cache=0.25), True), (MLA(cache=0.25, form="rebuilt"), True)]
    targets += [(MLA(cache=0.25), False)] + ([(GQA(4), True)] if args.gqa else [])
    begun, cpu = time.perf_counter(), time.process_time()
    stats.sum_up(MLA.needs)
    spent = time.perf_counter() - begun, time.process_time() - cpu
    rows: list[Timed] = []
    for target, calibrated in targets:
        if calibrated:
            stats.sum_up(target.needs)
        rows.append(timed(target, stats if calibrated else None, site, weights, unseen, base))
        print(rows[-1], flush=True)
    made = page(rows, stats.tokens, spent, unseen.tokens)
    print(made)
    if args.write:
        (ROOT / "docs" / "wide.md").write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
