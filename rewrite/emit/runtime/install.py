"""`install(model, recipe)` changes a freshly built model as the JSON recipe in its config says."""

from __future__ import annotations

from typing import Any

from torch import nn

from rewrite.emit.runtime.factored import install_factored
from rewrite.emit.runtime.heads import Part, install_heads
from rewrite.emit.runtime.latent_entry import install_latent
from rewrite.emit.runtime.sparse_entry import install_sparse


def install(model: nn.Module, recipe: dict[str, Any], prefix: str = "") -> None:
    """Change every site of the recipe that lies in the model."""
    part = Part(model, prefix)
    forms = {"latent": install_latent, "factored": install_factored, "sparse": install_sparse}
    for site in recipe["sites"]:
        if part.holds(site["site"]):
            forms.get(site["form"], install_heads)(part, site)
