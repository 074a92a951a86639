"""Exported folders in other programs than ours: as those read them, and in themselves where they are installed.

`pytest tests/e2e/test_onnx_elsewhere.py --elsewhere PYTHON` names the interpreter that has them, as optimum needs a
transformers of its own; examples/04_onnx_elsewhere.py tells how to make one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from rewrite import GQA, convert, export_onnx
from rewrite.onnx.export import Exported
from tests.contract import tiny

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "examples" / "models"
NEW = 24
FOLDERS = ("llama-matmul", "llama-shared", "llama-contrib", "gpt2-matmul")
OPTIMUM = ("llama-matmul", "llama-contrib")
"""A GPT-2 has no field for kv heads, and an empty cache has no room to be written into."""
SIZES: dict[str, Any] = {**tiny.LLAMA, "num_hidden_layers": 1, "eos_token_id": None}
TINY: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny.settled(transformers.LlamaConfig(**SIZES), "LlamaForCausalLM"),
    "gpt2": lambda: tiny.settled(
        transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=99, n_positions=64, eos_token_id=None),
        "GPT2LMHeadModel",
    ),
}
Case = tuple[Path, list[int], list[int], Exported]
Make = Callable[..., Case]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`made(name)`: a folder with 2 kv heads, a prompt, torch's text of it, and what the export told; of a tiny model
    or the shipped one."""
    top, models, found = tmp_path_factory.mktemp("elsewhere"), dict[str, Any](), dict[str, Case]()

    def make(name: str, *, shipped: bool = False) -> Case:
        kind, form = name.split("-")
        label, prompt = (f"shipped-{name}", [316, 825, 63, 1117, 8]) if shipped else (name, [5, 9, 12, 31, 7])
        if label not in found:
            source = f"{kind} {shipped}"
            models[source] = models.get(source) or _fewer(kind, shipped)
            done = export_onnx(models[source], top / label, form=form)  # pyright: ignore
            ids = torch.tensor([prompt])
            settings = {"do_sample": False, "min_new_tokens": NEW, "max_new_tokens": NEW, "pad_token_id": 0}
            text = models[source].generate(ids, attention_mask=torch.ones_like(ids), **settings)
            found[label] = (top / label, prompt, text[0].tolist(), done)
        return found[label]

    return make


def _fewer(kind: str, shipped: bool) -> Any:
    source: Any = AutoModelForCausalLM.from_pretrained(MODELS / kind, dtype=torch.float32) if shipped else TINY[kind]()
    return convert(source, GQA(2, polish=0), check=False).eval()


def session(path: Path) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def genai(folder: Path, tokens: list[int], new: int) -> list[int]:
    """GenAI's loop: names, cache shape and whether past and present are one buffer from its config alone."""
    config = json.loads((folder / "genai_config.json").read_text())
    model, decoder = config["model"], config["model"]["decoder"]
    assert model["type"] == "decoder", "the one name of its list that is no class"
    run, names = session(folder / decoder["filename"]), decoder["inputs"]
    shared, length = config["search"]["past_present_share_buffer"], len(tokens) + new
    assert length <= config["search"]["max_length"] == model["context_length"]
    shape = (1, decoder["num_key_value_heads"], length if shared else 0, decoder["head_size"])
    parts = [(names[f"past_{p}_names"], decoder["outputs"][f"present_{p}_names"]) for p in ("key", "value")]
    layers = [(past % n, present % n) for n in range(decoder["num_hidden_layers"]) for past, present in parts]
    held: dict[str, Any] = {past: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for past, _ in layers}
    text, fresh = list(tokens), list(tokens)
    for _ in range(new):
        told = {
            "input_ids": np.array([fresh]),
            "attention_mask": np.ones((1, len(text)), np.int64),
            "position_ids": np.arange(len(text))[None, -len(fresh) :],
        }
        known = {names[n]: np.ascontiguousarray(value) for n, value in told.items() if n in names}
        feeds = {**{n: ort.OrtValue.ortvalue_from_numpy(value) for n, value in known.items()}, **held}
        logits = _shared(run, feeds, dict(layers)) if shared else _grown(run, feeds, layers, held)
        assert logits.shape[2] == model["vocab_size"]
        fresh = [int(logits[0, -1].argmax())]
        text += fresh
    return text


def _grown(run: Any, feeds: dict[str, Any], layers: list[tuple[str, str]], held: dict[str, Any]) -> Any:
    logits, *presents = run.run_with_ort_values(["logits", *(present for _, present in layers)], feeds)
    held.update(zip((past for past, _ in layers), presents, strict=True))
    return logits.numpy()


def _shared(run: Any, feeds: dict[str, Any], present: dict[str, str]) -> Any:
    bound = run.io_binding()
    for name, value in feeds.items():
        bound.bind_ortvalue_input(name, value)
        if name in present:
            bound.bind_ortvalue_output(present[name], value)
    bound.bind_output("logits")
    run.run_with_iobinding(bound)
    return bound.get_outputs()[-1].numpy()


def optimum(folder: Path, tokens: list[int], new: int) -> list[int]:
    """optimum's loop: an empty cache by the model's config, inputs and outputs of the cache in the file's order."""
    config, run = json.loads((folder / "config.json").read_text()), session(folder / "model.onnx")
    heads = config["num_attention_heads"]
    shape = (1, config["num_key_value_heads"], 0, config["hidden_size"] // heads)
    pasts, presents = (
        [v.name for v in values if ".key" in v.name or ".value" in v.name]
        for values in (run.get_inputs(), run.get_outputs())
    )
    others = {v.name for v in run.get_inputs()} - set(pasts)
    held, text, fresh = [np.zeros(shape, np.float32) for _ in pasts], list(tokens), list(tokens)
    for _ in range(new):
        told = {"input_ids": np.array([fresh]), "attention_mask": np.ones((1, len(text)), np.int64)}
        if "position_ids" in others:
            told["position_ids"] = np.arange(len(text))[None, -len(fresh) :]
        logits, *held = run.run(["logits", *presents], {**told, **dict(zip(pasts, held, strict=True))})
        fresh = [int(logits[0, -1].argmax())]
        text += fresh
    return text


PROGRAMS = {"genai": genai, "optimum": optimum}
CASES = [*(("genai", name) for name in FOLDERS), *(("optimum", name) for name in OPTIMUM)]


@pytest.mark.parametrize(("program", "name"), CASES)
def test_as_it_is_read(program: str, name: str, made: Make) -> None:
    folder, tokens, wanted, done = made(name)
    assert PROGRAMS[program](folder, tokens, NEW) == wanted
    assert "ONNX Runtime GenAI loads it" in done.note


def test_who_does_not_load_it_is_told(made: Make) -> None:
    assert "optimum does not: by the config its cache is 4 × 16, not 2 × 16" in made("gpt2-matmul")[3].note
    assert "optimum does not, as its empty cache has no room" in made("llama-shared")[3].note
    assert "optimum where it reads num_key_value_heads of model type llama" in made("llama-matmul")[3].note


MODULES = {"genai": "onnxruntime_genai", "optimum": "optimum.onnxruntime"}


@pytest.mark.parametrize(("program", "name"), [*CASES, ("genai", "llama-attention"), ("optimum", "llama-attention")])
def test_in_itself(program: str, name: str, made: Make, request: pytest.FixtureRequest) -> None:
    python = request.config.getoption("--elsewhere") or sys.executable
    known = subprocess.run([python, "-c", f"import {MODULES[program]}"], capture_output=True, check=False, timeout=300)
    if known.returncode:
        pytest.skip(f"{python} has no {MODULES[program]}; give one by --elsewhere")
    folder, tokens, wanted, _ = made(name, shipped=True)
    words = [python, str(ROOT / "examples" / "04_onnx_elsewhere.py"), program, str(folder), *map(str, tokens)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [int(word) for word in done.stdout.split()][: len(wanted)] == wanted
