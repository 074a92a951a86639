"""Masks as predicates over (b, h, q, k): which keys a query reads, with &, | and ~, a table, and its recognition.

`q` is the query's position counted in key coordinates: with s keys and t queries, query i stands at s - t + i
(aligned at the end, as in decoding with a cache).
"""

from rewrite.mask.algebra import BoolArray, Mask, Origin, Table, mask
from rewrite.mask.known import listed, recognise
from rewrite.mask.library import (
    all_,
    around,
    blocks,
    blocks_diagonal,
    causal,
    causal_top_left,
    chunk,
    dilated,
    documents,
    global_,
    longformer,
    neighbourhood,
    prefix,
    sharded,
    sink,
    streaming,
    strided,
    window,
)
from rewrite.mask.read import parse
from rewrite.mask.terms import At, Div, Mod, Term, at, b, h, k, q

__all__ = [
    "At",
    "BoolArray",
    "Div",
    "Mask",
    "Mod",
    "Origin",
    "Table",
    "Term",
    "all_",
    "around",
    "at",
    "b",
    "blocks",
    "blocks_diagonal",
    "causal",
    "causal_top_left",
    "chunk",
    "dilated",
    "documents",
    "global_",
    "h",
    "k",
    "listed",
    "longformer",
    "mask",
    "neighbourhood",
    "parse",
    "prefix",
    "q",
    "recognise",
    "sharded",
    "sink",
    "streaming",
    "strided",
    "window",
]
