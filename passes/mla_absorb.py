"""The absorbed latent in closed form: which pairs of the keys keep their rotation, and the low rank of all the rest.

A map of keys commutes with the rope where it is one complex matrix over the heads per frequency. So each frequency
offers channels (eigenvectors of its keys' moments over the heads, weighted by what score errors cost); a channel is
worth what its best constant stand-in E[e^{iθΔ}] would lose. The channels worth most are cached turned; what is left
of the keys, times the stand-ins, and the values share one latent: the top eigenvectors of their joint moments, in
units of the output's squared error.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from passes.eigen import TINY, eigh, eigvalsh, orthonormal, raised, rooted
from passes.gqa_source import FLOOR
from passes.mla_source import Known, per_kv_head, start_gap
from rewrite.heads import Latents

WIDE = 1024
"""Features beyond which decompositions are made in a subspace."""
AROUND = 2
"""Its dimension, in numbers of the latent."""


@dataclass(frozen=True)
class Setting:
    """What measuring chooses: `factor` of the keys' errors against the values', the constant in place of a lost
    rotation (attention's mean of it, or 1), and how many numbers are cached turned."""

    factor: float
    mean_phase: bool
    rope_dim: int


@dataclass(frozen=True, eq=False)
class Channels:
    """Rotating channels of all frequencies at factor 1: channel a of pair j has the vector u[j, :, a] over heads."""

    omega: Tensor
    """(pairs, g) root of what an error of the pair costs"""
    still: Tensor
    """(pairs, g) the same of an error of its constant stand-in"""
    u: Tensor
    """(pairs, g, g)"""
    gain: Tensor
    """(pairs, g) what is lost where the channel does not turn"""

    def best(self, count: int, even: bool = False) -> Tensor:
        """(pairs, g) bool: the `count` channels worth most; `even`: the best one of each of as many pairs, at equal
        distances."""
        if even and count:
            pairs = torch.arange(0, len(self.gain), len(self.gain) // count)
            kept = torch.zeros(self.gain.shape, dtype=torch.bool)
            kept[pairs, self.gain.argmax(1)[pairs]] = True
            return kept
        kept = torch.zeros(self.gain.numel(), dtype=torch.bool)
        kept[self.gain.reshape(-1).argsort(descending=True, stable=True)[:count]] = True
        return kept.reshape(self.gain.shape)


@dataclass(frozen=True, eq=False)
class Absorber:
    """The closed form of one site, for any setting."""

    known: Known
    value_share: Tensor
    """(h,) factor of the values' costs"""
    even: bool = False
    """One channel of each of evenly spaced frequencies, in place of those worth most."""
    numbers: int | None = None
    """The most numbers that a latent will have: wide sites are then decomposed in a subspace that holds all settings"""
    _roots: dict[bool, Tensor] = field(default_factory=dict[bool, Tensor], repr=False)

    @cached_property
    def _channels(self) -> dict[bool, Channels]:
        return {mean: self._make_channels(mean) for mean in (False, True)}

    def _make_channels(self, mean_phase: bool) -> Channels:
        known = self.known
        a, b = known.pairs[:, 0], known.pairs[:, 1]
        real, imag = known.paired(a, a) + known.paired(b, b), known.paired(b, a) - known.paired(a, b)
        gram = torch.complex(real, imag).permute(2, 0, 1)
        energy = known.q.diagonal(dim1=1, dim2=2) * known.score_cost[:, None]
        each = energy[:, a] + energy[:, b]
        stand_in = known.stand_in if mean_phase else torch.ones_like(known.stand_in)
        omega = raised(per_kv_head(known.site, each).T)
        still = raised(per_kv_head(known.site, each * stand_in.abs().square()).T)
        # E|e^{iθΔ} - c|² of the chosen constant
        miss = 1 - 2 * (stand_in.conj() * known.stand_in).real + stand_in.abs().square()
        lost = per_kv_head(known.site, each * miss).T / omega
        omega, still = omega.sqrt(), still.sqrt()
        weighted = gram * omega[:, :, None] * omega[:, None, :]
        values, u = eigh((weighted + weighted.conj().transpose(1, 2)) / 2)
        gain = 0.5 * values.clamp(min=0) * torch.einsum("jia,ji->ja", u.abs().square(), lost)
        return Channels(omega, still, u, gain)

    def loss(self, setting: Setting, total: int) -> float:
        """Expected squared error of the output with `total` numbers a token, to first order."""
        losses = self.losses(setting)
        return float(losses[min(total - setting.rope_dim, len(losses) - 1)])

    def losses(self, setting: Setting) -> Tensor:
        """(features + 1,) the same for every rank from 0 on."""
        values = self._values(self._features(setting), setting.mean_phase)
        channels = self._channels[setting.mean_phase]
        rest = setting.factor * channels.gain[~channels.best(setting.rope_dim // 2, self.even)].sum()
        return torch.cat([values.cumsum(0).flip(0), torch.zeros(1, dtype=values.dtype)]) + rest

    def latents(self, setting: Setting, total: int) -> Latents:
        """The maps with `total` numbers a token."""
        known, site = self.known, self.known.site
        features = self._features(setting)
        rank = min(total - setting.rope_dim, len(known.mean))
        u = self._top(features, setting.mean_phase, rank)
        down = u.T @ features.rows
        still = features.up_k @ u[: known.keys].reshape(site.k.heads, site.k.dim, rank)
        up_v = features.up_v @ u[known.keys :].reshape(site.v.heads, site.v.dim, rank)
        turn, query_turn, frequencies = self._turning(setting)
        kv = list(site.kv_of)
        read = torch.einsum("hdr,hde->hre", still[kv], self._queries(setting.mean_phase))
        latents = Latents(down, turn, read, query_turn, up_v[kv], frequencies)
        return balanced(latents, known.second)

    def _features(self, setting: Setting) -> _Features:
        """Rows N with E|N y|² in units of the output's error, and the way back to keys and values."""
        known, site = self.known, self.known.site
        g, d = site.k.heads, site.k.dim
        channels = self._channels[setting.mean_phase]
        root, inverse = self._key_roots(setting.mean_phase)
        rest = self._rest(channels, channels.best(setting.rope_dim // 2, self.even))
        keys = torch.einsum("gij,gjx->gix", root, rest.reshape(g, d, -1)).reshape(g * d, -1) * setting.factor**0.5
        cost = per_kv_head(site, known.value_cost * self.value_share[:, None, None])
        value_root, value_inverse = rooted(cost)
        if known.basis is None:
            rows = torch.block_diag(keys, *value_root)
        else:
            rows = torch.cat([keys, (value_root @ known.value_rows).flatten(0, 1)])
        return _Features(rows, inverse / setting.factor**0.5, value_inverse)

    def _top(self, features: _Features, mean_phase: bool, rank: int) -> Tensor:
        """(rows, rank) orthonormal: the directions of N y that hold most."""
        root = self._root(mean_phase, rank)
        if root is None:
            _, vectors = eigh(self._gram(features))
            return vectors[:, len(vectors) - rank :].flip(1)
        rows = features.rows @ root
        _, vectors = eigh(rows.T @ rows)
        return orthonormal(rows @ vectors[:, vectors.shape[1] - rank :].flip(1))

    def _values(self, features: _Features, mean_phase: bool) -> Tensor:
        """(features,) the moments of N y along all directions, least first."""
        root = self._root(mean_phase, 0)
        if root is None:
            return eigvalsh(self._gram(features)).clamp(min=0)
        rows = features.rows @ root
        values = eigvalsh(rows.T @ rows).clamp(min=0)
        few = len(self.known.mean) - len(values)
        if not few:
            return values
        beyond = self._energy(features) - values.sum()
        return torch.cat([(beyond.clamp(min=0) / few).expand(few), values])

    def _energy(self, features: _Features) -> Tensor:
        """E|N y|²; keys and values share no row."""
        at, spread = self.known.keys, self.known.spread
        keys, values = features.rows[:at, :at], features.rows[at:, at:]
        return (keys @ spread[:at, :at] * keys).sum() + (values @ spread[at:, at:] * values).sum()

    def _root(self, mean_phase: bool, rank: int) -> Tensor | None:
        """(features, m) B, B Bᵀ the moments of y: all of them where keys and values are more than y, of wide sites all
        but the directions that matter least where no channel turns and the factor is 1. None where keys and values are
        y and their moments small enough, or nearly all is asked for."""
        known, size = self.known, AROUND * (self.numbers or len(self.known.mean))
        wide = known.basis is None
        if wide and (len(known.mean) <= max(WIDE, size) or rank > size):
            return None
        if mean_phase not in self._roots:
            self._roots[mean_phase] = self._subspace(mean_phase, size) if wide else rooted(known.spread[None])[0][0]
        return self._roots[mean_phase]

    def _subspace(self, mean_phase: bool, size: int) -> Tensor:
        features = self._features(Setting(1.0, mean_phase, 0))
        values, vectors = eigh(self._gram(features))
        half = vectors[:, -size:] * values[-size:].clamp(min=0).sqrt()
        return torch.block_diag(*features.up_k, *features.up_v) @ half

    def _gram(self, features: _Features) -> Tensor:
        gram = features.rows @ self.known.spread @ features.rows.T
        return (gram + gram.T) / 2

    def _key_roots(self, mean_phase: bool) -> tuple[Tensor, Tensor]:
        """(g, d, d) twice: roots of what an error of the still key costs, and their inverses."""
        known, site = self.known, self.known.site
        channels, plain = self._channels[mean_phase], known.plain
        root = torch.zeros(site.k.heads, site.k.dim, site.k.dim, dtype=torch.float64)
        inverse = root.clone()
        if len(plain):
            metric = per_kv_head(site, known.q * known.score_cost[:, None, None])
            part, back = rooted(metric[:, plain[:, None], plain[None]])
            root[:, plain[:, None], plain[None]], inverse[:, plain[:, None], plain[None]] = part, back
        size = channels.still.T / 2**0.5
        for at in known.pairs.T:
            root[:, at, at], inverse[:, at, at] = size, 1 / size
        return root, inverse

    def _rest(self, channels: Channels, kept: Tensor) -> Tensor:
        """(g * d, g * d or features) what is left of the keys without the channels that turn, of keys or of y."""
        known, g, d = self.known, self.known.site.k.heads, self.known.site.k.dim
        u = channels.u * kept[:, None, :]
        taken = (u @ u.conj().transpose(1, 2)) / channels.omega[:, :, None] * channels.omega[:, None, :]
        a, b = known.pairs[:, 0], known.pairs[:, 1]
        if known.basis is not None:
            rest = known.key_rows.clone()
            turning = torch.einsum("jin,njx->ijx", taken, torch.complex(rest[:, a], rest[:, b]))
            rest[:, a] -= turning.real
            rest[:, b] -= turning.imag
            return rest.flatten(0, 1)
        rest = torch.eye(g * d, dtype=torch.float64).reshape(g, d, g, d)
        taken = taken.permute(1, 2, 0)
        for i in range(g):
            for n in range(g):
                real, imag = taken[i, n].real, taken[i, n].imag
                rest[i, a, n, a] -= real
                rest[i, b, n, b] -= real
                rest[i, a, n, b] += imag
                rest[i, b, n, a] -= imag
        return rest.reshape(g * d, g * d)

    def _queries(self, mean_phase: bool) -> Tensor:
        """(h, d, d) what the query becomes where the rotation is a constant: conj of the constant, pair by pair."""
        known, site = self.known, self.known.site
        c = known.stand_in if mean_phase else torch.ones_like(known.stand_in)
        c = c.conj() * torch.polar(torch.ones_like(start_gap(site)), -start_gap(site))
        maps = torch.eye(site.k.dim, dtype=torch.float64).repeat(site.heads, 1, 1)
        a, b = known.pairs[:, 0], known.pairs[:, 1]
        maps[:, a, a], maps[:, b, b] = c.real, c.real
        maps[:, a, b], maps[:, b, a] = -c.imag, c.imag
        return maps

    def _turning(self, setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
        """turn (rope_dim, features), query_turn (h, rope_dim, d) and frequencies (rope_dim / 2,)."""
        known, site = self.known, self.known.site
        channels = self._channels[setting.mean_phase]
        g, d, kv = site.k.heads, site.k.dim, list(site.kv_of)
        j, at = channels.best(setting.rope_dim // 2, self.even).nonzero(as_tuple=True)
        u, omega = channels.u[j, :, at].conj(), channels.omega[j]
        k_start, q_start = (_start(rope)[j, None] if rope is not None else 0.0 for rope in (site.k.rope, site.q.rope))
        key, query = u * omega * k_start, (u / omega)[:, kv] * q_start
        a, b = known.pairs[j, 0], known.pairs[j, 1]
        turn = torch.zeros(len(j), 2, g, d, dtype=torch.float64)
        query_turn = torch.zeros(site.heads, len(j), 2, d, dtype=torch.float64)
        n = torch.arange(len(j))
        for part, (first, second) in enumerate(((a, b), (b, a))):
            sign = -1 if part == 0 else 1
            turn[n, part, :, first], turn[n, part, :, second] = key.real, sign * key.imag
            # of the second row it is b that takes the real part
            query_turn[:, n, part, first], query_turn[:, n, part, second] = query.real.T, sign * query.imag.T
        turn = known.of_keys(turn.flatten(0, 1).flatten(1))
        frequencies = torch.zeros(0) if site.k.rope is None else torch.from_numpy(site.k.rope.frequencies)
        return turn, query_turn.flatten(1, 2), frequencies.double()[j]


@dataclass(frozen=True, eq=False)
class _Features:
    rows: Tensor
    up_k: Tensor
    """(g, d, d) from rows of a head's keys to its still key"""
    up_v: Tensor


def balanced(latents: Latents, second: Tensor) -> Latents:
    """The same with cached numbers of mean square 1, for the sake of short number formats."""

    def size(rows: Tensor) -> Tensor:
        square = torch.einsum("ri,ij,rj->r", rows, second, rows).clamp(min=0)
        return square

    def over(square: Tensor) -> Tensor:
        dead = square <= FLOOR * max(float(square.max()) if len(square) else 0.0, TINY)
        return torch.where(dead, torch.ones_like(square), square.clamp(min=TINY).rsqrt())

    c = over(size(latents.down))
    r = over(size(latents.turn).reshape(-1, 2).mean(1)).repeat_interleave(2)
    return Latents(
        down=latents.down * c[:, None],
        turn=latents.turn * r[:, None],
        read=latents.read / c[:, None],
        query_turn=latents.query_turn / r[:, None],
        up_v=latents.up_v / c,
        frequencies=latents.frequencies,
        up_k=None if latents.up_k is None else latents.up_k / c,
        key_norm=latents.key_norm,
    )


def _start(rope: object) -> Tensor:
    start = torch.from_numpy(rope.start).double()  # type: ignore[attr-defined]
    return torch.polar(torch.ones_like(start), start)
