"""A PreTrainedModel stays one: the rewritten sites in the first form that really computes them.

stock     the model's own class with another number of kv heads in its config; a plain checkpoint
grouped   the site's own module and forward; cache and attention kernel hold one head a group
view      the same, but the module reads all heads back from the cache: less memory, no less time
"""

from rewrite.emit.choose import Changes, Emitted, emit, forecast
from rewrite.emit.reading import for_older_readers

__all__ = ["Changes", "Emitted", "emit", "for_older_readers", "forecast"]
