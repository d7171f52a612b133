"""Forgetting attention: softmax attention whose logits fade by gates of the tokens between (Lin et al. 2025, https://arxiv.org/abs/2503.02130).

By default as in the paper's Pro block: keys and values lean on those of the token before, queries and keys are
normalised, outputs are normalised and gated. Pairs that forgetting has left without weight may be passed over
(https://arxiv.org/abs/2504.06949). Left out: gates that do not depend on the input, which the paper found worse.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.attention import attention
from seqzoo.kernels.backends import check_floats
from seqzoo.kernels.gated_output import gated_output
from seqzoo.mixer import Mixer, positions_from_starts
from seqzoo.parts.key_value_memory import KeyValueBuffer, first_slots
from seqzoo.parts.norm import GroupRMSNorm
from seqzoo.parts.rotary import Rotary
from seqzoo.parts.settings import check_positive


class ForgettingAttentionState(NamedTuple):
    """What a sequence leaves behind: all keys, values and gates, and the last key and value before they lean back."""

    memory: KeyValueBuffer
    key: Float[Tensor, "batch dim"]
    value: Float[Tensor, "batch dim"]


class ForgettingAttention(Mixer):
    """Exact look-up of everything, where each head lets what is old fade at its own pace; needs no positions.

        f = sigmoid(W_f x + b_f),   k_t, v_t = (1 - a) W x_t + a W x_{t-1},   a = sigmoid(W_a x_t) for each of both
        o_t = sum_j softmax_j(rmsnorm(q_t) . rmsnorm(k_j) / sqrt(head_dim) + sum_{j < n <= t} log f_n) v_j,   j <= t
        y = W_out(rmsnorm(o) * sigmoid(W_g x))

    Args:
        dim: width of the input and output.
        num_heads: heads; must divide ``dim``.
        shift: whether keys and values lean on the token before.
        qk_norm: whether the queries and keys of each head are normalised.
        use_norm: whether the output of each head is normalised.
        use_gate: whether outputs are gated.
        qk_norm_eps: added to the mean square in the norms of queries and keys.
        norm_eps: the same in that of the output.
        rope_base: base of rotary positions, above 1; None for no positions, as in the paper.
        prune: what pairs of tokens that are passed over may weigh together, for each token; between 0 and 1, or None to
            look at all. The paper's is ``e^-10``.
        backend: ``auto``, or an implementation that its operator has (see ``seqzoo layers``).

    Raises:
        ValueError: sizes do not fit together, or ``prune`` or ``rope_base`` is out of its range.
    """

    state_formula = "T·(2·dim + heads) + 2·dim"
    operators = ("attention",)
    constant_state = False

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        shift: bool = True,
        qk_norm: bool = True,
        use_norm: bool = True,
        use_gate: bool = True,
        qk_norm_eps: float = 1e-5,
        norm_eps: float = 1e-6,
        rope_base: float | None = None,
        prune: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}")
        if prune is not None and not 0 < prune < 1:
            raise ValueError(f"prune={prune}: expected a number between 0 and 1, or None to look at all")
        check_positive("qk_norm_eps", qk_norm_eps)
        check_positive("norm_eps", norm_eps)
        self.num_heads, self.prune, self.backend = num_heads, prune, backend
        self.rotary = None if rope_base is None else Rotary(dim // num_heads, rope_base).check()
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.forget = nn.Linear(dim, num_heads)
        self.key_shift, self.value_shift = (nn.Linear(dim, num_heads, bias=False) if shift else None for _ in range(2))
        self.query_norm, self.key_norm = (
            GroupRMSNorm(dim, groups=num_heads, eps=qk_norm_eps, backend=backend) if qk_norm else None for _ in range(2)
        )
        self.gate = nn.Linear(dim, dim, bias=False) if use_gate else None
        self.norm = (
            GroupRMSNorm(dim, groups=num_heads, eps=norm_eps, activation="sigmoid", backend=backend)
            if use_norm
            else None
        )
        self.out = nn.Linear(dim, dim, bias=False)
        self._draw()

    def _draw(self) -> None:
        for child in self.children():
            if isinstance(child, nn.Linear):
                nn.init.normal_(child.weight, std=0.02)
        nn.init.zeros_(self.forget.bias)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._draw()

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: ForgettingAttentionState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], ForgettingAttentionState]:
        batch, time, _ = x.shape
        if state is not None:
            check_floats("ForgettingAttention", "state.key", state.key, (batch, x.shape[2]))
            check_floats("ForgettingAttention", "state.value", state.value, (batch, x.shape[2]))
        position = state and state.memory.position
        positions = positions_from_starts(starts, position, time, x.device).expand(batch, -1)
        q, k, v = self.query(x), self.key(x), self.value(x)
        last = k[:, -1].clone(), v[:, -1].clone()  # views would keep all of both in memory
        if self.key_shift is not None and self.value_shift is not None:
            k = self._lean_back(k, self.key_shift(x), state and state.key, starts)
            v = self._lean_back(v, self.value_shift(x), state and state.value, starts)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = (rearrange(z, "b t (h d) -> b t h d", h=self.num_heads) for z in (q, k, v))
        if self.rotary is not None:
            q, k = self.rotary.turn(q, positions), self.rotary.turn(k, positions)
        wide = torch.promote_types(x.dtype, torch.float32)
        log_forget = F.logsigmoid(self.forget(x).to(wide))
        memory = KeyValueBuffer.after(state and state.memory, k, v, positions[:, -1] + 1, log_forget)
        k, v, log_forget = memory.used(q.dtype)
        first = None if state is None and starts is None else first_slots(positions, k.shape[1])
        y = attention(q, k, v, log_forget, first=first, prune=self.prune, backend=self.backend).flatten(2)
        gate = None if self.gate is None else self.gate(x)
        if self.norm is not None:
            y = self.norm(y, gate)
        elif gate is not None:
            y = gated_output(y, gate, activation="sigmoid", backend=self.backend)
        return self.out(y), ForgettingAttentionState(memory, *last)

    def _lean_back(self, x: Tensor, share: Tensor, last: Tensor | None, starts: Tensor | None) -> Tensor:
        """``x`` mixed with itself a token earlier, by the sigmoid of ``share`` for each head."""
        first = torch.zeros_like(x[:, :1]) if last is None else last[:, None].to(x.dtype)
        before = torch.cat([first, x[:, :-1]], 1)
        if starts is not None:
            before = before.masked_fill(starts[..., None], 0)
        before, now = (z.unflatten(-1, (self.num_heads, -1)) for z in (before, x))
        return torch.lerp(now, before, share.sigmoid()[..., None]).flatten(2)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        dim, wide = self.out.in_features, torch.promote_types(dtype, torch.float32)
        gates = length * self.num_heads * wide.itemsize
        return 2 * (length + 1) * dim * dtype.itemsize + gates + torch.int64.itemsize
