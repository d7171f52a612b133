"""How layers start: the distributions of the official code (state-spaces/mamba, NVlabs/GatedDeltaNet)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from seqzoo.layers import (
    HGRN2,
    LRU,
    MLSTM,
    RGLRU,
    RWKV6,
    RWKV7,
    S4D,
    S5,
    SLSTM,
    TTTMLP,
    Based,
    DeltaNet,
    DeltaProduct,
    DifferentialAttention,
    ForgettingAttention,
    GatedDeltaNet,
    GatedDeltaNet2,
    GatedLinearAttention,
    Hyena,
    KimiDeltaAttention,
    LightningAttention,
    LongConv,
    Mamba,
    Mamba2,
    Mamba3,
    MinGRU,
    NeuralMemory,
    RetNet,
    RWKV6ChannelMix,
    RWKV7ChannelMix,
    SGConv,
    ShortConv,
    TTTLinear,
)
from seqzoo.mixer import reset_parameters
from seqzoo.parts.decay import SMALLEST_STEP, SoftplusDecay
from seqzoo.parts.state_space import legendre_eigenvalues


@pytest.fixture(params=["constructed", "reset"])
def start(request):
    """A layer as it is constructed, and one whose parameters were all overwritten and then drawn anew."""

    def build(layer, dim, **settings):
        mixer = layer(dim, **settings)
        if request.param == "reset":
            with torch.no_grad():
                for parameter in mixer.parameters():
                    parameter.fill_(torch.nan)
            reset_parameters(mixer)
        return mixer

    return build


def assert_uniform(x, low, high):
    """Inside the range, filling it, and with the mean and spread of a uniform distribution."""
    width = high - low
    assert x.min() >= low - 1e-5 * width and x.max() <= high + 1e-5 * width
    assert x.min() < low + 0.02 * width and x.max() > high - 0.02 * width
    assert abs(x.mean() - (low + high) / 2) < 0.05 * width
    assert abs(x.std() - width / math.sqrt(12)) < 0.05 * width


@pytest.mark.parametrize(
    ("layer", "settings", "slowest"),
    [
        (Mamba2, {"head_dim": 1, "state_size": 1}, 1.0),
        (GatedDeltaNet, {"num_heads": 1024, "key_dim": 1}, 0.01),
        (DeltaProduct, {"num_heads": 1024, "key_dim": 1}, 0.01),
        (KimiDeltaAttention, {"num_heads": 1024, "key_dim": 1}, 1.0),
        (GatedDeltaNet2, {"num_heads": 1024, "key_dim": 1}, 1.0),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_decay_rates_and_steps(start, layer, settings, slowest):
    mixer = start(layer, 512, **settings)
    assert mixer.decay.A_log.shape == mixer.decay.dt_bias.shape == (1024,)
    assert_uniform(mixer.decay.A_log.detach().exp(), slowest, 16.0)
    assert_uniform(F.softplus(mixer.decay.dt_bias.detach()).log(), math.log(1e-3), math.log(1e-1))


def test_bounded_decays_start_at_the_rate_one(start):
    """fla's and GLM's: a sigmoid of the steps themselves, one step for each channel of a key."""
    decay = start(KimiDeltaAttention, 512, lower_bound=-5.0).decay
    assert not decay.A_log.any() and decay.dt_bias.shape == (512,)
    assert_uniform(F.softplus(decay.dt_bias.detach()).log(), math.log(1e-3), math.log(1e-1))


def test_projections_of_gated_deltanet2(start):
    """NVIDIA's: each matrix by itself, queries', keys' and values' too, in 2^-2.5 of Glorot's range; biases zero."""
    delta = start(GatedDeltaNet2, 256, value_dim=96)
    queries, keys, values = delta.qkv.projection.weight.split([256, 256, 384])
    linears = (*delta.step.children(), delta.erase, delta.write, *delta.gate.children(), delta.out)
    for matrix in (queries, keys, values, *(linear.weight for linear in linears)):
        bound = 2**-2.5 * (6 / sum(matrix.shape)) ** 0.5
        assert_uniform(matrix.detach(), -bound, bound)
    assert not delta.gate.up.bias.any()


def test_steps_are_never_below_the_smallest():
    assert SMALLEST_STEP == 1e-4
    decay = SoftplusDecay(1024, rate_range=(1.0, 16.0), step_range=(1e-6, 1e-1))
    assert F.softplus(decay.dt_bias).min() >= SMALLEST_STEP * (1 - 1e-3)


def test_norms_and_skips_are_one(start):
    mamba2 = start(Mamba2, 32, head_dim=8)
    deltas = [start(layer, 32) for layer in (DeltaNet, DeltaProduct, GatedDeltaNet, GatedDeltaNet2, KimiDeltaAttention)]
    for parameter in (mamba2.skip, mamba2.norm.weight, *(delta.norm.weight for delta in deltas)):
        assert (parameter == 1).all()


@pytest.mark.parametrize(
    ("layer", "size", "has_bias"),
    [(Mamba, 4, True), (Mamba2, 4, True), (GatedDeltaNet, 4, False), (ShortConv, 3, False)],
)
def test_convolutions_start_like_pytorchs(start, layer, size, has_bias):
    """``nn.Conv1d`` with a group for each channel: uniform up to one over the root of the taps, bias and all."""
    mixer = start(layer, 256)
    conv = mixer.qkv.conv if layer is GatedDeltaNet else mixer.conv
    channels = len(conv.weight)
    theirs = nn.Conv1d(channels, channels, size, groups=channels, bias=has_bias)
    assert conv.weight.shape == (channels, size)
    assert (conv.bias is not None) == has_bias
    for parameter in (*conv.parameters(), *theirs.parameters()):
        assert_uniform(parameter.detach(), -(size**-0.5), size**-0.5)


def test_projections_have_no_bias(start):
    deltas = (DeltaNet, DeltaProduct, GatedDeltaNet, KimiDeltaAttention)
    others = (Based, HGRN2, LightningAttention, MinGRU, RetNet, ShortConv)
    for layer in (Mamba, Mamba2, Mamba3, *deltas, *others):
        for name, module in start(layer, 64).named_modules():
            assert not isinstance(module, nn.Linear) or module.bias is None, name


def test_projections_have_the_official_widths(start):
    """E = 2 D inner channels: W_in gives z, x, B, C and dt; the convolution runs over x, B and C."""
    mamba2 = start(Mamba2, 64, state_size=16, num_groups=2)
    assert mamba2.projection.weight.shape == (2 * 128 + 2 * 2 * 16 + 2, 64)
    assert len(mamba2.conv.weight) == 128 + 2 * 2 * 16
    delta = start(GatedDeltaNet, 64, num_heads=4)
    assert (delta.qkv.key_dim, delta.qkv.value_dim) == (12, 24)  # 0.75 D keys and 1.5 D values in all
    assert len(delta.qkv.conv.weight) == 4 * (12 + 12 + 24)


def test_mamba(start):
    """Rates 1 to N, steps as Mamba-2's, made from R = D / 16 numbers with weights up to one over the root of R."""
    mamba = start(Mamba, 500, state_size=7, parameter_norm="learned")
    rates = torch.arange(1.0, 8.0).expand(1000, 7)
    torch.testing.assert_close(mamba.A_log.exp(), rates)
    assert_uniform(F.softplus(mamba.dt_bias.detach()).log(), math.log(1e-3), math.log(1e-1))
    assert mamba.step.weight.shape == (1000, 32) and mamba.step_write_read.weight.shape == (32 + 7 + 7, 1000)
    assert_uniform(mamba.step.weight.detach(), -(32**-0.5), 32**-0.5)
    for parameter in (mamba.skip, *mamba.norms.parameters()):
        assert (parameter == 1).all()


def test_rg_lru(start):
    """An open gate decays as e^{-8 softplus(rate)}: its eighth root starts uniform by area on a ring, 0.9 to 0.999."""
    layer = start(RGLRU, 512, width=2048, num_heads=8)
    assert_uniform(torch.exp(-2 * F.softplus(layer.decay_rate.detach())), 0.9**2, 0.999**2)
    spreads = {layer.projection: 512**-0.5, layer.out: 2048**-0.5, layer.conv: 0.05}
    spreads |= {layer.input_gate: 256**-0.5, layer.decay_gate: 256**-0.5}
    for module, spread in spreads.items():
        assert abs(module.weight.mean()) < 0.05 * spread and abs(module.weight.std() / spread - 1) < 0.05
    for bias in (layer.projection.bias, layer.out.bias, layer.conv.bias, layer.input_bias, layer.decay_bias):
        assert not bias.any()
    assert layer.input_gate.weight.shape == (8, 256, 256)


def test_lru(start):
    """Eigenvalues uniform by area on a ring; inputs scaled so that states have the inputs' size; Glorot matrices."""
    layer = start(LRU, 256, state_size=1024, min_radius=0.5, max_radius=0.9, max_phase=3.0)
    radius, phase = torch.exp(-layer.nu_log.detach().exp()), layer.theta_log.detach().exp()
    assert_uniform(radius**2, 0.25, 0.81)
    assert_uniform(phase, 0.0, 3.0)
    torch.testing.assert_close(layer.gamma_log.exp(), (1 - radius**2).sqrt())
    for tensor, spread in ((layer.write.weight, 512**-0.5), (layer.read.weight, 1024**-0.5), (layer.skip, 1.0)):
        assert abs(tensor.mean()) < 0.2 * spread and abs(tensor.std() / spread - 1) < 0.15


def test_mamba3(start):
    """Steps as Mamba-2's; biases, skips and norms at one; W_in gives z, x, B, C, dt, A, the blend and N/4 angles."""
    layer = start(Mamba3, 512, head_dim=1, state_size=8, num_groups=2, use_norm=True)
    assert_uniform(F.softplus(layer.dt_bias.detach()).log(), math.log(1e-3), math.log(1e-1))
    assert layer.projection.weight.shape == (2 * 1024 + 2 * 2 * 8 + 3 * 1024 + 2, 512)
    assert layer.write_bias.shape == layer.read_bias.shape == (1024, 8)
    norms = [layer.write_norm.weight, layer.read_norm.weight, layer.norm.weight]
    for parameter in (layer.write_bias, layer.read_bias, layer.skip, *norms):
        assert (parameter == 1).all()


def test_s4d(start):
    """Steps log-uniform, decay rates of one half, frequencies of the three kinds, and complex C of variance one."""
    n = torch.arange(32)
    frequencies = {
        "linear": torch.pi * n,
        "inverse": 64 / torch.pi * (64 / (2 * n + 1) - 1),
        "legendre": legendre_eigenvalues(64)[0].imag.float(),
    }
    for name, expected in frequencies.items():
        layer = start(S4D, 1024, frequencies=name)
        torch.testing.assert_close(layer.frequency, expected.expand(1024, 32))
        torch.testing.assert_close(layer.decay_log.exp(), torch.full((1024, 32), 0.5))
        assert_uniform(layer.log_step.detach(), math.log(1e-3), math.log(1e-1))
        assert abs(layer.read.square().sum(-1).mean() - 1) < 0.02 and abs(layer.skip.std() - 1) < 0.1


def test_s5(start):
    """HiPPO's rates in every block, and matrices in the basis of its eigenvectors, of variance 1 / state_size."""
    layer = start(S5, 256, state_size=512, num_blocks=4)
    assert_uniform(layer.log_step.detach(), math.log(1e-3), math.log(1e-1))
    values, vectors = legendre_eigenvalues(128)
    torch.testing.assert_close(layer.rate_real, torch.full((256,), -0.5))
    torch.testing.assert_close(layer.rate_imaginary.double(), values.imag.repeat(4), rtol=1e-6, atol=1e-6)
    assert abs(layer.write.weight.square().sum(1).mean() * 512 - 1) < 0.05
    assert abs(layer.read.weight.square().sum(2).mean() * 512 - 2) < 0.1
    # B is real before it meets the eigenvectors: V V^* B, with the conjugates' half, is real again, and within bounds.
    half = torch.complex(*layer.write.weight.double().unbind(1)).unflatten(0, (4, 64))
    real = (vectors @ half).real * 2
    limit = 2 * 512**-0.5 / 0.8796
    assert real.abs().max() < 1.001 * limit and abs(real.std() * 512**0.5 - 1) < 0.02


def test_retnet(start):
    """Glorot's uniform range of each matrix by itself, far smaller: 2^-2.5 of it, and half of it for the output."""
    layer = start(RetNet, 128, num_heads=4)
    assert layer.widths == [128, 128, 256, 256]
    for matrix in layer.projection.weight.detach().split(layer.widths):
        bound = 2**-2.5 * (6 / (128 + len(matrix))) ** 0.5
        assert_uniform(matrix, -bound, bound)
    assert_uniform(layer.out.weight.detach(), -((6 / (128 + 256)) ** 0.5) / 2, (6 / (128 + 256)) ** 0.5 / 2)


def test_gated_linear_attention(start):
    """Queries, keys and decays start in 2^-2.5 of Glorot's range, all else as PyTorch's linear maps."""
    layer = start(GatedLinearAttention, 128, num_heads=4)
    queries, keys, values, gates = layer.projection.weight.detach().split([64, 64, 128, 128])
    narrow, wide = (linear.weight.detach() for linear in layer.decay)
    for matrix in (queries, keys, narrow, wide):
        bound = 2**-2.5 * (6 / sum(matrix.shape)) ** 0.5
        assert_uniform(matrix, -bound, bound)
    for matrix in (values, gates, layer.out.weight.detach()):
        assert_uniform(matrix, -(128**-0.5), 128**-0.5)
    assert layer.decay[0].bias is None and layer.decay[1].bias.abs().max() <= 16**-0.5
    assert (layer.norm.weight == 1).all()


def test_mlstm(start):
    """Gates that at first do not see the input: e^-10 enters, and heads keep from sigmoid(3) to sigmoid(6)."""
    layer = start(MLSTM, 512, num_heads=4)
    assert layer.widths == [256, 256, 512, 512]
    assert not layer.gates.weight.any()
    torch.testing.assert_close(layer.gates.bias, torch.tensor([-10.0, -10, -10, -10, 3, 4, 5, 6]))
    assert abs(layer.projection.weight.std() / (2 / (5 * 512)) ** 0.5 - 1) < 0.01
    assert (layer.norm.weight == 1).all()


def test_slstm(start):
    """No memory of outputs; in each head, channels from sigmoid(5) kept to sigmoid(-7), more of them high up."""
    first, last = (start(SLSTM, 64, num_heads=2, layer_index=i, num_layers=3) for i in (0, 2))
    place = torch.arange(32) / 31
    for layer, power in ((first, 0.3), (last, 1.6)):
        assert not layer.recurrent.any() and (layer.norm.weight == 1).all()
        of_input, of_forget, *others = layer.bias.detach().view(4, 2, 32)
        assert not any(bias.any() for bias in (of_input, *others))
        torch.testing.assert_close(of_forget, (5 - 12 * place**power).expand(2, -1))
        assert abs(layer.gates.std() / (2 / (5 * 64)) ** 0.5 - 1) < 0.03


@pytest.mark.parametrize("layer", [TTTLinear, TTTMLP])
def test_ttt(start, layer):
    """test-time-training/ttt-lm-pytorch's: normal weights of 0.02, no bias, the mean of t steps."""
    heads = start(layer, 256, num_heads=4).heads
    shapes = [(4, 64, 64)] if layer is TTTLinear else [(4, 64, 256), (4, 256, 64)]
    assert [weight.shape for weight in heads.weights] == shapes
    for weight in (heads.rate.weight, *heads.weights):
        assert abs(weight.std() / 0.02 - 1) < 0.05 and abs(weight.mean()) < 0.002
    assert not any(bias.any() for bias in (heads.rate.bias, *heads.biases, heads.norm_bias))
    assert (heads.norm_weight == 1).all()
    torch.testing.assert_close(heads.reach, 1 / torch.arange(1.0, 17.0))
    assert heads.learning_rate == (1.0 if layer is TTTLinear else 0.1)


def test_neural_memory(start):
    """titans-pytorch's Glorot matrices; half a step, half of the momentum, and little forgetting."""
    heads = start(NeuralMemory, 256, num_heads=4, depth=3).heads
    assert [weight.shape for weight in heads.weights] == [(4, 64, 128), (4, 128, 128), (4, 128, 64)]
    for weight in heads.weights:
        bound = (6 / sum(weight.shape[1:])) ** 0.5
        assert_uniform(weight.detach(), -bound, bound)
    assert (heads.norm_weight == 1).all() and not heads.norm_bias.any()
    torch.testing.assert_close(heads.gates.bias, torch.tensor([0.0] * 8 + [-5.0] * 4))


def test_long_filters_start_as_the_official_ones(start):
    hyena, long_conv, sgconv = start(Hyena, 256), start(LongConv, 512), start(SGConv, 512)
    assert (hyena.filter.frequency == 14).all()
    for layer in (hyena.filter, long_conv, sgconv):
        assert abs(layer.skip.mean()) < 0.2 and abs(layer.skip.std() - 1) < 0.1
    first, middle = long_conv.kernel[:, :64], long_conv.kernel[:, 480:544]
    assert abs(first[0].std() - 0.02) < 0.01 and abs(middle[:8].std() / first[:8].std() - math.exp(-0.5)) < 0.15
    assert middle[-8:].std() < 1e-6 * first[-8:].std() or not middle[-8:].any()  # e^{-256 / 2}
    assert sgconv.scales.shape == (5, 512, 64) and abs(sgconv.scales.std() - 1) < 0.02
    torch.testing.assert_close((sgconv._stretch() / sgconv.norm).norm(dim=1), torch.ones(512))


def assert_orthogonal(weight, gain):
    narrow = weight.detach() if weight.shape[0] <= weight.shape[1] else weight.detach().T
    torch.testing.assert_close(narrow @ narrow.T, gain**2 * torch.eye(len(narrow)), rtol=0, atol=1e-5)


def test_rwkv6(start):
    """BlinkDL/RWKV-LM's x060, as the third of four layers: ramps over the channels, and outputs of zero."""
    place = {"layer_index": 2, "num_layers": 4}
    time, channel = start(RWKV6, 64, head_dim=8, **place), start(RWKV6ChannelMix, 64, **place)
    for index, (power, shift) in enumerate([(1, 0), (1, 0), (1, 0), (1, 0.2), (0.5, 0), (0.5, 0)]):
        expected = torch.tensor([1 - ((i / 64) ** (power * 0.5) + shift) for i in range(64)])
        torch.testing.assert_close(time.mix[index].detach(), expected)
    torch.testing.assert_close(channel.mix[1].detach(), torch.tensor([1 - (i / 64) ** 0.125 for i in range(64)]))
    decay = [-6 + 5 * (i / 63) ** (0.7 + 1.3 * 2 / 3) for i in range(64)]
    torch.testing.assert_close(time.decay.detach(), torch.tensor(decay))
    bonus = [2 / 3 * (1 - i / 63) + ((i + 1) % 3 - 1) * 0.1 for i in range(64)]
    torch.testing.assert_close(time.bonus.detach().flatten(), torch.tensor(bonus))
    for weight in (time.mix_up, time.decay_map.up.weight):
        assert_uniform(weight.detach(), -0.01, 0.01)
    zero = (time.mix_down, time.decay_map.down.weight, time.out.weight, channel.receptance.weight, channel.out.weight)
    assert not any(weight.any() for weight in zero)
    assert_orthogonal(time.value.weight, 1)
    assert_orthogonal(time.gate.weight, 0.1)
    assert_orthogonal(channel.key.weight, 1)
    assert channel.key.weight.shape == (224, 64)
    torch.testing.assert_close(time.norm.weight.detach(), torch.full((64,), 0.75**0.7))


def test_rwkv7(start):
    """BlinkDL/RWKV-LM's x070, as the third of four layers: ramps over all channels and a head's, outputs of zero."""
    place = {"layer_index": 2, "num_layers": 4}
    time, channel = start(RWKV7, 64, head_dim=8, value_residual=True, **place), start(RWKV7ChannelMix, 64, **place)
    for index, power in enumerate((0.2, 0.9, 0.7, 0.7, 0.9, 0.2)):
        expected = torch.tensor([1 - (i / 64) ** (power * 0.5) for i in range(64)])
        torch.testing.assert_close(time.mix[index].detach(), expected)
    torch.testing.assert_close(channel.mix.detach(), torch.tensor([1 - (i / 64) ** (0.5**4) for i in range(64)]))
    line = torch.arange(64) / 63 - 0.5
    zigzag = torch.arange(64) % 8 / 3.5 - 1
    zigzag = zigzag * zigzag.abs()
    ramp = -6 + 6 * (torch.arange(64) / 63) ** (1 + (2 / 3) ** 0.3)
    torch.testing.assert_close(time.decay.detach(), ramp + 0.5 + 2.5 * zigzag)
    torch.testing.assert_close(time.rate.detach(), -0.19 + 0.3 * zigzag + 0.4 * line)
    torch.testing.assert_close(time.key_scale.detach(), 0.71 - 0.1 * line)
    torch.testing.assert_close(time.value_map.up.bias.detach(), 0.73 - 0.4 * line)
    assert (time.key_rate == 1.02).all() and (time.bonus == -0.04).all()
    for linear, width in {time.receptance: 0.5, time.key: 0.05, time.value: 0.5, channel.key: 0.5}.items():
        assert_uniform(linear.weight.detach(), -width / 8, width / 8)
    for name in ("decay_map", "rate_map", "gate_map", "value_map"):
        assert not getattr(time, name).down.weight.any()
        assert_orthogonal(getattr(time, name).up.weight, 0.1)
    assert not time.out.weight.any() and not channel.out.weight.any()
    torch.testing.assert_close(time.norm.weight.detach(), torch.full((64,), 0.75**0.7))
    wide = start(RWKV7, 1024)
    assert [part.down.out_features for part in (wide.decay_map, wide.rate_map, wide.gate_map)] == [64, 64, 160]


def test_forgetting_attention_forgets_half(start):
    """Official: all weights from N(0, 0.02), biases zero, so that a gate starts around one half."""
    mixer = start(ForgettingAttention, 256, num_heads=64)
    for name, linear in mixer.named_children():
        if isinstance(linear, nn.Linear):
            assert abs(linear.weight.std() - 0.02) < 0.001 and abs(linear.weight.mean()) < 0.001, name
    assert not mixer.forget.bias.any()
    for norm in (mixer.query_norm, mixer.key_norm, mixer.norm):
        assert (norm.weight == 1).all()


def test_differential_attention_cancels_by_depth(start):
    """Official: vectors from N(0, 0.1), and a share that starts at 0.2 in the first layer and rises to 0.8."""
    shares = []
    for layer in (0, 3, 30):
        mixer = start(DifferentialAttention, 2048, num_heads=1, layer_index=layer)
        for vectors in (mixer.lambda_query, mixer.lambda_key):
            assert abs(vectors.std() - 0.1) < 0.01 and abs(vectors.mean()) < 0.01
        shares.append(mixer.start)
    assert shares == pytest.approx([0.2, 0.8 - 0.6 * math.exp(-0.9), 0.8], abs=1e-3)
