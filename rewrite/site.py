"""A `Site`: one attention of a model as frozen data. Passes read it, targets change its form.

    o(softmax(scale * mods(q @ k^T), where mask) @ v)

Letters for the whole project: b batch, h query heads, g kv heads, t query tokens, s key tokens, d head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from rewrite.data import Data

if TYPE_CHECKING:
    from rewrite.mask import Mask

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Tensors = Callable[[str], Any]
"""State-dict name -> tensor. Passes never care whether it reads a live module or a file."""


@dataclass(frozen=True, eq=False)
class Root(Data):
    """A projection: row r of its matrix is `tensor.flat[starts[r] + stride * arange(columns)]`.

    One form for linear (starts = r * columns, stride 1), Conv1D (starts = r, stride = rows), slices of a packed
    parameter and einsum with a 3-D parameter. `source` names the value that the projection reads: two roots with
    one source read the same tokens. `module` is the module path that owns the projection ("" where none does).
    """

    tensor: str
    starts: IntArray
    stride: int
    columns: int
    bias: str | None = None
    bias_at: IntArray | None = None
    """Flat positions in the bias, one per row."""
    source: str = ""
    module: str = ""

    @property
    def rows(self) -> int:
        """Output rows."""
        return len(self.starts)

    def index(self) -> IntArray:
        """(rows, columns) flat positions in `tensor`."""
        return self.starts[:, None] + self.stride * np.arange(self.columns, dtype=np.int64)[None]


@dataclass(frozen=True, eq=False)
class Affine(Data):
    """Values `constant + factor * tensor.flat[index]`, or `constant` alone: a gain, a shift, a sink.

    The weights are read when a conversion runs, so a site that was proven on random weights stays true.
    """

    constant: FloatArray
    factor: FloatArray | None = None
    tensor: str | None = None
    index: IntArray | None = None

    def read(self, tensors: Tensors) -> FloatArray:
        """The values, in float64."""
        if self.tensor is None or self.factor is None or self.index is None:
            return self.constant
        flat = tensors(self.tensor).detach().double().reshape(-1).cpu().numpy()
        return self.constant + self.factor * flat[self.index]

    @property
    def is_one(self) -> bool:
        """Nothing but ones, whatever the weights."""
        return self.tensor is None and bool(np.all(self.constant == 1.0))


@dataclass(frozen=True, eq=False)
class Norm(Data):
    """qk-norm, before the gain and the rope. rms: x/sqrt(mean(x^2)+eps); l2: x/sqrt(sum(x^2)+eps);
    layer: (x-mean)/sqrt(var+eps). `over` is "head" (each head alone) or "row" (all heads at once)."""

    kind: Literal["rms", "l2", "layer"]
    over: Literal["head", "row"]
    eps: float


@dataclass(frozen=True, eq=False)
class Rope(Data):
    """Pair j of head dims (pairs[j, 0], pairs[j, 1]) turns by start[j] + frequencies[j] * position.

    `table` (tokens, pairs), the angles at the traced positions, stands in where they are not affine in the
    position (2-D positions); frequencies and start are then empty.
    """

    pairs: IntArray
    frequencies: FloatArray
    start: FloatArray
    table: FloatArray | None = None

    @property
    def width(self) -> int:
        """How many dims rotate."""
        return 2 * len(self.pairs)

    @property
    def style(self) -> str:
        """How pairs lie: "interleaved" (2j, 2j+1), "half" (j, j + width/2) or "other"."""
        gaps = set((self.pairs[:, 1] - self.pairs[:, 0]).tolist())
        if gaps == {1}:
            return "interleaved"
        return "half" if gaps == {len(self.pairs)} else "other"

    @property
    def base(self) -> float | None:
        """The base of a geometric series of frequencies, None where they are none."""
        n = len(self.frequencies)
        if n < 2 or np.any(self.frequencies == 0):
            return None
        logs = np.log(np.abs(self.frequencies))
        step = (logs[-1] - logs[0]) / (n - 1)
        fits = np.allclose(logs, logs[0] + step * np.arange(n), atol=1e-4) and abs(logs[0]) < 1e-4
        return float(np.exp(-step * n)) if fits else None


@dataclass(frozen=True, eq=False)
class Operand(Data):
    """What lies between a projection and the core, alike for q, k and v.

        value[h, t, i] = after[h, i] * turn_t(gain[h, i] * norm(u[t, rows[h, i]]) + shift[h, i])

    u are the outputs of the roots, concatenated; `rows` is (heads, dim); a missing part does nothing.
    `token_gain` is a factor per traced position, alike for all heads and dims (llama 4's temperature).
    """

    roots: tuple[Root, ...]
    rows: IntArray
    gain: Affine
    norm: Norm | None = None
    shift: Affine | None = None
    rope: Rope | None = None
    after: Affine | None = None
    token_gain: FloatArray | None = None

    @property
    def heads(self) -> int:
        """Distinct heads: query heads for q, kv heads for k and v."""
        return self.rows.shape[0]

    @property
    def dim(self) -> int:
        """Width of one head."""
        return self.rows.shape[1]


@dataclass(frozen=True)
class Dense:
    """Every query head has its own kv head."""

    kv_heads: int


@dataclass(frozen=True)
class Grouped:
    """Several query heads read one kv head."""

    kv_heads: int


@dataclass(frozen=True)
class Latent:
    """All heads read one latent vector per token (see `rewrite.heads.Latents`): `rank` numbers of it are cached as they
    are and `rope_dim` turned. `rebuilt`: keys are expanded from the latent and turned at every step instead."""

    rank: int
    rope_dim: int
    rebuilt: bool = False

    @property
    def kv_heads(self) -> int:
        """One wide head."""
        return 1


@dataclass(frozen=True)
class Factored:
    """Nothing is cached, and keys and values are projected through few numbers of a token (see
    `rewrite.heads.Factors`): `ranks` is how many, one number for both, or that of keys and that of values; None is a
    projection that stays as it is."""

    kv_heads: int
    ranks: tuple[int | None, ...]


@dataclass(frozen=True)
class Sparse:
    """Queries read fewer keys than the source's mask allows; the site's `mask` says which. `held` is how many tokens
    the cache needs for each kv head, at most; None is all. Where calibration is still to choose the mask, the mask is
    the source's, `held` is empty and `density` the share of its pairs that will be left."""

    kv_heads: int
    held: tuple[int | None, ...] = ()
    density: float | None = None


Form = Dense | Grouped | Latent | Factored | Sparse


@dataclass(frozen=True)
class Softcap:
    """scores <- cap * tanh(scores / cap), after the scale and before bias and mask."""

    cap: float


@dataclass(frozen=True, eq=False)
class Bias(Data):
    """An additive term of the scores. `slopes` (heads,) where it is ALiBi: slope * (key - query) up to a term
    of the query alone. `origin` says what it hangs on."""

    origin: Literal["constant", "parameters", "input"]
    slopes: tuple[float, ...] | None = None


@dataclass(frozen=True, eq=False)
class Sink(Data):
    """One extra logit per query head that takes probability and carries no value."""

    logits: Affine


Mod = Softcap | Bias | Sink


@dataclass(frozen=True, eq=False)
class Output(Data):
    """The output projection: channel (h, i) of the core's result is column columns[h, i] of `root`."""

    root: Root
    columns: IntArray


@dataclass(frozen=True)
class Refusal:
    """Why not, in a sentence; `where` is the source line, `nearest` the nearest miss."""

    reason: str
    where: str = ""
    nearest: str = ""

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class Proof:
    """What was run before the site counted: input size -> largest relative error, lengths tried, hash of the region."""

    errors: tuple[tuple[float, float], ...]
    lengths: tuple[int, ...]
    region: str


@dataclass(frozen=True, eq=False)
class Site(Data):
    """One attention of the model."""

    name: str
    """Module path: "model.layers.3.self_attn", "attention" where the model itself is the module; "#1", "#2" ...
    follow where one module holds several."""
    q: Operand
    k: Operand
    v: Operand
    heads: int
    kv_of: tuple[int, ...]
    """Which kv head each query head reads."""
    form: Form
    mask: Mask
    scale: tuple[float, ...]
    """Per query head; one value where they agree."""
    mods: tuple[Mod, ...]
    out: Output | Refusal
    cross: bool
    proof: Proof
    where: str = ""
    """Source line of the core: "modeling_x.py:212"."""

    @property
    def kv_heads(self) -> int:
        """Heads that the cache holds."""
        return self.form.kv_heads

    @property
    def cache_per_token(self) -> int:
        """Numbers cached per token and layer."""
        from rewrite.shared import shared

        if isinstance(self.form, Latent):
            return self.form.rank + self.form.rope_dim
        few = shared(self)
        if few is not None:
            return few.width
        whole = sum(n is None for n in self.form.held) if isinstance(self.form, Sparse) and self.form.held else None
        return (self.kv_heads if whole is None else whole) * (self.k.dim + self.v.dim)

    @property
    def cache_fixed(self) -> int:
        """Numbers cached per layer that grow no further with the text: of heads that need its last tokens alone."""
        held = self.form.held if isinstance(self.form, Sparse) else ()
        return sum(n for n in held if n is not None) * (self.k.dim + self.v.dim)

    @property
    def heads_alike(self) -> bool:
        """Nothing tells one query head from another but its projections, so heads may be permuted with them."""
        return len(self.scale) == 1 and not any(isinstance(m, (Bias, Sink)) for m in self.mods)

    def __str__(self) -> str:
        from rewrite.text import site_line

        return site_line(self)
