"""Mamba3 against the official step of state-spaces/mamba (tests/ops/triton/test_mamba3_siso.py), which needs a GPU.

The step and the layer around it (modules/mamba3.py) are written out term by term, with the angle wrapped at each token.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from peers import PRECISIONS, TIMES, TOLERANCE, differentiate, draw, error

from seqzoo.layers import Mamba3
from seqzoo.layers.mamba3 import Mamba3State

HEADS, HEAD, STATE = 4, 16, 10
CASES = {
    "official": {},
    "the paper's rate": {"rate": "softplus"},
    "groups": {"num_groups": 2},
    "all of the state turns": {"rope_fraction": 1.0},
    # With a smaller epsilon, the norm undoes how strongly a first token is written: its gradient is rounding.
    "a norm for each head": {"use_norm": True, "norm_eps": 0.1},
}


def heavy_tail_activation(x):
    return x.clamp_min(0) + torch.reciprocal(1 - x.clamp_max(0))


def rms(x, weight, settings):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + settings.get("norm_eps", 1e-5)) * weight


def rotate(x, cos, sin):
    """Adjacent pairs; where there are fewer angles than pairs, the last ones do not turn."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos = F.pad(cos, (0, first.shape[-1] - cos.shape[-1]), value=1.0)
    sin = F.pad(sin, (0, first.shape[-1] - sin.shape[-1]))
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)


def official(layer, u, state, settings):
    groups = settings.get("num_groups", 1)
    angles = int(STATE * settings.get("rope_fraction", 0.5)) // 2
    sizes = [HEADS * HEAD, HEADS * HEAD, STATE * groups, STATE * groups, HEADS, HEADS, HEADS, angles]
    activation = F.softplus if settings.get("rate") == "softplus" else heavy_tail_activation
    angle_state, ssm_state, k_state, v_state = state
    outputs = []
    for u_t in u.unbind(1):
        z, x, B, C, dd_dt, dd_A, trap, angle = (u_t @ layer.projection.weight.T).split(sizes, -1)
        x = x.unflatten(-1, (HEADS, HEAD))
        B = rms(B.unflatten(-1, (groups, STATE)), layer.write_norm.weight, settings).repeat_interleave(
            HEADS // groups, 1
        )
        C = rms(C.unflatten(-1, (groups, STATE)), layer.read_norm.weight, settings).repeat_interleave(
            HEADS // groups, 1
        )
        A = torch.clamp(-activation(dd_A), max=-1e-4)
        DT = F.softplus(dd_dt + layer.dt_bias)
        trap = torch.sigmoid(trap)
        angle_state = angle_state + (torch.tanh(angle) * math.pi)[:, None] * DT[..., None]
        angle_state = angle_state - 2 * math.pi * torch.floor(angle_state / (2 * math.pi))
        cos, sin = angle_state.cos(), angle_state.sin()
        q, k = rotate(C + layer.read_bias, cos, sin), rotate(B + layer.write_bias, cos, sin)
        alpha = torch.exp(A * DT)
        beta, gamma = (1 - trap) * DT * alpha, trap * DT
        ssm_state = alpha[..., None, None] * ssm_state
        ssm_state = ssm_state + beta[..., None, None] * (k_state[..., None, :] * v_state[..., None])
        ssm_state = ssm_state + gamma[..., None, None] * (k[..., None, :] * x[..., None])
        y = torch.einsum("bhdD,bhD->bhd", ssm_state, q) + layer.skip[:, None] * x
        if settings.get("use_norm"):
            y = rms(y, layer.norm.weight.unflatten(0, (HEADS, HEAD)), settings)
        outputs.append((y.flatten(1) * z * torch.sigmoid(z)) @ layer.out.weight.T)
        k_state, v_state = k, x
    return torch.stack(outputs, 1), (angle_state, ssm_state, k_state, v_state)


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    """A layer in float64 that has learned: steps long enough that memory and turns weigh in."""
    settings = request.param
    layer = Mamba3(32, state_size=STATE, head_dim=HEAD, **settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        layer.dt_bias.uniform_(-3, 0)
    return layer, settings


def nothing(x, settings):
    """The official state at the start of a sequence: angles, memory, key and value."""
    angles = int(STATE * settings.get("rope_fraction", 0.5)) // 2
    shapes = (angles,), (HEAD, STATE), (STATE,), (HEAD,)
    return tuple(x.new_zeros(len(x), HEADS, *shape) for shape in shapes)


def results(layer, call, x):
    x = x.detach().requires_grad_()
    y, (angle, memory, key, value) = call(x)
    # An angle near 0 may come out near 2 pi: what counts is where it points.
    parts = {"y": y, "memory": memory, "cos": angle.cos(), "sin": angle.sin(), "key": key, "value": value}
    read = torch.cat([part.flatten() for part in parts.values()])
    return parts | differentiate(read, {"x": x} | dict(layer.named_parameters()))


def theirs(layer, x, settings):
    return results(layer, lambda x: official(layer, x, nothing(x, settings), settings), x)


def ours(layer, x, cut=0):
    def call(x):
        outputs, state = [], None
        for piece in x.split([cut, x.shape[1] - cut] if cut else [x.shape[1]], 1):
            y, state = layer(piece, state)
            outputs.append(y)
        return torch.cat(outputs, 1), (state.angle, state.memory.mT, state.key, state.value)

    return results(layer, call, x)


@PRECISIONS
@TIMES
def test_values_and_gradients(case, dtype, time):
    layer, settings = case
    x = draw(time, dtype)
    truth = theirs(layer.to(dtype).double(), x.double(), settings)
    for name, tensor in ours(layer.to(dtype), x).items():
        assert (apart := error(tensor, truth[name])) <= TOLERANCE[dtype], f"{name} are {apart:.2e} apart"


@pytest.mark.parametrize("cut", [1, 37, 99])
def test_gradients_through_the_state(case, cut):
    layer, settings = case
    x = draw(100, torch.float64)
    truth = theirs(layer, x, settings)
    for name, tensor in ours(layer, x, cut).items():
        assert (apart := error(tensor, truth[name])) <= 1e-10, f"{name} are {apart:.2e} apart"


@torch.no_grad()
def test_goes_on_from_the_official_state(case):
    layer, settings = case
    x, more = draw(37, torch.float64), draw(20, torch.float64, seed=1)
    _, state = official(layer, x, nothing(x, settings), settings)
    angle, memory, key, value = state
    expected, _ = official(layer, more, state, settings)
    y, _ = layer(more, Mamba3State(memory.mT.contiguous(), angle, key, value))
    assert error(y, expected) < 1e-10


@torch.no_grad()
def test_a_later_step_however_long_changes_nothing_before_it():
    """The parallel form that looks ahead adds the next token's share and takes it off again: here it is never added."""
    layer, x = Mamba3(32, state_size=STATE, head_dim=HEAD), draw(40, torch.float32)
    before, _ = layer(x)
    x[:, 30] *= 1e6
    after, _ = layer(x)
    assert torch.equal(before[:, :30], after[:, :30]) and after.isfinite().all()
