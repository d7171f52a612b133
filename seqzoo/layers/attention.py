"""Softmax attention over all past tokens, or a window (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762).

With grouped queries (https://arxiv.org/abs/2305.13245), rotary positions (https://arxiv.org/abs/2104.09864) and how
they stretch, norms of queries and keys (https://arxiv.org/abs/2010.04245), a sliding window
(https://arxiv.org/abs/2004.05150), first tokens that stay visible (https://arxiv.org/abs/2309.17453), a learned logit
beside them (https://arxiv.org/abs/2508.10925) and a cap on logits (https://arxiv.org/abs/2408.00118). Left out: rotary
scalings that change with the length that is read, for keys that are kept have turned already.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.attention import attention
from seqzoo.mixer import Mixer, positions_from_starts
from seqzoo.parts.key_value_memory import KeyValueBuffer, KeyValueRing, first_slots
from seqzoo.parts.norm import GroupRMSNorm
from seqzoo.parts.rotary import RopeLayout, RopeScaling, Rotary
from seqzoo.parts.settings import check_positive


class Attention(Mixer):
    """Exact look-up of everything, or of the last ``window`` tokens, at a cost that grows with what is kept.

        o_t = sum_j softmax_j(q_t . k_j / sqrt(key)) v_j,   j <= t, and t - j < window or j < sinks where they are set

    Args:
        dim: width of the input and output.
        num_heads: query heads; must divide ``dim`` unless ``head_dim`` is given.
        num_kv_heads: key and value heads, each shared by a group of query heads; None for one a query head.
        head_dim: size of a head; None for ``dim / num_heads``.
        window: tokens that are visible, the current one included; None for all.
        sinks: first tokens of a document that stay visible beyond the window.
        learned_sink: whether each head learns the logit of an empty value beside what is visible.
        soft_cap: logits stay between minus and plus this, by ``soft_cap * tanh(logit / soft_cap)``; None for no cap.
        qk_norm: whether the queries and keys of each head are RMS-normalised, with one scale a channel for all heads.
        norm_eps: added to the mean square there.
        positions: ``rope`` turns queries and keys by their place in the document; ``none`` leaves order to others.
        rope_base: the base of the rotary frequencies.
        rope_layout: channels that turn together, ``halves`` (i, i + head_dim/2) or ``neighbours`` (2i, 2i + 1).
        rope_scaling: how angles shrink for longer documents, ``none``, ``linear``, ``ntk``, ``yarn`` or ``llama3``.
        rope_factor: how many times longer than in training.
        rope_original_length: tokens in a document of training, which ``yarn`` and ``llama3`` need.
        temperature: a, by which queries grow with their place p, ``1 + a log(1 + floor((p + 1) / temperature_step))``,
            as in Llama 4's layers without positions; 0 for not.
        temperature_step: tokens from one step of the temperature to the next.
        max_length: longest document, in tokens, that is accepted; None for no limit. Unchecked in ``torch.compile``.
        backend: ``auto``, or an implementation that its operator has (see ``seqzoo layers``); with ``auto`` what
            PyTorch's own attention can do goes through it.

    Raises:
        ValueError: settings do not fit together, or a document passes ``max_length``.
    """

    state_formula = "2·T·kv_heads·head_dim, or 2·(sinks+window)·kv_heads·head_dim"
    operators = ("attention",)

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        sinks: int = 0,
        learned_sink: bool = False,
        soft_cap: float | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        positions: Literal["rope", "none"] = "rope",
        rope_base: float = 10_000.0,
        rope_layout: RopeLayout = "halves",
        rope_scaling: RopeScaling = "none",
        rope_factor: float = 1.0,
        rope_original_length: int | None = None,
        temperature: float = 0.0,
        temperature_step: int = 8192,
        max_length: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or (head_dim is None and dim % num_heads):
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}; give head_dim, or another number")
        if kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}")
        if head_dim is not None and head_dim < 1:
            raise ValueError(f"head_dim={head_dim}: use 1 or more, or None for dim/num_heads")
        if window is not None and window < 1:
            raise ValueError(f"window={window}: a token sees at least itself; use 1 or more, or None to see all")
        if sinks < 0 or (sinks and window is None):
            raise ValueError(f"sinks={sinks} with window={window}: sinks are 0 or more, and only a window needs them")
        if soft_cap is not None:
            check_positive("soft_cap", soft_cap)
        check_positive("norm_eps", norm_eps)
        if positions not in ("rope", "none"):
            raise ValueError(f"positions={positions!r}: use 'rope' or 'none'")
        if not 0 <= temperature < math.inf or temperature_step < 1:
            raise ValueError(
                f"temperature={temperature}, temperature_step={temperature_step}: expected finite numbers, at "
                "least 0 and at least 1"
            )
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length}: use 1 or more, or None for no limit")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, kv_heads, head_dim or dim // num_heads
        self.window, self.sinks, self.constant_state = window, sinks, window is not None
        rotary = Rotary(self.head_dim, rope_base, rope_layout, rope_scaling, rope_factor, rope_original_length)
        self.rotary = rotary.check() if positions == "rope" else rotary.unused("positions='none'")
        self.soft_cap, self.max_length, self.backend = soft_cap, max_length, backend
        self.temperature, self.temperature_step = temperature, temperature_step
        self.query = nn.Linear(dim, num_heads * self.head_dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * kv_heads * self.head_dim, bias=False)
        self.query_norm, self.key_norm = (
            GroupRMSNorm(self.head_dim, eps=norm_eps, backend=backend) if qk_norm else None for _ in range(2)
        )
        self.sink = nn.Parameter(torch.empty(num_heads)) if learned_sink else None
        self.out = nn.Linear(num_heads * self.head_dim, dim, bias=False)
        self._draw()

    def _draw(self) -> None:
        if self.sink is not None:
            nn.init.zeros_(self.sink)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._draw()

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: KeyValueBuffer | KeyValueRing | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], KeyValueBuffer | KeyValueRing]:
        kind = KeyValueBuffer if self.window is None else KeyValueRing
        if state is not None and not isinstance(state, kind):
            raise ValueError(
                f"Attention: state is a {type(state).__name__}; with window={self.window} expected a {kind.__name__}"
            )
        batch, time, _ = x.shape
        positions = positions_from_starts(starts, state and state.position, time, x.device).expand(batch, -1)
        self._check_length(positions)
        q, k, v = self.query(x), *self.key_value(x).chunk(2, -1)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = (rearrange(z, "b t (h d) -> b t h d", d=self.head_dim) for z in (q, k, v))
        if self.rotary is not None:
            q, k = self.rotary.turn(q, positions), self.rotary.turn(k, positions)
        if self.temperature:
            steps = ((positions + 1) // self.temperature_step).to(torch.promote_types(q.dtype, torch.float32))
            q = (q * (1 + self.temperature * steps.log1p())[..., None, None]).to(q.dtype)
        attend = self._attend_all if self.window is None else self._attend_window
        y, state = attend(q, k, v, positions, state, starts is None)
        return self.out(rearrange(y, "b t h d -> b t (h d)")), state

    def _attend_all(self, q, k, v, positions, state, unbroken):
        memory = KeyValueBuffer.after(state, k, v, positions[:, -1] + 1)
        k, v, _ = memory.used(q.dtype)
        first = None if state is None and unbroken else first_slots(positions, k.shape[1])
        return self._attend(q, k, v, first, None, 0), memory

    def _attend_window(self, q, k, v, positions, state, unbroken):
        assert self.window is not None
        time, position = k.shape[1], positions[:, -1] + 1
        if state is not None and time == 1 and unbroken:
            # All that the ring holds is visible, and its order does not matter: keys have turned already.
            ring = state.step(k, v, position, self.window, self.sinks)
            k, v = ring.keys.to(q.dtype), ring.values.to(q.dtype)
            return self._attend(q, k, v, ring.empty()[:, None], None, 0), ring
        ring = KeyValueRing.after(state, k, v, position, self.window, self.sinks)
        first = None if unbroken else first_slots(positions, time)
        if state is not None:
            k, v, first = state.before(k, v, positions, self.window, self.sinks)
        return self._attend(q, k, v, first, self.window, self.sinks), ring

    def _attend(self, q, k, v, first, window, sinks):
        cap, backend = self.soft_cap, self.backend
        return attention(q, k, v, None, self.sink, first, window=window, sinks=sinks, soft_cap=cap, backend=backend)

    def _check_length(self, positions: Tensor) -> None:
        if self.max_length is None or torch.compiler.is_compiling() or not len(positions):
            return
        longest = int(positions.max()) + 1
        if longest > self.max_length:
            raise ValueError(
                f"a document of {longest} tokens passes max_length={self.max_length}; raise the limit, set a window, "
                "or feed shorter documents"
            )

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        slots = length if self.window is None else self.sinks + self.window
        return 2 * slots * self.num_kv_heads * self.head_dim * dtype.itemsize + torch.int64.itemsize
