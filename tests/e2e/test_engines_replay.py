"""Stock folders of latent models, read as vLLM and SGLang read them: from config.json and safetensors alone.

No engine runs here. `Engine` follows their loading rules for this class: which fields must be there, that every tensor
has its place and every place its tensor, that nothing has a bias, which eps the norms take, interleaved rotation, the
key and value halves of kv_b_proj absorbed, and a cache of rank + rotated numbers per token.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM

from passes.convert import convert_sites
from passes.find import Found, find
from passes.mla import MLA
from rewrite.capture import capture
from rewrite.emit.deepseek import Stock, deepseek
from rewrite.emit.reading import for_older_readers
from rewrite.emit.validate import cache_bytes, relative
from rewrite.program import Program
from tests.contract.by_latent import changed, cut, exact, llama, oracle

MODELS = Path(__file__).parents[2] / "examples" / "models"
IDS = (3 + torch.arange(30) * 37 % 90).view(2, 15)
EVEN = [0, 2, 4, 6]
INTEGERS = (
    "num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
    "n_group", "topk_group", "moe_intermediate_size", "moe_layer_freq", "first_k_dense_replace",
    "max_position_embeddings",
)  # fmt: skip


class Engine:
    """A folder of the class, loaded by the engines' rules, and run token by token on a latent cache."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = {n: t.float() for n, t in load_file(folder / "model.safetensors").items()}
        self.require()
        self.cache: list[Tensor] = [torch.zeros(0)] * self.config["num_hidden_layers"]

    def require(self) -> None:
        """What the loaders read or assume."""
        c = self.config
        assert c["architectures"] == ["DeepseekV3ForCausalLM"]
        assert c["model_type"] == "deepseek_v3"
        assert all(type(c[name]) is int for name in INTEGERS)
        assert c["dtype"] in ("float32", "bfloat16")
        assert c["kv_lora_rank"] + c["qk_rope_head_dim"] in (320, 576), "the cache's widths"
        assert c["qk_rope_head_dim"] == 64
        assert c["first_k_dense_replace"] == c["num_hidden_layers"], "a layer would have experts"
        assert c["num_nextn_predict_layers"] == 0
        assert c["routed_scaling_factor"] == 1.0
        assert c["q_lora_rank"] is None
        assert c["hidden_act"] == "silu"
        assert c["rope_parameters"]["rope_type"] == "default", "anything else becomes deepseek_yarn"
        assert c["rope_theta"] == c["rope_parameters"]["rope_theta"]
        assert not any(c.get(n) for n in ("index_topk", "rope_scaling", "attention_bias", "tie_word_embeddings"))
        assert c.get("is_causal", True)
        assert {n: list(t.shape) for n, t in self.weights.items()} == self.places()

    def places(self) -> dict[str, list[int]]:
        """Every parameter of the class: one more or one less fails a load."""
        c = self.config
        hidden, inner, heads, rank = (
            c[n] for n in ("hidden_size", "intermediate_size", "num_attention_heads", "kv_lora_rank")
        )
        nope, rope, value = (c[n] for n in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        layer = {
            "self_attn.q_proj": [heads * (nope + rope), hidden],
            "self_attn.kv_a_proj_with_mqa": [rank + rope, hidden],
            "self_attn.kv_a_layernorm": [rank],
            "self_attn.kv_b_proj": [heads * (nope + value), rank],
            "self_attn.o_proj": [hidden, heads * value],
            "mlp.gate_proj": [inner, hidden],
            "mlp.up_proj": [inner, hidden],
            "mlp.down_proj": [hidden, inner],
            "input_layernorm": [hidden],
            "post_attention_layernorm": [hidden],
        }
        table = {
            "model.embed_tokens": [c["vocab_size"], hidden], "lm_head": [c["vocab_size"], hidden],
            "model.norm": [hidden],
        }  # fmt: skip
        table |= {f"model.layers.{i}.{n}": s for i in range(c["num_hidden_layers"]) for n, s in layer.items()}
        return {f"{n}.weight": s for n, s in table.items()}

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits (b, t, vocabulary), one decode step after the other."""
        self.cache = [torch.zeros(len(ids), 0, 0)] * len(self.cache)
        return torch.stack([self.step(ids[:, t], t) for t in range(ids.shape[1])], 1)

    def step(self, ids: Tensor, at: int) -> Tensor:
        x = self.weights["model.embed_tokens.weight"][ids]
        for i in range(len(self.cache)):
            x = x + self.attention(i, self.norm(x, f"model.layers.{i}.input_layernorm"), at)
            y = self.norm(x, f"model.layers.{i}.post_attention_layernorm")
            gate, up = (self.linear(y, f"model.layers.{i}.mlp.{n}_proj") for n in ("gate", "up"))
            x = x + self.linear(silu(gate) * up, f"model.layers.{i}.mlp.down_proj")
        return self.linear(self.norm(x, "model.norm"), "lm_head")

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T

    def norm(self, x: Tensor, name: str) -> Tensor:
        """The latent's norm too takes the config's eps here."""
        return (
            x
            * (x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt()
            * self.weights[f"{name}.weight"]
        )

    def turned(self, x: Tensor, at: int) -> Tensor:
        """Pairs (2i, 2i + 1), by theta^(-2i / width)."""
        width = self.config["qk_rope_head_dim"]
        theta = self.config["rope_parameters"]["rope_theta"]
        angle = at / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
        a, b, cos, sin = x[..., 0::2], x[..., 1::2], angle.cos(), angle.sin()
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

    def attention(self, i: int, x: Tensor, at: int) -> Tensor:
        c, name = self.config, f"model.layers.{i}.self_attn"
        rank, nope, rope, value = (c[n] for n in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        q = self.linear(x, f"{name}.q_proj").unflatten(-1, (-1, nope + rope))
        down = self.linear(x, f"{name}.kv_a_proj_with_mqa")
        new = torch.cat([self.norm(down[:, :rank], f"{name}.kv_a_layernorm"), self.turned(down[:, rank:], at)], -1)
        old = self.cache[i].reshape(len(x), -1, rank + rope)
        self.cache[i] = held = torch.cat([old, new[:, None]], 1)
        up = self.weights[f"{name}.kv_b_proj.weight"].unflatten(0, (-1, nope + value))
        absorbed = torch.einsum("bhn,hnr->bhr", q[..., :nope], up[:, :nope])
        query = torch.cat([absorbed, self.turned(q[..., nope:], at)], -1)
        p = (query @ held.transpose(1, 2) * (nope + rope) ** -0.5).softmax(-1)
        out = torch.einsum("bhr,hvr->bhv", p @ held[..., :rank], up[:, nope:])
        return self.linear(out.flatten(1), f"{name}.o_proj")


def written(made: Stock | str, folder: Path) -> Path:
    assert isinstance(made, Stock), made
    made.model.save_pretrained(folder)
    for_older_readers(folder)
    return folder


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize(("eps", "tie"), [(1e-6, False), (1e-5, True)])
def test_what_is_held_exactly_is_the_source(eps: float, tie: bool, tmp_path: Path) -> None:
    model, sites = llama(1, rms_norm_eps=eps, tie_word_embeddings=tie)
    given = changed(model, {s.name: (s, exact(s)) for s in sites})
    engine = Engine(written(deepseek(model, given, engines=True), tmp_path))
    assert relative(logits(model), engine(IDS)) < 1e-5
    assert [tuple(held.shape) for held in engine.cache] == [(2, 15, 320)] * 2


def test_heads_of_sixty_four_need_no_rotated_padding(tmp_path: Path) -> None:
    model, sites = llama(1, dim=64)
    made = deepseek(model, changed(model, {s.name: (s, exact(s)) for s in sites}), engines=True)
    assert isinstance(made, Stock)
    assert not any("rotated channels" in note for note in made.notes)
    engine = Engine(written(made, tmp_path))
    assert engine.config["rope_theta"] == 10_000.0
    assert relative(logits(model), engine(IDS)) < 1e-5


def test_lossy_latents(tmp_path: Path) -> None:
    model, sites = llama(2, rms_norm_eps=1e-5, tie_word_embeddings=True)
    given = cut(model, sites, [24, 9], [EVEN, [7, 1]])
    engine = Engine(written(deepseek(model, given, engines=True), tmp_path))
    with oracle(model, given) as reference:
        assert relative(logits(reference), engine(IDS)) < 1e-5


def test_a_folder_in_bfloat16(tmp_path: Path) -> None:
    """What bfloat16 rounds is rounded when it is stored; the scaled rows do not vanish."""
    model, sites = llama(1)
    made = deepseek(model, changed(model, {s.name: (s, exact(s)) for s in sites}), engines=True)
    assert isinstance(made, Stock)
    made.model.bfloat16()
    engine = Engine(written(made, tmp_path))
    assert engine.config["dtype"] == "bfloat16"
    read = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert relative(logits(read), engine(IDS)) < 1e-5
    assert relative(logits(model), engine(IDS)) < 0.1


def spoilt(folder: Path, name: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: value}))


def test_the_replay_is_not_blind(tmp_path: Path) -> None:
    model, sites = llama(1)
    given = changed(model, {s.name: (s, exact(s)) for s in sites})
    folder = written(deepseek(model, given, engines=True), tmp_path)
    spoilt(folder, "rms_norm_eps", 1e-5)
    assert relative(logits(model), Engine(folder)(IDS)) > 0.01
    spoilt(folder, "rms_norm_eps", 1e-6)
    spoilt(folder, "n_routed_experts", None)
    with pytest.raises(AssertionError):
        Engine(folder)
    spoilt(folder, "n_routed_experts", 1)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(768)}, folder / "model.safetensors")
    with pytest.raises(AssertionError):
        Engine(folder)


def test_a_default_folder_that_has_the_sizes_is_one_for_engines(tmp_path: Path) -> None:
    model, sites = llama(2, dim=64, heads=4, hidden_size=256)
    given = cut(model, sites, [256, 256], [range(32), range(32)])
    engine = Engine(written(deepseek(model, given), tmp_path))
    assert (engine.config["qk_nope_head_dim"], engine.config["v_head_dim"]) == (64, 64)
    with oracle(model, given) as reference:
        assert relative(logits(reference), engine(IDS)) < 1e-5


@cache
def shipped() -> tuple[Any, Program, Found]:
    """A trained model and its sites as the finder gives them."""
    model = AutoModelForCausalLM.from_pretrained(MODELS / "llama", dtype=torch.float32)
    program = capture(model, None, dynamic=False)
    return model, program, find(program.static)


def test_the_shipped_model(tmp_path: Path) -> None:
    model, _, found = shipped()
    sites = found.sites
    given = cut(model, sites, [128] * 4, [range(0, 16, 2)] * 4)
    made = deepseek(model, given, engines=True)
    assert isinstance(made, Stock)
    ids = (torch.arange(40) * 17 % 4096).view(2, 20)
    engine = Engine(written(made, tmp_path))
    with oracle(model, given) as reference:
        expected = logits(reference, ids)
    assert relative(expected, logits(made.model, ids)) < 1e-5
    assert relative(expected, engine(ids)) < 1e-5
    unlike = {n: (replace(s, scale=(1.01 * s.scale[0],)), new) for n, (s, new) in given.items()}
    assert "other logits" in str(deepseek(model, unlike, engines=True))


@pytest.mark.parametrize("target", [MLA(rank=96, rope_dim=16), MLA(cache=1.0)], ids=["lossy", "exact"])
def test_what_the_target_makes_is_a_stock_folder(target: MLA, tmp_path: Path) -> None:
    """Its channels may share a frequency, which transformers is told by factors."""
    model, program, found = shipped()
    made = convert_sites(program, found, {s.name: target for s in found.sites}, None, lambda *_: None)
    given = {name: (change.site, change.rewritten) for name, change in made.items()}
    folder = written(deepseek(model, given), tmp_path)
    read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = (torch.arange(40) * 17 % 4096).view(2, 20)
    with oracle(model, given) as reference:
        assert relative(logits(reference, ids), logits(read, ids)) < 1e-5
    held = read.generate(ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True).past_key_values
    numbers = read.config.kv_lora_rank + read.config.qk_rope_head_dim
    assert cache_bytes(held) == 2 * 21 * 4 * numbers * 4
