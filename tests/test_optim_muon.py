"""Muon against torch's, against plain per-matrix formulas, and against itself after saving."""

import functools
import io
import math

import pytest
import torch
from optim_samples import largest_difference, parameters_of, set_grads
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import nanorun.optim.matrix_functions as matrix_functions
import nanorun.optim.muon as muon_module
from nanorun.errors import UserError
from nanorun.optim import create
from nanorun.optim.matrix_functions import COEFFICIENTS
from nanorun.optim.muon import OPTIONS, VARIANTS, Muon

SHAPES = [(12, 12), (24, 12), (12, 24), (12, 12), (1, 6)]
make_parameters = parameters_of(SHAPES, torch.float32)


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


def plain_polar(update, coefficients):
    """Return what five steps of a set make of one matrix."""
    wide = update if update.size(0) <= update.size(1) else update.T
    x = wide / wide.norm()
    if coefficients == "turbo":
        x = wide / (wide @ wide.T).abs().sum(1, keepdim=True).sqrt()
    elif coefficients == "schatten":
        x = wide / torch.linalg.svdvals(wide).pow(8).sum().pow(1 / 8)
    for a, b, c in COEFFICIENTS[coefficients].for_steps(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if update.size(0) <= update.size(1) else x.T


def plain_momentum(step, momentum, rise, fall):
    """modded-nanogpt's ramps: `rise` is steps and start, `fall` is first step, steps and end."""
    if rise and step < rise[0]:
        return rise[1] + step / rise[0] * (momentum - rise[1])
    if fall and step > fall[0]:
        return momentum - min(1.0, (step - fall[0]) / fall[1]) * (momentum - fall[2])
    return momentum


class PlainMuon:
    """Every option as its source writes it, one matrix at a time in float64.

    Cautious decay: Algorithm 1 of arXiv:2510.12402. NorMuon: Algorithm 1 of arXiv:2510.05491, and under the
    scale rule `original` the norm kept, as in its authors' code.
    """

    def __init__(self, parameters, *, lr, weight_decay=0.0, cautious=False, nesterov=True, rule="original",
                 coefficients="original", rows=False, beta2=0.95, rise=None, fall=None):  # fmt: skip
        self.parameters, self.lr, self.weight_decay, self.cautious = parameters, lr, weight_decay, cautious
        self.nesterov, self.rule, self.coefficients, self.rows = nesterov, rule, coefficients, rows
        self.beta2, self.rise, self.fall, self.step_count = beta2, rise, fall, 0
        self.momenta = [torch.zeros_like(p) for p in parameters]
        self.squares = [torch.zeros(len(p), dtype=p.dtype) for p in parameters]

    @torch.no_grad()
    def step(self):
        beta = plain_momentum(self.step_count, 0.95, self.rise, self.fall)
        for x, momentum, square in zip(self.parameters, self.momenta, self.squares, strict=True):
            momentum.copy_(beta * momentum + (1 - beta) * x.grad)
            update = beta * momentum + (1 - beta) * x.grad if self.nesterov else momentum
            update = self.sized(plain_polar(update, self.coefficients), square)
            mask = (update * x >= 0).to(x.dtype) if self.cautious else 1.0
            x.copy_(x - self.lr * (update + self.weight_decay * mask * x))
        self.step_count += 1

    def sized(self, orthogonal, square):
        rows, cols = orthogonal.shape
        if self.rule == "original":
            size = math.sqrt(max(1, rows / cols))
        else:
            size = 0.2 * math.sqrt(max(rows, cols))
        if not self.rows:
            return size * orthogonal
        square.copy_(self.beta2 * square + (1 - self.beta2) * (orthogonal**2).mean(1))
        divided = orthogonal / (square.sqrt() + 1e-10)[:, None]
        if self.rule == "original":
            return size * divided * orthogonal.norm() / divided.norm()
        return 0.2 * math.sqrt(rows * cols) / divided.norm() * divided


@functools.cache
def after_100_default_steps():
    parameters = make_parameters(dtype=torch.float64)
    optimizer = Muon(parameters, lr=0.02)
    for step in range(100):
        set_grads(parameters, step)
        optimizer.step()
    return parameters


RAMPS = {
    "momentum_warmup_steps": 20,
    "momentum_cooldown_start": 70,
    "momentum_cooldown_steps": 25,
    "momentum_end": 0.8,
}
ALL_OPTIONS = {
    "weight_decay": 0.1,
    "cautious_weight_decay": True,
    "coefficients": "turbo",
    "normalize_rows": True,
    "beta2": 0.9,
    **RAMPS,
}


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({"coefficients": "polar_express"}, {"coefficients": "polar_express"}),
        ({"coefficients": "turbo"}, {"coefficients": "turbo"}),
        ({"coefficients": "schatten"}, {"coefficients": "schatten"}),
        ({"weight_decay": 0.5, "cautious_weight_decay": True}, {"weight_decay": 0.5, "cautious": True}),
        (RAMPS, {"rise": (20, 0.85), "fall": (70, 25, 0.8)}),
        ({"momentum_cooldown_start": 50, "momentum_cooldown_steps": 50}, {"fall": (50, 50, 0.85)}),
        ({"normalize_rows": True}, {"rows": True}),
        ({"normalize_rows": True, "nesterov": False}, {"rows": True, "nesterov": False}),
        (
            {"normalize_rows": True, "scale_rule": "match_rms_adamw"},
            {"rows": True, "rule": "match_rms_adamw"},
        ),
        (
            ALL_OPTIONS,
            {
                "weight_decay": 0.1,
                "cautious": True,
                "coefficients": "turbo",
                "rows": True,
                "beta2": 0.9,
                "rise": (20, 0.85),
                "fall": (70, 25, 0.8),
            },
        ),
    ],
    ids=lambda options: "+".join(options) if "lr" not in options else None,
)
def test_every_option_matches_its_plain_formula_over_100_steps(options, plain):
    ours, theirs = make_parameters(dtype=torch.float64), make_parameters(dtype=torch.float64)
    optimizer, reference = Muon(ours, lr=0.02, **options), PlainMuon(theirs, lr=0.02, **plain)
    for step in range(100):
        for parameters, one in ((ours, optimizer), (theirs, reference)):
            set_grads(parameters, step)
            one.step()
    assert largest_difference(ours, theirs) < 1e-10
    assert largest_difference(ours, after_100_default_steps()) > 1e-3


def test_normuon_is_the_papers_rule_over_stacked_matrices():
    (fused,) = make_parameters([(36, 12)], dtype=torch.float64)
    separate = [torch.nn.Parameter(part.clone()) for part in fused.detach().chunk(3)]
    one = create("normuon", [{"params": [fused], "n_stacked": 3}], lr=0.02, weight_decay=0.1)
    three = PlainMuon(separate, lr=0.02, weight_decay=0.1, rows=True, rule="match_rms_adamw")
    for step in range(20):
        before = fused.detach().clone()
        set_grads([fused], step)
        for part, grad in zip(separate, fused.grad.chunk(3), strict=True):
            part.grad = grad
        one.step()
        three.step()
        update = (before * (1 - 0.02 * 0.1) - fused.detach()) / 0.02
        for part in update.chunk(3):
            assert part.square().mean().sqrt().item() == pytest.approx(0.2)
    torch.testing.assert_close(fused.detach(), torch.cat(separate).detach(), rtol=0, atol=1e-12)
    assert one.state[fused]["exp_avg_sq"].shape == (36, 1)


def test_normuon_keeps_its_rows_option_and_gives_the_others():
    offered = VARIANTS["normuon"].options(OPTIONS)
    assert "normalize_rows" not in offered
    assert {"lr", "momentum", "beta2", "scale_rule"} < set(offered)


def test_turbo_and_rows_under_a_zero_gradient_move_nothing():
    for rule in ("original", "match_rms_adamw"):
        (parameter,) = make_parameters([(8, 8)])
        before = parameter.detach().clone()
        optimizer = Muon([parameter], lr=0.5, coefficients="turbo", normalize_rows=True, scale_rule=rule)
        parameter.grad = torch.zeros(8, 8)
        optimizer.step()
        assert torch.equal(parameter, before)
        assert not optimizer.state[parameter]["exp_avg_sq"].any()


def test_cautious_decay_spares_what_the_update_lets_grow():
    (parameter,) = make_parameters([(8, 8)])
    before = parameter.detach().clone()
    with_decay, without = [
        Muon([parameter], lr=0.1, weight_decay=w, cautious_weight_decay=True) for w in (2, 0)
    ]
    moved = []
    for optimizer in (with_decay, without):
        parameter.data.copy_(before)
        set_grads([parameter], 0)
        optimizer.step()
        moved.append(parameter.detach() - before)
    shrinks = moved[1] * before <= 0
    assert 10 < shrinks.sum() < 54
    assert torch.equal(moved[0][~shrinks], moved[1][~shrinks])
    torch.testing.assert_close((moved[0] - moved[1])[shrinks], -0.1 * 2 * before[shrinks])


def test_momentum_cools_down_to_its_end_and_stays():
    (parameter,) = make_parameters([(8, 8)], dtype=torch.float64)
    (plain,) = make_parameters([(8, 8)], dtype=torch.float64)
    optimizer = Muon(
        [parameter], lr=0.02, momentum_cooldown_start=2, momentum_cooldown_steps=2, momentum_end=0.75
    )
    momenta = [torch.zeros_like(plain)]
    for step, momentum in enumerate([0.95, 0.95, 0.95, 0.85, 0.75, 0.75]):
        set_grads([parameter], step)
        set_grads([plain], step)
        optimizer.step()
        plain_muon_step([plain], momenta, lr=0.02, momentum=momentum)
        assert largest_difference([parameter], [plain]) < 1e-12


@pytest.mark.parametrize("options", [{}, {"momentum_cooldown_start": 9, "momentum_warmup_steps": 10}])
def test_cool_down_that_begins_before_the_warm_up_is_over_is_refused(options):
    with pytest.raises(UserError, match=r"momentum_cooldown_start of at least (1|10),.* it is (0|9)"):
        Muon(make_parameters([(4, 4)]), lr=0.02, momentum_cooldown_steps=5, **options)


@pytest.mark.parametrize("bad_step", [0, 3])
@pytest.mark.parametrize("options", [ALL_OPTIONS, {**ALL_OPTIONS, "cautious_weight_decay": False}])
def test_bad_step_leaves_every_bit_of_parameters_and_state(options, bad_step):
    skipped, never = make_parameters(), make_parameters()
    first, second = Muon(skipped, lr=0.02, **options), Muon(never, lr=0.02, **options)
    for step in range(6):
        set_grads(skipped, step)
        set_grads(never, step)
        if step == bad_step:
            for parameter in skipped:
                parameter.grad[0, 0] = float("nan")
        first.found_inf = torch.tensor(float(step == bad_step))
        first.step()
        if step != bad_step:
            second.step()
    for one, other in zip(skipped, never, strict=True):
        assert torch.equal(one, other)
        assert first.state[one].keys() == {"momentum_buffer", "exp_avg_sq", "step"}
        for key, value in second.state[other].items():
            assert torch.equal(first.state[one][key], value), key


def test_a_step_never_asks_the_device_for_a_number():
    # A fake tensor has no numbers: torch raises where a host would have to wait for one.
    with FakeTensorMode():
        parameters = [torch.nn.Parameter(torch.empty(shape)) for shape in SHAPES]
        optimizer = Muon(parameters, lr=0.02, **ALL_OPTIONS)
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer.found_inf = torch.empty(())
        optimizer.step()
        with pytest.raises(DataDependentOutputException):
            optimizer.found_inf.item()


def test_state_of_a_version_without_the_new_options_loads():
    parameters = make_parameters()
    optimizer = Muon(parameters, lr=0.02)
    set_grads(parameters, 0)
    optimizer.step()
    state = optimizer.state_dict()
    for option in ("coefficients", "normalize_rows", "cautious_weight_decay", "momentum_cooldown_steps"):
        del state["param_groups"][0][option]
    loaded = Muon(parameters, lr=0.02)
    loaded.load_state_dict(state)
    loaded.step()
    assert loaded.param_groups[0]["coefficients"] == "original"


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


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_pieces_that_fit_the_cache_change_no_bit(coefficients, monkeypatch):
    seen, trajectories = [], []
    original = muon_module.newton_schulz
    monkeypatch.setattr(muon_module, "newton_schulz", lambda g, **o: seen.append(g.shape) or original(g, **o))
    for cache_bytes in (2**18, 2 * 12 * 12 * 4):
        monkeypatch.setattr(matrix_functions, "CACHE_BYTES", cache_bytes)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        parameters = make_parameters([(36, 12), (24, 12), (12, 12), (24, 12), (12, 12)])
        group = {"params": parameters, "n_stacked": [3, 1, 1, 1, 1]}
        optimizer = Muon([group], lr=0.02, coefficients=coefficients, normalize_rows=True, weight_decay=0.1)
        for step in range(5):
            set_grads(parameters, step)
            optimizer.step()
        trajectories.append(parameters)
    assert [tuple(shape) for shape in seen[:2]] == [(5, 12, 12), (2, 24, 12)]
    assert [tuple(shape) for shape in seen[-5:]] == [
        (2, 12, 12),
        (2, 12, 12),
        (1, 12, 12),
        (1, 24, 12),
        (1, 24, 12),
    ]
    assert all(torch.equal(one, other) for one, other in zip(*trajectories, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.1},
        {"momentum_warmup_steps": 10},
        {**ALL_OPTIONS, "momentum_warmup_steps": 3, "momentum_cooldown_start": 4},
    ],
)
def test_saved_state_continues_with_the_same_bits(options):
    options = {"lr": 0.02, **options}
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


@pytest.mark.parametrize("options", [{}, {"coefficients": "turbo", "nesterov": False}])
def test_compiled_momentum_is_the_same_and_one_graph_for_each_shape(options):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    muon_module.compiled_momentum.cache_clear()
    compiled = muon_module.compiled_momentum(counting)
    given = {"nesterov": True, "ns_steps": 5, "coefficients": "original", "eps": 1e-30, **options}
    generator = torch.Generator().manual_seed(0)
    for momentum in (0.85, 0.9, 0.95):
        for shape in ((2, 6, 12), (3, 12, 6)):
            grad, before = torch.randn((2, *shape), generator=generator)
            expected = muon_module.orthogonal_momentum(grad.clone(), before, torch.tensor(momentum), **given)
            kept = grad.clone()
            found = compiled(grad, before, torch.tensor(momentum), **given)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
            assert torch.equal(grad, kept)
    assert len(graphs) == 2


def loss_after_training(steps=60, **options):
    """Return the loss of two layers taught to imitate two others by Muon on fresh noise."""
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator)
    teacher, weights = (
        [torch.nn.Parameter(draw(32, 8) / 8), torch.nn.Parameter(draw(8, 32) / 8)] for _ in "tw"
    )
    optimizer = Muon(weights, lr=0.02, **options)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        x = draw(64, 8)
        loss = (
            ((x @ weights[0].T).relu() @ weights[1].T - (x @ teacher[0].T).relu() @ teacher[1].T)
            .square()
            .mean()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_four_schatten_steps_train_as_far_as_five_original_ones():
    original, schatten = loss_after_training(), loss_after_training(coefficients="schatten", ns_steps=4)
    assert schatten < 1.1 * original < 0.5 * loss_after_training(steps=1)
