"""The latent at its lossless limit on the shipped models, over a long greedy text, and the bytes that it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rewrite import MLA, convert
from rewrite.emit.validate import cache_bytes, greedy, relative

MODELS = Path(__file__).parents[2] / "examples" / "models"
TOKENS = 200
WHOLE = {"llama": 1.0, "qwen3": 1.0, "gpt2": 0.5}
"""The share at which nothing is lost: of keys that do not turn and values half as many numbers say all."""


@pytest.mark.parametrize("form", ["absorbed", "rebuilt"])
@pytest.mark.parametrize("kind", WHOLE)
def test_nothing_is_lost_in_200_tokens(kind: str, form: Any) -> None:
    original: Any = AutoModelForCausalLM.from_pretrained(MODELS / kind, dtype=torch.float32).eval()
    made: Any = convert(original, MLA(cache=1.0, form=form), check=False, emit="own").eval()
    given = AutoTokenizer.from_pretrained(MODELS / kind)("def read_lines(path):\n", return_tensors="pt")
    inputs = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
    with torch.no_grad():
        expected, got = greedy(original, inputs, TOKENS), greedy(made, inputs, TOKENS)
    assert torch.equal(expected.sequences, got.sequences)
    assert max(relative(a, b) for a, b in zip(expected.logits, got.logits, strict=True)) < 1e-5
    # absorbed at every step but the first, where several queries are expanded; behind a rope nothing is smaller
    rows = made.rewrite_report.sites
    held = cache_bytes(got.past_key_values)
    seen = got.sequences.shape[1] - 1
    assert held == 4 * seen * sum(row.cache_after for row in rows)
    assert held / cache_bytes(expected.past_key_values) == pytest.approx(
        0.5 if form == "rebuilt" else WHOLE[kind], abs=0.01
    )
