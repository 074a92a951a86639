"""Bad input from the command line: each gives its error and exit code, and harms neither input nor earlier output."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

import rewrite.api as api
from rewrite.cli import main
from rewrite.errors import Refused
from tests.dying import die


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,;:!?-012"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter."""
    made = Tokenizer(WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="?"))
    made.pre_tokenizer = Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a Llama with two layers, and beside it a text that the model itself wrote: on average no
    other model finds it as likely, so that every change shows as a loss."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(LETTERS), hidden_size=48, intermediate_size=32, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    place = tmp_path_factory.mktemp("saved")
    model.save_pretrained(place / "model")
    tokenizer().save_pretrained(place / "model")
    start = torch.randint(0, len(LETTERS), (8, 1))
    with torch.no_grad():
        rows = model.float().generate(
            start, attention_mask=torch.ones_like(start), max_length=64, do_sample=True, top_k=0
        )
    (place / "text.txt").write_text("".join(LETTERS[t] for row in rows.tolist() for t in row))
    return place


@pytest.fixture
def place(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with model and text; commands are typed in it, so that errors hold no strange paths."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def once(*words: str) -> Ran:
        code = main(words)
        seen = capsys.readouterr()
        return Ran(code, seen.out, seen.err)

    return once


def contents(folder: Path) -> dict[str, str]:
    """Every file under a folder with the hash of its bytes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


CONVERT = ("convert", "model", "out", "--to", "gqa:3")
UNCHECKED = (*CONVERT, "--no-check")


def damage_truncated(place: Path) -> None:
    path = place / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def damage_header(place: Path) -> None:
    path = place / "model" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[8:12] = b"!!!!"
    path.write_bytes(raw)


def damage_length(place: Path) -> None:
    path = place / "model" / "model.safetensors"
    path.write_bytes((1 << 40).to_bytes(8, "little") + path.read_bytes()[8:])


def pickled(place: Path) -> None:
    (place / "model" / "model.safetensors").unlink()
    torch.save({"w": torch.zeros(1)}, place / "model" / "pytorch_model.bin")


def no_weights(place: Path) -> None:
    (place / "model" / "model.safetensors").unlink()


def no_config(place: Path) -> None:
    for path in (place / "model").iterdir():
        if path.suffix != ".safetensors":
            path.unlink()


def bad_config(place: Path) -> None:
    (place / "model" / "config.json").write_text('{"model_type": "llama"')


def unknown_type(place: Path) -> None:
    (place / "model" / "config.json").write_text('{"model_type": "no such model"}')


def outside_index(place: Path) -> None:
    (place / "model" / "model.safetensors").rename(place / "model.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": {"lm_head.weight": "../model.safetensors"}}
    (place / "model" / "model.safetensors.index.json").write_text(json.dumps(index))


def existing(place: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / "thesis.txt").write_text("mine")


def as_it_is(place: Path) -> None:
    pass


CASES: dict[str, tuple[Callable[[Path], None], tuple[str, ...], int]] = {
    "not-a-model": (no_config, CONVERT, 3),
    "no-such-folder": (as_it_is, ("convert", "modell", "out", "--to", "gqa:3"), 3),
    "bad-config": (bad_config, CONVERT, 3),
    "truncated": (damage_truncated, CONVERT, 3),
    "corrupt-header": (damage_header, CONVERT, 3),
    "corrupt-length": (damage_length, CONVERT, 3),
    "corrupt-plan": (damage_truncated, ("plan", "model"), 3),
    "index-outside": (outside_index, CONVERT, 3),
    "pickled": (pickled, CONVERT, 3),
    "no-weights": (no_weights, CONVERT, 3),
    "heads-do-not-divide": (as_it_is, ("convert", "model", "out", "--to", "gqa:4"), 3),
    "heads-do-not-divide-plan": (as_it_is, ("plan", "model", "--to", "gqa:4"), 3),
    "unknown-skip": (as_it_is, (*CONVERT, "--skip", "model.layer.0.*"), 2),
    "unknown-only": (as_it_is, (*CONVERT, "--only", "decoder.*"), 2),
    "unknown-why": (as_it_is, ("plan", "model", "--why", "model.layers.0.attn"), 2),
    "unknown-target": (as_it_is, ("convert", "model", "out", "--to", "gqq:3"), 2),
    "existing-output": (existing, CONVERT, 3),
    "output-is-input": (as_it_is, ("convert", "model", "model", "--to", "gqa:3"), 3),
    "output-in-input": (as_it_is, ("convert", "model", "model/out", "--to", "gqa:3"), 3),
    "no-parent": (as_it_is, ("convert", "model", "no/out", "--to", "gqa:3"), 3),
    "no-text": (as_it_is, (*CONVERT, "--calibrate", "wiki.txt"), 2),
}


@pytest.mark.parametrize("kind", CASES)
def test_bad_input(kind: str, place: Path, run: Run, golden):
    prepare, words, code = CASES[kind]
    prepare(place)
    before = contents(place)
    ran = run(*words)
    assert ran.code == code
    assert ran.out == ""
    assert contents(place) == before
    golden("\n".join(line for line in ran.err.replace(str(place), "PLACE").splitlines() if not line.startswith("[")))


def test_unknown_type(place: Path, run: Run):
    """The sentence is transformers' own; the slug and the code are ours."""
    unknown_type(place)
    ran = run("plan", "model")
    assert ran.code in (2, 3)
    assert ran.err.startswith("error[not-a-model]")


def test_a_folder_that_cannot_be_written(place: Path, run: Run):
    ran = run("convert", "model", "/proc/reattn-out", "--to", "gqa:3")
    assert ran.code == 3
    assert ran.err.startswith("error[output-unwritable] cannot write /proc/reattn-out")


def test_a_config_alone_can_be_planned(place: Path, run: Run):
    no_weights(place)
    ran = run("plan", "model", "--to", "gqa:3")
    assert ran.code == 0
    assert "model.layers.{0..1}.self_attn" in ran.out
    assert run("plan", "model/config.json").code == 0


def test_errors_as_json(place: Path, run: Run):
    ran = run("convert", "model", "out", "--to", "gqa:4", "--json")
    assert ran.code == 3
    told = json.loads(ran.out)
    assert (told["exit"], told["error"]["slug"]) == (3, "refused")


class NoAttention(PreTrainedModel):
    """A model of transformers without attention: tokens are mixed by a gate of sigmoids."""

    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(16, 8)
        self.gate = nn.Linear(8, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        return (self.gate(x) @ x.transpose(-1, -2)).sigmoid() @ x


def test_no_attention(golden):
    with pytest.raises(Refused) as caught:
        api.plan(NoAttention(PretrainedConfig()), inputs=(torch.randint(0, 16, (2, 5)),))
    assert (caught.value.slug, caught.value.code) == ("no-attention", 3)
    # how many nodes a graph has is torch's affair
    golden(re.sub(r"\d+ nodes", "N nodes", str(caught.value)))


@pytest.fixture(scope="module")
def undisturbed(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the command leaves when nothing happens to it."""
    there = tmp_path_factory.mktemp("undisturbed")
    shutil.copytree(saved, there, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(there)
        assert main(UNCHECKED) == 0
    return contents(there / "out")


@pytest.mark.parametrize(
    ("module", "function", "renamed"),
    [("rewrite.save", "write_card", False), ("rewrite.folder", "sync", False), ("rewrite.folder", "_remove", True)],
    ids=["half-written", "not-synced", "after-the-rename"],
)
def test_killed_in_the_middle(
    module: str, function: str, renamed: bool, place: Path, run: Run, undisturbed: dict[str, str]
):
    """kill -9, and then the same command again."""
    before = contents(place / "model")
    die(UNCHECKED, module, function, 0, place)
    assert contents(place / "model") == before
    assert (place / "out").exists() == renamed
    if not renamed:
        assert run(*UNCHECKED).code == 0
    assert contents(place / "out") == undisturbed
    assert contents(place / "model") == before
    if renamed:
        assert run(*UNCHECKED).code == 3
        assert contents(place / "out") == undisturbed
    else:
        assert sorted(p.name for p in place.iterdir()) == ["model", "out", "text.txt"]


def test_failed_check_leaves_no_folder_with_the_name(place: Path, run: Run):
    before = contents(place / "model")
    ran = run("convert", "model", "out", "--to", "gqa:1", "--text", "text.txt", "--max-loss", "0.1%")
    assert ran.code == 1, ran.err
    assert "FAILED: perplexity rose" in ran.out
    assert not (place / "out").exists()
    assert "FAILED" in (place / "out.failed" / "report.html").read_text()
    assert contents(place / "model") == before


def test_check_of_a_folder(place: Path, run: Run):
    assert run(*CONVERT, "--calibrate", "text.txt").code == 0
    ran = run("check", "out", "--against", "model", "--text", "text.txt")
    assert ran.code == 0, ran.err
    assert "perplexity" in ran.out
    assert run("check", "out", "--against", "model", "--text", "text.txt", "--max-loss", "0").code == 1
    told = run("check", "out", "--against", "model", "--text", "text.txt", "--json")
    assert json.loads(told.out)["cache"]["after"] * 2 == json.loads(told.out)["cache"]["before"]
