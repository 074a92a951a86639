"""From folder to folder in bounded memory: the same bytes as in memory, and nothing read that is not needed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertModel, Gemma2Config, Gemma2ForCausalLM

import passes.convert
import passes.stream
import passes.tune
import rewrite.calibration
import rewrite.save
import rewrite.shards
from passes.disk import Disk
from rewrite import GQA, MLA, BlockSparse, convert
from rewrite.checkpoint import Checkpoint, require_checkpoint
from rewrite.cli import main
from rewrite.errors import OutOfSpace
from rewrite.journal import hash_of

MODELS = Path(__file__).parents[2] / "examples" / "models"
ROOM = "8GB"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def different(one: Path, two: Path) -> list[str]:
    a, b = contents(one), contents(two)
    return sorted(n for n in a.keys() | b.keys() if a.get(n) != b.get(n))


CASES: dict[str, tuple[str, Any, str, str]] = {
    "stock": ("llama", GQA(3), "auto", "stock"),
    "grouped": ("gpt2", GQA(3), "auto", "grouped"),
    "latent": ("qwen3", MLA(cache=0.25), "auto", "latent"),
    "deepseek": ("llama", MLA(cache=0.25, even=True), "stock", "deepseek"),
    "sparse": ("llama", BlockSparse(window=64), "auto", "sparse"),
    "sparse by head": ("qwen3", BlockSparse(density=0.5), "auto", "sparse"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_bytes_as_in_memory(name: str, tmp_path: Path):
    kind, target, how, form = CASES[name]
    convert(MODELS / kind, target, out=tmp_path / "held", check=False, emit=how)
    made = convert(MODELS / kind, target, out=tmp_path / "streamed", check=False, emit=how, memory=ROOM)
    assert different(tmp_path / "held", tmp_path / "streamed") == []
    assert {row.form for row in made.rewrite_report.sites} == {form}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["held", "streamed"]
    files = dict(made.rewrite_report.files)
    assert files["model.safetensors"] == hash_of(tmp_path / "streamed" / "model.safetensors")


@pytest.mark.parametrize("only", ["model.layers.[01].*", "model.layers.[12].*"])
def test_where_some_sites_stay(only: str, tmp_path: Path):
    """What is a form for all sites, one number in the config, is none for some: the part that is run must show it."""
    convert(MODELS / "llama", GQA(3), out=tmp_path / "held", check=False, only=only)
    made = convert(MODELS / "llama", GQA(3), out=tmp_path / "streamed", check=False, only=only, memory=ROOM)
    assert {row.form for row in made.rewrite_report.sites if row.converted} == {"grouped"}
    assert different(tmp_path / "held", tmp_path / "streamed") == []


def test_shards_are_those_that_transformers_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Files, their order and the index; and a source in several files is one model."""
    monkeypatch.setattr(rewrite.save, "SHARD", 1_000_000)
    monkeypatch.setattr(rewrite.shards, "SHARD", 1_000_000)
    AutoModelForCausalLM.from_pretrained(MODELS / "llama", dtype="auto").save_pretrained(
        tmp_path / "model", max_shard_size="700KB"
    )
    assert len(require_checkpoint(tmp_path / "model").headers) > 3
    convert(tmp_path / "model", GQA(2), out=tmp_path / "held", check=False)
    convert(tmp_path / "model", GQA(2), out=tmp_path / "streamed", check=False, memory=ROOM)
    assert different(tmp_path / "held", tmp_path / "streamed") == []
    index = json.loads((tmp_path / "streamed" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "streamed").config.num_key_value_heads == 2


def test_types_that_differ_stay_as_they_are(tmp_path: Path):
    """Norms in float32 beside bfloat16: what is copied is copied bit by bit."""
    model = AutoModelForCausalLM.from_pretrained(MODELS / "llama", dtype=torch.bfloat16)
    for layer in model.model.layers:
        layer.input_layernorm.float()
    model.save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", GQA(3), out=tmp_path / "out", check=False, memory=ROOM)
    before, after = require_checkpoint(tmp_path / "model"), require_checkpoint(tmp_path / "out")
    assert set(after.dtypes) == {"F32", "BF16"}
    for name in before.where:
        assert before.entry(name).dtype == after.entry(name).dtype
        if "self_attn" not in name:
            assert torch.equal(before.tensor(name), after.tensor(name))


def test_only_what_a_site_needs_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Beside the first layer, on which the form is proven, no tensor but those of attentions is ever held."""
    seen: set[str] = set()
    held = Checkpoint.tensor

    def noted(self: Checkpoint, name: str, rows: int | None = None) -> torch.Tensor:
        assert "embed" not in name or (rows or 10**9) <= 512
        seen.add(name)
        return held(self, name, rows)

    monkeypatch.setattr(Checkpoint, "tensor", noted)
    convert(MODELS / "llama", MLA(cache=0.5), out=tmp_path / "out", check=False, memory=ROOM)
    later = {n for n in seen if n.startswith("model.layers.") and not n.startswith("model.layers.0.")}
    assert later
    assert all(".self_attn." in n for n in later)


def test_layers_of_two_kinds_are_proven_on_one_of_each(tmp_path: Path):
    """Every other layer has a window, so two layers are what is run; all four are converted."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=700, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, head_dim=8, max_position_embeddings=64, sliding_window=5, query_pre_attn_scalar=8,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", GQA(2), out=tmp_path / "held", check=False)
    made = convert(tmp_path / "model", GQA(2), out=tmp_path / "streamed", check=False, memory=ROOM)
    assert made.rewrite_report.converted == 4
    assert different(tmp_path / "held", tmp_path / "streamed") == []


def test_low_rank_projections(tmp_path: Path):
    """Where nothing is cached tensors get other names; in another type than those that make them."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).bfloat16().save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", MLA(rank=12), out=tmp_path / "held", check=False)
    made = convert(tmp_path / "model", MLA(rank=12), out=tmp_path / "streamed", check=False, memory=ROOM)
    assert {row.form for row in made.rewrite_report.sites} == {"factored"}
    assert different(tmp_path / "held", tmp_path / "streamed") == []


def test_what_does_not_fit_is_refused_with_numbers(tmp_path: Path):
    with pytest.raises(OutOfSpace, match=r"needs .* GB|needs .* MB") as caught:
        convert(MODELS / "llama", GQA(3), out=tmp_path / "out", memory="100MB")
    assert "the limit is 100 MB" in str(caught.value)
    assert "--memory" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The files are loaded again, where they fit."""
    words = ["convert", str(MODELS / "llama"), str(tmp_path / "out"), "--to", "gqa:3", "--memory", ROOM]
    (tmp_path / "text.txt").write_text((MODELS / "held_out.txt").read_text()[:3000])
    assert main([*words, "--text", str(tmp_path / "text.txt"), "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)["checked"]
    assert checked["perplexity"]["after"] != checked["perplexity"]["before"]
    assert checked["cache"]["after"] * 2 == checked["cache"]["before"]


@pytest.mark.parametrize("words", ["lots", "-4GB", "0", "4 parsecs"])
def test_an_amount_of_memory_that_is_none(words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code = main(["convert", str(MODELS / "llama"), str(tmp_path / "out"), "--to", "gqa:3", f"--memory={words}"])
    assert code == 2
    assert "is no amount of memory" in capsys.readouterr().err


CALIBRATED: dict[str, Any] = {
    "heads": GQA(3, polish=0),
    "a total spread over latents": MLA(cache=0.25, polish=0),
    "windows by head": BlockSparse(density=0.5),
    "heads, tuned": GQA(3, polish=0),
}


@pytest.mark.parametrize("name", CALIBRATED)
def test_calibrated_layer_by_layer(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Weights read when a node asks for them, activations in files: the same bytes as with the model in memory."""
    kind, target = "llama", CALIBRATED[name]
    monkeypatch.setattr(rewrite.calibration, "TOKENS_A_BATCH", 512)  # two batches
    given: dict[str, Any] = {"calibration": MODELS / "calibration.txt", "samples": 16, "length": 64, "check": False}
    given |= {"only": "model.layers.[12].*", "tune": 3 if "tuned" in name else 0}
    convert(MODELS / kind, target, out=tmp_path / "held", **given)
    monkeypatch.setattr(passes.stream, "too_large", lambda *_: True)
    spilled = Disk.spilled
    waiting: list[int] = []

    def noted(self: Disk, value: Any) -> Any:
        made = spilled(self, value)
        waiting.append(made.nbytes if made is not value else 0)
        return made

    monkeypatch.setattr(Disk, "spilled", noted)
    made = convert(MODELS / kind, target, out=tmp_path / "streamed", memory=ROOM, **given)
    assert max(waiting) > 0
    assert made.rewrite_report.worst(1)
    assert different(tmp_path / "held", tmp_path / "streamed") == []


def test_tuning_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A site that has learnt is not asked to learn again, and what follows learns what it would have learnt."""
    given: dict[str, Any] = {"calibration": MODELS / "calibration.txt", "samples": 16, "length": 64, "check": False}
    given |= {"only": "model.layers.[012].*", "tune": 3}
    target = GQA(3, polish=0)
    convert(MODELS / "llama", target, out=tmp_path / "held", **given)
    monkeypatch.setattr(passes.stream, "too_large", lambda *_: True)
    tuned: list[str] = []

    def tune(made: Any, site: Any, *rest: Any) -> Any:
        if len(tuned) == 2:
            tuned.append("stopped")
            raise KeyboardInterrupt
        tuned.append(site.name)
        return passes.tune.tune(made, site, *rest)

    monkeypatch.setattr(passes.convert, "tune", tune)
    with pytest.raises(KeyboardInterrupt):
        convert(MODELS / "llama", target, out=tmp_path / "out", memory=ROOM, **given)
    convert(MODELS / "llama", target, out=tmp_path / "out", memory=ROOM, **given)
    assert tuned == [f"model.layers.{i}.self_attn" for i in (0, 1)] + ["stopped", "model.layers.2.self_attn"]
    assert different(tmp_path / "held", tmp_path / "out") == []
