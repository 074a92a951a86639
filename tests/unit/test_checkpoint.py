"""Checkpoint folders: what is a model, what it holds, and what is refused before anything else reads it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rewrite.checkpoint import locate, open_checkpoint, require_checkpoint
from rewrite.errors import Refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text('{"model_type": "x"}')
    return made


def sharded(folder: Path, weight_map: dict[str, object], metadata: object = "given") -> None:
    save_file({"a": torch.zeros(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(3, dtype=torch.bfloat16)}, folder / "model-00002-of-00002.safetensors")
    index = {"weight_map": weight_map} | ({} if metadata is None else {"metadata": {"total_size": 14}})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


SHARDS: dict[str, object] = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}


def refusal(path: Path, golden) -> Refused:
    with pytest.raises(Refused) as caught:
        require_checkpoint(path)
    golden(str(caught.value).replace(str(path.parent), "PLACE"))
    return caught.value


def test_shards_are_one_checkpoint(folder: Path):
    sharded(folder, SHARDS)
    held = require_checkpoint(folder)
    assert (held.parameters, held.bytes, held.dtypes) == (5, 14, ("F32", "BF16"))
    assert torch.equal(held.tensor("b"), torch.zeros(3, dtype=torch.bfloat16))
    with pytest.raises(KeyError):
        held.tensor("c")


def test_a_config_file_stands_alone(folder: Path):
    sharded(folder, SHARDS)
    config = (folder / "config.json").rename(folder / "tiny.json")
    assert locate(config) == config
    assert open_checkpoint(config) is None


def test_a_link_to_a_file_elsewhere_is_read(folder: Path, tmp_path: Path):
    """Download caches keep the bytes elsewhere and link to them."""
    save_file({"a": torch.zeros(2)}, tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    assert require_checkpoint(folder).parameters == 2


def test_a_config_alone_has_no_weights(folder: Path, golden):
    assert open_checkpoint(folder) is None
    assert refusal(folder, golden).slug == "no-weights"


def test_missing(tmp_path: Path, golden):
    assert refusal(tmp_path / "nowhere", golden).slug == "not-a-model"


def test_file(tmp_path: Path, golden):
    (tmp_path / "file").write_text("x")
    assert refusal(tmp_path / "file", golden).slug == "not-a-model"


def test_empty(tmp_path: Path, golden):
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty", golden).slug == "not-a-model"


def test_other_files(tmp_path: Path, golden):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "notes.txt").write_text("x")
    assert refusal(tmp_path / "x", golden).slug == "not-a-model"


@pytest.mark.parametrize("text", ['{"a": ', "[1]", "\udcff"])
def test_bad_config(text: str, folder: Path):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(Refused) as caught:
        require_checkpoint(folder)
    assert caught.value.slug == "not-a-model"


def test_pickled(folder: Path, golden):
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert refusal(folder, golden).slug == "pickled-weights"


def test_stray_file(folder: Path, golden):
    save_file({"a": torch.zeros(2)}, folder / "weights.safetensors")
    assert refusal(folder, golden).slug == "no-weights"


@pytest.mark.parametrize(
    "shard", ["../model-00001-of-00002.safetensors", "/etc/passwd", "a\\b.safetensors", "x.bin", ".safetensors", 3]
)
def test_index_leads_outside(shard: object, folder: Path):
    sharded(folder, SHARDS | {"a": shard})
    save_file({"a": torch.zeros(2)}, folder.parent / "model-00001-of-00002.safetensors")
    with pytest.raises(Refused, match="a bare name ending in"):
        require_checkpoint(folder)


def test_index_lists_what_is_not_there(folder: Path, golden):
    sharded(folder, SHARDS | {"c": "model-00003-of-00002.safetensors"})
    assert refusal(folder, golden).slug == "safetensors"


def test_index_names_a_tensor_that_no_file_holds(folder: Path, golden):
    sharded(folder, SHARDS | {"c": "model-00001-of-00002.safetensors"})
    assert refusal(folder, golden).slug == "safetensors"


def test_index_without_metadata(folder: Path, golden):
    sharded(folder, SHARDS, metadata=None)
    assert refusal(folder, golden).slug == "safetensors"


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_index_is_no_index(text: str, folder: Path):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(Refused, match="is damaged"):
        require_checkpoint(folder)


def test_one_damaged_shard_is_found(folder: Path, golden):
    sharded(folder, SHARDS)
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert refusal(folder, golden).slug == "safetensors"
