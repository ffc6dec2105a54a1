"""CASPR against a plain formula, and against itself after saving.

The submission is written in JAX, which is not installed here. The independent reference is `PlainMatrix`: the
submission's update in its own order (the right statistic is rescaled one step after the roots, from a copy of
the old left statistic), one matrix and one block at a time, in float64, with the eigenvalues exact.
"""

import io

import pytest
import torch
from optim_samples import parameters_of, set_grads

import nanorun.optim.caspr as module
from nanorun.errors import UserError
from nanorun.optim import create
from nanorun.optim.caspr import CASPR

SHAPES = [(6, 6), (11, 5), (5, 11), (12, 4), (17, 10), (7,), (19,), (), (1, 6), (6, 1)]
make_parameters = parameters_of(SHAPES)
STACKS = [1, 1, 1, 3, 1, 1, 1, 1, 1, 1]
"""(12, 4) is three stacked matrices; under blocks of 8, (17, 10) falls into four shapes of block."""


def make_optimizer(parameters, stacks=STACKS, **options):
    return create("caspr", [{"params": parameters, "n_stacked": stacks}], **options)


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def ridged(matrix, eps):
    return matrix + eps * torch.linalg.eigvalsh(matrix).max() * eye(len(matrix))


def plain_root(matrix, eps):
    values, vectors = torch.linalg.eigh(ridged(matrix, eps))
    return vectors @ torch.diag(values**-0.5) @ vectors.T


class PlainMatrix:
    """The algorithm on one matrix, or on one vector, which takes Adam's step."""

    def __init__(self, matrix, block_size, eps):
        self.m, self.v, self.t = torch.zeros_like(matrix), torch.zeros_like(matrix), 0
        self.size, self.eps = block_size, eps
        self.cells = [
            {
                "L": eps * eye(b.size(0)),
                "old L": eps * eye(b.size(0)),
                "R": eye(b.size(1)),
                "PL": eye(b.size(0)),
                "PR": eye(b.size(1)),
            }
            for b in self.blocks(matrix)
        ]

    def blocks(self, matrix):
        if matrix.ndim < 2:
            return []
        return [b for rows in matrix.split(self.size) for b in rows.split(self.size, dim=1)]

    def statistics(self, g, beta2, every):
        fresh = max(self.t - 1, 1) % every == 0
        for cell, block in zip(self.cells, self.blocks(g), strict=True):
            scale = 1.0
            if fresh:
                scale = (cell["PL"] * (ridged(cell["old L"], self.eps) @ cell["PL"])).sum() / len(block)
                cell["old L"] = cell["L"]
            cell["L"] = beta2 * cell["L"] + (1 - beta2) * block @ block.T
            white = block.T @ cell["PL"]
            cell["R"] = beta2 * scale * cell["R"] + (1 - beta2) * white @ white.T / len(block)
            if self.t % every == 0:
                cell["PL"], cell["PR"] = plain_root(cell["L"], self.eps), plain_root(cell["R"], self.eps)

    def direction(self, g, *, beta1, beta2, eps, every, start, nesterov):
        self.t += 1
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g**2
        self.statistics(g, beta2, every)
        average = beta1 * self.m + (1 - beta1) * g if nesterov else self.m
        average = average / (1 - beta1**self.t)
        adam = average / ((self.v / (1 - beta2**self.t)).sqrt() + eps)
        if g.ndim < 2 or self.t <= start:
            return adam
        out = torch.zeros_like(g)
        for cell, block, target in zip(self.cells, self.blocks(average), self.blocks(out), strict=True):
            target.copy_(cell["PL"] @ block @ cell["PR"])
        return out / out.norm() * adam.norm()


@pytest.mark.parametrize(
    ("nesterov", "every", "start", "matrix_eps"),
    [(True, 4, 6, 1e-6), (False, 3, 0, 1e-2), (True, 20, 31, 1e-6)],
)
def test_caspr_matches_the_plain_formula_over_100_steps(nesterov, every, start, matrix_eps):
    ours, theirs = make_parameters(), make_parameters()
    optimizer = make_optimizer(
        ours,
        lr=0.01,
        betas=(0.9, 0.98),
        eps=1e-6,
        matrix_eps=matrix_eps,
        weight_decay=0.1,
        nesterov=nesterov,
        precondition_frequency=every,
        start_preconditioning_step=start,
        block_size=8,
    )
    plain = {"beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "every": every, "start": start, "nesterov": nesterov}
    matrices = [[p.data] if n == 1 else p.data.chunk(n) for p, n in zip(theirs, STACKS, strict=True)]
    states = [[PlainMatrix(w, 8, matrix_eps) for w in part] for part in matrices]
    for step in range(100):
        set_grads(ours, step)
        optimizer.step()
        for i, parameter in enumerate(ours):
            grads = [parameter.grad] if STACKS[i] == 1 else parameter.grad.chunk(STACKS[i])
            for state, w, grad in zip(states[i], matrices[i], grads, strict=True):
                w -= 0.01 * (state.direction(grad, **plain) + 0.1 * w)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-8, atol=1e-9)
    assert all((a - b).abs().max() > 0.05 for a, b in zip(ours, make_parameters(), strict=True))


def test_vectors_and_matrices_with_a_very_long_side_take_adamw_steps(monkeypatch):
    monkeypatch.setattr(module, "LONGEST_SIDE", 10)
    shapes = [(11, 5), (5, 11), (7,), ()]
    ours, theirs = make_parameters(shapes), make_parameters(shapes)
    options = {"lr": 0.01, "betas": (0.9, 0.98), "weight_decay": 0.1}
    optimizer = make_optimizer(
        ours, 1, nesterov=False, start_preconditioning_step=0, precondition_frequency=2, **options
    )
    adamw = torch.optim.AdamW(theirs, **options)
    for step in range(20):
        set_grads(ours, step)
        set_grads(theirs, step)
        optimizer.step()
        adamw.step()
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-12)
    assert set(optimizer.state[ours[0]]) == {"step", "exp_avg", "exp_avg_sq"}


def test_the_scale_of_the_gradient_does_not_matter():
    # Powers -1/2 on both sides with relative ridges; what is left of the start is gone after 60 steps.
    small, large = make_parameters([(8, 6)]), make_parameters([(8, 6)])
    options = {"lr": 0.01, "betas": (0.5, 0.5), "eps": 0.0, "precondition_frequency": 5}
    one, other = make_optimizer(small, 1, **options), make_optimizer(large, 1, **options)
    start = []
    for step in range(80):
        set_grads(small, step)
        large[0].grad = small[0].grad * 100
        if step == 60:
            start = [small[0].detach().clone(), large[0].detach().clone()]
        one.step()
        other.step()
    torch.testing.assert_close(small[0] - start[0], large[0] - start[1], rtol=1e-6, atol=1e-8)


def test_the_left_factor_is_what_the_right_one_learns_behind():
    (parameter,) = make_parameters([(6, 4)])
    optimizer = make_optimizer([parameter], 1, lr=0.01, precondition_frequency=5, betas=(0.9, 0.9))
    for step in range(8):
        set_grads([parameter], step)
        optimizer.step()
        state = optimizer.state[parameter]
        if step == 6:
            before = state["right_0"][0].clone()
    white = state["left_root_0"][0] @ parameter.grad
    torch.testing.assert_close(state["right_0"][0], 0.9 * before + 0.1 * white.T @ white / 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_state_continues_with_the_same_bits(dtype):
    options = {"lr": 0.01, "precondition_frequency": 4, "start_preconditioning_step": 2, "block_size": 8}
    straight, stopped = make_parameters(dtype=dtype), make_parameters(dtype=dtype)
    first, second = make_optimizer(straight, **options), make_optimizer(stopped, **options)
    for step in range(6):
        set_grads(straight, step)
        set_grads(stopped, step)
        first.step()
        second.step()
    file = io.BytesIO()
    torch.save(second.state_dict(), file)
    file.seek(0)
    resumed = make_optimizer(stopped, **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(6, 14):
        set_grads(straight, step)
        set_grads(stopped, step)
        first.step()
        resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, stopped, strict=True))


def test_zero_and_missing_gradients_move_nothing_but_the_decay():
    parameters = make_parameters(dtype=torch.float32)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = make_optimizer(
        parameters, lr=0.5, weight_decay=0.1, start_preconditioning_step=0, precondition_frequency=1
    )
    for parameter in parameters[1:]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(parameters[0], before[0])
    assert parameters[0] not in optimizer.state
    for parameter, old in zip(parameters[1:], before[1:], strict=True):
        torch.testing.assert_close(parameter, old * (1 - 0.5 * 0.1))


def test_gradients_that_vanish_for_long_leave_everything_finite():
    parameters = make_parameters([(6, 6), (11, 5), (7,)], dtype=torch.float32)
    optimizer = make_optimizer(
        parameters, 1, lr=0.01, betas=(0.5, 0.5), start_preconditioning_step=2, precondition_frequency=5
    )
    for step in range(260):
        set_grads(parameters, step)
        if 40 < step < 240:
            for parameter in parameters:
                parameter.grad.zero_()
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in parameters)


def test_gradients_are_not_written_to():
    parameters = make_parameters()
    optimizer = make_optimizer(parameters, lr=0.01, start_preconditioning_step=0, block_size=4)
    set_grads(parameters, 0)
    before = [parameter.grad.clone() for parameter in parameters]
    optimizer.step()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(parameters, before, strict=True))


def test_schedule_reaches_the_update_through_the_group():
    parameters = make_parameters([(8, 8), (8,)])
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = make_optimizer(parameters, 1, lr=0.02, weight_decay=0.1)
    optimizer.param_groups[0]["lr"] = 0.0
    set_grads(parameters, 0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="3 stacked"):
        CASPR([{"params": [torch.nn.Parameter(torch.zeros(8, 4))], "n_stacked": 3}], lr=0.02)


def test_the_damped_root_is_that_of_the_matrix_with_the_ridge_it_reports():
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(3, 6, 4, generator=generator, dtype=torch.float64)
    # Rank 4 of 6, and three scales far apart.
    stack = half @ half.mT * torch.tensor([1e-12, 1.0, 1e12], dtype=torch.float64)[:, None, None]
    root, ridge = module.damped_inverse_root(stack, 2, 1e-3)
    torch.testing.assert_close(ridge, 1e-3 * torch.linalg.eigvalsh(stack).amax(dim=1))
    inverse = torch.linalg.inv(stack + ridge[:, None, None] * eye(6))
    torch.testing.assert_close(root @ root, inverse, rtol=1e-8, atol=0.0)
    assert torch.equal(module.damped_inverse_root(torch.zeros(1, 3, 3), 2, 1e-3)[0][0], torch.eye(3))
