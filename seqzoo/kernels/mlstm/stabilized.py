"""The stabilizer by a scan, the rest by gated linear attention: the normalizer is one more column of values, all ones.

Outputs do not depend on the stabilizer, so it is a constant to them; only the last state's gradients pass through it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.kernels.backends import accumulation_dtype
from seqzoo.kernels.mlstm.reference import SMALLEST_DENOMINATOR, MLSTMState


def mlstm(gated_linear_attention, q, k, v, input_gate, log_forget, state, starts, multiple=1):
    """Run mLSTM on an implementation of gated linear attention that likes its values in a ``multiple`` of columns."""
    value = v.shape[-1]
    zeros = -(value + 1) % multiple
    dtype = accumulation_dtype(v)
    input_gate, log_forget = input_gate.to(dtype), log_forget.to(dtype)
    first = torch.zeros_like(input_gate[:, 0]) if state is None else state.stabilizer.to(dtype)
    stabilizer = running_maximum(input_gate, log_forget, first, starts)
    constant = stabilizer.detach()
    # The stabilizers first: they may be large, but never their difference. Where a document starts it acts on nothing.
    log_decay = torch.cat([first[:, None], constant[:, :-1]], 1) - constant + log_forget
    k = (k * (input_gate - constant).exp()[..., None]).to(k.dtype)
    memory = None
    if state is not None:
        memory = F.pad(torch.cat([state.memory, state.normalizer[..., None]], -1), (0, zeros))
    columns = F.pad(F.pad(v, (0, 1), value=1.0), (0, zeros))
    o, memory = gated_linear_attention(q, k, columns, log_decay, None, memory, starts)

    floor = (-constant).exp().clamp(min=SMALLEST_DENOMINATOR)
    h = (o[..., :value].to(dtype) / torch.maximum(o[..., value].to(dtype).abs(), floor)[..., None]).to(v.dtype)
    last = stabilizer[:, -1].clone()
    if last.requires_grad:
        # A factor of one: what is kept is divided by e^m.
        memory = memory * (constant[:, -1] - last).exp()[..., None, None]
    # Views would keep what they are cut from.
    return h, MLSTMState(memory[..., :value].contiguous(), memory[..., value].contiguous(), last)


def running_maximum(gain: Tensor, keep: Tensor, first: Tensor, starts: Tensor | None) -> Tensor:
    """``m_t = max(keep_t + m_{t-1}, gain_t)`` over axis 1, ``m_{-1} = first``; a start takes 0 for what was before.

    Each pass doubles how far every token has looked back: sums and maxima of few numbers, where differences of sums
    over the whole sequence would lose all digits.
    """
    if starts is None:
        m = torch.cat([torch.maximum(keep[:, :1] + first[:, None], gain[:, :1]), gain[:, 1:]], 1)
    else:
        before = torch.cat([first[:, None], torch.full_like(gain[:, 1:], -torch.inf)], 1)
        m = torch.maximum(keep + before.masked_fill(starts[..., None], 0), gain)
        keep = keep.masked_fill(starts[..., None], -torch.inf)
    reach, time = 1, gain.shape[1]
    while reach < time:
        m = torch.cat([m[:, :reach], torch.maximum(keep[:, reach:] + m[:, :-reach], m[:, reach:])], 1)
        keep = torch.cat([keep[:, :reach], keep[:, reach:] + keep[:, :-reach]], 1)
        reach *= 2
    return m
