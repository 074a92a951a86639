"""What the stock class has no place for, and how it is told: frequencies, sizes, norms, the rest of the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from rewrite.emit.deepseek import Stock, deepseek
from rewrite.emit.deepseek_rows import Spectrum, spectrum
from rewrite.heads import Latents
from rewrite.mask import causal, window
from rewrite.site import Affine, Bias, Norm, Softcap
from tests.contract.by_hand import with_sink
from tests.contract.by_latent import Changes, changed, cut, llama
from tests.contract.tiny import ALL

EVEN = [0, 2, 4, 6]
BASE = 10_000.0 ** (-np.arange(64) / 64)


@pytest.mark.parametrize(
    ("wanted", "theta"),
    [(BASE[::2], 1e4), (BASE[::4], 1e4), (BASE[:64:2][:20], 1e4), (BASE[:32], 1e2), (BASE[:1], 1e4), ([], 1e4)],
)
def test_engine_frequencies(wanted: Any, theta: float) -> None:
    rounded = np.float32(wanted).astype(float).tolist()
    found = spectrum([rounded, rounded[:3]], engines=True)
    assert isinstance(found, Spectrum)
    assert (found.width, found.exact) == (64, False)
    assert found.theta == theta
    held = [found.frequencies[i] for i in found.places(rounded)]
    assert np.allclose(held, rounded, rtol=2e-7, atol=0)


def test_frequencies_off_the_grid_of_the_engines() -> None:
    bent = np.concatenate([BASE[:40:2], BASE[40::2] / 8]).tolist()
    said = spectrum([bent], engines=True)
    assert isinstance(said, str)
    assert "of 32 frequencies at most 20 are, and" in said
    assert "leave engines=False" in said
    exact = spectrum([bent], engines=False)
    assert isinstance(exact, Spectrum)
    assert exact.exact
    assert exact.width == 64
    said = spectrum([[1.0, 0.5, 0.5], [1.0]], engines=True)
    assert "2 pairs of rotated channels turn by 0.5" in str(said)
    assert isinstance(spectrum([BASE[:33].tolist()], engines=True), str), "33 pairs do not go into 32"
    assert isinstance(spectrum([[1.5, 1.0]], engines=True), str), "nothing turns faster than 1"


def altered(alter: Any) -> tuple[PreTrainedModel, Changes]:
    model, sites = llama(2)
    changes = cut(model, sites, [24, 24], [EVEN, EVEN])
    site, new = changes[sites[1].name]
    return model, changes | {site.name: alter(site, new)}


ONE = Affine(np.ones((2, 16)))
HALF = Affine(np.concatenate([np.ones((2, 8)), 2 * np.ones((2, 8))], 1))
REFUSED: dict[str, tuple[Any, str]] = {
    "no latents": (lambda s, n: (s, replace(n, latents=None)), "it caches no latent"),
    "rebuilt": (
        lambda s, n: (s, replace(n, latents=replace(n.latents, up_k=torch.zeros(2, 16, 24)))),
        "rebuilt from the latent",
    ),
    "cap": (lambda s, n: (replace(s, mods=(Softcap(50.0),)), n), "capped at 50"),
    "bias": (lambda s, n: (replace(s, mods=(Bias("input"),)), n), "a bias from input is added"),
    "sink": (lambda s, n: (with_sink(s, "x"), n), "a sink takes part"),
    "window": (lambda s, n: (replace(s, mask=causal & window(4)), n), "keys by the mask causal & window(4)"),
    "cross": (lambda s, n: (replace(s, cross=True), n), "another sequence"),
    "norm": (lambda s, n: (replace(s, k=replace(s.k, norm=Norm("rms", "head", 1e-6))), n), "its keys pass an rms norm"),
    "shift": (lambda s, n: (replace(s, q=replace(s.q, shift=ONE)), n), "a constant is added to its queries"),
    "after": (lambda s, n: (replace(s, k=replace(s.k, after=HALF)), n), "its keys are scaled by position or channel"),
    "values": (lambda s, n: (replace(s, v=replace(s.v, rope=s.k.rope)), n), "its values are rotated"),
    "roots": (lambda s, n: (replace(s, k=replace(s.k, roots=s.k.roots * 2)), n), "from 2 projections"),
    "out bias": (lambda s, n: (s, replace(n, weights=replace(n.weights, out_bias=torch.zeros(64)))), "output have a"),
    "still channel": (
        lambda s, n: (s, replace(n, latents=replace(n.latents, frequencies=n.latents.frequencies * 0))),
        "turns by 0 per token",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_class_has_no_place_for(name: str) -> None:
    alter, sentence = REFUSED[name]
    said = deepseek(*altered(alter))
    assert isinstance(said, str)
    assert sentence in said
    assert said.startswith("model.layers.1.self_attn: ") or name == "still channel"


def test_every_layer_must_be_converted() -> None:
    model, sites = llama(2)
    changes = cut(model, sites, [24, 24], [EVEN, EVEN])
    said = deepseek(model, {sites[0].name: changes[sites[0].name]})
    assert said == (
        "1 of 2 layers have no converted attention (model.layers.1); the class has latents in every layer, "
        "so convert all of them"
    )
    twice = changes | {"other": changes[sites[1].name]}
    assert "3 attentions in 2 layers" in str(deepseek(model, twice))


def test_sizes_that_engines_do_not_take() -> None:
    model, sites = llama(2)
    changes = cut(model, sites, [24, 24], [EVEN, [0, 1]])
    site, new = changes[sites[0].name]
    assert new.latents is not None
    wide: Latents = replace(
        new.latents,
        down=torch.zeros(513, 64, dtype=torch.float64),
        read=torch.zeros(4, 513, 16, dtype=torch.float64),
        up_v=torch.zeros(4, 16, 513, dtype=torch.float64),
    )
    said = deepseek(model, changes | {site.name: (site, replace(new, latents=wide))}, engines=True)
    assert "have rank 513; vLLM and SGLang take at most 512" in str(said)
    model, sites = llama(2, hidden_act="gelu")
    assert "vLLM takes silu alone" in str(deepseek(model, cut(model, sites, [9, 9], [EVEN, EVEN]), engines=True))
    assert isinstance(deepseek(model, cut(model, sites, [9, 9], [EVEN, EVEN])), Stock)


def test_float16() -> None:
    model, sites = llama(2)
    changes = cut(model, sites, [24, 24], [EVEN, EVEN])
    model.half()
    assert "float16 cannot hold" in str(deepseek(model, changes))
    model.float().config.dtype = torch.float16
    assert "load the model in bfloat16" in str(deepseek(model, changes))


def rest(kind: str, **more: Any) -> str:
    model, sites = llama(2, kind, **more)
    return str(deepseek(model, cut(model, sites, [24, 24], [EVEN, EVEN])))


def test_the_rest_of_the_model_must_be_that_of_the_class() -> None:
    """By names and shapes, and where those are alike by running both."""
    assert "mlp.down_proj.bias has no place" in rest("Llama", mlp_bias=True)
    assert "has no place in DeepseekV3ForCausalLM" in rest("Mixtral", num_local_experts=2)
    assert "its config names no rms_norm_eps" in rest("Olmo")
    assert "post_feedforward_layernorm.weight has no place" in rest("Olmo3", layer_types=["full_attention"] * 2)
    logits_differ = "gives other logits than the model: they differ by"
    assert logits_differ in rest("Gemma", hidden_act="gelu_pytorch_tanh")
    for field in ("embedding_multiplier", "logits_scaling", "residual_multiplier"):
        ones = dict.fromkeys(("embedding_multiplier", "logits_scaling", "residual_multiplier"), 1.0) | {field: 1.5}
        assert logits_differ in rest("Granite", attention_multiplier=0.25, **ones)
    model, sites = llama(2)
    changes = cut(model, sites, [24, 24], [EVEN, EVEN])
    model.config.intermediate_size = 40
    assert "gate_proj.weight is [48, 64]; DeepseekV3ForCausalLM wants [40, 64]" in str(deepseek(model, changes))
    model, sites = llama(2)
    changes = cut(model, [replace(s, scale=(0.26,)) for s in sites], [24, 24], [EVEN, EVEN])
    assert logits_differ in str(deepseek(model, changes)), "a wrong scale must show"
    twice = [replace(s, q=replace(s.q, gain=Affine(2 * s.q.gain.constant))) for s in sites]
    assert logits_differ in str(deepseek(model, cut(model, twice, [24, 24], [EVEN, EVEN]))), "so must a factor"


def test_real_spellings_that_do_not_fit() -> None:
    for name, sentence in (
        ("gpt2", "its config names no intermediate_size, rms_norm_eps, hidden_act"),
        ("bart", "its config names no"),
        ("gpt_oss", "a sink takes part"),
    ):
        model, sites = ALL[name]()
        causal_sites = [replace(s, mask=causal) for s in sites]
        latents = Latents(*(torch.zeros(1, 1, dtype=torch.float64),) * 6)
        assert sentence in str(deepseek(model, changed(model, {s.name: (s, latents) for s in causal_sites})))
    model, sites = llama(2, attention_bias=True)
    said = deepseek(model, cut(model, sites, [24, 24], [EVEN, EVEN]))
    assert "its queries, keys, values, output have a bias; engines build this class without" in str(said)
