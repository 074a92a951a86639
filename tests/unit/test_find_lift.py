"""What the finder reads off small attentions: one test for each part of a `Site`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from passes.find import find
from rewrite.site import Bias, Output, Sink, Site, Softcap
from tests.contract import lifted as z


def one(middle: z.Middle, kv: int = z.H) -> Site:
    found = z.lifted(middle, kv)
    assert not found.refused, found.refused[0].refusal
    (site,) = found.sites
    return site


def test_rows_scale_mask_and_output() -> None:
    for middle in (z.plain, z.fused):
        site = one(middle)
        assert site.q.rows.tolist() == np.arange(z.C).reshape(z.H, z.D).tolist()
        assert site.q.roots[0].tensor == "q.weight"
        assert site.q.roots[0].bias == "q.bias"
        assert site.q.roots[0].module == "q"
        assert site.scale == (pytest.approx(z.D**-0.5, rel=1e-6),)
        assert str(site.mask) == "causal"
        assert isinstance(site.out, Output)
        assert site.out.columns.tolist() == site.q.rows.tolist()
        assert not site.cross
        assert max(error for _, error in site.proof.errors) < 1e-9


def test_rope() -> None:
    rope = one(z.rotated).q.rope
    assert rope is not None
    assert rope.style == "half"
    assert rope.base == pytest.approx(100, rel=1e-4)
    assert rope.pairs.tolist() == [[i, i + z.D // 2] for i in range(z.D // 2)]


def test_norm_gain_and_eps() -> None:
    site = one(z.normed)
    assert site.q.norm is not None
    assert (site.q.norm.kind, site.q.norm.over) == ("rms", "head")
    assert site.q.norm.eps == pytest.approx(1e-3, rel=1e-4)
    assert site.q.gain.tensor == site.k.gain.tensor == "gain"
    gain = torch.rand(z.D)
    assert np.allclose(site.q.gain.read(lambda _: gain), gain.numpy())
    assert np.allclose(site.k.gain.read(lambda _: gain), 1 + gain.numpy())


def test_repeated_heads() -> None:
    site = one(z.grouped, 2)
    assert site.kv_of == (0, 0, 1, 1)
    assert (site.kv_heads, site.k.rows.shape) == (2, (2, z.D))


def test_mods() -> None:
    assert one(z.capped).mods == (Softcap(5.0),)
    (bias,) = one(z.alibi).mods
    assert isinstance(bias, Bias)
    assert bias.origin == "constant"
    assert bias.slopes == pytest.approx((0.5, 0.25, 0.125, 0.0625))
    assert one(z.relative).mods == (Bias("parameters"),)
    (sink,) = one(z.sunk).mods
    assert isinstance(sink, Sink)
    assert sink.logits.tensor == "sinks"


def test_windows_narrow_and_wider_than_the_trace() -> None:
    assert str(one(z.windowed).mask) == "causal & window(4)"
    assert str(one(z.wide).mask) == "causal & window(500)"


class Packed(nn.Module):
    """One fused projection, q, k and v head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(z.C, 3 * z.C), nn.Linear(z.C, z.C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(z.B, z.T, z.H, 3, z.D).transpose(1, 2).unbind(3)
        return self.o((q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).flatten(2))


def test_packed_rows() -> None:
    (site,) = find(z.export(Packed(), torch.randn(z.B, z.T, z.C))).sites
    rows = np.arange(3 * z.C).reshape(z.H, 3, z.D)
    assert all(o.rows.tolist() == rows[:, i].tolist() for i, o in enumerate((site.q, site.k, site.v)))
    assert site.q.roots == site.k.roots == site.v.roots


class Layers(nn.Module):
    """Equal layers, and one that differs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([z.Attention(z.rotated), z.Attention(z.rotated), z.Attention(z.plain)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_equal_layers_share_a_proof_and_keep_their_own_names() -> None:
    found = find(z.export(Layers(), torch.randn(z.B, z.T, z.C)))
    first, second, third = found.sites
    assert first.proof == second.proof != third.proof
    assert [s.name for s in found.sites] == ["layers.0", "layers.1", "layers.2"]
    assert second.v.roots[0].tensor == "layers.1.v.weight"
    assert second.v.roots[0].source != first.v.roots[0].source
    assert isinstance(second.out, Output)
    assert second.out.root.tensor == "layers.1.o.weight"
    assert len({region.core for region in found.regions}) == 3


def test_absent_weights_give_the_same_site() -> None:
    torch.manual_seed(0)
    real = one(z.normed)
    with torch.device("meta"):
        model = z.Attention(z.normed)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):  # type: ignore[attr-defined]
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(p.shape)))
    (site,) = find(z.export(model, torch.randn(z.B, z.T, z.C))).sites
    assert (site.q.norm, site.q.gain, site.q.rope) == (real.q.norm, real.q.gain, real.q.rope)


def relu(m: z.Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.relu(q @ k.mT) @ v


def test_without_an_attention_the_nearest_miss_is_named() -> None:
    found = z.lifted(relu)
    assert not found.sites
    assert found.nearest is not None
    assert found.nearest.nearest.startswith("product, relu, product: wanted softmax, found relu at lifted.py:")


def bare(m: z.Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def test_one_key_tells_nothing() -> None:
    found = find(z.export(z.Attention(bare), torch.randn(z.B, 1, z.C)))
    assert not found.sites
    assert found.refused[0].refusal.reason.startswith("with one key a softmax gives 1")
    assert len(find(z.export(z.Attention(bare), torch.randn(z.B, 3, z.C))).sites) == 1


class Groups(nn.Module):
    """Projections that are convolutions of width one, q's in two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Conv1d(z.C, z.C, 1, groups=2), nn.Conv1d(z.C, z.C, 1), nn.Conv1d(z.C, z.C, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x.mT).unflatten(1, (z.H, z.D)).mT for f in (self.q, self.k, self.v))
        return (q @ k.mT).softmax(-1) @ v


def test_a_convolution_in_groups_is_no_projection() -> None:
    (refused,) = find(z.export(Groups(), torch.randn(z.B, z.T, z.C))).refused
    assert refused.refusal.reason == "q's projection is a convolution in 2 groups, whose rows read different channels"
