"""Whole models side by side: padded, with and without cache, sdpa and eager, one training step."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache, PreTrainedModel
from transformers.utils import logging

Inputs = Mapping[str, Any]
LIMIT = 1e-5
"""Largest difference of logits relative to their largest value, float32."""
GRADIENT_LIMIT = 1e-3
STEPS = 4


def differs(reference: PreTrainedModel, made: PreTrainedModel, inputs: Inputs, *, training: bool = True) -> str | None:
    """The first mode in which `made` is not `reference`, as a sentence; None where they agree in all.

    `training` False leaves the training step out, where the original does not repeat its own (see `unsteady`).
    """
    names = _common(reference, made)
    ran: set[str] = set()
    for kernel in kernels(reference):
        with _kernel(reference, kernel), _kernel(made, kernel) as also:
            if not also:
                return f"the {kernel} kernel cannot be chosen any more"
            modes: dict[str, Mode] = {"padded": _forward, "cached": _cached}
            modes |= {"training": partial(_training, names)} if training else {}
            for name, mode in modes.items():
                problem = _one_mode(mode, reference, made, inputs, f"{name} {kernel}")
                if problem is not None and problem:
                    return problem
                ran |= {name} if problem is None else set()
    needed = {"padded", "cached"} if reference.can_generate() else {"padded"}
    if needed - ran:
        return f"the original itself cannot be run {' and '.join(sorted(needed - ran))} on the example"
    return None


def unsteady(model: PreTrainedModel, inputs: Inputs) -> str | None:
    """Why training steps of this model cannot be compared: two of its own, under one seed, differ. None where they
    agree, or where it runs none."""
    for kernel in kernels(model):
        with _kernel(model, kernel):
            try:
                first, second = (_seeded(partial(_training, []), model, inputs) for _ in range(2))
            # what the original cannot run is not compared anyway
            except Exception:
                continue
        problem = _compare(first, second, f"training {kernel}")
        if problem is not None:
            return f"training steps are not compared: the original's own differ under one seed ({problem})"
    return None


def kernel_of(model: PreTrainedModel) -> str:
    """The attention kernel that the model would use now."""
    config: Any = model.config
    return str(config._attn_implementation)


@contextmanager
def _kernel(model: PreTrainedModel, kernel: str) -> Generator[bool]:
    """The model with another attention kernel for a while; whether it takes it."""
    before = kernel_of(model)
    if kernel == before:
        yield True
        return
    loud = logging.get_verbosity()
    logging.set_verbosity_error()  # a model that cannot change its kernel says so at length
    try:
        model.set_attn_implementation(kernel)
    except (ValueError, ImportError):
        yield False
        return
    finally:
        logging.set_verbosity(loud)
    try:
        yield kernel_of(model) == kernel
    finally:
        model.set_attn_implementation(before)


def kernels(model: PreTrainedModel) -> tuple[str, ...]:
    """The attention kernels in which emissions are compared: the model's own, sdpa and eager where it takes them."""
    names = dict.fromkeys((kernel_of(model), "sdpa", "eager"))
    taken: list[str] = []
    for name in names:
        with _kernel(model, name) as known:
            taken += [name] if known else []
    return tuple(taken)


Mode = Callable[[PreTrainedModel, Inputs], list[tuple[Tensor, float]]]


def _common(reference: PreTrainedModel, made: PreTrainedModel) -> list[str]:
    """A few parameters of both, to compare gradients of; those that were given fewer rows have others."""
    old = dict(reference.named_parameters())
    new = dict(made.named_parameters())
    names = [n for n, p in new.items() if p.dim() == 1 and p.requires_grad and n in old and torch.equal(p, old[n])]
    return names[:: max(1, len(names) // 8)]


def _one_mode(mode: Mode, reference: PreTrainedModel, made: PreTrainedModel, inputs: Inputs, name: str) -> str | None:
    """What is wrong; None where nothing is; "" where the original does not run."""
    try:
        expected = _seeded(mode, reference, inputs)
    # a mode that the original itself cannot run says nothing about the emission
    except Exception:
        return ""
    try:
        found = _seeded(mode, made, inputs)
    # whatever it is, the emission is refused with it
    except Exception as error:
        line = str(error).strip().split("\n")[0][:160]
        return f"the {name} run fails: {type(error).__name__}: {line}"
    return _compare(expected, found, name)


def _seeded(mode: Mode, model: PreTrainedModel, inputs: Inputs) -> list[tuple[Tensor, float]]:
    """Run a mode with every generator that models draw from started anew: masks over the input are drawn from numpy
    by some. The caller's generators go on where they were."""
    cards = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    before = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(cards):
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            return mode(model, inputs)
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def _compare(expected: list[tuple[Tensor, float]], found: list[tuple[Tensor, float]], name: str) -> str | None:
    if len(expected) != len(found):
        return f"the {name} run gives {len(found)} results instead of {len(expected)}"
    for (a, limit), (b, _) in zip(expected, found, strict=True):
        if a.shape != b.shape:
            return f"the {name} run gives shape {tuple(b.shape)} instead of {tuple(a.shape)}"
        error = relative(a, b)
        if not error <= limit:
            return f"logits differ by {error:.0e} in the {name} run (limit {limit:.0e})"
    return None


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value of `a`; nan against nan is no difference."""
    same = torch.isnan(a) & torch.isnan(b)
    a, b = a.detach().masked_fill(same, 0.0).double(), b.detach().masked_fill(same, 0.0).double()
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) if a.numel() else 0.0


def _kept(value: Tensor, inputs: Inputs) -> Tensor:
    """Without the padded places: a row without a key is anything, and kernels disagree about it."""
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = inputs.get(name)
        if isinstance(mask, Tensor) and mask.dim() == 2 and value.shape[:2] == mask.shape:
            return value[mask.bool()]
    return value


def _values(output: Any, inputs: Inputs) -> list[Tensor]:
    """The output's own tensors: logits or hidden states."""
    items = output.values() if isinstance(output, Mapping) else output
    tensors = [x for x in items if isinstance(x, Tensor) and x.is_floating_point() and x.dim() >= 2]
    return [_kept(x, inputs) for x in tensors]


def _uncached(model: PreTrainedModel, inputs: Inputs) -> Any:
    try:
        return model(**inputs, use_cache=False)
    except TypeError:
        return model(**inputs)


def _forward(model: PreTrainedModel, inputs: Inputs) -> list[tuple[Tensor, float]]:
    with torch.no_grad():
        return [(x, LIMIT) for x in _values(_uncached(model, inputs), inputs)]


def _cached(model: PreTrainedModel, inputs: Inputs) -> list[tuple[Tensor, float]]:
    """Logits of a few greedy steps; the same tokens are fed to both, or a tie would be called an error."""
    if not model.can_generate():
        return []
    with torch.no_grad():
        out = greedy(model, inputs, STEPS)
    return [(x, LIMIT) for x in out.logits]


def greedy(model: PreTrainedModel, inputs: Inputs, steps: int) -> Any:
    """`generate` without sampling, with its logits and its cache."""
    kwargs = {n: v for n, v in inputs.items() if n not in ("labels", "use_cache")}
    settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, "use_cache": True, "output_logits": True}
    settings |= {"max_new_tokens": steps, "min_new_tokens": steps, "return_dict_in_generate": True}
    for token in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        if getattr(model.generation_config, token, None) is None:
            settings[token] = 0
    generate: Any = model.generate
    return generate(**kwargs, **settings)


def _training(names: list[str], model: PreTrainedModel, inputs: Inputs) -> list[tuple[Tensor, float]]:
    """Logits in train mode, and gradients of the parameters named; running sums are put back, for copies share them."""
    was, held = model.training, {n: b.clone() for n, b in model.named_buffers()}
    model.train()
    try:
        values = _values(_uncached(model, inputs), inputs)
        loss = torch.stack([v.float().square().mean() for v in values]).sum()
        own = dict(model.named_parameters())
        leaves = [own[n] for n in names]
        gradients: Any = torch.autograd.grad(loss, leaves, allow_unused=True) if leaves else ()
    finally:
        model.train(was)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in held and not torch.equal(buffer, held[name]):
                    buffer.copy_(held[name])
    out = [(v.detach(), LIMIT) for v in values]
    # together: what is zero but for rounding (the gradient of a k bias) has no relative error of its own
    flat = [g.reshape(-1) for g in gradients if g is not None]
    return [*out, (torch.cat(flat), GRADIENT_LIMIT)] if flat else out


def layers_of(cache: Any) -> list[Any]:
    """The layers of a cache, self attention first."""
    if isinstance(cache, EncoderDecoderCache):
        return [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    return list(cache.layers) if isinstance(cache, Cache) else []


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache really holds."""
    tensors = [t for layer in layers_of(cache) for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def differs_in_logits(reference: PreTrainedModel, made: PreTrainedModel, inputs: Inputs) -> str | None:
    """Whether two models of different classes say the same in one padded forward without a cache."""
    return _compare(_forward(reference, inputs), _forward(made, inputs), "padded")


def _layer(cache: Any, half: str, number: int) -> Any:
    """A layer of a cache; `half` is "self" or "cross" where the cache is a pair."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.cross_attention_cache if half == "cross" else cache.self_attention_cache
    return cache.layers[number]


def latents_held(model: PreTrainedModel, inputs: Inputs, expected: Mapping[tuple[str, int], int]) -> str | None:
    """Whether each cache layer, (half, number) -> width, holds one vector of that width a token after `generate`."""
    with torch.no_grad():
        cache = greedy(model, inputs, 2).past_key_values
    for (half, number), width in expected.items():
        layer = _layer(cache, half, number)
        if not layer.is_initialized:
            continue
        found = layer.keys.shape[1] * layer.keys.shape[3] + layer.values.shape[1] * layer.values.shape[3]
        if found != width:
            return f"cache layer {number} holds {found} numbers a token instead of {width}"
    return None


def inconsistent(model: PreTrainedModel, inputs: Inputs) -> str | None:
    """Whether the model's greedy steps, read from its cache, say what one forward over the same tokens says."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or model.config.is_encoder_decoder or "attention_mask" not in inputs:
        return None
    with torch.no_grad():
        out = greedy(model, inputs, STEPS)
        ones = torch.ones(len(ids), STEPS, dtype=inputs["attention_mask"].dtype)
        whole = {"input_ids": out.sequences, "attention_mask": torch.cat([inputs["attention_mask"], ones], 1)}
        try:
            logits = model(**{**inputs, **whole}, use_cache=False).logits[:, ids.shape[1] - 1 : -1]
        # a model that cannot take its own text in one piece has nothing to compare with
        except Exception:
            return None
    if logits.shape[1] != STEPS:
        return None
    error = max(relative(a, b) for a, b in zip(out.logits, logits.unbind(1), strict=True))
    return None if error <= LIMIT else f"with its cache it differs by {error:.0e} (limit {LIMIT:.0e})"


def too_much_held(model: PreTrainedModel, inputs: Inputs, expected: Mapping[tuple[str, int], int]) -> str | None:
    """Whether each cache layer, (half, number) -> heads, holds as many heads as it should after `generate`."""
    if not expected or not model.can_generate():
        return None
    with torch.no_grad():
        cache = greedy(model, inputs, 2).past_key_values
    halves: dict[str, Any] = {"": cache, "self": cache}
    if isinstance(cache, EncoderDecoderCache):
        halves = dict.fromkeys(halves, cache.self_attention_cache) | {"cross": cache.cross_attention_cache}
    for (half, number), heads in expected.items():
        for layer in layers_of(halves[half])[number : number + 1]:
            for held in (getattr(layer, "keys", None), getattr(layer, "values", None)):
                if isinstance(held, Tensor) and held.dim() == 4 and held.shape[1] != heads:
                    return f"cache layer {number} holds {held.shape[1]} heads instead of {heads}"
    return None
