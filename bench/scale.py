"""A checkpoint shaped like Llama 3 8B, converted in bounded memory: memory, time, and three deaths on the way.

    python -m bench.scale --gb 16 --at FOLDER --write

Writes a sharded bfloat16 checkpoint of random weights, as many layers as fit into --gb, converts it with GQA and with
MLA under --memory while the child's memory is sampled, and times a copy of the same files beside it. Then the last one
again, killed with SIGKILL at three random moments and resumed: every file must be the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bench.memory import status
from rewrite.emit.stock import built
from rewrite.journal import hash_of
from rewrite.weights import Spec, split, write

ROOT = Path(__file__).parents[1]
HEAD = """# Converting a checkpoint that does not fit into memory

Written by `python -m bench.scale --write`: a checkpoint of the shapes of Llama 3 8B with random weights, converted from
the weights alone. RssAnon is memory that no file backs, which `--memory` is about; RssFile are pages of mapped files,
here those of libraries, which the kernel takes back when it needs them.

"""
HIDDEN, INNER, VOCABULARY, SHARD = 4096, 14336, 128_256, 5_000_000_000
LAYER = 2 * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * 1024 + 3 * HIDDEN * INNER)
"""Bytes of one layer."""
ENDS = 2 * 2 * HIDDEN * VOCABULARY
"""Bytes of embedding and head."""
TARGETS = ("gqa:4", "mla:cache=0.25")


@dataclass(frozen=True)
class Ran:
    """One conversion: wall time, and the most that was seen of memory that files do not back, and of mapped files."""

    seconds: float
    anonymous: int
    mapped: int
    code: int


def config(gb: float) -> LlamaConfig:
    """Llama 3 8B's, with as many layers as fit."""
    layers = max(1, min(32, int((gb * 1e9 - ENDS) // LAYER)))
    return LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, vocab_size=VOCABULARY, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=8192, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, tie_word_embeddings=False,
        bos_token_id=128_000, eos_token_id=128_001, dtype="bfloat16",
    )  # fmt: skip


def make(folder: Path, gb: float) -> None:
    """Write the checkpoint, a tensor at a time. One pool of normal numbers serves all, each from a place of its own."""
    folder.mkdir(parents=True)
    settings = config(gb)
    model = built(LlamaForCausalLM, settings)
    settings.architectures = ["LlamaForCausalLM"]
    settings.save_pretrained(folder)
    pool = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul(0.02).to(torch.bfloat16)
    specs = [Spec(n, "BF16", tuple(p.shape)) for n, p in model.named_parameters()]
    shards = split([(s.name, s.bytes) for s in specs], SHARD)
    held = {s.name: s for s in specs}
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]

    def pieces(name: str) -> Tensor | Iterator[Tensor]:
        if len(held[name].shape) == 1:
            return torch.ones(held[name].shape, dtype=torch.bfloat16)
        return _drawn(held[name].bytes // 2, pool, name)

    for file, shard in zip(names, shards, strict=True):
        write(folder / file, [held[n] for n in shard], pieces)
    where = {n: file for file, shard in zip(names, shards, strict=True) for n in shard}
    index = {"metadata": {"total_size": sum(s.bytes for s in specs)}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _drawn(left: int, pool: Tensor, name: str) -> Iterator[Tensor]:
    at = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") % len(pool)
    while left:
        piece = pool[at : at + left]
        yield piece
        left, at = left - len(piece), 0


def command(source: Path, out: Path, target: str, memory: str) -> list[str]:
    """What a user types."""
    words = ["convert", str(source), str(out), "--to", target, "--memory", memory, "--no-check"]
    return [sys.executable, "-m", "rewrite.cli", *words]


def run(words: list[str], log: Path, kill_after: float | None = None) -> Ran:
    """Run a child, look at its memory twenty times a second, and kill it after some seconds where that is wanted."""
    start, most = time.monotonic(), {"RssAnon": 0, "RssFile": 0}
    with log.open("a") as file:
        child = subprocess.Popen(words, stdout=file, stderr=file)
        while child.poll() is None:
            held = status(child.pid)
            most = {name: max(peak, held.get(name, 0)) for name, peak in most.items()}
            if kill_after is not None and time.monotonic() - start > kill_after:
                child.send_signal(signal.SIGKILL)
                child.wait()
            time.sleep(0.05)
    return Ran(time.monotonic() - start, most["RssAnon"], most["RssFile"], child.returncode)


def copied(source: Path, place: Path) -> float:
    """Seconds that a copy of the folder takes until it is on disk."""
    start = time.monotonic()
    shutil.copytree(source, place)
    for path in place.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    seconds = time.monotonic() - start
    shutil.rmtree(place)
    return seconds


def hashes(folder: Path) -> dict[str, str]:
    """File -> sha256."""
    return {p.name: hash_of(p) for p in sorted(folder.iterdir())}


def resumed(
    source: Path, out: Path, target: str, memory: str, log: Path, undisturbed: Ran, whole: dict[str, str]
) -> str:
    """A conversion that is killed three times at random, and what came of it."""
    kills, total, draw = 0, 0.0, random.Random(0)
    while kills < 3:
        # three of them are less than the whole even where it goes faster this time
        done = run(command(source, out, target, memory), log, draw.uniform(0.05, 0.25) * undisturbed.seconds)
        if out.exists():
            raise SystemExit(f"{target} was done before it could be killed three times: nothing is shown")
        total += done.seconds
        kills += 1
    total += run(command(source, out, target, memory), log).seconds
    if hashes(out) != whole:
        raise SystemExit("a conversion that was killed and resumed left other bytes")
    return (
        f"{target} again, killed with SIGKILL at {kills} random moments and started anew each time: {total:.0f} s in "
        f"all, against {undisturbed.seconds:.0f} s undisturbed, and every file has the same bytes."
    )


def measure(place: Path, gb: float, memory: str, targets: Sequence[str], kill: bool) -> str:
    """The text for the page."""
    source, out, log = place / "model", place / "out", place / "log.txt"
    if not source.exists():
        make(source, gb)
    size = sum(p.stat().st_size for p in source.iterdir())
    copy = copied(source, place / "copy")
    lines = [
        f"{config(gb).num_hidden_layers} layers, {size / 1e9:.1f} GB in files of 5 GB, `--memory {memory}`; copying "
        f"the same files takes {copy:.0f} s. Memory is the most of samples taken every 0.05 s. {machine()}",
        "",
        "| target | seconds | of a copy's | RssAnon, GB | RssFile, GB | output, GB |",
        "|---|---|---|---|---|---|",
    ]
    for target in targets:
        done = run(command(source, out, target, memory), log)
        if done.code:
            raise SystemExit(f"{target} ended with {done.code}; see {log}")
        made = sum(p.stat().st_size for p in out.iterdir())
        figures = f"{done.anonymous / 1e9:.2f} | {done.mapped / 1e9:.2f} | {made / 1e9:.2f}"
        lines.append(f"| {target} | {done.seconds:.0f} | {done.seconds / copy:.1f} | {figures} |")
        print(lines[-1], flush=True)
        whole = hashes(out)
        shutil.rmtree(out)
        if kill and target == targets[-1]:
            lines += ["", resumed(source, out, target, memory, log, done, whole)]
            shutil.rmtree(out)
    return "\n".join(lines)


def machine() -> str:
    """What else was going on."""
    return f"{os.cpu_count()} cores with a load of {os.getloadavg()[0]:.1f} at the start, shared with other work."


def main() -> None:
    """Measure, print, and with --write put the figures into docs/scale.md."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--gb", type=float, default=16.1)
    options.add_argument("--memory", default="4GB")
    options.add_argument("--at", type=Path, default=Path("scale-bench"))
    options.add_argument("--to", action="append", help="targets (gqa:4 and mla:cache=0.25)")
    options.add_argument("--no-kill", action="store_true", help="do not kill and resume the last one")
    options.add_argument("--keep", action="store_true", help="leave the checkpoint for another run")
    options.add_argument("--write", action="store_true")
    given = options.parse_args()
    given.at.mkdir(parents=True, exist_ok=True)
    text = measure(given.at, given.gb, given.memory, given.to or TARGETS, not given.no_kill)
    print(text)
    if not given.keep:
        shutil.rmtree(given.at)
    if given.write:
        (ROOT / "docs" / "scale.md").write_text(HEAD + text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
