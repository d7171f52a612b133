"""RWKV-7: an erasable memory that decays, erases and writes channel by channel (Peng et al. 2025, https://arxiv.org/abs/2503.14456).

The time mix and the channel mix take turns, each after a layer norm (``norm: layer``). Parameters start as in the
official code, projections to the output at zero. In the official model all but the first time mix also see the first
one's values (``value_residual``): name the first one apart and let the others read it, ``reads: {others: first}``. Left
out: the layer norm after the embedding, and the doubled learning rate of decays.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.dplr_delta_rule import dplr_delta_rule
from seqzoo.kernels.erasing_keys import erasing_keys
from seqzoo.kernels.gated_output import gated_output
from seqzoo.mixer import Mixer
from seqzoo.parts.depth import depth_ratios
from seqzoo.parts.low_rank import LowRank
from seqzoo.parts.norm import GroupLayerNorm
from seqzoo.parts.token_shift import glance_back, ramp


def _rank(dim: int, scale: float) -> int:
    """The official size of a low-rank map."""
    return max(32, 32 * round(scale * dim**0.5 / 32))


def _matrices(*maps: str) -> set[str]:
    return {f"{name}.{part}.weight" for name in maps for part in ("down", "up")}


class RWKV7State(NamedTuple):
    """What a sequence leaves behind: the memory (float32 or better), and the last token."""

    memory: Float[Tensor, "batch head key value"]
    last: Float[Tensor, "batch dim"]


class RWKV7(Mixer):
    """Linear-time memory that erases what it holds at one direction, and writes at another, with rates by channel.

        x_z = x + (x_{t-1} - x) * mu_z   for z of r, w, k, v, a, g
        w = exp(-e^{-1/2} sigmoid(w_0 + W' tanh(W x_w))),  a = sigmoid(a_0 + W' W x_a),  g = W' sigmoid(W x_g)
        r, v = W x_r, W x_v,  h = unit(W x_k * kappa),  k = W x_k * (1 + (a - 1) * alpha)
        S_t = diag(w) S_{t-1} - (a * h) (h^T S_{t-1}) + k v^T,   y = W_out((layernorm(S_t^T r) + (r^T (u * k)) v) * g)

    With ``value_residual``, v moves towards that of the layer that is read by ``sigmoid(v_0 + W' W x_v)``.

    Args:
        dim: width of the input and output.
        head_dim: size of a key and of a value; must divide ``dim``. None for 64, or ``dim`` where that is less.
        decay_rank: size of what the decays w are made from; None for ``2.5 sqrt(dim)`` in steps of 32.
        rate_rank: size of what the rates a are made from; None for the same.
        gate_rank: size of what the gates g are made from; None for ``5 sqrt(dim)`` in steps of 32.
        value_rank: size of what the value residual's gates are made from; None for ``1.7 sqrt(dim)`` in steps of 32.
        value_residual: whether the values of another RWKV7 below are mixed in, which the stack's ``reads`` must name.
        norm_eps: added to the variance in the norm of each head's output.
        layer_index: which layer of its stack this is, from 0 on: by it depends how decays and glances back start.
        num_layers: layers of the stack.
        backend: ``auto``, or an implementation that its operator has (see ``seqzoo layers``).

    Raises:
        ValueError: sizes do not fit together, or ``layer_index`` is not below ``num_layers``.
    """

    state_formula = "dim·head_dim + dim"
    operators = ("dplr_delta_rule",)
    no_weight_decay = frozenset({"mix", "bonus", *_matrices("decay_map", "rate_map", "gate_map")})

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int | None = None,
        decay_rank: int | None = None,
        rate_rank: int | None = None,
        gate_rank: int | None = None,
        value_rank: int | None = None,
        value_residual: bool = False,
        norm_eps: float = 64e-5,
        layer_index: int = 0,
        num_layers: int = 1,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        head_dim = min(64, dim) if head_dim is None else head_dim
        if head_dim < 1 or dim % head_dim:
            raise ValueError(f"head_dim={head_dim} does not divide dim={dim}")
        decay_rank, rate_rank = (_rank(dim, 2.5) if rank is None else rank for rank in (decay_rank, rate_rank))
        gate_rank = _rank(dim, 5) if gate_rank is None else gate_rank
        value_rank = _rank(dim, 1.7) if value_rank is None else value_rank
        ranks = {"decay_rank": decay_rank, "rate_rank": rate_rank, "gate_rank": gate_rank, "value_rank": value_rank}
        for name, size in ranks.items():
            if size < 1:
                raise ValueError(f"{name}={size}: use 1 or more")
        self.head_dim, self.backend = head_dim, backend
        self.ratios, self.norm_scale = depth_ratios(layer_index, num_layers), ((layer_index + 1) / num_layers) ** 0.7
        self.mix = nn.Parameter(torch.empty(6, dim))
        self.decay, self.rate = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))
        self.decay_map = LowRank(dim, decay_rank, dim, activation=torch.tanh)
        self.rate_map = LowRank(dim, rate_rank, dim)
        self.gate_map = LowRank(dim, gate_rank, dim, activation=torch.sigmoid)
        self.value_map = LowRank(dim, value_rank, dim, bias=True) if value_residual else None
        if value_residual:
            self.no_weight_decay |= _matrices("value_map")
        self.key_scale, self.key_rate = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))
        self.bonus = nn.Parameter(torch.empty(dim // head_dim, head_dim))
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.key, self.value = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.norm = GroupLayerNorm(dim, groups=dim // head_dim, eps=norm_eps, bias=True, backend=backend)
        self.out = nn.Linear(dim, dim, bias=False)
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        deep, shallow = self.ratios
        dim, size = len(self.decay), self.head_dim
        place = torch.arange(dim, device=self.decay.device)
        share = place / max(dim - 1, 1)
        in_head = 2 * (place % size) / max(size - 1, 1) - 1
        zigzag = in_head * in_head.abs()
        for row, power in zip(self.mix, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
            row.copy_(ramp(row, power * shallow))
        self.decay.copy_(-5.5 + 6 * share ** (1 + deep**0.3) + 2.5 * zigzag)
        self.rate.copy_(-0.19 + 0.3 * zigzag + 0.4 * (share - 0.5))
        self.key_scale.copy_(0.71 - 0.1 * (share - 0.5))
        nn.init.constant_(self.key_rate, 1.02)
        nn.init.constant_(self.bonus, -0.04)
        maps = [self.decay_map, self.rate_map, self.gate_map]
        if self.value_map is not None:
            maps.append(self.value_map)
            self.value_map.up.bias.copy_(0.73 - 0.4 * (share - 0.5))
        for low_rank in maps:
            nn.init.zeros_(low_rank.down.weight)
            rank = low_rank.up.in_features
            nn.init.orthogonal_(low_rank.up.weight, gain=0.1 * max(1, rank / dim) ** 0.5)
        for linear, width in {self.receptance: 0.5, self.key: 0.05, self.value: 0.5}.items():
            nn.init.uniform_(linear.weight, -width * dim**-0.5, width * dim**-0.5)
        nn.init.constant_(self.norm.weight, self.norm_scale)
        nn.init.zeros_(self.out.weight)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._draw()

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: RWKV7State | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
        source: Float[Tensor, "batch time dim"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], RWKV7State]:
        (xr, xw, xk, xv, xa, xg), last = glance_back(x, self.mix, state and state.last, starts, backend=self.backend)
        v = self.value(xv)
        if self.value_map is not None:
            if source is None:
                raise ValueError("value_residual=True, but there is nothing to read: name it in the stack's reads")
            v = torch.lerp(v, source.to(v.dtype), torch.sigmoid(self.value_map(xv)))
        elif source is not None:
            raise ValueError("value_residual=False reads no other layer; the stack's reads names one")
        r, learned = self.receptance(xr), (self.decay, self.rate, self.key_scale, self.key_rate, self.bonus)
        log_decay, written, erased, restored, own = erasing_keys(
            r, self.key(xk), self.decay_map(xw), self.rate_map(xa), *learned, backend=self.backend
        )
        y, memory = dplr_delta_rule(
            r.view_as(written),
            written,
            v.view_as(written),
            erased,
            restored,
            log_decay,
            state and state.memory,
            starts,
            backend=self.backend,
        )
        y = gated_output(self.norm(y.flatten(2)), self.gate_map(xg), v, own, backend=self.backend)
        return self.out(y), RWKV7State(memory, last)

    def share(
        self,
        x: Float[Tensor, "batch time dim"],
        state: RWKV7State | None,
        starts: Bool[Tensor, "batch time"] | None,
        last: RWKV7State,
    ) -> Float[Tensor, "batch time dim"]:
        """The values of ``x``, before any are mixed in."""
        (xv,), _ = glance_back(x, self.mix[3:4], state and state.last, starts, backend=self.backend)
        return self.value(xv)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        dim = len(self.decay)
        return dim * self.head_dim * torch.promote_types(dtype, torch.float32).itemsize + dim * dtype.itemsize
