"""A scan of scans in plain torch: blocks of tokens side by side, then their ends as a scan a block's length shorter.

Inside a block, from zero, w_t = a_t w_{t-1} + b_t and p_t = a_t p_{t-1}; then h_t = w_t + p_t h_0, with h_0 the state
that enters the block. That is three operations a token whatever the length, and some thirty calls for each factor of
sixteen in length. Products of a's are multiplied, never divided: strong decay and a = 0 are exact.

The gradient is the same recurrence backwards in time: d_t = g_t + a*_{t+1} d_{t+1}; db_t = d_t and da_t = d_t h*_{t-1}.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seqzoo.kernels.backends import accumulation_dtype

BLOCK = 16


def linear_scan(a, b, state, starts):
    dtype = accumulation_dtype(b)
    if a.ndim == 1:
        # The rounding of a constant's powers would be the same everywhere, and so add up. Apple's GPUs have no float64.
        wide = dtype if a.device.type == "mps" else torch.promote_types(dtype, torch.float64)
        a = a.to(wide)[None, None]
    else:
        a = a.to(dtype)
        if starts is not None:
            a, starts = a.masked_fill(starts[..., None], 0), None
    state = b.new_zeros(b.shape[0], b.shape[2], dtype=dtype) if state is None else state.to(dtype)
    h, last = LinearScan.apply(a, b.to(dtype), state, starts)
    return h.to(b.dtype), last


class LinearScan(torch.autograd.Function):
    """All h and the last one.

    Args:
        a: of the shape of ``b``, or ``[1, 1, channel]`` and then float64 where there is such a thing.
        b: ``[batch, time, channel]``.
        state: ``[batch, channel]``.
        starts: only with a constant ``a``; else ``a`` is 0 at a start.
    """

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, state: Tensor, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h = scan(a, b, state, starts)
        ctx.save_for_backward(a, h, state, starts)
        return h, h[:, -1].clone()

    @staticmethod
    def backward(ctx, h_gradient: Tensor, last_gradient: Tensor) -> tuple[Tensor | None, ...]:
        a, h, state, starts = ctx.saved_tensors
        gradient = h_gradient.flip(1)
        gradient[:, 0] += last_gradient
        # Token t hands its gradient to t - 1 through a_t, so all but the first of these meet a state.
        a, later_starts = a.conj(), None if starts is None else starts.flip(1).roll(1, 1)
        constant = a.shape != h.shape
        handed = a if constant else a.flip(1).roll(1, 1)
        b_gradient = scan(handed, gradient, torch.zeros_like(state), later_starts).flip(1)
        before = torch.cat([state[:, None], h[:, :-1]], 1).conj()
        state_gradient = a[:, 0].to(h.dtype) * b_gradient[:, 0]
        if starts is not None:
            before = before.masked_fill(starts[..., None], 0)
            state_gradient = state_gradient.masked_fill(starts[:, :1], 0)
        a_gradient = b_gradient * before
        if constant:
            a_gradient = a_gradient.sum((0, 1), keepdim=True, dtype=a.dtype)
        return a_gradient.to(a.dtype), b_gradient, state_gradient, None


def scan(a: Tensor, b: Tensor, state: Tensor, starts: Tensor | None = None) -> Tensor:
    """All h, without a gradient of its own."""
    time = b.shape[1]
    if time <= BLOCK:
        begins = None if starts is None else starts[..., None].unbind(1)
        return _walk(a.to(b.dtype).expand(-1, time, -1).unbind(1), b.unbind(1), state, begins, 1)
    begins = begun = None
    if starts is not None:
        blocks = _split(starts[..., None])
        begins, begun = blocks.unbind(2), blocks.cumsum(2) > 0
        starts = begun[:, :, -1, 0]
    a_steps = (a.expand(-1, BLOCK, -1)[:, None] if a.shape[1] == 1 else _split(a)).unbind(2)
    within = _walk([a_t.to(b.dtype) for a_t in a_steps], _split(b).unbind(2), None, begins, 2)
    products = [a_steps[0]]
    for a_t in a_steps[1:]:
        products.append(a_t * products[-1])
    ends = scan(products[-1], within[:, :, -1], state, starts)
    entering = torch.cat([state[:, None], ends[:, :-1]], 1)[:, :, None]
    if begun is not None:
        entering = entering.masked_fill(begun, 0)
    h = torch.addcmul(within, torch.stack(products, 2).to(b.dtype), entering)
    return h.flatten(1, 2)[:, :time]


def _walk(
    a_steps: Sequence[Tensor],
    b_steps: Sequence[Tensor],
    state: Tensor | None,
    begins: Sequence[Tensor] | None,
    axis: int,
) -> Tensor:
    """The recurrence token by token, stacked along ``axis``; a ``state`` of None is zero."""
    outputs = []
    for t, (a_t, b_t) in enumerate(zip(a_steps, b_steps, strict=True)):
        if state is not None and begins is not None:
            state = state.masked_fill(begins[t], 0)
        state = b_t if state is None else torch.addcmul(b_t, a_t, state)
        outputs.append(state)
    return torch.stack(outputs, axis)


def _split(x: Tensor) -> Tensor:
    """``[batch, time, channel]`` to ``[batch, block, token, channel]``, the last block filled up with zeros."""
    padding = -x.shape[1] % BLOCK
    if padding:
        x = torch.cat([x, x.new_zeros(x.shape[0], padding, x.shape[2])], 1)
    return x.unflatten(1, (-1, BLOCK))
