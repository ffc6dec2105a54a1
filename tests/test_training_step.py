"""One step: the same however it is cut, bounded, harmless when not finite, with masters that keep fp32."""

import copy
import math
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanorun import kernels
from nanorun.data.batches import token_set
from nanorun.errors import UserError
from nanorun.model import GPT
from nanorun.optim.build import build_optimizers
from nanorun.training import setup
from nanorun.training.checkpoint import weights_sha256
from nanorun.training.distributed import Ranks
from nanorun.training.feed import Span
from nanorun.training.step import Stepper


def losses(stepper, n_steps=8):
    return [float(stepper.step(step, 1.0).loss) for step in range(n_steps)]


def gradients_at_the_update(stepper, monkeypatch):
    """Return a list that fills with the gradients as the optimizers get to see them, flat, step by step."""
    seen = []
    real = stepper.optimizers.step

    def watching(skip=None, **options):
        seen.append(torch.cat([p.grad.flatten().clone() for p in stepper.optimizers.parameters()]))
        real(skip=skip, **options)

    monkeypatch.setattr(stepper.optimizers, "step", watching)
    return seen


@pytest.mark.parametrize("rows", [1, 3, 5, 7])
def test_any_split_into_micro_batches_gives_the_same_losses(make_stepper, rows):
    whole = losses(make_stepper("train.micro_batch_rows=8"))
    assert losses(make_stepper(f"train.micro_batch_rows={rows}")) == pytest.approx(whole, abs=1e-5)
    assert whole[-1] < whole[0]


def test_micro_batches_add_up_to_the_gradient_of_the_mean_loss(make_stepper, monkeypatch):
    stepper = make_stepper("train.micro_batch_rows=3")
    seen = gradients_at_the_update(stepper, monkeypatch)
    losses(stepper, 3)
    model = copy.deepcopy(stepper.model)
    result = stepper.step(4, 1.0)
    loss_sum, n_predicted = model(*stepper.batch(4, 0, 8))
    (loss_sum / n_predicted).backward()
    names = [name for name, p in stepper.model.named_parameters()]
    by_id = {id(p): name for name, p in stepper.model.named_parameters()}
    order = [by_id[id(p)] for p in stepper.optimizers.parameters()]
    assert sorted(order) == sorted(names)
    wanted = torch.cat([dict(model.named_parameters())[name].grad.flatten() for name in order])
    torch.testing.assert_close(seen[3], wanted, atol=1e-6, rtol=1e-4)
    assert float(result.loss) == pytest.approx(loss_sum.item() / n_predicted.item(), abs=1e-5)
    assert float(result.grad_norm) == pytest.approx(float(wanted.norm()), rel=1e-4)


@pytest.mark.parametrize("preset", ["muon", "adamw"])
def test_clipping_bounds_the_gradient_and_keeps_its_direction(make_stepper, monkeypatch, preset):
    clipped, free = (
        make_stepper("train.grad_clip=0.05", preset=preset),
        make_stepper("train.grad_clip=0", preset=preset),
    )
    seen_clipped = gradients_at_the_update(clipped, monkeypatch)
    seen_free = gradients_at_the_update(free, monkeypatch)
    results = [stepper.step(0, 1.0) for stepper in (clipped, free)]
    assert float(results[0].grad_norm) == float(results[1].grad_norm) > 0.05
    assert float(seen_clipped[0].norm()) == pytest.approx(0.05, rel=1e-4)
    assert float(torch.cosine_similarity(seen_clipped[0], seen_free[0], dim=0)) == pytest.approx(1, abs=1e-5)


def test_clipping_leaves_a_small_gradient_alone(make_stepper, monkeypatch):
    clipped, free = make_stepper("train.grad_clip=1000.0"), make_stepper("train.grad_clip=0")
    seen_clipped = gradients_at_the_update(clipped, monkeypatch)
    seen_free = gradients_at_the_update(free, monkeypatch)
    clipped.step(0, 1.0), free.step(0, 1.0)
    assert torch.equal(seen_clipped[0], seen_free[0])


def state_bytes(stepper):
    found = []
    for optimizer in stepper.optimizers.optimizers:
        for state in optimizer.state_dict()["state"].values():
            found += [
                (k, v.numpy().tobytes() if isinstance(v, torch.Tensor) else v)
                for k, v in sorted(state.items())
            ]
    return found


@pytest.mark.parametrize("preset", ["muon", "adamw"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_moves_neither_weights_nor_state(
    make_stepper, monkeypatch, preset, value
):
    stepper = make_stepper("train.grad_clip=1.0", preset=preset)
    losses(stepper, 3)
    weights, state = weights_sha256(stepper.model), state_bytes(stepper)
    real = Stepper.backward

    def poisoned(self, idx_BT, targets_BT):
        loss_sum = real(self, idx_BT, targets_BT)
        next(iter(self.model.parameters())).grad[0, 0] = value
        return loss_sum

    monkeypatch.setattr(Stepper, "backward", poisoned)
    result = stepper.step(3, 1.0)
    assert bool(result.bad)
    assert weights_sha256(stepper.model) == weights
    assert state_bytes(stepper) == state
    monkeypatch.setattr(Stepper, "backward", real)
    assert not bool(stepper.step(4, 1.0).bad)
    assert weights_sha256(stepper.model) != weights


def test_a_loss_that_is_not_finite_is_flagged_though_gradients_are(make_stepper, monkeypatch):
    stepper = make_stepper()
    weights = weights_sha256(stepper.model)
    real = Stepper.backward
    monkeypatch.setattr(Stepper, "backward", lambda self, *pair: real(self, *pair) * float("nan"))
    assert bool(stepper.step(0, 1.0).bad)
    assert weights_sha256(stepper.model) == weights


@pytest.mark.parametrize("preset", ["muon", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "bf16_master"])
def test_a_warm_up_leaves_no_trace(make_stepper, preset, precision):
    cold = make_stepper(f"train.precision={precision}", preset=preset)
    warm = make_stepper(f"train.precision={precision}", preset=preset)
    before = weights_sha256(warm.model)
    warm.warm_up()
    assert weights_sha256(warm.model) == before
    assert losses(warm, 4) == losses(cold, 4)
    assert weights_sha256(warm.model) == weights_sha256(cold.model)


REHEARSED = {
    "muon": ["train.grad_clip=1.0"],
    "soap": ["optim.matrix.name=soap", "optim.matrix.lr=0.003", "optim.matrix.precondition_frequency=2"],
    "prodigy": ["optim.default.name=prodigy", "optim.default.lr=1.0"],
    "schedule-free": ["optim.default.name=schedulefree_adamw", "optim.default.lr=0.005"],
    "sparse tables": [
        "model.ngrams=[2,3]",
        "model.ngram_buckets=4096",
        "optim.table.name=sparse_adam",
        "optim.table.lr=0.01",
    ],
}


@pytest.mark.parametrize("settings", REHEARSED.values(), ids=list(REHEARSED))
def test_warm_ups_rehearsed_together_leave_no_trace(make_stepper, settings):
    cold, warm = make_stepper(*settings), make_stepper(*settings)
    before = weights_sha256(warm.model)
    with warm.rehearsing():
        for _ in range(5):
            warm.warm_up()
        assert weights_sha256(warm.model) != before
    assert weights_sha256(warm.model) == before
    assert losses(warm, 4) == losses(cold, 4)
    assert weights_sha256(warm.model) == weights_sha256(cold.model)


def test_only_the_first_warm_up_runs_every_shape_and_new_code_or_smaller_micro_batches_run_them_again(
    make_stepper, monkeypatch
):
    stepper = make_stepper("train.length_schedule=[16, 32, 64]", "train.micro_batch_rows=3")
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    every = [(n_rows * 64 // length, length) for n_rows in (3, 2) for length in (16, 32, 64)]
    shapes = []

    def met():
        shapes.clear()
        stepper.warm_up()
        return [tuple(shape) for shape in shapes]

    with stepper.working.register_forward_pre_hook(lambda _, pair: shapes.append(pair[0].shape)):
        with stepper.rehearsing():
            assert met() == every
            assert met() == met() == [(6, 32)]
            stepper.compile()
            assert met() == every
            assert met() == [(6, 32)]
        stepper.forget_compiled()
        assert met() == every
        stepper.micro_batch_rows = 2
        assert met() == [(2 * 64 // length, length) for length in (16, 32, 64)]


def test_more_shapes_than_torch_has_graphs_for_are_all_compiled_and_its_limit_stays(
    make_stepper, monkeypatch
):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    stepper = make_stepper("train.length_schedule=[4, 8, 16, 32, 64]", "train.micro_batch_rows=3")
    limit = torch._dynamo.config.recompile_limit
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        stepper.compile()
        try:
            stepper.warm_up()
            assert len(graphs) == 10 > limit
            stepper.step(0, 1.0)
            assert len(graphs) == 10
        finally:
            torch._dynamo.reset()
    assert torch._dynamo.config.recompile_limit == limit


def no_memory_on_cuda():
    raise torch.OutOfMemoryError("CUDA out of memory")


def no_memory_on_the_cpu():
    torch.empty(2**55, dtype=torch.uint8)


@pytest.mark.parametrize("run_out", [no_memory_on_cuda, no_memory_on_the_cpu])
def test_a_warm_up_that_runs_out_of_memory_halves_the_micro_batch(make_stepper, monkeypatch, run_out):
    real = Stepper.backward

    def small(self, idx_BT, targets_BT):
        if len(idx_BT) > 2:
            run_out()
        return real(self, idx_BT, targets_BT)

    monkeypatch.setattr(Stepper, "backward", small)
    stepper = make_stepper("train.micro_batch_rows=8")
    stepper.warm_up()
    assert stepper.micro_batch_rows == 2
    assert "8 rows do not fit the memory at once: 2 are taken at a time" in stepper.halved
    assert "the same 512 tokens a step" in stepper.halved
    assert losses(stepper, 3) == pytest.approx(losses(make_stepper("train.micro_batch_rows=1"), 3), abs=1e-5)


def test_a_row_that_fits_no_memory_is_an_error_that_says_what_helps(make_stepper, monkeypatch):
    def full(self, idx_BT, targets_BT):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Stepper, "backward", full)
    with pytest.raises(UserError, match=r"not one row fits .* --checkpoint-activations block"):
        make_stepper().warm_up()


def test_bf16_masters_stay_fp32_and_the_copy_is_their_rounding(make_stepper):
    stepper = make_stepper("train.precision=bf16_master")
    losses(stepper, 3)
    assert {p.dtype for p in stepper.model.parameters()} == {torch.float32}
    assert {p.dtype for p in stepper.working.parameters()} == {torch.bfloat16}
    for master, low in zip(stepper.model.parameters(), stepper.working.parameters(), strict=True):
        assert torch.equal(master.bfloat16(), low)
    assert any(not torch.equal(p.bfloat16().float(), p) for p in stepper.model.parameters())


def test_bf16_masters_add_up_updates_below_a_bf16_step(make_stepper):
    stepper = make_stepper("train.precision=bf16_master", preset="adamw")
    losses(stepper, 3)
    masters = [p.detach().clone() for p in stepper.model.parameters()]
    copies = [p.detach().clone() for p in stepper.working.parameters()]
    stepper.step(3, 1e-4)
    moved = [(p != old).float().mean() for p, old in zip(stepper.model.parameters(), masters)]
    seen = [(p != old).float().mean() for p, old in zip(stepper.working.parameters(), copies)]
    assert (
        min(moved[1:]) > 0.9
    )  # not every character is in a step: the embedding, which comes first, moves less
    assert max(seen) < 0.2


def test_bf16_masters_follow_fp32(make_stepper):
    low, full = (
        losses(make_stepper("train.precision=bf16_master")),
        losses(make_stepper("train.precision=fp32")),
    )
    assert low == pytest.approx(full, abs=0.02)


@pytest.mark.parametrize(
    ("arch", "way"), [("modern", "block"), ("modern", "selective"), ("gpt2", "selective")]
)
def test_recomputing_activations_gives_the_same_bits_even_with_dropout(make_stepper, arch, way):
    settings = (f"model.arch={arch}", "model.dropout=0.2")
    plain = make_stepper(*settings)
    recomputed = make_stepper(*settings, f"train.checkpoint_activations={way}")
    assert losses(plain, 4) == losses(recomputed, 4)
    assert weights_sha256(plain.model) == weights_sha256(recomputed.model)


def test_dropout_depends_on_seed_and_step_alone(make_stepper):
    one, other, without = make_stepper("model.dropout=0.3"), make_stepper("model.dropout=0.3"), make_stepper()
    losses(one, 3)
    for stepper in (other, without):
        stepper.model.load_state_dict(one.model.state_dict())
    first = float(one.step(5, 0.0).loss)
    torch.rand(17)
    assert float(other.step(5, 0.0).loss) == first
    assert float(without.step(5, 0.0).loss) != first


class Apart(Ranks):
    """One of several ranks that never meet, so that what each adds can be seen."""

    def start_sum(self, tensor):
        return SimpleNamespace(wait=lambda: None)


def added_up(steppers, step, monkeypatch):
    """Return loss and gradients of a step, those of the ranks added up, before any update."""
    monkeypatch.setattr(Stepper, "update", lambda self, loss, scale, votes: loss)
    loss = sum(float(stepper.step(step, 1.0)) for stepper in steppers)
    grads = [[p.grad.clone() for p in stepper.model.parameters()] for stepper in steppers]
    for stepper in steppers:
        stepper.optimizers.zero_grad()
    return loss, [sum(shares) for shares in zip(*grads, strict=True)]


@pytest.mark.parametrize(
    "asked", ["model.arch=modern", "model.arch=gpt2", "train.length_schedule=[32, 16, 64]"]
)
def test_every_split_of_a_step_into_ranks_and_micro_batches_drops_the_same(make_stepper, monkeypatch, asked):
    # Projections that begin at 0 would hide all that is dropped in the blocks.
    settings = [asked, "model.dropout=0.3", "model.zero_init_projections=false"]
    whole = make_stepper(*settings, "train.micro_batch_rows=8")
    loss, grads = added_up([whole], 3, monkeypatch)
    assert abs(added_up([whole], 4, monkeypatch)[0] - loss) > 1e-3
    assert any(float(grad.abs().max()) > 1e-3 for grad in grads)
    for n_ranks, rows in [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)]:
        size = f"train.micro_batch_rows={rows}"
        steppers = [
            make_stepper(*settings, size, ranks=Apart(rank, n_ranks, rank)) for rank in range(n_ranks)
        ]
        split, split_grads = added_up(steppers, 3, monkeypatch)
        assert split == pytest.approx(loss, abs=1e-5)
        for one, other in zip(split_grads, grads, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)


def test_a_length_schedule_cuts_the_rows_of_a_step_and_changes_none_of_its_tokens(make_stepper):
    stepper = make_stepper("train.length_schedule=[16, 32, 64]", "train.micro_batch_rows=3")
    for step, length in enumerate((16, 16, 32, 32, 64, 64)):
        model, shapes = copy.deepcopy(stepper.model), []
        with stepper.working.register_forward_pre_hook(lambda _, pair: shapes.append(pair[0].shape)):  # noqa: B023
            loss = float(stepper.step(step, 1.0).loss)
        assert [tuple(shape) for shape in shapes] == [(rows * 64 // length, length) for rows in (3, 3, 2)]
        loss_sum, n_predicted = model(*(rows.view(-1, length) for rows in stepper.batch(step, 0, 8)))
        assert loss == pytest.approx(loss_sum.item() / n_predicted.item(), abs=1e-5)


def test_a_run_taken_up_does_not_say_that_its_smaller_micro_batch_is_for_want_of_memory(
    make_stepper, monkeypatch
):
    stepper = make_stepper("train.micro_batch_rows=8")
    run = SimpleNamespace(config=stepper.config, stepper=stepper, device=torch.device("cuda"))
    choices = {"micro_batch_rows": 2, "compiled": False, "kernels": True}
    monkeypatch.setattr(setup, "check_state", lambda *given, **named: None)
    assert setup.choose_as_before(run, SimpleNamespace(state={"choices": choices}, path="")) == "off"
    assert (stepper.micro_batch_rows, stepper.halved) == (2, "")


@pytest.mark.skipif(kernels.library() is None, reason="no C compiler here")
def test_a_stepper_says_whether_its_blocks_are_fused_at_every_length(make_stepper):
    assert make_stepper("model.context_len=64").is_fused()
    assert make_stepper("model.context_len=64", "train.length_schedule=[16,64]").is_fused()
    for other in ("train.length_schedule=[8,64]", "train.precision=bf16", "train.precision=bf16_master"):
        assert not make_stepper("model.context_len=64", other).is_fused()


def test_pieces_of_two_lengths_share_no_mask(make_stepper):
    stepper = make_stepper("train.length_schedule=[16, 64]", "model.dropout=0.3")
    rows = torch.zeros(64, 64, dtype=torch.int64)
    short, long = (stepper._cut(length, Span(0, 64), (rows, rows))[2] for length in (16, 64))
    assert (len(short), len(long)) == (256, 64)
    assert len(torch.cat([short, long]).unique()) == 320


@pytest.mark.slow
def test_dropout_compiled_has_the_losses_of_dropout_as_written(make_stepper):
    settings = ("model.dropout=0.3", "model.zero_init_projections=false")
    written, compiled = make_stepper(*settings), make_stepper(*settings)
    compiled.forward = torch.compile(compiled.working, dynamic=False)
    found = losses(compiled, 1)
    with torch.compiler.set_stance("fail_on_recompile"):
        found += [float(compiled.step(step, 1.0).loss) for step in range(1, 6)]
    assert found == pytest.approx(losses(written, 6), abs=1e-4)


def test_ranks_take_disjoint_shares_of_the_rows_of_one(make_stepper):
    whole = make_stepper().batch(3, 0, 8)[0]
    shares = [make_stepper(ranks=Ranks(rank, 2, rank)).batch(3, 0, 4)[0] for rank in (0, 1)]
    assert torch.equal(torch.cat(shares), whole)


def test_ranks_that_do_not_divide_the_rows_are_refused(make_stepper):
    with pytest.raises(UserError, match=r"8 rows, which 3 ranks can't share evenly: start a number of ranks"):
        make_stepper(ranks=Ranks(0, 3, 0))


def test_a_vocabulary_of_70000_trains(make_stepper):
    """Its tokens are kept as uint32."""
    small = make_stepper("train.batch_tokens=128")
    model = GPT(small.config.model, 70_000)
    model.initialise(0)
    optimizers = build_optimizers(model, small.config.optim_by_role)
    numbers = np.random.default_rng(0).integers(0, 70_000, 3000)
    tokens = token_set([np.minimum(numbers, np.roll(numbers, 1)).astype(np.uint32)])
    assert int(tokens.slice(0, 3000).max()) > 2**16
    stepper = Stepper(model, optimizers, tokens, small.config, device=small.device, ranks=small.ranks)
    found = losses(stepper, 3)
    stepper.close()
    assert found[0] == pytest.approx(math.log(70_000), abs=0.5)
    assert found[-1] < found[0]


def test_steps_with_kernels_dropout_and_ngrams_import_no_compiler():
    code = """if True:
        import sys, torch
        from nanorun.config import resolve
        from nanorun.data.batches import token_set
        from nanorun.model import GPT
        from nanorun.optim.build import build_optimizers
        from nanorun.tracks import load_track
        from nanorun.training.distributed import Ranks
        from nanorun.training.step import Stepper
        settings = ["model.dropout=0.1", "train.batch_tokens=64", "train.micro_batch_rows=2", "model.ngram_buckets=64"]
        config = resolve(load_track("shakespeare-sprint"), "ngram", settings)
        model = GPT(config.model, 65)
        optimizers = build_optimizers(model, config.optim_by_role)
        tokens = token_set([torch.arange(500).numpy() % 65])
        stepper = Stepper(model, optimizers, tokens, config, device=torch.device("cpu"), ranks=Ranks())
        stepper.warm_up()
        stepper.step(0, 1.0)
        stepper.close()
        sys.exit("torch._dynamo" in sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True)
