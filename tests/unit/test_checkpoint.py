"""Checkpoint folders: what is a model, what it holds, and what is refused before anything else reads it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rewrite.checkpoint import locate, open_checkpoint, require_checkpoint, require_floats
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


def test_links_of_the_hub_cache_are_read(tmp_path: Path):
    """It keeps the bytes under blobs, and links to them from snapshots."""
    place = tmp_path / "models--x" / "snapshots" / "abc"
    place.mkdir(parents=True)
    (tmp_path / "models--x" / "blobs").mkdir()
    (place / "config.json").write_text('{"model_type": "x"}')
    save_file({"a": torch.zeros(2)}, tmp_path / "models--x" / "blobs" / "0f")
    (place / "model.safetensors").symlink_to("../../blobs/0f")
    assert require_checkpoint(place).parameters == 2


@pytest.mark.parametrize("which", ["weights", "index", "shard"])
def test_a_link_that_leads_out_is_refused(which: str, folder: Path, tmp_path: Path, golden):
    sharded(folder, SHARDS)
    name = {
        "weights": "model.safetensors", "index": "model.safetensors.index.json", "shard": str(SHARDS["b"])
    }[which]  # fmt: skip
    if which == "weights":
        save_file({"a": torch.zeros(2)}, tmp_path / "elsewhere")
    else:
        (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert refusal(folder, golden).slug == "linked-weights"


def test_an_index_that_lists_a_tensor_twice(folder: Path, golden):
    sharded(folder, SHARDS)
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"b":', '"a":'))
    assert refusal(folder, golden).slug == "safetensors"


def test_a_tensor_in_two_files(folder: Path, golden):
    sharded(folder, SHARDS)
    save_file({"a": torch.ones(2), "b": torch.ones(1)}, folder / "model-00002-of-00002.safetensors")
    assert refusal(folder, golden).slug == "safetensors"


def test_quantised_weights(folder: Path, golden):
    save_file({"a": torch.zeros(2, dtype=torch.int8)}, folder / "model.safetensors")
    with pytest.raises(Refused) as caught:
        require_floats(require_checkpoint(folder), ["a"])
    golden(str(caught.value).replace(str(folder.parent), "PLACE"))
    assert caught.value.slug == "wrong-dtype"


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
