"""torch's own algorithms against plain formulas of their papers, and against torch where that is cheap.

The plain formulas work on one float64 tensor at a time, written from the papers; none calls an optimizer.
"""

import io
import itertools
import math

import pytest
import torch

from nanorun.errors import UserError
from nanorun.optim import adadelta, adagrad, adam, adamw, rmsprop, sgd
from nanorun.optim.build import create

SHAPES = [(6, 4), (4, 6), (5,), ()]


def make_parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def set_grads(parameters, step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=dtype)


class PlainSGD:
    """Momentum as Sutskever et al. 2013 write it, v and θ; the gradient is taken at θ + μv for Nesterov."""

    def __init__(self, start, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
        self.theta, self.v, self.first = start, torch.zeros_like(start), True
        self.lr, self.momentum, self.weight_decay, self.nesterov = lr, momentum, weight_decay, nesterov
        self.dampening = dampening

    def value(self):
        return self.theta + self.momentum * self.v if self.nesterov else self.theta

    def step(self, grad):
        grad = grad + self.weight_decay * self.value()
        # torch lets the first gradient in whole.
        share = 1.0 if self.first else 1 - self.dampening
        self.v, self.first = self.momentum * self.v - self.lr * share * grad, False
        self.theta = self.theta + self.v


class PlainAdagrad:
    """Duchi et al. 2011, the diagonal form, and with ε under the root."""

    def __init__(
        self,
        start,
        lr,
        lr_decay=0.0,
        weight_decay=0.0,
        initial_accumulator_value=0.0,
        eps=1e-10,
        eps_inside=False,
    ):
        self.x, self.total, self.t = start, torch.full_like(start, initial_accumulator_value), 0
        self.lr, self.lr_decay, self.weight_decay = lr, lr_decay, weight_decay
        self.eps, self.inside = eps, eps_inside

    def value(self):
        return self.x

    def step(self, grad):
        grad = grad + self.weight_decay * self.x
        self.total = self.total + grad**2
        root = (self.total + self.eps) ** 0.5 if self.inside else self.total**0.5 + self.eps
        self.x = self.x - self.lr / (1 + self.t * self.lr_decay) * grad / root
        self.t += 1


class PlainRMSprop:
    """Hinton 2012; centered and with momentum as Graves 2013, (38) to (41), where lr is inside the momentum."""

    def __init__(
        self,
        start,
        lr,
        alpha=0.99,
        eps=1e-8,
        weight_decay=0.0,
        momentum=0.0,
        centered=False,
        eps_inside=False,
    ):
        self.x, self.n, self.g, self.delta = start, *(torch.zeros_like(start) for _ in range(3))
        self.lr, self.alpha, self.eps, self.weight_decay = lr, alpha, eps, weight_decay
        self.momentum, self.centered, self.inside = momentum, centered, eps_inside

    def value(self):
        return self.x

    def step(self, grad):
        grad = grad + self.weight_decay * self.x
        self.n = self.alpha * self.n + (1 - self.alpha) * grad**2
        self.g = self.alpha * self.g + (1 - self.alpha) * grad
        square = self.n - self.g**2 if self.centered else self.n
        root = (square + self.eps) ** 0.5 if self.inside else square**0.5 + self.eps
        self.delta = self.momentum * self.delta - self.lr * grad / root
        self.x = self.x + self.delta


class PlainAdadelta:
    """Zeiler 2012, algorithm 1, the update times lr."""

    def __init__(self, start, lr=1.0, rho=0.9, eps=1e-6, weight_decay=0.0):
        self.x, self.grads, self.deltas = start, torch.zeros_like(start), torch.zeros_like(start)
        self.lr, self.rho, self.eps, self.weight_decay = lr, rho, eps, weight_decay

    def value(self):
        return self.x

    def step(self, grad):
        grad = grad + self.weight_decay * self.x
        self.grads = self.rho * self.grads + (1 - self.rho) * grad**2
        delta = -((self.deltas + self.eps) ** 0.5) / (self.grads + self.eps) ** 0.5 * grad
        self.deltas = self.rho * self.deltas + (1 - self.rho) * delta**2
        self.x = self.x + self.lr * delta


class PlainAdam:
    """Kingma and Ba 2015, algorithm 1; the largest v as in Reddi et al. 2018; decay added to the gradient."""

    decoupled = False

    def __init__(self, start, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False):
        self.x, self.m, self.v, self.largest = start, *(torch.zeros_like(start) for _ in range(3))
        self.lr, self.betas, self.eps, self.weight_decay, self.t = lr, betas, eps, weight_decay, 0
        self.amsgrad = amsgrad

    def value(self):
        return self.x

    def step(self, grad):
        self.t += 1
        decay = self.weight_decay * self.x
        grad = grad if self.decoupled else grad + decay
        self.m = self.betas[0] * self.m + (1 - self.betas[0]) * grad
        self.v = self.betas[1] * self.v + (1 - self.betas[1]) * grad**2
        self.largest = torch.maximum(self.largest, self.v)
        m_hat = self.m / (1 - self.betas[0] ** self.t)
        v_hat = (self.largest if self.amsgrad else self.v) / (1 - self.betas[1] ** self.t)
        self.x = self.x - self.lr * (m_hat / (v_hat**0.5 + self.eps) + (decay if self.decoupled else 0.0))


class PlainAdamW(PlainAdam):
    """Loshchilov and Hutter 2019, algorithm 2, with the schedule's multiplier in lr."""

    decoupled = True


PLAIN = {
    "sgd": PlainSGD,
    "adagrad": PlainAdagrad,
    "rmsprop": PlainRMSprop,
    "adadelta": PlainAdadelta,
    "adam": PlainAdam,
    "adamw": PlainAdamW,
}
# The ε are large enough to tell inside from outside.
CASES = [
    ("sgd", {"lr": 0.1}),
    ("sgd", {"lr": 0.1, "weight_decay": 0.1}),
    ("sgd", {"lr": 0.1, "momentum": 0.9}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("adagrad", {"lr": 0.1}),
    ("adagrad", {"lr": 0.1, "eps": 0.5, "weight_decay": 0.1, "lr_decay": 0.1}),
    ("adagrad", {"lr": 0.1, "eps": 0.5, "initial_accumulator_value": 0.2}),
    ("adagrad", {"lr": 0.1, "eps": 0.5, "eps_inside": True}),
    (
        "adagrad",
        {
            "lr": 0.1,
            "eps": 0.5,
            "eps_inside": True,
            "initial_accumulator_value": 0.2,
            "weight_decay": 0.1,
            "lr_decay": 0.1,
        },
    ),
    *(
        (
            "rmsprop",
            {"lr": 0.01, "alpha": 0.9, "eps": 0.1, "weight_decay": decay, "momentum": momentum, **flags},
        )
        for decay, momentum in ((0.0, 0.0), (0.1, 0.0), (0.1, 0.9))
        for flags in ({"centered": c, "eps_inside": e} for c, e in itertools.product((False, True), repeat=2))
    ),
    ("adadelta", {}),
    ("adadelta", {"lr": 0.5, "rho": 0.95, "eps": 1e-3, "weight_decay": 0.1}),
    *(
        (name, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 0.1, "weight_decay": decay, "amsgrad": amsgrad})
        for name in ("adam", "adamw")
        for decay, amsgrad in ((0.0, False), (0.1, False), (0.1, True))
    ),
]
TORCH = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "adadelta": torch.optim.Adadelta,
}


def case_id(value):
    return value if isinstance(value, str) else "-".join(f"{key}={number}" for key, number in value.items())


EVERY_CASE = pytest.mark.parametrize(("name", "options"), CASES, ids=case_id)


@EVERY_CASE
def test_each_matches_the_plain_formula_of_its_paper_over_100_steps(name, options):
    parameters = make_parameters()
    optimizer = create(name, parameters, **options)
    plain = [PLAIN[name](parameter.detach().clone(), **options) for parameter in parameters]
    for step in range(100):
        set_grads(parameters, step)
        optimizer.step()
        for parameter, reference in zip(parameters, plain, strict=True):
            reference.step(parameter.grad)
    for parameter, reference in zip(parameters, plain, strict=True):
        torch.testing.assert_close(parameter.detach(), reference.value(), rtol=1e-9, atol=1e-10)
    moved = [(p - start).abs().max() for p, start in zip(parameters, make_parameters(), strict=True)]
    assert min(moved) > 1e-3


@pytest.mark.parametrize(
    ("name", "options"),
    [case for case in CASES if case[0] in TORCH and not case[1].get("eps_inside")],
    ids=case_id,
)
def test_each_without_eps_inside_is_torchs_over_100_steps_in_float32(name, options):
    ours, theirs = make_parameters(torch.float32), make_parameters(torch.float32)
    options = {key: value for key, value in options.items() if key != "eps_inside"}
    optimizer, reference = create(name, ours, **options), TORCH[name](theirs, foreach=False, **options)
    for step in range(100):
        for parameters in (ours, theirs):
            set_grads(parameters, step, torch.float32)
        optimizer.step()
        reference.step()
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("module", "name"), [(sgd, "SGD"), (adagrad, "Adagrad"), (rmsprop, "RMSprop")])
def test_defaults_are_torchs(module, name):
    theirs = getattr(torch.optim, name)([torch.nn.Parameter(torch.zeros(2))]).defaults
    for option in module.OPTIONS.keys() - {"lr", "eps_inside"}:
        assert module.OPTIONS[option].default == theirs[option], option


def test_adadelta_has_torchs_defaults_with_the_learning_rate_of_1():
    theirs = torch.optim.Adadelta([torch.nn.Parameter(torch.zeros(2))]).defaults
    assert {name: option.default for name, option in adadelta.OPTIONS.items()} == {
        name: theirs[name] for name in adadelta.OPTIONS
    }


@pytest.mark.parametrize(("name", "options"), [("rmsprop", {"alpha": 0.9}), ("adagrad", {})])
def test_groups_with_eps_inside_and_outside_live_in_one_optimizer(name, options):
    parameters, options = make_parameters(), {"lr": 0.1, "eps": 0.3, **options}
    inside = [False, True, False, True]
    groups = [{"params": [p], "eps_inside": i} for p, i in zip(parameters, inside, strict=True)]
    optimizer = create(name, groups[:3], **options)
    optimizer.add_param_group(groups[3])
    plain = [
        PLAIN[name](p.detach().clone(), eps_inside=i, **options)
        for p, i in zip(parameters, inside, strict=True)
    ]
    for step in range(5):
        set_grads(parameters, step)
        assert optimizer.step(lambda: 7.0) == 7.0
        for parameter, reference in zip(parameters, plain, strict=True):
            reference.step(parameter.grad)
    for parameter, reference in zip(parameters, plain, strict=True):
        torch.testing.assert_close(parameter.detach(), reference.value(), rtol=1e-9, atol=1e-10)
    assert [group["eps"] for group in optimizer.param_groups] == [0.3] * 4


def test_adagrad_starts_each_group_from_its_own_sum():
    one, two = make_parameters()[:2]
    groups = [{"params": [one]}, {"params": [two], "initial_accumulator_value": 0.5}]
    optimizer = create("adagrad", groups, lr=0.1, initial_accumulator_value=0.1)
    assert (optimizer.state[one]["sum"] == 0.1).all()
    assert (optimizer.state[two]["sum"] == 0.5).all()


def test_centered_rmsprop_with_eps_inside_takes_a_variance_below_zero_for_zero():
    # What rounding makes of a gradient that has been 1 for long.
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = create("rmsprop", [parameter], lr=0.001, eps=1e-8, centered=True, eps_inside=True)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.state[parameter]["grad_avg"].fill_(1.0)
    optimizer.state[parameter]["square_avg"].fill_(1 - 1e-6)
    before = parameter.detach().clone()
    optimizer.step()
    torch.testing.assert_close(before - parameter.detach(), torch.full_like(before, 0.001 / 1e-4))


@pytest.mark.parametrize(
    ("momentum", "dampening"), [(0.0, 0.0), (0.9, 0.1)], ids=["no momentum", "with dampening"]
)
def test_nesterov_without_momentum_or_with_dampening_is_refused_with_what_to_do(momentum, dampening):
    options = {"lr": 0.1, "momentum": momentum, "dampening": dampening}
    with pytest.raises(
        UserError, match=r"nesterov = true.*momentum above 0.*dampening at 0, or set nesterov"
    ):
        create("sgd", make_parameters(), nesterov=True, **options)
    group = {"params": make_parameters(), "nesterov": True, "momentum": momentum, "dampening": dampening}
    with pytest.raises(UserError, match="nesterov = true"):
        create("sgd", [group], lr=0.1)


def test_sgd_is_fused_but_for_dampening_and_adagrad_always_on_the_cpu():
    for optimizer, fused in (
        (create("sgd", make_parameters(), lr=0.1, momentum=0.9, nesterov=True), True),
        (create("sgd", make_parameters(), lr=0.1, dampening=0.1), True),
        (create("sgd", make_parameters(), lr=0.1, momentum=0.9, dampening=0.1), False),
        (create("adagrad", make_parameters(), lr=0.1, eps_inside=True), True),
    ):
        assert optimizer.param_groups[0]["fused"] is fused
        assert optimizer._step_supports_amp_scaling is fused
        assert optimizer.skips_on_host is not fused


@pytest.fixture
def nan_for_uninitialised():
    """Make torch fill memory that it does not initialise with NaN, so that a kernel that reads it shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


FUSED_CASES = [case for case in CASES if case[0] in ("sgd", "adagrad") and not case[1].get("dampening")]


@pytest.mark.parametrize(("name", "options"), FUSED_CASES, ids=case_id)
@pytest.mark.parametrize("skipped", [0, 3])
def test_step_skipped_by_found_inf_leaves_no_trace(name, options, skipped, nan_for_uninitialised):
    results = []
    for skips in (False, True):
        parameters = make_parameters()
        optimizer = create(name, parameters, **options)
        for step in range(6):
            if skips and step == skipped:
                for parameter in parameters:
                    parameter.grad = torch.full_like(parameter, math.nan)
                optimizer.found_inf = torch.tensor(1.0)
                optimizer.step()
                optimizer.found_inf = torch.tensor(0.0)
            set_grads(parameters, step)
            optimizer.step()
        results.append(parameters + [v for p in parameters for v in optimizer.state[p].values()])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@EVERY_CASE
def test_gradient_that_comes_late_starts_its_parameter_afresh_and_is_not_written_to(name, options):
    late, fresh = make_parameters(), make_parameters()
    optimizer, reference = create(name, late, **options), create(name, fresh[1:], **options)
    before = [parameter.detach().clone() for parameter in late]
    for step in range(3):
        set_grads(late, step)
        for parameter in late[1:]:
            parameter.grad = None
        optimizer.step()
    assert all(torch.equal(one, two) for one, two in zip(late[1:], before[1:], strict=True))
    for step in range(3):
        set_grads(late, step)
        grads = [parameter.grad.clone() for parameter in late]
        for parameter, grad in zip(fresh, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
        reference.step()
        assert all(torch.equal(p.grad, grad) for p, grad in zip(late, grads, strict=True))
    for one, two in zip(late[1:], fresh[1:], strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


@EVERY_CASE
def test_gradient_is_read_right_whatever_its_strides(name, options):
    strange, plain = make_parameters(), make_parameters()
    one, two = create(name, strange, **options), create(name, plain, **options)
    for step in range(3):
        set_grads(plain, step)
        for parameter, other in zip(strange, plain, strict=True):
            parameter.grad = other.grad.T.contiguous().T if other.ndim == 2 else other.grad.clone()
        grads = [parameter.grad for parameter in strange]
        one.step()
        two.step()
        assert all(parameter.grad is grad for parameter, grad in zip(strange, grads, strict=True))
    for a, b in zip(strange, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@EVERY_CASE
def test_zero_gradients_and_none_at_all_move_nothing_but_the_decay(name, options):
    parameters = make_parameters()
    optimizer = create(name, parameters, **{**options, "weight_decay": 0.0})
    optimizer.step()
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert all(torch.equal(one, two) for one, two in zip(parameters, make_parameters(), strict=True))


@EVERY_CASE
def test_saved_state_goes_on_and_a_warm_up_step_is_put_back_with_the_same_bits(name, options):
    straight, resumed = make_parameters(torch.float32), make_parameters(torch.float32)
    one, two = create(name, straight, **options), create(name, resumed, **options)
    for step in range(10):
        set_grads(straight, step, torch.float32)
        one.step()
        # At every step the second one is saved, stepped astray, and put back, at first without any state.
        file = io.BytesIO()
        torch.save(two.state_dict(), file)
        file.seek(0)
        values = [parameter.detach().clone() for parameter in resumed]
        set_grads(resumed, 77, torch.float32)
        two.step()
        two = create(name, resumed, **options) if step % 2 else two
        two.load_state_dict(torch.load(file, weights_only=True))
        for parameter, value in zip(resumed, values, strict=True):
            parameter.data.copy_(value)
        set_grads(resumed, step, torch.float32)
        two.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_adagrad_keeps_its_own_kernel_when_it_loads_the_state_of_another():
    parameters = make_parameters()
    optimizer = create("adagrad", parameters, lr=0.1)
    state = optimizer.state_dict()
    state["param_groups"][0]["fused"] = False
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["fused"] is True


def reddi_example(optimizer_name, start, rounds=1500, slope=3.0):
    """Return the mean of x over the last rounds of Reddi et al. 2018, section 3, f_t on [−1, 1] in turn.

    f_t(x) = slope·x for t = 1, 4, 7…, and −x otherwise, with β1 = 0, β2 = 1 / (1 + slope²) and steps of
    α/√t, α below √(1 − β2). The sum of three is (slope − 2)·x, which is least at x = −1.
    """
    x = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    options = {"lr": 0.9, "betas": (0.0, 1 / (1 + slope**2)), "eps": 0.0}
    optimizer = create(optimizer_name, [x], **options)
    seen = []
    for t in range(1, rounds + 1):
        x.grad = torch.tensor(slope if t % 3 == 1 else -1.0, dtype=torch.float64)
        optimizer.param_groups[0]["lr"] = options["lr"] / math.sqrt(t)
        optimizer.step()
        with torch.no_grad():
            x.clamp_(-1.0, 1.0)
        seen.append(x.item())
    return sum(seen[-300:]) / 300


@pytest.mark.parametrize("start", [-1.0, 0.0, 1.0])
def test_amsgrad_finds_the_minimum_of_reddis_example_and_adam_the_maximum(start):
    assert reddi_example("amsgrad", start) < -0.97
    assert reddi_example("adam", start) > 0.97


def test_amsgrad_is_adam_with_its_switch_held():
    variant = adam.VARIANTS["amsgrad"]
    assert variant.held == {"amsgrad": True}
    assert list(variant.options(adam.OPTIONS)) == ["lr", "betas", "eps", "weight_decay"]


def test_amsgrads_divisor_never_shrinks():
    # One large gradient, then small ones: Adam forgets the first, AMSGrad does not.
    steps = {}
    for amsgrad in (False, True):
        parameter = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        optimizer = adamw.CLASS([parameter], lr=0.1, betas=(0.0, 0.5), weight_decay=0.0, amsgrad=amsgrad)
        for step in range(40):
            parameter.grad = torch.tensor(100.0 if step == 0 else 1.0, dtype=torch.float64)
            before = parameter.item()
            optimizer.step()
        steps[amsgrad] = before - parameter.item()
    assert steps[False] == pytest.approx(0.1, rel=1e-3)
    # The largest v is 100² / 2, and is not corrected any more after 40 steps.
    assert steps[True] == pytest.approx(0.1 / math.sqrt(5000), rel=1e-3)
