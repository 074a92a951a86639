"""What every back end of block-sparse attention is told beside queries, keys, values and the mask.

Each back end is two functions:

    forward(q, k, v, mask, options) -> (o, lse)
    backward(grad, q, k, v, o, lse, mask, options, bias_grad) -> {"q", "k", "v"; "sinks" where there are some; "bias"}

over q (b, h, t, d), k (b, g, s, d) and v (b, g, s, dv), query head i reading kv head i // (h / g). `o` (b, h, t, dv)
has the dtype of q. `lse` (b, h, t) is float32 (float64 for float64) and natural: the logarithm of what the softmax
divides by, sinks included; it is not differentiated. The bias has a gradient only with `bias_grad`. A query that
may read nothing has o = 0 and lse = -inf (its sink's logit where there are sinks), and so has padding (-inf always);
their gradients are 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Options:
    """Scores are `softcap * tanh(scale * q k^T / softcap) + bias - slope * (q - k)`, positions in key coordinates.

    `bias` broadcasts to (b, h, t, s); `slopes` (h,) are ALiBi's; `sinks` (h,) are logits that take part in the softmax
    and carry no value. `lengths`: how many of the t queries and of the s keys each row of the batch has, (b,) each, on
    any device; the others are padding at the end. Query i of a row stands at i + its keys - its queries.
    """

    scale: float
    softcap: float | None = None
    bias: Tensor | None = None
    slopes: Tensor | None = None
    sinks: Tensor | None = None
    lengths: tuple[Tensor, Tensor] | None = None

    def spans(self, batch: int, queries: int, keys: int) -> list[tuple[int, int]]:
        """(queries, keys) of each row of the batch as plain numbers, which waits for a device where they are on one."""
        if self.lengths is None:
            return [(queries, keys)] * batch
        rows = [(int(t), int(s)) for t, s in zip(*(x.tolist() for x in self.lengths), strict=True)]
        for row, (t, s) in enumerate(rows):
            if not (0 <= t <= queries and 0 <= s <= keys):
                raise ValueError(
                    f"row {row} has {t} queries and {s} keys, and there are {queries} and {keys} places for them"
                )
        return rows
