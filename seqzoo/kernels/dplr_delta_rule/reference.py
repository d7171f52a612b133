"""The equation, one token at a time, with the state in float32 or better."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.kernels.backends import accumulation_dtype


def dplr_delta_rule(q, k, v, a, b, log_decay, state, starts):
    dtype = accumulation_dtype(v)
    batch, _, heads, value = v.shape
    memory = v.new_zeros(batch, heads, q.shape[-1], value, dtype=dtype) if state is None else state.to(dtype)
    outputs = []
    inputs = (q, k, v, a, b, log_decay)
    for t, step in enumerate(zip(*(z.to(dtype).unbind(1) for z in inputs), strict=True)):
        q_t, k_t, v_t, a_t, b_t, g_t = step
        if starts is not None:
            memory = memory.masked_fill(starts[:, t, None, None, None], 0)
        read = (memory * a_t[..., None]).sum(-2, keepdim=True)
        memory = memory * g_t.exp()[..., None] + b_t[..., None] * read + k_t[..., None] * v_t[..., None, :]
        outputs.append((memory * q_t[..., None]).sum(-2))
    return torch.stack(outputs, 1).to(v.dtype), memory


VARIANTS: dict[str, dict[str, Any]] = {"decay per channel": {}}


def example(
    batch: int = 2,
    time: int = 37,
    heads: int = 3,
    key: int = 8,
    value: int = 6,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Any]:
    """Random inputs in RWKV-7's ranges, where at most what is there is erased, as keyword arguments of the operator."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    direction = F.normalize(draw(batch, time, heads, key), dim=-1)
    inputs = {
        "q": draw(batch, time, heads, key) * key**-0.5,
        "k": draw(batch, time, heads, key) * key**-0.5,
        "v": draw(batch, time, heads, value),
        "a": -direction,
        "b": direction * draw(batch, time, heads, key).sigmoid(),
    }
    wide = torch.promote_types(dtype, torch.float32)
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    inputs["log_decay"] = (-draw(batch, time, heads, key).exp() / 4).to(wide)
    return inputs | {"state": draw(batch, heads, key, value).to(wide)}
