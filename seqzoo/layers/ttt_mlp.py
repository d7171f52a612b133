"""TTT-MLP: a memory that is a small MLP, trained by gradient descent while it reads (Sun et al. 2024, https://arxiv.org/abs/2407.04620).

The layer of the authors' Transformer backbone. Left out: the convolutions and shared projections of their Mamba
backbone (`ShortConv` as a sublayer before it mixes neighbours), and the rise of the learning rate over the first tenth
of the training.
"""

from __future__ import annotations

from functools import partial

from seqzoo.parts.ttt import SelfTrainedHeads, SelfTrainedMixer


class TTTMLP(SelfTrainedMixer):
    """Linear-time memory with a hidden layer, which learns each token by a step of gradient descent.

        q, k = rotate(W x),  v = W x,  rate = learning_rate / head * sigmoid(W x + b),  per head
        f_W(z) = z + layernorm(W_2 gelu(W_1 z + b_1) + b_2),   G_s = rate_s grad |f_A(k_s) - v_s|^2 / 2,  A the weights
        before the mini-batch,   W_t = A - max(reach_t, 0) sum_(s <= t) G_s,  reach_t from 1/t at first
        y = W_out(layernorm(f_(W_t)(q_t)))

    Args:
        dim: width of the input and output.
        num_heads: MLPs kept side by side.
        head_dim: size of a head's queries, keys and values, even; None for ``dim / num_heads``.
        expand: width of the hidden layer, as a multiple of the head's.
        mini_batch: tokens whose gradients are taken at the same weights; rotary positions start anew after each.
        learning_rate: the largest rate of a step, times ``head_dim``.
        rope_base: the base of the rotary frequencies.
        use_gate: whether the normalised output is multiplied by ``gelu(W x)``.
        norm_eps: added to the variance in all norms.
        backend: ``auto``, or an implementation that all its operators have (see ``seqzoo layers``).

    Raises:
        ValueError: a size is below 1, ``head_dim`` is odd, or ``learning_rate`` is not positive.
    """

    state_formula = "2·heads·(2·expand·head_dim² + (expand+1)·head_dim) + 1"
    no_weight_decay = frozenset({"heads.biases.0", "heads.biases.1", "heads.norm_weight", "heads.norm_bias"})

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        head_dim: int | None = None,
        expand: int = 4,
        mini_batch: int = 16,
        learning_rate: float = 0.1,
        rope_base: float = 10_000.0,
        use_gate: bool = False,
        norm_eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        build = partial(
            SelfTrainedHeads,
            num_heads=num_heads,
            head_dim=head_dim,
            hidden=expand,
            mini_batch=mini_batch,
            learning_rate=learning_rate,
            rope_base=rope_base,
            norm_eps=norm_eps,
            backend=backend,
        )
        super().__init__(dim, build, use_gate=use_gate, norm_eps=norm_eps, backend=backend)
