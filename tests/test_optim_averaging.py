"""Averages of weights against plain means, and the swap for evaluation."""

import io

import pytest
import torch

from nanorun.errors import UserError
from nanorun.optim.averaging import EmaAverage, QueueAverage, make_average
from nanorun.optim.build import OptimizerSet, create


def snapshots(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 3), (5,), ()]
    return [
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes] for _ in range(n)
    ]


def read(average):
    out = [torch.zeros_like(tensor) for tensor in snapshots(1)[0]]
    average.copy_to(out)
    return out


def close(left, right):
    return all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("n", [1, 3, 4, 9])
def test_the_queue_is_the_mean_of_the_newest_snapshots(n):
    average, taken = QueueAverage(snapshots=4, every_steps=1), snapshots(n)
    for snapshot in taken:
        average.take(snapshot)
    newest = taken[-4:]
    assert close(read(average), [torch.stack(parts).mean(0) for parts in zip(*newest)])
    assert len(average.tensors()) == 3 * len(newest)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.99])
def test_the_ema_weighs_snapshots_by_powers_of_its_own_beta(beta):
    average, taken = EmaAverage(beta=beta, every_steps=1), snapshots(12)
    for snapshot in taken:
        average.take(snapshot)
    weights = torch.tensor([beta ** (11 - i) for i in range(12)], dtype=torch.float64)
    weights /= weights.sum()
    wanted = [torch.tensordot(weights, torch.stack(parts), dims=1) for parts in zip(*taken)]
    assert close(read(average), wanted)
    assert close(read(average), taken[-1]) == (beta == 0.0)


@pytest.mark.parametrize("kind", ["queue", "ema"])
def test_a_snapshot_is_taken_every_few_steps_from_its_first_one_on(kind):
    average = make_average(kind, snapshots=2, beta=0.5, every_steps=3, from_step=5)
    taken = []
    average.take = lambda parameters: taken.append(parameters[0])
    for done in range(1, 16):
        average.after_step(done, [done])
    assert taken == [6, 9, 12, 15]


@pytest.mark.parametrize("kind", ["queue", "ema"])
def test_an_average_without_a_snapshot_leaves_the_weights_alone(kind):
    average = make_average(kind, snapshots=2, beta=0.5, every_steps=3, from_step=0)
    assert all(not tensor.any() for tensor in read(average))
    assert average.tensors() == []


@pytest.mark.parametrize("kind", ["queue", "ema"])
def test_an_average_goes_on_with_the_same_bits_after_saving(kind):
    def fresh():
        return make_average(kind, snapshots=3, beta=0.7, every_steps=1, from_step=0)

    whole, first, again = fresh(), fresh(), fresh()
    taken = snapshots(8)
    for snapshot in taken:
        whole.take(snapshot)
    for snapshot in taken[:5]:
        first.take(snapshot)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True), taken[0])
    for snapshot in taken[5:]:
        again.take(snapshot)
    assert all(torch.equal(a, b) for a, b in zip(read(whole), read(again), strict=True))


def test_an_average_of_another_kind_or_model_is_refused():
    queue, ema = QueueAverage(snapshots=2, every_steps=1), EmaAverage(beta=0.5, every_steps=1)
    taken = snapshots(1)[0]
    ema.take(taken)
    with pytest.raises(UserError, match="average of kind 'ema', and the run has 'queue'"):
        queue.load_state_dict(ema.state_dict(), taken)
    with pytest.raises(UserError, match="does not fit this model"):
        EmaAverage(beta=0.5, every_steps=1).load_state_dict(ema.state_dict(), taken[:2])


def test_an_unknown_average_is_refused_by_name():
    with pytest.raises(UserError, match=r"'queues': wanted one of none, queue, ema\. Did you mean 'queue'"):
        make_average("queues", snapshots=1, beta=0.5, every_steps=1, from_step=0)


def optimizer_set(name, average=None):
    parameters = [torch.nn.Parameter(tensor.float()) for tensor in snapshots(1)[0]]
    optimizer = create(name, parameters, lr=0.1)
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return OptimizerSet([optimizer], [name], average), parameters


def train(optimizers, parameters, n):
    for step in range(n):
        for parameter, value in zip(parameters, snapshots(1, seed=step)[0], strict=True):
            parameter.grad = value.float()
        optimizers.step()
        optimizers.after_step(step + 1)


@pytest.mark.parametrize(
    ("name", "average"),
    [
        ("adamw", QueueAverage(snapshots=2, every_steps=1)),
        ("adamw", EmaAverage(beta=0.9, every_steps=1)),
        ("schedulefree_adamw", None),
        ("schedulefree_adamw", EmaAverage(beta=0.9, every_steps=1)),
    ],
)
def test_evaluating_reads_other_weights_and_leaves_the_run_its_bits(name, average):
    watched, parameters = optimizer_set(name, average)
    train(watched, parameters, 4)
    before = [parameter.clone() for parameter in parameters]
    watched.to_evaluation()
    watched.to_evaluation()  # a second one does not take the average for the weights to go back to
    assert not any(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    watched.to_training()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    train(watched, parameters, 3)
    alone, parameters_alone = optimizer_set(name)
    train(alone, parameters_alone, 4)
    train(alone, parameters_alone, 3)
    assert all(torch.equal(a, b) for a, b in zip(parameters, parameters_alone, strict=True))


def test_an_optimizer_without_an_average_evaluates_the_weights_it_trains():
    optimizers, parameters = optimizer_set("adamw")
    assert not optimizers.evaluates_other_weights
    train(optimizers, parameters, 1)
    before = [parameter.clone() for parameter in parameters]
    optimizers.to_evaluation()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    optimizers.to_training()


def test_the_average_counts_as_memory_of_the_optimizer():
    plain, parameters = optimizer_set("adamw")
    with_queue, others = optimizer_set("adamw", QueueAverage(snapshots=2, every_steps=1))
    train(plain, parameters, 3)
    train(with_queue, others, 3)
    n_parameters = sum(parameter.numel() for parameter in parameters)
    assert with_queue.state_bytes() == plain.state_bytes() + 2 * 4 * n_parameters
