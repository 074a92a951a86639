"""Low-rank projections in a captured graph: any spelling gives what full width gives, from fewer numbers."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from passes.factor import LowRank
from passes.lower import lower
from passes.lower_factored import unsplittable
from passes.mla import MLA
from passes.sizes import parameters
from rewrite.layout import expanded, gather
from rewrite.site import Root, Site
from tests.sites import make_site

SPELLINGS = ("linear", "thirds", "per head", "addmm", "einsum", "convolution", "transposed")
LAYOUT = {"thirds": "thirds", "per head": "per head", "addmm": "conv1d"}


class Attention(nn.Module):
    """Four heads of four over width 12; how q, k and v are projected is what differs."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        if spelling in LAYOUT:
            self.qkv = nn.Linear(12, 48)
            if spelling == "addmm":
                self.qkv.weight = nn.Parameter(self.qkv.weight.T.clone())
        else:
            for name in "qkv":
                self.add_module(name, nn.Linear(12, 16, bias=spelling != "einsum"))
                shaped = self.get_submodule(name).weight.detach()
                shaped = {"einsum": shaped.T.reshape(12, 4, 4), "convolution": shaped[..., None]}.get(spelling, shaped)
                self.get_submodule(name).weight = nn.Parameter(shaped.clone())
        self.o = nn.Linear(16, 12)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k and v, each (b, h, t, d)."""
        b, t, _ = x.shape
        if self.spelling == "einsum":
            return tuple(torch.einsum("btc,chd->bhtd", x, m.weight) for m in (self.q, self.k, self.v))
        if self.spelling == "convolution":
            c = x.transpose(1, 2)
            parts = [nn.functional.conv1d(c, m.weight, m.bias).transpose(1, 2) for m in (self.q, self.k, self.v)]
        elif self.spelling == "transposed":
            parts = [x @ m.weight.t() + m.bias for m in (self.q, self.k, self.v)]
        elif self.spelling == "linear":
            parts = [m(x) for m in (self.q, self.k, self.v)]
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            flat = torch.addmm(bias, x.reshape(-1, 12), weight) if self.spelling == "addmm" else self.qkv(x)
            if self.spelling == "per head":
                return tuple(y.transpose(1, 2) for y in flat.view(b, t, 4, 3, 4).unbind(3))
            parts = [*flat.view(b, t, 3, 16).unbind(2)]
        return tuple(y.reshape(b, t, 4, 4).transpose(1, 2) for y in parts)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        return self.o(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).reshape(*x.shape[:2], 16))


def site_of(spelling: str) -> Site:
    """The attention as data: einsum and convolutions hold their matrices in three dimensions."""
    site, _ = make_site(LAYOUT.get(spelling, "separate"))

    def root(old: Root) -> Root:
        new = replace(old, source="x")
        return replace(new, starts=np.arange(16), stride=16, bias=None) if spelling == "einsum" else new

    parts = {n: replace(o, roots=(root(o.roots[0]),)) for n, o in (("q", site.q), ("k", site.k), ("v", site.v))}
    return replace(site, **parts)


def case(spelling: str, target: LowRank):
    torch.manual_seed(0)
    module, site = Attention(spelling), site_of(spelling)
    tensors = dict(module.named_parameters()).__getitem__
    new = target.rewrite(site, gather(site, tensors), None)
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(module, (torch.randn(2, 7, 12),), dynamic_shapes=(dynamic,), strict=False)
    wide = copy.deepcopy(module)
    for name, value in expanded(site, new.weights, site.kv_of, tensors).items():
        wide.get_parameter(name).data = value
    return module, wide, site, new, program.run_decompositions({}), tensors


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_graph_gives_what_the_full_width_gives(spelling: str) -> None:
    module, wide, site, new, program, tensors = case(spelling, LowRank(MLA(rank=4)))
    before = {n: p.clone() for n, p in module.named_parameters()}
    assert unsplittable(program, {"attn": (site, new)}, tensors) == {}
    graph = lower(program, {"attn": (site, new)}, tensors)
    for shape in ((2, 7, 12), (3, 19, 12)):
        x = torch.randn(shape)
        assert torch.allclose(graph(x), wide(x), atol=1e-6)
        assert (graph(x) - module(x)).abs().max() > 1e-3, "nothing was compressed"
    saved = sum(p.numel() for p in module.parameters()) - sum(p.numel() for p in graph.parameters())
    assert saved == parameters(site) - parameters(new.site) > 0
    graph(torch.randn(2, 5, 12)).sum().backward()
    assert all(p.grad is not None for p in graph.parameters())
    assert all(torch.equal(before[n], p) for n, p in module.named_parameters())


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_one_latent_for_both_loses_nothing_at_full_rank(spelling: str) -> None:
    """The second projection reads the latent that the first has made: one product with `down` in the whole graph."""
    module, _, site, new, program, tensors = case(spelling, LowRank(MLA(rank=4), full=True))
    assert new.factors is not None
    assert new.factors.shared
    graph = lower(program, {"attn": (site, new)}, tensors)
    x = torch.randn(2, 9, 12)
    assert torch.allclose(graph(x), module(x), atol=1e-5)
    downs = [n for n in graph.graph.nodes if n.op == "get_attr" and "_down" in str(n.target)]
    assert len(downs) == 1


class Scaled(Attention):
    """The matrix of the keys is changed before it multiplies."""

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        q, _, v = super().project(x)
        k = nn.functional.linear(x, self.k.weight * 2, self.k.bias)
        return q, k.reshape(*x.shape[:2], 4, 4).transpose(1, 2), v


def test_what_is_no_product_is_refused() -> None:
    module, site = Scaled("linear"), site_of("linear")
    tensors = dict(module.named_parameters()).__getitem__
    program = torch.export.export(module, (torch.randn(2, 7, 12),), strict=False).run_decompositions({})
    new = LowRank(MLA(rank=4), full=True).rewrite(site, gather(site, tensors), None)
    assert "k.weight is read by" in unsplittable(program, {"attn": (site, new)}, tensors)["attn"]
