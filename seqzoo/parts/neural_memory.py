"""Titans' memory: heads whose memory is an MLP that learns, while it reads, with momentum and forgetting."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.fast_weights import FastWeightsState, check_state, fast_weights
from seqzoo.parts.delta_rule import QueryKeyValue
from seqzoo.parts.heads import head_size
from seqzoo.parts.settings import check_positive

FORGET_BIAS = -5.0


class NeuralMemoryState(NamedTuple):
    """What a sequence leaves behind: the memory's weights and momentum, and the convolution's last inputs."""

    weights: FastWeightsState
    conv: Float[Tensor, "batch size_minus_one channel"]


class MemoryHeads(nn.Module):
    """``o_t = q_t + layernorm(M_t(q_t))`` in heads, M_t an MLP after steps of gradient descent on its tokens.

        q, k = l2(silu(conv(W x))),  v = silu(conv(W x)),  theta, eta, alpha = sigmoid(W x + b),  a number a head
        theta <- learning_rate theta
        S_t = eta_t S_{t-1} + theta_t grad mean (k_t + layernorm(M_A(k_t)) - v_t)^2,   M_t = (1 - alpha_t) M_{t-1} - S_t

    with gradients at A, the weights from before the chunk.

    Args:
        dim: width of the input.
        num_heads: memories kept side by side.
        head_dim: size of queries, keys and values; None for ``dim / num_heads``.
        depth: layers of a memory.
        expand: the width of a memory's hidden layers, as a multiple of ``head_dim``.
        chunk: tokens whose gradients are taken at the same weights.
        learning_rate: the largest step, positive; where it is large for the depth and the chunk, learning is chaotic.
        conv_size: taps of the short convolution on queries, keys and values; None for none.
        norm_eps: added to the variance in the norm of what is read.
        backend: the layer's.

    Raises:
        ValueError: a size is below 1, ``learning_rate`` is not positive, or ``dim`` is too small for ``num_heads``.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        head_dim: int | None,
        depth: int,
        expand: int,
        chunk: int,
        learning_rate: float,
        conv_size: int | None,
        norm_eps: float,
        backend: str,
    ) -> None:
        super().__init__()
        for name, size in {"depth": depth, "expand": expand, "chunk": chunk}.items():
            if size < 1:
                raise ValueError(f"{name}={size}: use 1 or more")
        check_positive("learning_rate", learning_rate)
        check_positive("norm_eps", norm_eps)
        head_dim = head_size("head_dim", head_dim, dim=dim, num_heads=num_heads)
        self.qkv = QueryKeyValue(
            dim,
            num_heads=num_heads,
            key_dim=head_dim,
            value_dim=head_dim,
            conv_size=conv_size,
            scaled=False,
            backend=backend,
        )
        self.num_heads, self.head_dim = num_heads, head_dim
        self.chunk, self.learning_rate, self.norm_eps, self.backend = chunk, learning_rate, norm_eps, backend
        self.width = num_heads * self.head_dim
        self.gates = nn.Linear(dim, 3 * num_heads)
        widths = [self.head_dim, *[expand * self.head_dim] * (depth - 1), self.head_dim]
        self.weights = nn.ParameterList(torch.empty(num_heads, *size) for size in pairwise(widths))
        self.norm_weight = nn.Parameter(torch.empty(num_heads, self.head_dim))
        self.norm_bias = nn.Parameter(torch.empty(num_heads, self.head_dim))
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        for weight in self.weights:
            for matrix in weight:
                nn.init.xavier_uniform_(matrix)
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)
        nn.init.zeros_(self.gates.bias)
        nn.init.constant_(self.gates.bias[2 * self.num_heads :], FORGET_BIAS)

    def reset_parameters(self) -> None:
        for module in (self.qkv.projection, self.qkv.conv, self.gates):
            if module is not None:
                module.reset_parameters()
        self._draw()

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: NeuralMemoryState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time width"], NeuralMemoryState]:
        q, k, v, conv = self.qkv(x, state and state.conv, starts)
        wide = torch.promote_types(x.dtype, torch.float32)
        step, momentum, forget = self.gates(x).to(wide).chunk(3, -1)
        o, weights = fast_weights(
            q,
            k,
            v,
            step.sigmoid() * (2 * self.learning_rate / self.head_dim),
            tuple(weight.to(wide) for weight in self.weights),
            self.norm_weight.to(wide),
            self.norm_bias.to(wide),
            log_momentum=F.logsigmoid(momentum),
            log_keep=F.logsigmoid(-forget),
            state=state and state.weights,
            starts=starts,
            chunk=self.chunk,
            gelu="none",
            norm_eps=self.norm_eps,
            backend=self.backend,
        )
        return rearrange(o, "b t h d -> b t (h d)"), NeuralMemoryState(weights, conv)

    def read(
        self,
        q: Float[Tensor, "batch time head channel"],
        state: NeuralMemoryState | None,
        begins: Bool[Tensor, " batch"] | None,
    ) -> Float[Tensor, "batch time width"]:
        """``q + layernorm(M_A(q))``, A the weights from before the open chunk; the first ones in rows where a document
        ``begins``.
        """
        wide = torch.promote_types(q.dtype, torch.float32)
        z, weights = q.to(wide), tuple(weight.to(wide) for weight in self.weights)
        if state is not None:
            check_state(state.weights, weights, len(q), momentum=True)
            anchor = state.weights.anchor
            if begins is not None:
                fresh = begins[:, None, None, None]
                anchor = tuple(torch.where(fresh, first, now) for first, now in zip(weights, anchor, strict=True))
            weights = anchor
        with torch.autocast(q.device.type, enabled=False):
            for index, weight in enumerate(weights):
                z = torch.matmul(F.gelu(z).transpose(1, 2) if index else z.transpose(1, 2), weight).transpose(1, 2)
            z = F.layer_norm(z, z.shape[-1:], eps=self.norm_eps)
            y = q + torch.addcmul(self.norm_bias.to(wide), self.norm_weight.to(wide), z)
        return rearrange(y.to(q.dtype), "b t h d -> b t (h d)")

    def state_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one sequence's state: all weights three times, a position, and the convolution's."""
        wide = torch.promote_types(dtype, torch.float32)
        weights = 3 * sum(weight.numel() for weight in self.weights) * wide.itemsize
        conv = 0 if self.qkv.conv is None else self.qkv.conv.state_bytes(dtype)
        return weights + torch.int64.itemsize + conv
