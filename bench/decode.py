"""Time and memory of one decoded token, in the attention of one layer: `python -m bench.decode` writes docs/decode.md.

The same model four times: as it is, with a latent read absorbed, with a latent whose keys are rebuilt, and as the dense
DeepSeek-V3 class, whose library code expands keys and values of all tokens at every step. Random weights; every form
is timed in turn, round after round, so that the ratios are of one run.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bench.memory import added, give_back
from passes.convert import named_tensors
from passes.find import find
from rewrite.capture import capture
from rewrite.emit import emit_latent
from rewrite.emit.deepseek import Stock, deepseek
from rewrite.heads import Latents, Rewritten
from rewrite.layout import gather
from rewrite.site import Latent, Site

ROOT = Path(__file__).parent.parent
CONTEXTS = (4096, 16384)
ORIGINAL, ABSORBED, REBUILT, EXPANDED = "original", "latent, absorbed", "latent, keys rebuilt", "latent, re-expanded"


def source(heads: int, kv_heads: int, dim: int) -> PreTrainedModel:
    """One layer; the parts beside the attention are small."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=heads * dim,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        num_hidden_layers=1,
        intermediate_size=64,
        vocab_size=64,
        max_position_embeddings=max(CONTEXTS) + 64,
        rms_norm_eps=1e-6,
    )
    return LlamaForCausalLM(config).eval()


def random_latents(site: Site, rank: int, rope_dim: int, rebuilt: bool) -> Latents:
    """Latents of a size, with the rope of evenly spaced pairs; times do not hang on the numbers."""
    make = torch.Generator().manual_seed(0)
    g, d, e, h = site.k.heads, site.k.dim, site.v.dim, site.heads

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64) / max(shape[-1], 1) ** 0.5

    rope = site.k.rope
    turned = 0 if rebuilt or rope is None else rope_dim
    frequencies = torch.zeros(0) if rope is None else torch.from_numpy(rope.frequencies)
    every = max(1, len(frequencies) // max(1, turned // 2))
    return Latents(
        down=draw(rank, g * (d + e)),
        turn=torch.cat([draw(turned, g * d), torch.zeros(turned, g * e, dtype=torch.float64)], 1),
        read=draw(h, rank, d),
        query_turn=draw(h, turned, d),
        up_v=draw(h, e, rank),
        frequencies=frequencies[::every][: turned // 2].double(),
        up_k=draw(g, d, rank) if rebuilt else None,
    )


def forms(model: PreTrainedModel, rank: int, rope_dim: int) -> dict[str, PreTrainedModel]:
    """The model in all forms."""
    ids = torch.randint(0, 64, (2, 10), generator=torch.Generator().manual_seed(1))
    program = capture(model, {"input_ids": ids}, dynamic=False)
    tensors = named_tensors(model)

    def changes(rebuilt: bool) -> dict[str, tuple[Site, Rewritten]]:
        found: dict[str, tuple[Site, Rewritten]] = {}
        for site in find(program.static).sites:
            latents = random_latents(site, rank, rope_dim, rebuilt)
            after = replace(site, form=Latent(latents.rank, latents.rope_dim, rebuilt))
            order = tuple(range(site.heads))
            found[site.name] = (site, Rewritten(after, gather(site, tensors), order, latents=latents))
        return found

    made: dict[str, PreTrainedModel] = {ORIGINAL: model}
    made[ABSORBED] = emit_latent(model, changes(False), {"input_ids": ids}).model
    made[REBUILT] = emit_latent(model, changes(True), {"input_ids": ids}).model
    stock = deepseek(model, changes(False))
    if isinstance(stock, Stock):
        made[EXPANDED] = stock.model
    return made


@dataclass(frozen=True)
class Step:
    """One token decoded in the layer's attention: `once` does it and gives its seconds; `held` bytes of cache."""

    once: Callable[[], float]
    held: int


def step(model: PreTrainedModel, context: int) -> Step:
    """A decoding step at a context."""
    attention: Any = model.model.layers[0].self_attn
    seconds: list[float] = []
    start = [0.0]
    before = attention.register_forward_pre_hook(lambda *_: start.__setitem__(0, time.perf_counter()))
    after = attention.register_forward_hook(lambda *_: seconds.append(time.perf_counter() - start[0]))
    with torch.no_grad():
        cache = model(input_ids=torch.zeros(1, 8, dtype=torch.long), past_key_values=DynamicCache()).past_key_values
    for layer in cache.layers:  # what stands in the cache does not matter for the time
        for name in ("keys", "values"):
            held = getattr(layer, name)
            setattr(layer, name, held[:, :, :1].expand(-1, -1, context, -1).contiguous())
    size = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    before.remove()
    after.remove()

    def once() -> float:
        hooks = (
            attention.register_forward_pre_hook(lambda *_: start.__setitem__(0, time.perf_counter())),
            attention.register_forward_hook(lambda *_: seconds.append(time.perf_counter() - start[0])),
        )
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
        for hook in hooks:
            hook.remove()
        cache.crop(-1)
        return seconds[-1]

    return Step(once, size)


@dataclass(frozen=True)
class Measured:
    """A form at a context: median seconds of a step, and bytes of its cache with the most that a step adds to them."""

    seconds: float
    bytes: int


def timed(models: Mapping[str, PreTrainedModel], context: int, rounds: int) -> dict[str, float]:
    """Median seconds of one step by form, all forms in turn."""
    steps = {name: step(model, context) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, one in steps.items():
            took = one.once()
            times[name] += [took] if turn else []
    return {name: statistics.median(t) for name, t in times.items()}


def weighed(models: Mapping[str, PreTrainedModel], context: int) -> dict[str, int]:
    """Bytes of one step by form, the cache included."""
    found: dict[str, int] = {}
    for name, model in models.items():
        one = step(model, context)
        found[name] = one.held + added(one.once)
    return found


def page(found: Mapping[tuple[str, int], Mapping[str, Measured]], rank: int, rope_dim: int) -> str:
    """The text of docs/decode.md."""
    lines = [
        "# One decoded token",
        "",
        "Written by `python -m bench.decode`. The attention module of one layer, one token of one sequence,",
        f"float32, one thread; latents of {rank} + {rope_dim} numbers. Ratios are to the original in the same run.",
        f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}.",
        "",
        *_table(found, lambda m: m.seconds * 1e3, "ms"),
        "",
        "Memory of the same step: the cache, and the most that the process holds beyond it while the token is decoded",
        "(the library's dynamic cache is copied when a token is added; rebuilt keys are held a chunk at a time).",
        "",
        *_table(found, lambda m: m.bytes / 1e6, "MB"),
    ]
    return "\n".join(lines) + "\n"


def _table(
    found: Mapping[tuple[str, int], Mapping[str, Measured]], value: Callable[[Measured], float], unit: str
) -> list[str]:
    lines = [
        "| model | context | " + " | ".join((ORIGINAL, ABSORBED, REBUILT, EXPANDED)) + " |",
        "|---|---|---|---|---|---|",
    ]
    for (name, context), of in found.items():
        base = value(of[ORIGINAL])
        cells = [f"{base:.1f} {unit}"]
        cells += [
            f"{value(of[f]):.1f} {unit}, {value(of[f]) / base:.2f}" if f in of else "–"
            for f in (ABSORBED, REBUILT, EXPANDED)
        ]
        lines.append(f"| {name} | {context:,} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rank", type=int, default=512)
    parser.add_argument("--rope-dim", type=int, default=64)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    models = {n: forms(source(32, n, 128), args.rank, args.rope_dim) for n in (32, 8)}
    times = {(n, c): timed(of, c, args.rounds) for n, of in models.items() for c in CONTEXTS}
    give_back()
    bytes_ = {(n, c): weighed(of, c) for n, of in models.items() for c in CONTEXTS}
    found = {
        (f"32 heads x 128, {n} kv heads", c): {f: Measured(times[n, c][f], bytes_[n, c][f]) for f in times[n, c]}
        for n, c in times
    }
    made = page(found, args.rank, args.rope_dim)
    print(made)
    if args.write:
        (ROOT / "docs" / "decode.md").write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
