"""The convolution of Mamba's authors: channels in front of time, and a state, but no documents next to it."""

from __future__ import annotations

from seqzoo.kernels.adapters import imported


def short_conv(x, weight, bias, state, starts, activation):
    if starts is not None:
        raise ValueError("short_conv: backend='causal_conv1d' takes no starts; use triton or chunked")
    bias = None if bias is None else bias.to(x.dtype)
    initial = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2]) if state is None else state.to(x.dtype)
    # The kernel returns states only for channels that lie next to each other, which transposed views are.
    y, last = imported("causal_conv1d", "causal_conv1d_fn")(
        x=x.contiguous().mT, weight=weight.to(x.dtype), bias=bias, initial_states=initial.contiguous().mT,
        return_final_states=True, activation=activation,
    )  # fmt: skip
    return y.mT, last.mT.contiguous()
