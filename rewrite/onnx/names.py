"""Names of inputs, outputs and metadata. Those of the cache are the convention of optimum and ONNX Runtime GenAI."""

from __future__ import annotations

FORM = "reattn.form"
"""Metadata: how attention is written."""
SHARED = "reattn.shared"
"""Metadata: "yes" where past and present may be one buffer, longer than what is filled."""
CACHE = "reattn.cache"
"""Metadata: numbers cached per token, layer by layer, as JSON."""
BOUND = "reattn.bound"
"""Metadata: tokens that a layer holds at most, null where it holds all, as JSON; only where some layer drops tokens."""
RECIPE = "reattn.recipe"
"""Metadata: the target of the conversion, as on the command line."""
REPORT = "reattn.report"
"""Metadata: the conversion's report as JSON."""

PARTS = ("key", "value")
"""The two cached tensors of a layer. Of a latent these are the latent, and the part that keeps a rope."""


def past(layer: int, part: int) -> str:
    """The input that holds a layer's cache."""
    return f"past_key_values.{layer}.{PARTS[part]}"


def present(layer: int, part: int) -> str:
    """The output that holds it with the new tokens."""
    return f"present.{layer}.{PARTS[part]}"
