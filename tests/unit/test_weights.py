"""Safetensors files: what is written reads back, also by the library; what is damaged is refused with numbers."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rewrite.errors import Refused
from rewrite.weights import BYTES, read_header, read_tensor, spec, split, write

KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float64)


def tensors() -> dict[str, torch.Tensor]:
    made = {f"t.{i}": torch.arange(6 + i).reshape(1, -1).to(kind) for i, kind in enumerate(KINDS)}
    return made | {"../../scalar": torch.tensor(3.5), "none": torch.empty(0, 4)}


def raw(path: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def test_what_is_written_reads_back_and_the_library_agrees(tmp_path: Path):
    state = tensors()
    path = tmp_path / "model.safetensors"
    write(path, [spec(n, t) for n, t in state.items()], state.__getitem__)
    header, theirs = read_header(path), load_file(path)
    assert set(header.entries) == set(theirs) == set(state)
    for name, value in state.items():
        assert torch.equal(read_tensor(header, name), value)
        assert torch.equal(theirs[name], value)
        assert theirs[name].dtype == value.dtype


def test_a_file_of_the_library_reads(tmp_path: Path):
    save_file(tensors(), tmp_path / "x.safetensors", {"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert header.metadata == {"format": "pt"}
    assert all(torch.equal(read_tensor(header, n), t) for n, t in tensors().items())


def test_bytes_depend_on_values_alone(tmp_path: Path):
    state = tensors()
    names = list(state)
    first = write(tmp_path / "a", [spec(n, state[n]) for n in names], state.__getitem__)
    second = write(tmp_path / "b", [spec(n, state[n]) for n in reversed(names)], state.__getitem__)
    assert first == second
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_tensor_that_is_not_what_was_announced_stops_the_writing(tmp_path: Path):
    with pytest.raises(ValueError, match="was announced as"):
        write(tmp_path / "x", [spec("a", torch.zeros(2))], lambda _: torch.zeros(3))


DAMAGED = {
    "too-short": b"\x00\x00",
    "header-too-large": (200_000_000).to_bytes(8, "little"),
    "header-truncated": (100).to_bytes(8, "little") + b'{"a"',
    "not-json": b'{"a": ',
    "not-utf8": b'{"\xff": 1}',
    "not-an-object": [1],
    "twice": b'{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}, "a": {}}',
    "metadata-not-text": {"__metadata__": {"format": 1}},
    "metadata-list": {"__metadata__": []},
    "no-offsets": {"a": {"dtype": "F32", "shape": [1]}},
    "entry-no-object": {"a": 3},
    "negative-shape": {"a": entry(0, 4, [-1])},
    "bool-shape": {"a": entry(0, 4, [True])},
    "unknown-type": {"a": entry(0, 4, dtype="F31")},
    "wrong-count": {"a": entry(0, 4, [3])},
    "backwards": {"a": entry(4, 0, [1])},
    "overlap": {"a": entry(0, 8), "b": entry(4, 12)},
    "hole": {"a": entry(0, 4), "b": entry(8, 16)},
    "starts-late": {"a": entry(4, 16)},
    "truncated": {"a": entry(0, 4000)},
    "trailing": {"a": entry(0, 12)},
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_refused(kind: str, tmp_path: Path, golden):
    damage = DAMAGED[kind]
    path = tmp_path / "model.safetensors"
    if kind in ("too-short", "header-too-large", "header-truncated"):
        path.write_bytes(damage)
    else:
        raw(path, damage, bytes(16))
    with pytest.raises(Refused) as caught:
        read_header(path)
    assert caught.value.slug == "safetensors"
    golden(str(caught.value).replace(str(tmp_path), "FOLDER"))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_cut_and_no_flipped_length_passes(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory):
    """Whatever is cut off or put behind, the header no longer agrees with the file."""
    path = tmp_path_factory.mktemp("cut") / "x.safetensors"
    save_file({"a": torch.zeros(3, 5), "b": torch.ones(7)}, path)
    whole = path.read_bytes()
    length = data.draw(st.integers(0, len(whole) + 40).filter(lambda n: n != len(whole)))
    path.write_bytes((whole + bytes(40))[:length])
    with pytest.raises(Refused):
        read_header(path)


@given(sizes=st.lists(st.integers(0, 100), max_size=30), limit=st.integers(1, 150))
def test_split_keeps_order_and_limit(sizes: list[int], limit: int):
    named = [(str(i), n) for i, n in enumerate(sizes)]
    shards = split(named, limit)
    assert [name for shard in shards for name in shard] == [name for name, _ in named]
    held = dict(named)
    assert all(len(shard) <= 1 or sum(held[n] for n in shard) <= limit for shard in shards)


def test_every_type_has_a_torch_type():
    assert all(spec("x", torch.empty(1, dtype=k)).dtype in BYTES for k in KINDS)
