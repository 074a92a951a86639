"""`install(model, recipe)` changes a freshly built model as the JSON recipe in its config says."""

from __future__ import annotations

from typing import Any

from torch import nn

from rewrite.emit.runtime.factored import install_factored
from rewrite.emit.runtime.heads import Part, install_heads
from rewrite.emit.runtime.latent_entry import install_latent


def install(model: nn.Module, recipe: dict[str, Any], prefix: str = "") -> None:
    """Change every site of the recipe that lies in the model."""
    part, forms = Part(model, prefix), {"latent": install_latent, "factored": install_factored}
    for site in recipe["sites"]:
        if part.holds(site["site"]):
            forms.get(site["form"], install_heads)(part, site)
