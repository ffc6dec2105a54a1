"""Distributed Shampoo against a plain formula, and against itself after saving.

Meta's package is not installed here. The independent reference is `PlainBlock`: arXiv:2309.06497 and the order
of operations of the AlgoPerf submission, one block at a time, in float64.
"""

import io

import pytest
import torch
from optim_samples import parameters_of, set_grads

import nanorun.optim.distributed_shampoo as module
from nanorun.errors import UserError
from nanorun.optim import create
from nanorun.optim.distributed_shampoo import DistributedShampoo, tiles_of

SHAPES = [(6, 6), (11, 5), (5, 11), (12, 4), (17, 10), (7,), (19,), (1,), (), (1, 6), (7, 1)]
make_parameters = parameters_of(SHAPES)
STACKS = [1, 1, 1, 3, 1, 1, 1, 1, 1, 1, 1]
"""(12, 4) is three stacked matrices; under blocks of 8, (17, 10) falls into four shapes of block."""


def make_optimizer(parameters, stacks=STACKS, **options):
    return create("distributed_shampoo", [{"params": parameters, "n_stacked": stacks}], **options)


def plain_blocks(tensor, n_stacked, size):
    """Return views of a parameter's blocks: stacked matrices apart, then cut along each dimension."""
    blocks = tensor.view(1).split(1) if tensor.ndim == 0 else tensor.chunk(n_stacked)
    for dim in range(max(tensor.ndim, 1)):
        blocks = [piece for block in blocks for piece in block.split(size, dim=dim)]
    return list(blocks)


def plain_root(matrix, eps, root):
    values, vectors = torch.linalg.eigh(matrix + eps * torch.eye(len(matrix), dtype=matrix.dtype))
    return vectors @ torch.diag(values.clamp(min=eps) ** (-1 / root)) @ vectors.T


class PlainBlock:
    """The algorithm on one block, a vector or a matrix."""

    def __init__(self, block):
        self.factors = [torch.zeros(n, n, dtype=block.dtype) for n in block.shape]
        self.roots = [None] * block.ndim
        self.m, self.v, self.buffer = (torch.zeros_like(block) for _ in range(3))
        self.t = 0

    def update(self, g, w, o):
        """Return what is subtracted from the block `w` whose gradient is `g`, under the options `o`."""
        self.t += 1
        beta1, beta2, graft2 = o["beta1"], o["beta2"], o["graft2"]
        outer = [torch.outer(g, g)] if g.ndim == 1 else [g @ g.T, g.T @ g]
        self.factors = [beta2 * f + (1 - beta2) * gg for f, gg in zip(self.factors, outer, strict=True)]
        self.v = graft2 * self.v + (1 - graft2) * g**2
        self.m = beta1 * self.m + (1 - beta1) * g
        if self.t == o["start"] or (self.t > o["start"] and self.t % o["every"] == 0):
            root = o["override"] or 2 * g.ndim
            self.roots = [plain_root(f / (1 - beta2**self.t), o["eps"], root) for f in self.factors]
        average = beta1 * self.m + (1 - beta1) * g if o["nadam"] else self.m
        average = average / (1 - beta1**self.t)
        direction = adam = average / ((self.v / (1 - graft2**self.t)).sqrt() + o["graft_eps"])
        if self.t >= o["start"]:
            direction = self.roots[0] @ average
            if g.ndim == 2:
                direction = direction @ self.roots[1]
            direction = direction * adam.norm() / (direction.norm() + 1e-16)
        direction = direction + o["decay"] * w
        if o["momentum"]:
            mu = o["momentum"]
            self.buffer = mu * self.buffer + (1 - mu) * direction
            direction = (1 - mu) * direction + mu * self.buffer
        return o["lr"] * direction


OPTIONS = {
    "as in the paper": {"weight_decay": 0.1, "precondition_frequency": 3},
    "nadam and its own average square": {
        "use_nadam": True,
        "grafting_beta2": 0.95,
        "grafting_eps": 1e-3,
        "precondition_frequency": 4,
        "start_preconditioning_step": 10,
    },
    "momentum and the submission's other power": {
        "momentum": 0.5,
        "weight_decay": 0.1,
        "inv_root_override": 2,
        "precondition_frequency": 5,
        "start_preconditioning_step": 1,
        "eps": 1e-3,
    },
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_distributed_shampoo_matches_the_plain_formula_over_100_steps(name):
    given = {"lr": 0.01, "betas": (0.9, 0.98), "block_size": 8, **OPTIONS[name]}
    every, start = given["precondition_frequency"], given.get("start_preconditioning_step", -1)
    plain = {
        "lr": 0.01,
        "beta1": 0.9,
        "beta2": 0.98,
        "every": every,
        "start": every if start == -1 else start,
    }
    plain |= {"graft2": given.get("grafting_beta2", 0.98), "graft_eps": given.get("grafting_eps", 1e-8)}
    plain |= {"eps": given.get("eps", 1e-8), "override": given.get("inv_root_override", 0)}
    plain |= {"nadam": given.get("use_nadam", False), "momentum": given.get("momentum", 0.0)}
    plain["decay"] = given.get("weight_decay", 0.0)
    ours, theirs = make_parameters(), make_parameters()
    optimizer = make_optimizer(ours, **given)
    blocks = [plain_blocks(p.data, n, 8) for p, n in zip(theirs, STACKS, strict=True)]
    states = [[PlainBlock(block) for block in part] for part in blocks]
    for step in range(100):
        set_grads(ours, step)
        optimizer.step()
        for i, parameter in enumerate(ours):
            grads = plain_blocks(parameter.grad, STACKS[i], 8)
            for state, block, grad in zip(states[i], blocks[i], grads, strict=True):
                block -= state.update(grad, block, plain)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-8, atol=1e-9)
    assert all((a - b).abs().max() > 0.05 for a, b in zip(ours, make_parameters(), strict=True))


def test_before_the_first_roots_it_is_adamw():
    ours, theirs = make_parameters(), make_parameters()
    options = {"lr": 0.01, "betas": (0.9, 0.98), "weight_decay": 0.1}
    optimizer = make_optimizer(ours, start_preconditioning_step=21, precondition_frequency=5, **options)
    adamw = torch.optim.AdamW(theirs, **options)
    for step in range(21):
        # The 21st step is the first that may differ.
        if step == 20:
            assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(ours, theirs, strict=True))
        set_grads(ours, step)
        set_grads(theirs, step)
        optimizer.step()
        adamw.step()
    assert not torch.allclose(ours[0], theirs[0], atol=1e-4)


def test_roots_are_computed_at_the_start_and_at_later_multiples_only(monkeypatch):
    seen, now = set(), 0
    original = module.inverse_root

    def counting(stack_KSS, power, **options):
        seen.add((now, power))
        return original(stack_KSS, power, **options)

    monkeypatch.setattr(module, "inverse_root", counting)
    parameters = make_parameters([(6, 4), (5,)])
    optimizer = make_optimizer(
        parameters, [1, 1], lr=0.01, precondition_frequency=4, start_preconditioning_step=6
    )
    for now in range(1, 14):
        set_grads(parameters, now)
        optimizer.step()
    assert seen == {(now, power) for now in (6, 8, 12) for power in (2, 4)}


def test_all_blocks_of_one_shape_share_one_call(monkeypatch):
    seen = []
    original = module.inverse_root

    def counting(stack_KSS, power, **options):
        seen.append(tuple(stack_KSS.shape))
        return original(stack_KSS, power, **options)

    monkeypatch.setattr(module, "inverse_root", counting)
    parameters = make_parameters([(24, 8), (8, 8), (16, 16), (8,)])
    make_optimizer(parameters, [3, 1, 1, 1], lr=0.01, block_size=8, start_preconditioning_step=1).step()
    assert seen == []
    set_grads(parameters, 0)
    make_optimizer(parameters, [3, 1, 1, 1], lr=0.01, block_size=8, start_preconditioning_step=1).step()
    # 3 + 1 + 4 matrices with two sides, and the vector's one factor with a power of its own.
    assert sorted(seen) == [(1, 8, 8), (8, 8, 8), (8, 8, 8)]


@pytest.mark.parametrize("shape", [(17, 10), (24, 8), (3, 5), (19,), (8,), (), (4, 3, 2)])
@pytest.mark.parametrize("block_size", [1, 4, 8, 1024])
def test_tiles_cover_every_number_once(shape, block_size):
    seen = torch.zeros(shape)
    for tile in tiles_of(shape, 1, block_size):
        view = tile.view(seen)
        assert view[0, 0, 0].shape == tile.shape
        assert view.shape[:3].numel() == tile.n_blocks
        view += 1
    assert torch.equal(seen, torch.ones(shape))


def test_stacked_matrices_equal_separate_ones():
    (fused,) = make_parameters([(36, 12)])
    separate = [torch.nn.Parameter(part.clone()) for part in fused.detach().chunk(3)]
    options = {"lr": 0.01, "weight_decay": 0.1, "precondition_frequency": 2, "block_size": 8}
    one, three = make_optimizer([fused], 3, **options), make_optimizer(separate, 1, **options)
    for step in range(10):
        set_grads([fused], step)
        for part, grad in zip(separate, fused.grad.chunk(3), strict=True):
            part.grad = grad.clone()
        one.step()
        three.step()
    torch.testing.assert_close(fused, torch.cat(separate), rtol=1e-12, atol=1e-12)


def test_parameters_that_started_apart_match_those_alone():
    together, apart = make_parameters([(6, 6), (6, 6)]), make_parameters([(6, 6), (6, 6)])
    options = {"lr": 0.01, "precondition_frequency": 3}
    both = make_optimizer(together, 1, **options)
    each = [make_optimizer([parameter], 1, **options) for parameter in apart]
    for step in range(12):
        set_grads(together, step)
        for parameter, other in zip(apart, together, strict=True):
            parameter.grad = other.grad.clone()
        if step < 4:
            together[1].grad = None
        both.step()
        for optimizer in each[: 1 if step < 4 else 2]:
            optimizer.step()
    for mine, alone in zip(together, apart, strict=True):
        torch.testing.assert_close(mine, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_state_continues_with_the_same_bits(dtype):
    options = {"lr": 0.01, "weight_decay": 0.1, "precondition_frequency": 4, "momentum": 0.5, "block_size": 8}
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
    optimizer = make_optimizer(parameters, lr=0.5, weight_decay=0.1, start_preconditioning_step=1)
    for parameter in parameters[1:]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(parameters[0], before[0])
    assert parameters[0] not in optimizer.state
    for parameter, old in zip(parameters[1:], before[1:], strict=True):
        torch.testing.assert_close(parameter, old * (1 - 0.5 * 0.1))


def test_gradients_are_not_written_to_and_transposed_parameters_are_updated():
    options = {"lr": 0.01, "use_nadam": True, "start_preconditioning_step": 1, "block_size": 4}
    (plain,) = make_parameters([(6, 10)])
    transposed = torch.nn.Parameter(plain.detach().T.contiguous().T)
    assert not transposed.is_contiguous()
    one, other = make_optimizer([plain], 1, **options), make_optimizer([transposed], 1, **options)
    for step in range(3):
        set_grads([plain], step)
        transposed.grad = plain.grad.T.contiguous().T
        before = plain.grad.clone()
        one.step()
        other.step()
        assert torch.equal(plain.grad, before)
        assert torch.equal(transposed.grad, before)
    torch.testing.assert_close(plain, transposed, rtol=1e-12, atol=1e-12)


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
        DistributedShampoo([{"params": [torch.nn.Parameter(torch.zeros(8, 4))], "n_stacked": 3}], lr=0.02)
