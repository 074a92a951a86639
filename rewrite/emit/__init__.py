"""A PreTrainedModel stays one: the rewritten sites in the first form that really computes them.

stock     the model's own class with another number of kv heads in its config; a plain checkpoint
grouped   the site's own module and forward; cache and attention kernel hold one head a group
view      the same, but the module reads all heads back from the cache: less memory, no less time
latent    the site's own module and forward; the cache holds one vector a token, from which its kernel reads
factored  where nothing is cached: the projections of keys and values go through few numbers a token
sparse    the site's own module and forward; its kernel is given a mask and fewer keys, its cache may drop tokens
deepseek  the same latents as an all-dense DeepSeek-V3 model, which engines load
"""

from rewrite.emit.choose import Changes, Emitted, emit, forecast
from rewrite.emit.deepseek import Stock, deepseek
from rewrite.emit.latent import emit_latent, forecast_latent
from rewrite.emit.reading import for_older_readers
from rewrite.emit.sparse import emit_sparse, forecast_sparse

__all__ = [
    "Changes",
    "Emitted",
    "Stock",
    "deepseek",
    "emit",
    "emit_latent",
    "emit_sparse",
    "for_older_readers",
    "forecast",
    "forecast_latent",
    "forecast_sparse",
]
