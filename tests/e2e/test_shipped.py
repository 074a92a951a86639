"""The shipped models, converted on text and written: what loads them afterwards, without this project, agrees."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rewrite import GQA, convert
from rewrite.emit.validate import cache_bytes
from tests import bare

MODELS = Path(__file__).parents[2] / "examples" / "models"
CHILD = """
import torch, transformers
folder, own = sys.argv[1], sys.argv[2] == "own"
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=own)
ids = torch.arange(40).reshape(2, 20) * 17 % 4096
settings = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, return_dict_in_generate=True, pad_token_id=0)
out = model.generate(ids, **settings)
held = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
print(type(model).__name__, model.dtype)
with torch.no_grad():
    torch.save({"logits": model(ids).logits, "tokens": out.sequences, "held": held}, sys.argv[3])
"""


def converted(kind: str, out: Path, target: GQA) -> torch.nn.Module:
    return convert(
        MODELS / kind, target, calibration=MODELS / "calibration.txt", samples=6, length=64, out=out, check=False
    )


Written = Callable[[str], tuple[torch.nn.Module, Path]]
TARGETS = {"llama": GQA(3, polish=1), "qwen3": GQA(3, polish=0), "gpt2": GQA(3, polish=0)}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """`written(kind)` converts to `TARGETS[kind]` once in this file's tests: the model, and the folder to be read."""
    top = tmp_path_factory.mktemp("written")

    @cache
    def make(kind: str) -> tuple[torch.nn.Module, Path]:
        return converted(kind, top / kind, TARGETS[kind]), top / kind

    return make


@pytest.mark.parametrize(("kind", "own"), [("llama", False), ("qwen3", False), ("gpt2", True)])
def test_a_folder_loads_where_reattn_is_not(kind: str, own: bool, written: Written, tmp_path: Path):
    made, folder = written(kind)
    done = bare.run(CHILD, str(folder), "own" if own else "stock", str(tmp_path / "result.pt"))
    assert done.returncode == 0, done.stderr
    assert "torch.bfloat16" in done.stdout
    assert ("Reattn" in done.stdout) == own
    found = torch.load(tmp_path / "result.pt")
    ids = torch.arange(40).reshape(2, 20) * 17 % 4096
    with torch.no_grad():
        assert torch.equal(made(ids).logits, found["logits"])
    source = AutoModelForCausalLM.from_pretrained(MODELS / kind)
    settings = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, return_dict_in_generate=True, pad_token_id=0)
    assert 2 * found["held"] == cache_bytes(source.generate(ids, **settings).past_key_values)


def test_equal_runs_leave_equal_bytes(written: Written, tmp_path: Path):
    converted("llama", tmp_path / "again", TARGETS["llama"])
    one, two = ({p.name: p.read_bytes() for p in f.iterdir()} for f in (written("llama")[1], tmp_path / "again"))
    assert set(one) == set(two) >= {"model.safetensors", "config.json", "reattn.toml", "report.json", "README.md"}
    assert [n for n in one if one[n] != two[n]] == []


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_all_heads_kept_is_the_model_itself(kind: str):
    source = AutoModelForCausalLM.from_pretrained(MODELS / kind, dtype=torch.float32)
    made = convert(source, GQA(6), check=False)
    ids = torch.arange(60).reshape(2, 30) * 31 % 4096
    with torch.no_grad():
        a, b = source(ids).logits, made(ids).logits
    assert float((a - b).abs().max() / a.abs().max()) <= 1e-5
    assert made.rewrite_report.converted == 4


def test_calibration_loses_less_than_weights_alone_and_pooling():
    """On the same windows, unseen by all three; a wrong moment or a wrong order of heads would turn this round."""
    source = AutoModelForCausalLM.from_pretrained(MODELS / "llama", dtype=torch.float32)
    given = {"calibration": MODELS / "calibration.txt", "samples": 64, "length": 256}
    text = (MODELS / "held_out.txt").read_text()[:12_000]
    rises = [
        convert(source, target, text=text, **more).rewrite_report.checked.loss
        for target, more in ((GQA(3, polish=0), given), (GQA(3), {}), (GQA(3, method="aligned", refit=False), given))
    ]
    assert 0 < rises[0] < rises[1] < rises[2]
