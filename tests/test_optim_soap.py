"""SOAP against numpy after the paper, against pytorch_optimizer's, torch's AdamW and itself after saving."""

import io

import numpy as np
import pytest
import pytorch_optimizer
import torch
from optim_samples import parameters_of, set_grads

import nanorun.optim.soap as soap_module
from nanorun.errors import UserError
from nanorun.optim import create
from nanorun.optim.soap import SOAP

SHAPES = [(8, 8), (10, 6), (6, 10), (16, 8), (2, 3), (7,), (1,), ()]
make_parameters = parameters_of(SHAPES)
STACKED = [1, 1, 1, 2, 1, 1, 1, 1]
VECTORS = [(7,), (1,), ()]


class PlainSoap:
    """One matrix after Algorithm 3 of the paper with Adam's bias correction, in numpy's float64.

    Unlike nanorun's, the average gradient stays in the plain basis, as the paper writes it.
    """

    def __init__(self, start, first_grad, bases, *, lr, betas, shampoo_beta, eps, weight_decay, every):
        self.w, self.m, self.v = start.copy(), np.zeros_like(start), np.zeros_like(start)
        self.lr, (self.beta1, self.beta2), self.eps, self.decay = lr, betas, eps, weight_decay
        self.beta, self.every, self.step_count = shampoo_beta or betas[1], every, 0
        self.statistics = [
            (1 - self.beta) * first_grad @ first_grad.T,
            (1 - self.beta) * first_grad.T @ first_grad,
        ]
        self.bases = bases

    def step(self, grad):
        self.step_count += 1
        left, right = (np.eye(s) if q is None else q for q, s in zip(self.bases, grad.shape, strict=True))
        self.m = self.beta1 * self.m + (1 - self.beta1) * grad
        self.v = self.beta2 * self.v + (1 - self.beta2) * (left.T @ grad @ right) ** 2
        m_turned = left.T @ self.m @ right / (1 - self.beta1**self.step_count)
        v_corrected = self.v / (1 - self.beta2**self.step_count)
        update = left @ (m_turned / (np.sqrt(v_corrected) + self.eps)) @ right.T
        self.w = self.w - self.lr * self.decay * self.w - self.lr * update
        for side, product in enumerate([grad @ grad.T, grad.T @ grad]):
            self.statistics[side] = self.beta * self.statistics[side] + (1 - self.beta) * product
            if self.step_count % self.every == 0 and self.bases[side] is not None:
                self.refine(side)

    def refine(self, side):
        basis = self.bases[side]
        order = np.argsort(-np.diag(basis.T @ self.statistics[side] @ basis))
        self.v = self.v[order] if side == 0 else self.v[:, order]
        self.bases[side], _ = np.linalg.qr(self.statistics[side] @ basis[:, order])


def parts(tensor, count):
    return tensor.detach().double().chunk(count)


def checked_basis(state, side, index, statistics):
    """Our first basis, after a check that it holds the statistics' eigenvectors by falling eigenvalue.

    Where eigenvalues are zero any basis is right, and the formula must go on from the same one.
    """
    if f"basis_{side}" not in state:
        return None
    basis = state[f"basis_{side}"][index].numpy()
    np.testing.assert_allclose(basis.T @ basis, np.eye(len(basis)), atol=1e-12)
    diagonal = basis.T @ statistics @ basis
    np.testing.assert_allclose(diagonal, np.diag(np.sort(np.linalg.eigvalsh(statistics))[::-1]), atol=1e-11)
    return basis


def start_plain(parameters, optimizer, held):
    """The formula for every matrix, from the state after the first step."""
    formulas = {}
    for index, (p, count) in enumerate(zip(parameters, STACKED, strict=True)):
        if p.ndim < 2:
            continue
        formulas[index] = []
        for k, (part, grad) in enumerate(zip(parts(p, count), parts(p.grad, count), strict=True)):
            g = grad.numpy()
            weight = 1 - (held["shampoo_beta"] or held["betas"][1])
            bases = [
                checked_basis(optimizer.state[p], side, k, weight * square)
                for side, square in (("left", g @ g.T), ("right", g.T @ g))
            ]
            formulas[index].append(PlainSoap(part.numpy(), g, bases, **held))
    return formulas


@pytest.mark.parametrize(("shampoo_beta", "every", "longest"), [(None, 1, 100), (None, 10, 100), (0.8, 7, 9)])
def test_soap_matches_the_plain_formula_over_100_steps(shampoo_beta, every, longest):
    parameters = make_parameters()
    held = {"lr": 0.02, "betas": (0.9, 0.95), "shampoo_beta": shampoo_beta, "eps": 1e-6, "weight_decay": 0.1}
    optimizer = SOAP(
        [{"params": parameters, "n_stacked": STACKED}],
        precondition_frequency=every,
        max_precond_dim=longest,
        **held,
    )
    before = [p.detach().clone() for p in parameters]
    set_grads(parameters, 0)
    optimizer.step()
    formulas = start_plain(parameters, optimizer, {**held, "every": every})
    assert all(torch.equal(parameters[index], before[index]) for index in formulas)
    for step in range(1, 101):
        set_grads(parameters, step)
        optimizer.step()
        for index, plains in formulas.items():
            for plain, grad in zip(plains, parts(parameters[index].grad, STACKED[index]), strict=True):
                plain.step(grad.numpy())
    for index, plains in formulas.items():
        for part, plain in zip(parts(parameters[index], STACKED[index]), plains, strict=True):
            np.testing.assert_allclose(part.numpy(), plain.w, rtol=1e-7, atol=1e-7)
        assert (parameters[index] - before[index]).abs().max() > 0.01


@pytest.mark.parametrize("every", [1, 10])
def test_soap_matches_pytorch_optimizer_over_100_steps(every):
    # Their QR is in fp32 whatever the dtype. Without decay, whose order differs, and with an eps that is too
    # small to show on which side of the bias correction it stands.
    shapes = [(8, 8), (10, 6), (6, 10)]
    ours, theirs = make_parameters(shapes), make_parameters(shapes)
    options = {"lr": 0.02, "weight_decay": 0.0, "precondition_frequency": every, "eps": 1e-14}
    optimizer = SOAP(ours, **options)
    reference = pytorch_optimizer.SOAP(theirs, **options)
    for step in range(101):
        set_grads(ours, step)
        set_grads(theirs, step)
        optimizer.step()
        reference.step()
        if step == 0:
            # Where a gradient has no part the first basis is anyone's choice; both go on from ours.
            for a, b in zip(ours, theirs, strict=True):
                reference.state[b]["Q"] = [
                    optimizer.state[a][f"basis_{side}"][0] for side in ("left", "right")
                ]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert (ours[0] - make_parameters(shapes)[0]).abs().max() > 0.01


def test_without_bias_correction_the_raw_averages_are_used():
    (ours,), (theirs,) = make_parameters([(8, 8)]), make_parameters([(8, 8)])
    options = {"lr": 0.02, "weight_decay": 0.0, "correct_bias": False}
    optimizer, reference = SOAP([ours], **options), pytorch_optimizer.SOAP([theirs], **options)
    for step in range(30):
        set_grads([ours], step)
        set_grads([theirs], step)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shapes", "longest"), [(VECTORS, 100), ([(8, 6), (6,)], 5)])
def test_what_has_no_basis_follows_torch_adamw_over_100_steps(shapes, longest):
    ours, theirs = make_parameters(shapes), make_parameters(shapes)
    options = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-4, "weight_decay": 0.1}
    optimizer = SOAP(ours, max_precond_dim=longest, **options)
    reference = torch.optim.AdamW(theirs, **options)
    for step in range(100):
        set_grads(ours, step)
        set_grads(theirs, step)
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_soap_in_fp32_stays_near_fp64_over_100_steps():
    single, double = make_parameters([(8, 8), (7,)], dtype=torch.float32), make_parameters([(8, 8), (7,)])
    optimizers = [SOAP(parameters, lr=0.02) for parameters in (single, double)]
    for step in range(100):
        for parameters, optimizer in zip((single, double), optimizers, strict=True):
            set_grads(parameters, step)
            optimizer.step()
    for ours, wanted in zip(single, double, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-3, atol=1e-3)


def test_normalised_updates_have_a_root_mean_square_of_one():
    parameters = make_parameters([(16, 8), (7,)])
    optimizer = SOAP(
        [{"params": parameters, "n_stacked": [2, 1]}], lr=0.5, weight_decay=0.0, normalize_grads=True
    )
    for step in range(3):
        before = [p.detach().clone() for p in parameters]
        set_grads(parameters, step)
        optimizer.step()
    for p, old, count in zip(parameters, before, (2, 1), strict=True):
        for part in parts(p - old, count):
            assert part.square().mean().sqrt().item() == pytest.approx(0.5, rel=1e-9)


def test_all_matrices_of_one_shape_are_refined_together(monkeypatch):
    seen = []
    original = soap_module.refine_eigenbasis

    def counting(stack_KSS, basis_KSS):
        seen.append(tuple(stack_KSS.shape))
        return original(stack_KSS, basis_KSS)

    monkeypatch.setattr(soap_module, "refine_eigenbasis", counting)
    parameters = make_parameters([(36, 12), (12, 12), (24, 12), (12, 12)])
    optimizer = SOAP([{"params": parameters, "n_stacked": [3, 1, 1, 1]}], lr=0.02, precondition_frequency=2)
    for step in range(4):
        set_grads(parameters, step)
        optimizer.step()
    assert sorted(seen) == [(1, 12, 12), (1, 24, 24), (5, 12, 12), (5, 12, 12)]


def test_stacked_q_k_v_equal_three_separate_matrices():
    (fused,) = make_parameters([(36, 12)], dtype=torch.float32)
    separate = [torch.nn.Parameter(part.clone()) for part in fused.detach().chunk(3)]
    one = SOAP([{"params": [fused], "n_stacked": 3}], lr=0.02, weight_decay=0.1)
    three = SOAP(separate, lr=0.02, weight_decay=0.1)
    for step in range(25):
        set_grads([fused], step)
        for part, grad in zip(separate, fused.grad.chunk(3), strict=True):
            part.grad = grad.clone()
        one.step()
        three.step()
    assert torch.equal(fused, torch.cat(separate))


@pytest.mark.parametrize("stop", [1, 14])
def test_saved_state_continues_with_the_same_bits(stop):
    options = {"lr": 0.02, "weight_decay": 0.1, "max_precond_dim": 8}
    straight, stopped = make_parameters(dtype=torch.float32), make_parameters(dtype=torch.float32)
    first = SOAP([{"params": straight, "n_stacked": STACKED}], **options)
    second = SOAP([{"params": stopped, "n_stacked": STACKED}], **options)
    for step in range(stop):
        set_grads(straight, step)
        set_grads(stopped, step)
        first.step()
        second.step()
    file = io.BytesIO()
    torch.save(second.state_dict(), file)
    file.seek(0)
    resumed = SOAP([{"params": stopped, "n_stacked": STACKED}], **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(stop, 23):
        set_grads(straight, step)
        set_grads(stopped, step)
        first.step()
        resumed.step()
        assert all(torch.equal(a, b) for a, b in zip(straight, stopped, strict=True))
    assert not any(
        torch.equal(a, b) for a, b in zip(stopped, make_parameters(dtype=torch.float32), strict=True)
    )


def test_matrix_whose_gradient_comes_late_is_treated_as_if_it_were_alone():
    (early, late), (alone,) = make_parameters([(8, 8), (8, 8)]), make_parameters([(8, 8)], seed=3)
    late.data.copy_(alone)
    before = late.detach().clone()
    optimizer, reference = SOAP([early, late], lr=0.02), SOAP([alone], lr=0.02)
    for step in range(15):
        set_grads([early], step)
        if step < 1:
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


def test_zero_gradients_move_nothing_but_the_decay():
    parameters = make_parameters([(8, 8), (10, 6), (7,), ()], dtype=torch.float32)
    before = [p.detach().clone() for p in parameters]
    optimizer = SOAP(parameters, lr=0.5, weight_decay=0.1, precondition_frequency=2)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    for _ in range(5):
        optimizer.step()
    for p, old in zip(parameters, before, strict=True):
        # A matrix does not move, nor decay, at its first gradient.
        torch.testing.assert_close(p, old * 0.95 ** (4 if p.ndim == 2 else 5))
    for step in range(3):
        set_grads(parameters, step)
        optimizer.step()
        assert all(p.isfinite().all() for p in parameters)


@pytest.mark.parametrize("options", [{}, {"normalize_grads": True, "precondition_frequency": 1}])
def test_gradients_are_not_written_to(options):
    parameters = make_parameters()
    optimizer = SOAP(parameters, lr=0.02, weight_decay=0.1, max_precond_dim=8, **options)
    for step in range(3):
        set_grads(parameters, step)
        before = [parameter.grad.clone() for parameter in parameters]
        optimizer.step()
        assert all(torch.equal(p.grad, grad) for p, grad in zip(parameters, before, strict=True))


def test_schedule_reaches_the_update_through_the_group():
    parameters = make_parameters()
    optimizer = SOAP(parameters, lr=0.02, weight_decay=0.1)
    before = [p.detach().clone() for p in parameters]
    optimizer.param_groups[0]["lr"] = 0.0
    for step in range(3):
        set_grads(parameters, step)
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


def test_wrong_shapes_and_options_are_refused():
    with pytest.raises(UserError, match="flatten it"):
        SOAP([torch.nn.Parameter(torch.zeros(2, 3, 4))], lr=0.02)
    with pytest.raises(UserError, match="3 stacked"):
        SOAP([{"params": [torch.nn.Parameter(torch.zeros(8, 4))], "n_stacked": 3}], lr=0.02)
    with pytest.raises(UserError, match="max_precond_dim = 0"):
        create("soap", make_parameters(), lr=0.1, max_precond_dim=0)
    optimizer = create("soap", make_parameters(), lr=0.1)
    assert optimizer.param_groups[0]["betas"] == (0.95, 0.95)
