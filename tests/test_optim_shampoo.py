"""Shampoo against numpy after the paper, against pytorch_optimizer's, torch's AdaGrad and itself after saving."""

import io

import numpy as np
import pytest
import pytorch_optimizer
import torch
from optim_samples import parameters_of, set_grads

import nanorun.optim.shampoo as shampoo_module
from nanorun.errors import UserError
from nanorun.optim import create
from nanorun.optim.shampoo import Shampoo, refresh_due

SHAPES = [(8, 8), (14, 6), (6, 14), (8, 8), (1, 6), (7,), (1,), ()]
make_parameters = parameters_of(SHAPES)
STACKED = [1, 1, 1, 2, 1, 1, 1, 1]


def plain_root(statistics):
    """The inverse fourth root in numpy; a vector is the diagonal of its matrix."""
    if statistics.ndim == 1:
        return np.diag(statistics**-0.25)
    values, vectors = np.linalg.eigh(statistics)
    return (vectors * values**-0.25) @ vectors.T


class PlainShampoo:
    """One matrix or vector after the paper's algorithm, in numpy's float64."""

    def __init__(self, start, *, lr, momentum, weight_decay, eps, beta, every, longest):
        self.w, self.average = start.copy(), np.zeros_like(start)
        self.lr, self.momentum, self.decay, self.beta = lr, momentum, weight_decay, beta
        self.every, self.step_count = every, 0
        sides = start.shape if start.ndim == 2 else ()
        self.statistics = [eps * (np.eye(s) if s <= longest else np.ones(s)) for s in sides]
        self.squares = np.full_like(start, eps)
        self.roots = [None] * len(sides)

    def add(self, old, new):
        return old + new if self.beta is None else self.beta * old + (1 - self.beta) * new

    def step(self, grad):
        self.step_count += 1
        self.average = self.momentum * self.average + (1 - self.momentum) * grad
        self.w = self.w * (1 - self.lr * self.decay)
        if grad.ndim < 2:
            self.squares = self.add(self.squares, grad**2)
            self.w = self.w - self.lr * self.average / np.sqrt(self.squares)
            return
        early = (1, 2, 4, 8, 16, 32, 64)
        due = self.step_count % self.every == 0 or (self.step_count < self.every and self.step_count in early)
        for side, product in enumerate([grad @ grad.T, grad.T @ grad]):
            full = self.statistics[side].ndim == 2
            self.statistics[side] = self.add(self.statistics[side], product if full else np.diag(product))
            if due or not full:
                self.roots[side] = plain_root(self.statistics[side])
        self.w = self.w - self.lr * self.roots[0] @ self.average @ self.roots[1]


def parts(tensor, count):
    return tensor.detach().double().chunk(count) if count > 1 else [tensor.detach().double()]


@pytest.mark.parametrize(
    ("beta", "momentum", "every", "longest"),
    [(None, 0.9, 1, 100), (0.9, 0.0, 7, 100), (None, 0.9, 20, 8), (0.9, 0.9, 20, 5)],
)
def test_shampoo_matches_the_plain_formula_over_100_steps(beta, momentum, every, longest):
    parameters = make_parameters()
    held = {"lr": 0.05, "momentum": momentum, "weight_decay": 0.1, "eps": 1e-3, "beta": beta}
    optimizer = Shampoo(
        [{"params": parameters, "n_stacked": STACKED}],
        precondition_frequency=every,
        max_preconditioner_dim=longest,
        **held,
    )
    plain = [
        [PlainShampoo(part.numpy(), every=every, longest=longest, **held) for part in parts(p, count)]
        for p, count in zip(parameters, STACKED, strict=True)
    ]
    before = [p.detach().clone() for p in parameters]
    for step in range(100):
        set_grads(parameters, step)
        optimizer.step()
        for p, count, formulas in zip(parameters, STACKED, plain, strict=True):
            for formula, grad in zip(formulas, parts(p.grad, count), strict=True):
                formula.step(grad.numpy())
    for p, old, count, formulas in zip(parameters, before, STACKED, plain, strict=True):
        for part, formula in zip(parts(p, count), formulas, strict=True):
            np.testing.assert_allclose(part.numpy(), formula.w, rtol=1e-8, atol=1e-8)
        assert (p - old).abs().max() > 1e-3


def test_shampoo_in_fp32_stays_near_fp64_over_100_steps():
    single, double = make_parameters(dtype=torch.float32), make_parameters()
    optimizers = [Shampoo(parameters, lr=0.05) for parameters in (single, double)]
    for step in range(100):
        for parameters, optimizer in zip((single, double), optimizers, strict=True):
            set_grads(parameters, step)
            optimizer.step()
    for ours, wanted in zip(single, double, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-3, atol=1e-3)


def test_shampoo_without_momentum_matches_pytorch_optimizer_over_100_steps():
    # With momentum the package is another algorithm: it feeds the preconditioned step back into the gradient.
    shapes = [(8, 8), (14, 6), (6, 14)]
    ours, theirs = make_parameters(shapes), make_parameters(shapes)
    optimizer = Shampoo(ours, lr=0.05, momentum=0.0, eps=1e-2, precondition_frequency=1)
    reference = pytorch_optimizer.Shampoo(theirs, lr=0.05, momentum=0.0, matrix_eps=1e-2)
    for step in range(100):
        set_grads(ours, step)
        set_grads(theirs, step)
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_vectors_without_momentum_follow_torch_adagrad_over_100_steps():
    ours, theirs = make_parameters([(7,), ()]), make_parameters([(7,), ()])
    optimizer = Shampoo(ours, lr=0.05, momentum=0.0, eps=1e-2)
    reference = torch.optim.Adagrad(theirs, lr=0.05, initial_accumulator_value=1e-2, eps=0.0)
    for step in range(100):
        set_grads(ours, step)
        set_grads(theirs, step)
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_roots_are_computed_early_and_then_every_so_often():
    assert [step for step in range(1, 41) if refresh_due(step, 10)] == [1, 2, 4, 8, 10, 20, 30, 40]
    assert [step for step in range(1, 20) if refresh_due(step, 8)] == [1, 2, 4, 8, 16]
    assert all(refresh_due(step, 1) for step in range(1, 10))


def test_all_matrices_of_one_shape_go_through_one_root_together(monkeypatch):
    seen = []
    original = shampoo_module.inverse_root

    def counting(stack_KSS, power):
        seen.append((tuple(stack_KSS.shape), power))
        return original(stack_KSS, power)

    monkeypatch.setattr(shampoo_module, "inverse_root", counting)
    parameters = make_parameters([(36, 12), (12, 12), (24, 12), (12, 12)])
    optimizer = Shampoo([{"params": parameters, "n_stacked": [3, 1, 1, 1]}], lr=0.02)
    for step in range(3):
        set_grads(parameters, step)
        optimizer.step()
    of_two_steps = [((5, 12, 12), 4)] * 2 + [((1, 24, 24), 4), ((1, 12, 12), 4)]
    assert sorted(seen) == sorted(of_two_steps * 2)


def test_stacked_q_k_v_equal_three_separate_matrices():
    (fused,) = make_parameters([(36, 12)], dtype=torch.float32)
    separate = [torch.nn.Parameter(part.clone()) for part in fused.detach().chunk(3)]
    one = Shampoo([{"params": [fused], "n_stacked": 3}], lr=0.02, weight_decay=0.1)
    three = Shampoo(separate, lr=0.02, weight_decay=0.1)
    for step in range(20):
        set_grads([fused], step)
        for part, grad in zip(separate, fused.grad.chunk(3), strict=True):
            part.grad = grad.clone()
        one.step()
        three.step()
    assert torch.equal(fused, torch.cat(separate))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_saved_state_continues_with_the_same_bits(momentum):
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": momentum, "max_preconditioner_dim": 8}
    straight, stopped = make_parameters(dtype=torch.float32), make_parameters(dtype=torch.float32)
    first = Shampoo([{"params": straight, "n_stacked": STACKED}], **options)
    second = Shampoo([{"params": stopped, "n_stacked": STACKED}], **options)
    for step in range(13):
        set_grads(straight, step)
        set_grads(stopped, step)
        first.step()
        second.step()
    file = io.BytesIO()
    torch.save(second.state_dict(), file)
    file.seek(0)
    resumed = Shampoo([{"params": stopped, "n_stacked": STACKED}], **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    # Steps 14 to 19 use the roots of step 10; step 20 makes new ones.
    for step in range(13, 23):
        set_grads(straight, step)
        set_grads(stopped, step)
        first.step()
        resumed.step()
        assert all(torch.equal(a, b) for a, b in zip(straight, stopped, strict=True))


def test_matrix_whose_gradient_comes_late_is_treated_as_if_it_were_alone():
    (early, late), (alone,) = make_parameters([(8, 8), (8, 8)]), make_parameters([(8, 8)], seed=3)
    late.data.copy_(alone)
    before = late.detach().clone()
    optimizer, reference = Shampoo([early, late], lr=0.02), Shampoo([alone], lr=0.02)
    for step in range(15):
        set_grads([early], step)
        if step < 3:
            late.grad = None
            optimizer.step()
            assert torch.equal(late, before)
            assert late not in optimizer.state
            continue
        set_grads([late], step, seed=2)
        set_grads([alone], step, seed=2)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(late, alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("beta", [None, 0.5])
@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_zero_gradients_move_nothing_but_the_decay(beta, eps):
    parameters = make_parameters(dtype=torch.float32)
    before = [p.detach().clone() for p in parameters]
    optimizer = Shampoo(parameters, lr=0.5, weight_decay=0.1, beta=beta, eps=eps, max_preconditioner_dim=8)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    for _ in range(5):
        optimizer.step()
    for p, old in zip(parameters, before, strict=True):
        torch.testing.assert_close(p, old * 0.95**5)
    set_grads(parameters, 0)
    optimizer.step()
    assert all(p.isfinite().all() for p in parameters)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_gradients_are_not_written_to(momentum):
    parameters = make_parameters()
    optimizer = Shampoo(parameters, lr=0.02, weight_decay=0.1, momentum=momentum)
    for step in range(3):
        set_grads(parameters, step)
        before = [parameter.grad.clone() for parameter in parameters]
        optimizer.step()
        assert all(torch.equal(p.grad, grad) for p, grad in zip(parameters, before, strict=True))


def test_schedule_reaches_the_update_through_the_group():
    parameters = make_parameters()
    optimizer = Shampoo(parameters, lr=0.02, weight_decay=0.1)
    before = [p.detach().clone() for p in parameters]
    optimizer.param_groups[0]["lr"] = 0.0
    set_grads(parameters, 0)
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


def test_wrong_shapes_and_options_are_refused():
    with pytest.raises(UserError, match="flatten it"):
        Shampoo([torch.nn.Parameter(torch.zeros(2, 3, 4))], lr=0.02)
    with pytest.raises(UserError, match="3 stacked"):
        Shampoo([{"params": [torch.nn.Parameter(torch.zeros(8, 4))], "n_stacked": 3}], lr=0.02)
    with pytest.raises(UserError, match="precondition_frequency = 0"):
        create("shampoo", make_parameters(), lr=0.1, precondition_frequency=0)
    optimizer = create("shampoo", make_parameters(), lr=0.1)
    assert optimizer.param_groups[0]["beta"] is None
