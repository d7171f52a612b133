"""What TTT's layers share: heads whose memory is a network that learns, while it reads, to tell values from keys."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.fast_weights import FastWeightsState, fast_weights
from seqzoo.kernels.gated_output import gated_output
from seqzoo.mixer import Mixer, positions_from_starts
from seqzoo.parts.heads import head_size
from seqzoo.parts.norm import GroupLayerNorm
from seqzoo.parts.rotary import Rotary
from seqzoo.parts.settings import check_positive

WEIGHT_STD = 0.02


class SelfTrainedHeads(nn.Module):
    """``o_t = q_t + layernorm(f_{W_t}(q_t))`` in heads, W_t after steps on ``|k_s + layernorm(f(k_s)) - v_s|^2 / 2``.

    Gradients are taken at the weights before the mini-batch; token t of it takes ``max(reach_t, 0)`` of the sum of
    the steps so far, each of rate ``learning_rate / head_dim * sigmoid(W x_s + b)``; reach_t starts as 1/t, t from 1.

    Args:
        dim: width of the input.
        num_heads: networks kept side by side.
        head_dim: width of queries, keys and values, even; None for ``dim / num_heads``.
        hidden: the width inside a network, as a multiple of ``head_dim``; None for a linear map.
        mini_batch: tokens whose gradients are taken at the same weights, and after which rotary positions start anew.
        learning_rate: the largest rate of a step, times ``head_dim``.
        rope_base: the base of the rotary frequencies.
        norm_eps: added to the variance in the norm of what is read.
        backend: the layer's.

    Raises:
        ValueError: a size is below 1, ``head_dim`` is odd, or ``learning_rate`` is not positive.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        head_dim: int | None,
        hidden: int | None,
        mini_batch: int,
        learning_rate: float,
        rope_base: float,
        norm_eps: float,
        backend: str,
    ) -> None:
        super().__init__()
        head_dim = head_size("head_dim", head_dim, dim=dim, num_heads=num_heads)
        if head_dim % 2:
            raise ValueError(
                f"head_dim={head_dim} (dim={dim}, num_heads={num_heads}): rotary positions need pairs of channels"
            )
        self.rotary = Rotary(head_dim, rope_base, "neighbours").check()
        if hidden is not None and hidden < 1:
            raise ValueError(f"expand={hidden}: a hidden layer is at least 1 times as wide as a head")
        if mini_batch < 1:
            raise ValueError(f"mini_batch={mini_batch}: a mini-batch has at least 1 token")
        check_positive("learning_rate", learning_rate)
        check_positive("norm_eps", norm_eps)
        self.num_heads, self.head_dim, self.mini_batch = num_heads, head_dim, mini_batch
        self.learning_rate, self.norm_eps, self.backend = learning_rate, norm_eps, backend
        self.width = num_heads * head_dim
        self.qkv = nn.Linear(dim, 3 * self.width, bias=False)
        self.rate = nn.Linear(dim, num_heads)
        self.reach = nn.Parameter(torch.empty(mini_batch))
        inner = [head_dim] if hidden is None else [head_dim, hidden * head_dim]
        sizes = list(zip(inner, [*inner[1:], head_dim], strict=True))
        self.weights = nn.ParameterList(torch.empty(num_heads, *size) for size in sizes)
        self.biases = nn.ParameterList(torch.empty(num_heads, columns) for _, columns in sizes)
        self.norm_weight = nn.Parameter(torch.empty(num_heads, head_dim))
        self.norm_bias = nn.Parameter(torch.empty(num_heads, head_dim))
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        for weight in (self.rate.weight, *self.weights):
            nn.init.normal_(weight, std=WEIGHT_STD)
        for zero in (self.rate.bias, *self.biases, self.norm_bias):
            nn.init.zeros_(zero)
        self.reach.copy_(1 / torch.arange(1, self.mini_batch + 1))
        nn.init.ones_(self.norm_weight)

    def reset_parameters(self) -> None:
        self.qkv.reset_parameters()
        self.rate.reset_parameters()
        self._draw()

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: FastWeightsState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time width"], FastWeightsState]:
        place = positions_from_starts(starts, state and state.position, x.shape[1], x.device) % self.mini_batch
        # A split, not one rearrangement of all three: the gradients of its parts are joined where they belong.
        q, k, v = (rearrange(z, "b t (h d) -> b t h d", h=self.num_heads) for z in self.qkv(x).split(self.width, -1))
        q, k = self.rotary.turn(q, place), self.rotary.turn(k, place)
        wide = torch.promote_types(x.dtype, torch.float32)
        rate = self.rate(x).to(wide).sigmoid() * (self.learning_rate / self.head_dim)
        layers = zip(self.weights, self.biases, strict=True)
        o, last = fast_weights(
            q,
            k,
            v,
            rate,
            tuple(torch.cat([weight, bias[:, None]], 1).to(wide) for weight, bias in layers),
            self.norm_weight.to(wide),
            self.norm_bias.to(wide),
            self.reach.to(wide).relu(),
            state=state,
            starts=starts,
            chunk=self.mini_batch,
            norm_eps=self.norm_eps,
            backend=self.backend,
        )
        return rearrange(o, "b t h d -> b t (h d)"), last

    def state_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one sequence's state: all weights twice, and a position."""
        wide = torch.promote_types(dtype, torch.float32)
        numbers = sum(parameter.numel() for parameter in (*self.weights, *self.biases))
        return 2 * numbers * wide.itemsize + torch.int64.itemsize


class SelfTrainedMixer(Mixer):
    """Such heads, a norm, an optional gate and a projection: the whole of a layer of the authors' Transformer backbone.

    Args:
        dim: width of the input and output.
        build: makes of the width what remembers.
        use_gate: whether the normalised output is multiplied by ``gelu(W x)``.
        norm_eps: added to the variance in the norm.
        backend: the norm's and the gate's.
    """

    operators = ("fast_weights",)

    def __init__(
        self, dim: int, build: Callable[[int], SelfTrainedHeads], *, use_gate: bool, norm_eps: float, backend: str
    ) -> None:
        super().__init__(dim)
        self.backend = backend
        self.heads = heads = build(dim)
        self.norm = GroupLayerNorm(heads.width, eps=norm_eps, bias=True, backend=backend)
        self.gate = nn.Linear(dim, heads.width, bias=False) if use_gate else None
        self.out = nn.Linear(heads.width, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: FastWeightsState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], FastWeightsState]:
        y, last = self.heads(x, state, starts)
        y = self.norm(y)
        if self.gate is not None:
            y = gated_output(y, self.gate(x), activation="gelu", backend=self.backend)
        return self.out(y), last

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        return self.heads.state_bytes(dtype)
