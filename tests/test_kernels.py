"""The compiled kernels against the plain operations they stand in for, in fp64."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from test_model import GPT2, MODERN, VOCAB_SIZE, keys_of_rows, make_tokens

from nanorun import kernels
from nanorun.errors import Stopped, UserError
from nanorun.model import GPT
from nanorun.records.record import read_records
from nanorun.training import checkpoint
from nanorun.training.run import resume_run, train_seeds

needs_compiler = pytest.mark.skipif(kernels.library() is None, reason="no C compiler here")


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(kernel, plain, *inputs):
    """Hold a kernel's result and gradients, all of them random sums', against those of plain fp64."""
    ours = [one.clone().requires_grad_() for one in inputs]
    theirs = [one.double().requires_grad_() for one in inputs]
    y, expected = kernel(*ours), plain(*theirs)
    torch.testing.assert_close(y.double(), expected, rtol=2e-6, atol=2e-6)
    weights = drawn(*y.shape, seed=9)
    y.backward(weights)
    expected.backward(weights.double())
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("width", [32, 37])
def test_norms_are_those_of_torch(width):
    x, weight, bias = drawn(3, 21, width) + 0.5, drawn(width, seed=1), drawn(width, seed=2)
    check(
        lambda x: kernels.RMSNorm.apply(x, 1e-5), lambda x: x * (x.square().mean(-1, True) + 1e-5).rsqrt(), x
    )
    check(
        lambda *a: kernels.LayerNorm.apply(*a, 1e-5),
        lambda *a: F.layer_norm(a[0], (width,), *a[1:]),
        x,
        weight,
        bias,
    )


@needs_compiler
def test_activations_are_those_of_torch_far_from_zero_too():
    x = torch.cat((drawn(5, 31).flatten(), torch.tensor([-60.0, -9.0, 0.0, 9.0, 60.0])))
    check(lambda x: kernels.Activation.apply(x, "gelu"), lambda x: F.gelu(x, approximate="tanh"), x)
    check(lambda x: kernels.Activation.apply(x, "gelu_exact"), F.gelu, x)
    check(lambda x: kernels.Activation.apply(x, "relu2"), lambda x: F.relu(x).square(), x)


@needs_compiler
@pytest.mark.parametrize("cap", [0.0, 15.0])
def test_cross_entropy_is_that_of_torch_with_targets_left_out(cap):
    targets = torch.randint(67, (40,), generator=torch.Generator().manual_seed(1))
    targets[::7] = -1

    def plain(z):
        return F.cross_entropy(
            torch.tanh(z / cap) * cap if cap else z, targets, ignore_index=-1, reduction="sum"
        )

    check(
        lambda z: kernels.CrossEntropy.apply(z * 1, targets, cap, -1) / 32,
        lambda z: plain(z) / 32,
        9 * drawn(40, 67),
    )
    targets[3] = 67
    with pytest.raises(IndexError, match="outside the vocabulary of 67"):
        kernels.CrossEntropy.apply(drawn(40, 67), targets, cap, -1)


def losses_and_grads(config, monkeypatch, off):
    if off:
        monkeypatch.setattr(kernels, "_allowed", False)
    model = GPT(config, VOCAB_SIZE)
    model.initialise(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * drawn(*parameter.shape, seed=parameter.numel()))
    tokens = make_tokens()
    loss, _ = model(tokens, tokens.roll(-1, 1), keys_of_rows(3) if config.dropout else None)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@needs_compiler
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("config", [GPT2, MODERN], ids=["gpt2", "modern"])
def test_a_model_trains_alike_with_kernels_and_without(config, dropout, monkeypatch):
    config = dataclasses.replace(config, n_embd=64, dropout=dropout)
    fused = losses_and_grads(config, monkeypatch, off=False)
    plain = losses_and_grads(config, monkeypatch, off=True)
    for one, other in zip(fused, plain):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4)


@needs_compiler
def test_kernels_carry_what_is_not_a_number_on():
    x = drawn(4, 32)
    x[2, 5] = math.nan
    for y in (
        kernels.RMSNorm.apply(x, 1e-5),
        kernels.Activation.apply(x, "gelu"),
        kernels.Activation.apply(x, "gelu_exact"),
        kernels.Activation.apply(x, "relu2"),
    ):
        assert y[2, 5].isnan()
        assert y[:2].isfinite().all()
    assert kernels.CrossEntropy.apply(x.clone(), torch.zeros(4, dtype=torch.int64), 15.0, -1).isnan()


@needs_compiler
def test_one_thread_and_two_give_the_same_bits(monkeypatch):
    x, weight, threads = (
        drawn(300, 64).requires_grad_(),
        torch.ones(64, requires_grad=True),
        torch.get_num_threads(),
    )
    found = []
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        y = kernels.LayerNorm.apply(x, weight, None, 1e-5)
        found.append([y, *torch.autograd.grad(y.square().sum(), (x, weight))])
    torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found))


def test_kernels_leave_alone_what_they_are_not_made_for():
    x = drawn(4, 32)
    for other in (x.double(), x.bfloat16(), x.t(), x.to("meta"), x[:0]):
        assert not kernels.suit(other)
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernels.suit(x)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("CC", "no-such-compiler", "no C compiler"),
        ("CC", "false", "exit status 1"),
        ("NANORUN_KERNELS", "0", "is 0"),
    ],
)
def test_without_a_compiler_there_are_no_kernels(name, value, why, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(name, value)
    library, said = kernels._loaded.__wrapped__()
    assert library is None
    assert why in said


def stopped_in(words, monkeypatch, changes):
    """Return the folder of a run that stopped, whose checkpoint then reads as if its choices had been others."""
    with pytest.raises(Stopped) as stopped:
        train_seeds(*words)
    real = checkpoint.newest_of

    def changed(folder):
        found, passed_over = real(folder)
        choices = {**found.state["choices"], **changes}
        found.state["choices"] = {key: value for key, value in choices.items() if value is not None}
        return found, passed_over

    monkeypatch.setattr(checkpoint, "newest_of", changed)
    return Path(str(stopped.value).rpartition(" ")[2])


@pytest.fixture
def words(tmp_path, monkeypatch, tiny_settings, shakespeare_folder, stop_in_step):
    """What trains a tiny run that stops in its third step, in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    stop_in_step(3)
    return (
        "shakespeare-sprint",
        "adamw",
        tiny_settings,
        0,
        1,
        {"data": shakespeare_folder},
        Console(quiet=True),
    )


@needs_compiler
def test_a_run_from_before_there_were_kernels_goes_on_without(words, monkeypatch):
    folder = stopped_in(words, monkeypatch, {"kernels": None})
    called, real = [], kernels._call
    monkeypatch.setattr(kernels, "_call", lambda name, *rest: called.append(name) or real(name, *rest))
    resume_run(folder, Console(quiet=True))
    assert not called
    assert [one.software.kernels for one in read_records(Path("records"))[0]] == [False]
    assert not kernels.why_not()


@needs_compiler
def test_a_record_says_that_kernels_ran_and_a_resumed_run_needs_them(words, monkeypatch):
    folder = stopped_in(words, monkeypatch, {})
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_loaded", lambda: (None, "no C compiler here"))
        with pytest.raises(UserError, match="kernels True then, False now"):
            resume_run(folder, Console(quiet=True))
    resume_run(folder, Console(quiet=True))
    assert [one.software.kernels for one in read_records(Path("records"))[0]] == [True]


def test_a_run_without_kernels_says_why(words, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "_loaded", lambda: (None, "no C compiler here: install gcc"))
    with pytest.raises(Stopped):
        train_seeds(*words[:-1], Console(width=200))
    assert "plain operations, without" in (said := capsys.readouterr().out)
    assert said.count("no C compiler here: install gcc") == 1
