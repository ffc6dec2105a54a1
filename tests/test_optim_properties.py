"""What must hold for every optimizer and variant, whatever its options, shapes and number of steps."""

import copy
import functools
import io
import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from nanorun.errors import UserError
from nanorun.optim import create
from nanorun.optim.build import find_algorithm, optimizer_names
from nanorun.optim.options import REQUIRED

NAMES = optimizer_names()
EVERY_OPTIMIZER = pytest.mark.parametrize("name", NAMES)
LR = 0.01

MOVES_AT_LR_ZERO = {
    "schedulefree_adamw": "z stands still, but the average x and y, which the parameters hold, go on towards it",
}
"""Exempt from standing still at lr 0 after a few steps, and why."""

FIRST_MOVE = {"soap": 2}
"""The step at which matrices first move, where that is not the first: SOAP's first gradient makes its bases."""

MATRICES = [
    ((4, 3), 1),
    ((3, 6), 1),
    ((6, 2), 3),
    ((9, 3), 3),
    ((4, 3), 2),
    ((1, 5), 1),
    ((5, 1), 1),
    ((4, 4), 1),
]
VECTORS = [((), 1), ((1,), 1), ((5,), 1)]


def few_examples(count):
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@dataclass(frozen=True)
class Problem:
    """An optimizer with its options, and the parameters it is given."""

    name: str
    options: dict[str, Any]
    shapes: list[tuple[tuple[int, ...], int]]
    """The shape of each parameter, and how many matrices it stacks."""
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def parameters(self, scale=1.0):
        generator = torch.Generator().manual_seed(self.seed)
        values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape, _ in self.shapes]
        return [torch.nn.Parameter((scale * value).to(self.dtype)) for value in values]

    def optimizer(self, parameters, **changes):
        """Return the optimizer over one group per role, with the keys that training adds to a group."""
        roles = {"matrix": [], "vector": []}
        for parameter, (shape, n_stacked) in zip(parameters, self.shapes, strict=True):
            roles["matrix" if len(shape) == 2 else "vector"].append((parameter, n_stacked))
        options = {**self.options, **changes}
        groups = [
            {
                "params": [parameter for parameter, _ in members],
                "n_stacked": [n_stacked for _, n_stacked in members],
                "role": role,
            }
            for role, members in roles.items()
            if members
        ]
        optimizer = create(self.name, groups, **options)
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer


def set_grads(parameters, step, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = (scale * grad).to(parameter.dtype)


def train(optimizer, parameters, steps, start=0):
    """Take steps under a schedule that changes the learning rate at each."""
    for step in range(start, start + steps):
        set_grads(parameters, step)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * (1 + step % 4) / 4
        optimizer.step()


def usual_options(name):
    """Return the defaults, with a learning rate, and roots due every two steps or so."""
    options = {}
    for option, entry in find_algorithm(name).table.items():
        if entry.default is REQUIRED:
            options[option] = LR
        elif entry.kind == "int" and ("frequency" in option or "every" in option or "start" in option):
            options[option] = max(2, int(max(entry.low, 0)))
    return options


def values(option, entry):
    """Return some values that the option may take."""
    if entry.default is REQUIRED:
        return [LR]
    if entry.kind == "choice":
        return list(entry.choices)
    if entry.kind == "bool":
        return [False, True]
    if entry.kind == "int":
        low = max(1, int(entry.low) if math.isfinite(entry.low) else 1)
        frequent = "frequency" in option or "every" in option
        return [low, low + 2] if frequent else [entry.default, min(low + 1, entry.high)]
    if entry.kind == "pair":
        return [entry.default]
    other = 0.5 if entry.default is None else 0.1
    in_range = entry.low <= other <= entry.high and not (entry.below_high and other == entry.high)
    return [entry.default, other] if entry.default in (0, None) and in_range else [entry.default]


@st.composite
def problems(draw, name):
    algorithm = find_algorithm(name)
    options = {option: draw(st.sampled_from(values(option, e))) for option, e in algorithm.table.items()}
    shapes = MATRICES + (VECTORS if "vector" in algorithm.roles else [])
    drawn = draw(st.lists(st.sampled_from(shapes), min_size=1, max_size=4))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    problem = Problem(name, options, drawn, dtype, draw(st.integers(0, 99)))
    try:
        problem.optimizer(problem.parameters())
    except UserError:
        # Options that do not go together; each optimizer's own file tests its message.
        reject()
    return problem


def usual_problem(name, dtype=torch.float32):
    vectors = VECTORS if "vector" in find_algorithm(name).roles else []
    return Problem(name, usual_options(name), [*MATRICES, *vectors], dtype)


def through_torch(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_safetensors(state):
    """Return the state after its tensors went through safetensors and all else through JSON."""
    tensors = {}

    def flat(value):
        if isinstance(value, torch.Tensor):
            tensors[str(len(tensors))] = value
            return {"tensor": str(len(tensors) - 1)}
        if isinstance(value, dict):
            return {"items": [[key, flat(item)] for key, item in value.items()]}
        return [flat(item) for item in value] if isinstance(value, list | tuple) else value

    def full(value):
        if isinstance(value, dict):
            return loaded[value["tensor"]] if "tensor" in value else {k: full(v) for k, v in value["items"]}
        return [full(item) for item in value] if isinstance(value, list) else value

    text = json.dumps(flat(state))
    loaded = load(save(tensors))
    return full(json.loads(text))


def state_tensors(optimizer):
    """Return every tensor of the state with its name, sorted."""
    state = optimizer.state_dict()["state"]
    found = {f"{index}.{key}": value for index, entry in state.items() for key, value in entry.items()}
    return {key: found[key] for key in sorted(found) if isinstance(found[key], torch.Tensor)}


def own_state(optimizer, parameter):
    state = optimizer.state.get(parameter, {})
    return {key: value.clone() for key, value in state.items() if isinstance(value, torch.Tensor)}


def same_bits(left, right):
    return left.shape == right.shape and left.dtype == right.dtype and torch.equal(left, right)


def assert_same_bits(left, right):
    assert all(same_bits(a, b) for a, b in zip(left, right, strict=True))


def assert_same_state(left, right):
    left, right = state_tensors(left), state_tensors(right)
    assert left.keys() == right.keys()
    for key in left:
        assert same_bits(left[key], right[key]), key


def clones(parameters):
    return [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]


@EVERY_OPTIMIZER
@pytest.mark.parametrize("form", [through_torch, through_safetensors])
def test_saved_state_goes_on_with_the_same_bits(name, form):
    @few_examples(5)
    @given(problems(name), st.integers(0, 5), st.integers(1, 5))
    def check(problem, before, after):
        straight = problem.parameters()
        optimizer = problem.optimizer(straight)
        train(optimizer, straight, before)
        resumed = clones(straight)
        second = problem.optimizer(resumed)
        second.load_state_dict(form(optimizer.state_dict()))
        train(optimizer, straight, after, start=before)
        train(second, resumed, after, start=before)
        assert_same_bits(straight, resumed)
        assert_same_state(optimizer, second)

    check()


@EVERY_OPTIMIZER
def test_blank_state_put_back_after_a_step_leaves_no_trace(name):
    # What a run does to warm its kernels up before the clock starts.
    problem = usual_problem(name)
    fresh, warmed = problem.parameters(), problem.parameters()
    first, second = problem.optimizer(fresh), problem.optimizer(warmed)
    blank = copy.deepcopy(second.state_dict())
    train(second, warmed, 1, start=77)
    with torch.no_grad():
        torch._foreach_copy_(warmed, fresh)
    second.load_state_dict(blank)
    train(first, fresh, 5)
    train(second, warmed, 5)
    assert_same_bits(fresh, warmed)
    assert_same_state(first, second)


@EVERY_OPTIMIZER
def test_two_runs_give_the_same_bits(name):
    @few_examples(2)
    @given(problems(name))
    def check(problem):
        first, second = problem.parameters(), problem.parameters()
        train(problem.optimizer(first), first, 5)
        train(problem.optimizer(second), second, 5)
        assert_same_bits(first, second)

    check()


@EVERY_OPTIMIZER
def test_parameters_stay_finite_after_zero_gradients(name):
    @few_examples(3)
    @given(problems(name), st.integers(0, 3))
    def check(problem, before):
        parameters = problem.parameters()
        optimizer = problem.optimizer(parameters)
        train(optimizer, parameters, before)
        for step in range(3):
            set_grads(parameters, step, scale=0.0)
            optimizer.step()
        assert all(torch.isfinite(parameter).all() for parameter in parameters)
        train(optimizer, parameters, 3)
        assert all(torch.isfinite(parameter).all() for parameter in parameters)

    check()


@EVERY_OPTIMIZER
def test_parameter_without_a_gradient_keeps_its_bits_and_may_get_one_later(name):
    @few_examples(3)
    @given(problems(name), st.integers(0, 3))
    def check(problem, before):
        parameters = problem.parameters()
        optimizer = problem.optimizer(parameters)
        train(optimizer, parameters, before)
        old, state = parameters[-1].detach().clone(), own_state(optimizer, parameters[-1])
        for step in range(before, before + 3):
            set_grads(parameters, step)
            parameters[-1].grad = None
            optimizer.step()
        assert torch.equal(parameters[-1], old)
        now = own_state(optimizer, parameters[-1])
        assert now.keys() == state.keys()
        assert_same_bits(now.values(), state.values())
        for parameter in parameters:
            parameter.grad = None
        unmoved = clones(parameters)
        optimizer.step()
        assert_same_bits(parameters, unmoved)
        train(optimizer, parameters, 3)
        assert all(torch.isfinite(parameter).all() for parameter in parameters)
        assert not torch.equal(parameters[-1], old)

    check()


@EVERY_OPTIMIZER
@pytest.mark.parametrize("shape", [(), (5,)])
def test_scalars_and_vectors_are_trained_or_refused(name, shape):
    parameter = torch.nn.Parameter(torch.full(shape, 3.0))
    if "vector" not in find_algorithm(name).roles:
        with pytest.raises(UserError, match="matri"):
            create(name, [parameter], **usual_options(name))
        return
    optimizer = create(name, [parameter], **usual_options(name))
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(5):
        parameter.grad = torch.ones(shape)
        optimizer.step()
    assert torch.isfinite(parameter).all()
    # Downhill, every entry alike.
    assert (parameter < 3.0).all()
    # Within a hundredth of a step: a root of the matrix of gradients rounds differently from entry to entry.
    assert parameter.max() - parameter.min() <= 0.01 * LR


@EVERY_OPTIMIZER
def test_first_update_is_in_proportion_to_the_learning_rate(name):
    # From weights of zero, which no decay moves, all optimizers make one: Amos's decay goes with lr².
    problem = usual_problem(name, torch.float64)
    once, twice = problem.parameters(scale=0.0), problem.parameters(scale=0.0)
    for parameters, factor in ((once, 1.0), (twice, 2.0)):
        optimizer = problem.optimizer(parameters)
        for step in range(FIRST_MOVE.get(name, 1)):
            set_grads(parameters, step)
            last = step + 1 == FIRST_MOVE.get(name, 1)
            for group in optimizer.param_groups:
                group["lr"] = factor * group["base_lr"] if last else 0.0
            optimizer.step()
    for single, double in zip(once, twice):
        assert single.abs().max() > 0
        torch.testing.assert_close(double, 2 * single, rtol=1e-6, atol=0)


@EVERY_OPTIMIZER
def test_learning_rate_of_zero_moves_nothing_but_what_is_exempt(name):
    problem = usual_problem(name)
    parameters = problem.parameters()
    optimizer = problem.optimizer(parameters)
    for step in range(6):
        before = clones(parameters)
        set_grads(parameters, step)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] if step in (2, 3) else 0.0
        optimizer.step()
        moves = step in (2, 3) or (step > 3 and name in MOVES_AT_LR_ZERO)
        assert all(same_bits(a, b) == (not moves) for a, b in zip(parameters, before, strict=True)), step


@EVERY_OPTIMIZER
def test_weight_decay_at_a_learning_rate_of_zero_moves_nothing(name):
    if "weight_decay" not in find_algorithm(name).table:
        pytest.skip("has no weight decay")
    problem = usual_problem(name)
    parameters = problem.parameters()
    optimizer = problem.optimizer(parameters, weight_decay=0.1)
    before = clones(parameters)
    set_grads(parameters, 0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert_same_bits(parameters, before)


def strange_gradients(parameters):
    """Return gradients that lie in memory as a backward pass may leave them, none contiguous of its own."""
    grads = []
    for number, parameter in enumerate(parameters):
        generator = torch.Generator().manual_seed(number)
        draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        shape = parameter.shape
        if parameter.ndim == 0:
            grad = draw(3).to(parameter.dtype)[1]
        elif number % 3 == 0:
            grad = draw(1, dtype=torch.float64).to(parameter.dtype).expand(shape)
        elif number % 3 == 1:
            grad = draw(*reversed(shape)).to(parameter.dtype).permute(*reversed(range(parameter.ndim)))
        else:
            grad = draw(*shape, 2).to(parameter.dtype)[..., 1]
        grads.append(grad)
    return grads


@EVERY_OPTIMIZER
def test_gradients_are_read_as_they_lie_and_never_written_to(name):
    @few_examples(4)
    @given(problems(name))
    def check(problem):
        strange, plain = problem.parameters(), problem.parameters()
        first, second = problem.optimizer(strange), problem.optimizer(plain)
        for _ in range(3):
            grads = strange_gradients(strange)
            kept = [grad.clone(memory_format=torch.contiguous_format) for grad in grads]
            for a, b, grad, copied in zip(strange, plain, grads, kept):
                a.grad, b.grad = grad, copied.clone()
            first.step()
            second.step()
            assert all(a.grad is grad for a, grad in zip(strange, grads))
            assert_same_bits(grads, kept)
            assert_same_bits([b.grad for b in plain], kept)
        for a, b in zip(strange, plain):
            tolerance = 1e-9 if problem.dtype == torch.float64 else 1e-3
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * LR)

    check()


@EVERY_OPTIMIZER
def test_two_optimizers_may_share_one_gradient(name):
    problem = usual_problem(name)
    first, second, alone = (problem.parameters() for _ in range(3))
    optimizers = [problem.optimizer(parameters) for parameters in (first, second, alone)]
    for step in range(5):
        set_grads(first, step)
        set_grads(alone, step)
        for one, other in zip(first, second):
            other.grad = one.grad
        for optimizer in optimizers:
            optimizer.step()
    assert_same_bits(first, alone)
    assert_same_bits(second, alone)


def reads_flag(optimizer):
    reads = getattr(optimizer, "supports_found_inf", False) or getattr(
        optimizer, "_step_supports_amp_scaling", False
    )
    return reads and not getattr(optimizer, "skips_on_host", False)


@EVERY_OPTIMIZER
def test_flagged_step_changes_nothing_where_the_optimizer_reads_the_flag(name):
    problem = usual_problem(name)
    if not reads_flag(problem.optimizer(problem.parameters())):
        pytest.skip("the host reads the flag, or the state is put back from a copy")

    @few_examples(3)
    @given(problems(name), st.integers(0, 3))
    def check(problem, before):
        plain, flagged = problem.parameters(), problem.parameters()
        first, second = problem.optimizer(plain), problem.optimizer(flagged)
        if not reads_flag(second):
            # Some of an algorithm's options may need the host.
            reject()
        train(first, plain, before)
        train(second, flagged, before)
        second.found_inf = torch.ones(())
        for parameter in flagged:
            parameter.grad = torch.full_like(parameter, math.nan)
        second.step()
        assert_same_bits(plain, flagged)
        second.found_inf = torch.zeros(())
        train(first, plain, 3, start=before)
        train(second, flagged, 3, start=before)
        assert_same_bits(plain, flagged)

    check()


def test_every_optimizer_of_the_list_is_here():
    wanted = """sgd adagrad rmsprop adadelta adam amsgrad adamw nadamw nadamp generalized_adam schedulefree_adamw
        prodigy schedulefree_prodigy shampoo distributed_shampoo caspr amos soap muon normuon"""
    assert set(wanted.split()) <= set(NAMES)
    assert set(MOVES_AT_LR_ZERO) | set(FIRST_MOVE) <= set(NAMES)
    assert len(NAMES) == len(set(NAMES))
