"""The Triton kernels as ops of torch: one for the forward, one for the backward."""

from __future__ import annotations

from seqzoo.kernels.torch_operators import define, differentiable
from seqzoo.kernels.triton_support import DEVICES, launcher


def _fake(x, gate, weight, bias, groups, eps, scale, centered, activation, gate_first):
    return x.new_empty(x.shape)


_FORWARD = define(
    "gated_norm_triton(Tensor x, Tensor? gate, Tensor? weight, Tensor? bias, int groups, float eps, float scale,"
    " bool centered, str activation, bool gate_first) -> (Tensor y)",
    launcher("gated_norm", "forward"),
    _fake,
    device=DEVICES,
)
differentiable(
    _FORWARD,
    "y_grad, x, gate, weight, bias, groups, eps, scale, centered, activation, gate_first -> x, gate, weight, bias",
    launcher("gated_norm", "backward"),
    device=DEVICES,
)


def gated_norm(x, gate, weight, bias, groups, eps, scale, centered, activation, gate_first):
    return _FORWARD(x, gate, weight, bias, groups, eps, scale, centered, activation, gate_first)
