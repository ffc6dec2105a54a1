"""Schedule-Free AdamW and its Prodigy kin against plain formulas, the package, and themselves."""

import copy
import io
import math

import pytest
import schedulefree
import torch
from optim_samples import copies, largest_difference, parameters_of, same_bits
from optim_samples import set_pulling_grads as set_grads

from nanorun.errors import UserError
from nanorun.optim import create, schedulefree_prodigy
from nanorun.optim.schedulefree_adamw import ScheduleFreeAdamW
from nanorun.optim.schedulefree_prodigy import ScheduleFreeProdigy

SHAPES = [(7, 5), (5,), (3, 4), ()]
make_parameters = parameters_of(SHAPES)
BOTH = [(ScheduleFreeAdamW, {"lr": 0.02}), (ScheduleFreeProdigy, {"d0": 1e-3})]


class PlainScheduleFree:
    """The formula of arXiv:2405.15682 for one tensor, with x, y and z written out."""

    def __init__(
        self, start, *, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, warmup=0, r=0.0, power=2.0
    ):
        self.x = self.y = self.z = start
        self.v = torch.zeros_like(start)
        self.lr, (self.beta1, self.beta2), self.eps, self.decay = lr, betas, eps, weight_decay
        self.warmup, self.r, self.power = warmup, r, power
        self.weights, self.largest = [], 0.0

    def step(self, grad, scale=1.0):
        t = len(self.weights) + 1
        gamma = self.lr * scale * (min(1.0, t / self.warmup) if self.warmup else 1.0)
        self.v = self.beta2 * self.v + (1 - self.beta2) * grad**2
        v_hat = self.v / (1 - self.beta2**t)
        self.z = self.z - gamma * (grad / (v_hat.sqrt() + self.eps) + self.decay * self.y)
        self.largest = max(self.largest, gamma)
        self.weights.append(t**self.r * self.largest**self.power)
        c = self.weights[-1] / sum(self.weights)
        self.x = (1 - c) * self.x + c * self.z
        self.y = (1 - self.beta1) * self.z + self.beta1 * self.x


class PlainScheduleFreeProdigy:
    """The update in ScheduleFreeProdigy's docstring, for a list of tensors, with x, y and z written out."""

    def __init__(self, start, **options):
        self.x, self.y, self.z, self.x0 = ([p.clone() for p in start] for _ in range(4))
        self.v, self.s = ([torch.zeros_like(p) for p in start] for _ in range(2))
        self.o = {
            "lr": 1.0, "betas": (0.9, 0.999), "beta3": None, "eps": 1e-8, "weight_decay": 0.0, "r": 0.0,
            "weight_lr_power": 2.0, "use_bias_correction": False, "safeguard_warmup": False, "d0": 1e-6,
            "d_coef": 1.0, "growth_rate": None, **options,
        }  # fmt: skip
        self.d = self.d_max = self.o["d0"]
        self.numerator, self.weights, self.largest = 0.0, [], 0.0

    def step(self, grads, scale=1.0):
        o, d, t = self.o, self.d, len(self.weights) + 1
        beta1, beta2 = o["betas"]
        beta3 = beta2**0.5 if o["beta3"] is None else o["beta3"]
        lr = o["lr"] * scale
        gamma = lr * d * ((1 - beta2**t) ** 0.5 if o["use_bias_correction"] else 1.0)
        s_gamma = d if o["safeguard_warmup"] else gamma
        way = sum((g * (x0 - z)).sum().item() for g, x0, z in zip(grads, self.x0, self.z))
        self.numerator = beta3 * self.numerator + gamma * d * way
        self.s = [beta3 * s + s_gamma * d * g for s, g in zip(self.s, grads)]
        self.v = [beta2 * v + (1 - beta2) * d**2 * g**2 for v, g in zip(self.v, grads)]
        d_hat = o["d_coef"] * self.numerator / sum(s.abs().sum().item() for s in self.s)
        self.d_max = max(self.d_max, d_hat)
        base = max(d, d_hat) if d == o["d0"] else d
        self.d = min(self.d_max, base * o["growth_rate"]) if o["growth_rate"] else self.d_max
        self.largest = max(self.largest, gamma)
        self.weights.append(t ** o["r"] * self.largest ** o["weight_lr_power"])
        c = self.weights[-1] / sum(self.weights)
        for i, g in enumerate(grads):
            step = d * g / (self.v[i].sqrt() + self.d * o["eps"]) + o["weight_decay"] * self.y[i]
            self.z[i] = self.z[i] - gamma * step
            self.x[i] = (1 - c) * self.x[i] + c * self.z[i]
            self.y[i] = (1 - beta1) * self.z[i] + beta1 * self.x[i]


@pytest.mark.parametrize(
    ("options", "plain_options"),
    [
        ({}, {}),
        ({"betas": (0.95, 0.99), "weight_decay": 0.1, "eps": 1e-3},) * 2,
        (
            {"warmup_steps": 20, "r": 0.5, "weight_lr_power": 1.0},
            {"warmup": 20, "r": 0.5, "power": 1.0},
        ),
    ],
)
def test_schedulefree_adamw_matches_the_plain_formula_over_100_steps(options, plain_options):
    ours = make_parameters()
    plain = [PlainScheduleFree(p, lr=0.02, **plain_options) for p in copies(ours)]
    optimizer = create("schedulefree_adamw", ours, lr=0.02, **options)
    for step in range(100):
        set_grads(ours, step)
        for formula, parameter in zip(plain, ours, strict=True):
            formula.step(parameter.grad)
        optimizer.step()
        assert largest_difference(ours, [formula.y for formula in plain]) < 1e-12
    optimizer.eval()
    assert largest_difference(ours, [formula.x for formula in plain]) < 1e-12
    assert largest_difference(ours, [formula.y for formula in plain]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_schedulefree_adamw_matches_the_packages_reference_over_100_steps(dtype):
    ours, theirs = make_parameters(dtype=dtype), make_parameters(dtype=dtype)
    options = {"lr": 0.02, "weight_decay": 0.1, "warmup_steps": 10}
    optimizer = ScheduleFreeAdamW(ours, **options)
    reference = schedulefree.AdamWScheduleFreeReference(theirs, **options)
    reference.train()
    for step in range(100):
        set_grads(ours, step)
        for parameter, like in zip(theirs, ours, strict=True):
            parameter.grad = like.grad.clone()
        optimizer.step()
        reference.step()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert largest_difference(ours, theirs) < tolerance
    optimizer.eval()
    reference.eval()
    assert largest_difference(ours, theirs) < tolerance


def test_schedulefree_adamw_has_the_bits_of_the_package_over_100_steps():
    ours, theirs = make_parameters(dtype=torch.float32), make_parameters(dtype=torch.float32)
    optimizer = ScheduleFreeAdamW(ours, lr=0.02, weight_decay=0.1)
    package = schedulefree.AdamWScheduleFree(theirs, lr=0.02, weight_decay=0.1)
    package.train()
    for step in range(100):
        set_grads(ours, step)
        set_grads(theirs, step)
        optimizer.step()
        package.step()
    assert same_bits(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1, "lr": 0.5, "eps": 1e-3, "d_coef": 2.0},
        {"betas": (0.9, 0.9955), "r": 0.75, "weight_lr_power": 0.0},
        {"use_bias_correction": True, "growth_rate": 1.1, "d0": 1e-3},
        {"beta3": 0.9, "betas": (0.95, 0.99), "lr": 0.5, "safeguard_warmup": True},
    ],
)
def test_schedulefree_prodigy_matches_the_plain_formula_over_100_steps(options):
    ours = make_parameters()
    start = copies(ours)
    plain = PlainScheduleFreeProdigy(start, **options)
    optimizer = create("schedulefree_prodigy", ours, **options)
    for step in range(100):
        set_grads(ours, step)
        plain.step([p.grad for p in ours])
        optimizer.step()
        assert largest_difference(ours, plain.y) < 1e-10
        assert optimizer.param_groups[0]["d"] == pytest.approx(plain.d, rel=1e-10)
    optimizer.eval()
    assert largest_difference(ours, plain.x) < 1e-10
    assert largest_difference(ours, start) > 0.1
    assert plain.d > 3 * plain.o["d0"]


def test_all_parameters_in_one_portion_give_what_each_alone_gives(monkeypatch):
    alone, together = make_parameters(), make_parameters()
    first, second = (ScheduleFreeProdigy(p, weight_decay=0.1) for p in (alone, together))
    for step in range(30):
        set_grads(alone, step)
        set_grads(together, step)
        first.step()
        with monkeypatch.context() as patch:
            # As on a GPU.
            patch.setattr(schedulefree_prodigy, "portions", lambda parameters: [parameters])
            second.step()
    assert largest_difference(alone, together) < 1e-12
    assert first.param_groups[0]["d"] > 1e-3


def plain_algoperf_step(state, grads, t, *, beta1=0.9, beta2=0.9955, r=0.75, eps=1e-8):
    """The AlgoPerf submission's step in float64, without decay: x and z are kept, the average has t^r."""
    d = state["d"]
    decay = math.sqrt(beta2)
    state["r"] = decay * state["r"] + d * d * sum(
        torch.dot(g.flatten(), (x0 - z).flatten()).item()
        for g, x0, z in zip(grads, state["x0"], state["z"], strict=True)
    )
    state["s"] = [decay * s + d * d * g for s, g in zip(state["s"], grads, strict=True)]
    state["v"] = [beta2 * v + (1 - beta2) * (d * g) ** 2 for v, g in zip(state["v"], grads, strict=True)]
    state["d"] = max(d, state["r"] / sum(s.abs().sum().item() for s in state["s"]))
    state["w"] += t**r
    for i, (g, v) in enumerate(zip(grads, state["v"], strict=True)):
        state["z"][i] = state["z"][i] - d * d * g / (v.sqrt() + state["d"] * eps)
        state["x"][i] = state["x"][i] + t**r / state["w"] * (state["z"][i] - state["x"][i])
    return [(beta1 * x + (1 - beta1) * z) for x, z in zip(state["x"], state["z"], strict=True)]


def test_schedulefree_prodigy_is_the_algoperf_submission_with_its_options():
    ours = make_parameters()
    start = copies(ours)
    zeros = [torch.zeros_like(p) for p in start]
    state = {"d": 1e-6, "r": 0.0, "w": 0.0, "x0": start, "x": [*start], "z": [*start], "s": zeros, "v": zeros}
    optimizer = ScheduleFreeProdigy(ours, betas=(0.9, 0.9955), r=0.75, weight_lr_power=0.0)
    for step in range(100):
        set_grads(ours, step)
        y = plain_algoperf_step(state, [p.grad for p in ours], step + 1)
        optimizer.step()
        assert largest_difference(ours, y) < 1e-10
    assert state["d"] > 0.01


def quadratic(seed=0, size=20, condition=100.0):
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    curvature = torch.logspace(0, math.log10(condition), size, dtype=torch.float64)
    target = torch.randn(size, generator=generator, dtype=torch.float64)
    return turn @ torch.diag(curvature) @ turn.T, target


@pytest.mark.parametrize("distance", [0.01, 1.0, 100.0])
def test_schedulefree_prodigy_finds_a_quadratics_minimum_without_a_learning_rate(distance):
    hessian, target = quadratic()
    target = distance * target
    weights = torch.nn.Parameter(torch.zeros_like(target))
    optimizer = ScheduleFreeProdigy([weights])

    def loss():
        return 0.5 * (weights - target) @ hessian @ (weights - target)

    first = loss().item()
    for _ in range(600):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    optimizer.eval()
    assert loss().item() < 1e-4 * first
    # The estimate is a lower bound of the distance, and no idle one.
    farthest = target.abs().max().item()
    assert 0.02 * farthest < optimizer.param_groups[0]["d"] <= farthest


@pytest.mark.parametrize(("cls", "options"), BOTH)
def test_it_trains_from_the_start_and_refuses_a_step_in_evaluation_mode(cls, options):
    parameters = make_parameters()
    optimizer = cls(parameters, **options)
    set_grads(parameters, 0)
    optimizer.step()
    optimizer.eval()
    before, state = copies(parameters), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"evaluation mode: call its train\(\)"):
        optimizer.step()
    assert same_bits(parameters, before)
    assert str(optimizer.state_dict()) == str(state)
    optimizer.train()
    optimizer.step()
    assert not same_bits(parameters, before)


@pytest.mark.parametrize(("cls", "options"), BOTH)
def test_one_group_in_evaluation_mode_is_enough_to_refuse(cls, options):
    parameters = make_parameters()
    optimizer = cls([{"params": parameters[:2]}, {"params": parameters[2:]}], **options)
    set_grads(parameters, 0)
    optimizer.param_groups[1]["train_mode"] = False
    with pytest.raises(RuntimeError, match="evaluation mode"):
        optimizer.step()


@pytest.mark.parametrize(("cls", "options"), BOTH)
def test_modes_before_the_first_step_and_twice_in_a_row_move_nothing(cls, options):
    parameters = make_parameters()
    optimizer = cls(parameters, **options)
    before = copies(parameters)
    optimizer.eval()
    optimizer.train()
    assert same_bits(parameters, before)
    for step in range(5):
        set_grads(parameters, step)
        optimizer.step()
    trained = copies(parameters)
    optimizer.train()
    assert same_bits(parameters, trained)
    optimizer.eval()
    averaged = copies(parameters)
    optimizer.eval()
    assert same_bits(parameters, averaged)
    assert not same_bits(averaged, trained)
    optimizer.train()
    assert largest_difference(parameters, trained) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("cls", "options"), BOTH)
def test_evaluation_with_a_copy_of_the_weights_leaves_no_trace(cls, options, dtype):
    straight, evaluated = make_parameters(dtype=dtype), make_parameters(dtype=dtype)
    first, second = cls(straight, **options), cls(evaluated, **options)
    for step in range(20):
        set_grads(straight, step)
        set_grads(evaluated, step)
        first.step()
        second.step()
        if step % 3 == 0:
            kept = copies(evaluated)
            second.eval()
            second.train()
            with torch.no_grad():
                torch._foreach_copy_(evaluated, kept)
    assert same_bits(straight, evaluated)


@pytest.mark.parametrize(("cls", "options"), BOTH)
@pytest.mark.parametrize("in_evaluation", [False, True])
def test_saved_state_continues_with_the_same_bits_and_in_its_mode(cls, options, in_evaluation):
    straight, stopped = make_parameters(dtype=torch.float32), make_parameters(dtype=torch.float32)
    first, second = (cls(p, **options, weight_decay=0.1) for p in (straight, stopped))
    for step in range(7):
        set_grads(straight, step)
        set_grads(stopped, step)
        first.step()
        second.step()
    if in_evaluation:
        first.eval()
        second.eval()
    file = io.BytesIO()
    torch.save(second.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = cls(stopped, **options)
    resumed.load_state_dict(saved)
    counters = set(saved["param_groups"][0]) - {"params"}
    assert all(type(saved["param_groups"][0][key]) is not torch.Tensor for key in counters)
    assert resumed.param_groups[0]["train_mode"] is not in_evaluation
    first.train()
    resumed.train()
    for step in range(7, 15):
        set_grads(straight, step)
        set_grads(stopped, step)
        first.step()
        resumed.step()
    assert same_bits(straight, stopped)
    first.eval()
    resumed.eval()
    assert same_bits(straight, stopped)


@pytest.mark.parametrize(("cls", "options"), BOTH)
def test_a_step_undone_by_loading_the_blank_state_leaves_no_trace(cls, options):
    straight, warmed = make_parameters(), make_parameters()
    first, second = cls(straight, **options), cls(warmed, **options)
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


@pytest.mark.parametrize(("cls", "options"), BOTH)
def test_gradients_are_not_written_to(cls, options):
    parameters = make_parameters()
    optimizer = cls(parameters, **options, weight_decay=0.1)
    set_grads(parameters, 0)
    grads = [p.grad for p in parameters]
    before = [grad.clone() for grad in grads]
    optimizer.step()
    assert all(p.grad is grad for p, grad in zip(parameters, grads, strict=True))
    assert same_bits(grads, before)


@pytest.mark.parametrize(("cls", "options"), BOTH)
def test_missing_gradients_leave_parameter_and_state_alone(cls, options):
    parameters = make_parameters()
    optimizer = cls([{"params": parameters[:1]}, {"params": parameters[1:]}], **options, weight_decay=0.1)
    before = copies(parameters)
    optimizer.step()
    assert same_bits(parameters, before)
    set_grads(parameters[2:], 0)
    optimizer.step()
    assert same_bits(parameters[:2], before[:2])
    assert not any(parameter in optimizer.state for parameter in parameters[:2])
    optimizer.eval()
    assert same_bits(parameters[:2], before[:2])
    optimizer.train()
    set_grads(parameters, 1)
    optimizer.step()
    assert all("z" in optimizer.state[parameter] for parameter in parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("cls", "options"), BOTH)
def test_zero_gradients_from_the_start_move_nothing_and_training_goes_on_from_there(cls, options, dtype):
    parameters = make_parameters(dtype=dtype)
    optimizer = cls(parameters, **options)
    before = copies(parameters)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert same_bits(parameters, before)
    for step in range(5):
        set_grads(parameters, step)
        optimizer.step()
    assert all(torch.isfinite(parameter).all() for parameter in parameters)
    assert not same_bits(parameters, before)


def test_one_parameter_with_zero_gradients_stays_beside_others_that_move():
    parameters = make_parameters()
    optimizer = ScheduleFreeProdigy(parameters, d0=1e-3)
    before = copies(parameters)
    for step in range(10):
        set_grads(parameters, step)
        parameters[0].grad.zero_()
        optimizer.step()
    assert torch.equal(parameters[0], before[0])
    assert not torch.equal(parameters[1], before[1])


def test_a_warm_up_from_outside_gives_the_bits_of_the_packages_own():
    outside, inside = make_parameters(), make_parameters()
    first = ScheduleFreeAdamW(outside, lr=0.02)
    second = ScheduleFreeAdamW(inside, lr=0.02, warmup_steps=10)
    for step in range(30):
        set_grads(outside, step)
        set_grads(inside, step)
        first.param_groups[0]["lr"] = 0.02 * min(1.0, (step + 1) / 10)
        first.step()
        second.step()
        assert first.param_groups[0]["scheduled_lr"] == second.param_groups[0]["scheduled_lr"]
        assert first.param_groups[0]["weight_sum"] == second.param_groups[0]["weight_sum"]
    assert same_bits(outside, inside)


def scales(step):
    """A warm-up, a plateau and a decay to zero, which the last step reaches."""
    return min(1.0, (step + 1) / 10, (59 - step) / 20)


def test_schedules_from_outside_scale_the_step_of_schedulefree_adamw():
    ours = make_parameters()
    plain = [PlainScheduleFree(p, lr=0.02) for p in copies(ours)]
    optimizer = ScheduleFreeAdamW(ours, lr=0.02)
    for step in range(60):
        optimizer.param_groups[0]["lr"] = 0.02 * scales(step)
        set_grads(ours, step)
        for formula, parameter in zip(plain, ours, strict=True):
            formula.step(parameter.grad, scales(step))
        optimizer.step()
    assert largest_difference(ours, [formula.y for formula in plain]) < 1e-12


def test_schedules_from_outside_scale_the_step_of_schedulefree_prodigy():
    ours = make_parameters()
    plain = PlainScheduleFreeProdigy(copies(ours))
    optimizer = ScheduleFreeProdigy(ours)
    for step in range(59):
        optimizer.param_groups[0]["lr"] = scales(step)
        set_grads(ours, step)
        plain.step([p.grad for p in ours], scales(step))
        optimizer.step()
    assert largest_difference(ours, plain.y) < 1e-10
    optimizer.param_groups[0]["lr"] = 0.0
    before = copies(ours)
    optimizer.step()
    assert same_bits(ours, before)


@pytest.mark.parametrize("cls", [ScheduleFreeAdamW, ScheduleFreeProdigy])
def test_a_first_step_at_scale_zero_moves_nothing_and_spoils_nothing(cls):
    parameters = make_parameters()
    optimizer = cls(parameters, lr=1.0)
    before = copies(parameters)
    optimizer.param_groups[0]["lr"] = 0.0
    set_grads(parameters, 0)
    optimizer.step()
    assert same_bits(parameters, before)
    optimizer.param_groups[0]["lr"] = 1.0
    set_grads(parameters, 1)
    optimizer.step()
    assert all(torch.isfinite(parameter).all() for parameter in parameters)
    assert not same_bits(parameters, before)


def test_schedulefree_adamw_groups_have_their_own_lr():
    together, apart = make_parameters(), make_parameters()
    one = ScheduleFreeAdamW([{"params": together[:1], "lr": 0.1}, {"params": together[1:]}], lr=0.01)
    two = [ScheduleFreeAdamW(apart[:1], lr=0.1), ScheduleFreeAdamW(apart[1:], lr=0.01)]
    for step in range(5):
        set_grads(together, step)
        set_grads(apart, step)
        for optimizer in (one, *two):
            optimizer.step()
    assert same_bits(together, apart)


def test_schedulefree_prodigy_groups_share_one_estimate():
    together, apart = make_parameters(), make_parameters()
    one = ScheduleFreeProdigy(together, weight_decay=0.1)
    groups = ScheduleFreeProdigy([{"params": apart[:2]}, {"params": apart[2:]}], weight_decay=0.1)
    for step in range(30):
        set_grads(together, step)
        set_grads(apart, step)
        one.step()
        groups.step()
    assert largest_difference(together, apart) < 1e-12
    assert groups.param_groups[0]["d"] == groups.param_groups[1]["d"] > 1e-3


def test_schedulefree_prodigy_groups_have_their_own_weight_decay_and_eps():
    parameters = make_parameters()
    start = copies(parameters)
    optimizer = ScheduleFreeProdigy(
        [{"params": parameters[:1], "weight_decay": 0.5, "eps": 0.1}, {"params": parameters[1:]}], d0=0.1
    )
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # Where the gradient is 1, the first step is d·(d/(√v + d·ε) + λ·y) with √v = √(1 − β₂)·d, and x = y = z.
    first = start[0] - 0.1 * (1 / (0.001**0.5 + 0.1) + 0.5 * start[0])
    third = start[2] - 0.1 / (0.001**0.5 + 1e-8)
    torch.testing.assert_close(parameters[0].detach(), first, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(parameters[2].detach(), third, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("option", "value"), [("lr", 0.5), ("betas", (0.9, 0.9)), ("r", 1.0)])
def test_schedulefree_prodigy_refuses_roles_that_would_need_two_estimates(option, value):
    first, second = make_parameters([(2, 2), (3,)])
    groups = [
        {"params": [first], "role": "matrix"},
        {"params": [second], "role": "head", option: value},
    ]
    with pytest.raises(UserError, match=rf"one step size.*{option} must be the same.*\(head\).*adamw"):
        ScheduleFreeProdigy(groups)


def test_a_group_that_comes_later_joins_the_estimate_where_it_is():
    parameters = make_parameters()
    optimizer = ScheduleFreeProdigy(parameters[:2])
    for step in range(20):
        set_grads(parameters, step)
        optimizer.step()
    optimizer.add_param_group({"params": parameters[2:]})
    first, second = optimizer.param_groups
    assert second["d"] == first["d"] > 1e-3
    before = parameters[2].detach().clone()
    optimizer.step()
    assert first["d"] == second["d"]
    assert (parameters[2] - before).abs().max() > 1e-3


@pytest.mark.parametrize(("cls", "options"), BOTH)
def test_a_group_that_comes_later_joins_in_the_mode_of_the_others(cls, options):
    parameters = make_parameters()
    optimizer = cls(parameters[:2], **options)
    set_grads(parameters, 0)
    optimizer.step()
    optimizer.eval()
    optimizer.add_param_group({"params": parameters[2:]})
    assert not optimizer.param_groups[1]["train_mode"]
    optimizer.train()
    assert all(group["train_mode"] for group in optimizer.param_groups)
    optimizer.step()


@pytest.mark.parametrize(
    ("name", "options"), [("schedulefree_adamw", {"lr": 0.1}), ("schedulefree_prodigy", {})]
)
def test_a_first_beta_of_zero_is_refused_because_x_could_not_be_found(name, options):
    with pytest.raises(UserError, match="first must be above 0"):
        create(name, make_parameters(), betas=(0.0, 0.99), **options)


@pytest.mark.parametrize(("cls", "options"), BOTH)
def test_closure_gets_gradients_and_its_value_comes_back(cls, options):
    (parameter,) = make_parameters([(4,)])
    optimizer = cls([parameter], **options)

    def closure():
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    before = parameter.detach().clone()
    assert optimizer.step(closure).item() == (before**2).sum().item()
    assert not torch.equal(parameter, before)
