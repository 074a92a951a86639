"""A model as the user gave it - a module or a folder - and as it is worked on: in float32, the given one untouched."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewrite.calibration import Batch
from rewrite.errors import BadUsage, Refused
from rewrite.folder import hash_into
from rewrite.report import Calibration
from rewrite.source import build

LONGEST = 2048
"""Tokens of a window where the model's context is longer."""


@dataclass(frozen=True)
class Opened:
    """`working` computes in float32; `types` are the parameters' own types, to which a result goes back."""

    label: str
    folder: Path | None
    working: nn.Module
    types: dict[str, torch.dtype]

    @property
    def context(self) -> int:
        """Tokens of one window: what the model was made for, at most 2048."""
        config = getattr(self.working, "config", None)
        return min(LONGEST, int(getattr(config, "max_position_embeddings", None) or LONGEST))

    @cached_property
    def tokenizer(self) -> Any | None:
        """The tokenizer beside the model, None where there is none."""
        from transformers import AutoTokenizer

        place = self.folder or Path(str(getattr(getattr(self.working, "config", None), "_name_or_path", "") or ""))
        if not (place / "tokenizer_config.json").is_file():
            return None
        return AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)

    @property
    def fingerprint(self) -> str:
        """sha256 over the folder's files of weights and config; empty for a live module."""
        if self.folder is None:
            return ""
        state = hashlib.sha256()
        for path in sorted(p for p in self.folder.iterdir() if p.suffix in (".safetensors", ".json")):
            state.update(path.name.encode())
            hash_into(state, path)
        return state.hexdigest()

    def as_given(self, made: nn.Module) -> nn.Module:
        """The result with its parameters in the types of the source; buffers keep theirs, as in the source."""
        common = max(set(self.types.values()), key=list(self.types.values()).count, default=torch.float32)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(self.types.get(name, common))
        return made

    def widened(self, made: nn.Module) -> nn.Module:
        """The result as it will be saved, computing in float32: what `check` measures."""
        return made if _is_wide(made) else in_float32(made)

    def calibration(self, given: Any, used: Sequence[Batch]) -> Calibration:
        """What the report says of the calibration; the hash is over the numbers that the model saw."""
        state = hashlib.sha256()
        shapes: list[tuple[int, ...]] = []
        for batch in used:
            for name in sorted(batch):
                state.update(name.encode() + batch[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
            shapes.append(tuple(next(iter(batch.values())).shape[:2]))
        return Calibration(
            source=str(given) if isinstance(given, Path) else f"{type(given).__name__} given in Python",
            sha256=state.hexdigest(),
            tokens=sum(rows * (rest[0] if rest else 1) for rows, *rest in shapes),
            samples=sum(rows for rows, *_ in shapes),
            length=shapes[0][1] if len(shapes[0]) > 1 else 1,
        )


def open_model(model: Any, *, trust_remote_code: bool = False) -> Opened:
    """A module, or a checkpoint folder with its weights."""
    if isinstance(model, (str, Path)):
        module = build(model, weights=True, trust_remote_code=trust_remote_code)
        types = _types(module)  # read before the module is widened where it stands
        return Opened(str(model), Path(model), _working(module, own=True), types)
    if not isinstance(model, nn.Module):
        raise Refused(
            "not-a-model",
            f"{type(model).__name__} is no torch.nn.Module and no path",
            "give a module, or the folder of a Hugging Face checkpoint",
        )
    if any(p.is_meta for p in model.parameters()):
        raise BadUsage("no-weights", "the model's parameters lie on the meta device, so there is nothing to convert")
    # torch.compile wraps a module in one that cannot be traced again
    module = getattr(model, "_orig_mod", model)
    return Opened(type(module).__name__, None, _working(module, own=False), _types(module))


def open_folder(folder: Path) -> Opened:
    """A checkpoint folder without its weights: parameters lie on meta, as float32."""
    from transformers import GenerationConfig

    module: Any = build(folder)
    types = _types(module)
    if (folder / "generation_config.json").is_file():
        module.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return Opened(str(folder), folder, _working(module, own=True), types)


def _types(module: nn.Module) -> dict[str, torch.dtype]:
    return {n: p.dtype for n, p in module.named_parameters(remove_duplicate=False) if p.is_floating_point()}


def _is_wide(module: nn.Module) -> bool:
    return all(p.dtype.itemsize >= 4 for p in module.parameters() if p.is_floating_point())


def _working(module: nn.Module, *, own: bool) -> nn.Module:
    if _is_wide(module):
        return module
    return in_float32(module, copied=not own)


def in_float32(module: nn.Module, *, copied: bool = True) -> nn.Module:
    """The module computing in float32; a copy of its own unless told that it may be changed."""
    wide = copy.deepcopy(module) if copied else module
    with torch.no_grad():
        for tensor in (*wide.parameters(), *wide.buffers()):
            if tensor.is_floating_point() and tensor.dtype.itemsize < 4:
                tensor.data = tensor.data.float()
    return wide
