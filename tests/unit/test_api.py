"""The user's door: what it takes, and that a target is held to its own limit."""

from __future__ import annotations

from typing import Any

import pytest

from passes.gqa import GQA
from rewrite.api import convert, plan
from rewrite.errors import BadUsage
from rewrite.site import Site
from tests.contract.tiny import llama


@pytest.mark.parametrize("verb", [plan, convert])
def test_one_change_at_a_time(verb: Any) -> None:
    model, _ = llama()
    with pytest.raises(BadUsage, match=r"2 were asked for: gqa:2, gqa:1\n  give the last alone: gqa:1"):
        verb(model, [GQA(2), GQA(1)])


def test_a_conversion_needs_a_target() -> None:
    model, _ = llama()
    with pytest.raises(BadUsage, match="no target was given"):
        convert(model, [])
    assert not plan(model).target


class Careless(GQA):
    """Its setting that loses nothing loses a lot."""

    def lossless(self, site: Site) -> GQA:
        return GQA(site.kv_heads // 2)


def test_a_target_is_held_to_the_limit_that_it_names() -> None:
    model, _ = llama()
    checked = convert(model, [Careless(1)]).rewrite_report.checked
    assert checked.lossless > 1e-2
    assert any("error of reattn" in failure for failure in checked.failures)
