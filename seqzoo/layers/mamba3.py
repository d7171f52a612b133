"""Mamba-3: a state space of trapezoids, turned by the input, without a convolution (Lahoti et al. 2026, https://arxiv.org/abs/2603.15569).

A trapezoid adds two products a token, of its own key and value and of the token's before. All products of earlier keys
go through gated linear attention, one token late; what a token adds for itself is added beside it. So no term is ever
added to be taken off again, as in the parallel form that looks ahead. Left out: several inputs and outputs a head
(MIMO), whose ranks read what all ranks of their own token write, which the operator has no form for.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.gated_linear_attention import gated_linear_attention
from seqzoo.kernels.gated_output import gated_output
from seqzoo.kernels.turned_keys import turned_keys
from seqzoo.mixer import Mixer
from seqzoo.parts.decay import draw_step_bias
from seqzoo.parts.heads import grouped_heads
from seqzoo.parts.norm import GroupRMSNorm

Rate = Literal["heavy_tail", "softplus"]
SLOWEST = 1e-4


class Mamba3State(NamedTuple):
    """What a sequence leaves behind: the memory, how far it has turned, and the last token's key and value.

    Memory and angles (in [0, 2 pi)) are float32 or better.
    """

    memory: Float[Tensor, "batch head state channel"]
    angle: Float[Tensor, "batch head pair"]
    key: Float[Tensor, "batch head state"]
    value: Float[Tensor, "batch head channel"]


class Mamba3(Mixer):
    """Linear-time memory that turns as well as decays, so that it can count, with second-order accurate writes.

        [z, x, B, C, dt, a, trap, turn] = W u,  B, C = rmsnorm(B) + b, rmsnorm(C) + c,  dt = softplus(dt + dt_bias)
        A = -max(f(a), 1e-4),  l = sigmoid(trap),  phi_t = phi_{t-1} + pi tanh(turn) dt
        k, q = rotate(B, phi), rotate(C, phi),  alpha = e^{A dt}
        S_t = alpha S_{t-1} + alpha (1 - l) dt k_{t-1} x_{t-1}^T + l dt k_t x_t^T
        y = W_out((S_t^T q + D x) * silu(z))

    Args:
        dim: width of the input and output.
        state_size: rows of each head's memory, the size of B and C.
        head_dim: channels of a head; must divide ``expand * dim``.
        expand: inner width as a multiple of ``dim``.
        num_groups: B and C are shared by the heads of a group, but for their biases; must divide the number of heads.
        rope_fraction: part of the state that turns, above 0 and at most 1, in whole pairs.
        rate: f: ``heavy_tail`` for 1 + a above 0 and 1 / (1 - a) below, as in the official code since June 2026;
            ``softplus`` as in the paper.
        use_norm: whether each head's output is normalised before the gate.
        norm_eps: added to the mean square in all norms.
        backend: ``auto``, or an implementation that its operator has (see ``seqzoo layers``).

    Raises:
        ValueError: sizes do not fit together, ``rope_fraction`` leaves no pair, or ``rate`` is not one of the two.
    """

    state_formula = "heads·(state_size·head_dim + state_size·rope_fraction/2 + state_size + head_dim)"
    operators = ("gated_linear_attention",)
    no_weight_decay = frozenset({"write_bias", "read_bias"})

    def __init__(
        self,
        dim: int,
        *,
        state_size: int = 128,
        head_dim: int = 64,
        expand: int = 2,
        num_groups: int = 1,
        rope_fraction: float = 0.5,
        rate: Rate = "heavy_tail",
        use_norm: bool = False,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        inner = expand * dim
        num_heads = grouped_heads(dim, expand=expand, head_dim=head_dim, num_groups=num_groups)
        pairs = int(state_size * rope_fraction) // 2 if 0 < rope_fraction <= 1 else 0
        if pairs < 1:
            raise ValueError(
                f"rope_fraction={rope_fraction}, state_size={state_size}: expected a part of the state, at most all of "
                "it, in which there is a pair"
            )
        if rate not in get_args(Rate):
            raise ValueError(f"rate={rate!r}: use 'heavy_tail' or 'softplus'")
        self.num_heads, self.rate, self.backend = num_heads, rate, backend
        self.widths = [inner, inner, num_groups * state_size, num_groups * state_size, *[num_heads] * 3, pairs]
        self.projection = nn.Linear(dim, sum(self.widths), bias=False)
        self.write_norm = GroupRMSNorm(state_size, eps=norm_eps, backend=backend)
        self.read_norm = GroupRMSNorm(state_size, eps=norm_eps, backend=backend)
        self.write_bias = nn.Parameter(torch.empty(num_heads, state_size))
        self.read_bias = nn.Parameter(torch.empty(num_heads, state_size))
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.skip = nn.Parameter(torch.empty(num_heads))
        self.norm = GroupRMSNorm(inner, groups=num_heads, eps=norm_eps, backend=backend) if use_norm else None
        self.out = nn.Linear(inner, dim, bias=False)
        self._draw()

    def _draw(self) -> None:
        draw_step_bias(self.dt_bias)
        for parameter in (self.write_bias, self.read_bias, self.skip):
            nn.init.ones_(parameter)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._draw()

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: Mamba3State | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], Mamba3State]:
        z, u, write, read, step, rate, blend, turn = self.projection(x).split(self.widths, -1)
        values = rearrange(u, "b t (h p) -> b t h p", h=self.num_heads)
        wide = torch.promote_types(u.dtype, torch.float32)
        step = F.softplus(step.to(wide) + self.dt_bias.to(wide))
        log_decay = -self._rate(rate.to(wide)).clamp(min=SLOWEST) * step
        blend = blend.to(wide).sigmoid()
        now, earlier = blend * step, (1 - blend) * step

        write, read = (self._per_group(norm(z)) for norm, z in ((self.write_norm, write), (self.read_norm, read)))
        turn = math.pi * turn.to(wide).tanh()

        # What the last token writes for itself is in the state already; what it writes for the next is not.
        gain = log_decay.exp() * (earlier + F.pad(now[:, :-1], (0, 0, 1, 0)))
        memory, angle, key, value = (None, None, None, None) if state is None else state
        biases = self.write_bias, self.read_bias
        q, k, v, own, angle, key = turned_keys(
            write, read, *biases, turn, step, gain, values, angle, key, value, starts, backend=self.backend
        )
        y, memory = gated_linear_attention(q, k, v, log_decay, memory, starts, backend=self.backend)
        memory = memory + (now[:, -1, :, None] * key)[..., None] * values[:, -1, :, None].to(wide)
        y = rearrange(y, "b t h p -> b t (h p)")
        gate = z if self.norm is None else None
        y = gated_output(y, gate, u, now * own + self.skip.to(wide), activation="silu", backend=self.backend)
        y = y if self.norm is None else self.norm(y, z)
        return self.out(y), Mamba3State(memory, angle, key.to(u.dtype), values[:, -1].clone())

    def _rate(self, x: Tensor) -> Tensor:
        return F.softplus(x) if self.rate == "softplus" else x.clamp(min=0) + 1 / (1 - x.clamp(max=0))

    def _per_group(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.write_bias.shape[1]))

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        heads, size = self.write_bias.shape
        channels, pairs = self.out.in_features // heads, self.widths[-1]
        wide = torch.promote_types(dtype, torch.float32)
        return heads * ((size * channels + pairs) * wide.itemsize + (size + channels) * dtype.itemsize)
