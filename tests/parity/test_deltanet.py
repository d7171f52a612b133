"""DeltaNet against fla's layer, run with fla's naive delta rule."""

from __future__ import annotations

import pytest
import torch
from fla_layers import fla_layers, l2, new_cache, run_fla
from peers import CacheAgreement, assert_rounds_no_worse, pair

from seqzoo import clone_state
from seqzoo.layers import DeltaNet
from seqzoo.parts.delta_rule import DeltaRuleState


def delta_rule(q, k, v, beta, initial_state, use_qk_l2norm_in_kernel, **_):
    from fla.ops.delta_rule.naive import delta_rule_recurrence

    assert use_qk_l2norm_in_kernel
    q, k, v, beta = (x.transpose(1, 2) for x in (l2(q), l2(k), v, beta))
    o, state = delta_rule_recurrence(q, k, v, beta, initial_state)
    return o.transpose(1, 2), state


fla = fla_layers("delta_net", chunk_delta_rule=delta_rule, fused_recurrent_delta_rule=delta_rule)

NAMES = {
    "qkv.projection.weight": lambda theirs: torch.cat([theirs[f"{name}_proj.weight"] for name in "qkv"]),
    "write.weight": "b_proj.weight",
    "norm.weight": "o_norm.weight",
    "out.weight": "o_proj.weight",
}
CONV = {"qkv.conv.weight": lambda theirs: torch.cat([theirs[f"{name}_conv1d.weight"].squeeze(1) for name in "qkv"])}
# With less, the norm undoes how strongly a first token is written: its gradient is rounding.
EPS = 1e-2


def state_from(cache, state):
    """Ours keeps one input less: the peer's oldest has no use."""
    kept = cache[0]["conv_state"]
    conv = state.conv if kept is None else torch.cat([part[..., 1:] for part in kept], 1).mT
    return clone_state(DeltaRuleState(cache[0]["recurrent_state"], conv))


@pytest.fixture(params=["default", "gate and negative eigenvalues", "no convolution"])
def both(request):
    more, conv = request.param.startswith("gate"), request.param != "no convolution"
    sizes = {"num_heads": 4, "norm_eps": EPS, "use_gate": more}
    peer = fla.DeltaNet(
        hidden_size=32, expand_k=0.5, expand_v=1.5, allow_neg_eigval=more, use_short_conv=conv, layer_idx=0, **sizes
    )
    sizes |= {"key_dim": 4, "value_dim": 12, "conv_size": 4 if conv else None}
    ours = DeltaNet(32, negative_eigenvalues=more, **sizes)
    names = NAMES | (CONV if conv else {}) | ({"gate.weight": "g_proj.weight"} if more else {})
    return pair(ours, peer, names, run_fla, new_cache=new_cache, state_from=state_from)


class TestDeltaNet(CacheAgreement):
    pass


def test_rounds_no_worse_in_bfloat16(both):
    assert_rounds_no_worse(both)
