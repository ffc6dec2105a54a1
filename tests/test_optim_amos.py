"""Amos against algorithm 1 of arXiv:2210.11693 written out in float64, and against pytorch_optimizer.Amos."""

import io
import math

import pytest
import pytorch_optimizer
import torch
from optim_samples import largest_difference

from nanorun.errors import UserError
from nanorun.optim import create
from nanorun.optim.amos import expected_scale

SHAPES = [(12, 8), (8, 32), (24, 8), (7,), ()]


def make_parameters(shapes=SHAPES, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(scale * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


def set_grads(parameters, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for number, parameter in enumerate(parameters):
        grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        # Scales that differ by parameter and by row: an average over the wrong entries shows.
        grad *= 10.0 ** (number - 2)
        if grad.ndim == 2:
            grad *= torch.arange(1.0, 1 + grad.size(0), dtype=torch.float64)[:, None]
        parameter.grad = grad.to(parameter.dtype)


class PlainAmos:
    """Algorithm 1 of the paper for one row of numbers that share their slots, with Python's floats."""

    def __init__(self, eta, xi, beta=0.999, momentum=0.0, extra_l2=0.0):
        self.eta, self.xi, self.beta, self.momentum, self.extra_l2 = eta, xi, beta, momentum, extra_l2
        self.b, self.v, self.t, self.m = 0.0, 0.0, 0, None

    def step(self, theta, grad):
        xi, eta = self.xi, self.eta
        self.t += 1
        square = (grad**2).mean().item()
        self.v = self.beta * self.v + (1 - self.beta) * square
        v_hat = self.v / (1 - self.beta**self.t)
        c = (1 + math.sqrt(xi) * self.b / 4) ** -0.5
        d = 1 / (1 + math.sqrt(xi * eta) * self.b / 4)
        gamma = c * xi**2 / v_hat * square
        delta = d * (xi * eta / math.sqrt(v_hat) * grad + (gamma / 2 + self.extra_l2) * theta)
        self.b += gamma * (1 + self.b)
        if self.momentum:
            old = torch.zeros_like(delta) if self.m is None else self.m
            self.m = delta = self.momentum * old + (1 - self.momentum) * delta
        return theta - delta


@pytest.mark.parametrize(
    "options",
    [{"lr": 0.03}, {"lr": 0.3, "beta": 0.9, "momentum": 0.8}, {"lr": 0.03, "extra_l2": 0.01, "eta": 0.3}],
)
def test_amos_matches_the_plain_formula_over_100_steps(options):
    ours, plain = make_parameters(), [p.detach() for p in make_parameters()]
    optimizer = create("amos", [{"params": ours, "role": "matrix"}], **options)
    etas = [(1 / 8) ** 0.5, (2 / 32) ** 0.5, (1 / 8) ** 0.5, 1.0, 1.0]
    xi, eta = options["lr"], options.get("eta")
    rest = {key: value for key, value in options.items() if key not in ("lr", "eta")}
    rows = [
        [PlainAmos(eta or own, xi, **rest) for _ in range(p.size(0) if p.ndim == 2 else 1)]
        for p, own in zip(plain, etas)
    ]
    for step in range(100):
        set_grads(ours, step)
        for number, parameter in enumerate(ours):
            parts = zip(rows[number], plain[number].view(len(rows[number]), -1))
            grads = parameter.grad.view(len(rows[number]), -1)
            moved = [row.step(theta, grad) for (row, theta), grad in zip(parts, grads, strict=True)]
            plain[number] = torch.stack(moved).view(parameter.shape)
        optimizer.step()
    assert largest_difference(ours, plain) < 1e-11
    assert largest_difference(ours, make_parameters()) > 0.1
    # The decays have done something: b is no longer near 0.
    assert optimizer.state[ours[0]]["decay"].min() > 0.05


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_amos_matches_the_package_where_one_average_square_serves_the_tensor(momentum, dtype, tolerance):
    # Vectors, and matrices of one row: there a row is the tensor. The package's eta is 1/2 and √(2 / cols).
    shapes = [(7,), (), (1, 9)]
    ours, theirs = make_parameters(shapes, dtype), make_parameters(shapes, dtype)
    groups = [{"params": ours[:2], "eta": 0.5}, {"params": ours[2:], "role": "embedding"}]
    optimizer = create("amos", groups, lr=0.1, beta=0.9, momentum=momentum)
    reference = pytorch_optimizer.Amos(theirs, lr=0.1, beta=0.9, momentum=momentum, eps=1e-30)
    for step in range(100):
        set_grads(ours, step)
        set_grads(theirs, step)
        optimizer.step()
        reference.step()
    assert largest_difference(ours, theirs) < tolerance
    assert largest_difference(ours, make_parameters(shapes, dtype)) > 0.1


@pytest.mark.parametrize(
    ("shape", "role", "n_stacked", "eta"),
    [
        ((50, 8), "embedding", 1, math.sqrt(2 / 8)),
        ((50, 8), "head", 1, math.sqrt(1 / 8)),
        ((4, 8), "head", 1, math.sqrt(1 / 8)),
        ((24, 8), "matrix", 3, math.sqrt(1 / 8)),
        ((8, 32), "matrix", 1, math.sqrt(2 / 32)),
        ((8, 32), None, 1, math.sqrt(2 / 32)),
        ((5,), "vector", 1, 0.5),
        ((), "vector", 1, 0.5),
    ],
)
def test_scale_goes_by_role_and_shape(shape, role, n_stacked, eta):
    assert expected_scale(torch.zeros(shape, dtype=torch.float64), role, n_stacked).item() == eta


def test_vector_that_starts_away_from_zero_is_a_gain_and_stays_one():
    gain, bias = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.zeros(3))
    optimizer = create("amos", [gain, bias], lr=0.01)
    for _ in range(2):
        gain.grad, bias.grad = torch.ones(3), torch.ones(3)
        optimizer.step()
    assert optimizer.state[gain]["eta"].item() == 1.0
    assert optimizer.state[bias]["eta"].item() == 0.5


def test_first_step_is_lr_times_eta_in_size():
    (parameter,) = make_parameters([(4, 16)])
    before = parameter.detach().clone()
    set_grads([parameter], 0)
    create("amos", [{"params": [parameter], "role": "head"}], lr=1e-4).step()
    moved = (parameter - before).square().mean(dim=1).sqrt()
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-4 / 4), rtol=1e-3, atol=0)


def test_slots_are_one_number_a_row():
    parameters = make_parameters()
    optimizer = create("amos", parameters, lr=0.01)
    set_grads(parameters, 0)
    optimizer.step()
    shapes = [tuple(optimizer.state[p]["exp_avg_sq"].shape) for p in parameters]
    assert shapes == [(12, 1), (8, 1), (24, 1), (), ()]
    numbers = sum(t.numel() for p in parameters for t in optimizer.state[p].values())
    assert numbers == 2 * (12 + 8 + 24 + 1 + 1) + 2 * len(parameters)


def test_weights_without_a_signal_come_down_to_their_scale():
    # Random gradients: the paper's fixed point, where the mean square of the weights is about eta².
    generator = torch.Generator().manual_seed(3)
    big = torch.nn.Parameter(torch.full((4, 64), 2.0, dtype=torch.float64))
    optimizer = create("amos", [big], lr=0.1, eta=0.125, c_coef=0.0, d_coef=0.0)
    for _ in range(1500):
        big.grad = torch.randn(4, 64, generator=generator, dtype=torch.float64)
        optimizer.step()
    rms = big.detach().square().mean().sqrt().item()
    assert 0.1 < rms < 0.15


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_saved_state_continues_with_the_same_bits(momentum):
    straight, stopped = (make_parameters(dtype=torch.float32) for _ in range(2))
    first = create("amos", straight, lr=0.05, momentum=momentum)
    second = create("amos", stopped, lr=0.05, momentum=momentum)
    for step in range(9):
        if step == 4:
            file = io.BytesIO()
            torch.save(second.state_dict(), file)
            file.seek(0)
            second = create("amos", stopped, lr=0.05, momentum=momentum)
            second.load_state_dict(torch.load(file, weights_only=True))
        set_grads(straight, step)
        set_grads(stopped, step)
        first.step()
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, stopped, strict=True))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_bad_step_changes_nothing_and_the_next_goes_on(momentum):
    plain, skipping = make_parameters(), make_parameters()
    options = {"lr": 0.05, "momentum": momentum, "extra_l2": 0.01}
    first, second = create("amos", plain, **options), create("amos", skipping, **options)
    for step in range(6):
        set_grads(plain, step)
        set_grads(skipping, step)
        first.step()
        second.found_inf = torch.tensor(0.0)
        second.step()
        for parameter in skipping:
            parameter.grad = torch.full_like(parameter, math.nan if step % 2 else math.inf)
        second.found_inf = torch.tensor(1.0)
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(plain, skipping, strict=True))


def test_dtypes_in_one_group_are_stepped_apart():
    mixed = [torch.nn.Parameter(torch.ones(3, 4, dtype=t)) for t in (torch.float32, torch.float64)]
    optimizer = create("amos", mixed, lr=0.05)
    for parameter in mixed:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.testing.assert_close(mixed[0].double(), mixed[1])


def test_options_out_of_range_are_refused_by_name():
    parameters = make_parameters()
    for name, value in {"beta": 1.0, "momentum": -0.1, "eta": 0.0, "eps": 0.0, "c_coef": -1.0}.items():
        with pytest.raises(UserError, match=f"amos: {name} = "):
            create("amos", parameters, lr=0.1, **{name: value})
    with pytest.raises(UserError, match="needs the option 'lr'"):
        create("amos", parameters)
