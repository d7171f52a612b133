"""A memory that is a small network, trained by gradient descent while it reads: TTT, and Titans' neural memory.

The network is a linear map, or an MLP with gelu between its layers; f_W adds a residual layer norm where there is one:

    M_W(z) = W_n gelu(... gelu(W_1 z)),    f_W(z) = z + layernorm(M_W(z))  or  f_W(z) = M_W(z)

Tokens come in chunks. A is what the weights were before a chunk, where the gradients of all its tokens are taken:

    S_t = momentum_t S_{t-1} + rate_t grad_A |f_A(k_t) - v_t|^2 / 2
    A + C_t = keep_t (A + C_{t-1}) - S_t,    W_t = A + reach C_t,    o_t = f_{W_t}(q_t)

and after the chunk's last token A becomes W, and C zero. Without momentum, S is the gradient alone. TTT (Sun et al.
2024, https://arxiv.org/abs/2407.04620) has the norm, a reach for each place in a chunk, and keeps everything; Titans
(Behrouz et al. 2024, https://arxiv.org/abs/2501.00663) has momentum, forgets, and reaches all the way.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqzoo.kernels.backends import (
    check_floats,
    check_kind,
    check_kind_of_state,
    check_log_decay,
    check_numbers,
    check_shape,
    dispatch,
    explained,
)
from seqzoo.kernels.fast_weights import chunked, native, reference
from seqzoo.kernels.fast_weights.reference import GELUS, FastWeightsState, Gelu

IMPLEMENTATIONS = {
    "reference": reference.fast_weights,
    "chunked": chunked.fast_weights,
    "native": native.fast_weights,
}
explain = explained("fast_weights", IMPLEMENTATIONS)


def fast_weights(
    q: Float[Tensor, "batch time head key"],
    k: Float[Tensor, "batch time head key"],
    v: Float[Tensor, "batch time head value"],
    rate: Float[Tensor, "batch time head"],
    weights: tuple[Float[Tensor, "head _ _"], ...],
    norm_weight: Float[Tensor, "head value"] | None = None,
    norm_bias: Float[Tensor, "head value"] | None = None,
    reach: Float[Tensor, " chunk"] | None = None,
    log_momentum: Float[Tensor, "batch time head"] | None = None,
    log_keep: Float[Tensor, "batch time head"] | None = None,
    state: FastWeightsState | None = None,
    starts: Bool[Tensor, "batch time"] | None = None,
    *,
    chunk: int = 16,
    gelu: Gelu = "tanh",
    norm_eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Float[Tensor, "batch time head value"], FastWeightsState]:
    """Run the recurrence above over ``time``.

    Args:
        q: queries.
        k: keys; as wide as values where there is a norm.
        v: values.
        rate: learning rates, of the token that is learned.
        weights: what the weights are where a document begins, ``[head, input, output]`` for each layer of the network;
            a layer with biases has them as one more row, its last.
        norm_weight: the scale of the layer norm; None for no norm and no residual.
        norm_bias: what the layer norm adds; given if and only if ``norm_weight`` is.
        reach: what share of C each place in a chunk sees; None for all of it.
        log_momentum: at most 0; None for no momentum.
        log_keep: at most 0; None for 0, nothing forgotten.
        state: what an earlier call returned; None at the start of a sequence.
        starts: True where a new document begins: there chunks begin anew, and with the initial weights.
        chunk: tokens whose gradients are taken at the same weights.
        gelu: ``tanh`` for the approximation by it, ``none`` for the exact function.
        norm_eps: added to the variance.
        backend: ``auto`` or a name in ``IMPLEMENTATIONS``.

    Returns:
        o in the dtype of ``v``, and the state after the last token.

    Raises:
        ValueError: shapes do not fit together, a setting is out of range, or ``backend`` cannot serve.
    """
    if not isinstance(weights, (tuple, list)):
        raise ValueError(f"fast_weights: weights is {type(weights).__name__}; expected a tuple of tensors, one a layer")
    learned: dict[str, Any] = {f"weights[{i}]": w for i, w in enumerate(weights)}
    gates = {"log_momentum": log_momentum, "log_keep": log_keep}
    optional = {"norm_weight": norm_weight, "norm_bias": norm_bias, "reach": reach, **gates}
    check_numbers("fast_weights", starts, optional, q=q, k=k, v=v, rate=rate, **learned)
    _check_shapes(q, k, v, rate, weights, norm_weight, norm_bias, reach, log_momentum, log_keep, state, starts, chunk)
    if gelu not in GELUS:
        raise ValueError(f"gelu={gelu!r}: use {' or '.join(map(repr, GELUS))}")
    if not 0 < norm_eps < math.inf:
        raise ValueError(f"fast_weights: norm_eps={norm_eps}; expected a finite number above 0")
    for name, gate in gates.items():
        check_log_decay("fast_weights", gate, name)
    inputs = q, k, v, rate, tuple(weights), *optional.values(), state, starts
    return dispatch("fast_weights", IMPLEMENTATIONS, backend, v, *inputs, chunk, gelu, norm_eps)


def _check_shapes(q, k, v, rate, weights, norm_weight, norm_bias, reach, log_momentum, log_keep, state, starts, chunk):
    if q.ndim != 4 or v.ndim != 4 or q.shape != k.shape or q.shape[:3] != v.shape[:3] or not q.shape[2]:
        raise ValueError(
            f"fast_weights: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit together; expected "
            "[batch, time, head, key] twice and [batch, time, head, value] with a head at least"
        )
    check_kind("fast_weights", "v", v, q=q, k=k)
    if chunk < 1:
        raise ValueError(f"fast_weights: chunk={chunk}: a chunk has at least 1 token")
    batch, _, heads, value = v.shape
    for name, gate in {"rate": rate, "log_momentum": log_momentum, "log_keep": log_keep}.items():
        check_shape("fast_weights", name, gate, tuple(v.shape[:3]))
    check_shape("fast_weights", "reach", reach, (chunk,))
    check_shape("fast_weights", "starts", starts, tuple(v.shape[:2]))
    width = q.shape[3]
    for index, weight in enumerate(weights):
        if weight.ndim != 3 or weight.shape[0] != heads or weight.shape[1] not in (width, width + 1):
            raise ValueError(
                f"fast_weights: weights[{index}] has shape {tuple(weight.shape)} but v {tuple(v.shape)}; expected "
                f"({heads}, {width} or {width + 1} with biases, output)"
            )
        width = weight.shape[2]
    if not weights or width != value:
        raise ValueError(
            f"fast_weights: v has shape {tuple(v.shape)} but weights end at {width}; expected (..., {width})"
        )
    check_shape("fast_weights", "norm_weight", norm_weight, (heads, value))
    check_shape("fast_weights", "norm_bias", norm_bias, (heads, value))
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("fast_weights: norm_weight and norm_bias: expected (both) or (neither)")
    if norm_weight is not None and q.shape[3] != value:
        raise ValueError(
            f"fast_weights: v has shape {tuple(v.shape)} and k {tuple(k.shape)}; with a norm expected (equal widths)"
        )
    if state is not None:
        check_state(state, weights, batch, momentum=log_momentum is not None)


def check_state(
    state: FastWeightsState, weights: tuple[Float[Tensor, "head _ _"], ...], batch: int, *, momentum: bool
) -> None:
    """Raise ValueError unless ``state`` is one of ``batch`` rows for memories of such ``weights``."""
    check_kind_of_state("fast_weights", state, FastWeightsState)
    for name, expected in {"anchor": weights, "change": weights, "momentum": weights if momentum else ()}.items():
        kept = getattr(state, name)
        if len(kept) != len(expected):
            raise ValueError(f"fast_weights: state.{name} has {len(kept)} layers; expected ({len(expected)})")
        for index, (tensor, weight) in enumerate(zip(kept, expected, strict=True)):
            check_floats("fast_weights", f"state.{name}[{index}]", tensor, (batch, *weight.shape))
    check_shape("fast_weights", "state.position", state.position, (batch,))
    if state.position.dtype != torch.int64:
        raise ValueError(f"fast_weights: state.position is {state.position.dtype}; expected torch.int64")
