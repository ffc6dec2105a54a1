"""Ranks share the work of an optimizer: who owns what, and that together they do what one does."""

import copy
import queue
import random
import threading
from functools import partial

import pytest
import torch
from test_model import GPT2, MODERN, make_model

from nanorun.optim.build import build_optimizers, find_algorithm
from nanorun.optim.ownership import Item, Sharing, assign_owners

OPTIONS = {
    "muon": {"lr": 0.02, "momentum_warmup_steps": 3},
    "normuon": {"lr": 0.02},
    "shampoo": {"lr": 0.1, "precondition_frequency": 2},
    "soap": {"lr": 0.01, "precondition_frequency": 2},
    "caspr": {"lr": 0.01, "precondition_frequency": 2, "start_preconditioning_step": 1},
    "distributed_shampoo": {"lr": 0.01, "precondition_frequency": 2},
}
SHARED = pytest.mark.parametrize("name", OPTIONS)


def tables(name):
    own = {"name": name, **OPTIONS[name]}
    everywhere = "embedding" in find_algorithm(name).roles
    return {"default": own} if everywhere else {"matrix": own, "default": {"name": "adamw", "lr": 0.01}}


class Post:
    """Carries tensors and things between ranks that are threads of this process."""

    def __init__(self, n_ranks):
        self.boxes = {(source, to): queue.Queue() for source in range(n_ranks) for to in range(n_ranks)}
        self.sent = [[] for _ in range(n_ranks)]
        self.n_ranks = n_ranks


class Threaded:
    def __init__(self, rank, post):
        self.rank, self.post, self.n_ranks = rank, post, post.n_ranks

    def broadcast(self, tensor, source):
        self.post.sent[self.rank].append((source, tensor.numel()))
        if self.rank == source:
            for to in range(self.n_ranks):
                self.post.boxes[source, to].put(tensor.clone())
        return Arriving(tensor, self.post.boxes[source, self.rank])

    def gather(self, thing):
        for to in range(self.n_ranks):
            self.post.boxes[self.rank, to].put(thing)
        return [self.post.boxes[source, self.rank].get(timeout=20) for source in range(self.n_ranks)]


class Arriving:
    def __init__(self, tensor, box):
        self.tensor, self.box = tensor, box

    def wait(self):
        self.tensor.copy_(self.box.get(timeout=20))


def on_ranks(n_ranks, work):
    """Return what `work(peers)` returns on each of `n_ranks` threads, by rank, and their post."""
    post, results, errors = Post(n_ranks), [None] * n_ranks, []

    def run(rank):
        try:
            results[rank] = work(Threaded(rank, post))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(n_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results, post


def set_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = 1e-2 * torch.randn(parameter.shape, generator=generator)


def trained(peers, name, config=MODERN, steps=range(5), saved=None, skip=None):
    model = make_model(config)
    optimizers = build_optimizers(model, tables(name), peers=peers)
    if saved is not None:
        model.load_state_dict(saved[0])
        # A copy, because torch takes tensors over as they are and these ranks share their memory.
        optimizers.load_state_dict(copy.deepcopy(saved[1]))
    for step in steps:
        set_gradients(model, step)
        optimizers.step(skip)
        optimizers.zero_grad()
    return model, optimizers


def assert_alike(one, other):
    """The same containers with the same numbers; the order of a stack moves their rounding alone."""
    if isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_alike(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other):
            assert_alike(left, right)
    else:
        assert one == other


def owners_of(costs, kinds, n_ranks, sizes=None):
    return assign_owners([Item(*item) for item in zip(costs, sizes or costs, kinds, strict=True)], n_ranks)


def test_owners_bear_alike_and_are_the_same_on_every_call():
    numbers = random.Random(0)
    for _ in range(200):
        n_ranks, n_items = numbers.randint(1, 9), numbers.randint(0, 40)
        costs = [float(numbers.choice([1, 3, 4, 16, 50])) for _ in range(n_items)]
        kinds = [(cost, numbers.randint(0, 1)) for cost in costs]
        owners = owners_of(costs, kinds, n_ranks)
        assert owners == owners_of(list(costs), list(kinds), n_ranks)
        assert all(0 <= owner < n_ranks for owner in owners)
        loads = [sum(cost for cost, owner in zip(costs, owners) if owner == rank) for rank in range(n_ranks)]
        # What the most loaded one bears beyond the mean is one item's at most.
        assert max(loads) <= sum(costs) / n_ranks + max(costs, default=0.0) * (1 - 1 / n_ranks) + 1e-9


def test_one_item_a_rank_where_there_are_as_many_and_none_for_the_rest_where_there_are_fewer():
    assert sorted(owners_of([5.0, 1.0, 3.0], "abc", 3)) == [0, 1, 2]
    assert sorted(owners_of([5.0, 1.0, 3.0], "abc", 8)) == [0, 1, 2]
    assert owners_of([], [], 2) == []


def test_items_of_one_kind_stay_together_where_that_burdens_nobody_more():
    costs = [4.0] * 4 + [4.0] * 4 + [3.0] * 4 + [1.0] * 4
    kinds = ["fc"] * 4 + ["proj2"] * 4 + ["qkv"] * 4 + ["proj"] * 4
    owners = owners_of(costs, kinds, 2)
    assert len(set(owners[:4])) == len(set(owners[4:8])) == 1
    assert sum(cost for cost, owner in zip(costs, owners) if owner == 0) == 24.0
    # Three alike on one of two ranks would burden it more than two.
    assert sorted(owners_of([2.0] * 4, "aaaa", 2)) == [0, 0, 1, 1]
    assert len(set(owners_of([2.0, 2.0, 1.0, 1.0, 1.0, 1.0], "aabbbb", 2)[:2])) == 1


def test_kinds_of_one_cost_are_parted_where_one_takes_more_room_than_the_other():
    owners = owners_of([2.0] * 4, "aabb", 2, sizes=[5, 5, 1, 1])
    assert len(set(owners[:2])) == len(set(owners[2:])) == 2
    assert len(set(owners_of([2.0] * 4, "aabb", 2, sizes=[3] * 4)[:2])) == 1


@SHARED
@pytest.mark.parametrize("n_ranks", [2, 4])
def test_ranks_together_do_what_one_does_and_hold_its_state_once(name, n_ranks):
    model, optimizers = trained(None, name)
    whole, whole_bytes = optimizers.state_dict(), optimizers.state_bytes()
    shared_bytes = sum(
        tensor.nbytes
        for optimizer in optimizers.optimizers
        if hasattr(optimizer, "cost_of")
        for state in optimizer.state.values()
        for tensor in state.values()
    )

    def work(peers):
        mine, theirs = trained(peers, name)
        own_bytes = theirs.state_bytes()
        return mine.state_dict(), own_bytes, theirs.state_dict(), theirs.state_bytes()

    results, post = on_ranks(n_ranks, work)
    assert post.sent == [post.sent[0]] * n_ranks
    for weights, _, _, counted in results:
        assert_alike(dict(model.state_dict()), dict(weights))
        assert counted == whole_bytes
    assert_alike(whole, results[0][2])
    replicated = whole_bytes - shared_bytes
    assert sum(own - replicated for _, own, _, _ in results) == shared_bytes
    assert max(own - replicated for _, own, _, _ in results) < shared_bytes


@SHARED
@pytest.mark.parametrize("n_ranks", [1, 3, 4])
def test_what_two_ranks_saved_goes_on_on_any_number(name, n_ranks):
    model, _ = trained(None, name)

    def saved(peers):
        model, optimizers = trained(peers, name, steps=range(3))
        return model.state_dict(), optimizers.state_dict()

    (first, _), _ = on_ranks(2, saved)
    if n_ranks == 1:
        resumed = [trained(None, name, steps=range(3, 5), saved=first)[0].state_dict()]
    else:
        resumed, _ = on_ranks(
            n_ranks, lambda peers: trained(peers, name, steps=range(3, 5), saved=first)[0].state_dict()
        )
    for weights in resumed:
        assert_alike(dict(model.state_dict()), dict(weights))


@SHARED
def test_a_skipped_step_sends_the_same_and_changes_nothing(name):
    def work(peers):
        model, optimizers = trained(peers, name, steps=range(2))
        before = {key: value.clone() for key, value in model.state_dict().items()}
        count = len(peers.post.sent[peers.rank])
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float("nan"))
        optimizers.step(torch.tensor(True))
        return before, model.state_dict(), peers.post.sent[peers.rank][count // 2 :]

    results, _ = on_ranks(2, work)
    for before, after, sent in results:
        assert len(sent) > 0
        assert sent[: len(sent) // 2] == sent[len(sent) // 2 :]
        for key in before:
            assert torch.equal(before[key], after[key])


def test_a_step_that_sends_nothing_leaves_others_parameters_alone():
    def work(peers):
        model = make_model(MODERN)
        optimizers = build_optimizers(model, tables("shampoo"), peers=peers)
        before = {id(p): p.detach().clone() for p in model.parameters()}
        set_gradients(model, 0)
        optimizers.step(send=False)
        moved = {id(p): not torch.equal(p, before[id(p)]) for p in model.parameters()}
        return all(moved[id(p)] == optimizers.sharing.owns(p) for p in model.parameters())

    results, post = on_ranks(2, work)
    assert results == [True, True]
    assert post.sent == [[], []]


def test_more_ranks_than_matrices_leave_some_without_any():
    def work(peers):
        model = make_model(GPT2)
        optimizers = build_optimizers(model, tables("muon"), peers=peers)
        set_gradients(model, 0)
        optimizers.step()
        muon = optimizers.sharing.shared[0]
        return model.state_dict(), len(muon.state)

    results, _ = on_ranks(11, work)
    counts = [count for _, count in results]
    assert sum(counts) == 8
    assert counts.count(0) >= 3
    for weights, _ in results[1:]:
        for key, value in weights.items():
            assert torch.equal(value, results[0][0][key])


def test_table_groups_and_scales_know_the_whole_on_every_rank():
    one = build_optimizers(make_model(GPT2), tables("muon"))
    shared = build_optimizers(make_model(GPT2), tables("muon"), peers=Threaded(1, Post(3)))
    shared.set_scale(0.5)
    one.set_scale(0.5)
    assert shared.table() == one.table()
    assert [p.shape for p in shared.parameters()] == [p.shape for p in one.parameters()]
    assert [group["lr"] for group in shared.groups()] == [group["lr"] for group in one.groups()]


def test_algorithms_whose_steps_are_cheap_or_whose_parameters_depend_on_each_other_are_not_shared():
    weights = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    for name in ("adamw", "prodigy", "schedulefree_adamw", "nadamw"):
        algorithm = find_algorithm(name)
        optimizer = algorithm.cls(weights, **algorithm.options({"lr": 0.1}))
        sharing = Sharing([optimizer], Threaded(0, Post(2)))
        assert sharing.shared == []


@SHARED
def test_costs_grow_with_the_matrix_and_are_of_both_its_directions(name):
    algorithm = find_algorithm(name)
    group = algorithm.cls(
        [torch.nn.Parameter(torch.ones(4, 4))], **algorithm.options(OPTIONS[name])
    ).param_groups[0]
    cost = algorithm.cls.cost_of
    assert cost(group, 64, 64) < cost(group, 64, 256) == pytest.approx(cost(group, 256, 64))
    # Products of matrices: eight times where both sides double.
    assert 7 < cost(group, 512, 256) / cost(group, 256, 128) < 8.1


def test_shampoos_long_sides_and_vectors_cost_what_a_diagonal_costs():
    shampoo = find_algorithm("shampoo").cls
    group = shampoo([torch.nn.Parameter(torch.ones(4, 4))], lr=0.1, max_preconditioner_dim=100).param_groups[
        0
    ]
    assert shampoo.cost_of(group, 1000, 1) == 1000
    assert shampoo.cost_of(group, 200, 200) == 200 * 200
    assert shampoo.cost_of(group, 200, 50) > 200 * 50


def test_muons_parameters_travel_while_adamw_steps():
    events = []

    class Noting:
        rank, n_ranks = 0, 2

        def broadcast(self, tensor, source):
            events.append(f"sent by {source}")
            return self

        def wait(self):
            events.append("waited")

    def noted(name, step):
        events.append(name)
        step()

    model = make_model(MODERN)
    optimizers = build_optimizers(model, tables("muon"), peers=Noting())
    for name, optimizer in zip(optimizers.names, optimizers.optimizers):
        optimizer.step = partial(noted, name, optimizer.step)
    set_gradients(model, 0)
    optimizers.step()
    assert events[0] == "muon"
    assert sorted(events[1:3]) == ["sent by 0", "sent by 1"]
    assert events[3:] == ["adamw", "waited", "waited"]
