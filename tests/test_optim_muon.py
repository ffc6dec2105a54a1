"""Muon against torch's, against a plain per-matrix formula, and against itself after saving."""

import io
import math

import pytest
import torch

import nanorun.optim.muon as muon_module
from nanorun.errors import UserError
from nanorun.optim.muon import Muon

SHAPES = [(12, 12), (24, 12), (12, 24), (12, 12), (1, 6)]


def make_parameters(shapes=SHAPES, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes
    ]


def set_grads(parameters, step, seed=1):
    generator = torch.Generator().manual_seed(1000 * seed + step)
    for parameter in parameters:
        grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = grad.to(parameter.dtype)


def plain_orthogonal(grad, steps=5):
    x = grad.T if grad.size(0) > grad.size(1) else grad
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if grad.size(0) > grad.size(1) else x


@torch.no_grad()
def plain_muon_step(
    parameters, momenta, *, lr, momentum=0.95, nesterov=True, weight_decay=0.0, rule="original"
):
    """The algorithm of torch.optim.Muon, one matrix at a time, in the parameters' own precision."""
    for parameter, buffer in zip(parameters, momenta, strict=True):
        rows, cols = parameter.shape
        buffer.mul_(momentum).add_((1 - momentum) * parameter.grad)
        update = (1 - momentum) * parameter.grad + momentum * buffer if nesterov else buffer
        size = math.sqrt(max(1, rows / cols)) if rule == "original" else 0.2 * math.sqrt(max(rows, cols))
        parameter.mul_(1 - lr * weight_decay)
        parameter.sub_(lr * size * plain_orthogonal(update))


def largest_difference(left, right):
    return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("rule", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_muon_matches_the_plain_formula_over_100_steps(rule, nesterov, dtype, tolerance):
    ours, plain = make_parameters(dtype=dtype), make_parameters(dtype=dtype)
    momenta = [torch.zeros_like(p) for p in plain]
    optimizer = Muon(ours, lr=0.02, nesterov=nesterov, weight_decay=0.1, scale_rule=rule)
    for step in range(100):
        set_grads(ours, step)
        set_grads(plain, step)
        optimizer.step()
        plain_muon_step(plain, momenta, lr=0.02, nesterov=nesterov, weight_decay=0.1, rule=rule)
    assert largest_difference(ours, plain) < tolerance
    assert largest_difference(ours, make_parameters(dtype=dtype)) > 0.1


@pytest.mark.parametrize("rule", ["original", "match_rms_adamw"])
def test_muon_matches_torch_muon_in_fp32_arithmetic_over_100_steps(rule, monkeypatch):
    # torch casts to bf16 by calling grad.bfloat16(); without that line its algorithm runs in fp32.
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())
    ours, theirs = make_parameters(), make_parameters()
    optimizer = Muon(ours, lr=0.02, weight_decay=0.1, scale_rule=rule)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn=rule)
    for step in range(100):
        set_grads(ours, step)
        set_grads(theirs, step)
        optimizer.step()
        reference.step()
    assert largest_difference(ours, theirs) < 1e-4


def test_muon_matches_torch_muon_within_bf16():
    ours, theirs = make_parameters(), make_parameters()
    optimizer = Muon(ours, lr=0.02)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0)
    for step in range(10):
        set_grads(ours, step)
        set_grads(theirs, step)
        optimizer.step()
        reference.step()
    assert largest_difference(ours, theirs) < 10 * 0.02 * 0.05


def test_stacked_q_k_v_equal_three_separate_matrices():
    (fused,) = make_parameters([(36, 12)])
    separate = [torch.nn.Parameter(part.clone()) for part in fused.detach().chunk(3)]
    one = Muon([{"params": [fused], "n_stacked": 3}], lr=0.02, weight_decay=0.1)
    three = Muon(separate, lr=0.02, weight_decay=0.1)
    for step in range(20):
        set_grads([fused], step)
        for part, grad in zip(separate, fused.grad.chunk(3), strict=True):
            part.grad = grad.clone()
        one.step()
        three.step()
    assert torch.equal(fused, torch.cat(separate))


def test_stacked_count_may_differ_from_parameter_to_parameter():
    parameters = make_parameters([(36, 12), (12, 12)])
    apart = make_parameters([(36, 12), (12, 12)])
    together = Muon([{"params": parameters, "n_stacked": [3, 1]}], lr=0.02)
    groups = Muon([{"params": apart[:1], "n_stacked": 3}, {"params": apart[1:]}], lr=0.02)
    for step in range(5):
        set_grads(parameters, step)
        set_grads(apart, step)
        together.step()
        groups.step()
    assert largest_difference(parameters, apart) < 1e-6


def test_all_matrices_of_one_shape_go_through_newton_schulz_together(monkeypatch):
    seen = []
    original = muon_module.newton_schulz

    def counting(grad_KMN, **options):
        seen.append(tuple(grad_KMN.shape))
        return original(grad_KMN, **options)

    monkeypatch.setattr(muon_module, "newton_schulz", counting)
    parameters = make_parameters([(36, 12), (12, 12), (24, 12), (12, 12)])
    optimizer = Muon([{"params": parameters, "n_stacked": [3, 1, 1, 1]}], lr=0.02)
    set_grads(parameters, 0)
    optimizer.step()
    assert sorted(seen) == [(1, 24, 12), (5, 12, 12)]


@pytest.mark.parametrize("momentum_warmup_steps", [0, 10])
def test_saved_state_continues_with_the_same_bits(momentum_warmup_steps):
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum_warmup_steps": momentum_warmup_steps}
    straight, stopped = make_parameters(), make_parameters()
    first, second = Muon(straight, **options), Muon(stopped, **options)
    for step in range(5):
        set_grads(straight, step)
        set_grads(stopped, step)
        first.step()
        second.step()
    file = io.BytesIO()
    torch.save(second.state_dict(), file)
    file.seek(0)
    resumed = Muon(stopped, **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(5, 12):
        set_grads(straight, step)
        set_grads(stopped, step)
        first.step()
        resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, stopped, strict=True))


def test_momentum_rises_over_its_warm_up():
    (parameter,), (plain,) = make_parameters([(8, 8)]), make_parameters([(8, 8)])
    optimizer = Muon([parameter], lr=0.02, momentum=0.95, momentum_start=0.85, momentum_warmup_steps=4)
    momenta = [torch.zeros_like(plain)]
    for step, momentum in enumerate([0.85, 0.875, 0.9, 0.925, 0.95, 0.95]):
        set_grads([parameter], step)
        set_grads([plain], step)
        optimizer.step()
        plain_muon_step([plain], momenta, lr=0.02, momentum=momentum)
        torch.testing.assert_close(parameter, plain, rtol=1e-4, atol=1e-5)


def test_missing_gradient_leaves_parameter_and_state_alone():
    parameters = make_parameters([(8, 8), (8, 8)])
    before = parameters[1].detach().clone()
    set_grads(parameters, 0)
    parameters[1].grad = None
    optimizer = Muon(parameters, lr=0.02, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(parameters[1], before)
    assert parameters[1] not in optimizer.state
    for parameter in parameters:
        parameter.grad = None
    optimizer.step()


def test_zero_gradient_moves_nothing_but_the_decay():
    (parameter,) = make_parameters([(8, 8)])
    before = parameter.detach().clone()
    parameter.grad = torch.zeros(8, 8)
    Muon([parameter], lr=0.5, weight_decay=0.1).step()
    assert torch.equal(parameter, before * (1 - 0.5 * 0.1))


def test_gradients_are_not_written_to():
    parameters = make_parameters()
    set_grads(parameters, 0)
    before = [parameter.grad.clone() for parameter in parameters]
    Muon(parameters, lr=0.02, nesterov=False).step()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(parameters, before, strict=True))


def test_schedule_reaches_the_update_through_the_group():
    (parameter,) = make_parameters([(8, 8)])
    optimizer = Muon([parameter], lr=0.02, weight_decay=0.1)
    before = parameter.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    set_grads([parameter], 0)
    optimizer.step()
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("shape", [(8,), (), (2, 3, 4)])
def test_parameter_that_is_no_matrix_is_refused_with_the_roles(shape):
    with pytest.raises(UserError, match=r"matrices.*embedding, head and vector"):
        Muon([torch.nn.Parameter(torch.zeros(shape))], lr=0.02)


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="3 stacked"):
        Muon([{"params": [torch.nn.Parameter(torch.zeros(8, 4))], "n_stacked": 3}], lr=0.02)
    with pytest.raises(UserError, match="lists 2 numbers for 1"):
        Muon([{"params": [torch.nn.Parameter(torch.zeros(8, 4))], "n_stacked": [1, 1]}], lr=0.02)
