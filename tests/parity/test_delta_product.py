"""DeltaProduct against fla's layer, run with fla's naive product of delta rules."""

from __future__ import annotations

import pytest
import torch
from fla_layers import fla_layers, l2, new_cache, run_fla
from peers import CacheAgreement, assert_rounds_no_worse, pair

from seqzoo import clone_state
from seqzoo.layers import DeltaProduct
from seqzoo.parts.delta_rule import DeltaRuleState


def delta_product(q, k, v, g, beta, initial_state, num_householder, use_qk_l2norm_in_kernel, **_):
    from fla.ops.gated_delta_product.naive import naive_recurrent_gated_delta_product

    assert use_qk_l2norm_in_kernel
    return naive_recurrent_gated_delta_product(
        l2(q), l2(k), v, g, beta, q.shape[-1] ** -0.5, initial_state=initial_state, num_householder=num_householder
    )


# The peer stays in training mode, where it always takes this kernel.
fla = fla_layers("gated_deltaproduct", chunk_gated_delta_product=delta_product)

NAMES = {
    "qkv.projection.weight": lambda theirs: torch.cat([theirs[f"{name}_proj.weight"] for name in "qkv"]),
    "qkv.conv.weight": lambda theirs: torch.cat([theirs[f"{name}_conv1d.weight"].squeeze(1) for name in "qkv"]),
    "write.weight": "b_proj.weight",
    "norm.weight": "o_norm.weight",
    "out.weight": "o_proj.weight",
}
DECAY = {"step.weight": "a_proj.weight", "decay.A_log": "A_log", "decay.dt_bias": "dt_bias"}
GATE = {"gate.weight": "g_proj.weight"}
# With less, the norm undoes how strongly a first token is written: its gradient is rounding.
EPS = 1e-2


def state_from(cache, state):
    """Ours keeps one input less: the peer's oldest has no use."""
    conv = torch.cat(cache[0]["conv_state"], 1)
    return clone_state(DeltaRuleState(cache[0]["recurrent_state"], conv[..., 1:].mT))


@pytest.fixture(params=[1, 2, 3], ids=lambda steps: f"{steps} steps")
def both(request):
    """One step without decay, gate and reflections; two with all; three with keys shared by two memories."""
    steps = request.param
    heads, key_heads, whole = (4, 2, True) if steps == 3 else (2, 2, steps == 2)
    peer = fla.GatedDeltaProduct(
        32,
        head_dim=8,
        expand_v=1.5,
        num_heads=key_heads,
        num_v_heads=heads,
        num_householder=steps,
        use_forget_gate=whole,
        use_output_gate=whole,
        allow_neg_eigval=whole,
        norm_eps=EPS,
        layer_idx=0,
    )
    if whole:
        # The peer starts at decays of e^-10 a token, which leave no memory to test.
        torch.nn.init.uniform_(peer.A_log, -3, 0)
    ours = DeltaProduct(
        32,
        steps=steps,
        num_heads=heads,
        num_key_heads=key_heads,
        key_dim=8,
        value_dim=12,
        use_decay=whole,
        use_gate=whole,
        negative_eigenvalues=whole,
        norm_eps=EPS,
    )
    return pair(
        ours, peer, NAMES | (DECAY | GATE if whole else {}), run_fla, new_cache=new_cache, state_from=state_from
    )


class TestDeltaProduct(CacheAgreement):
    pass


def test_rounds_no_worse_in_bfloat16(both):
    assert_rounds_no_worse(both)
