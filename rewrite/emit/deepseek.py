"""Latent attentions as a stock checkpoint: an all-dense DeepSeek-V3 model, which transformers, vLLM and SGLang load.

Only a model whose rest is that of the class can become one. Which these are is not listed: the class is built from the
source's own sizes, its tensors outside attention are compared by name and shape, and both are run with a probing
attention in place of their own (deepseek_probe.py).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from rewrite.emit.deepseek_probe import probe
from rewrite.emit.deepseek_refuse import NEEDED, layer_of, owned, refuse_model, refuse_sites
from rewrite.emit.deepseek_rows import ENGINE_ROPE, EPS, Sizes, rows, spectrum, turning
from rewrite.emit.stock import built, shapes_of
from rewrite.emit.twin import in_float, share_alike, table, twin
from rewrite.emit.validate import LIMIT, relative
from rewrite.heads import Latents, Rewritten
from rewrite.layout import expanded
from rewrite.site import Site
from rewrite.threads import one_thread

Changes = Mapping[str, tuple[Site, Rewritten]]
TAKEN = (
    "initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "attention_dropout"
)  # fmt: skip
"""What else is carried over where the source has it."""
ENGINE_RANKS = (256, 512)
ENGINE_HEAD = 128


@dataclass(frozen=True, eq=False)
class Stock:
    """The stock model, in float32, and what was padded, scaled or untied to make it one."""

    model: PreTrainedModel
    notes: tuple[str, ...]

    @property
    def held(self) -> int:
        """Numbers cached per token and layer."""
        config: Any = self.model.config
        return config.kv_lora_rank + config.qk_rope_head_dim


@dataclass(frozen=True, eq=False)
class Layout:
    """What the stock model will be, from shapes and frequencies: its sizes, its config and what is to be said of it."""

    sizes: Sizes
    config: DeepseekV3Config
    notes: tuple[str, ...]

    @property
    def held(self) -> int:
        """Numbers cached per token and layer."""
        return self.sizes.rank + self.sizes.rope


def deepseek(model: PreTrainedModel, changes: Changes, *, engines: bool = False) -> Stock | str:
    """A `DeepseekV3ForCausalLM` that computes the rewritten model, or the sentence why there is none.

    `changes` is site name -> (source site, rewritten with latents), for every attention of the model. `model` is not
    written to. With `engines` the widths are those that vLLM and SGLang take: rotated 64, rank 256 or 512, heads 128.
    Without, they are as small as the class allows, and a repeated or irregular frequency is told by "longrope" factors,
    which transformers alone reads. That the rewritten attentions themselves are computed is for the caller to check.
    """
    planned = layout(model, changes, engines=engines)
    if isinstance(planned, str):
        return planned
    made = filled(model, changes, planned.sizes)
    return made if isinstance(made, str) else Stock(made, planned.notes)


def layout(model: PreTrainedModel, changes: Changes, *, engines: bool) -> Layout | str:
    """The stock model's layout, or why there is none. No weight of `model` is read, so that it may lie on meta; the
    rewritten sites are looked at one by one."""
    reason = refuse_model(model) or refuse_sites(model, changes)
    if reason is not None:
        return reason
    found = [_Widths.of(new.latents) for _, new in changes.values() if new.latents is not None]
    sizes = _sizes(model, found, engines)
    if isinstance(sizes, str):
        return sizes
    config = _config(model, changes, sizes)
    problem = _misfit(model, config, changes)
    return problem if problem is not None else Layout(sizes, config, _notes(model, found, sizes))


def filled(model: PreTrainedModel, changes: Changes, sizes: Sizes, *, share: bool = False) -> PreTrainedModel | str:
    """The stock model in float32, or the sentence on what its layers compute otherwise than those of `model`; with
    `share` the tensors that are alike are the original's own, for reading only."""
    source = in_float(model)
    layers = {layer_of(site) or "": (site, new) for site, new in changes.values()}
    made = _filled(source, _config(model, changes, sizes), layers, sizes)
    if share:
        share_alike(made, source)
    problem = _differs(source, made, layers, sizes)
    return made if problem is None else problem


@dataclass(frozen=True)
class _Widths:
    """What the sizes of the class come from: one site's widths and the frequencies of its rotated channels."""

    rank: int
    nope: int
    value: int
    turns: tuple[float, ...]

    @staticmethod
    def of(latents: Latents) -> _Widths:
        turns = latents.frequencies[turning(latents)].abs().tolist()
        return _Widths(latents.rank, latents.read.shape[2], latents.up_v.shape[1], tuple(turns))


def _sizes(model: PreTrainedModel, found: Sequence[_Widths], engines: bool) -> Sizes | str:
    config: Any = model.config
    if any(f == 0 for widths in found for f in widths.turns):
        return "a rotated channel turns by 0 per token; keep it in the latent"
    turns = spectrum([w.turns for w in found], engines=engines)
    if isinstance(turns, str):
        return turns
    rank, nope, value = max(1, *(w.rank for w in found)), max(w.nope for w in found), max(w.value for w in found)
    if engines:
        if rank > ENGINE_RANKS[-1]:
            return f"its latents have rank {rank}; vLLM and SGLang take at most {ENGINE_RANKS[-1]}: convert to that"
        if config.hidden_act != "silu":
            return f"its MLPs use {config.hidden_act}; vLLM takes silu alone in this class"
        rank = next(r for r in ENGINE_RANKS if r >= rank)
        nope, value = max(nope, ENGINE_HEAD), max(value, ENGINE_HEAD)
    near = math.isclose(config.rms_norm_eps, EPS, rel_tol=1e-6)
    return Sizes(rank, nope, value, turns, 1.0 if near else math.sqrt(EPS / config.rms_norm_eps))


def _config(model: PreTrainedModel, changes: Changes, sizes: Sizes) -> DeepseekV3Config:
    config: Any = model.config
    heads = next(site.heads for site, _ in changes.values())
    taken = {n: getattr(config, n) for n in (*NEEDED, *TAKEN) if hasattr(config, n)}
    fields: dict[str, Any] = {
        **taken,
        "rms_norm_eps": EPS,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": None,
        "kv_lora_rank": sizes.rank,
        "qk_nope_head_dim": sizes.nope,
        "qk_rope_head_dim": sizes.rope,
        "v_head_dim": sizes.value,
        "rope_parameters": sizes.spectrum.parameters(config.max_position_embeddings),
        "rope_interleave": True,
        "attention_bias": False,
        "tie_word_embeddings": False,
        # no layer is sparse; loaders read these numbers all the same
        "first_k_dense_replace": config.num_hidden_layers,
        "moe_intermediate_size": config.intermediate_size,
        "moe_layer_freq": 1,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0,
        **dict.fromkeys(("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group"), 1),
    }
    made = DeepseekV3Config(**fields)
    made.dtype = config.dtype
    return made


def _attention(name: str) -> bool:
    return ".self_attn." in name


def _misfit(model: PreTrainedModel, config: DeepseekV3Config, changes: Changes) -> str | None:
    """Why the rest of the model is not that of the class, by names and shapes."""
    try:
        theirs = {n: s for n, s in shapes_of(built(DeepseekV3ForCausalLM, config)).items() if not _attention(n)}
    # whatever the class objects to, it cannot be had
    except Exception as error:
        return f"DeepseekV3ForCausalLM cannot be built: {type(error).__name__}: {str(error).splitlines()[0]}"
    gone = {t for site, _ in changes.values() for t in owned(site)}
    ours = {n: s for n, s in shapes_of(model).items() if n not in gone}
    for name in sorted(ours.keys() - theirs.keys()):
        return f"{name} has no place in DeepseekV3ForCausalLM"
    for name, shape in theirs.items():
        if ours.get(name) != shape:
            have = f"is {list(ours[name])}" if name in ours else "is missing"
            return f"{name} {have}; DeepseekV3ForCausalLM wants {list(shape)}"
    return None


def _filled(source: PreTrainedModel, config: DeepseekV3Config, layers: Changes, sizes: Sizes) -> PreTrainedModel:
    """The class with its tensors; what writes to the residual stream is scaled with it."""
    with no_init_weights(), source.device:
        made: PreTrainedModel = DeepseekV3ForCausalLM(config)
    values = table(source)
    edits = _edits(layers, sizes)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            value = edits[name] if name in edits else values[name].detach()
            parameter.copy_(value * sizes.residual if scaled(name) else value)
    made.train(source.training)
    made.generation_config = copy.deepcopy(source.generation_config)
    return made


def scaled(name: str) -> bool:
    """Whether a tensor of the class is what it was in the source, times the factor of the residual stream."""
    return name == "model.embed_tokens.weight" or name.endswith("mlp.down_proj.weight")


def _edits(layers: Changes, sizes: Sizes) -> dict[str, Tensor]:
    return {name: value for layer in layers.values() for name, value in attention(*layer, sizes).items()}


def attention(site: Site, new: Rewritten, sizes: Sizes) -> dict[str, Tensor]:
    """The tensors of one layer's attention by their names in the class, in float64."""
    if new.latents is None:
        return {}
    with one_thread():
        found = rows(site, new.weights, new.latents, sizes)
    return {f"{layer_of(site)}.self_attn.{name}": value for name, value in found.items()}


def _differs(source: PreTrainedModel, made: PreTrainedModel, layers: Changes, sizes: Sizes) -> str | None:
    """Run both with one attention that both can hold: it shows what names and shapes do not."""
    tensors = table(source)
    probed = {layer: probe(site, new, sizes) for layer, (site, new) in layers.items()}
    edits: dict[str, Tensor] = {}
    for layer, (site, _) in layers.items():
        edits |= expanded(site, probed[layer].weights, site.kv_of, tensors.__getitem__)
    vocabulary = tensors["model.embed_tokens.weight"].shape[0]
    ids = (torch.arange(24) * 7919 % vocabulary).view(2, 12).to(source.device)
    with torch.no_grad():
        expected = twin(source, edits, share=True).eval()(input_ids=ids).logits
        edits.clear()  # as large as the attention: room for the other model's
        changed = {layer: (site, probed[layer]) for layer, (site, _) in layers.items()}
        found = twin(made, _edits(changed, sizes), share=True).eval()(input_ids=ids).logits
    error = relative(expected.cpu(), found.cpu())
    if error <= LIMIT:
        return None
    return (
        f"with one attention in place of its own, DeepseekV3ForCausalLM gives other logits than the model: they differ "
        f"by {error:.0e} (limit {LIMIT:.0e}), so its layers compute something else"
    )


def _notes(model: PreTrainedModel, found: Sequence[_Widths], sizes: Sizes) -> tuple[str, ...]:
    config: Any = model.config
    notes = [
        "the latent norm is made linear by rows scaled by about 2^-36: store bfloat16 or float32, never float16, and "
        "do not train this folder"
    ]
    widths = (
        ("rank", sizes.rank, [x.rank for x in found]),
        ("rotated channels", sizes.rope, [2 * len(x.turns) for x in found]),
        ("key width", sizes.nope, [x.nope for x in found]),
        ("value width", sizes.value, [x.value for x in found]),
    )
    for name, width, used in widths:
        if min(used) < width:
            span = f"{min(used)}" if min(used) == max(used) else f"{min(used)} to {max(used)}"
            notes.append(f"{name} {span} padded with zeros to {width}")
    if sizes.residual != 1.0:
        notes.append(f"residual stream scaled by {sizes.residual:.4g}: rms_norm_eps {config.rms_norm_eps:g} is {EPS:g}")
    if config.tie_word_embeddings:
        notes.append("the output head, tied in the source, is a tensor of its own")
    if sizes.spectrum.exact:
        notes.append("rotations told by longrope factors: transformers reads this folder, vLLM and SGLang do not")
    elif (sizes.rank, sizes.rope) not in {(r, ENGINE_ROPE) for r in ENGINE_RANKS}:
        have = f"{sizes.rank} + {sizes.rope}"
        notes.append(f"{have} cached numbers: vLLM and SGLang take 256 or 512 + {ENGINE_ROPE} (engines=True)")
    return tuple(notes)
