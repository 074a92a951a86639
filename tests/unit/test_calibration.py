"""What may be given as calibration, and what the batches hold."""

from pathlib import Path

import pytest
import torch

from rewrite.calibration import Windows, batches
from rewrite.errors import BadUsage

EXAMPLE = {"input_ids": torch.zeros(2, 10, dtype=torch.long), "attention_mask": torch.ones(2, 10)}


class Letters:
    """A tokenizer of single letters."""

    eos_token_id = 0

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def test_texts_are_joined_by_the_end_token_and_cut_into_windows():
    (batch,) = batches(["abc", "de", "fgh"], EXAMPLE, Windows(length=4), Letters())
    assert batch["input_ids"].tolist() == [[97, 98, 99, 0], [100, 101, 0, 102]]
    assert batch["attention_mask"].tolist() == [[1] * 4] * 2


def test_tokens_need_no_tokenizer_and_samples_bound_the_windows():
    made = batches(torch.arange(100), EXAMPLE, Windows(length=10, samples=3, rows=2), None)
    assert [b["input_ids"][:, 0].tolist() for b in made] == [[0, 10], [20]]


def test_a_path_is_read(tmp_path: Path):
    (tmp_path / "t.txt").write_text("abcdefgh")
    (batch,) = batches(tmp_path / "t.txt", EXAMPLE, Windows(length=4), Letters())
    assert batch["input_ids"].shape == (2, 4)


def test_dictionaries_and_iterables_are_taken_as_they_are():
    given = ({"pixel_values": torch.full((1, 3), float(i)), "note": "x"} for i in range(2))
    assert [list(b) for b in batches(given, EXAMPLE, Windows(4), None)] == [["pixel_values"]] * 2


@pytest.mark.parametrize(
    ("given", "example", "says"),
    [
        ("text", EXAMPLE, "no tokenizer beside it"),
        ([], EXAMPLE, "the calibration is empty"),
        (torch.arange(3), EXAMPLE, "3 tokens do not fill one window of 10"),
        (torch.arange(20), {"pixel_values": torch.zeros(1)}, "cannot be made of text"),
        (7, EXAMPLE, "int is no calibration"),
        ([object()], EXAMPLE, "neither text nor tokens"),
    ],
)
def test_what_cannot_be_used_is_refused(given: object, example: dict, says: str):
    with pytest.raises(BadUsage, match=says):
        batches(given, example, Windows(length=10), None)
