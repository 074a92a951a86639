"""Emitted folders load and compute in a process in which this project cannot be imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from passes.mla import MLA
from rewrite.emit import emit
from rewrite.emit.reading import for_older_readers
from rewrite.emit.validate import cache_bytes, greedy
from tests import bare
from tests.contract.by_hand import changes
from tests.contract.test_latent import made as latent
from tests.contract.test_sparse import MIXED, NARROW
from tests.contract.test_sparse import made as sparse
from tests.contract.tiny import ALL, inputs

CHILD = """
import pathlib, torch, transformers
settings = dict(do_sample=False, max_new_tokens=8, min_new_tokens=8, return_dict_in_generate=True, output_logits=True)
for top in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    given = torch.load(top / "inputs.pt")
    auto = transformers.AutoModelForSeq2SeqLM if "decoder_input_ids" in given else transformers.AutoModelForCausalLM
    for place, then in ((top / "half.of.it", top / "again.1"), (top / "again.1", None)):
        model, info = auto.from_pretrained(place, trust_remote_code=True, output_loading_info=True)
        assert not any(info.values()), (top, info)
        base, info = transformers.AutoModel.from_pretrained(place, trust_remote_code=True, output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"], (top, info)
        out = model.generate(**given, **settings, pad_token_id=0)
        cache = out.past_key_values
        halves = [cache.self_attention_cache, cache.cross_attention_cache] if hasattr(cache, "is_updated") else [cache]
        held = sum(t.nbytes for half in halves for layer in half.layers for t in (layer.keys, layer.values))
        torch.save({"tokens": out.sequences, "logits": out.logits, "bytes": held}, f"{place}.out.pt")
        if then is not None:
            model.save_pretrained(then)
"""


NAMES = ("qwen3", "gpt2", "bloom", "bart")
LATENT = (
    ("llama-gqa-sdpa", MLA(cache=0.5)),
    ("qwen3-sdpa", MLA(cache=0.5, form="rebuilt")),
    ("bloom-eager", MLA(cache=0.5)),
    ("bart-sdpa", MLA(cache=0.5)),
    ("youtu-sdpa", MLA(cache=0.5)),
    ("mixtral-sdpa", MLA(cache=0.5)),
)
SPARSE = (("llama-gqa-sdpa", MIXED), ("gpt2-sdpa", NARROW), ("gpt_oss-eager", NARROW), ("bart-sdpa", NARROW))


def test_bare_process(tmp_path: Path) -> None:
    """One process for all folders: starting it takes longest."""
    emitted: dict[str, Any] = {}
    for name in NAMES:
        model, sites = ALL[name]()
        emitted[name] = emit(model, changes(model, sites, 2), inputs(model)).model, inputs(model)
    for name, target in LATENT:
        _, given, made = latent(name, target)
        emitted[f"{name}-{target.form}"] = made.model, {n: v for n, v in given.items() if n != "use_cache"}
    for name, masks in SPARSE:
        _, given, made, _ = sparse(name, masks)
        emitted[f"{name}-sparse"] = made.model, {n: v for n, v in given.items() if n != "use_cache"}
    bare.write(tmp_path / "models", emitted, "half.of.it")
    done = bare.run(CHILD, str(tmp_path / "models"))
    assert done.returncode == 0, done.stderr[-3000:]
    for name, (made, given) in emitted.items():
        expected = greedy(made, given, 8)
        for place in ("half.of.it", "again.1"):
            folder = tmp_path / "models" / name / place
            found = torch.load(f"{folder}.out.pt")
            assert torch.equal(found["tokens"], expected.sequences), name
            assert found["bytes"] == cache_bytes(expected.past_key_values), name
            assert all(torch.equal(a, b) for a, b in zip(found["logits"], expected.logits, strict=True)), name
            has_code = any(path.suffix == ".py" for path in folder.iterdir())
            assert has_code == (name != "qwen3")


def test_stock_folder_tells_older_readers(tmp_path: Path) -> None:
    model, sites = ALL["llama"]()
    emit(model, changes(model, sites, 2), inputs(model)).model.save_pretrained(tmp_path)
    for_older_readers(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_key_value_heads"] == 2
    assert config["head_dim"] == 16
    assert config["rope_theta"] == model.config.rope_parameters["rope_theta"]
    assert config["torch_dtype"] == "float32"
    assert "auto_map" not in config
    assert "reattn" not in config


def test_without_the_file_a_folder_fails_loudly(tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    model, sites = ALL["gpt2"]()
    emit(model, changes(model, sites, 2), inputs(model)).model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        GPT2LMHeadModel.from_pretrained(tmp_path)
