"""The WY form: a triangular inverse inside each chunk, a short recurrence between chunks (Yang et al. 2024, section 3).

With G the running sum of g inside a chunk, S the state that enters it, and M_ij = beta_i (k_i . k_j e^{G_i - G_j}) for
j < i, where decays of key channels act inside the product:

    N = (I + M)^{-1} (beta V - (beta K e^G) S),    O = (Q e^G) S + (Q K^T e^{G_i - G_j}) N,
    S' = e^{G_C} S + (K e^{G_C - G})^T N
"""

from __future__ import annotations

from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from seqzoo.kernels.backends import accumulation_dtype, share_heads
from seqzoo.kernels.chunks import Chunks, UnitLowerInverse
from seqzoo.kernels.segments import by_segments

CHUNK = 32


def gated_delta_rule(q, k, v, log_decay, beta, state, starts):
    return by_segments(_segment, (q, k, v, log_decay, beta), state, starts)


def _segment(q, k, v, log_decay, beta, state, starts):
    dtype, time = accumulation_dtype(v), v.shape[1]
    if log_decay is None:
        log_decay = torch.zeros_like(beta)
    per_channel = log_decay.ndim == 4
    # Chunks without decay are what documents hide from each other.
    chunks = Chunks(torch.zeros_like(beta, dtype=dtype) if per_channel else log_decay.to(dtype), starts, CHUNK)
    split = partial(_split, chunks, dtype)
    q, k, values, beta = split(share_heads(q, v)), split(share_heads(k, v)), split(v), split(beta[..., None])
    from_start, to_end = chunks.decay_from_start()[..., None], chunks.decay_to_end()[..., None]
    keep = chunks.decay_over()[..., None, None]

    readers = torch.stack([q, beta * k])
    if per_channel:
        if starts is not None:
            log_decay = log_decay.masked_fill(starts[..., None, None], 0)
        products, since, until, over = _products_under_channel_decay(readers, k, split(log_decay))
        from_start, to_end, keep = from_start * since, to_end * until, keep * over.mT
    else:
        products = readers @ k.mT
    scores, overlaps = (products * chunks.decay_between()).unbind(0)
    (q, written), k = (readers * from_start).unbind(0), k * to_end

    solve = UnitLowerInverse.apply(overlaps)
    steps = solve @ (beta * values), solve @ written, k.mT, keep
    memory = k.new_zeros(k.shape[0], *k.shape[2:3], k.shape[-1], v.shape[-1]) if state is None else state.to(dtype)
    entering, corrected = [], []
    for value, read, write, kept in zip(*(z.unbind(1) for z in steps), strict=True):
        new = value - read @ memory
        entering.append(memory)
        corrected.append(new)
        memory = kept * memory + write @ new
    o = q @ torch.stack(entering, 1) + scores @ torch.stack(corrected, 1)
    return rearrange(o, "b n h c d -> b (n c) h d")[:, :time].to(v.dtype), memory


def _split(chunks: Chunks, dtype: torch.dtype, x: Tensor) -> Tensor:
    return rearrange(chunks.split(x.to(dtype)), "b n c h d -> b n h c d")


def _products_under_channel_decay(rows: Tensor, keys: Tensor, log_decay: Tensor) -> tuple[Tensor, ...]:
    """``[..., token, token]``: rows times keys, each channel decayed from the key's token to the row's; 0 above.

    Also the decays from the chunk's start to each token and from there to its end, ``[..., token, key]``, and over the
    whole chunk, ``[..., 1, key]``.

    Blocks of tokens are joined two by two, from single tokens up. What a row in the second block sees of a key in the
    first has decayed from the key to where the blocks meet, and from there to the row: no decay is ever undone, so no
    exponent is above 0, and sums of decays never cancel.
    """
    products = (rows * keys).sum(-1)[..., None, None]
    since, until = log_decay[..., None, :], torch.zeros_like(log_decay)[..., None, :]
    while (block := since.shape[-2]) < keys.shape[-2]:
        (since, later), (earlier, until) = _pairs(since), _pairs(until)
        _, seeing = _pairs(rows.unflatten(-2, (-1, block)))
        seen, _ = _pairs(keys.unflatten(-2, (-1, block)))
        corner = (seeing * later.exp()) @ (seen * earlier.exp()).mT
        first, second = _pairs(products)
        top, bottom = torch.cat([first, torch.zeros_like(corner)], -1), torch.cat([corner, second], -1)
        products = torch.cat([top, bottom], -2)
        since, until = (
            torch.cat([since, later + since[..., -1:, :]], -2),
            torch.cat([earlier + later[..., -1:, :], until], -2),
        )
    since, until = since[..., 0, :, :], until[..., 0, :, :]
    return products[..., 0, :, :], since.exp(), until.exp(), since[..., -1:, :].exp()


def _pairs(blocks: Tensor) -> tuple[Tensor, ...]:
    """The first and the second of every two blocks of ``[..., block, row, column]``."""
    return blocks.unflatten(-3, (-1, 2)).unbind(-3)
