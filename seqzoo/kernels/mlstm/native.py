"""The C++ kernel of native.cpp for a few tokens without gradients; more go through gated linear attention's kernels."""

from __future__ import annotations

import torch

from seqzoo.kernels.backends import accumulation_dtype
from seqzoo.kernels.gated_linear_attention import native
from seqzoo.kernels.mlstm import stabilized
from seqzoo.kernels.mlstm.reference import SMALLEST_DENOMINATOR, MLSTMState
from seqzoo.kernels.native.tensors import DTYPES, Function, dense
from seqzoo.kernels.torch_operators import define

FEW = 16

_STEPS = Function("mlstm_steps")


def mlstm(q, k, v, input_gate, log_forget, state, starts):
    if v.dtype == torch.float16:
        # The kernels know no float16; and what the normalizer cancels is better rounded after the division.
        h, state = mlstm(q.float(), k.float(), v.float(), input_gate, log_forget, state, starts)
        return h.to(v.dtype), state
    inputs = q, k, v, input_gate, log_forget
    learned = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *(state or ())))
    if v.shape[1] > FEW or learned:
        return stabilized.mlstm(native.gated_linear_attention, *inputs, state, starts)
    h, *after = STEPS(*inputs, *(state or (None, None, None)), starts)
    return h, MLSTMState(*after)


def _run(q, k, v, input_gate, log_forget, memory, normalizer, stabilizer, starts):
    batch, time, heads, key = q.shape
    wide, value = accumulation_dtype(v), v.shape[3]
    h, *after = _fake(q, k, v, input_gate, log_forget, memory, normalizer, stabilizer, starts)
    # Waking a thread takes as long as a hundred thousand numbers of a state.
    threads = min(torch.get_num_threads(), 1 + (time * batch * heads * key * value >> 17))
    wides = (None if x is None else x.to(wide) for x in (input_gate, log_forget, memory, normalizer, stabilizer))
    q, k, v, starts, *wides = dense(q, k, v, starts, *wides)
    sizes = batch, time, heads, key, value
    _STEPS(DTYPES[v.dtype], threads, *sizes, q, k, v, *wides[:2], starts, *wides[2:], h, *after, SMALLEST_DENOMINATOR)
    return h, *after


def _fake(q, k, v, input_gate, log_forget, memory, normalizer, stabilizer, starts):
    batch, _, heads, key = q.shape
    wide = accumulation_dtype(v)
    memory = v.new_empty(batch, heads, key, v.shape[3], dtype=wide)
    return v.new_empty(v.shape), memory, memory.new_empty(batch, heads, key), memory.new_empty(batch, heads)


STEPS = define(
    "mlstm_native_steps(Tensor q, Tensor k, Tensor v, Tensor input_gate, Tensor log_forget, Tensor? memory, "
    "Tensor? normalizer, Tensor? stabilizer, Tensor? starts) -> (Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
    device="CPU",
)
