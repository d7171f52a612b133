"""flash-linear-attention's short convolution. Its states have a channel's inputs side by side, one more than ours."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F

from seqzoo.kernels.adapters import by_documents, imported


def short_conv(x, weight, bias, state, starts, activation):
    # The oldest of its inputs meets no weight any more.
    wide = None if state is None else F.pad(state.mT.to(x.dtype), (1, 0))
    run = partial(_run, weight=weight, bias=bias, activation=activation)
    y, last = by_documents(run, (x,), wide, starts)
    return y, last[:, :, 1:].mT.contiguous()


def _run(x, *, weight, bias, activation, **documents):
    return imported("fla.modules.causal_conv1d", "causal_conv1d")(
        x=x, weight=weight, bias=bias, activation=activation, output_final_state=True, **documents
    )  # fmt: skip
