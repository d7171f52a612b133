"""The equation, one token at a time, with all between input and output in float32 or better."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.kernels.backends import accumulation_dtype

VARIANTS = {"skip, gate and bias": {}, "bare": {"bare": True}}
LINEAR_FROM = 40.0  # softplus(x) - x is below float64's rounding from here on; PyTorch's own 20 is right to float32's


def selective_scan(x, dt, A, B, C, D, gate, dt_bias, state, starts):
    dtype = accumulation_dtype(x)
    u, dt, A, B, C = (z.to(dtype) for z in (x, dt, A, B, C))
    delta = F.softplus(dt if dt_bias is None else dt + dt_bias.to(dtype), threshold=LINEAR_FROM)
    batch, time, channels = x.shape
    memory = u.new_zeros(batch, channels, A.shape[1]) if state is None else state.to(dtype)
    begins = [None] * time if starts is None else starts.unbind(1)
    outputs = []
    steps = (u, delta, B, C)
    for u_t, delta_t, B_t, C_t, begin in zip(*(z.unbind(1) for z in steps), begins, strict=True):
        decay = (delta_t[..., None] * A).exp()
        if begin is not None:
            decay = decay.masked_fill(begin[:, None, None], 0)
        memory = decay * memory + (delta_t * u_t)[..., None] * B_t[:, None]
        outputs.append((memory * C_t[:, None]).sum(-1))
    y = torch.stack(outputs, 1)
    if D is not None:
        y = y + D.to(dtype) * u
    if gate is not None:
        y = y * F.silu(gate.to(dtype))
    return y.to(x.dtype), memory


def example(
    batch: int = 2,
    time: int = 37,
    channels: int = 6,
    size: int = 8,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    *,
    bare: bool = False,
) -> dict[str, Tensor]:
    """Random inputs in legal ranges, as keyword arguments of the operator; ``bare`` leaves D, gate and dt_bias out."""
    random = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    inputs = {
        "x": draw(batch, time, channels),
        "dt": draw(batch, time, channels) - 1,
        "A": -draw(channels, size).exp(),
        "B": draw(batch, time, size),
        "C": draw(batch, time, size) * size**-0.5,
        "D": draw(channels),
        "gate": draw(batch, time, channels),
        "dt_bias": draw(channels),
        "state": draw(batch, channels, size),
    }
    if bare:
        inputs = {name: x for name, x in inputs.items() if name not in ("D", "gate", "dt_bias")}
    # Parameters and the state stay wide under mixed precision.
    narrow = ("x", "dt", "B", "C", "gate")
    return {name: x.to(dtype if name in narrow else wide) for name, x in inputs.items()}
