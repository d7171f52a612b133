"""Blocks of tokens side by side: a convolution inside each, and a scan over their ends.

What a block's tokens do to each other is a convolution with k_j = Re(sum of c e^{jz} w); what they leave behind, and
what the state before does to them, are products with powers of e^z. So states are only made at the ends of blocks,
one for ``BLOCK`` tokens, and all else is real matmuls that the batch shares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqzoo.kernels.backends import accumulation_dtype
from seqzoo.kernels.diagonal_state_space import reference
from seqzoo.kernels.linear_scan.chunked import LinearScan
from seqzoo.kernels.long_conv.chunked import long_conv

BLOCK = 64


def diagonal_state_space(x, exponent, write, read, state, starts):
    if not x.numel():
        return reference.diagonal_state_space(x, exponent, write, read, state, starts)  # nothing to cut into blocks
    dtype = accumulation_dtype(x)
    complex_dtype = torch.promote_types(dtype, torch.complex64)
    time = x.shape[1]
    whole = time - time % BLOCK
    exponent, write, read = (z.to(complex_dtype) for z in (exponent, write, read))
    powers = _powers(exponent, min(time, BLOCK))
    memory = exponent.new_zeros(len(x), *exponent.shape) if state is None else state.to(complex_dtype)
    outputs, u = [], x.to(dtype)
    for begin, end, size in ((0, whole, BLOCK), (whole, time, time - whole)):
        if begin < end:
            begins = None if starts is None else starts[:, begin:end]
            y, memory = _run(u[:, begin:end], exponent, powers[..., : size + 1], write, read, memory, begins)
            outputs.append(y)
    return torch.cat(outputs, 1).to(x.dtype), memory


def _powers(exponent: Tensor, highest: int) -> Tensor:
    """e^{jz} for j from 0 on, ``[channel, state, j]``; angles are wrapped in float64 where there is such a thing."""
    wide = exponent.real.dtype if exponent.device.type == "mps" else torch.float64
    j = torch.arange(highest + 1, dtype=wide, device=exponent.device)
    growth, angle = (part.to(wide)[..., None] * j for part in (exponent.real, exponent.imag))
    return torch.polar(growth.to(exponent.real.dtype).exp(), (angle % (2 * torch.pi)).to(exponent.real.dtype))


def _run(
    u: Tensor, exponent: Tensor, powers: Tensor, write: Tensor, read: Tensor, memory: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs and the last state of ``u`` ``[batch, time, channel]``: blocks of as many tokens as there are steps."""
    batch, size = len(u), powers.shape[-1] - 1
    blocks = u.unflatten(1, (-1, size)).flatten(0, 1)
    begins = begun = None
    entering = blocks
    if starts is not None:
        begins = starts.unflatten(1, (-1, size)).flatten(0, 1)
        begun = begins.cumsum(1)
        entering = blocks.masked_fill((begun < begun[:, -1:])[..., None], 0)
    kernel = ((write * read)[:, None] @ powers[..., :-1]).squeeze(1).real
    y, _ = long_conv(blocks, kernel, None, begins)

    writes = torch.view_as_real(write[..., None] * powers[..., :-1].flip(-1)).transpose(1, 2).flatten(2)
    left = (entering.permute(2, 0, 1) @ writes).unflatten(2, (-1, 2))  # [channel, batch and block, state, 2]
    left = torch.view_as_complex(left).unflatten(1, (batch, -1)).permute(1, 2, 0, 3).flatten(2)
    # Constants go in at the precision that the scan keeps for them.
    wide = exponent.dtype if exponent.device.type == "mps" else torch.complex128
    kept = (exponent.to(wide) * size).exp().flatten()[None, None]
    block_starts = None if begun is None else (begun[:, -1] > 0).unflatten(0, (batch, -1))
    ends, last = LinearScan.apply(kept, left, memory.flatten(1), block_starts)

    before = torch.cat([memory.flatten(1)[:, None], ends[:, :-1]], 1).flatten(0, 1).unflatten(1, memory.shape[1:])
    reads = torch.view_as_real((read[..., None] * powers[..., 1:]).conj().resolve_conj()).transpose(2, 3).flatten(1, 2)
    reached = (torch.view_as_real(before).flatten(2).transpose(0, 1) @ reads).permute(1, 2, 0)
    if begun is not None:
        reached = reached.masked_fill((begun > 0)[..., None], 0)
    return (y + reached).unflatten(0, (batch, -1)).flatten(1, 2), last.unflatten(1, memory.shape[1:])
