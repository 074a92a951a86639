"""What a kernel's results are held to: dense attention in float64, and how far from it rounding may take each number.

The bound follows the kernel's arithmetic: unit roundoffs of the operands' type where a block is made narrow for the
next product, of fp32 elsewhere, carried to first order and doubled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.kernel_cases import Inputs
from codegen.options import Options
from codegen.oracle import kept, scores

ROUND = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float32: 2.0**-140, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}
"""Half of the smallest number above zero: what is rounded when a product's operand nearly vanishes."""
EXACT = 2.0**-24
SUMS = 4.0
"""Roundoffs of fp32 in a sum, an exponential or a chain of a few operations."""


@dataclass(frozen=True)
class Expected:
    """Values, and how far each may be off."""

    value: Tensor
    bound: Tensor

    def excess(self, found: Tensor) -> float:
        """The largest error over its bound, of which 1 is rounding; inf where a number is missing or not finite."""
        got = found.detach().double().cpu()
        finite = torch.isfinite(self.value)
        if not torch.equal(got[~finite], self.value[~finite]) or not bool(torch.isfinite(got[finite]).all()):
            return float("inf")
        errors = (got - self.value).abs()[finite] / self.bound[finite].clamp_min(1e-30)
        return float(errors.max()) if errors.numel() else 0.0


@dataclass(frozen=True)
class _Soft:
    """The softmax of a case in float64, (b, h, t, s): weights, their relative error; keys and values by query head."""

    q: Tensor
    k: Tensor
    v: Tensor
    p: Tensor
    lse: Tensor
    error: Tensor
    lse_error: Tensor
    bent: Tensor


def expected(x: Inputs, backward: bool, truncated: bool = False) -> dict[str, Expected]:
    """Results by name: o and lse, and gradients where `backward`.

    `truncated`: numbers are cut to bf16, not rounded, which is what Triton's interpreter does.
    """
    u, tiny = ROUND[x.q.dtype], SMALLEST[x.q.dtype]
    u = 2 * u if truncated and x.q.dtype == torch.bfloat16 else u
    soft = _softmax(x)
    o = soft.p @ soft.v
    rough = (
        2 * ((soft.p * (u + soft.error)) @ soft.v.abs() + tiny * soft.v.abs().sum(-2, keepdim=True))
        + u * o.abs()
        + tiny
    )
    found = {"o": Expected(o, rough), "lse": Expected(soft.lse, soft.lse_error)}
    return found | (_gradients(x, soft, o, rough, u) if backward else {})


def _whole(tensor: Tensor, heads: int) -> Tensor:
    """In float64, padding zero, a head for each query head."""
    return torch.nan_to_num(tensor.detach().double().cpu()).repeat_interleave(heads // tensor.shape[1], 1)


def _softmax(x: Inputs) -> _Soft:
    heads = x.q.shape[1]
    q, k, v = (_whole(t, heads) for t in (x.q, x.k, x.v))
    exact = _exact_options(x.options)
    spans = exact.spans(q.shape[0], q.shape[2], k.shape[2])
    keep = kept(x.mask, heads, q.shape[2], spans, k.shape[2])
    logits = scores(q, k, exact, spans)
    plain = exact.scale * (q @ k.mT)
    bent = torch.tanh(plain / exact.softcap) if exact.softcap else torch.zeros_like(plain)
    size = exact.scale * (q.abs() @ k.abs().mT) + logits.masked_fill(~torch.isfinite(logits), 0).abs() + 1
    if exact.slopes is not None:
        size = size + exact.slopes[:, None, None] * k.shape[2] + plain.abs()
    slip = SUMS * EXACT * (size + (exact.softcap or 0.0))
    logits = logits.masked_fill(~keep, -torch.inf)
    real = torch.tensor([t for t, _ in spans])[:, None] > torch.arange(q.shape[2])
    if exact.sinks is not None:
        column = (
            exact.sinks[:, None, None].expand(*logits.shape[:3], 1).masked_fill(~real[:, None, :, None], -torch.inf)
        )
        lse = torch.logsumexp(torch.cat([logits, column], -1), -1)
    else:
        lse = torch.logsumexp(logits, -1)
    level = lse.masked_fill(lse == -torch.inf, 0.0)[..., None]
    p = torch.exp(logits - level)
    lse_error = 2 * ((p * slip).sum(-1) + SUMS * EXACT * (1 + level[..., 0].abs()))
    error = (
        slip
        + lse_error[..., None]
        + SUMS * EXACT * (1 + (logits - level).masked_fill(~keep, 0).nan_to_num(0, 0, 0).abs())
    )
    return _Soft(q, k, v, p, lse, error, lse_error, bent)


def _exact_options(options: Options) -> Options:
    """Tensors in float64 on the CPU."""

    def exact(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().double().cpu()

    return Options(
        options.scale,
        options.softcap,
        exact(options.bias),
        exact(options.slopes),
        exact(options.sinks),
        options.lengths,
    )


def _gradients(x: Inputs, soft: _Soft, o: Tensor, rough: Tensor, u: float) -> dict[str, Expected]:
    tiny, scale = SMALLEST[x.q.dtype], x.options.scale
    g, p = _whole(x.grad, x.q.shape[1]), soft.p
    delta = (g * o).sum(-1, keepdim=True)
    delta_error = (g.abs() * rough).sum(-1, keepdim=True)
    dp = g @ soft.v.mT
    ds = p * (dp - delta)
    few = SUMS * EXACT * (g.abs() @ soft.v.abs().mT + delta.abs())
    ds_error = p * (few + delta_error) + soft.error * ds.abs()
    bend = 1 - soft.bent**2
    du = ds * bend
    du_error = ds_error * bend + SUMS * EXACT * ds.abs() + u * du.abs() + tiny
    p_error = p * (u + soft.error) + tiny
    found = {
        "q": _product(du, du_error, soft.k, scale, u),
        "k": _grouped(_product(du.mT, du_error.mT, soft.q, scale, u), x.k.shape[1]),
        "v": _grouped(_product(p.mT, p_error.mT, g, 1.0, u), x.k.shape[1]),
    }
    bias, sinks = x.options.bias, x.options.sinks
    if bias is not None and bias.requires_grad:
        value = ds.sum_to_size(bias.shape)
        found["bias"] = Expected(value, 2 * ds_error.sum_to_size(bias.shape) + u * value.abs() + 1e-12)
    if sinks is not None:
        share = torch.exp(
            sinks.detach().double().cpu()[:, None] - soft.lse.masked_fill(soft.lse == -torch.inf, torch.inf)
        )[..., None]
        value = -(share * delta).sum((0, 2, 3))
        slip = share * (delta_error + delta.abs() * (soft.lse_error[..., None] + SUMS * EXACT))
        found["sinks"] = Expected(value, 2 * slip.sum((0, 2, 3)) + 1e-9)
    return found


def _product(a: Tensor, a_error: Tensor, b: Tensor, scale: float, u: float) -> Expected:
    value = scale * (a @ b)
    spread = scale * ((a_error + SUMS * EXACT * a.abs()) @ b.abs())
    return Expected(value, 2 * spread + u * value.abs() + 1e-12)


def _grouped(x: Expected, heads: int) -> Expected:
    """Summed over the query heads of each kv head."""

    def total(t: Tensor) -> Tensor:
        return t.unflatten(1, (heads, -1)).sum(2)

    return Expected(total(x.value), total(x.bound))
