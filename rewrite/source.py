"""A model from a checkpoint folder or a config.json: parameters on meta where only the structure is wanted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewrite.checkpoint import locate, require_checkpoint, require_floats
from rewrite.errors import Refused


def build(path: str | Path, *, weights: bool = False, trust_remote_code: bool = False) -> nn.Module:
    """The model that a folder (or a config.json alone) describes, in eval mode.

    Without `weights` no parameter is allocated: they lie on meta, buffers are real (rope tables are computed by the
    model's own code and must be true). No code from the folder is run, unless it is trusted: then the modelling file
    that lies in it, with its weights.
    """
    place = locate(Path(path))
    own = _own_class(place) if trust_remote_code else None
    if own is not None:
        return _loaded(own, place.parent, trust_remote_code=True).eval()
    config = _config(place)
    kind = _class(config, place)
    model = _loaded(kind, place.parent) if weights else empty(kind, config)
    return model.eval()


def _own_class(place: Path) -> Any:
    """The Auto class that runs the modelling file beside a config; None where there is no such file."""
    import transformers

    known: dict[str, str] = json.loads(place.read_text(encoding="utf-8")).get("auto_map") or {}
    names = sorted(name for name in known if name.startswith("AutoModel"))
    return getattr(transformers, names[-1]) if names else None


def _config(place: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise Refused(
            "not-a-model",
            f"{place} is no config that transformers reads",
            first,
            "for a model with code of its own: load it yourself, then convert(model, ...)",
        ) from error


def _class(config: Any, place: Path) -> Any:
    """The class that the config names, by transformers' public names; AutoModel where it names none."""
    import transformers

    names: list[str] = list(getattr(config, "architectures", None) or [])
    for name in names:
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
    if names:
        raise Refused(
            "not-a-model",
            f"{place} names {', '.join(names)}, which transformers {transformers.__version__} does not have",
            "for a model with code of its own: load it yourself with trust_remote_code, then convert(model, ...)",
        )
    return transformers.AutoModel


def empty(kind: Any, config: Any) -> nn.Module:
    """The class with its parameters on meta and real buffers."""
    from accelerate import init_empty_weights

    before = torch.get_default_dtype()
    dtype = getattr(config, "dtype", None)
    try:
        torch.set_default_dtype(dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else before)
        with init_empty_weights(include_buffers=False):
            model: nn.Module = kind(config) if issubclass(kind, nn.Module) else kind.from_config(config)
    finally:
        torch.set_default_dtype(before)
    retie = getattr(model, "tie_weights", None)
    if retie is not None:
        # every parameter was moved to meta by itself, which parts the tied ones
        retie()
    return model


def _loaded(kind: Any, folder: Path, *, trust_remote_code: bool = False) -> nn.Module:
    held = require_checkpoint(folder)
    loaded: tuple[nn.Module, dict[str, Any]] = kind.from_pretrained(
        folder,
        use_safetensors=True,
        local_files_only=True,
        dtype="auto",
        output_loading_info=True,
        trust_remote_code=trust_remote_code,
    )
    model, info = loaded
    require_floats(held, [n for n, p in model.named_parameters() if p.is_floating_point()])
    wrong = sorted(str(name) for key in ("missing_keys", "mismatched_keys") for name in info[key])
    if wrong:
        raise Refused(
            "no-weights",
            f"{folder} does not fill the model: {len(wrong)} tensors are missing or of another shape",
            f"the first: {wrong[0]}",
            "download the checkpoint again, or save the model anew",
        )
    return model
