"""The laws that every mixer keeps, each tested once over the whole catalogue, and what the catalogue promises."""

from __future__ import annotations

import ast
import importlib
import inspect
import math
import random
import re
import typing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import docstring_parser
import list_layers
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map, tree_unflatten

from seqzoo import Mixer, clone_state, detach_state, layers, measure_state, starts_from_cu_seqlens
from seqzoo.kernels import EVERY_OPERATOR, checked_ranges
from seqzoo.layers import (
    FAMILIES,
    HGRN2,
    LAYERS,
    LRU,
    MLSTM,
    RGLRU,
    RWKV6,
    RWKV7,
    S4D,
    S5,
    SLSTM,
    TTTMLP,
    Attention,
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
    LandmarkAttention,
    LatentAttention,
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
    SwiGLU,
    TitansMAC,
    TitansMAG,
    TitansMAL,
    TTTLinear,
)
from seqzoo.parts.key_value_memory import KeyValueBuffer

DIM, BATCH, TIME = 32, 2, 70

# Each setting that changes what a layer computes is changed at least once; the laws hold for all of these.
VARIANTS = [
    partial(Attention, num_heads=8, num_kv_heads=2, rope_base=100.0),
    partial(Attention, positions="none"),
    partial(Attention, window=5, max_length=100_000),
    partial(Attention, window=5, sinks=2),
    partial(Attention, window=100, sinks=3, num_kv_heads=1),
    partial(Attention, window=5, positions="none"),
    partial(Attention, window=5, sinks=1, learned_sink=True, soft_cap=1.0, qk_norm=True, head_dim=6, norm_eps=1e-3),
    partial(Attention, learned_sink=True, rope_layout="neighbours", rope_scaling="linear", rope_factor=2.0),
    partial(Attention, rope_scaling="ntk", rope_factor=4.0, temperature=0.2, temperature_step=10),
    partial(Attention, rope_scaling="yarn", rope_factor=4.0, rope_original_length=64, window=9, backend="reference"),
    partial(Attention, rope_scaling="llama3", rope_factor=4.0, rope_original_length=64, backend="chunked"),
    partial(ForgettingAttention, num_heads=2, qk_norm_eps=1e-3, norm_eps=1e-3, rope_base=100.0, prune=1e-14),
    partial(ForgettingAttention, shift=False, qk_norm=False, use_norm=False, backend="reference"),
    partial(ForgettingAttention, use_gate=False, backend="chunked"),
    partial(DifferentialAttention, num_heads=4, num_kv_heads=2, layer_index=3, norm_eps=1e-3, rope_base=100.0),
    partial(DifferentialAttention, num_heads=1, rope_base=None, backend="reference"),
    partial(DifferentialAttention, rope_layout="neighbours", backend="chunked"),
    partial(
        LatentAttention, num_heads=3, latent_dim=9, query_rank=7, key_dim=5, rope_dim=6, value_dim=4, norm_eps=1e-3
    ),
    partial(LatentAttention, rope_layout="halves", rope_base=100.0, backend="reference"),
    partial(LandmarkAttention, num_heads=4, num_kv_heads=2, block_size=5, rope_base=100.0),
    partial(LandmarkAttention, block_size=3, positions="none", backend="reference"),
    partial(LandmarkAttention, block_size=2, backend="chunked"),
    partial(Mamba, state_size=5, expand=1, step_rank=3, conv_size=2),
    partial(Mamba, parameter_norm="fixed", norm_eps=1e-3),
    partial(Mamba, parameter_norm="learned", backend="reference"),
    partial(Mamba2, state_size=6, head_dim=8, num_groups=2, norm_eps=1e-3),
    partial(Mamba2, state_size=6, head_dim=16, expand=1, conv_size=1),
    partial(LRU, state_size=12, min_radius=0.9, max_radius=0.999, max_phase=0.3),
    partial(LRU, backend="reference"),
    partial(S4D, state_size=6, frequencies="inverse"),
    partial(S4D, state_size=8, frequencies="legendre", backend="reference"),
    partial(S5, state_size=12, num_blocks=3),
    partial(S5, state_size=8, num_blocks=1, backend="reference"),
    partial(Mamba3, state_size=10, head_dim=8, num_groups=2, use_norm=True, norm_eps=1e-3),
    partial(Mamba3, state_size=6, head_dim=16, expand=1, rope_fraction=1.0, rate="softplus"),
    partial(Mamba3, state_size=7, head_dim=16, rope_fraction=0.3, backend="reference"),
    partial(MinGRU, expand=1, positive=False),
    partial(MinGRU, use_bias=True, backend="reference"),
    partial(RGLRU, width=24, num_heads=3, conv_size=2),
    partial(RGLRU, conv_size=1, backend="reference"),
    partial(Mamba2, state_size=6, head_dim=8, num_groups=4, norm="before_gate", skip_per_channel=True),
    partial(Mamba2, state_size=6, head_dim=8, norm="none", step_limit=(0.01, 0.05)),
    partial(Mamba2, state_size=6, backend="reference"),
    partial(RetNet, num_heads=2, key_dim=6, value_dim=5, norm_eps=1e-3),
    partial(RetNet, num_heads=3, key_dim=2, backend="reference"),
    partial(LightningAttention, num_heads=3, head_dim=5, norm_eps=1e-3),
    partial(LightningAttention, layer_index=2, num_layers=3, backend="reference"),
    partial(GatedLinearAttention, num_heads=2, key_dim=5, value_dim=3, decay_rank=2, norm_eps=1e-3),
    partial(GatedLinearAttention, decay_temperature=1.0, backend="reference"),
    partial(HGRN2, head_dim=8, lower_bound=0.5, norm_eps=1e-3),
    partial(HGRN2, head_dim=4, lower_bound=0.99, backend="reference"),
    partial(GatedDeltaNet, num_heads=2, key_dim=5, value_dim=3, conv_size=2, norm_eps=1e-3),
    partial(GatedDeltaNet, num_heads=6, num_key_heads=2, key_dim=4, negative_eigenvalues=True, use_gate=False),
    partial(GatedDeltaNet, conv_size=None, backend="reference"),
    partial(GatedDeltaNet, conv_size=1),
    partial(DeltaNet, num_heads=2, key_dim=5, value_dim=3, conv_size=2, norm_eps=1e-3, use_gate=True),
    partial(DeltaNet, conv_size=None, negative_eigenvalues=True, backend="reference"),
    partial(DeltaProduct, steps=3, num_heads=6, num_key_heads=2, key_dim=4, value_dim=3, conv_size=2, norm_eps=1e-3),
    partial(DeltaProduct, steps=1, use_decay=False, use_gate=False, negative_eigenvalues=False),
    partial(DeltaProduct, conv_size=None, backend="reference"),
    partial(KimiDeltaAttention, num_heads=2, key_dim=5, value_dim=3, conv_size=2, norm_eps=1e-3),
    partial(KimiDeltaAttention, lower_bound=-5.0, negative_eigenvalues=True),
    partial(KimiDeltaAttention, conv_size=None, backend="reference"),
    partial(GatedDeltaNet2, num_heads=2, key_dim=5, value_dim=3, conv_size=2, norm_eps=1e-3, gate="sigmoid"),
    partial(GatedDeltaNet2, conv_size=None, negative_eigenvalues=True),
    partial(GatedDeltaNet2, backend="reference"),
    partial(RWKV6, head_dim=8, mix_rank=3, decay_rank=5, norm_eps=1e-3),
    partial(RWKV6, layer_index=2, num_layers=4, backend="reference"),
    partial(RWKV7, head_dim=8, decay_rank=3, rate_rank=4, gate_rank=5, norm_eps=1e-3),
    partial(RWKV7, layer_index=2, num_layers=4, backend="reference"),
    partial(RWKV6ChannelMix, hidden=24, layer_index=2, num_layers=4),
    partial(RWKV7ChannelMix, hidden=24, layer_index=2, num_layers=4),
    partial(ShortConv, conv_size=5),
    partial(ShortConv, conv_size=1),
    partial(ShortConv, backend="reference"),
    partial(Based, num_heads=2, feature_dim=3),
    partial(Based, num_heads=2, feature_dim=1, backend="reference"),
    partial(MLSTM, num_heads=2, key_dim=5, value_dim=3, gate_soft_cap=5.0, norm_eps=1e-3),
    partial(MLSTM, backend="reference"),
    partial(SLSTM, num_heads=2, conv_size=1, layer_index=1, num_layers=2, norm_eps=1e-3),
    partial(SLSTM, backend="reference"),
    partial(TTTLinear, num_heads=2, head_dim=6, mini_batch=5, learning_rate=2.0, rope_base=100.0, use_gate=True),
    partial(TTTLinear, norm_eps=1e-3, backend="reference"),
    partial(TTTMLP, num_heads=2, head_dim=6, expand=2, mini_batch=5, learning_rate=1.0, rope_base=100.0, use_gate=True),
    partial(TTTMLP, norm_eps=1e-3, backend="reference"),
    partial(NeuralMemory, num_heads=2, head_dim=5, depth=3, expand=1, chunk=5, learning_rate=0.1, conv_size=2),
    partial(NeuralMemory, depth=1, use_gate=False, conv_size=None, norm_eps=1e-3),
    partial(NeuralMemory, backend="reference"),
    partial(TitansMAC, num_heads=2, segment=5, persistent=3, depth=3, expand=1, learning_rate=0.1, rope_base=100.0),
    partial(TitansMAC, segment=7, conv_size=None, rope_base=None, norm_eps=1e-3, backend="reference"),
    partial(TitansMAG, num_heads=2, window=5, persistent=3, depth=3, expand=1, chunk=5, learning_rate=0.1),
    partial(TitansMAG, window=100, conv_size=2, rope_base=100.0),
    partial(TitansMAG, window=1, conv_size=None, rope_base=None, norm_eps=1e-3, backend="reference"),
    partial(TitansMAL, num_heads=2, window=5, persistent=3, depth=3, expand=1, chunk=5, learning_rate=0.1),
    partial(TitansMAL, window=100, conv_size=2, rope_base=100.0),
    partial(TitansMAL, window=1, conv_size=None, rope_base=None, norm_eps=1e-3, backend="reference"),
    partial(Hyena, max_length=40, order=3, conv_size=2, filter_width=5, filter_features=3, filter_frequency=1.0),
    partial(Hyena, max_length=40, backend="reference"),
    partial(LongConv, max_length=40, squash=0.001),
    partial(LongConv, max_length=1, backend="reference"),
    partial(SGConv, max_length=40, kernel_dim=5, decay_min=1.5, decay_max=2.5),
    partial(SGConv, max_length=5, kernel_dim=5, backend="reference"),
    partial(SwiGLU, hidden=24, backend="reference"),
]
DEFAULTS = [partial(layer) for layer in LAYERS]


class ReadingState(NamedTuple):
    read: tuple
    reader: tuple


class Reading(Mixer):
    """A layer above the one that it reads, run as the stack runs them: what a layer with a source must keep."""

    def __init__(self, dim, *, layer, read, **settings):
        super().__init__()
        self.read, self.reader = read(dim), layer(dim, **settings)

    def forward(self, x, state: ReadingState | None = None, starts=None):
        old, own = (None, None) if state is None else state
        y, new = self.read(x, old, starts)
        between = F.rms_norm(x + y, x.shape[-1:])
        z, own = self.reader(between, own, starts, source=self.read.share(x, old, starts, new))
        return z, ReadingState(new, own)

    def scale_output(self, factor):
        self.reader.scale_output(factor)

    def state_bytes(self, length, *, dtype=torch.float32):
        return sum(mixer.state_bytes(length, dtype=dtype) for mixer in (self.read, self.reader))


VARIANTS.append(partial(Reading, layer=RWKV7, read=RWKV7, value_residual=True, value_rank=3))


def title(case):
    return f"{case.func.__name__}({', '.join(f'{name}={value}' for name, value in case.keywords.items())})"


def cut_at_random(seed):
    dice = random.Random(seed)
    cuts = sorted(dice.sample(range(1, TIME), dice.randint(3, 12)))
    return [end - begin for begin, end in zip([0, *cuts], [*cuts, TIME], strict=True)]


SPLITS = {
    "cut at 1 and 16": [1, 15, TIME - 16],
    "token by token at first": [1] * 18 + [TIME - 18],
    "at random": cut_at_random(0),
}


@pytest.fixture(params=[*DEFAULTS, *VARIANTS], ids=title)
def case(request):
    return request.param


@pytest.fixture
def mixer(case):
    torch.manual_seed(0)
    mixer = case(DIM).double()
    # Where all numbers of a parameter start at zero, they hide what they and others do.
    for parameter in mixer.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return mixer


@pytest.fixture
def x():
    return draw(BATCH, TIME, seed=1)


def draw(batch, time, *, seed=0, dtype=torch.float64):
    return torch.randn(batch, time, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def draw_starts(batch, time, *, seed=0):
    """Documents of about eight tokens, at other places in every row."""
    return torch.rand(batch, time, generator=torch.Generator().manual_seed(seed)) < 1 / 8


def run(mixer, x, sizes, starts=None, state=None):
    """Outputs and last state of calls over pieces of ``sizes`` tokens, each going on from the state before."""
    begins = [None] * len(sizes) if starts is None else starts.split(sizes, 1)
    outputs = []
    for piece, begin in zip(x.split(sizes, 1), begins, strict=True):
        y, state = mixer(piece, state, begin)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def meaning(state):
    """What a state says, as a list: of a key-value buffer, every row's open document and not the room behind it."""

    def open_documents(part):
        if not isinstance(part, KeyValueBuffer):
            return part
        used = part.filled.shape[1]
        spans = [(row, used - length) for row, length in enumerate(part.position.tolist())]
        return [part.position] + [kept[row, begin:used] for kept in part[:3] for row, begin in spans]

    return tree_leaves(tree_map(open_documents, state, is_leaf=lambda part: isinstance(part, KeyValueBuffer)))


def take_rows(state, rows):
    return tree_map(lambda leaf: leaf.index_select(0, torch.tensor(rows)), state)


def floats(tensors):
    """The floating-point tensors among ``tensors``; complex ones as pairs of real numbers."""
    leaves = [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in tree_leaves(tensors)]
    return [leaf for leaf in leaves if leaf.is_floating_point()]


def assert_same(actual, expected, tolerance=1e-9, what=""):
    torch.testing.assert_close(
        actual, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}" if what else text
    )


def everything(mixer, x, sizes, starts):
    """Outputs, what the last state says, and the gradients of a random reading of both."""
    x = x.clone().requires_grad_()
    y, state = run(mixer, x, sizes, starts)
    random = torch.Generator().manual_seed(3)
    read = sum((z * torch.randn(z.shape, generator=random, dtype=z.dtype)).sum() for z in [y, *floats(meaning(state))])
    return y, meaning(state), torch.autograd.grad(read, [x, *mixer.parameters()])


# Law 1: causal.


def test_the_future_changes_the_past_only_of_mixers_that_say_so(mixer, x):
    cuts = [1, 16, 36, TIME - 1]
    others = [torch.cat([x[:, :cut], 3 * draw(BATCH, TIME - cut, seed=2)], 1) for cut in cuts]
    y, *changed = mixer(torch.cat([x, *others]))[0].split(BATCH)
    same = [torch.allclose(y[:, :cut], z[:, :cut], rtol=1e-9, atol=1e-12) for cut, z in zip(cuts, changed, strict=True)]
    assert same == [mixer.causal] * len(cuts)


# Law 2: splitting.


@pytest.mark.parametrize("starts", [None, draw_starts(BATCH, TIME)], ids=["one document", "many documents"])
def test_any_split_with_the_state_carried_is_one_call(mixer, x, starts):
    expected = everything(mixer, x, [TIME], starts)
    for split, sizes in SPLITS.items():
        assert_same(everything(mixer, x, sizes, starts), expected, what=split)


def test_a_state_that_is_updated_in_place_says_the_same(mixer, x):
    starts = draw_starts(BATCH, TIME)  # of one document: test_every_length_is_its_tokens_one_by_one
    y, state = mixer(x, None, starts)
    for sizes, autograd_off in (([1] * TIME, torch.inference_mode), (SPLITS["at random"], torch.no_grad)):
        with autograd_off():
            pieces, last = run(mixer, x, sizes, starts)
        assert_same([pieces, meaning(last)], [y, meaning(state)])


@torch.no_grad()
def test_a_clone_of_the_state_outlives_the_decoding_that_goes_on_from_it(mixer, x):
    # The first token after 16 makes room in a key-value buffer, so that those that follow are written in place.
    prompt, rest, _ = x.split([17, 20, TIME - 37], 1)
    tokens = [1] * rest.shape[1]
    _, state = run(mixer, prompt, [16, 1])
    snapshot = clone_state(state)
    before = clone_state(snapshot)
    first = run(mixer, rest, tokens, state=state)
    assert_same(meaning(snapshot), meaning(before), tolerance=0)
    again = run(mixer, rest, tokens, state=clone_state(snapshot))
    once_more = run(mixer, rest, tokens, state=snapshot)
    expected = mixer(x)[0][:, 17:37]
    for y, last in (first, again, once_more):
        assert_same([y, meaning(last)], [expected, meaning(first[1])])


def test_a_detached_state_passes_values_and_no_gradients(mixer, x):
    x.requires_grad_()
    state = detach_state(mixer(x[:, :36])[1])
    y, _ = mixer(x[:, 36:], state)
    assert_same(y, mixer(x)[0][:, 36:])
    assert not torch.autograd.grad(y.sum(), x)[0][:, :36].any()


# Law 3: starts.


def test_packed_documents_are_the_same_documents_alone(mixer, x):
    rows = [[5, 1, 33, 31], [20, 50]]
    starts = torch.cat([starts_from_cu_seqlens(torch.tensor([0, *lengths]).cumsum(0)) for lengths in rows])
    y, state = mixer(x, None, starts)
    for row, lengths in enumerate(rows):
        alone = [mixer(document) for document in x[row : row + 1].split(lengths, 1)]
        assert_same(y[row : row + 1], torch.cat([part for part, _ in alone], 1))
        assert_same(meaning(take_rows(state, [row])), meaning(alone[-1][1]))


def test_left_padding_changes_nothing(mixer, x):
    lengths = [TIME, 33, 1]
    prompts = [draw(1, length, seed=length) for length in lengths]
    padded = torch.cat([torch.cat([100 * draw(1, TIME - p.shape[1], seed=9), p], 1) for p in prompts])
    starts = torch.zeros(len(lengths), TIME, dtype=torch.bool)
    starts[range(len(lengths)), [TIME - length for length in lengths]] = True
    y, state = mixer(padded, None, starts)
    for row, prompt in enumerate(prompts):
        alone, own = mixer(prompt)
        assert_same(y[row : row + 1, -prompt.shape[1] :], alone)
        assert_same(meaning(take_rows(state, [row])), meaning(own))
        for time in (1, 20):
            more = x[:1, :time]
            assert_same(mixer(more, take_rows(state, [row]))[0], mixer(more, own)[0])


def test_starts_that_never_come_are_no_starts(mixer, x):
    expected, last = mixer(x)
    for sizes in ([TIME], [40, 1, 29]):
        y, state = run(mixer, x, sizes, torch.zeros(BATCH, TIME, dtype=torch.bool))
        assert_same([y, meaning(state)], [expected, meaning(last)])


@pytest.mark.parametrize("time", [1, 2, 65])
def test_a_start_at_the_first_token_forgets_the_state(mixer, x, time):
    _, old = mixer(100 * draw(BATCH, 40, seed=5))
    starts = torch.zeros(BATCH, time, dtype=torch.bool)
    starts[:, 0] = True
    y, state = mixer(x[:, :time], old, starts)
    expected, fresh = mixer(x[:, :time])
    assert_same([y, meaning(state)], [expected, meaning(fresh)])


# Law 4: rows and lengths.


def test_batch_rows_are_independent(mixer, x):
    y, state = run(mixer, x, [50, 20])
    for row in range(BATCH):
        alone, own = run(mixer, x[row : row + 1], [50, 20])
        assert_same([y[row : row + 1], meaning(take_rows(state, [row]))], [alone, meaning(own)])


@pytest.mark.parametrize("starts", [None, draw_starts(3, TIME)], ids=["one document", "many documents"])
def test_reordering_the_rows_of_a_state_is_reordering_the_inputs(mixer, starts):
    beams, rows = draw(3, TIME), [2, 0, 0, 1]
    _, state = mixer(beams[:, :40], None, None if starts is None else starts[:, :40])
    for time in (1, 30):
        rest = draw(4, time, seed=4)
        y, last = mixer(rest, take_rows(state, rows))
        chosen = torch.cat([beams[rows, :40], rest], 1)
        begins = None if starts is None else torch.cat([starts[rows, :40], torch.zeros(4, time, dtype=torch.bool)], 1)
        expected, whole = mixer(chosen, None, begins)
        assert_same([y, meaning(last)], [expected[:, 40:], meaning(whole)])


@torch.no_grad()
def test_every_length_is_its_tokens_one_by_one(mixer):
    x, stepped, states, state = draw(BATCH, 66), [], [], None
    for token in x.split(1, 1):
        y, state = mixer(token, state)
        stepped.append(y)
        states.append(clone_state(meaning(state)))
    for time in (1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 66):
        y, state = mixer(x[:, :time])
        assert_same([y, meaning(state)], [torch.cat(stepped[:time], 1), states[time - 1]])


@pytest.mark.parametrize("starts", [None, draw_starts(BATCH, TIME)], ids=["one document", "many documents"])
def test_an_empty_batch_gives_empty_answers(mixer, x, starts):
    sizes = [20, 1, TIME - 21]
    y, state = run(mixer, x, sizes, starts)
    nothing = x[:0].requires_grad_()
    none, last = run(mixer, nothing, sizes, None if starts is None else starts[:0])
    assert_same(none, y[:0])
    shapes = [[(leaf.dtype, leaf.shape[1:]) for leaf in tree_leaves(each)] for each in (state, last)]
    assert shapes[0] == shapes[1] and all(len(leaf) == 0 for leaf in tree_leaves(last))
    read = sum((z * torch.ones_like(z)).sum() for z in [none, *floats(last)])
    gradients = torch.autograd.grad(read, [nothing, *mixer.parameters()], materialize_grads=True)
    assert not any(gradient.any() for gradient in gradients)


# Law 5: learning.


def test_every_parameter_learns_also_from_a_loss_after_the_state(mixer, x):
    x.requires_grad_()
    _, state = mixer(x[:, :30])
    y, _ = mixer(x[:, 30:], state)
    y.square().sum().backward()
    dead = [
        name
        for name, p in mixer.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]
    assert not dead
    remembers = any(leaf.numel() for leaf in floats(state))
    assert x.grad[:, :30].any() == remembers


# Law 6: hostile inputs.

HOSTILE = {
    "huge": lambda x: 1e4 * x,
    "tiny": lambda x: 1e-4 * x,
    "zero": torch.zeros_like,
    "all up": lambda x: torch.full_like(x, 1e4),
    "all down": lambda x: torch.full_like(x, -1e4),
    "one token of 1e4": lambda x: x.index_fill(1, torch.tensor([10]), 1e4),
    "a token repeated": lambda x: x[:, :1].expand_as(x),
}


def assert_finite(mixer, x, reads, what):
    """That ``reads`` are finite, and so are their gradients."""
    inputs = [x, *mixer.parameters()]
    gradients = torch.autograd.grad(sum(part.float().mean() for part in reads if part.numel()), inputs)
    assert all(part.isfinite().all() for part in [*reads, *gradients]), f"not finite: {what}"


def assert_finite_throughout(mixer, x, what):
    x = x.clone().requires_grad_()
    y, state = mixer(x[:, :40])
    z, last = mixer(x[:, 40:], state, draw_starts(len(x), TIME - 40))
    assert_finite(mixer, x, [y, z, *floats(last)], what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hostile_inputs_leave_everything_finite(mixer, dtype):
    # Rows of one batch: what is not finite in one is not finite in the gradients of parameters, their sum.
    x = torch.cat([change(draw(BATCH, TIME, dtype=dtype)) for change in HOSTILE.values()])
    assert_finite_throughout(mixer.to(dtype), x, f"{BATCH} rows each that are {', '.join(HOSTILE)}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saturated_gates_leave_everything_finite(mixer, dtype):
    mixer = mixer.to(dtype)
    for value in (30.0, -30.0):
        with torch.no_grad():
            for parameter in mixer.parameters():
                if parameter.ndim == 1:
                    parameter.fill_(value)
        assert_finite_throughout(mixer, draw(BATCH, TIME, dtype=dtype), f"vectors of {value}")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_64k_tokens_leave_everything_finite(mixer, dtype):
    mixer, state = mixer.to(dtype), None
    *pieces, last = draw(1, 2**16, dtype=dtype).split(2**10, 1)
    with torch.no_grad():
        for piece in pieces:
            y, state = mixer(piece, state)
            assert y.isfinite().all()
    x = last.clone().requires_grad_()
    y, state = mixer(x, state)
    assert_finite(mixer, x, [y, *floats(state)], "after 64k tokens")


# What does not fit is refused before any work is done.

ILL_FITTING_INPUTS = {
    "a width less": lambda x: x[..., 1:],
    "a width more": lambda x: F.pad(x, (0, 1)),
    "no batch": lambda x: x[0],
    "an axis more": lambda x: x[None],
    "no token": lambda x: x[:, :0],
    "another precision": torch.Tensor.float,
    "whole numbers": torch.Tensor.long,
    "complex numbers": lambda x: x + 0j,
    "a list": torch.Tensor.tolist,
}
ILL_FITTING_STARTS = {
    "a token less": lambda starts: starts[:, 1:],
    "a row less": lambda starts: starts[1:],
    "no batch": lambda starts: starts[0],
    "an axis more": lambda starts: starts[..., None],
    "numbers": torch.Tensor.float,
    "bytes": torch.Tensor.byte,
    "a list": torch.Tensor.tolist,
}


class Other(NamedTuple):
    """A state of no layer."""

    memory: torch.Tensor


@pytest.mark.parametrize("dim", [0, -3])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_width_below_one_is_refused(layer, dim):
    with pytest.raises(ValueError, match=rf"^dim={dim}: .* 1 or more"):
        layer(dim)


def test_inputs_and_starts_that_do_not_fit_are_refused(mixer, x):
    starts = draw_starts(BATCH, TIME)
    for change in ILL_FITTING_INPUTS.values():
        with pytest.raises(ValueError, match=r"^\w+: x (is|has) .*; expected "):
            mixer(change(x))
    for change in ILL_FITTING_STARTS.values():
        with pytest.raises(ValueError, match=rf"^\w+: starts is .*; expected torch\.bool \({BATCH}, {TIME}\)"):
            mixer(x, None, change(starts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_takes_what_it_casts(mixer, x, dtype):
    mixer = mixer.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        for taken in (torch.float32, torch.bfloat16):
            y, state = mixer(x[:, :20].to(taken))
            z, _ = mixer(x[:, 20:].to(taken), state)
            assert y.isfinite().all() and z.isfinite().all()
        with pytest.raises(ValueError, match=r"x is torch\.float64; expected torch\.(float32|bfloat16)"):
            mixer(x)


def as_plain_tuples(state):
    return tuple(as_plain_tuples(part) if isinstance(part, tuple) else part for part in state)


def test_a_state_of_another_kind_is_refused(mixer, x):
    _, state = mixer(x)
    for other in (as_plain_tuples(state), list(state), Other(x), x, "state"):
        with pytest.raises(ValueError, match=r"^\w+: state(\.\w+)* is a \w+; .*expected a (\w+State|KeyValue\w+)"):
            mixer(x, other)


def ill_fitting(leaf, longer):
    """``leaf`` of a state with every size changed that is the same in ``longer``, of one more token; and its dtype."""
    yield from (leaf[None], leaf[0])
    for axis, size in enumerate(leaf.shape):
        if size == longer.shape[axis]:
            yield torch.cat([leaf, leaf.new_zeros([1 if i == axis else n for i, n in enumerate(leaf.shape)])], axis)
            if size:
                yield leaf.narrow(axis, 0, size - 1)
    if leaf.numel():
        yield leaf.int() if leaf.is_floating_point() else leaf.double() if not leaf.is_complex() else leaf.real.long()


@pytest.mark.parametrize("batch", [1, 2])
def test_a_state_of_other_sizes_is_refused(mixer, batch, unchecked):
    x = draw(batch, 26)
    (_, state), (_, longer) = mixer(x[:, :20]), mixer(x[:, :21])
    paths, spec = tree_flatten_with_path(state)
    leaves = [leaf for _, leaf in paths]
    for place, ((path, leaf), other) in enumerate(zip(paths, tree_leaves(longer), strict=True)):
        for wrong in ill_fitting(leaf, other):
            changed = tree_unflatten([*leaves[:place], wrong, *leaves[place + 1 :]], spec)
            for time in (1, 6):
                with pytest.raises(ValueError, match=rf"\b(state|{str(path[-1]).strip('.')})\b.* expected "):
                    mixer(x[:, -time:], changed)


# Law 7: compilation, and construction without memory.


def assert_compiles(mixer, backend, *, goes_on):
    """In two graphs, a training call and a step of decoding; ``goes_on`` adds training that goes on from a state."""
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend=backend)
    x, starts = draw(BATCH, 9).requires_grad_(), torch.tensor([[False, True, False, False], [True, False, True, True]])
    parameters = [x, *mixer.parameters()]

    def train(call):
        y, state = call(x[:, :4])
        z, state = (call if goes_on else mixer)(x[:, 4:8], state, starts)
        outputs = [y, z, *meaning(state)]
        return outputs, torch.autograd.grad(sum(part.square().sum() for part in floats(outputs)), parameters)

    @torch.no_grad()
    def decode(call):
        y, state = call(x[:, 8:], mixer(x[:, :8])[1], starts[:, :1])
        return y, meaning(state)

    assert_same(train(compiled), train(mixer))
    assert_same(decode(compiled), decode(mixer))


@pytest.mark.parametrize("case", DEFAULTS, ids=title)
def test_compiles_in_one_graph(mixer):
    assert_compiles(mixer, "eager", goes_on=False)


@pytest.mark.slow
def test_compiles_in_one_graph_whatever_is_set_and_passed(mixer):
    assert_compiles(mixer, "eager", goes_on=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", DEFAULTS, ids=title)
def test_compiles_to_machine_code(mixer):
    assert_compiles(mixer, "inductor", goes_on=True)


def test_a_mixer_built_without_memory_is_filled_by_reset_parameters(case):
    torch.manual_seed(0)
    expected = case(DIM).state_dict()
    with torch.device("meta"):
        mixer = case(DIM)
    assert all(parameter.is_meta for parameter in mixer.parameters())
    mixer.to_empty(device="cpu")
    for tensor in mixer.state_dict().values():
        tensor.fill_(math.nan)
    torch.manual_seed(0)
    mixer.reset_parameters()
    assert_same(mixer.state_dict(), expected, tolerance=0)
    assert mixer(draw(1, 9, dtype=torch.float32))[0].isfinite().all()


# Law 8: the size of the state.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_state_bytes_is_the_size_of_the_state(mixer, dtype):
    mixer = mixer.to(dtype)
    for batch, time in ((1, 1), (3, 7), (2, TIME)):
        _, state = mixer(draw(batch, time, dtype=dtype))
        assert measure_state(state) == batch * mixer.state_bytes(time, dtype=dtype)


def test_a_state_is_constant_in_size_if_and_only_if_the_mixer_says_so(mixer):
    sizes = {measure_state(mixer(draw(1, time))[1]) for time in (1, 4, 64, 130)}
    assert (len(sizes) == 1) == mixer.constant_state
    assert (mixer.state_bytes(10) == mixer.state_bytes(10**6)) == mixer.constant_state


@torch.no_grad()
def test_a_decoded_state_takes_at_most_twice_what_it_says(mixer):
    x, state = draw(1, 34), None  # one more than 2, 4, 8, 16 and 32
    for time, token in enumerate(x.split(1, 1), 1):
        _, state = mixer(token, state)
        assert measure_state(state) <= 2 * mixer.state_bytes(time, dtype=x.dtype)


@torch.no_grad()
def test_a_state_keeps_no_activations_in_memory(mixer):
    _, state = mixer(draw(1, 300))
    held = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in tree_leaves(state)}
    assert sum(held.values()) == mixer.state_bytes(300, dtype=torch.float64)


def test_a_state_is_tensors_with_the_batch_first(mixer, x):
    _, state = mixer(x)
    assert isinstance(state, tuple) and hasattr(state, "_fields")
    assert all(isinstance(leaf, torch.Tensor) and len(leaf) == BATCH for leaf in tree_leaves(state))


# What the stack, mixed precision and the config rely on.


def test_mixed_precision_is_close(mixer):
    mixer, x = mixer.float(), draw(BATCH, TIME, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = run(mixer, x, [40, 29, 1])
    expected, _ = mixer(x)
    assert (y - expected).norm() < 0.02 * expected.norm()
    y.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in mixer.parameters())


@torch.no_grad()
def test_scale_output_scales_the_output(mixer, x):
    expected = mixer(x)[0] / 4
    mixer.scale_output(0.25)
    assert_same(mixer(x)[0], expected)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_constructor_is_the_config(layer):
    dim, *settings = inspect.signature(layer).parameters.values()
    types = typing.get_type_hints(layer.__init__)
    assert (dim.name, types["dim"], dim.default) == ("dim", int, inspect.Parameter.empty)
    for setting in settings:
        assert setting.kind is inspect.Parameter.KEYWORD_ONLY, f"{setting} can be given without its name"
        assert setting.default is not inspect.Parameter.empty, f"{setting} has no default"
        assert setting.name in types, f"{setting} has no type"


def test_the_readme_and_the_documentation_list_every_layer():
    for path, text in list_layers.written().items():
        assert path.read_text() == text, f"{path.name} is stale: python scripts/list_layers.py writes it"


@pytest.mark.parametrize("layer", LAYERS)
def test_the_docstring_explains_every_setting(layer):
    text = docstring_parser.parse(inspect.getdoc(layer))
    assert text.short_description
    assert [setting.arg_name for setting in text.params] == list(inspect.signature(layer).parameters)
    assert all(setting.description for setting in text.params)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_class_describes_itself(layer):
    mixer = layer(DIM)
    assert set(layer.operators) <= set(EVERY_OPERATOR)
    assert (layer.state_formula.strip() == "0") == (mixer.state_bytes(100) == 0)
    shapes = {name: parameter.ndim for name, parameter in mixer.named_parameters()}
    assert all(shapes[name] > 1 for name in layer.no_weight_decay)


def test_the_catalogue_lists_every_layer_of_the_folder_once():
    names = {path.stem for path in Path(layers.__file__).parent.glob("*.py")} - {"__init__"}
    modules = [importlib.import_module(f"seqzoo.layers.{name}") for name in names]
    found = {
        thing
        for module in modules
        for thing in vars(module).values()
        if inspect.isclass(thing) and issubclass(thing, Mixer) and thing.__module__ == module.__name__
    }
    assert set(LAYERS) == found and len(LAYERS) == len(found)
    assert [layer for family in FAMILIES.values() for layer in family] == list(LAYERS)
    assert set(layers.__all__) == {"FAMILIES", "LAYERS", *(layer.__name__ for layer in LAYERS)}


@pytest.mark.parametrize("path", sorted(Path(layers.__file__).parent.glob("[!_]*.py")), ids=lambda path: path.stem)
def test_no_layer_imports_another(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        assert not any(name.startswith("seqzoo.layers") for name in names)


@pytest.mark.parametrize(
    ("name", "answer"),
    [("Atention", "did you mean Attention"), ("Mamba4", "did you mean Mamba"), ("Zzz", "there are Attention, ")],
)
def test_the_catalogue_answers_a_misspelling(name, answer):
    with pytest.raises(AttributeError, match=answer):
        getattr(layers, name)


@pytest.mark.parametrize(
    ("build", "parts"),
    [
        (lambda: Attention(30, num_heads=4), ["num_heads=4", "dim=30"]),
        (lambda: Attention(32, num_heads=0), ["num_heads=0", "dim=32"]),
        (lambda: Attention(32, num_kv_heads=3), ["num_kv_heads=3", "num_heads=4"]),
        (lambda: Attention(32, num_kv_heads=0), ["num_kv_heads=0", "num_heads=4"]),
        (lambda: Attention(32, window=0), ["window=0", "1 or more", "None"]),
        (lambda: Attention(32, sinks=2), ["sinks=2", "window=None"]),
        (lambda: Attention(32, window=4, sinks=-1), ["sinks=-1", "0 or more"]),
        (lambda: Attention(32, positions="alibi"), ["positions='alibi'", "'rope'", "'none'"]),
        (lambda: Attention(12, num_heads=4), ["head_dim=3", "odd", "rotary"]),
        (lambda: Attention(32, head_dim=0), ["head_dim=0", "1 or more"]),
        (lambda: Attention(32, soft_cap=-1.0), ["soft_cap=-1.0", "above 0"]),
        (lambda: Attention(32, temperature=-1.0), ["temperature=-1.0", "at least 0"]),
        (lambda: Attention(32, rope_base=1.0), ["rope_base=1.0", "above 1"]),
        (lambda: Attention(32, positions="none", rope_base=500.0), ["rope_base=500.0", "positions='none'", "10000.0"]),
        (lambda: Attention(32, positions="none", rope_original_length=8), ["rope_original_length=8", "None"]),
        (lambda: LandmarkAttention(32, positions="none", rope_base=500.0), ["rope_base=500.0", "10000.0"]),
        (
            lambda: DifferentialAttention(32, rope_base=None, rope_layout="neighbours"),
            ["rope_layout='neighbours'", "rope_base=None", "'halves'"],
        ),
        (lambda: Attention(32, rope_layout="pairs"), ["rope_layout='pairs'", "'halves'", "'neighbours'"]),
        (lambda: Attention(32, rope_scaling="long"), ["rope_scaling='long'", "'yarn'"]),
        (lambda: Attention(32, rope_factor=2.0), ["rope_factor=2.0", "rope_scaling='none'"]),
        (lambda: Attention(32, rope_scaling="yarn", rope_factor=2.0), ["rope_original_length=None", "yarn"]),
        (lambda: Attention(32, rope_scaling="linear", rope_original_length=8), ["rope_original_length=8", "None"]),
        (lambda: DifferentialAttention(32, num_heads=3), ["num_heads=3", "6", "dim=32"]),
        (lambda: DifferentialAttention(32, num_heads=4, num_kv_heads=3), ["num_kv_heads=3", "num_heads=4"]),
        (lambda: DifferentialAttention(32, layer_index=-1), ["layer_index=-1", "0 or more"]),
        (lambda: LandmarkAttention(32, block_size=1), ["block_size=1", "2 or more"]),
        (lambda: LandmarkAttention(32, top_k=0), ["top_k=0", "1 or more"]),
        (lambda: LandmarkAttention(32, num_heads=5), ["num_heads=5", "dim=32"]),
        (lambda: LatentAttention(32, num_heads=0), ["num_heads=0", "at least 1"]),
        (lambda: LatentAttention(32, latent_dim=0), ["latent_dim=0", "1 or more"]),
        (lambda: LatentAttention(32, rope_dim=3), ["rope_dim=3", "even"]),
        (lambda: ForgettingAttention(32, num_heads=3), ["num_heads=3", "dim=32"]),
        (lambda: ForgettingAttention(32, prune=1.0), ["prune=1.0", "between 0 and 1"]),
        (lambda: Attention(32, head_dim=2, rope_scaling="ntk"), ["rope_scaling='ntk'", "more than 2"]),
        (lambda: Attention(32, max_length=0), ["max_length=0", "1 or more", "None"]),
        (lambda: Mamba(32, state_size=0), ["state_size=0", "1 or more"]),
        (lambda: Mamba(32, expand=0), ["expand=0", "1 or more"]),
        (lambda: Mamba(32, step_rank=0), ["step_rank=0", "1 or more"]),
        (lambda: Mamba(32, conv_size=0), ["conv_size=0", "at least 1"]),
        (lambda: Mamba(32, parameter_norm="yes"), ["parameter_norm='yes'", "'none'", "'fixed'", "'learned'"]),
        (lambda: Mamba2(32, head_dim=48), ["head_dim=48", "64"]),
        (lambda: Mamba2(32, head_dim=0), ["head_dim=0", "64"]),
        (lambda: Mamba2(32, expand=0), ["expand", "0"]),
        (lambda: Mamba2(32, head_dim=16, num_groups=3), ["num_groups=3", "4 heads"]),
        (lambda: Mamba2(32, num_groups=0), ["num_groups=0"]),
        (lambda: Mamba2(32, state_size=0), ["state_size=0", "at least 1"]),
        (lambda: Mamba2(32, conv_size=0), ["conv_size=0", "at least 1"]),
        (lambda: Mamba2(32, norm="both"), ["norm='both'", "'after_gate'", "'before_gate'", "'none'"]),
        (lambda: Mamba2(32, step_limit=(0.1, 0.1)), ["step_limit=(0.1, 0.1)", "at least 0"]),
        (lambda: Mamba2(32, step_limit=(-1, 1)), ["step_limit=(-1, 1)", "at least 0"]),
        (lambda: GatedDeltaNet(32, num_heads=0), ["num_heads=0", "at least 1"]),
        (lambda: GatedDeltaNet(32, key_dim=0), ["key_dim=0", "at least 1"]),
        (lambda: GatedDeltaNet(32, value_dim=0), ["value_dim=0", "at least 1"]),
        (lambda: GatedDeltaNet(32, num_key_heads=3), ["num_key_heads=3", "num_heads=4"]),
        (lambda: GatedDeltaNet(32, num_key_heads=0), ["num_key_heads=0", "num_heads=4"]),
        (lambda: GatedDeltaNet(4, num_heads=4), ["key_dim=0", "dim=4", "num_heads=4"]),
        (lambda: GatedDeltaNet(32, conv_size=0), ["conv_size=0", "at least 1"]),
        (lambda: LRU(32, state_size=0), ["state_size=0", "1 or more"]),
        (lambda: LRU(32, min_radius=0.9, max_radius=0.9), ["min_radius=0.9", "max_radius=0.9", "min < max"]),
        (lambda: LRU(32, max_radius=1.1), ["max_radius=1.1", "<= 1"]),
        (lambda: LRU(32, max_phase=0.0), ["max_phase=0.0", "above 0"]),
        (lambda: Mamba3(32, head_dim=48), ["head_dim=48", "64"]),
        (lambda: Mamba3(32, head_dim=16, num_groups=3), ["num_groups=3", "4 heads"]),
        (lambda: Mamba3(32, state_size=3), ["state_size=3", "rope_fraction=0.5", "pair"]),
        (lambda: Mamba3(32, rope_fraction=1.5), ["rope_fraction=1.5", "at most all"]),
        (lambda: Mamba3(32, rate="exp"), ["rate='exp'", "'heavy_tail'", "'softplus'"]),
        (lambda: S4D(32, state_size=0), ["state_size=0", "even", "at least 2"]),
        (lambda: S4D(32, state_size=5), ["state_size=5", "even"]),
        (lambda: S4D(32, frequencies="fourier"), ["frequencies='fourier'", "'linear'", "'inverse'", "'legendre'"]),
        (lambda: S5(32, state_size=12, num_blocks=4), ["state_size=12", "num_blocks=4", "multiple of 2"]),
        (lambda: S5(32, state_size=0), ["state_size=0", "at least 2"]),
        (lambda: S5(32, num_blocks=0), ["num_blocks=0"]),
        (lambda: MinGRU(32, expand=0), ["expand=0", "1 or more"]),
        (lambda: RGLRU(32, width=0), ["width=0"]),
        (lambda: RGLRU(32, num_heads=5), ["num_heads=5", "32"]),
        (lambda: RGLRU(32, num_heads=0), ["num_heads=0"]),
        (lambda: RGLRU(32, conv_size=0), ["conv_size=0", "at least 1"]),
        (lambda: RetNet(32, num_heads=0), ["num_heads=0", "at least 1"]),
        (lambda: RetNet(32, key_dim=3), ["key_dim=3", "odd", "rotary"]),
        (lambda: RetNet(32, value_dim=0), ["value_dim=0", "at least 1"]),
        (lambda: RetNet(4, num_heads=8), ["key_dim=0", "dim=4", "num_heads=8"]),
        (lambda: LightningAttention(32, num_heads=0), ["num_heads=0", "at least 1"]),
        (lambda: LightningAttention(32, head_dim=0), ["head_dim=0", "at least 1"]),
        (lambda: LightningAttention(4, num_heads=8), ["head_dim=0", "dim=4", "num_heads=8"]),
        (lambda: LightningAttention(32, layer_index=2, num_layers=2), ["layer_index=2", "num_layers=2"]),
        (lambda: LightningAttention(32, layer_index=-1), ["layer_index=-1", "num_layers=1"]),
        (lambda: GatedLinearAttention(32, num_heads=0), ["num_heads=0", "at least 1"]),
        (lambda: GatedLinearAttention(32, key_dim=0), ["key_dim=0", "at least 1"]),
        (lambda: GatedLinearAttention(32, decay_rank=0), ["decay_rank=0", "1 or more"]),
        (lambda: GatedLinearAttention(32, decay_temperature=0.0), ["decay_temperature=0.0", "above 0"]),
        (lambda: HGRN2(32, head_dim=5), ["head_dim=5", "dim=32"]),
        (lambda: HGRN2(32, head_dim=0), ["head_dim=0", "dim=32"]),
        (lambda: HGRN2(32, lower_bound=1.0), ["lower_bound=1.0", "less than 1"]),
        (lambda: HGRN2(32, lower_bound=-0.1), ["lower_bound=-0.1", "0 or more"]),
        (lambda: DeltaNet(32, num_heads=0), ["num_heads=0", "at least 1"]),
        (lambda: DeltaNet(3, num_heads=4), ["key_dim=0", "dim=3", "num_heads=4"]),
        (lambda: DeltaNet(32, conv_size=0), ["conv_size=0", "at least 1"]),
        (lambda: DeltaProduct(32, steps=0), ["steps=0", "at least 1"]),
        (lambda: KimiDeltaAttention(32, lower_bound=0.0), ["lower_bound=0.0", "below 0", "None"]),
        (lambda: GatedDeltaNet2(32, gate="relu"), ["gate='relu'", "'silu'", "'sigmoid'"]),
        (lambda: Based(32, num_heads=5), ["num_heads=5", "dim=32"]),
        (lambda: Based(32, num_heads=0), ["num_heads=0", "dim=32"]),
        (lambda: Based(32, feature_dim=0), ["feature_dim=0", "at least 1"]),
        (lambda: MLSTM(32, num_heads=0), ["num_heads=0", "at least 1"]),
        (lambda: MLSTM(32, key_dim=0), ["key_dim=0", "at least 1"]),
        (lambda: MLSTM(32, gate_soft_cap=0.0), ["gate_soft_cap=0.0", "above 0"]),
        (lambda: SLSTM(32, num_heads=3), ["num_heads=3", "dim=32"]),
        (lambda: SLSTM(32, num_heads=0), ["num_heads=0", "dim=32"]),
        (lambda: SLSTM(32, conv_size=0), ["conv_size=0", "at least 1"]),
        (lambda: SLSTM(32, layer_index=1), ["layer_index=1", "num_layers=1"]),
        (lambda: TTTLinear(32, num_heads=0), ["num_heads=0", "at least 1"]),
        (lambda: TTTLinear(32, head_dim=3), ["head_dim=3", "pairs"]),
        (lambda: TTTLinear(4, num_heads=8), ["head_dim=0", "dim=4", "num_heads=8"]),
        (lambda: TTTLinear(32, mini_batch=0), ["mini_batch=0", "at least 1"]),
        (lambda: TTTLinear(32, learning_rate=0.0), ["learning_rate=0.0", "above 0"]),
        (lambda: TTTMLP(32, expand=0), ["expand=0", "at least 1"]),
        (lambda: NeuralMemory(32, num_heads=0), ["num_heads=0", "at least 1"]),
        (lambda: NeuralMemory(32, head_dim=0), ["head_dim=0", "at least 1"]),
        (lambda: NeuralMemory(32, depth=0), ["depth=0", "1 or more"]),
        (lambda: NeuralMemory(32, expand=0), ["expand=0", "1 or more"]),
        (lambda: NeuralMemory(32, chunk=0), ["chunk=0", "1 or more"]),
        (lambda: NeuralMemory(32, learning_rate=0.0), ["learning_rate=0.0", "above 0"]),
        (lambda: NeuralMemory(32, conv_size=0), ["conv_size=0", "at least 1"]),
        (lambda: TitansMAC(32, num_heads=5), ["num_heads=5", "dim=32"]),
        (lambda: TitansMAC(32, num_heads=32), ["head_dim=1", "pairs"]),
        (lambda: TitansMAC(32, segment=0), ["segment=0", "1 or more"]),
        (lambda: TitansMAC(32, persistent=0), ["persistent=0", "1 or more"]),
        (lambda: TitansMAC(32, depth=0), ["depth=0", "1 or more"]),
        (lambda: TitansMAG(32, num_heads=0), ["num_heads=0", "dim=32"]),
        (lambda: TitansMAG(32, window=0), ["window=0", "1 or more"]),
        (lambda: TitansMAG(32, persistent=0), ["persistent=0", "1 or more"]),
        (lambda: TitansMAG(32, rope_base=1.0), ["rope_base=1.0", "above 1"]),
        (lambda: TitansMAG(32, learning_rate=0.0), ["learning_rate=0.0", "above 0"]),
        (lambda: TitansMAL(32, window=0), ["window=0", "1 or more"]),
        (lambda: TitansMAL(32, chunk=0), ["chunk=0", "1 or more"]),
        (lambda: RWKV6(32, head_dim=5), ["head_dim=5", "dim=32"]),
        (lambda: RWKV6(32, mix_rank=0), ["mix_rank=0", "1 or more"]),
        (lambda: RWKV6(32, decay_rank=0), ["decay_rank=0", "1 or more"]),
        (lambda: RWKV6(32, layer_index=2, num_layers=2), ["layer_index=2", "num_layers=2"]),
        (lambda: RWKV7(32, head_dim=0), ["head_dim=0", "dim=32"]),
        (lambda: RWKV7(32, value_rank=0), ["value_rank=0", "1 or more"]),
        (lambda: RWKV7(32, value_residual=True)(draw(1, 3, dtype=torch.float32)), ["value_residual=True", "reads"]),
        (lambda: RWKV7(32, rate_rank=0), ["rate_rank=0", "1 or more"]),
        (lambda: RWKV7(32, gate_rank=-1), ["gate_rank=-1", "1 or more"]),
        (lambda: RWKV6ChannelMix(32, hidden=0), ["hidden=0", "at least 1"]),
        (lambda: RWKV7ChannelMix(32, hidden=0), ["hidden=0", "at least 1"]),
        (lambda: RWKV7ChannelMix(32, layer_index=-1), ["layer_index=-1", "num_layers=1"]),
        (lambda: ShortConv(32, conv_size=0), ["conv_size=0", "at least 1"]),
        (lambda: SwiGLU(32, hidden=0), ["hidden=0", "at least 1"]),
        (
            lambda: Attention(32, max_length=9)(draw(1, 10, dtype=torch.float32)),
            ["10 tokens", "max_length=9", "window"],
        ),
    ],
)
def test_a_setting_that_does_not_fit_is_refused_with_its_value_and_what_fits(build, parts):
    with pytest.raises(ValueError) as caught:
        build()
    assert all(part in str(caught.value) for part in parts), caught.value


def settings_of(layer, kind):
    """Names of the settings of ``layer`` that are numbers of this kind, or pairs of them, or may be."""
    hints = typing.get_type_hints(layer.__init__)
    kinds = {
        name: {kind for part in (hint, *typing.get_args(hint)) for kind in (part, *typing.get_args(part))}
        for name, hint in hints.items()
    }
    return {name: typing.get_origin(hints[name]) for name, found in kinds.items() if kind in found and name != "dim"}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_setting_is_a_finite_number_above_its_least(layer):
    """No number of things is -1, no other number is infinite or none at all; what keeps a root from 0 is above 0."""
    wrong = [(name, -1) for name in settings_of(layer, int)]
    for name, origin in settings_of(layer, float).items():
        wrong += [(name, (x, x) if origin is tuple else x) for x in (math.nan, math.inf, -math.inf)]
        wrong += [(name, x) for x in (0.0, -1.0) if name.endswith("eps")]
    for name, value in wrong:
        with pytest.raises(ValueError, match=rf"\b{name}={re.escape(str(value))}"):
            layer(DIM, **{name: value})


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if "backend" in inspect.signature(layer).parameters])
def test_a_backend_that_cannot_run_is_refused_with_the_reason(layer):
    with pytest.raises(ValueError, match=r"backend='tritn' cannot run .*there is no such backend; use auto, "):
        layer(DIM, backend="tritn")(draw(1, 3, dtype=torch.float32))


# What single layers promise beyond the laws.


ATTENTIONS = [Attention, DifferentialAttention, ForgettingAttention, LandmarkAttention, LatentAttention]
ATTENTIONS += [partial(Attention, window=5), partial(Attention, window=5, soft_cap=2.0)]


@pytest.mark.parametrize("build", ATTENTIONS)
@torch.no_grad()
def test_what_is_kept_in_full_precision_is_read_under_autocast(build):
    mixer, x = build(DIM), draw(BATCH, 20, dtype=torch.float32)
    expected, state = mixer(x)[0], mixer(x[:, :10])[1]
    with torch.autocast("cpu", torch.bfloat16):
        pieces = []
        for piece in x[:, 10:].split([1, 1, 8], 1):
            y, state = mixer(piece, state)
            pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1).float(), expected[:, 10:], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("build", ATTENTIONS)
@torch.no_grad()
def test_other_lengths_do_not_compile_attention_anew(build):
    torch._dynamo.reset()
    mixer = build(DIM)
    compiled = torch.compile(mixer, fullgraph=True, backend="eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for time in (10, 11, 21):
            x = draw(1, time, dtype=torch.float32)
            torch.testing.assert_close(compiled(x)[0], mixer(x)[0])


@pytest.mark.parametrize("build", ATTENTIONS)
def test_attention_is_given_what_it_may_be(build):
    mixer, x, starts = build(DIM).double(), draw(BATCH, TIME), draw_starts(BATCH, TIME)
    with checked_ranges():
        run(mixer, x, [20, 1, 1, 48], starts)
        run(mixer, x, [20, 1, 1, 48])


def test_max_length_counts_the_tokens_of_a_document_over_all_calls():
    mixer, x = Attention(DIM, max_length=9).double(), draw(1, 40)
    starts = torch.arange(40)[None] % 9 == 0
    _, state = mixer(x, None, starts)
    _, state = mixer(x[:, :5], state)
    with pytest.raises(ValueError, match="10 tokens"):
        mixer(x[:, :1], state)


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (5, 0), (5, 2)])
def test_a_window_sees_exactly_its_tokens_and_the_sinks(window, sinks):
    mixer = Attention(DIM, window=window, sinks=sinks).double()
    x = draw(1, 20).requires_grad_()
    back = torch.arange(20)[:, None] - torch.arange(20)
    for sizes in ([20], [7, 1, 1, 1, 10]):
        y, _ = run(mixer, x, sizes)
        gradients = [torch.autograd.grad(token.sum(), x, retain_graph=True)[0][0] for token in y[0]]
        seen = torch.stack(gradients).abs().amax(-1) > 1e-12
        assert torch.equal(seen, (back >= 0) & ((back < window) | (torch.arange(20) < sinks)))
