"""Check: what a conversion cost, measured on the two models side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rewrite.report import Checked, Pair

_Call = tuple[tuple[Any, ...], dict[str, Any]]
RESAMPLES = 2000
NEW_TOKENS = 4
"""Tokens that are generated to look at the cache."""


@dataclass(frozen=True)
class _Sums:
    """Sums over the predicted tokens of one window."""

    tokens: int
    loss_before: float
    loss_after: float
    same: int
    divergence: float
    largest: float
    """Largest output of the original."""
    apart: float
    """Largest difference of the outputs."""


@dataclass(frozen=True)
class _Seen:
    """What both models gave: sums over windows of text, or (difference, size) of outputs on example inputs."""

    sums: Sequence[_Sums]
    differences: Sequence[tuple[float, float]]
    broken: str

    @property
    def tokens(self) -> int:
        """Predicted tokens that count: none where an output is broken."""
        return 0 if self.broken else sum(s.tokens for s in self.sums)


def check(
    original: nn.Module,
    converted: nn.Module,
    *,
    windows: Sequence[Tensor] = (),
    example: tuple[Any, ...] | Mapping[str, Any] | None = None,
    max_loss: float | None = None,
    lossless: Callable[[], nn.Module] | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Checked:
    """Compare two models.

    `windows`, (rows, tokens) each, serve where the model predicts the next token; else `example` inputs are compared
    output by output. `lossless` makes the conversion at the setting that loses nothing.
    """
    if not windows and example is None:
        raise ValueError("check wants windows of tokens or example inputs")
    with torch.no_grad(), evaluating(original, converted):
        predicts = bool(windows) and predicts_next(original, windows[0][:1])
        calls = [((w,), {}) for w in windows] if predicts else [_call(example, windows)]
        seen = _side_by_side(original, converted, calls, predicts, progress or (lambda _name, _done, _total: None))
        exact = None if lossless is None or seen.broken else _lossless(original, lossless(), calls[0])
        cache = None if seen.broken else _caches(original, converted, windows[0][:1] if predicts else None)
    return _checked(
        (original, converted),
        seen,
        cache,
        exact,
        max_loss,
        tuple(_unmeasured(original, bool(windows), predicts, cache is None and not seen.broken)),
        seed,
    )


def _unmeasured(original: nn.Module, text: bool, predicts: bool, no_cache: bool) -> Iterator[str]:
    """Why a figure is missing."""
    if text and not predicts:
        yield "perplexity not measured: the model does not predict the next token of a text"
    if not text and _generates(original):
        yield "perplexity not measured: no text was given; it is measured with --text FILE, or text=..."
    if no_cache and not _generates(original):
        yield "kv cache not measured: the model does not generate text"


def _side_by_side(
    original: nn.Module, converted: nn.Module, calls: Sequence[_Call], predicts: bool, tell: Callable[..., None]
) -> _Seen:
    """Both models on every call, up to the first output that is none."""
    sums: list[_Sums] = []
    differences: list[tuple[float, float]] = []
    broken = ""
    for at, (args, kwargs) in enumerate(calls):
        tell("check", at, len(calls))
        a, b = original(*args, **kwargs), converted(*args, **kwargs)
        broken = breakage(a, b)
        if broken:
            break
        if predicts:
            sums += list(_window_sums(logits(a), logits(b), args[0]))
        else:
            differences.append(_apart(a, b))
    tell("check", len(calls), len(calls))
    return _Seen(sums, differences, broken)


def _call(example: tuple[Any, ...] | Mapping[str, Any] | None, windows: Sequence[Tensor]) -> _Call:
    if example is None:
        return (windows[0],), {}
    return ((), dict(example)) if isinstance(example, Mapping) else (example, {})


class evaluating:
    """Both models in eval mode, and back to what they were afterwards."""

    def __init__(self, *models: nn.Module) -> None:
        self.was = [(m, m.training) for model in models for m in model.modules()]

    def __enter__(self) -> None:
        for module, _ in self.was:
            module.training = False

    def __exit__(self, *_: object) -> None:
        for module, training in self.was:
            module.training = training


def logits(output: Any) -> Tensor:
    """The main output of a model: the tensor itself, `.logits`, or the first of several."""
    if isinstance(output, Tensor):
        return output
    named = getattr(output, "logits", None)
    return named if isinstance(named, Tensor) else next(x for x in tree_leaves(output) if isinstance(x, Tensor))


def predicts_next(model: nn.Module, ids: Tensor) -> bool:
    """Whether outputs are scores over the next token: (rows, tokens, vocabulary), and blind to what comes later."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) or ids.shape[1] < 2:
        return False
    scores = logits(model(ids))
    if scores.dim() != 3 or scores.shape[:2] != ids.shape or scores.shape[2] <= int(ids.max()):
        return False
    other = ids.clone()
    # token 0 is in every vocabulary; the width of the scores may exceed that of the embedding
    other[:, -1] = torch.where(ids[:, -1] == 0, ids.max().clamp(min=1), 0)
    # the same products of the same shapes: what does not depend on the last token keeps its bits, or nearly so
    early, moved = scores[:, :-1].float(), logits(model(other))[:, :-1].float()
    return bool((early - moved).abs().max() <= 1e-5 * early.abs().max())


def breakage(before: Any, after: Any) -> str:
    """The sentence why the converted model's output is no output, or nothing."""
    olds = [x for x in tree_leaves(before) if isinstance(x, Tensor) and x.is_floating_point()]
    news = [x for x in tree_leaves(after) if isinstance(x, Tensor) and x.is_floating_point()]
    if olds and tuple(olds[0].shape) != (tuple(news[0].shape) if news else ()):
        return f"the output has shape {tuple(news[0].shape) if news else ()}, the original's {tuple(olds[0].shape)}"
    a, b = logits(before), logits(after)
    if b.is_floating_point() and not bool(torch.isfinite(b).all()) and bool(torch.isfinite(a).all()):
        return f"the output holds {int((~torch.isfinite(b)).sum())} values that are no numbers"
    return ""


def _window_sums(a: Tensor, b: Tensor, ids: Tensor) -> Iterator[_Sums]:
    """One window after the other; float32 with float64 sums."""
    for row in range(len(ids)):
        old, new = (x[row].float().log_softmax(-1) for x in (a, b))
        target = ids[row, 1:, None]
        share = old[:-1].exp()
        yield _Sums(
            tokens=len(target),
            loss_before=-float(old[:-1].gather(1, target).double().sum()),
            loss_after=-float(new[:-1].gather(1, target).double().sum()),
            same=int((old[:-1].argmax(-1) == new[:-1].argmax(-1)).sum()),
            divergence=float((share * (old[:-1] - new[:-1])).double().sum()),
            largest=float(a[row].abs().max()),
            apart=float((a[row].float() - b[row].float()).abs().max()),
        )


def _apart(before: Any, after: Any) -> tuple[float, float]:
    a, b = logits(before).double(), logits(after).double()
    keep = torch.isfinite(a) & torch.isfinite(b)
    return float((a - b)[keep].abs().max()), float(a[keep].abs().max())


def _relative(pairs: Sequence[tuple[float, float]]) -> float:
    largest = max((size for _, size in pairs), default=0.0)
    return max((apart for apart, _ in pairs), default=0.0) / largest if largest else 0.0


def _lossless(original: nn.Module, exact: nn.Module, call: _Call) -> float:
    args, kwargs = call
    with evaluating(exact):
        before, after = original(*args, **kwargs), exact(*args, **kwargs)
    return math.inf if breakage(before, after) else _relative([_apart(before, after)])


def lossless_limit(model: nn.Module) -> float:
    """1e-5 in float32; in a narrower type eight units of its last digit, as every weight is rounded once more."""
    widths = [torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()]
    return max(1e-5, 8 * max(widths, default=0.0))


def cache_bytes(cache: Any) -> int:
    """Bytes of all keys and values that a cache holds; an encoder-decoder cache is two of them."""
    both = [getattr(cache, n, None) for n in ("self_attention_cache", "cross_attention_cache")]
    if any(both):
        return sum(cache_bytes(part) for part in both if part is not None)
    tensors = [t for layer in cache.layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def _generates(model: nn.Module) -> bool:
    generates: Any = getattr(model, "can_generate", None)
    return callable(generates) and bool(generates())


def generated_cache(model: nn.Module, ids: Tensor) -> tuple[int, int] | None:
    """(bytes, tokens) of the cache after generating a few tokens; None where the model does not generate."""
    if not _generates(model):
        return None
    prompt = ids[:, : max(1, min(ids.shape[1], 60))]
    out: Any = model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    cache = out.past_key_values
    # the last token is chosen but never fed back, so the cache is one short of the text
    return None if cache is None else (cache_bytes(cache), prompt.shape[1] + NEW_TOKENS - 1)


def _caches(original: nn.Module, converted: nn.Module, ids: Tensor | None) -> tuple[Pair, int] | None:
    if ids is None:
        return None
    before, after = generated_cache(original, ids), generated_cache(converted, ids)
    return None if before is None or after is None else (Pair(before[0], after[0]), before[1])


def _sizes(original: nn.Module, converted: nn.Module) -> Pair:
    return Pair(*(float(sum(p.numel() for p in m.parameters())) for m in (original, converted)))


def _kind(model: nn.Module) -> str:
    return str(next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)).removeprefix(
        "torch."
    )


def interval(sums: Sequence[tuple[int, float, float]], seed: int) -> tuple[float, float] | None:
    """95 % interval of the relative rise of perplexity: windows (tokens, loss before, loss after) drawn with return.

    Pairs are kept together, so that the text's own difficulty cancels. None for fewer than four windows.
    """
    if len(sums) < 4:
        return None
    table = np.array(sums, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(sums), (RESAMPLES, len(sums)))
    tokens, rise = table[draws, 0].sum(1), (table[draws, 2] - table[draws, 1]).sum(1)
    low, high = np.quantile(np.expm1(rise / tokens), [0.025, 0.975])
    return float(low), float(high)


def _checked(
    models: tuple[nn.Module, nn.Module],
    seen: _Seen,
    cache: tuple[Pair, int] | None,
    exact: float | None,
    max_loss: float | None,
    notes: tuple[str, ...],
    seed: int,
) -> Checked:
    tokens, sums = seen.tokens, seen.sums
    before, after = (sum(s.loss_before for s in sums), sum(s.loss_after for s in sums))
    return Checked(
        tokens=tokens,
        perplexity=Pair(math.exp(before / tokens), math.exp(after / tokens)) if tokens else None,
        rise=interval([(s.tokens, s.loss_before, s.loss_after) for s in sums], seed) if tokens else None,
        same_next=sum(s.same for s in sums) / tokens if tokens else None,
        divergence=sum(s.divergence for s in sums) / tokens if tokens else None,
        difference=_relative([(s.apart, s.largest) for s in sums] or seen.differences),
        lossless=exact,
        lossless_limit=lossless_limit(models[0]),
        parameters=_sizes(*models),
        cache=cache[0] if cache else None,
        kind=_kind(models[0]),
        cache_tokens=cache[1] if cache else 0,
        max_loss=max_loss,
        broken=seen.broken,
        notes=notes,
    )
