"""Example inputs: what a forward signature and a config ask for, by the arguments' names, never by the model's type."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from rewrite.errors import BadUsage

BATCH, TOKENS, TARGETS = 2, 10, 7
"""Sizes of the examples: all differ, and none is 1, so that no two axes are taken for one and none is fixed."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """One way to call the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    moving: tuple[tuple[int, ...], ...]
    """Per leaf of (args, kwargs) the axes that are batch or sequence: these should be dynamic."""
    loose: bool
    """The other axes may be dynamic too where the model lets them: nothing is known about them."""


class Sizes:
    """Settings looked up by name in a config, then in the configs nested in it, those named first before others."""

    def __init__(self, config: Any) -> None:
        self.configs = list(_nested(config))

    def get(self, *names: str, inside: str = "") -> Any:
        """The first setting of these names that is set; configs whose place holds `inside` come first."""
        ordered = sorted(self.configs, key=lambda c: 0 if inside and inside in c[0] else 1)
        for name in names:
            for _, config in ordered:
                value = getattr(config, name, None)
                if value is not None:
                    return value
        return None

    @property
    def special(self) -> set[int]:
        """Token ids with a meaning of their own (padding, image placeholders): examples keep off them."""
        found = (getattr(c, n) for _, c in self.configs for n in vars(c) if "token" in n)
        return {v for v in found if isinstance(v, int)}


def caching(model: nn.Module) -> list[Any]:
    """The configs, of a model and nested in it, that ask for a cache: an output that is no tensor."""
    config = getattr(model, "config", None)
    found = Sizes(config).configs if hasattr(config, "to_dict") else []
    return [c for _, c in found if getattr(c, "use_cache", None) is True]


def _nested(config: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    yield place, config
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and not name.startswith("_"):
            yield from _nested(value, f"{place}.{name}")


def _ids(sizes: Sizes, tokens: int) -> Tensor:
    vocabulary = int(sizes.get("vocab_size", inside="text") or 100)
    allowed = torch.tensor(list(islice((i for i in range(3, vocabulary) if i not in sizes.special), 4096)))
    pick = torch.randint(len(allowed), (BATCH, tokens), generator=torch.Generator().manual_seed(tokens))
    return allowed[pick]


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def _image(sizes: Sizes) -> list[Tensor]:
    channels = int(sizes.get("num_channels", "in_channels", "in_chans", inside="vision") or 3)
    size = sizes.get("image_size", "img_size", inside="vision") or 64
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    frames = sizes.get("num_frames", inside="vision")
    still = _noise(BATCH, channels, height, width)
    return [_noise(BATCH, int(frames), channels, height, width), still] if frames else [still]


def _features(sizes: Sizes) -> list[Tensor]:
    """Spectrograms: (batch, bins, frames) where the length is fixed by the config, (batch, frames, bins) otherwise."""
    bins = sizes.get("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", inside="audio")
    bins = int(bins or sizes.get("input_dim", "feature_size", "num_mel_filters", inside="audio") or 80)
    fixed = sizes.get("max_source_positions", inside="audio")
    shapes = [(BATCH, bins, 2 * int(fixed))] if fixed and sizes.get("num_mel_bins", inside="audio") else []
    return [_noise(*shape) for shape in [*shapes, (BATCH, 44, bins), (BATCH, bins, 44)]]


def _waves(sizes: Sizes) -> list[Tensor]:
    """Sound as samples, long enough for some frames after the strides; or a spectrogram of the config's own size."""
    frames, bins = sizes.get("max_length"), sizes.get("num_mel_bins")
    if isinstance(frames, int) and frames > 20 and bins:
        return [_noise(BATCH, frames, int(bins))]
    stride = 1
    for step in cast(Sequence[int], sizes.get("conv_stride", inside="audio") or (320,)):
        stride *= int(step)
    return [_noise(BATCH, 13 * stride + 80)]


def _boxes(sizes: Sizes) -> list[Tensor]:
    corner = torch.arange(BATCH * TOKENS).reshape(BATCH, TOKENS, 1) * 3
    return [torch.cat([corner, corner + 1, corner + 20, corner + 30], dim=-1)]


def _embeddings(sizes: Sizes) -> list[Tensor]:
    return [_noise(BATCH, TOKENS, int(sizes.get("hidden_size", "d_model", "n_embd", inside="text") or 64))]


def _mask(tokens: int) -> Callable[[Sizes], list[Tensor]]:
    return lambda sizes: [torch.ones(BATCH, tokens, dtype=torch.int64)]


def _series(sizes: Sizes) -> list[Tensor]:
    length = int(sizes.get("context_length", "prediction_length") or TOKENS)
    channels = sizes.get("num_input_channels", "input_size") or 1
    return [_noise(BATCH, length, int(channels)), _noise(BATCH, length)]


MAKERS: Mapping[str, tuple[Callable[[Sizes], list[Tensor]], tuple[int, ...]]] = {
    "input_ids": (lambda s: [_ids(s, TOKENS)], (0, 1)),
    "attention_mask": (_mask(TOKENS), (0, 1)),
    "decoder_input_ids": (lambda s: [_ids(s, TARGETS)], (0, 1)),
    "decoder_attention_mask": (_mask(TARGETS), (0, 1)),
    "token_type_ids": (lambda s: [torch.zeros(BATCH, TOKENS, dtype=torch.int64)], (0, 1)),
    "bbox": (_boxes, (0, 1)),
    "inputs_embeds": (_embeddings, (0, 1)),
    "inputs": (_embeddings, (0, 1)),
    "pixel_values": (_image, (0,)),
    "pixel_values_videos": (_image, (0,)),
    "input_features": (_features, (0,)),
    "input_values": (_waves, (0,)),
    "past_values": (_series, (0,)),
    "visual_feats": (lambda s: [_noise(BATCH, 6, int(s.get("visual_feat_dim") or 64))], (0, 1)),
    "visual_pos": (lambda s: [_noise(BATCH, 6, int(s.get("visual_pos_dim") or 4)).abs()], (0, 1)),
}
"""Argument name -> the tensors to try, in order, and the axes that are batch or sequence."""

STREAMS = ("input_ids", "pixel_values", "input_features", "input_values")


def propose(model: nn.Module) -> Iterator[Inputs]:
    """Ways to call a model that carries a config, the plainest first; each is one try."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        raise BadUsage(
            "inputs",
            f"{type(model).__name__} does not say what it is called with",
            "give example inputs, a tuple of positional or a dict of keyword arguments:",
            "inputs=(torch.randint(0, 1000, (2, 10)),)",
        )
    names = inspect.signature(model.forward).parameters
    sizes = Sizes(config)
    for chosen in _choices(model, names, config):
        for turn in range(max(len(MAKERS[name][0](sizes)) for name in chosen)):
            made = {name: MAKERS[name][0](sizes) for name in chosen}
            kwargs: dict[str, Any] = {name: given[min(turn, len(given) - 1)] for name, given in made.items()}
            moving = tuple(MAKERS[name][1] for name in chosen)
            cache = {"use_cache": False} if "use_cache" in names else {}
            yield Inputs((), {**kwargs, **cache}, (*moving, *([()] * len(cache))), loose=False)


def _choices(model: nn.Module, names: Mapping[str, inspect.Parameter], config: Any) -> list[list[str]]:
    """Which arguments to give: first what is asked for, then with masks, then all that can be made."""
    main = cast("str | list[str]", getattr(model, "main_input_name", "input_ids"))
    wanted = [main] if isinstance(main, str) else list(main)
    wanted += [name for name, p in names.items() if p.default is p.empty and name in MAKERS]
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        wanted.append("decoder_input_ids")
    # without a placeholder token for them, the streams of a multimodal model are given side by side
    both = [name for name in STREAMS if name in names]
    if not any("image_token" in name or "audio_token" in name for name in vars(config)):
        wanted += both
    plain = [name for name in dict.fromkeys(wanted) if name in MAKERS and (name in names or name in main)]
    masked = [*plain, *(n for n in ("attention_mask", "decoder_attention_mask") if n in names and n not in plain)]
    known = [name for name in MAKERS if name in names and name not in {"inputs_embeds", "inputs"}]
    choices = [c for c in (plain, masked, known, [n for n in plain if n in main]) if c]
    return [c for i, c in enumerate(choices) if c not in choices[:i]]


def given(model: nn.Module, inputs: Any) -> Inputs:
    """The caller's own inputs, a batch of one doubled: a size of 1 would be fixed while tracing."""
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    args: tuple[Any, ...] = () if isinstance(inputs, Mapping) else tuple(inputs)
    kwargs: dict[str, Any] = {str(k): v for k, v in inputs.items()} if isinstance(inputs, Mapping) else {}
    names = inspect.signature(model.forward).parameters
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise BadUsage(
            "inputs",
            f"{type(model).__name__} cannot be called with these inputs: {error}",
            f"its forward takes ({', '.join(names)})",
        ) from error
    if "use_cache" in names and len(args) <= list(names).index("use_cache"):
        kwargs.setdefault("use_cache", False)
    leaves, structure = tree_flatten((args, kwargs))
    tensors = [v for v in leaves if isinstance(v, Tensor) and v.dim()]
    if tensors and all(v.shape[0] == 1 for v in tensors):
        leaves = [_twice(v) for v in leaves]
        args, kwargs = tree_unflatten(leaves, structure)
    return Inputs(args, kwargs, tuple(_axes(value) for value in leaves), loose=True)


def _twice(value: Any) -> Any:
    return torch.cat([value, value]) if isinstance(value, Tensor) and value.dim() else value


def _axes(value: Any) -> tuple[int, ...]:
    """Batch and sequence of ids (b, t) and of vectors (b, t, d); of anything else only the batch."""
    if not isinstance(value, Tensor):
        return ()
    if value.dim() == 3 or (value.dim() == 2 and not value.is_floating_point()):
        return (0, 1)
    return (0,) if value.dim() else ()
