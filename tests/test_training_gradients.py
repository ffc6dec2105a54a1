"""Gradients leave in buckets while the backward pass goes on, in one order, and come back as their sum."""

import pytest
import torch
from test_model import GPT2, MODERN, make_model, make_tokens

from nanorun.training.gradients import GradientSum, make_buckets


class Twins:
    """Two ranks of which the other has the same numbers as this one."""

    n_ranks = 2

    def __init__(self):
        self.sent = []

    def start_sum(self, tensor):
        self.sent.append(tensor.numel())
        tensor.mul_(2)
        return self

    def wait(self):
        pass


def backward(model, seed=0, forward=None):
    tokens = make_tokens(seed=seed)
    run = model if forward is None else forward
    loss_sum, _ = run(tokens[:, :-1], tokens[:, 1:])
    loss_sum.backward()


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def summed(model, ranks, bucket_bytes, forward=None):
    """Return the gradients of two passes over the ranks, and how many buckets had left before each pass's end."""
    sums, left = GradientSum(model.parameters(), ranks, bucket_bytes=bucket_bytes), []
    backward(model, seed=0, forward=forward)
    left.append(len(ranks.sent))
    with sums.travelling():
        backward(model, seed=1, forward=forward)
    left.append(len(ranks.sent))
    numbers = torch.ones(2)
    sums.finish(numbers)
    assert numbers.tolist() == [2.0, 2.0]
    return gradients(model), left


def wanted(config, forward=lambda model: model):
    model = make_model(config)
    for seed in (0, 1):
        backward(model, seed, forward(model))
    return [2 * grad for grad in gradients(model)]


@pytest.mark.parametrize("config", [GPT2, MODERN], ids=["gpt2", "modern"])
@pytest.mark.parametrize("recomputed", ["none", "block"])
@pytest.mark.parametrize("bucket_bytes", [1, 4096, 2**20])
def test_the_last_passes_gradients_leave_while_it_goes_on_and_sum_to_all_ranks(
    config, recomputed, bucket_bytes
):
    model, ranks = make_model(config), Twins()
    model.checkpoint_activations = recomputed
    buckets = make_buckets(list(model.parameters()), bucket_bytes)
    found, left = summed(model, ranks, bucket_bytes)
    assert left == [0, len(buckets)]
    assert ranks.sent == [sum(p.numel() for p in bucket) for bucket in buckets] + [2]
    for grad, want in zip(found, wanted(config), strict=True):
        torch.testing.assert_close(grad, want)


def test_buckets_hold_every_parameter_once_from_the_last_to_the_first_and_one_dtype_each():
    model = make_model(GPT2)
    model.norm_f.to(torch.bfloat16)
    parameters = list(model.parameters())
    buckets = make_buckets(parameters, 4096)
    assert [id(p) for bucket in buckets for p in bucket] == [id(p) for p in reversed(parameters)]
    assert all(len({p.dtype for p in bucket}) == 1 for bucket in buckets)
    assert all(len(bucket) == 1 or sum(p.nbytes for p in bucket) <= 4096 for bucket in buckets)
    assert 2 < len(buckets) < len(parameters)


def test_a_parameter_that_gets_no_gradient_holds_nothing_up_and_stays_without():
    model, ranks = make_model(GPT2), Twins()
    model.norm_f.unused = torch.nn.Parameter(torch.ones(3, 5))
    found, left = summed(model, ranks, 4096)
    # It comes last of all, so it is in the first bucket, which waits for it; those behind keep their order.
    assert left == [0, 0]
    assert ranks.sent[0] > 15
    named = dict(zip([name for name, _ in model.named_parameters()], found))
    assert named.pop("norm_f.unused") is None
    for grad, want in zip(named.values(), wanted(GPT2), strict=True):
        torch.testing.assert_close(grad, want)


def test_one_rank_keeps_its_gradients_where_they_are():
    class Alone:
        n_ranks = 1

    model = make_model(GPT2)
    sums = GradientSum(model.parameters(), Alone())
    with sums.travelling():
        backward(model)
    before = [p.grad.data_ptr() for p in model.parameters()]
    sums.finish(torch.ones(2))
    assert [p.grad.data_ptr() for p in model.parameters()] == before


def test_compiled_code_is_not_compiled_anew_for_the_pass_whose_gradients_leave():
    def compiled(model):
        return torch.compile(model, dynamic=False, backend="aot_eager")

    model = make_model(MODERN)
    torch.compiler.reset()  # whatever was compiled in this process before
    # Not monkeypatch: its undoing deletes the setting, and every later recompilation in this process fails.
    with torch._dynamo.config.patch(error_on_recompile=True):
        found, _ = summed(model, Twins(), 4096, forward=compiled(model))
    for grad, want in zip(found, wanted(MODERN), strict=True):
        # Eager passes may run by kernels of nanorun's own, which add up in another order.
        torch.testing.assert_close(grad, want, atol=5e-5, rtol=1e-4)
