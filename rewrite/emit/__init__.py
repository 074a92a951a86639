"""A PreTrainedModel stays one: the rewritten sites in the first form that really computes them.

stock   the model's own class with another number of kv heads in its config; a plain checkpoint
bound   the site's module with a generic forward, arguments bound by a watched run
view    the site's module untouched, distinct heads held once
"""

from rewrite.emit.choose import Emitted, emit

__all__ = ["Emitted", "emit"]
