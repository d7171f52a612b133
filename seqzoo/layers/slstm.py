"""sLSTM: xLSTM's scalar memory, whose gates see the last output, one token after the other (Beck et al. 2024, https://arxiv.org/abs/2405.04517).

No parallel form exists. The official code feeds its ``fgate`` to the cell's input gate and its ``igate`` to the forget
gate; here names say what a gate does. Left out: the gated MLP of the official block (``SwiGLU`` as the next sublayer).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.backends import check_floats
from seqzoo.mixer import Mixer
from seqzoo.parts.depth import depth_ratios
from seqzoo.parts.norm import GroupLayerNorm
from seqzoo.parts.short_conv import CausalConv

NOTHING = -torch.inf  # the stabilizer of a memory into which nothing was written


class SLSTMState(NamedTuple):
    """What a sequence leaves behind: the last output, memory, normalizer and stabilizer, and the last inputs."""

    output: Float[Tensor, "batch dim"]
    memory: Float[Tensor, "batch dim"]
    normalizer: Float[Tensor, "batch dim"]
    stabilizer: Float[Tensor, "batch dim"]
    conv: Float[Tensor, "batch size_minus_one dim"]


class SLSTM(Mixer):
    """An LSTM with exponential input gates; heads mix their outputs into their own next gates.

        i, f = W silu(conv(x)) + R h_{t-1} + b,   z, o = W x + R h_{t-1} + b,   all within a head
        m_t = max(i, logsigmoid(f) + m_{t-1}),  i' = e^{i - m_t},  f' = e^{logsigmoid(f) + m_{t-1} - m_t}
        c_t = f' c_{t-1} + i' tanh(z),  n_t = f' n_{t-1} + i',  h_t = sigmoid(o) c_t / n_t,   y = layernorm(h)

    Args:
        dim: width of the input and output.
        num_heads: parts that do not see each other; must divide ``dim``.
        conv_size: taps of the short convolution in front of the input and forget gates.
        layer_index: place of this layer among all of the model, from 0: forget gates start otherwise in deeper ones.
        num_layers: layers of the model.
        norm_eps: added to the variance in each head's norm.
        backend: ``auto``, or an implementation of the short convolution.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or ``layer_index`` is not below ``num_layers``.
    """

    state_formula = "4·dim + (conv_size-1)·dim"
    operators = ("short_conv",)
    no_weight_decay = frozenset({"recurrent"})

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        conv_size: int = 4,
        layer_index: int = 0,
        num_layers: int = 1,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}")
        self.num_heads = num_heads
        self.depth, _ = depth_ratios(layer_index, num_layers)
        size = dim // num_heads
        self.conv = CausalConv(dim, conv_size, bias=True, activation="silu", backend=backend)
        # Of the gates i, f, z and o.
        self.gates = nn.Parameter(torch.empty(4, num_heads, size, size))
        self.recurrent = nn.Parameter(torch.empty(num_heads, size, 4 * size))
        self.bias = nn.Parameter(torch.empty(4 * dim))
        self.norm = GroupLayerNorm(dim, groups=num_heads, eps=norm_eps, backend=backend)
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        dim, size = self.norm.dim, self.gates.shape[-1]
        nn.init.normal_(self.gates, std=(2 / (5 * dim)) ** 0.5)
        nn.init.zeros_(self.recurrent)
        nn.init.zeros_(self.bias)
        # Forget gates from open to shut over a head's channels.
        place = torch.arange(size, device=self.bias.device) / max(size - 1, 1)
        self.bias[dim : 2 * dim] = (5 - 12 * place ** (0.3 + 1.3 * self.depth)).repeat(self.num_heads)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._draw()

    def input_weight(self) -> Tensor:
        return self.gates

    @torch.no_grad()
    def scale_output(self, factor: float) -> None:
        self.norm.weight.mul_(factor)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: SLSTMState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], SLSTMState]:
        mixed, conv = self.conv(x, state and state.conv, starts)
        heads = [rearrange(z, "b t (h i) -> h (b t) i", h=self.num_heads) for z in (mixed, mixed, x, x)]
        driven = torch.cat([z @ weight for z, weight in zip(heads, self.gates, strict=True)], -1)
        wide = torch.promote_types(x.dtype, torch.float32)
        bias = rearrange(self.bias.to(wide), "(g h i) -> h 1 (g i)", g=4, h=self.num_heads)
        driven = rearrange(driven.to(wide) + bias, "h (b t) g -> t h b g", t=x.shape[1])
        if state is None:
            zero = driven.new_zeros(self.num_heads, len(x), self.gates.shape[-1])
            carried = zero, zero, zero, zero + NOTHING
        else:
            for name, z in zip(SLSTMState._fields[:4], state[:4], strict=True):
                check_floats("SLSTM", f"state.{name}", z, (len(x), x.shape[2]))
            carried = tuple(rearrange(z.to(wide), "b (h i) -> h b i", h=self.num_heads) for z in state[:4])
        with torch.autocast(x.device.type, enabled=False):
            outputs, carried = self._walk(driven, carried, starts)
        y = self.norm(rearrange(outputs, "t h b i -> b t (h i)").to(x.dtype))
        h, c, n, m = (rearrange(z, "h b i -> b (h i)") for z in carried)
        return y, SLSTMState(h, c, n, m, conv)

    def _walk(
        self, driven: Tensor, carried: tuple[Tensor, ...], starts: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Outputs ``[time head batch channel]`` and what is carried on."""
        recurrent, outputs = self.recurrent.to(driven.dtype), []
        begins = [None] * len(driven) if starts is None else starts.T[:, None, :, None].unbind(0)
        for driven_t, begin in zip(driven.unbind(0), begins, strict=True):
            h, c, n, m = carried
            if begin is not None:
                h, c, n, m = (*(z.masked_fill(begin, 0) for z in (h, c, n)), m.masked_fill(begin, NOTHING))
            i, f, z, o = torch.baddbmm(driven_t, h, recurrent).chunk(4, -1)
            kept = F.logsigmoid(f) + m
            m = torch.maximum(i, kept)
            write, keep = (i - m).exp(), (kept - m).exp()
            c, n = keep * c + write * z.tanh(), keep * n + write
            h = o.sigmoid() * c / n
            carried = h, c, n, m
            outputs.append(h)
        return torch.stack(outputs), carried

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        wide = torch.promote_types(dtype, torch.float32)
        return 4 * self.norm.dim * wide.itemsize + self.conv.state_bytes(dtype)
