"""The stack, its files on disk, and sampling from it."""

from __future__ import annotations

import json
import math
import os
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from seqzoo import LanguageModel, Mixer, generate, load_model, measure_state, save_model, stream
from seqzoo.layers import RWKV7, Attention, GatedDeltaNet, Mamba2, RWKV7ChannelMix, ShortConv, SwiGLU
from seqzoo.models.checkpoint import CONFIG_KEY, build_model
from seqzoo.models.generation import sample

VOCAB, TIME = 11, 40
HYBRID = {
    "delta": partial(GatedDeltaNet, num_heads=2),
    "mamba": partial(Mamba2, state_size=4, head_dim=8, num_groups=2),
    "conv": ShortConv,
    "local": partial(Attention, num_heads=2, window=6, sinks=1),
    "global": partial(Attention, num_heads=2, num_kv_heads=1),
    "mlp": SwiGLU,
}


def build(**changes):
    settings = {"vocab_size": VOCAB, "dim": 16, "pattern": list(HYBRID), "layers": HYBRID} | changes
    torch.manual_seed(0)
    return LanguageModel(**settings)


def give_opinions(net):
    """Weights large enough that the model prefers some tokens clearly."""
    with torch.no_grad():
        net.embedding.weight.mul_(50)
        net.unembedding.weight.mul_(50)
    return net


@pytest.fixture
def net():
    return give_opinions(build().double())


@pytest.fixture
def tokens():
    return draw(2, TIME)


def draw(batch, time, seed=0):
    return torch.randint(VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


def run(net, tokens, sizes, starts=None):
    state, outputs = None, []
    begins = [None] * len(sizes) if starts is None else starts.split(sizes, 1)
    for piece, begin in zip(tokens.split(sizes, 1), begins, strict=True):
        logits, state = net(piece, state, begin)
        outputs.append(logits)
    return torch.cat(outputs, 1), state


def assert_same(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# The stack.


@pytest.mark.parametrize(
    "sizes",
    [[1, 39], [16, 24], [36, 4], [1] * TIME, [7, 1, 1, 20, 3, 8]],
    ids=["cut at 1", "cut at 16", "cut at 36", "token by token", "mixed"],
)
@pytest.mark.parametrize("with_starts", [False, True])
def test_any_split_with_the_state_carried_is_one_call(net, tokens, sizes, with_starts):
    starts = torch.rand(2, TIME, generator=torch.Generator().manual_seed(1)) < 1 / 8 if with_starts else None

    def read(sizes):
        logits, state = run(net, tokens, sizes, starts)
        rest, _ = net(tokens, state)  # what the last state says is what it does to the next tokens
        loss = (logits.square().sum() + rest.square().sum()) / 100
        return logits, rest, torch.autograd.grad(loss, list(net.parameters()))

    expected = read([TIME])
    assert_same(read(sizes), expected)
    with torch.no_grad():
        assert_same(run(net, tokens, sizes, starts)[0], expected[0])


def test_packed_documents_are_the_same_documents_alone(net, tokens):
    lengths = [5, 1, 20, 14]
    starts = torch.zeros(2, TIME, dtype=torch.bool)
    starts[:, [0, 5, 6, 26]] = True
    alone = torch.cat([net(document)[0] for document in tokens.split(lengths, 1)], 1)
    assert_same(net(tokens, None, starts)[0], alone)


def test_changing_the_future_never_changes_the_past(net, tokens):
    other = torch.cat([tokens[:, :17], draw(2, TIME - 17, seed=5)], 1)
    first, second = net(tokens)[0], net(other)[0]
    assert_same(first[:, :17], second[:, :17])
    assert not torch.allclose(first[:, 17:], second[:, 17:])


# As in RWKV-7 the values of a first time mix are mixed into those of the others; there are two such groups.
READING = {
    "pattern": ["first", "mix", "time", "time"],
    "repeats": 2,
    "reads": {"time": "first"},
    "layers": {"first": RWKV7, "time": partial(RWKV7, value_residual=True), "mix": RWKV7ChannelMix},
}


@torch.no_grad()
def move_from_start(net):
    """Away from projections that start at zero."""
    for parameter in net.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return net


def test_a_layer_is_given_what_the_nearest_one_that_it_reads_shares(tokens):
    net = move_from_start(build(**READING).double())
    assert net.sources == [None, None, 0, 0, None, None, 4, 4]
    x, values = net.embedding(tokens), None
    for name, norm, mixer in zip(net.names, net.norms, net.sublayers(), strict=True):
        h = norm(x)
        y, state = mixer(h, source=values) if name == "time" else mixer(h)
        values = mixer.share(h, None, None, state) if name == "first" else values
        x = x + y
    assert_same(net.hidden(tokens)[0], net.norm(x))


@pytest.mark.parametrize("sizes", [[17, 23], [1] * TIME], ids=["two pieces", "token by token"])
def test_what_is_read_is_the_same_in_any_split(tokens, sizes):
    net = move_from_start(build(**READING).double())
    starts = torch.rand(2, TIME, generator=torch.Generator().manual_seed(1)) < 1 / 8
    expected, _ = net(tokens, None, starts)
    assert_same(run(net, tokens, sizes, starts)[0], expected)
    with torch.no_grad():
        assert_same(run(net, tokens, sizes, starts)[0], expected)


def test_by_default_a_layer_shares_its_state_after_the_call(tokens):
    class Reader(SwiGLU):
        def forward(self, x, state=None, starts=None, source=None):
            seen.append(source)
            return super().forward(x, state, starts)

    seen = []
    net = build(pattern=["conv", "reader"], layers={"conv": ShortConv, "reader": Reader}, reads={"reader": "conv"})
    _, state = net(tokens)
    assert seen[0] is state[0]


def test_hidden_and_head_are_forward(net, tokens):
    assert_same(net.head(net.hidden(tokens)[0]), net(tokens)[0])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_the_number_of_parameters_is_what_a_hand_counts(tied, norm):
    net = build(pattern=["global", "mlp"], repeats=3, norm=norm, tie_embeddings=tied)
    attention = 16 * 16 + 16 * 2 * 8 + 16 * 16  # queries; one key and one value head of 8; output
    mlp = 16 * 2 * 48 + 48 * 16  # 8/3 of 16, rounded up to a multiple of 8, is 48
    norms = 7 * 16 * (1 if norm == "rms" else 2)
    embeddings = VOCAB * 16 * (1 if tied else 2)
    assert net.num_parameters() == 3 * (attention + mlp) + norms + embeddings
    assert (net.unembedding.weight is net.embedding.weight) == tied


def test_the_pattern_is_repeated_in_order():
    net = build(pattern=["conv", "mlp", "mlp"], repeats=2)
    assert net.names == ["conv", "mlp", "mlp"] * 2
    assert [type(mixer) for mixer in net.mixers] == [ShortConv, SwiGLU, SwiGLU] * 2
    assert len({id(mixer) for mixer in net.mixers}) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_state_bytes_is_the_size_of_the_state(tokens, dtype):
    net = build(repeats=2).to(dtype)
    _, state = net(tokens)
    assert measure_state(state) == 2 * net.state_bytes(TIME, dtype=dtype)


@pytest.mark.parametrize("repeats", [1, 8])
def test_output_projections_shrink_with_depth_and_nothing_else_does(repeats):
    net = build(dim=64, vocab_size=500, repeats=repeats, pattern=["local", "conv", "mlp"])
    for mixer in net.mixers:
        for linear in [child for child in mixer.modules() if isinstance(child, nn.Linear)]:
            scale = len(net.mixers) ** -0.5 if linear is mixer.out else 1.0
            assert linear.weight.std().item() == pytest.approx(scale / math.sqrt(3 * linear.in_features), rel=0.05)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_start_at_length_one_and_an_untied_head_small(tied):
    net = build(dim=64, vocab_size=500, pattern=["mlp"], tie_embeddings=tied)
    assert net.embedding.weight.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert net.unembedding.weight.std().item() == pytest.approx(1 / 8 if tied else 0.02, rel=0.05)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_built_without_memory_is_filled_by_reset_parameters(tied):
    expected = build(tie_embeddings=tied, repeats=2)
    with torch.device("meta"):
        net = build(tie_embeddings=tied, repeats=2)
    assert all(parameter.is_meta for parameter in net.parameters())
    net.to_empty(device="cpu")
    for tensor in net.state_dict().values():
        tensor.fill_(math.nan)
    torch.manual_seed(0)
    net.reset_parameters()
    assert_same(net.state_dict(), expected.state_dict(), tolerance=0)
    assert (net.unembedding.weight is net.embedding.weight) == tied


class Doubler(Mixer):
    """A mixer of somebody else's, without an output projection."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x, state=None, starts=None):
        return 2 * x, ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": ["delta", "mpl"]}, "pattern names 'mpl', which layers does not define; did you mean 'mlp'?"),
        ({"pattern": ["zzz"]}, "pattern names 'zzz', .* layers has delta, mamba, "),
        ({"pattern": [], "layers": {}}, "pattern=.* is empty"),
        ({"pattern": ["mlp"], "layers": {}}, "layers has no entries"),
        ({"vocab_size": 0}, "vocab_size=0: use 1 or more"),
        ({"dim": 0}, "dim=0: use 1 or more"),
        ({"repeats": 0}, "repeats=0: use 1 or more"),
        ({"norm_eps": 0.0}, "norm_eps=0.0: use a finite number above 0"),
        ({"norm": "batch"}, "norm='batch': use 'rms' or 'layer'"),
        ({"layers": HYBRID | {"mlp": lambda dim: nn.Linear(dim, dim)}}, "layer 'mlp' builds a Linear; .* seqzoo.Mixer"),
        ({"layers": HYBRID | {"mlp": partial(SwiGLU, hidden=0)}}, "layer 'mlp': hidden=0"),
        ({"layers": HYBRID | {"global": partial(Attention, num_heads=3)}}, "layer 'global': num_heads=3 .* dim=16"),
        ({"reads": {"mlp": "ssm"}}, "reads names 'ssm', which the pattern does not; it has delta, mamba, "),
        ({"reads": {"delta": "mlp"}}, "reads has 'delta' read 'mlp', but none stands below sublayer 0"),
        ({"reads": {"mlp": "delta"}}, "reads has 'mlp', but a SwiGLU takes no source to read"),
        ({"layers": HYBRID | {"mlp": Doubler}}, "Doubler has no output projection 'self.out'"),
    ],
)
def test_a_model_that_cannot_be_built_says_why(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_the_state_of_another_stack_is_refused(net, tokens):
    _, state = net(tokens)
    with pytest.raises(ValueError, match="state has 5 entries; this model has 6 sublayers"):
        net(tokens, state[:5])


# The config.


def assert_says_no_less(config, given):
    """``config`` is ``given``, with the settings that its layers left at their defaults written out or not."""
    assert config | {"layers": given["layers"]} == given
    for name, layer in given["layers"].items():
        assert config["layers"][name]["class_path"] == layer["class_path"]
        assert config["layers"][name]["init_args"].items() >= layer["init_args"].items()


@pytest.mark.parametrize("stack", [{"repeats": 2}, READING], ids=["hybrid", "one that reads"])
def test_a_config_builds_the_same_model_again(stack):
    net = build(norm="layer", norm_eps=1e-3, tie_embeddings=True, **stack)
    config = json.loads(json.dumps(net.config()))
    again = build_model(config)
    assert config == net.config()  # building leaves its argument as it was
    assert build_model(again.config()).config() == again.config()
    assert_says_no_less(again.config(), config)
    assert [type(mixer) for mixer in again.mixers] == [type(mixer) for mixer in net.mixers]
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in net.named_parameters()}
    again.load_state_dict(net.state_dict())
    assert_same(again(draw(2, 9))[0], net(draw(2, 9))[0], tolerance=0)


def test_a_layer_given_as_a_function_builds_but_has_no_config(tmp_path):
    net = build(layers=HYBRID | {"mlp": lambda dim: SwiGLU(dim)})
    with pytest.raises(ValueError, match="layer 'mlp' is given as a function; pass a mixer class"):
        save_model(net, tmp_path / "net.safetensors")


def change_layer(description):
    config = build(pattern=["mlp"], layers={"mlp": SwiGLU}).config()
    return config | {"layers": {"mlp": description}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (change_layer("seqzoo.layers.SwiGlue"), "did you mean SwiGLU"),
        (change_layer("seqzoo.layers.swiglu"), "seqzoo.layers.swiglu"),
        (change_layer("no_such_package.Layer"), "no_such_package"),
        (change_layer("torch.nn.Identity"), "torch.nn.Identity"),
        (change_layer({"class_path": "seqzoo.layers.SwiGLU", "init_args": {"hiden": 8}}), "hiden"),
        (change_layer({"class_path": "seqzoo.layers.SwiGLU", "init_args": {"hidden": "wide"}}), "wide"),
        (change_layer({"class_path": "seqzoo.layers.SwiGLU", "init_args": {"hidden": 0}}), "layer 'mlp': hidden=0"),
        (build().config() | {"dimension": 8}, "dimension"),
        (build().config() | {"repeats": "many"}, "many"),
        ([1, 2], "config"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_in_one_line(config, message):
    with pytest.raises(ValueError, match=message) as caught:
        build_model(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "description",
    [
        "os.getcwd",
        {"class_path": "os.mkdir", "init_args": {"path": "made"}},
        {"class_path": "os.system", "init_args": {"command": "mkdir made"}},
        {"class_path": "subprocess.Popen", "init_args": {"args": ["mkdir", "made"]}},
        {"class_path": "subprocess.check_output", "init_args": {"args": ["mkdir", "made"]}},
    ],
    ids=str,
)
def test_a_config_calls_nothing_but_mixers(tmp_path, monkeypatch, description):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "net.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={CONFIG_KEY: json.dumps(change_layer(description))})
    with pytest.raises(ValueError):
        load_model(path)
    assert not (tmp_path / "made").exists()


# Files.


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_comes_back_the_same(tmp_path, tied):
    net = build(tie_embeddings=tied, repeats=2)
    save_model(net, tmp_path / "net.safetensors")
    for path in (tmp_path / "net.safetensors", str(tmp_path / "net.safetensors"), tmp_path):
        again = load_model(path, device="cpu")
        assert_says_no_less(again.config(), net.config())
        assert_same(again.state_dict(), net.state_dict(), tolerance=0)
        assert (again.unembedding.weight is again.embedding.weight) == tied


def save_like_lightning(net, path):
    weights = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    torch.save({"state_dict": weights | {"loss.scale": torch.ones(1)}, CONFIG_KEY: json.dumps(net.config())}, path)


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_of_a_training_run_loads(tmp_path, tied):
    net = build(tie_embeddings=tied)
    save_like_lightning(net, tmp_path / "last.ckpt")
    assert_same(load_model(tmp_path / "last.ckpt").state_dict(), net.state_dict(), tolerance=0)


def test_of_a_folder_the_newest_checkpoint_is_loaded(tmp_path):
    old, new = build(dim=16), build(dim=32)
    (tmp_path / "checkpoints").mkdir()
    save_model(new, tmp_path / "checkpoints" / "new.safetensors")
    save_like_lightning(old, tmp_path / "old.ckpt")
    os.utime(tmp_path / "old.ckpt", (1, 1))
    assert load_model(tmp_path).dim == 32


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("made",)


def write_bad_file(case, path):
    net = build(pattern=["mlp"])
    config = {CONFIG_KEY: json.dumps(net.config())}
    weights = dict(net.named_parameters())
    if case == "missing":
        return
    if case == "random bytes":
        path.write_bytes(bytes(range(256)) * 9)
    elif case == "empty":
        path.write_bytes(b"")
    elif case == "cut short":
        save_model(net, path) if path.suffix == ".safetensors" else save_like_lightning(net, path)
        path.write_bytes(path.read_bytes()[:-100])
    else:
        weights, config = {
            "foreign": (weights, {}),
            "config is no JSON": (weights, {CONFIG_KEY: "{"}),
            "config is a list": (weights, {CONFIG_KEY: "[1, 2]"}),
            "a weight is missing": ({n: w for n, w in weights.items() if n != "norm.weight"}, config),
            "a weight is unknown": (weights | {"spare.weight": torch.ones(1)}, config),
            "a weight has another shape": (weights | {"norm.weight": torch.ones(3)}, config),
        }[case]
        if path.suffix == ".safetensors":
            save_file({name: weight.detach() for name, weight in weights.items()}, path, metadata=config)
        else:
            torch.save({"state_dict": {f"net.{name}": weight for name, weight in weights.items()}} | config, path)


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "does not exist"),
        ("random bytes", "damaged"),
        ("empty", "damaged"),
        ("cut short", "damaged"),
        ("foreign", f"was not written by seqzoo: it has no '{CONFIG_KEY}'"),
        ("config is no JSON", "config"),
        ("config is a list", "config"),
        ("a weight is missing", r"norm\.weight is missing there"),
        ("a weight is unknown", r"spare\.weight is .* there and missing here"),
        ("a weight has another shape", "norm.weight"),
    ],
)
def test_a_bad_file_is_refused_in_one_line_that_names_it(tmp_path, suffix, case, message):
    path = tmp_path / f"bad.{suffix}"
    write_bad_file(case, path)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("content", [torch.ones(3), [1, 2], {"state_dict": [1], CONFIG_KEY: "{}"}], ids=str)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt"):
        load_model(tmp_path / "other.ckpt")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \.ckpt or \.safetensors file"):
        load_model(tmp_path)


def test_a_pickle_that_runs_code_is_refused_before_it_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, CONFIG_KEY: "{}", "extra": RunsCode()}, "code.ckpt")
    with pytest.raises(ValueError, match="more than tensors") as caught:
        load_model("code.ckpt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()


# Generation.

PROMPTS = [draw(1, length, seed=length)[0] for length in (9, 1, 4, 23)]


def test_ragged_prompts_together_are_each_prompt_alone(net):
    together = generate(net, PROMPTS, max_new_tokens=12, temperature=0.0)
    alone = [generate(net, [prompt], max_new_tokens=12, temperature=0.0) for prompt in PROMPTS]
    assert torch.equal(together, torch.cat(alone))
    assert len(set(map(tuple, together.tolist()))) > 1


def test_greedy_tokens_are_the_most_likely_ones_of_a_full_pass(net):
    new = generate(net, PROMPTS[:1], max_new_tokens=12, temperature=0.0)
    whole = torch.cat([PROMPTS[0], new[0]])[None]
    assert torch.equal(net(whole)[0].argmax(-1)[0, len(PROMPTS[0]) - 1 : -1], new[0])


@pytest.mark.parametrize("chunk", [1, 2, 5, 22, 23, 24])
def test_reading_the_prompt_in_chunks_changes_nothing(net, chunk):
    for prompts in (PROMPTS, PROMPTS[:1]):
        expected = generate(net, prompts, max_new_tokens=6, temperature=0.0)
        assert torch.equal(generate(net, prompts, max_new_tokens=6, temperature=0.0, prefill_chunk=chunk), expected)


def test_drawing_depends_on_the_generator_alone(net):
    draws = [
        generate(net, PROMPTS, max_new_tokens=12, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_stream_yields_token_by_token_and_calls_the_model_no_more_than_needed(net, monkeypatch):
    calls = []
    hidden = net.hidden
    monkeypatch.setattr(net, "hidden", lambda tokens, *rest: calls.append(tokens.shape[1]) or hidden(tokens, *rest))
    tokens = stream(net, PROMPTS, max_new_tokens=3, temperature=0.0)
    assert calls == []
    first = next(tokens)
    assert first.shape == (4,) and first.dtype == torch.long and calls == [23]
    rest = list(tokens)
    assert len(rest) == 2 and calls == [23, 1, 1]
    assert torch.equal(torch.stack([first, *rest], 1), generate(net, PROMPTS, max_new_tokens=3, temperature=0.0))


@pytest.mark.parametrize("training", [True, False])
def test_stream_restores_training_mode_also_when_left_early(net, training):
    net.train(training)
    tokens = stream(net, PROMPTS, max_new_tokens=3)
    assert net.training == training
    next(tokens)
    assert not net.training
    tokens.close()
    assert net.training == training
    list(stream(net, PROMPTS, max_new_tokens=1))
    assert net.training == training


def test_drawn_tokens_can_be_trained_on(net):
    for tokens in (next(stream(net, PROMPTS, max_new_tokens=1))[:, None], generate(net, PROMPTS, max_new_tokens=2)):
        net(tokens)[0].sum().backward()


def test_no_new_tokens_are_an_empty_result(net):
    assert generate(net, PROMPTS, max_new_tokens=0).shape == (4, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": []}, "at least one"),
        ({"prompts": [torch.tensor([], dtype=torch.long)]}, "at least one token id"),
        ({"prompts": [torch.zeros(1, 3, dtype=torch.long)]}, "each a vector"),
        ({"prompts": [torch.tensor([3, VOCAB])]}, f"token {VOCAB}; ids run from 0 to {VOCAB - 1}"),
        ({"prompts": [torch.tensor([3, -1])]}, f"token -1; ids run from 0 to {VOCAB - 1}"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1: use 0 or more"),
        ({"temperature": -0.5}, "temperature=-0.5: use 0 .* or more"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0: use 1 or more"),
        ({"top_p": 0.0}, "top_p=0.0: use a probability"),
        ({"top_p": 1.5}, "top_p=1.5: use a probability"),
        ({"prefill_chunk": 0}, "prefill_chunk=0: use 1 or more"),
    ],
)
def test_an_argument_out_of_range_is_refused_at_once(net, unchecked, settings, message):
    settings = {"prompts": PROMPTS, "max_new_tokens": 1} | settings
    with pytest.raises(ValueError, match=message):
        stream(net, settings.pop("prompts"), **settings)


# Sampling.

LOGITS = torch.tensor([0.4, 0.1, 0.3, 0.15, 0.05]).log()


def frequencies(draws=20_000, logits=LOGITS, **settings):
    tokens = sample(logits.expand(draws, -1), generator=torch.Generator().manual_seed(0), **settings)
    return tokens.bincount(minlength=logits.shape[-1]) / draws


def assert_drawn_from(found, expected, draws=20_000):
    five_deviations = 5 * (expected * (1 - expected) / draws).sqrt()
    assert ((found - expected).abs() <= five_deviations).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_from_the_softmax_at_a_temperature(temperature):
    assert_drawn_from(frequencies(temperature=temperature), (LOGITS / temperature).softmax(0))


@pytest.mark.parametrize(("top_k", "kept"), [(1, [0]), (2, [0, 2]), (4, [0, 1, 2, 3]), (5, range(5)), (99, range(5))])
def test_top_k_draws_among_the_k_most_likely(top_k, kept):
    expected = torch.zeros(5).index_copy(0, torch.tensor(kept), LOGITS.exp()[list(kept)])
    assert_drawn_from(frequencies(top_k=top_k), expected / expected.sum())


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1e-6, [0]), (0.39, [0]), (0.41, [0, 2]), (0.69, [0, 2]), (0.71, [0, 2, 3]), (1.0, range(5))]
)
def test_top_p_draws_among_the_smallest_set_that_reaches_p(top_p, kept):
    expected = torch.zeros(5).index_copy(0, torch.tensor(kept), LOGITS.exp()[list(kept)])
    assert_drawn_from(frequencies(top_p=top_p), expected / expected.sum())


def test_top_p_is_reached_at_the_temperature_that_is_drawn_at():
    # At temperature 1/2 the first two tokens hold 0.82 of the probability; at 1 they hold 0.7.
    kept = frequencies(temperature=0.5, top_p=0.8) > 0
    assert kept.tolist() == [True, False, True, False, False]


def test_top_k_keeps_k_tokens_also_among_equals():
    assert (frequencies(logits=torch.zeros(6), top_k=2) > 0).sum() == 2


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}], ids=str
)
def test_the_narrowest_settings_take_the_most_likely_token(settings):
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits, **settings), logits.argmax(-1))


def test_rows_are_filtered_apart():
    logits = torch.stack([LOGITS, LOGITS.flip(0)]).repeat_interleave(2_000, 0)
    first, second = sample(logits, top_p=0.6, generator=torch.Generator().manual_seed(0)).split(2_000)
    assert set(first.tolist()) == {0, 2} and set(second.tolist()) == {4, 2}
