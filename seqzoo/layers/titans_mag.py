"""Titans, memory as a gate: attention in a window, gated by what learns while it reads (Behrouz et al. 2024, https://arxiv.org/abs/2501.00663).

There is no official code; the memory is `NeuralMemory`'s, with its choices. Where the paper leaves the gate's
nonlinearity open, it is SiLU, on the memory's side. Persistent tokens are seen by the attention alone: the memory would
have to read them anew in front of each document, which could only change its first weights, and those are learned.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from seqzoo.parts.titans import MemoryAndWindow, MemoryAndWindowState


class TitansMAG(MemoryAndWindow):
    """Exact look-up in a window, multiplied by what a long-term memory says of the same token.

        a = softmax attention over the persistent tokens and the last ``window`` ones of x
        m_t = q_t + layernorm(M_t(q_t)),   M_t an MLP after steps of gradient descent, with momentum, on x up to t
        y = W_out(rmsnorm(a) * silu(rmsnorm(m)))

    Args:
        dim: width of the input and output.
        num_heads: heads of the attention, and memories side by side; must divide ``dim``.
        window: tokens that the attention sees, the current one included.
        persistent: learned tokens that the attention always sees.
        depth: layers of a memory.
        expand: width of a memory's hidden layers, as a multiple of the head's.
        chunk: tokens whose gradients are taken at the same weights.
        learning_rate: the largest step, positive; where it is large for the depth and the chunk, learning is chaotic.
        conv_size: taps of the short convolution in front of the memory; None for none.
        rope_base: the base of the attention's rotary frequencies, above 1; None for no positions.
        norm_eps: added to the variance or the mean square in the norms.
        backend: the attention's, the memory's and its convolution's: ``auto``, or an implementation that all have (see
            ``seqzoo layers``).

    Raises:
        ValueError: heads do not fit, or a setting is out of range.
    """

    gates = True

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: MemoryAndWindowState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], MemoryAndWindowState]:
        near, window = self.attention(x, state and state.window, starts)
        far, memory = self.memory(x, state and state.memory, starts)
        return self.out(self.attention_norm(near, self.memory_norm(far))), MemoryAndWindowState(memory, window)
