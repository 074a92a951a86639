"""Published conversions to a latent cache, written anew from their descriptions: what ours is measured against.

All work on y, keys after norm, gain and shift and before the rope, then values; so where a model norms its keys they
stand behind the norm, which is kinder to them than what was published.
"""

from __future__ import annotations

from bench.peers.joint import CARE, JointSVD
from bench.peers.mha2mla import MHA2MLA
from bench.peers.transmla import TransMLA

__all__ = ["CARE", "MHA2MLA", "JointSVD", "TransMLA"]
