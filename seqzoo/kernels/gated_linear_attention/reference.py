"""The equation, one token at a time, with the state in float32 or better."""

from __future__ import annotations

import torch
from torch import Tensor

from seqzoo.kernels.backends import accumulation_dtype, share_heads


def gated_linear_attention(q, k, v, log_decay, state, starts):
    dtype = accumulation_dtype(v)
    q, k = share_heads(q, v).to(dtype), share_heads(k, v).to(dtype)
    decay = log_decay.to(dtype).exp()
    if starts is not None:
        decay = decay.masked_fill(starts[..., None], 0)
    batch, _, heads, value = v.shape
    memory = q.new_zeros(batch, heads, q.shape[-1], value) if state is None else state.to(dtype)
    outputs = []
    for q_t, k_t, v_t, a_t in zip(q.unbind(1), k.unbind(1), v.to(dtype).unbind(1), decay.unbind(1), strict=True):
        memory = a_t[..., None, None] * memory + k_t[..., :, None] * v_t[..., None, :]
        outputs.append((memory * q_t[..., :, None]).sum(-2))
    return torch.stack(outputs, 1).to(v.dtype), memory


VARIANTS = {"scalar decay": {}}


def example(
    batch: int = 2,
    time: int = 37,
    groups: int = 2,
    heads: int = 4,
    key: int = 8,
    value: int = 6,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random inputs in legal ranges, as keyword arguments of the operator."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    inputs = {
        "q": draw(batch, time, groups, key) * key**-0.5,
        "k": draw(batch, time, groups, key),
        "v": draw(batch, time, heads, value),
        "log_decay": -draw(batch, time, heads).exp() / 4,
    }
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    return inputs | {"state": draw(batch, heads, key, value).to(torch.promote_types(dtype, torch.float32))}
