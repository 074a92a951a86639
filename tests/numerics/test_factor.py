"""Low-rank projections where nothing is cached: sizes, and what they lose."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from passes.assign import suited, uncached
from passes.convert import convert_sites, named_tensors
from passes.factor import LowRank
from passes.factor_shape import sides
from passes.find import Found, find
from passes.mla import MLA
from passes.sizes import parameters
from rewrite.api import convert
from rewrite.capture import capture
from rewrite.layout import expanded, gather
from rewrite.program import Program
from rewrite.site import Factored, Norm, Site
from tests.sites import half_rope, make_site
from tests.zoo.spellings import HalfRope, Separate, heads, merged

WIDTH = 64


def of_one_input(site: Site) -> Site:
    """Keys and values that read the same numbers."""
    return replace(
        site,
        k=replace(site.k, roots=(replace(site.k.roots[0], source="x"),)),
        v=replace(site.v, roots=(replace(site.v.roots[0], source="x"),)),
    )


class Encoder(Separate):
    """Every token reads every other."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__(bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        return self.o(merged(((2 * q) @ k.mT).softmax(-1) @ v))


class Normed(Encoder):
    """Keys and queries are normed by the model."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 2, 16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(m(x)) for m in (self.q, self.k, self.v))
        q, k = (y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.gain for y in (q, k))
        return self.o(merged((q @ k.mT / 4).softmax(-1) @ v))


def found(module: nn.Module) -> tuple[Program, Found, list[dict[str, Tensor]]]:
    """A module, and calibration whose inputs have a decaying spectrum and a mean."""
    torch.manual_seed(0)
    for p in module.parameters():
        p.data = p.data + 0.1 * torch.randn_like(p)
    size = 2.0 / (1 + torch.arange(WIDTH)) ** 0.5
    mix = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]
    rows = [((torch.randn(4, 24, WIDTH) * size) @ mix + 0.3) for _ in range(3)]
    program = capture(module.eval(), (rows[0],))
    return program, find(program.static), [{"x": x} for x in rows]


def errors(module: nn.Module, *targets: MLA) -> list[float]:
    """Of the one attention of a module, on its calibration."""
    program, sites, batches = found(module)
    out: list[float] = []
    for target in targets:
        chosen = suited({s.name: target for s in sites.sites}, uncached(program, sites))
        (change,) = convert_sites(program, sites, chosen, batches, lambda *_: None).values()
        assert change.error is not None
        out.append(change.error)
    return out


def test_sizes_of_a_usual_encoder() -> None:
    """768 by 768 twice: one latent of 511 numbers holds 511 * 3 * 768, the matrices 2 * 768 * 768."""
    site = of_one_input(make_site(heads=12, kv_heads=12, dim=64, width=768)[0])
    assert sides(site).most == 511
    target = LowRank(MLA(rank=512))
    assert "rank 512 of projections of 768 × 768 and 768 × 768 would hold 1179648 numbers" in str(target.refuse(site))
    assert "now 1179648; at most 511 saves" in str(target.refuse(site))
    assert LowRank(MLA(rank=511)).refuse(site) is None
    after = LowRank(MLA(cache=0.25)).after(site)
    assert after.form == Factored(12, (384,))
    assert parameters(site) - parameters(after) == 2 * 768 * 768 - 384 * 3 * 768


def test_two_latents_hold_no_more_than_one() -> None:
    have = sides(of_one_input(make_site(heads=4, kv_heads=2, dim=8, width=24)[0]))
    for rank in range(1, have.most + 1):
        for pair in have.pairs(rank):
            assert have.cost(pair) <= have.cost((rank,)) < have.dense
    assert (None, have.v.within(have.cost((have.most,)) - have.k.dense)) in have.pairs(have.most)


def test_inputs_of_their_own_have_latents_of_their_own() -> None:
    site, _ = make_site(heads=4, kv_heads=4, dim=4, width=12)
    apart = replace(site, v=replace(site.v, roots=(replace(site.v.roots[0], source="y"),)))
    assert not sides(apart).same
    assert "too little for two latents" in str(LowRank(MLA(rank=1)).refuse(apart))
    assert LowRank(MLA(rank=4)).after(apart).form == Factored(4, (3, 3))


def test_a_row_that_serves_twice_is_refused() -> None:
    site, _ = make_site("thirds")
    same = replace(site, v=replace(site.v, rows=site.k.rows))
    assert "keys and values read the same row of qkv.weight" in str(LowRank(MLA(rank=2)).refuse(same))


@pytest.mark.parametrize("kind", [Encoder, Normed, HalfRope])
def test_a_larger_rank_loses_less(kind: type[nn.Module]) -> None:
    lost = errors(kind(), *(MLA(rank=rank) for rank in (4, 16, 36)))
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] < 0.3 * lost[0] < 0.3


def test_calibration_loses_less_than_the_weights_alone() -> None:
    module = Encoder()
    _, sites, batches = found(module)
    (site,) = sites.sites
    alone = LowRank(MLA(rank=12, refit=False))
    tensors = named_tensors(module)
    blind = alone.rewrite(site, gather(site, tensors), None)
    edits = expanded(site, blind.weights, site.kv_of, tensors)
    x = torch.cat([b["x"] for b in batches])
    with torch.no_grad():
        y, z = module(x), torch.func.functional_call(module, edits, (x,))
    assert errors(Encoder(), MLA(rank=12, refit=False))[0] < 0.8 * float((y - z).square().sum() / y.square().sum())


def test_a_mean_costs_nothing_where_a_bias_gives_it_back() -> None:
    """Inputs on a line beside the origin: one number a token, as the biases hold where the line lies."""
    program, sites, _ = found(Encoder())
    line = torch.randn(WIDTH)
    constant = [{"x": 0.7 + torch.randn(4, 24, 1) * line} for _ in range(2)]
    targets = suited({s.name: MLA(rank=1, refit=False) for s in sites.sites}, uncached(program, sites))
    (change,) = convert_sites(program, sites, targets, constant, lambda *_: None).values()
    assert change.error is not None
    assert change.error < 1e-10


def test_few_directions_of_the_inputs_are_one_latent() -> None:
    """Inputs of eight directions: one latent of eight numbers says all, two apart of the same size do not."""
    program, sites, _ = found(Encoder())
    base = torch.randn(8, WIDTH)
    batches = [{"x": torch.randn(4, 24, 8) @ base} for _ in range(3)]
    targets = suited({s.name: MLA(rank=8, refit=False) for s in sites.sites}, uncached(program, sites))
    (change,) = convert_sites(program, sites, targets, batches, lambda *_: None).values()
    assert change.rewritten.site.form == Factored(4, (8,))
    assert change.error is not None
    assert change.error < 1e-10


def test_keep_that_saves_nothing_leaves_the_site() -> None:
    program, sites, batches = found(Encoder())
    for keep, stays in ((0.9, False), (1.0, True)):
        targets = suited({s.name: MLA(keep=keep) for s in sites.sites}, uncached(program, sites))
        (change,) = convert_sites(program, sites, targets, batches, lambda *_: None).values()
        assert (change.rewritten.site is change.site) == stays
        assert any("beyond which nothing is saved" in note for note in change.rewritten.notes) == stays


def test_a_rope_is_left_to_the_model() -> None:
    site = of_one_input(
        make_site(heads=4, kv_heads=4, dim=8, width=24, rope=half_rope(8), norm=Norm("rms", "head", 1e-6))[0]
    )
    assert LowRank(MLA(rank=6)).refuse(site) is None
    assert "rope_dim is 4, and nothing is cached" in str(LowRank(MLA(rank=6, rope_dim=4)).refuse(site))


def test_a_plain_module_by_the_front_door() -> None:
    module = Encoder()
    _, _, batches = found(module)
    made = convert(module, MLA(cache=0.2), inputs=(batches[0]["x"],), calibration=batches)
    saved = sum(p.numel() for p in module.parameters()) - sum(p.numel() for p in made.parameters())
    report = made.rewrite_report
    assert saved == sum(r.parameters_before - r.parameters_after for r in report.sites) > 0
    assert report.checked is not None
    assert "factored" in report.sites[0].after
