"""Mangled headers and indexes: nothing is raised but our errors, and nothing is written but the output."""

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from rewrite.checkpoint import require_checkpoint
from rewrite.cli import main
from rewrite.errors import ReattnError

NAMES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"
ODD: list[Any] = [
    None, True, -1, 0, 1, 2**63, 10**30, 1.5, float("nan"), "", "../x", "/etc/passwd", "a\x00b", "\ud800", "F32",
    "BF16", "I4", [], [1], [-1], [[]], {}, {"a": 1}, "x" * 400 + ".safetensors", "CON.safetensors", NAMES[0], [0, 4],
    [0, 10**20],
]  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files with a few tensors, and their index."""
    folder = tmp_path_factory.mktemp("small") / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "x"}')
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(0)}, folder / NAMES[0])
    save_file({"c": torch.zeros(5, dtype=torch.bfloat16)}, folder / NAMES[1])
    index = {"metadata": {"total_size": 34}, "weight_map": {"a": NAMES[0], "b": NAMES[0], "c": NAMES[1]}}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in a JSON tree."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(p for key, v in inner for p in places(v, (*at, key)))]


def mangled(value: Any, data: st.DataObject) -> Any:
    """The tree with one value replaced, dropped, or put under another name."""
    value = json.loads(json.dumps(value))
    way = data.draw(st.sampled_from(places(value)))
    new = data.draw(st.sampled_from(ODD))
    if not way:
        return new
    part = value
    for key in way[:-1]:
        part = part[key]
    kind = data.draw(st.sampled_from(["replace", "drop", "rename"]))
    if kind == "replace" or isinstance(part, list):
        part[way[-1]] = new
    else:
        old = part.pop(way[-1])
        if kind == "rename":
            part[new if isinstance(new, str) else "other"] = old
    return value


def mangle_header(path: Path, data: st.DataObject) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.dumps(mangled(json.loads(raw[8 : 8 + length]), data)).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


def mangle_bytes(path: Path, data: st.DataObject) -> None:
    """One byte, a cut, or a stretch of noise."""
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    kind = data.draw(st.sampled_from(["byte", "cut", "noise"]))
    if kind == "byte":
        raw[at] = data.draw(st.integers(0, 255))
    elif kind == "cut":
        del raw[at:]
    else:
        raw[at:at] = random.Random(at).randbytes(9)
    path.write_bytes(raw)


def tree(place: Path) -> dict[str, str]:
    return {
        str(p.relative_to(place)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else ""
        for p in sorted(place.rglob("*"))
    }


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_reading_raises_our_errors_alone(data: st.DataObject, small: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    shutil.copytree(small, folder)
    kind = data.draw(st.sampled_from(["header", "index", "bytes", "index-bytes"]))
    if kind == "header":
        mangle_header(folder / NAMES[data.draw(st.integers(0, 1))], data)
    elif kind == "index":
        index = mangled(json.loads((folder / INDEX).read_text()), data)
        (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    else:
        mangle_bytes(folder / (INDEX if kind == "index-bytes" else NAMES[0]), data)
    before = tree(folder.parent)
    said: ReattnError | None = None
    try:
        held = require_checkpoint(folder)
        for name in held.where:
            assert sum(len(piece) for piece in held.pieces(name)) == held.tensor(name).numel()
    except ReattnError as error:
        said = error
    assert said is None or (said.lines and str(said).encode("utf-8"))
    assert tree(folder.parent) == before
    shutil.rmtree(folder.parent)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    place = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(place / "model", max_shard_size="1KB")
    return place


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_converting_writes_nothing_but_the_output(
    data: st.DataObject, tiny: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
):
    place = tmp_path_factory.mktemp("convert")
    shutil.copytree(tiny, place, dirs_exist_ok=True)
    if data.draw(st.booleans()):
        shards = sorted((place / "model").glob("*.safetensors"))
        mangle_header(data.draw(st.sampled_from(shards)), data)
    else:
        index = mangled(json.loads((place / "model" / INDEX).read_text()), data)
        (place / "model" / INDEX).write_text(json.dumps(index), encoding="utf-8")
    before = tree(place)
    words = ["convert", str(place / "model"), str(place / "out"), "--to", "gqa:1", "--memory", "8GB", "--no-check"]
    code = main(words)
    said = capsys.readouterr()
    assert code in (0, 3), said.err
    assert "error[internal]" not in said.err
    after = tree(place)
    assert {n: h for n, h in after.items() if n.split("/")[0] != "out"} == before
    assert (place / "out").exists() == (code == 0)
