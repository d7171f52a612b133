"""The equation, one token at a time, with the state in float32 or better."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from seqzoo.kernels.backends import accumulation_dtype, share_heads

VARIANTS = {
    "scalar decay": {},
    "decay per channel": {"decay": "channel"},
    "no decay": {"decay": "none"},
    "bonus, scalar decay": {"bonus": True},
    "bonus, decay per channel": {"decay": "channel", "bonus": True},
    "bonus, no decay": {"decay": "none", "bonus": True},
    "scalar decay, weights and a skip": {"weights": True},
}


def gated_linear_attention(q, k, v, log_decay, bonus, state, starts, write=None, skip=None):
    dtype = accumulation_dtype(v)
    q, k, wide_v = share_heads(q, v).to(dtype), share_heads(k, v).to(dtype), v.to(dtype)
    if log_decay is None:
        log_decay = v.new_zeros(v.shape[:3], dtype=dtype)
    decay = (log_decay if log_decay.ndim == 4 else log_decay[..., None]).to(dtype).exp()
    written = wide_v if write is None else write.to(dtype)[..., None] * wide_v
    batch, time, heads, value = v.shape
    memory = q.new_zeros(batch, heads, q.shape[-1], value) if state is None else state.to(dtype)
    begins = [None] * time if starts is None else starts[..., None, None, None].unbind(1)
    outputs = []
    for q_t, k_t, v_t, a_t, begin in zip(*(z.unbind(1) for z in (q, k, written, decay)), begins, strict=True):
        if begin is not None:
            memory = memory.masked_fill(begin, 0)
        pair = k_t[..., :, None] * v_t[..., None, :]
        read = None if bonus is None else memory + bonus.to(dtype)[..., None] * pair
        memory = a_t[..., None] * memory + pair
        outputs.append(((memory if read is None else read) * q_t[..., :, None]).sum(-2))
    o = torch.stack(outputs, 1)
    return (o if skip is None else o + skip.to(dtype)[:, None] * wide_v).to(v.dtype), memory


def example(
    batch: int = 2,
    time: int = 37,
    groups: int = 2,
    heads: int = 4,
    key: int = 8,
    value: int = 6,
    decay: Literal["scalar", "channel", "none"] = "scalar",
    bonus: bool = False,
    weights: bool = False,
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
    }
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    wide = torch.promote_types(dtype, torch.float32)
    if decay != "none":
        inputs["log_decay"] = -draw(batch, time, heads, *[key] * (decay == "channel")).exp().to(wide) / 4
    if bonus:
        inputs["bonus"] = draw(heads, key).to(dtype)
    if weights:
        inputs["write"] = draw(batch, time, heads).exp().to(wide) / 2
        inputs["skip"] = draw(heads).to(wide)
    return inputs | {"state": draw(batch, heads, key, value).to(wide)}
