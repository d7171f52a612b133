"""KimiDeltaAttention against transformers' Kimi Linear and GLM-5 (a lower bound), and fla's layer."""

from __future__ import annotations

import pytest
import torch
from fla_layers import fla_layers, l2, new_cache, run_fla
from peers import CacheAgreement, assert_rounds_no_worse, draw, error, modeling, pair

from seqzoo import clone_state
from seqzoo.kernels.gated_delta_rule import gated_delta_rule
from seqzoo.layers import KimiDeltaAttention
from seqzoo.parts.delta_rule import DeltaRuleState

kimi, glm = modeling("kimi_linear"), modeling("glm5_next")

HEADS, KEY = 4, 8
# With less, the norm undoes how strongly a first token is written: its gradient is rounding.
EPS = 1e-2


def kda(q, k, v, g, beta, A_log, dt_bias, initial_state, allow_neg_eigval, lower_bound, state_v_first, **settings):
    """fla's kernel: gates, activations and norms inside, the state's values first."""
    from fla.ops.kda.gate import naive_kda_gate
    from fla.ops.kda.naive import naive_recurrent_kda

    inside = ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel")
    assert state_v_first and lower_bound is None and all(settings[name] for name in inside)
    g = naive_kda_gate(g, A_log, dt_bias, output_dtype=torch.float32)
    beta = beta.sigmoid() * (2 if allow_neg_eigval else 1)
    state = None if initial_state is None else initial_state.mT
    o, state = naive_recurrent_kda(l2(q), l2(k), v, g, beta, initial_state=state, output_final_state=True)
    return o, state.mT


fla = fla_layers("kda", chunk_kda=kda, fused_recurrent_kda=kda)

COMMON = {
    "qkv.projection.weight": lambda theirs: torch.cat([theirs[f"{name}_proj.weight"] for name in "qkv"]),
    "write.weight": "b_proj.weight",
    "norm.weight": "o_norm.weight",
    "out.weight": "o_proj.weight",
}
TRANSFORMERS_NAMES = COMMON | {
    "qkv.conv.weight": lambda theirs: theirs["conv1d.weight"].squeeze(1),
    "step.down.weight": "forget_gate.f_a_proj.weight",
    "step.up.weight": "forget_gate.f_b_proj.weight",
    "decay.A_log": lambda theirs: theirs["forget_gate.A_log"].flatten(),
    "decay.dt_bias": "forget_gate.dt_bias",
    "gate.down.weight": "g_a_proj.weight",
    "gate.up.weight": "g_b_proj.weight",
}
FLA_NAMES = COMMON | {
    "qkv.conv.weight": lambda theirs: torch.cat([theirs[f"{name}_conv1d.weight"].squeeze(1) for name in "qkv"]),
    "step.down.weight": "f_proj.0.weight",
    "step.up.weight": "f_proj.1.weight",
    "decay.A_log": "A_log",
    "decay.dt_bias": "dt_bias",
    "gate.down.weight": "g_proj.0.weight",
    "gate.up.weight": "g_proj.1.weight",
}


def state_from(cache, state):
    """Ours keeps one input less: the peer's oldest has no use."""
    if isinstance(cache, kimi.DynamicCache):
        layer = cache.layers[0]
        return clone_state(DeltaRuleState(layer.recurrent_states[0], layer.conv_states[0][..., 1:].mT))
    memory, conv = cache[0]["recurrent_state"].mT, torch.cat(cache[0]["conv_state"], 1)
    return clone_state(DeltaRuleState(memory, conv[..., 1:].mT))


def build(name):
    """Our layer with the peer's weights."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "linear_num_heads": HEADS, "linear_head_dim": KEY}
    if name == "fla":
        peer = fla.KimiDeltaAttention(
            32, num_heads=HEADS, head_dim=KEY, expand_v=1.5, norm_eps=EPS, allow_neg_eigval=True, layer_idx=0
        )
        peer.g_proj[1].bias = None  # Kimi's own code has none
        gates, names, settings = peer, FLA_NAMES, {"value_dim": 12, "negative_eigenvalues": True}
        run, cache = run_fla, new_cache
    else:
        names, run = TRANSFORMERS_NAMES, lambda peer, x, cache: peer(x, cache)
        if name == "kimi":
            layer_types = ["linear_attention", "full_attention"]
            config = kimi.KimiLinearConfig(**sizes, rms_norm_eps=EPS, layer_types=layer_types)
            peer, settings = kimi.KimiLinearDeltaAttention(config, layer_idx=0), {}
        else:
            config = glm.Glm5NextTextConfig(**sizes, rms_norm_eps=EPS)
            peer, settings = glm.Glm5NextTextLinearAttention(config, layer_idx=0), {"lower_bound": -5.0}
        gates, cache = peer.forget_gate, lambda: kimi.DynamicCache(config=config)
    # Slow decays: the peers' own leave little memory to test, or are drawn by a whole model only; and transformers sums
    # the decays of a chunk, whose differences in float32 are the worse the faster they are.
    rates, steps = ((0, 1), (-4, -2)) if name == "glm" else ((-3, 0), (-2, 1))
    torch.nn.init.uniform_(gates.A_log, *rates)
    torch.nn.init.uniform_(gates.dt_bias, *steps)
    ours = KimiDeltaAttention(32, num_heads=HEADS, key_dim=KEY, norm_eps=EPS, **settings)
    return pair(ours, peer, names, run, new_cache=cache, state_from=state_from)


@pytest.fixture(params=["kimi", "glm", "fla"])
def both(request):
    return build(request.param)


class TestKimiDeltaAttention(CacheAgreement):
    pass


def test_the_chunked_peer_has_no_gradients_under_strong_decay():
    """fla's ``naive_chunk_kda`` takes e^{G_i - G_j} also of pairs that it then masks: over 64 tokens of e^-5 each it is
    infinite, and its gradient infinity times zero. fla's recurrence has gradients, and ours has the same."""
    from fla.ops.kda.naive import naive_chunk_kda, naive_recurrent_kda

    q, k, v = (draw(64, torch.float32, dim=KEY, seed=seed)[:, :, None] for seed in range(3))
    inputs = [q, l2(k), v, torch.full_like(q, -5.0), torch.full_like(q[..., 0], 0.5)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    chunked, recurrent = (form(*inputs)[0] for form in (naive_chunk_kda, naive_recurrent_kda))
    ours = gated_delta_rule(q * KEY**-0.5, *inputs[1:])[0]
    assert error(chunked, recurrent) < 1e-5 and error(ours, recurrent) < 1e-5
    of_chunked, of_recurrent, of_ours = (torch.autograd.grad(y.sum(), inputs) for y in (chunked, recurrent, ours))
    assert of_chunked[3].isnan().any()
    for gradient, expected in zip(of_ours, of_recurrent, strict=True):
        assert error(gradient, expected) < 1e-5


def test_rounds_no_worse_in_bfloat16(both):
    assert_rounds_no_worse(both)
