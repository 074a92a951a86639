"""A site on one line: nothing hidden but None, floats short, equal neighbours folded."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rewrite.text import fold, fold_names, lines, number, site_line
from tests.contract import lifted as z


def test_a_line_says_what_the_site_is() -> None:
    (site,) = z.lifted(z.grouped, 2).sites
    line = site_line(replace(site, name="layers.0.attn"))
    assert line == ("%layers.0.attn = attn grouped kv_heads=2  heads=4x8  scale=0.3536  mask=causal  rope=half(100)")
    assert "scale=0.35355" in site_line(site, exact=True)


def test_parts_show_only_where_they_are() -> None:
    (site,) = z.lifted(z.normed).sites
    line = site_line(site)
    assert "q_norm=rms(head, 0.001)" in line
    assert "k_gain=1+1*gain" in line
    assert "k_norm" not in site_line(replace(site, k=replace(site.k, norm=None)))
    (sunk,) = z.lifted(z.sunk).sites
    assert "sink(0+1*sinks)" in site_line(sunk)


def test_equal_neighbours_fold() -> None:
    (site,) = z.lifted(z.plain).sites
    sites = [replace(site, name=f"model.layers.{i}.attn") for i in range(4)]
    other = replace(site, name="model.layers.4.attn", scale=(0.5,))
    assert [f.name for f in fold([*sites, other])] == ["model.layers.{0..3}.attn", "model.layers.4.attn"]
    assert lines(sites)[0].startswith("%model.layers.{0..3}.attn = attn dense")


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["a.0.b"], "a.0.b"),
        (["a.0.b", "a.1.b", "a.2.b"], "a.{0..2}.b"),
        (["a.0.b", "a.2.b"], "a.{0,2}.b"),
        (["a.0.b", "a.0.c"], "a.0.b and 1 more"),
    ],
)
def test_names(names: list[str], folded: str) -> None:
    assert fold_names(names) == folded


def test_numbers() -> None:
    assert [number(x) for x in (0.08838834764, 1e4, 1e-6, 50.0)] == ["0.08839", "1e4", "1e-6", "50"]
