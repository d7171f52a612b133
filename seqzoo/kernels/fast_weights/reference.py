"""The equation, one token at a time, its gradients by the chain rule, with all weights in float32 or better."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from seqzoo.kernels.backends import accumulation_dtype

Gelu = Literal["tanh", "none"]
GELUS = ("tanh", "none")

VARIANTS = {
    "a linear map with a norm": {},
    "two layers with a norm": {"hidden": (12,)},
    "three layers that forget, with momentum": {
        "hidden": (12, 10),
        "bias": False,
        "norm": False,
        "reach": False,
        "forgets": True,
        "momentum": True,
        "value": 6,
        "chunk": 5,
        "gelu": "none",
    },
    "everything": {"hidden": (12,), "forgets": True, "momentum": True},
}


class FastWeightsState(NamedTuple):
    """A, C and S of each layer (S only with momentum), and how many tokens the open chunk has.

    Weights are float32, or float64 for float64 inputs; where no chunk is open, C is zero.
    """

    anchor: tuple[Float[Tensor, "batch head _ _"], ...]
    change: tuple[Float[Tensor, "batch head _ _"], ...]
    momentum: tuple[Float[Tensor, "batch head _ _"], ...]
    position: Int[Tensor, " batch"]


def fast_weights(
    q,
    k,
    v,
    rate,
    weights,
    norm_weight,
    norm_bias,
    reach,
    log_momentum,
    log_keep,
    state,
    starts,
    chunk,
    gelu,
    norm_eps,
):
    dtype, (batch, time) = accumulation_dtype(v), v.shape[:2]
    initial = [w.to(dtype).expand(batch, *w.shape) for w in weights]
    norm = None if norm_weight is None else (norm_weight.to(dtype), norm_bias.to(dtype), norm_eps)
    nothing = [torch.zeros_like(w) for w in initial]
    if state is None:
        anchor, change, momentum = initial, nothing, nothing
        position = torch.zeros(batch, dtype=torch.int64, device=v.device)
    else:
        anchor, change, momentum = ([w.to(dtype) for w in layers] for layers in state[:3])
        position = state.position
    outputs = []
    gates = [[None] * time if z is None else z.to(dtype)[..., None, None].unbind(1) for z in (log_momentum, log_keep)]
    begins = [None] * time if starts is None else starts[..., None, None, None].unbind(1)
    tokens = (z.to(dtype).unbind(1) for z in (q, k, v, rate))
    for q_t, k_t, v_t, rate_t, log_m, log_a, begin in zip(*tokens, *gates, begins, strict=True):
        if begin is not None:
            anchor = _where(begin, initial, anchor)
            change, momentum = ([z.masked_fill(begin, 0) for z in layers] for layers in (change, momentum))
            position = position.masked_fill(begin.flatten(), 0)
        steps = _gradients(anchor, k_t, v_t, rate_t, norm, gelu)
        if log_m is not None:
            steps = momentum = [log_m.exp() * s + g for s, g in zip(momentum, steps, strict=True)]
        if log_a is not None:
            change = [log_a.exp() * c + log_a.expm1() * a for c, a in zip(change, anchor, strict=True)]
        change = [c - s for c, s in zip(change, steps, strict=True)]
        share = 1 if reach is None else reach.to(dtype)[position][:, None, None, None]
        seen = [a + share * c for a, c in zip(anchor, change, strict=True)]
        outputs.append(_read(seen, q_t, norm, gelu))
        position = position + 1
        full = (position == chunk)[:, None, None, None]
        anchor, change = _where(full, seen, anchor), [c.masked_fill(full, 0) for c in change]
        position = position % chunk
    kept = momentum if log_momentum is not None else ()
    return torch.stack(outputs, 1).to(v.dtype), FastWeightsState(tuple(anchor), tuple(change), tuple(kept), position)


def _where(choose: Tensor, these: list[Tensor], those: list[Tensor]) -> list[Tensor]:
    return [torch.where(choose, this, that) for this, that in zip(these, those, strict=True)]


def _with_one(z: Tensor, weight: Tensor) -> Tensor:
    """``z`` with a one that meets the biases, where ``weight`` has them."""
    return z if weight.shape[-2] == z.shape[-1] else F.pad(z, (0, 1), value=1.0)


def _forward(weights: list[Tensor], z: Tensor, gelu: str) -> tuple[list[Tensor], list[Tensor]]:
    """What enters each layer and what leaves it: ``[batch, head, channel]``."""
    entering, leaving = [], []
    for weight in weights:
        entering.append(_with_one(z, weight))
        leaving.append((entering[-1][..., None] * weight).sum(-2))
        z = F.gelu(leaving[-1], approximate=gelu)
    return entering, leaving


def _read(weights: list[Tensor], z: Tensor, norm: Any, gelu: str) -> Tensor:
    read = _forward(weights, z, gelu)[1][-1]
    if norm is None:
        return read
    scale, bias, eps = norm
    return z + scale * F.layer_norm(read, read.shape[-1:], eps=eps) + bias


def _gradients(weights: list[Tensor], k: Tensor, v: Tensor, rate: Tensor, norm: Any, gelu: str) -> list[Tensor]:
    """``rate * grad |f(k) - v|^2 / 2`` for each layer."""
    entering, leaving = _forward(weights, k, gelu)
    read = leaving[-1]
    if norm is None:
        wrong = read - v
    else:
        scale, bias, eps = norm
        centered = read - read.mean(-1, keepdim=True)
        spread = (centered.square().mean(-1, keepdim=True) + eps).rsqrt()
        unit = centered * spread
        wrong = scale * (k + scale * unit + bias - v)
        wrong = spread * (wrong - wrong.mean(-1, keepdim=True) - unit * (unit * wrong).mean(-1, keepdim=True))
    wrong = rate[..., None] * wrong
    gradients = []
    for index in reversed(range(len(weights))):
        gradients.insert(0, entering[index][..., :, None] * wrong[..., None, :])
        if index:
            before = leaving[index - 1]
            wrong = (weights[index][..., : before.shape[-1], :] * wrong[..., None, :]).sum(-1)
            wrong = torch.ops.aten.gelu_backward(wrong, before, approximate=gelu)
    return gradients


def example(
    batch: int = 2,
    time: int = 37,
    heads: int = 3,
    key: int = 8,
    value: int = 8,
    hidden: tuple[int, ...] = (),
    bias: bool = True,
    norm: bool = True,
    reach: bool = True,
    forgets: bool = False,
    momentum: bool = False,
    chunk: int = 16,
    gelu: Gelu = "tanh",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Any]:
    """Random inputs in legal ranges, as keyword arguments of the operator."""
    random = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def gate(shift: float) -> Tensor:
        return F.logsigmoid(draw(batch, time, heads) + shift).to(wide)

    widths = [key, *hidden, value]
    sizes = [(rows + bias, columns) for rows, columns in pairwise(widths)]

    def layers(*lead: int, scale: float = 1.0) -> tuple[Tensor, ...]:
        return tuple((scale * draw(*lead, heads, *size) / size[0] ** 0.5).to(wide) for size in sizes)

    inputs: dict[str, Any] = {
        "q": draw(batch, time, heads, key).to(dtype),
        "k": (draw(batch, time, heads, key) * key**-0.5).to(dtype),
        "v": draw(batch, time, heads, value).to(dtype),
        "rate": (0.1 * draw(batch, time, heads).sigmoid()).to(wide),
        "weights": layers(),
    }
    if norm:
        inputs["norm_weight"] = (1 + 0.1 * draw(heads, value)).to(wide)
        inputs["norm_bias"] = (0.1 * draw(heads, value)).to(wide)
    if reach:
        inputs["reach"] = (1 / torch.arange(1, chunk + 1) + 0.1 * draw(chunk).abs()).to(wide)
    inputs |= {"log_momentum": gate(0)} if momentum else {}
    inputs |= {"log_keep": gate(3)} if forgets else {}
    last = layers(batch, scale=0.1) if momentum else ()
    position = (1 + 5 * torch.arange(batch) % max(chunk - 1, 1)) % chunk
    inputs["state"] = FastWeightsState(layers(batch), layers(batch, scale=0.1), last, position)
    return inputs | {"chunk": chunk, "gelu": gelu}
