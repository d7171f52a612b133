"""What chunked recurrences share: cutting time into chunks, decays between their tokens, and a triangular inverse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# A stronger decay, -inf too, leaves as little: e^STRONGEST is 0 in float64. Differences of sums of it stay numbers.
STRONGEST = -800.0


def chunk_size(time: int, largest: int) -> int:
    """Tokens in a chunk: ``largest``, or a smaller power of two where a short sequence would leave it mostly empty."""
    for size in (4, 16, 32):
        if time <= size < largest:
            return size
    return largest


class Documents:
    """A sequence cut into chunks, and what its documents' starts let a token of a chunk see.

    Args:
        time: tokens in the sequence.
        starts: True where a new document begins.
        largest: tokens in a chunk, a power of two; fewer for short sequences. The end of the last chunk is padded with
            tokens that write nothing and do not decay.
        device: where the sequence lives.
    """

    def __init__(self, time: int, starts: Tensor | None, largest: int, device: torch.device) -> None:
        self.size = chunk_size(time, largest)
        self.padding = -time % self.size
        order = torch.arange(self.size, device=device)
        self.visible = order[:, None] >= order
        self.earlier = order[:, None] > order
        self.starts = starts
        self.reads_state = self.reaches_end = self.keeps_state = None
        if starts is not None:
            document = self.split(starts).cumsum(2)[:, :, None]
            same = document[..., :, None] == document[..., None, :]
            self.visible, self.earlier = self.visible & same, self.earlier & same
            self.reads_state = document == 0
            self.reaches_end = document == document[..., -1:]
            self.keeps_state = self.reads_state[..., -1]

    def split(self, x: Tensor) -> Tensor:
        """``[batch, time, ...]`` to ``[batch, chunk, token, ...]``."""
        if self.padding:
            x = torch.cat([x, x.new_zeros(x.shape[0], self.padding, *x.shape[2:])], 1)
        return x.unflatten(1, (-1, self.size))

    def split_decay(self, log_decay: Tensor) -> Tensor:
        """``split`` without the decays of first tokens: those would act on the document before, which is unseen."""
        log_decay = log_decay.clamp(min=STRONGEST)
        if self.starts is not None:
            log_decay = log_decay.masked_fill(self.starts[(..., *[None] * (log_decay.ndim - 2))], 0)
        return self.split(log_decay)


class Chunks(Documents):
    """The decay between any two tokens of a chunk, one for each head; nothing passes a document's start.

    Args:
        log_decay: ``[batch, time, head]``, at most 0.
        starts: as in ``Documents``.
        largest: as in ``Documents``.
    """

    def __init__(self, log_decay: Tensor, starts: Tensor | None, largest: int) -> None:
        super().__init__(log_decay.shape[1], starts, largest, log_decay.device)
        self.dtype = log_decay.dtype
        # One strong decay in a long sum would blur all the differences after it; so would one large gradient in the
        # backward, which cumsum(dtype=...) takes in the narrow type. Apple's GPUs have no float64.
        exact = self.dtype if log_decay.device.type == "mps" else torch.float64
        self.total = rearrange(self.split_decay(log_decay), "b n c h -> b n h c").to(exact).cumsum(-1)

    def decay_between(self, before: bool = False) -> Tensor:
        """``[batch, chunk, head, token, token]``: the decay from the column's token to the row's, 0 where unseen.

        With ``before`` the row reads ahead of its own decay and write, so that it sees strictly earlier tokens.
        """
        row, seen = (self._total_before(), self.earlier) if before else (self.total, self.visible)
        difference = row[..., :, None] - self.total[..., None, :]
        return difference.to(self.dtype).masked_fill(~seen, -torch.inf).exp()

    def decay_from_start(self, before: bool = False) -> Tensor:
        """``[batch, chunk, head, token]``: the decay from the state that enters the chunk to each token.

        The token's own decay is left out with ``before``.
        """
        total = self._total_before() if before else self.total
        return _masked(total.exp().to(self.dtype), self.reads_state)

    def decay_to_end(self) -> Tensor:
        """``[batch, chunk, head, token]``: the decay from each token to the chunk's last."""
        return _masked((self.total[..., -1:] - self.total).exp().to(self.dtype), self.reaches_end)

    def decay_over(self) -> Tensor:
        """``[batch, chunk, head]``: the decay over the whole chunk."""
        return _masked(self.total[..., -1].exp().to(self.dtype), self.keeps_state)

    def _total_before(self) -> Tensor:
        return F.pad(self.total[..., :-1], (1, 0))


class ChannelChunks(Documents):
    """The same with a decay for each channel of the keys, which cannot leave the product of queries and keys.

    A chunk is halved down to single tokens. The tokens of a later half meet those of the earlier one at the border
    between them: ``e^{G_i - G_border}`` goes to the query, ``e^{G_border - G_j}`` to the key. All exponents are sums of
    decays, at most 0, and no large sums are subtracted, so nothing overflows or cancels however strong a decay is.

    Args:
        log_decay: ``[batch, time, head, key]``, at most 0.
        starts: as in ``Documents``.
        largest: as in ``Documents``.
    """

    def __init__(self, log_decay: Tensor, starts: Tensor | None, largest: int) -> None:
        super().__init__(log_decay.shape[1], starts, largest, log_decay.device)
        step = rearrange(self.split_decay(log_decay), "b n c h k -> b n h c k")
        # Sums from the first token of a block up to each token, with and without its own decay, and from each to the
        # block's end, for blocks of 1, 2, 4, ... tokens: [batch, chunk, head, block, token, key].
        through, total = step[..., None, :], step[..., None, :]
        before = after = torch.zeros_like(through)
        self.levels = []
        for _ in range(self.size.bit_length() - 1):
            through, before, after = (z.unflatten(3, (-1, 2)) for z in (through, before, after))
            first, second = total.unflatten(3, (-1, 2)).unbind(4)
            self.levels.append((through[..., 1, :, :], before[..., 1, :, :], after[..., 0, :, :]))
            through, before = (_join(z[..., 0, :, :], z[..., 1, :, :] + first) for z in (through, before))
            after = _join(after[..., 0, :, :] + second, after[..., 1, :, :])
            total = first + second
        self.through, self.ahead, self.after, self.total = (z.squeeze(3) for z in (through, before, after, total))

    def scores(self, q: Tensor, k: Tensor, before: bool = False) -> Tensor:
        """``[batch, chunk, head, token, token]``: decayed products of ``[batch, chunk, head, token, key]``.

        ``before`` as in ``Chunks.decay_between``.
        """
        q, k = q.unsqueeze(-2), k.unsqueeze(-2)
        own = (q * k).sum(-1, keepdim=True)
        scores = torch.zeros_like(own) if before else own
        for through, ahead, after in self.levels:
            later, earlier = (z.unflatten(3, (-1, 2)) for z in (q, k))
            reads = later[..., 1, :, :] * (ahead if before else through).exp()
            writes = earlier[..., 0, :, :] * after.exp()
            first, second = scores.unflatten(3, (-1, 2)).unbind(4)
            second = torch.cat([reads @ writes.mT, second], -1)
            scores = torch.cat([F.pad(first, (0, first.shape[-1])), second], -2)
            q, k = later.flatten(4, 5), earlier.flatten(4, 5)
        return scores.squeeze(3).masked_fill(~(self.earlier if before else self.visible), 0)

    def decay_from_start(self, before: bool = False) -> Tensor:
        """``[batch, chunk, head, token, key]``, as in ``Chunks``."""
        return _masked((self.ahead if before else self.through).exp(), _spread(self.reads_state))

    def decay_to_end(self) -> Tensor:
        """``[batch, chunk, head, token, key]``, as in ``Chunks``."""
        return _masked(self.after.exp(), _spread(self.reaches_end))

    def decay_over(self) -> Tensor:
        """``[batch, chunk, head, key]``, as in ``Chunks``."""
        return _masked(self.total.squeeze(-2).exp(), _spread(self.keeps_state))


def _join(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, second], -2)


def _spread(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[..., None]


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
