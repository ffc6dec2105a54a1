"""Prodigy against the paper's formula, the package, and itself after saving."""

import copy
import io

import prodigyopt
import pytest
import torch
from optim_samples import copies, largest_difference, parameters_of, same_bits
from optim_samples import set_pulling_grads as set_grads

from nanorun.errors import UserError
from nanorun.optim import create
from nanorun.optim.prodigy import Prodigy

SHAPES = [(7, 5), (5,), (3, 4), ()]
make_parameters = parameters_of(SHAPES)


class PlainProdigy:
    """The Adam version of Prodigy (arXiv:2306.06101) on a list of tensors.

    The paper's factor 1 − √β₂ of r and s is kept, though it cancels. `late_d` says whether the new estimate
    multiplies ε and, at β₁ = 0, the gradient, as in the package, or the old one, as in the paper.
    """

    def __init__(
        self, start, *, betas=(0.9, 0.999), beta3=None, eps=1e-8, weight_decay=0.0, decouple=True, d0=1e-6,
        d_coef=1.0, growth_rate=None, use_bias_correction=False, safeguard_warmup=False, late_d=True,
    ):  # fmt: skip
        self.x, self.x0 = [p.clone() for p in start], [p.clone() for p in start]
        self.m, self.v, self.s = ([torch.zeros_like(p) for p in start] for _ in range(3))
        self.beta1, self.beta2 = betas
        self.beta3 = self.beta2**0.5 if beta3 is None else beta3
        self.eps, self.decay, self.decouple, self.late_d = eps, weight_decay, decouple, late_d
        self.d = self.d0 = self.d_max = d0
        self.d_coef, self.growth_rate = d_coef, growth_rate
        self.corrects, self.safeguards = use_bias_correction, safeguard_warmup
        self.r, self.t = 0.0, 0

    def step(self, grads, gamma=1.0):
        self.t += 1
        if not self.decouple:
            grads = [g + self.decay * x for g, x in zip(grads, self.x)]
        if self.corrects:
            gamma = gamma * (1 - self.beta2**self.t) ** 0.5 / (1 - self.beta1**self.t)
        d, keep = self.d, self.beta3
        way = sum((g * (x0 - x)).sum().item() for g, x0, x in zip(grads, self.x0, self.x))
        self.r = keep * self.r + (1 - keep) * gamma * d**2 * way
        s_gamma = 1.0 if self.safeguards else gamma
        self.s = [keep * s + (1 - keep) * s_gamma * d**2 * g for s, g in zip(self.s, grads)]
        d_hat = self.d_coef * self.r / sum(s.abs().sum().item() for s in self.s)
        self.d_max = max(self.d_max, d_hat)
        base = max(d, d_hat) if d == self.d0 else d
        self.d = min(self.d_max, base * self.growth_rate) if self.growth_rate else self.d_max
        self.m = [self.beta1 * m + (1 - self.beta1) * d * g for m, g in zip(self.m, grads)]
        self.v = [self.beta2 * v + (1 - self.beta2) * d**2 * g**2 for v, g in zip(self.v, grads)]
        if self.late_d and self.beta1 == 0:
            self.m = [self.d * g for g in grads]
        eps = (self.d if self.late_d else d) * self.eps
        kept = 1 - gamma * d * self.decay if self.decouple else 1.0
        self.x = [kept * x - gamma * d * m / (v.sqrt() + eps) for x, m, v in zip(self.x, self.m, self.v)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1, "eps": 1e-4, "d_coef": 2.0, "betas": (0.8, 0.99)},
        {"weight_decay": 0.1, "decouple": False, "beta3": 0.9},
        {"use_bias_correction": True, "growth_rate": 1.1, "d0": 1e-4},
        {"safeguard_warmup": True, "betas": (0.0, 0.99)},
    ],
)
def test_prodigy_matches_the_plain_formula_over_100_steps(options):
    ours = make_parameters()
    start = copies(ours)
    plain = PlainProdigy(start, **options)
    optimizer = create("prodigy", ours, **options)
    for step in range(100):
        set_grads(ours, step)
        plain.step([p.grad for p in ours])
        optimizer.step()
        assert largest_difference(ours, plain.x) < 1e-10
        assert optimizer.param_groups[0]["d"] == pytest.approx(plain.d, rel=1e-10)
    assert plain.d > 10 * plain.d0
    assert largest_difference(ours, start) > 0.1


def test_prodigy_matches_the_paper_to_the_letter_where_eps_is_small():
    # With ε = 1e-30 it makes no difference which estimate it is multiplied by.
    ours = make_parameters()
    plain = PlainProdigy(copies(ours), eps=1e-30, late_d=False)
    optimizer = Prodigy(ours, eps=1e-30)
    for step in range(100):
        set_grads(ours, step)
        plain.step([p.grad for p in ours])
        optimizer.step()
    assert largest_difference(ours, plain.x) < 1e-10


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "growth_rate": 1.02}, {"slice_p": 3}])
def test_prodigy_has_the_bits_of_the_package_over_100_steps(options):
    ours, theirs = make_parameters(dtype=torch.float32), make_parameters(dtype=torch.float32)
    optimizer, package = create("prodigy", ours, **options), prodigyopt.Prodigy(theirs, **options)
    for step in range(100):
        set_grads(ours, step)
        set_grads(theirs, step)
        optimizer.step()
        package.step()
    assert same_bits(ours, theirs)


@pytest.mark.parametrize("distance", [0.01, 1.0, 100.0])
def test_prodigy_finds_a_quadratics_minimum_without_a_learning_rate(distance):
    curvature = torch.logspace(0, 2, 20, dtype=torch.float64)
    target = distance * torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.nn.Parameter(torch.zeros_like(target))
    optimizer = Prodigy([weights])
    first = (curvature * target**2).sum().item()
    for _ in range(400):
        weights.grad = curvature * (weights.detach() - target)
        optimizer.step()
    assert (curvature * (weights - target) ** 2).sum().item() < 1e-4 * first
    # The estimate is a lower bound of the distance, and no idle one.
    farthest = target.abs().max().item()
    assert 0.02 * farthest < optimizer.param_groups[0]["d"] <= farthest


def test_role_groups_of_one_lr_are_one_optimizer_with_one_estimate():
    together, apart = make_parameters(), make_parameters()
    one = Prodigy(together, weight_decay=0.1)
    roles = Prodigy(
        [{"params": apart[:2], "role": "matrix"}, {"params": apart[2:], "role": "vector"}], weight_decay=0.1
    )
    for step in range(50):
        scale = min(1.0, (step + 1) / 10, (50 - step) / 20)
        for group in (*one.param_groups, *roles.param_groups):
            group["lr"] = 1.0 * scale
        set_grads(together, step)
        set_grads(apart, step)
        one.step()
        roles.step()
    assert largest_difference(together, apart) < 1e-12
    assert roles.param_groups[0]["d"] == roles.param_groups[1]["d"] > 1e-3


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", 0.5),
        ("lr", 0.0),
        ("betas", (0.9, 0.99)),
        ("beta3", 0.5),
        ("decouple", False),
        ("d_coef", 2.0),
        ("d0", 1e-3),
        ("growth_rate", 2.0),
        ("use_bias_correction", True),
        ("safeguard_warmup", True),
    ],
)
def test_role_groups_that_differ_in_what_the_estimate_needs_are_refused_with_the_reason(option, value):
    first, second = make_parameters([(2, 2), (3,)])
    groups = [
        {"params": [first], "role": "matrix"},
        {"params": [second], "role": "head", option: value},
    ]
    reason = rf"one step size.*{option} must be the same.*\(matrix\).*\(head\).*\[optim.default\].*adamw"
    with pytest.raises(UserError, match=reason):
        Prodigy(groups)


def test_an_lr_set_for_one_role_alone_is_refused_before_anything_moves():
    parameters = make_parameters()
    optimizer = Prodigy([{"params": parameters[:2]}, {"params": parameters[2:]}])
    before = copies(parameters)
    set_grads(parameters, 0)
    optimizer.param_groups[1]["lr"] = 0.5
    with pytest.raises(UserError, match="lr must be the same"):
        optimizer.step()
    assert same_bits(parameters, before)
    assert not optimizer.state


def test_role_groups_may_differ_in_weight_decay_eps_and_slice_p():
    parameters = make_parameters()
    start = copies(parameters)
    optimizer = Prodigy(
        [
            {"params": parameters[:1], "weight_decay": 0.5, "eps": 0.1, "slice_p": 2},
            {"params": parameters[1:]},
        ],
        d0=0.1,
    )
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # Where the gradient is 1, the first step is d·m/(√v + d·ε) with m = (1 − β₁)·d and √v = √(1 − β₂)·d.
    first = start[0] * (1 - 0.1 * 0.5) - 0.1 * 0.1 / (0.001**0.5 + 0.1)
    third = start[2] - 0.1 * 0.1 / (0.001**0.5 + 1e-8)
    torch.testing.assert_close(parameters[0].detach(), first, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(parameters[2].detach(), third, rtol=1e-10, atol=1e-12)
    assert optimizer.state[parameters[0]]["s"].numel() == 18
    assert optimizer.state[parameters[2]]["s"].numel() == 12


def test_a_growth_rate_of_none_means_no_limit_in_groups_too():
    ours, theirs = make_parameters(), make_parameters()
    optimizer = Prodigy([{"params": ours, "growth_rate": None}])
    plain = Prodigy(theirs)
    for step in range(10):
        set_grads(ours, step)
        set_grads(theirs, step)
        optimizer.step()
        plain.step()
    assert same_bits(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "decouple": False}, {"betas": (0.0, 0.99)}])
def test_gradients_are_not_written_to(options):
    parameters = make_parameters()
    optimizer = Prodigy(parameters, **options)
    set_grads(parameters, 0)
    grads = [p.grad for p in parameters]
    before = [grad.clone() for grad in grads]
    optimizer.step()
    assert all(p.grad is grad for p, grad in zip(parameters, grads, strict=True))
    assert same_bits(grads, before)


def test_weight_decay_prints_nothing(capsys):
    create("prodigy", make_parameters(), weight_decay=0.1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "slice_p": 3, "use_bias_correction": True}])
def test_saved_state_continues_with_the_same_bits(options):
    straight, stopped = make_parameters(dtype=torch.float32), make_parameters(dtype=torch.float32)
    with torch.no_grad():
        # The package keeps the start of a parameter of zeros as one number.
        straight[1].zero_()
        stopped[1].zero_()
    first, second = Prodigy(straight, **options), Prodigy(stopped, **options)
    for step in range(7):
        set_grads(straight, step)
        set_grads(stopped, step)
        first.step()
        second.step()
    file = io.BytesIO()
    torch.save(second.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = Prodigy(stopped, **options)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["d"] == first.param_groups[0]["d"] > 1e-6
    for step in range(7, 15):
        set_grads(straight, step)
        set_grads(stopped, step)
        first.step()
        resumed.step()
    assert same_bits(straight, stopped)
    assert first.param_groups[0]["d"] == resumed.param_groups[0]["d"]
    for state in resumed.state.values():
        assert all(isinstance(value, torch.Tensor) for value in state.values())
        assert state["step"].item() == 15


def test_a_step_undone_by_loading_the_blank_state_leaves_no_trace():
    straight, warmed = make_parameters(), make_parameters()
    first, second = Prodigy(straight), Prodigy(warmed)
    blank, start = copy.deepcopy(second.state_dict()), copies(warmed)
    set_grads(warmed, 99)
    second.step()
    with torch.no_grad():
        torch._foreach_copy_(warmed, start)
    second.load_state_dict(blank)
    for step in range(5):
        set_grads(straight, step)
        set_grads(warmed, step)
        first.step()
        second.step()
    assert same_bits(straight, warmed)


def test_missing_gradients_leave_parameter_and_state_alone():
    parameters = make_parameters()
    optimizer = Prodigy([{"params": parameters[:1]}, {"params": parameters[1:]}], weight_decay=0.1)
    before = copies(parameters)
    optimizer.step()
    assert same_bits(parameters, before)
    set_grads(parameters[2:], 0)
    optimizer.step()
    assert same_bits(parameters[:2], before[:2])
    assert not any(parameter in optimizer.state for parameter in parameters[:2])
    set_grads(parameters, 1)
    optimizer.step()
    assert not torch.equal(parameters[0], before[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_gradients_from_the_start_move_nothing_and_training_goes_on_from_there(dtype):
    parameters = make_parameters(dtype=dtype)
    optimizer = Prodigy(parameters, weight_decay=0.1)
    before = copies(parameters)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert same_bits(parameters, before)
    for step in range(5):
        set_grads(parameters, step)
        parameters[0].grad.zero_()
        optimizer.step()
    assert all(torch.isfinite(parameter).all() for parameter in parameters)
    assert not torch.equal(parameters[1], before[1])


def test_schedules_from_outside_scale_the_step_and_a_scale_of_zero_moves_nothing():
    ours = make_parameters()
    plain = PlainProdigy(copies(ours))
    optimizer = Prodigy(ours)
    for step in range(60):
        scale = min(1.0, (step + 1) / 10, (60 - step) / 20)
        optimizer.param_groups[0]["lr"] = scale
        set_grads(ours, step)
        plain.step([p.grad for p in ours], scale)
        optimizer.step()
    assert largest_difference(ours, plain.x) < 1e-10
    before = copies(ours)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert same_bits(ours, before)


def test_closure_gets_gradients_and_its_value_comes_back():
    (parameter,) = make_parameters([(4,)])
    optimizer = Prodigy([parameter])

    def closure():
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    before = parameter.detach().clone()
    assert optimizer.step(closure).item() == (before**2).sum().item()
    assert not torch.equal(parameter, before)
