"""The tiled attention of a file against its definition, at any length, padding, cache and tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from hypothesis import given, settings
from hypothesis import strategies as st

from rewrite.onnx.functions import define

HEADS, GROUPS, D, DV = 4, 2, 3, 5
LOW = np.finfo(np.float32).min
CALL = """<ir_version: 11, opset_import: ["" : 23, "reattn" : 1]>
g (float[b, 4, n, 3] query, float[b, 2, m, 3] key, float[b, 2, m, 5] value, bool[b, 1, n, t] given,
   int64[b, 1, 1, 1] begin, int64[b, s] early, int64[b, s] place, float lowest) => (float[b, n, 4, 5] y) {{
    y = reattn.TiledAttention <sink = {sink}, window = {window}, tile = {tile}>
        (query, key, value, given, begin, early, place, lowest)
}}"""


@dataclass(frozen=True)
class Case:
    sink: int
    window: int
    tile: int
    tokens: int
    past: int
    padding: tuple[int, ...]

    @property
    def total(self) -> int:
        return self.past + self.tokens

    @property
    def away(self) -> int:
        """Tokens that a bounded cache dropped before the call."""
        return max(0, self.past - (self.sink + self.window - 1))


cases = st.builds(
    Case,
    sink=st.integers(0, 4),
    window=st.integers(1, 6),
    tile=st.integers(1, 5),
    tokens=st.integers(1, 24),
    past=st.integers(0, 14),
    padding=st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple),
)


def run(case: Case, feeds: dict[str, Any]) -> Any:
    text = CALL.format(sink=case.sink, window=case.window, tile=case.tile)
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    define(model)
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(proto.SerializeToString(), options).run(None, feeds)[0]


def made(case: Case) -> tuple[dict[str, Any], Any, Any, Any]:
    """What the file is given, all keys and values, and what each query reads (batch, 1, tokens, total)."""
    draw, batch = np.random.default_rng(0), len(case.padding)
    query = draw.standard_normal((batch, HEADS, case.tokens, D), np.float32)
    key, value = (draw.standard_normal((batch, GROUPS, case.total, w), np.float32) for w in (D, DV))
    begin = np.array(case.padding)[:, None, None, None]
    q, k = np.arange(case.past, case.total)[:, None], np.arange(case.total)
    shown = (k <= q) & (k >= begin) & (draw.random((batch, 1, *(q + k).shape)) < 0.8)
    reads = shown & ((q - k < case.window) | (k - begin < case.sink))
    early = begin[:, 0, 0] + np.arange(case.sink)
    away = case.away
    apart = (away > 0) & (early < away + case.sink)
    place = np.where(apart, np.arange(case.sink), early - away).clip(0, case.total - away - 1)
    at = np.tile(np.arange(away, case.total), (batch, 1))
    if away:
        at[:, : case.sink] = np.where(apart, early, at[:, : case.sink])
    hand = [np.take_along_axis(x, at[:, None, :, None], 2) for x in (key, value)]
    feeds = {"query": query, "key": hand[0], "value": hand[1], "given": shown}
    feeds |= {"begin": begin, "early": early, "place": place, "lowest": np.array(LOW)}
    return feeds, key, value, reads


@settings(max_examples=60)
@given(cases)
def test_every_query_reads_what_it_may(case: Case) -> None:
    feeds, key, value, reads = made(case)
    got = run(case, feeds)
    scores = feeds["query"] @ key.repeat(HEADS // GROUPS, 1).swapaxes(-1, -2) + np.where(reads, 0, -np.inf)
    real = reads.any(-1)[:, 0]  # a query of padding may read anything
    shares = np.exp(scores - np.where(real, scores.max(-1).max(1), 0)[:, None, :, None])
    shares /= np.maximum(shares.sum(-1, keepdims=True), 1e-30)
    wanted = (shares @ value.repeat(HEADS // GROUPS, 1)).swapaxes(1, 2)
    assert np.abs(got - wanted)[real].max(initial=0) < 1e-5


def test_what_no_query_of_a_tile_reads_is_not_multiplied() -> None:
    case = Case(sink=2, window=4, tile=4, tokens=32, past=0, padding=(0,))
    feeds, *_, reads = made(case)
    feeds["given"][:] |= reads
    feeds["key"][:, :, 10] = feeds["value"][:, :, 10] = np.nan
    spoilt = np.isnan(run(case, feeds)).any((0, 2, 3))
    # token 10 is in the windows of queries 10 to 13, whose tiles are 8 to 11 and 12 to 15
    assert np.flatnonzero(spoilt).tolist() == list(range(8, 16))
