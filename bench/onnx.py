"""A decoded token and a prompt in ONNX Runtime: `python -m bench.onnx --write` writes docs/onnx.md.

Three tables. One layer's attention step in every form that it can be written in, beside what the exporter makes of the
class's own eager attention, which repeats the kv heads. A model of 300 M parameters, converted against original. And a
prompt, in one layer whose queries read first tokens and a window. Random weights; all files are timed in turn, round
after round, so that the ratios are of one run. Times are the processor's, of one thread: others on the machine do not
count.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime as ort
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bench.decode import random_latents
from passes.convert import named_tensors
from passes.find import find
from rewrite import BlockSparse, convert
from rewrite.capture import capture
from rewrite.emit import emit_latent, runtime
from rewrite.heads import Rewritten
from rewrite.layout import gather
from rewrite.onnx.export import export_onnx
from rewrite.onnx.run import Decoder
from rewrite.onnx.stage import Stage
from rewrite.onnx.tracing import Decoding, decoding
from rewrite.site import Latent

ROOT = Path(__file__).parent.parent
CONTEXTS = (4096, 16384)
PIECE = 1024
"""Tokens of a piece of a prompt whose scores would not fit into memory at once."""
Make = Callable[[Path], object]


def llama(layers: int, hidden: int, inner: int, vocabulary: int, heads: tuple[int, int, int]) -> PreTrainedModel:
    """Random weights; `heads` are (query heads, kv heads, width)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=inner,
        vocab_size=vocabulary,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=heads[2],
        max_position_embeddings=max(CONTEXTS) + 64,
    )
    return LlamaForCausalLM(config).eval()


def with_latents(model: PreTrainedModel, rank: int, rope_dim: int) -> PreTrainedModel:
    """The model with a latent of this size in every layer: proven on a model of one, and put into all. Times do not
    hang on its numbers."""
    config: Any = copy.deepcopy(model.config)
    config.num_hidden_layers, config.vocab_size = 1, 64
    one = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 64, (2, 10), generator=torch.Generator().manual_seed(1))
    program, tensors = capture(one, {"input_ids": ids}, dynamic=False), named_tensors(one)
    (site,) = find(program.static).sites
    after = replace(site, form=Latent(rank, rope_dim, False))
    latents, order = random_latents(site, rank, rope_dim, False), tuple(range(site.heads))
    new = Rewritten(after, gather(site, tensors), order, latents=latents)
    proven: Any = emit_latent(one, {site.name: (site, new)}, {"input_ids": ids}).model
    made: Any = copy.deepcopy(model)
    ((recipe),) = proven.config.reattn["sites"]
    for layer in range(made.config.num_hidden_layers):
        names = {key: recipe[key].replace(".0.", f".{layer}.") for key in ("site", "module")}
        runtime.install(made, {"version": 1, "sites": [{**recipe, **names}]})
        filled: Any = made.get_submodule(names["module"])
        filled.reattn.load_state_dict(proven.get_submodule(recipe["module"]).reattn.state_dict())
    return made


def export_plain(model: PreTrainedModel, path: Path) -> None:
    """What torch.onnx.export makes of the class's own eager attention, with the same inputs and outputs."""
    traced = decoding(model, Stage())
    config: Any = model.config
    before, config._attn_implementation_internal = config._attn_implementation, "eager"
    module = traced.module
    if not isinstance(module, Decoding):
        raise TypeError("the model decodes nothing")
    try:
        with torch.no_grad():
            made: Any = torch.onnx.export(
                module, traced.args, dynamo=True, opset_version=18, dynamic_shapes=traced.shapes, verbose=False,
                input_names=traced.inputs, output_names=traced.outputs,
            )  # fmt: skip
    finally:
        config._attn_implementation_internal = before
    onnx_ir.save(made.model, path)


@dataclass(frozen=True)
class File:
    """A file at a context: `once` decodes one token and gives its seconds; `read` bytes of weights and cache."""

    once: Callable[[], float]
    read: int


def opened(path: Path, context: int, weights: int) -> File:
    """A decoder with a full cache of random numbers, ready for one more token."""
    decoder, draw = Decoder(path, threads=1), np.random.default_rng(0)
    room = context + 64 if decoder.shared else context
    past = [
        ort.OrtValue.ortvalue_from_numpy(draw.standard_normal((1, s.heads, room, s.width), s.kind))  # pyright: ignore
        for s in decoder.slots
    ]
    ids, mask = np.zeros((1, 1), np.int64), np.ones((1, context + 1), np.int64)

    def once() -> float:
        decoder.held, decoder.length = list(past), context
        start = time.process_time()
        decoder.step(ids, mask)
        return time.process_time() - start

    held = sum(s.heads * s.width * 4 for s in decoder.slots) * context
    return File(once, weights + held)


def timed(paths: Mapping[str, Path], context: int, rounds: int, weights: int) -> dict[str, tuple[float, int]]:
    """(median seconds of a step, bytes read) by name, all in turn."""
    files = {name: opened(path, context, weights) for name, path in paths.items()}
    times: dict[str, list[float]] = {name: [] for name in files}
    for turn in range(rounds + 1):
        for name, file in files.items():
            took = file.once()
            times[name] += [took] if turn else []
    return {name: (statistics.median(t), files[name].read) for name, t in times.items()}


def forms(top: Path) -> dict[str, Path]:
    """One layer of 32 query heads, 8 kv heads of 128 or a latent of 512 + 64, whose other parts are small."""
    model = llama(1, 64, 64, 64, (32, 8, 128))
    latent = with_latents(model, 512, 64)
    makes: dict[str, Make] = {
        "plain export, kv heads repeated": lambda p: export_plain(model, p),
        "attention": lambda p: export_onnx(model, p, form="attention"),
        "matmul": lambda p: export_onnx(model, p),
        "shared": lambda p: export_onnx(model, p, form="shared"),
        "contrib": lambda p: export_onnx(model, p, form="contrib"),
        "latent, matmul": lambda p: export_onnx(latent, p),
        "latent, shared": lambda p: export_onnx(latent, p, form="shared"),
    }
    return _made(top, "step", makes)


def models(top: Path) -> tuple[dict[str, Path], int]:
    """The files of the model of 300 M parameters, and the bytes of the weights that one token reads."""
    sizes = (15, 1024, 4096, 32_000)
    source = llama(*sizes, (16, 8, 64))
    fewer = llama(*sizes, (16, 2, 64))
    makes: dict[str, Make] = {
        "original, plain export": lambda p: export_plain(source, p),
        "original, matmul": lambda p: export_onnx(source, p),
        "gqa:2, matmul": lambda p: export_onnx(fewer, p),
        "gqa:2, shared": lambda p: export_onnx(fewer, p, form="shared"),
        "mla 25 %, matmul": lambda p: export_onnx(with_latents(source, 224, 32), p),
    }
    read = sum(p.numel() * 4 for n, p in source.named_parameters() if "embed_tokens" not in n)
    return _made(top, "model", makes), read


def prompts(top: Path) -> dict[str, Path]:
    """One layer of 32 query heads and 8 kv heads of 128, whole, and with 64 first tokens and a window of 1,024."""
    model = llama(1, 64, 64, 64, (32, 8, 128))
    sparse: Any = convert(model, BlockSparse(window=1024, sink=64), check=False)
    makes: dict[str, Make] = {
        "original, matmul": lambda p: export_onnx(model, p),
        "sparse, attention": lambda p: export_onnx(sparse, p, form="attention"),
        "sparse, matmul": lambda p: export_onnx(sparse, p),
    }
    return _made(top, "prompt", makes)


def prompt(paths: Mapping[str, Path], tokens: int, rounds: int) -> list[str]:
    """Rows of the table: a prompt taken in by every file in turn."""
    times: dict[str, list[float]] = {name: [] for name in paths}
    pieces = {name: tokens if tokens <= CONTEXTS[0] or name == "sparse, matmul" else PIECE for name in paths}
    for _ in range(rounds):
        for name, path in paths.items():
            decoder = Decoder(path, threads=1)  # a session keeps the memory of its largest run: one at a time
            start = time.process_time()
            for done in range(0, tokens, pieces[name]):
                ids = np.zeros((1, pieces[name]), np.int64)
                decoder.step(ids, np.ones((1, done + pieces[name]), np.int64))
            times[name].append(time.process_time() - start)
    took = {name: statistics.median(t) for name, t in times.items()}
    base = next(iter(took.values()))
    return [f"| {tokens:,} | {n} | {pieces[n]:,} | {t:.2f} | {base / t:.1f}× |" for n, t in took.items()]


def _made(top: Path, part: str, makes: Mapping[str, Make]) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for at, (name, make) in enumerate(makes.items()):
        paths[name] = top / f"{part}-{at}.onnx"
        if not paths[name].exists():
            make(paths[name])
            print(f"wrote {name}", flush=True)
    return paths


def table(found: Mapping[int, Mapping[str, tuple[float, int]]], *, roofline: bool) -> list[str]:
    """Markdown: a row for every file and context, speed relative to the first of its context."""
    head = ["context", "file", "ms", "speed"] + (["roofline"] if roofline else [])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for context, rows in found.items():
        base, most = next(iter(rows.values()))
        for name, (seconds, read) in rows.items():
            cells = [f"{context:,}", name, f"{1e3 * seconds:.1f}", f"{base / seconds:.2f}×"]
            lines.append("| " + " | ".join(cells + ([f"{most / read:.2f}×"] if roofline else [])) + " |")
    return lines


def page(step: list[str], whole: list[str], long: list[str]) -> str:
    """The text of docs/onnx.md's tables."""
    versions = f"onnxruntime {ort.__version__}, torch {torch.__version__}, {platform.machine()}"
    return "\n".join(
        [
            "# A decoded token and a prompt in ONNX Runtime",
            "",
            "Written by `python -m bench.onnx --write`. float32, one thread, one sequence; processor time, median over",
            "rounds in which all files of a table are run in turn; what others take of the memory's bandwidth counts",
            f"all the same. {versions}.",
            "",
            "## One attention step",
            "",
            "A model of one layer: 32 query heads and 8 kv heads of 128, or a latent of 512 + 64; its other parts are",
            "small. *Plain export* is what torch.onnx.export makes of the class's eager attention.",
            "",
            *step,
            "",
            "## A model of 300 M parameters",
            "",
            "15 layers of 16 query heads and 8 kv heads of 64, against 2 kv heads, and against a latent of a quarter",
            "of its cache. *Roofline* is the ratio of the bytes of weights and cache that a token reads.",
            "",
            *whole,
            "",
            "## A prompt under a window",
            "",
            "A model of one layer, 32 query heads and 8 kv heads of 128, and the same with",
            "`sparse:window=1024,sink=64`. Form *attention* multiplies all keys at hand and masks; form *matmul* takes",
            "queries in tiles of 128 and multiplies what some query of a tile reads. *Piece* is the number of tokens",
            "taken in at once: the scores of 16,384 in 32 heads are 34 GB, so where all are multiplied they come in",
            "pieces, between which the sparse cache drops what is not read any more. Three rounds of 4,096 tokens and",
            f"one of 16,384; at the end {os.getloadavg()[0]:.0f} processes shared {os.cpu_count()} cores.",
            "",
            "| prompt | file | piece | s | speed |",
            "|---|---|---|---|---|",
            *long,
            "",
        ]
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--keep", type=Path, help="a folder for the files, so that a second run need not make them")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        top = args.keep or Path(made)
        steps = forms(top)
        step = table({CONTEXTS[0]: timed(steps, CONTEXTS[0], 3 * args.rounds, 0)}, roofline=False)
        print("\n".join(step), flush=True)
        files, weights = models(top)
        whole = table({c: timed(files, c, args.rounds, weights) for c in CONTEXTS}, roofline=True)
        print("\n".join(whole), flush=True)
        read = prompts(top)
        long = [row for c, rounds in zip(CONTEXTS, (3, 1), strict=True) for row in prompt(read, c, rounds)]
    text = page(step, whole, long)
    print(text)
    if args.write:
        (ROOT / "docs" / "onnx.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
