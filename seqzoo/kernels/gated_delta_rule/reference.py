"""The equation, one token at a time, with the state in float32 or better."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.kernels.backends import accumulation_dtype, share_heads

VARIANTS = {"scalar decay": {}, "decay per channel": {"decay": "channel"}, "no decay": {"decay": "none"}}


def gated_delta_rule(q, k, v, log_decay, beta, state, starts):
    dtype = accumulation_dtype(v)
    q, k, beta = share_heads(q, v).to(dtype), share_heads(k, v).to(dtype), beta.to(dtype)
    decay = torch.ones_like(beta) if log_decay is None else log_decay.to(dtype).exp()
    if decay.ndim == 3:
        decay = decay[..., None]
    if starts is not None:
        decay = decay.masked_fill(starts[..., None, None], 0)
    batch, _, heads, value = v.shape
    memory = q.new_zeros(batch, heads, q.shape[-1], value) if state is None else state.to(dtype)
    outputs = []
    for q_t, k_t, v_t, a_t, b_t in zip(*(z.unbind(1) for z in (q, k, v.to(dtype), decay, beta)), strict=True):
        memory = a_t[..., None] * memory
        stored = (memory * k_t[..., :, None]).sum(-2)
        memory = memory + k_t[..., :, None] * (b_t[..., None] * (v_t - stored))[..., None, :]
        outputs.append((memory * q_t[..., :, None]).sum(-2))
    return torch.stack(outputs, 1).to(v.dtype), memory


def example(
    batch: int = 2,
    time: int = 37,
    groups: int = 2,
    heads: int = 4,
    key: int = 8,
    value: int = 6,
    decay: Literal["scalar", "channel", "none"] = "scalar",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Random inputs in legal ranges, as keyword arguments of the operator."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    inputs = {
        "q": F.normalize(draw(batch, time, groups, key), dim=-1) * key**-0.5,
        "k": F.normalize(draw(batch, time, groups, key), dim=-1),
        "v": draw(batch, time, heads, value),
        "log_decay": -draw(batch, time, heads, *[key] * (decay == "channel")).exp() / 4,
        "beta": draw(batch, time, heads).sigmoid(),
    }
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    state = draw(batch, heads, key, value).to(torch.promote_types(dtype, torch.float32))
    return inputs | {"state": state} | ({"log_decay": None} if decay == "none" else {})
