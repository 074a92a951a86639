"""The plan as a page: rows, totals, refusals; from sites made by hand."""

import json
from dataclasses import replace
from typing import Any

import pytest

from passes.plan import Plan, make_plan, nothing_applies, require_space
from rewrite.errors import OutOfSpace, Refused
from rewrite.machine import Machine
from rewrite.site import Refusal
from tests.unit.synthetic import Halve, Model, found, program, site

SITES = tuple(site(f"model.layers.{i}.self_attn") for i in range(4))
HERE = Machine(memory=21_000_000_000, disk=60_000_000_000)


class Missed:
    name = "decoder.cross.0"
    refusal = Refusal("wanted softmax, found sigmoid", "modeling_x.py:212", "7 of 9 nodes of eager attention")


def planned(*sites: Any, target: Halve | None = None, skip: tuple[str, ...] = (), refused: Any = ()) -> Plan:
    """The plan with this machine's memory and disk set to fixed figures."""
    targets = {} if target is None else {s.name: target for s in sites if s.name not in skip}
    made = make_plan(
        Model(), program(), found(*sites, refused=refused), targets,
        spelled=() if target is None else (f"halve:{target.kv_heads}",),
    )  # fmt: skip
    return replace(made, here=HERE)


def test_sites_alone(golden):
    golden(str(planned(*SITES)))


def test_with_a_target(golden):
    golden(str(planned(*SITES, target=Halve(3))))


def test_in_part(golden):
    odd = site("model.layers.4.self_attn", heads=5)
    encoder = site("encoder.self_attn", encoder=True)
    skip = ("model.layers.0.self_attn",)
    golden(str(planned(*SITES, odd, encoder, target=Halve(3), skip=skip, refused=(Missed(),))))


def test_emitted(golden):
    """What emission chose, and the site that no form computes, which goes back to what it was."""
    forms = {s.name: ("stock", "") for s in SITES[:2]} | {SITES[2].name: ("grouped", "stock: rope differs")}
    plan = planned(*SITES, target=Halve(3)).emitted(forms, {SITES[3].name: "bound: result 2 is not known"})
    assert plan.converted == 3
    assert plan.after[3] is plan.sites[3]
    assert plan.weights.before - plan.weights.after == 3 * 2 * (2 * 3 * 32 * 192)
    assert plan.cache.after == (3 * 192 + 384) * 2 * 32768
    golden(str(plan))


def test_measured():
    rows = planned(*SITES, target=Halve(3), skip=(SITES[3].name,)).measured({SITES[0].name: 0.1, SITES[3].name: 0.2})
    assert [r.error for r in rows] == [0.1, None, None, None]


def test_the_setting_that_loses_nothing_is_a_conversion():
    plan = planned(*SITES, target=Halve(6))
    assert nothing_applies(plan) is None
    assert plan.converted == 4
    assert plan.weights.before == plan.weights.after


def test_barred():
    targets = {s.name: Halve(3) for s in SITES}
    plan = make_plan(Model(), program(), found(*SITES), targets, barred={SITES[0].name: "its tensor is shared"})
    assert [r.converted for r in plan.rows] == [False, True, True, True]
    assert plan.rows[0].note == "refused: its tensor is shared"


def test_json(golden):
    plan = planned(*SITES, target=Halve(3), refused=(Missed(),))
    read = json.loads(plan.json())
    assert read["converted"] == 4
    assert [s["name"] for s in read["sites"]] == [s.name for s in plan.sites]
    rows = read.pop("sites")
    golden(json.dumps(read | {"sites": rows[:1]}, indent=1, ensure_ascii=False))


def test_an_encoder_holds_no_cache():
    plan = planned(site("encoder.0", encoder=True), site("decoder.0"), target=Halve(3))
    assert [r.cache_before for r in plan.rows] == [0, 384]
    assert plan.cache.before == 384 * 2 * 32768


def test_cache_and_weights_are_counted_once():
    """Layers that share their tensors hold a cache each and their weights once."""
    shared = replace(site("a.0"), name="a.1")
    plan = planned(site("a.0"), shared, target=Halve(3))
    assert plan.cache.after == 2 * 192 * 2 * 32768
    assert plan.weights.before - plan.weights.after == 2 * (2 * 3 * 32 * 192)


def test_refused_is_name_and_reason():
    plan = planned(*SITES, refused=(Missed(),))
    assert plan.refused == (("decoder.cross.0", "wanted softmax, found sigmoid"),)
    assert "7 of 9 nodes" in plan.explain("decoder.cross.0")
    assert "modeling_x.py:212" in plan.explain("decoder.cross.0")


def test_no_attention(golden):
    with pytest.raises(Refused) as caught:
        planned(refused=(Missed(),))
    assert caught.value.code == 3
    golden(str(caught.value))


def test_nothing_near_attention(golden):
    with pytest.raises(Refused) as caught:
        planned()
    golden(str(caught.value))


def test_nothing_applies(golden):
    error = nothing_applies(planned(*SITES, target=Halve(4)))
    assert error is not None
    assert error.code == 3
    golden(str(error))


def test_something_applies():
    assert nothing_applies(planned(*SITES, target=Halve(3))) is None
    assert nothing_applies(planned(*SITES)) is None


@pytest.mark.parametrize("here", [Machine(1_000_000, 60_000_000_000)])
def test_too_little_memory(here: Machine, tmp_path, golden):
    with pytest.raises(OutOfSpace) as caught:
        require_space(replace(planned(*SITES, target=Halve(3)), here=here), tmp_path / "out")
    assert caught.value.code == 4
    golden(str(caught.value))
