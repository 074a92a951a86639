"""What runs in a converted model. The text of these files, one after the other, is the generated modelling file, so
they import torch, transformers and each other, and nothing else."""

from rewrite.emit.runtime import (
    factored,
    heads,
    latent,
    latent_entry,
    latent_shared,
    latent_views,
    sparse,
    sparse_cache,
    sparse_entry,
    sparse_run,
    views,
)
from rewrite.emit.runtime import install as installing
from rewrite.emit.runtime.install import install
from rewrite.emit.runtime.views import CacheView, EncoderDecoderView

PARTS = (
    views, heads, factored, latent, latent_views, latent_shared, latent_entry,
    sparse, sparse_cache, sparse_run, sparse_entry, installing,
)  # fmt: skip
"""In the order in which one may read the other."""

__all__ = ["PARTS", "CacheView", "EncoderDecoderView", "install"]
