"""What chunked recurrences share: cutting time into chunks, decays between their tokens, and a triangular inverse."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def chunk_size(time: int, largest: int) -> int:
    """Tokens in a chunk: ``largest``, or a smaller power of two where a short sequence would leave it mostly empty."""
    for size in (4, 16, 32):
        if time <= size < largest:
            return size
    return largest


class Chunks:
    """A sequence cut into chunks, with the decay between any two tokens of a chunk; nothing passes a document's start.

    Args:
        log_decay: ``[batch, time, head]``, at most 0.
        starts: True where a new document begins.
        largest: tokens in a chunk, a power of two; fewer for short sequences. The end of the last chunk is padded with
            tokens that write nothing and do not decay.
    """

    def __init__(self, log_decay: Tensor, starts: Tensor | None, largest: int) -> None:
        self.size = size = chunk_size(log_decay.shape[1], largest)
        self.padding = -log_decay.shape[1] % size
        if starts is not None:
            # The decay of a first token would act on the document before it, which the masks below remove.
            log_decay = log_decay.masked_fill(starts[..., None], 0)
        self.dtype = log_decay.dtype
        # One strong decay in a long sum would blur all the differences after it; so would one large gradient in the
        # backward, which cumsum(dtype=...) takes in the narrow type. Apple's GPUs have no float64.
        exact = self.dtype if log_decay.device.type == "mps" else torch.float64
        self.total = rearrange(self.split(log_decay), "b n c h -> b n h c").to(exact).cumsum(-1)
        document = None if starts is None else self.split(starts).cumsum(2)[:, :, None]
        order = torch.arange(size, device=log_decay.device)
        self.visible = order[:, None] >= order
        self.reads_state = self.reaches_end = self.keeps_state = None
        if document is not None:
            self.visible = self.visible & (document[..., :, None] == document[..., None, :])
            self.reads_state = document == 0
            self.reaches_end = document == document[..., -1:]
            self.keeps_state = self.reads_state[..., -1]

    def split(self, x: Tensor) -> Tensor:
        """``[batch, time, ...]`` to ``[batch, chunk, token, ...]``."""
        if self.padding:
            x = torch.cat([x, x.new_zeros(x.shape[0], self.padding, *x.shape[2:])], 1)
        return x.unflatten(1, (-1, self.size))

    def decay_between(self) -> Tensor:
        """``[batch, chunk, head, token, token]``: the decay from the column's token to the row's, 0 where unseen."""
        difference = self.total[..., :, None] - self.total[..., None, :]
        return difference.to(self.dtype).masked_fill(~self.visible, -torch.inf).exp()

    def decay_from_start(self) -> Tensor:
        """``[batch, chunk, head, token]``: the decay from the state that enters the chunk to each token, inclusive."""
        return _masked(self.total.exp().to(self.dtype), self.reads_state)

    def decay_to_end(self) -> Tensor:
        """``[batch, chunk, head, token]``: the decay from each token to the chunk's last."""
        return _masked((self.total[..., -1:] - self.total).exp().to(self.dtype), self.reaches_end)

    def decay_over(self) -> Tensor:
        """``[batch, chunk, head]``: the decay over the whole chunk."""
        return _masked(self.total[..., -1].exp().to(self.dtype), self.keeps_state)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(~mask, 0)


class UnitLowerInverse(torch.autograd.Function):
    """``(I + M)^{-1}``, ``M`` what a matrix holds below its diagonal, by doubling diagonal blocks: matmuls alone.

    ``[[A, 0], [B, D]]^{-1} = [[A^{-1}, 0], [-D^{-1} B A^{-1}, D^{-1}]]``. The last two axes must be a power of two.
    Powers of ``M``, which need fewer steps, overflow where keys repeat.
    """

    @staticmethod
    def forward(ctx, lower: Tensor) -> Tensor:
        size = lower.shape[-1]
        inverse = torch.eye(size, dtype=lower.dtype, device=lower.device).expand_as(lower).clone()
        half = 1
        while half < size:
            # The diagonal blocks of twice the size, as views: [..., block, row, column].
            blocks, inverses = (_diagonal_blocks(z, 2 * half) for z in (lower, inverse))
            corner = inverses[..., half:, half:] @ blocks[..., half:, :half] @ inverses[..., :half, :half]
            inverses[..., half:, :half] = -corner
            half *= 2
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ gradient @ inverse.mT).tril(-1)


def _diagonal_blocks(x: Tensor, size: int) -> Tensor:
    tiles = x.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
    return tiles.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
