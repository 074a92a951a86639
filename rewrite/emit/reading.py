"""What a saved folder says beside its weights, for readers older than the transformers that wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def for_older_readers(folder: Path) -> None:
    """Write `rope_theta` and `torch_dtype` into config.json beside their new spellings.

    transformers 5 writes `rope_parameters` and `dtype` alone; version 4 would then take a base of 10000 and float32
    without a word. Version 5 reads the mixture as it reads its own.
    """
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    _both_spellings(config)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _both_spellings(config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and isinstance(rope.get("rope_theta"), (int, float)):
        config.setdefault("rope_theta", rope["rope_theta"])
    if isinstance(config.get("dtype"), str):
        config.setdefault("torch_dtype", config["dtype"])
    for part in config.values():
        if isinstance(part, dict) and "model_type" in part:
            _both_spellings(part)
