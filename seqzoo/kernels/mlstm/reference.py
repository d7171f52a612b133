"""The stabilised equation, one token at a time, with the state in float32 or better."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from seqzoo.kernels.backends import accumulation_dtype

SMALLEST_DENOMINATOR = 1e-12

VARIANTS = {"moderate input gates": {}, "input gates beyond the range of exp": {"log_input": 100.0}}


class MLSTMState(NamedTuple):
    """C and n, divided by e^m, and m."""

    memory: Float[Tensor, "batch head key value"]
    normalizer: Float[Tensor, "batch head key"]
    stabilizer: Float[Tensor, "batch head"]


def mlstm(q, k, v, input_gate, log_forget, state, starts):
    dtype = accumulation_dtype(v)
    batch, time, heads, value = v.shape
    if state is None:
        sizes = batch, heads, q.shape[3], value
        state = MLSTMState(*(v.new_zeros(sizes[:axes], dtype=dtype) for axes in (4, 3, 2)))
    memory, normalizer, stabilizer = (z.to(dtype) for z in state)
    begins = [None] * time if starts is None else starts[..., None].unbind(1)
    outputs = []
    tokens = (z.to(dtype).unbind(1) for z in (q, k, v, input_gate, log_forget))
    for q_t, k_t, v_t, i_t, f_t, begin in zip(*tokens, begins, strict=True):
        if begin is not None:
            memory = memory.masked_fill(begin[..., None, None], 0)
            normalizer = normalizer.masked_fill(begin[..., None], 0)
            stabilizer = stabilizer.masked_fill(begin, 0)
        before, stabilizer = stabilizer, torch.maximum(f_t + stabilizer, i_t)
        keep, write = (f_t + before - stabilizer).exp()[..., None], (i_t - stabilizer).exp()[..., None] * k_t
        memory = keep[..., None] * memory + write[..., :, None] * v_t[..., None, :]
        normalizer = keep * normalizer + write
        overlap = (normalizer * q_t).sum(-1).abs()
        denominator = torch.maximum(overlap, (-stabilizer).exp().clamp(min=SMALLEST_DENOMINATOR))
        outputs.append((memory * q_t[..., :, None]).sum(-2) / denominator[..., None])
    return torch.stack(outputs, 1).to(v.dtype), MLSTMState(memory, normalizer, stabilizer)


def example(
    batch: int = 2,
    time: int = 37,
    heads: int = 4,
    key: int = 8,
    value: int = 6,
    log_input: float = 0.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Any]:
    """Random inputs in legal ranges, as keyword arguments of the operator."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    # Entries of one sign: where n . q passes zero the quotient is ill-conditioned, and errors there mean nothing.
    sign = draw(batch, time, heads, 1).sign()
    wide = torch.promote_types(dtype, torch.float32)
    inputs = {
        "q": (sign * draw(batch, time, heads, key).abs()).to(dtype),
        "k": (draw(batch, time, heads, key).abs() * key**-0.5).to(dtype),
        "v": draw(batch, time, heads, value).to(dtype),
        "input_gate": (log_input + draw(batch, time, heads)).to(wide),
        "log_forget": F.logsigmoid(draw(batch, time, heads) + 2).to(wide),
    }
    state = draw(batch, heads, key, value), draw(batch, heads, key).abs(), log_input + draw(batch, heads)
    return inputs | {"state": MLSTMState(*(z.to(wide) for z in state))}
