"""Models as ONNX files: the text that ONNX Runtime writes is torch's, and what it caches is what the plan says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rewrite import GQA, MLA, BlockSparse, convert, export_onnx
from rewrite.emit.validate import greedy
from rewrite.onnx.run import Decoder, generate

MODELS = Path(__file__).parents[2] / "examples" / "models"
TOKENS = 100
TARGETS = {"gqa": GQA(2, polish=0), "mla": MLA(cache=0.25), "sink": BlockSparse(window=32, sink=4)}
SHARES = {"gqa": 1 / 3, "mla": 1 / 4, "sink": 0}
"""Of the source's cache per token; the last one holds 35 tokens, however many there were."""
CASES = [*((kind, name) for kind in ("llama", "qwen3", "gpt2") for name in ("gqa", "mla")), ("llama", "sink")]
STANDARD = {"", "ai.onnx"}


def custom(path: Path) -> set[str]:
    """Operators of the file, and of its functions, that neither ONNX nor the file defines."""
    model = onnx.load(str(path))
    defined = {(f.domain, f.name) for f in model.functions}
    nodes = [*model.graph.node, *(n for f in model.functions for n in f.node)]
    return {
        f"{n.domain}::{n.op_type}" for n in nodes if n.domain not in STANDARD and (n.domain, n.op_type) not in defined
    }


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_hundred_tokens_are_those_of_torch(kind: str, name: str, tmp_path: Path) -> None:
    source: Any = AutoModelForCausalLM.from_pretrained(MODELS / kind, dtype=torch.float32).eval()
    target: Any = TARGETS[name]
    made: Any = convert(source, target, check=False, emit="own").eval()
    rows = made.rewrite_report.sites  # the plan's rows
    each = sum(row.cache_after for row in rows)
    assert each == SHARES[name] * sum(row.cache_before for row in rows)
    path = tmp_path / "model.onnx"
    done = export_onnx(made, path)

    given = AutoTokenizer.from_pretrained(MODELS / kind)("def read_lines(path):\n", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = greedy(made, {"input_ids": given, "attention_mask": torch.ones_like(given)}, TOKENS)
    decoder = Decoder(path, threads=1)
    assert np.array_equal(generate(decoder, given.numpy(), TOKENS), wanted.sequences.numpy())

    seen = given.shape[1] + TOKENS - 1  # the last token is written, and not read
    planned = 4 * (seen * each + sum(row.cache_fixed for row in rows))
    assert sum(held.numpy().nbytes for held in decoder.held) == decoder.cache_bytes == planned
    assert sum(done.cache) == sum(decoder.numbers)
    assert custom(path) == set()
    assert done.worst < 1e-5
    functions = {f.name for f in onnx.load(str(path), load_external_data=False).functions}
    assert ("LatentScores" in functions) == (name == "mla")
