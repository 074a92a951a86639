"""Published conversions to a latent cache, written anew from their descriptions: what ours is measured against.

All work on y, keys after norm, gain and shift and before the rope, then values. Behind a norm of the keys that is
kinder to absorbable ones than what was published (they drop the norm, or leave it to be done at every step); those that
rebuild keys norm the rebuilt ones, as published.
"""

from __future__ import annotations

from bench.peers.joint import CARE, JointSVD
from bench.peers.mha2mla import MHA2MLA
from bench.peers.transmla import TransMLA

__all__ = ["CARE", "MHA2MLA", "JointSVD", "TransMLA"]
