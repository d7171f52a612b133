"""The matrix memory of xLSTM: exponential input gates, and a normalizer that keeps readings bounded (Beck et al. 2024).

    C_t = f_t C_{t-1} + i_t k_t v_t^T,    n_t = f_t n_{t-1} + i_t k_t,    h_t = C_t^T q_t / max(|n_t^T q_t|, 1)

https://arxiv.org/abs/2405.04517, with i = exp(input_gate) and f = exp(log_forget). exp overflows, so C and n are kept
divided by e^m for a running maximum m, the stabilizer, on which h does not depend:

    m_t = max(log f_t + m_{t-1}, log i_t),    f'_t = e^{log f_t + m_{t-1} - m_t},    i'_t = e^{log i_t - m_t},
    h_t = C_t^T q_t / max(|n_t^T q_t|, e^{-m_t})

The authors' code adds 1e-6 to the denominator, which makes h depend on m. Here it is at least 1e-12 instead, for
queries of zeros after an input gate so large that e^{-m} vanishes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from seqzoo.kernels import gated_linear_attention as _gated_linear_attention
from seqzoo.kernels.backends import (
    check_heads,
    check_kind_of_state,
    check_log_decay,
    check_numbers,
    check_shape,
    dispatch,
    explained,
)
from seqzoo.kernels.mlstm import native, reference, stabilized
from seqzoo.kernels.mlstm.reference import MLSTMState

# GPUs load rows whose lengths are a multiple of 32 bytes in larger pieces.
_MULTIPLES = {"triton": 16}
IMPLEMENTATIONS = {"reference": reference.mlstm} | {
    name: native.mlstm if name == "native" else partial(stabilized.mlstm, run, multiple=_MULTIPLES.get(name, 1))
    for name, run in _gated_linear_attention.IMPLEMENTATIONS.items()
    if name != "reference"
}
explain = explained("mlstm", IMPLEMENTATIONS)


def mlstm(
    q: Float[Tensor, "batch time head key"],
    k: Float[Tensor, "batch time head key"],
    v: Float[Tensor, "batch time head value"],
    input_gate: Float[Tensor, "batch time head"],
    log_forget: Float[Tensor, "batch time head"],
    state: MLSTMState | None = None,
    starts: Bool[Tensor, "batch time"] | None = None,
    *,
    backend: str = "auto",
) -> tuple[Float[Tensor, "batch time head value"], MLSTMState]:
    """Run the recurrence above over ``time``.

    Args:
        q: queries, unscaled.
        k: keys: multiply by ``key ** -0.5`` where the layer's equation has it.
        v: values.
        input_gate: log i, any number; cap it in the layer where the paper does.
        log_forget: log f, at most 0: the logarithm of a sigmoid.
        state: C, n and m after the tokens before, float32 (float64 for float64 inputs); None is zero.
        starts: True where a new document begins: the state is dropped before that token.
        backend: ``auto`` or a name in ``IMPLEMENTATIONS``.

    Returns:
        h in the dtype of ``v``, and the state after the last token.

    Raises:
        ValueError: shapes do not fit together, or ``backend`` cannot serve.
    """
    states = {}
    if state is not None:
        check_kind_of_state("mlstm", state, MLSTMState)
        states = {f"state.{name}": tensor for name, tensor in state._asdict().items()}
    gates: dict[str, Any] = {"input_gate": input_gate, "log_forget": log_forget}
    check_numbers("mlstm", starts, states, q=q, k=k, v=v, **gates)
    check_heads("mlstm", q, k, v, gates, None, starts)
    batch, _, heads, value = v.shape
    check_shape("mlstm", "q", q, (*v.shape[:3], q.shape[3]))
    if state is not None:
        check_shape("mlstm", "state.memory", state.memory, (batch, heads, q.shape[3], value))
        check_shape("mlstm", "state.normalizer", state.normalizer, (batch, heads, q.shape[3]))
        check_shape("mlstm", "state.stabilizer", state.stabilizer, (batch, heads))
    check_log_decay("mlstm", log_forget, "log_forget")
    return dispatch("mlstm", IMPLEMENTATIONS, backend, v, q, k, v, input_gate, log_forget, state, starts)
