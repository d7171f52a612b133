"""The equation in plain PyTorch, for any device, with everything inside in float32 or better."""

from __future__ import annotations

import torch


def token_shift(x, mix, last, starts, more, dtype):
    wide = torch.promote_types(x.dtype, torch.float32)
    x = x.to(wide)
    first = torch.zeros_like(x[:, :1]) if last is None else last[:, None].to(wide)
    before = torch.cat([first, x[:, :-1]], 1)
    if starts is not None:
        before = before.masked_fill(starts[..., None], 0)
    back = before - x
    mixes = mix.to(wide) if more is None else mix.to(wide)[:, None, None] + more.to(wide)
    return tuple(torch.addcmul(x, back, one).to(dtype) for one in mixes)
