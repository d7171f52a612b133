"""The equation in C++ (native.cpp), for the CPU: one pass over memory forward, one backward that computes it again."""

from __future__ import annotations

import torch

from seqzoo.kernels.native.tensors import DTYPES, Function, dense, fresh
from seqzoo.kernels.torch_operators import define, differentiable

_forward = Function("taylor_features_forward")
_backward = Function("taylor_features_backward")
# Below this many features waking a second thread costs more than it saves.
SMALL = 1 << 15


def taylor_features(x):
    return FORWARD(x.float() if x.dtype == torch.float16 else x).to(x.dtype)


def _run(x):
    y = _fake(x)
    (x,) = dense(x)
    fresh(y)
    if x.numel():
        _forward(*_settings(x, y), x, y)
    return y


def _settings(x, y):
    """What both functions take first: threads, dtype and sizes."""
    threads = torch.get_num_threads() if y.numel() > SMALL else 1
    return threads, DTYPES[x.dtype], x.numel() // x.shape[-1], x.shape[-1]


def _fake(x):
    dim = x.shape[-1]
    return x.new_empty(*x.shape[:-1], 1 + dim + dim * (dim + 1) // 2)


def _run_backward(dy, x):
    dy, x = dense(dy, x)
    dx = x.new_empty(x.shape)
    if x.numel():
        _backward(*_settings(x, dy), dy, x, dx)
    return [dx]


FORWARD = define("taylor_features_native(Tensor x) -> (Tensor y)", _run, _fake, device="CPU")
differentiable(FORWARD, "y_grad, x -> x", _run_backward, device="CPU")
