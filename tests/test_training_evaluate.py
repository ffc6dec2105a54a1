"""The validation loss against a prediction of every token by itself."""

import contextlib
import dataclasses
import math

import pytest
import torch

from nanorun.training import evaluate
from nanorun.training.distributed import Ranks
from nanorun.training.evaluate import validation_loss, windows_per_pass

CONTEXT = 64
N_TOKENS = 300


@dataclasses.dataclass(frozen=True)
class Listening(Ranks):
    """A rank alone that keeps what it would have added to the others'."""

    heard: list = dataclasses.field(default_factory=list)

    def sum_(self, tensor):
        self.heard.append(tensor.clone())
        return tensor


@pytest.fixture
def stepper(make_stepper):
    """A model a few steps old: a new one predicts every token alike."""
    made = make_stepper()
    for step in range(5):
        made.step(step, 1.0)
    return made


def read(stepper, stride=CONTEXT, n_tokens=N_TOKENS, ranks=Ranks()):  # noqa: B008
    return validation_loss(
        stepper.model,
        stepper.tokens,
        n_tokens=n_tokens,
        context_len=CONTEXT,
        stride=stride,
        device=torch.device("cpu"),
        ranks=ranks,
        autocast=stepper.autocast,
    )


@torch.no_grad()
def one_by_one(stepper, stride):
    """Predict each token but the first from the start of the window that has to predict it."""
    tokens = torch.from_numpy(stepper.tokens.slice(0, N_TOKENS))
    losses = []
    for place in range(1, N_TOKENS):
        window = max(0, -(-(place - CONTEXT) // stride))
        logits = stepper.model(tokens[None, window * stride : place])[0, -1]
        losses.append(-torch.log_softmax(logits.double(), dim=0)[tokens[place]])
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("stride", [64, 48, 7])
@pytest.mark.parametrize("windows_per_pass", [1, 3, 1000])
def test_each_token_is_predicted_once_whatever_the_size_of_a_pass(
    stepper, monkeypatch, stride, windows_per_pass
):
    monkeypatch.setattr(evaluate, "TOKENS_PER_PASS_CPU", 64 * windows_per_pass)
    loss, n_predicted = read(stepper, stride)
    assert n_predicted == N_TOKENS - 1
    assert loss == pytest.approx(one_by_one(stepper, stride), abs=1e-5)


def test_no_tokens_means_all(stepper):
    assert read(stepper, n_tokens=0)[1] == stepper.tokens.n_tokens - 1


@pytest.mark.parametrize("n_ranks", [2, 3, 9])
def test_the_shares_of_all_ranks_add_up_to_one_ranks_sum(stepper, n_ranks):
    # With 9 ranks and 5 windows some have nothing to do.
    alone = Listening()
    read(stepper, ranks=alone)
    heard = []
    for rank in range(n_ranks):
        share = Listening(rank, n_ranks, rank)
        try:
            read(stepper, ranks=share)
        except ZeroDivisionError:  # no windows for this rank, and nobody to hear from here
            assert n_ranks > 5
        heard += share.heard
    total = torch.stack(heard).sum(dim=0)
    assert total[1] == alone.heard[0][1] == N_TOKENS - 1
    assert float(total[0]) == pytest.approx(float(alone.heard[0][0]), abs=1e-3)


@pytest.mark.parametrize("n_ranks", [2, 3, 9])
def test_all_ranks_make_as_many_passes(stepper, monkeypatch, n_ranks):
    monkeypatch.setattr(evaluate, "TOKENS_PER_PASS_CPU", 1)
    passes = []
    for rank in range(n_ranks):
        count = []
        handle = stepper.model.register_forward_hook(lambda *_, count=count: count.append(1))
        with contextlib.suppress(ZeroDivisionError):
            read(stepper, ranks=Listening(rank, n_ranks, rank))
        handle.remove()
        passes.append(len(count))
    assert passes == [math.ceil(5 / n_ranks)] * n_ranks


def test_reading_leaves_no_gradients_and_the_model_in_training(stepper):
    stepper.model.train()
    read(stepper)
    assert stepper.model.training
    assert all(p.grad is None for p in stepper.model.parameters())


def test_dropout_is_off_while_reading(make_stepper):
    dropping = make_stepper("model.dropout=0.5")
    for step in range(3):
        dropping.step(step, 1.0)
    plain = make_stepper()
    plain.model.load_state_dict(dropping.model.state_dict())
    assert read(dropping) == read(plain)


def test_a_pass_on_cuda_holds_no_more_logits_than_fit_a_small_card():
    cuda = torch.device("cuda")
    assert windows_per_pass(cuda, 1024, 257) == 64
    assert windows_per_pass(cuda, 1024, 50257) * 1024 * 50257 * 4 <= 2**30
    assert windows_per_pass(cuda, 10**6, 50257) == 1
