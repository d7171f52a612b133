"""RWKV-6: a decaying memory whose decays and glances at the token before are driven by the input (Peng et al. 2024, https://arxiv.org/abs/2404.05892).

The time mix and the channel mix take turns, each after a layer norm (``norm: layer``). Parameters start as in the
official code, projections to the output at zero. Left out: the layer norm after the embedding, the doubled learning
rate of decays, and an inner width other than ``dim``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.gated_linear_attention import gated_linear_attention
from seqzoo.mixer import Mixer
from seqzoo.parts.depth import depth_ratios
from seqzoo.parts.low_rank import LowRank
from seqzoo.parts.norm import GroupLayerNorm
from seqzoo.parts.token_shift import glance_back, ramp


class RWKV6State(NamedTuple):
    """What a sequence leaves behind: the memory (float32 or better), and the last token."""

    memory: Float[Tensor, "batch head key value"]
    last: Float[Tensor, "batch dim"]


class RWKV6(Mixer):
    """Linear-time memory in which every key channel fades at a rate that the input sets.

        x_z = x + (x_{t-1} - x) * (mu_z + tanh((x + (x_{t-1} - x) * mu) W) W_z)   for z of w, k, v, r, g
        w = exp(-exp(w_0 + tanh(x_w W) W')),  k, v, r = W x_k, W x_v, W x_r
        o_t = (S_{t-1} + diag(u) k v^T)^T r,  S_t = diag(w) S_{t-1} + k v^T,   y = W_out(layernorm(o) * silu(W x_g))

    Args:
        dim: width of the input and output.
        head_dim: size of a key and of a value; must divide ``dim``. None for 64, or ``dim`` where that is less.
        mix_rank: size of what the glances back of w, k, v, r and g are made from, each.
        decay_rank: size of what the decays are made from.
        norm_eps: added to the variance in the norm of each head's output.
        layer_index: which layer of its stack this is, from 0 on: by it depends how decays and glances back start.
        num_layers: layers of the stack.
        backend: ``auto``, or an implementation that its operator has (see ``seqzoo layers``).

    Raises:
        ValueError: sizes do not fit together, or ``layer_index`` is not below ``num_layers``.
    """

    state_formula = "dim·head_dim + dim"
    operators = ("gated_linear_attention",)
    no_weight_decay = frozenset({"mix", "mix_down", "mix_up", "decay_map.down.weight", "decay_map.up.weight", "bonus"})

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int | None = None,
        mix_rank: int = 32,
        decay_rank: int = 64,
        norm_eps: float = 64e-5,
        layer_index: int = 0,
        num_layers: int = 1,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        head_dim = min(64, dim) if head_dim is None else head_dim
        if head_dim < 1 or dim % head_dim:
            raise ValueError(f"head_dim={head_dim} does not divide dim={dim}")
        for name, size in {"mix_rank": mix_rank, "decay_rank": decay_rank}.items():
            if size < 1:
                raise ValueError(f"{name}={size}: use 1 or more")
        self.head_dim, self.backend = head_dim, backend
        self.ratios, self.norm_scale = depth_ratios(layer_index, num_layers), ((layer_index + 1) / num_layers) ** 0.7
        self.mix = nn.Parameter(torch.empty(6, dim))
        self.mix_down = nn.Parameter(torch.empty(dim, 5 * mix_rank))
        self.mix_up = nn.Parameter(torch.empty(5, mix_rank, dim))
        self.decay = nn.Parameter(torch.empty(dim))
        self.decay_map = LowRank(dim, decay_rank, dim, activation=torch.tanh)
        self.bonus = nn.Parameter(torch.empty(dim // head_dim, head_dim))
        self.key, self.value = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.receptance, self.gate = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.norm = GroupLayerNorm(dim, groups=dim // head_dim, eps=norm_eps, bias=True, backend=backend)
        self.out = nn.Linear(dim, dim, bias=False)
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        deep, shallow = self.ratios
        place = torch.arange(len(self.decay), device=self.decay.device)
        share = place / max(len(place) - 1, 1)
        for row, power in zip(self.mix, (1, 1, 1, 1, 0.5, 0.5), strict=True):
            row.copy_(ramp(row, power * shallow))
        self.mix[3] -= 0.3 * deep
        nn.init.zeros_(self.mix_down)
        nn.init.uniform_(self.mix_up, -0.01, 0.01)
        self.decay.copy_(-6 + 5 * share ** (0.7 + 1.3 * deep))
        nn.init.zeros_(self.decay_map.down.weight)
        nn.init.uniform_(self.decay_map.up.weight, -0.01, 0.01)
        self.bonus.copy_((deep * (1 - share) + 0.1 * ((place + 1) % 3 - 1)).view_as(self.bonus))
        for linear, gain in {self.receptance: 1, self.key: 0.1, self.value: 1, self.gate: 0.1}.items():
            nn.init.orthogonal_(linear.weight, gain)
        nn.init.constant_(self.norm.weight, self.norm_scale)
        nn.init.zeros_(self.out.weight)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._draw()

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: RWKV6State | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], RWKV6State]:
        before = state and state.last
        (seen,), last = glance_back(x, self.mix[:1], before, starts, backend=self.backend)
        low = torch.tanh(seen @ self.mix_down).unflatten(-1, (5, -1))
        more = torch.einsum("btzr,zrd->zbtd", low, self.mix_up)
        (xw, xk, xv, xr, xg), _ = glance_back(x, self.mix[1:], before, starts, more=more, backend=self.backend)
        wide = torch.promote_types(x.dtype, torch.float32)
        log_decay = -(self.decay.to(wide) + self.decay_map(xw).to(wide)).exp()
        r, k, v, log_decay = (
            z.unflatten(-1, (-1, self.head_dim)) for z in (self.receptance(xr), self.key(xk), self.value(xv), log_decay)
        )
        y, memory = gated_linear_attention(
            r, k, v, log_decay, state and state.memory, starts, bonus=self.bonus, backend=self.backend
        )
        y = self.norm(rearrange(y, "b t h d -> b t (h d)"), self.gate(xg))
        return self.out(y), RWKV6State(memory, last)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        dim = len(self.decay)
        return dim * self.head_dim * torch.promote_types(dtype, torch.float32).itemsize + dim * dtype.itemsize
