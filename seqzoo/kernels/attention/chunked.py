"""Blocks of tokens against the slots that they see, for any device; the backward pass computes weights again.

With p_ij the weights and D_i = sum_j p_ij (do_i . v_j): dv_j = sum_i p_ij do_i and dl_ij = p_ij (do_i . v_j - D_i),
from which all gradients of logits follow. A sink's weight is s_i = exp(sink - L_i), with L_i the logarithm of the
weights' sum, and its gradient is -sum_i s_i D_i.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.attention.reference import visible
from seqzoo.kernels.backends import accumulation_dtype

# Logits that are in memory at a time, of which there are some copies.
ROOM = 1 << 24


def attention(q, k, v, decay, sink, first, cutoff, window, sinks, prefix, soft_cap, scale):
    return _Attention.apply(q, k, v, decay, sink, first, cutoff, window, sinks, prefix, soft_cap, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, decay, sink, first, cutoff, *settings):
        inputs = (q, k, v, decay, sink, first, cutoff)
        o = v.new_empty(*q.shape[:3], v.shape[3])
        sums = v.new_empty(len(q), q.shape[2], q.shape[1], dtype=accumulation_dtype(v))
        for block in _blocks(inputs, settings):
            block.attend(o, sums)
        ctx.save_for_backward(*inputs, sums)
        ctx.settings = settings
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do):
        *inputs, sums = ctx.saved_tensors
        q, k, v, decay, sink = inputs[:5]
        wide = accumulation_dtype(v)
        dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
        dq, ddecay, dsink = torch.empty_like(q), *(None if x is None else torch.zeros_like(x) for x in (decay, sink))
        for block in _blocks(inputs, ctx.settings):
            block.differentiate(do, sums, dq, dk, dv, ddecay, dsink)
        return dq, dk.to(k.dtype), dv.to(v.dtype), ddecay, dsink, *[None] * 7


class _Block:
    """Tokens ``[start, stop)`` and the spans of slots outside of which none of them sees any."""

    def __init__(self, inputs, settings, start, stop, spans) -> None:
        self.q, self.k, self.v, self.decay, self.sink, self.first, self.cutoff = inputs
        self.window, self.sinks, self.prefix, self.soft_cap, self.scale = settings
        self.start, self.stop, self.spans = start, stop, spans
        self.wide = accumulation_dtype(self.v)

    def _slots(self, x: Tensor, dim: int) -> Tensor:
        parts = [x.narrow(dim, begin, end - begin) for begin, end in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def _tokens(self, x: Tensor) -> Tensor:
        """``[batch group row key]``: heads that share keys are so many more rows of tokens."""
        x = x[:, self.start : self.stop].to(self.wide).unflatten(2, (self.k.shape[2], -1))
        return x.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def _heads(self, x: Tensor) -> Tensor:
        """Rows of groups as ``[batch head token ...]``."""
        return x.unflatten(2, (-1, self.stop - self.start)).flatten(1, 2)

    def _rows(self, x: Tensor) -> Tensor:
        """What ``_heads`` undoes."""
        return x.unflatten(1, (self.k.shape[2], -1)).flatten(2, 3)

    def _logits(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits ``[batch head token slot]``, and what a cap leaves of their gradient."""
        logits, slope = self._heads(q @ k.mT), None
        if self.soft_cap is not None:
            bent = torch.tanh(logits / self.soft_cap)
            logits, slope = self.soft_cap * bent, 1 - bent.square()
        time, slots = self.q.shape[1], self.k.shape[1]
        first = None if self.first is None else self.first[:, self.start : self.stop]
        own = slots - time + self.stop
        hiding = self.window, self.sinks, self.prefix, q.device
        seen = [visible(first, self.stop - self.start, own, *hiding, begin, end) for begin, end in self.spans]
        seen = (seen[0] if len(seen) == 1 else torch.cat(seen, -1))[:, None]
        if self.decay is not None:
            mine = self.decay[..., slots - time + self.start : own, None]
            forgotten = mine - self._slots(self.decay, 2)[..., None, :]
            logits = logits + forgotten.to(self.wide)
            if self.cutoff is not None:
                seen = seen & (forgotten >= self.cutoff[..., None, None])
        return logits.masked_fill(~seen, -torch.inf), slope

    def attend(self, o: Tensor, sums: Tensor) -> None:
        q = self._tokens(self.q) * self.scale
        k, v = (self._slots(x, 1).to(self.wide).transpose(1, 2) for x in (self.k, self.v))
        logits, _ = self._logits(q, k)
        total = logits.logsumexp(-1)
        if self.sink is not None:
            total = torch.logaddexp(total, self.sink.to(self.wide)[:, None])
        weights = (logits - total[..., None]).exp_()
        o[:, self.start : self.stop] = self._heads(self._rows(weights) @ v).transpose(1, 2).to(o.dtype)
        sums[..., self.start : self.stop] = total

    def differentiate(self, do, sums, dq, dk, dv, ddecay, dsink) -> None:
        q = self._tokens(self.q) * self.scale
        k, v = (self._slots(x, 1).to(self.wide).transpose(1, 2) for x in (self.k, self.v))
        do, total = self._tokens(do), sums[..., self.start : self.stop]
        logits, slope = self._logits(q, k)
        weights = (logits - total[..., None]).exp_()
        dlogits = weights * self._heads(do @ v.mT)
        along = dlogits.sum(-1)
        dlogits = dlogits - weights * along[..., None]
        if ddecay is not None:
            begin = self.k.shape[1] - self.q.shape[1] + self.start
            # Of a running sum only what rows and columns do not have in common remains: both must be exact.
            ddecay[..., begin : begin + self.stop - self.start] += dlogits.sum(-1, dtype=ddecay.dtype)
            self._scatter(ddecay, 2, -dlogits.sum(-2, dtype=ddecay.dtype))
        if dsink is not None:
            dsink -= ((self.sink.to(self.wide)[:, None] - total).exp() * along).sum((0, 2)).to(dsink.dtype)
        if slope is not None:
            dlogits = dlogits * slope
        dlogits, weights = self._rows(dlogits), self._rows(weights)
        dq[:, self.start : self.stop] = self._heads(dlogits @ k * self.scale).transpose(1, 2).to(dq.dtype)
        for to, left, right in ((dk, dlogits, q), (dv, weights, do)):
            self._scatter(to, 1, (left.mT @ right).transpose(1, 2))

    def _scatter(self, to: Tensor, dim: int, x: Tensor) -> None:
        for (begin, end), part in zip(self.spans, x.split([e - b for b, e in self.spans], dim), strict=True):
            to.narrow(dim, begin, end - begin).add_(part)


def _blocks(inputs, settings) -> Iterator[_Block]:
    q, k, first, (window, sinks, prefix) = inputs[0], inputs[1], inputs[5], settings[:3]
    batch, time, heads = q.shape[:3]
    slots = k.shape[1]
    # A window makes blocks as wide as itself: half of what they look at is seen. Sinks stand at the beginnings of
    # documents, which only the data knows.
    everywhere = window is None or (sinks > 0 and first is not None)
    width = slots if window is None or everywhere else min(slots, 2 * window + sinks + prefix)
    size = max(1, ROOM // max(1, batch * heads * width))
    size = min(size, time, 512 if window is None else max(window, 64))
    for start in range(0, time, size):
        stop = min(start + size, time)
        begin, end = 0, slots - time + stop
        spans = [(begin, end)]
        if window is not None:
            near = max(0, slots - time + start - window + 1)
            far = near if everywhere else min(prefix + sinks, near)
            spans = [(0, far), (near, end)] if 0 < far < near else [(0 if far else near, end)]
        yield _Block(inputs, settings, start, stop, spans)
