"""Fast Fourier transforms over segments of twice the kernel's length: O(T log size) operations, O(T) memory.

Where documents begin, a segment is halved down to single tokens. Of the tokens of an earlier half, only those of the
document that spans the border reach the later half: so two masks and a transform a level are exact for any starts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqzoo.kernels.backends import accumulation_dtype
from seqzoo.kernels.long_conv import reference
from seqzoo.kernels.segments import SEGMENT, by_segments


def long_conv(x, kernel, state, starts):
    dtype = accumulation_dtype(x)
    if not x.numel():
        return reference.long_conv(x, kernel, state, starts)  # there are no transforms of nothing
    filters = kernel.to(dtype)
    # Time last, where transforms run: [batch, channel, time].
    past = None if state is None else state.to(dtype)

    def run(x, past, starts):
        u, history = x.to(dtype).mT, filters.shape[1] - 1
        seen = x.new_zeros(len(x), history, x.shape[2], dtype=dtype) if past is None else past
        if starts is None:
            y = _convolve(u if past is None else torch.cat([past.mT, u], -1), filters)[..., -u.shape[-1] :]
        else:
            document = starts.cumsum(1)
            y = _within_documents(u, filters, document)
            if past is not None:
                reached = _convolve(torch.cat([past.mT, torch.zeros_like(u)], -1), filters)[..., history:]
                y = y + reached.masked_fill(document[:, None] > 0, 0)
            seen = seen.masked_fill(document[:, -1:, None] > 0, 0)
            x = x.masked_fill((document < document[:, -1:])[..., None], 0)
        time = x.shape[1]
        return y.mT.to(x.dtype), torch.cat([seen[:, time:], x[:, max(time - history, 0) :].to(dtype)], 1)

    y, last = by_segments(run, (x,), past, starts, max(SEGMENT, filters.shape[1]))
    return y, last.to(x.dtype if state is None else state.dtype)


class Convolution(torch.autograd.Function):
    """The circular convolution over ``size`` of ``[batch, channel, ..., time]`` with ``[channel, taps]``, by transform.

    The backward is written out because what autograd would keep for it are conjugates that are not computed yet, whose
    sign PyTorch 2.13's compiler loses where it changes their layout. It also transforms real numbers only.
    """

    @staticmethod
    def forward(ctx, u: Tensor, filters: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(u, filters)
        ctx.size = size
        return torch.fft.irfft(torch.fft.rfft(u, size) * _spectrum(filters, u.ndim, size), size)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        u, filters = ctx.saved_tensors
        size, others = ctx.size, [0, *range(2, u.ndim - 1)]
        spectrum = torch.fft.rfft(gradient, size)
        of_u = torch.fft.irfft(spectrum * _spectrum(filters, u.ndim, size).conj_physical(), size)
        of_filters = torch.fft.irfft((spectrum * torch.fft.rfft(u, size).conj_physical()).sum(others), size)
        return of_u[..., : u.shape[-1]], of_filters[..., : filters.shape[1]], None


def _spectrum(filters: Tensor, ndim: int, size: int) -> Tensor:
    """The transform of ``[channel, taps]``, ready to meet ``[batch, channel, ..., frequency]`` with ``ndim`` axes."""
    return torch.fft.rfft(filters, size).unflatten(0, (-1, *[1] * (ndim - 3)))


def _convolve(u: Tensor, filters: Tensor) -> Tensor:
    """The causal convolution of ``[batch, channel, time]`` with ``[channel, size]``, zeros in front."""
    time = u.shape[-1]
    taps = min(filters.shape[1], time)
    size = 1 << (time + taps - 2).bit_length()
    return Convolution.apply(u, filters[:, :taps], size)[..., :time]


def _within_documents(u: Tensor, filters: Tensor, document: Tensor) -> Tensor:
    """The same, from tokens of a document to tokens of the same document: ``document`` is ``[batch, time]``."""
    time = u.shape[-1]
    length = 1 << (time - 1).bit_length()
    padding = length - time
    u, document = torch.nn.functional.pad(u, (0, padding)), torch.nn.functional.pad(document, (0, padding), value=-1)
    y, half = u * filters[:, :1], 1
    while half < length:
        blocks, number = u.unflatten(-1, (-1, 2, half)), document.unflatten(-1, (-1, 2, half))[:, None]
        # The document of the later half's first token, where it reaches back into the earlier half.
        spanning = number[..., 1:, :1]
        outside = number != spanning
        earlier = blocks[..., 0, :].masked_fill(outside[..., 0, :], 0)
        reached = Convolution.apply(earlier, filters[:, : 2 * half], 2 * half)[..., half:]
        later = reached.masked_fill(outside[..., 1, :], 0)
        y = y + torch.stack([torch.zeros_like(later), later], -2).flatten(-3)
        half *= 2
    return y[..., :time]
