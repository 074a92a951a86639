"""Targets as text: what prints parses back, and a slip is answered with what is close."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewrite.errors import BadUsage
from rewrite.spell import parse, spell


@dataclass(frozen=True)
class Toy:
    name: ClassVar[str] = "toy"
    heads: int | tuple[int, ...]
    method: Literal["default", "mean", "aligned"] = "default"
    keep: float | None = None
    fold: bool = False

    def __post_init__(self) -> None:
        if self.heads == 0:
            raise ValueError("0 heads hold nothing")


@dataclass(frozen=True)
class Plain:
    name: ClassVar[str] = "plain"
    width: int = 4


TARGETS: tuple[type[Toy] | type[Plain], ...] = (Toy, Plain)

toys = st.builds(
    Toy,
    heads=st.one_of(st.integers(1, 99), st.lists(st.integers(1, 9), min_size=2, max_size=5).map(tuple)),
    method=st.sampled_from(["default", "mean", "aligned"]),
    keep=st.one_of(st.none(), st.floats(1e-9, 0.99999)),
    fold=st.booleans(),
)


@given(target=st.one_of(toys, st.builds(Plain, width=st.integers(-9, 9))))
def test_what_prints_parses_back(target: Toy | Plain):
    assert parse(spell(target), TARGETS) == target


@pytest.mark.parametrize(
    ("text", "target", "again"),
    [
        ("toy:8", Toy(8), "toy:8"),
        ("toy:heads=8,method=mean", Toy(8, "mean"), "toy:heads=8,method=mean"),
        ("toy:8,method=mean", Toy(8, "mean"), "toy:heads=8,method=mean"),
        (" TOY: heads=8 , fold=true", Toy(8, fold=True), "toy:heads=8,fold=true"),
        ("toy:8/4/2", Toy((8, 4, 2)), "toy:8/4/2"),
        ("plain", Plain(), "plain"),
        ("plain:", Plain(), "plain"),
    ],
)
def test_spellings(text: str, target: Toy | Plain, again: str):
    assert parse(text, TARGETS) == target
    assert spell(target) == again


SLIPS = {
    "name": "toi:8", "unknown": "xyz:8", "setting": "toy:8,metod=mean", "choice": "toy:8,method=meen",
    "number": "toy:eight", "none": "toy", "twice": "toy:8,heads=4", "bare": "toy:8,mean", "bool": "toy:8,fold=maybe",
    "float": "toy:8,keep=most", "refused": "toy:0",
}  # fmt: skip


@pytest.mark.parametrize("kind", SLIPS)
def test_slips(kind: str, golden):
    with pytest.raises(BadUsage) as caught:
        parse(SLIPS[kind], TARGETS)
    golden(str(caught.value))
