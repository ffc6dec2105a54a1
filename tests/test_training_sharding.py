"""A model that is shared out over ranks trains as one in one piece, and each rank holds its share alone."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from optim_samples import largest_difference, parameters_of, set_pulling_grads

from nanorun.errors import UserError
from nanorun.optim.build import algorithms, create, find_algorithm
from nanorun.training import checkpoint, sharding

WORKER = Path(__file__).with_name("sharding_worker.py")
EMA = ["average.kind=ema", "average.every_steps=1"]
QUEUE = ["average.kind=queue", "average.every_steps=1", "average.snapshots=2"]
GPT2 = "model.arch=gpt2"
"""Learned positions, one matrix for embedding and head, and vectors: norms and biases."""
TOO_SMALL = "model.n_embd=2"
TWO_RANKS = [
    ["adamw", []],
    ["muon", ["train.compile=on"]],
    ["adamw", ["optim.default.name=schedulefree_adamw", "optim.default.lr=0.01", "model.dropout=0.1"]],
]
FOUR_RANKS = [
    ["adamw", [GPT2, *EMA, "train.checkpoint_activations=block"]],
    ["muon", [GPT2, *QUEUE, "optim.default.name=nadamw", "optim.default.lr=0.01"]],
    # Fewer rows than ranks, and one whole parameter, so that three ranks own none.
    ["adamw", [GPT2, "model.n_head=1", TOO_SMALL]],
    ["adamw", ["optim.head.name=amos", "optim.head.lr=0.01"]],
    ["muon", ["optim.matrix.name=distributed_shampoo", "optim.matrix.lr=0.003", "model.dropout=0.1"]],
]
IN_BF16 = [
    ["adamw", ["train.precision=bf16"]],
    ["adamw", ["train.precision=bf16", GPT2]],
    ["adamw", ["train.precision=bf16_master"]],
]


def launched(n_ranks, words, folder=None):
    """Return the finished process of a program under torchrun; of one alone where `n_ranks` is 1."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(n_ranks)] if n_ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # gloo has been seen to abort a rank (SIGABRT) while it leaves; what is claimed here is of whole runs.
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, *launcher, *words],
            capture_output=True,
            text=True,
            cwd=folder,
            env=environment,
            timeout=180,
        )
        if "exitcode: -6" not in done.stderr:
            break
    return done


def told_by(n_ranks, cases):
    done = launched(n_ranks, [str(WORKER), json.dumps(cases)])
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(told) == len(cases)
    return told


def check_alike(told, tolerance):
    """Assert that the sharded model started, trained, was judged and saved as the one in one piece."""
    assert told["same_start"]
    for found, wanted in zip(told["sharded"], told["one"], strict=True):
        assert found == pytest.approx(wanted, abs=tolerance)
    assert told["weights_apart"] < 10 * tolerance
    assert told["state_apart"] < 10 * tolerance
    assert told["judged_apart"] < 10 * tolerance
    for found in told["last"]:
        assert found == pytest.approx(told["last"][0], abs=tolerance)


def check_shares(told, n_ranks):
    """Assert that weights, gradients and state of each rank are about one part in `n_ranks` of the whole."""
    weights, state = told["bytes_of_one"]
    # Rows do not always divide evenly, and a matrix is owned whole.
    assert max(told["bytes"]["weights"]) < 1.05 * weights / n_ranks
    assert told["bytes"]["gradients"] == told["bytes"]["weights"]
    assert max(told["bytes"]["state"]) < 1.2 * state / n_ranks
    assert sum(told["bytes"]["owned"]) <= weights
    assert told["bytes_of_all"] == state


@pytest.mark.slow
def test_a_model_on_two_ranks_trains_is_judged_and_saved_as_one_in_one_piece():
    told = told_by(2, [*TWO_RANKS, *IN_BF16])
    assert [case["compiled"] for case in told[:2]] == [False, True]
    for case in told[: len(TWO_RANKS)]:
        check_alike(case, 2e-6)
        check_shares(case, 2)
    for case in told[len(TWO_RANKS) :]:
        assert case["same_start"]
        for found, wanted in zip(case["sharded"], case["one"], strict=True):
            assert found == pytest.approx(wanted, abs=2e-3)
        for found in case["last"]:
            assert found == pytest.approx(case["last"][0], abs=5e-3)


@pytest.mark.slow
def test_a_model_on_four_ranks_trains_is_judged_and_saved_as_one_in_one_piece():
    for (_, settings), case in zip(FOUR_RANKS, told_by(4, FOUR_RANKS), strict=True):
        check_alike(case, 2e-6)
        if TOO_SMALL not in settings:
            check_shares(case, 4)


STOP_IN_THIRD_STEP = """
import signal
from nanorun.training.step import Stepper
real = Stepper.step
def step(self, n, scale, **options):
    if n == 2:
        signal.raise_signal(signal.SIGTERM)
    return real(self, n, scale, **options)
Stepper.step = step
from nanorun.cli import main
main()
"""


@pytest.mark.slow
def test_a_run_goes_from_two_ranks_to_one_and_to_two_again(
    tmp_path, tiny_settings, shakespeare_folder, nanorun, stop_in_step
):
    (tmp_path / "stopped.py").write_text(STOP_IN_THIRD_STEP)
    settings = [*tiny_settings, *QUEUE, "train.shard=fsdp", "model.n_layer=2"]
    words = [
        "train",
        "--track",
        "shakespeare-sprint",
        "--json",
        "--no-record",
        "--data",
        str(shakespeare_folder),
    ]
    words += [word for setting in settings for word in ("--set", setting)]
    code, whole, err = nanorun(*words)
    assert code == 0, err
    stopped = launched(2, ["stopped.py", *words, "--run-name", "stopped"], tmp_path)
    folder = tmp_path / "runs/stopped"
    saved = [path.name for path in checkpoint.checkpoints(folder / "checkpoints")]
    # The ranks' votes to stop travel with the next step's gradients.
    assert saved == ["step-00000004"], stopped.stderr[-3000:]
    stop_in_step(5)
    code, _, err = nanorun("train", "--resume", folder, "--allow-inexact")
    assert code == 75, err
    assert "stopped after step 5 of 6" in err
    done = launched(
        2, ["-m", "nanorun", "train", "--resume", str(folder), "--json", "--allow-inexact"], tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    wanted, found = json.loads(whole), json.loads(done.stdout)
    assert found["final_val_loss"] == pytest.approx(wanted["final_val_loss"], abs=1e-5)
    assert found["initial_weights_sha256"] == wanted["initial_weights_sha256"]


def options_of(name):
    """Return what an algorithm must be told beside its defaults."""
    return {"lr": 0.01} if find_algorithm(name).table["lr"].default == "required" else {}


def units():
    return {name: getattr(find_algorithm(name).module, "UNIT", None) for name in algorithms()}


make_parameters = parameters_of([(6, 4), (6, 4), (5, 4)], torch.float32)


def stepped(name, groups, gradients_of, n_steps=3):
    """Step one optimizer per group of tensors, each with the gradients that belong to it."""
    optimizers = [create(name, [{"params": group, "role": "matrix"}], **options_of(name)) for group in groups]
    for step in range(n_steps):
        gradients_of(step)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("name", [name for name, unit in units().items() if unit == "entry"])
def test_an_algorithm_that_treats_each_entry_by_itself_may_be_given_any_rows(name):
    wholes, others = make_parameters(), make_parameters()
    cut = [[torch.nn.Parameter(p.detach()[rows]) for p in others] for rows in (slice(4), slice(4, None))]

    def gradients(step):
        set_pulling_grads(wholes, step)
        for parts, rows in zip(cut, (slice(4), slice(4, None)), strict=True):
            for part, like in zip(parts, wholes, strict=True):
                part.grad = like.grad[rows].clone()

    stepped(name, [wholes, *cut], gradients)
    assert largest_difference(wholes, others) < 1e-6
    assert largest_difference(wholes, make_parameters()) > 1e-4


@pytest.mark.parametrize("name", [name for name, unit in units().items() if unit == "parameter"])
def test_an_algorithm_that_treats_each_parameter_by_itself_may_be_given_any_of_them(name):
    together, apart = make_parameters(), make_parameters()

    def gradients(step):
        set_pulling_grads(together, step)
        for part, like in zip(apart, together, strict=True):
            part.grad = like.grad.clone()

    stepped(name, [together, apart[:1], apart[1:]], gradients)
    assert largest_difference(together, apart) < 1e-5
    assert largest_difference(together, make_parameters()) > 1e-4


@pytest.mark.parametrize("name", ["prodigy", "schedulefree_prodigy", "torch.optim:AdamW"])
def test_an_algorithm_that_cannot_be_shared_out_is_refused_by_name(name):
    with pytest.raises(UserError, match=rf'{name} cannot train .* train.shard = "none"'):
        sharding.unit_of("matrix", {"matrix": {"name": name}, "default": {"name": "adamw", "lr": 0.1}})


def test_tables_are_shared_out_as_the_optimizer_that_they_go_to_asks():
    optim = {"embedding": {"name": "sparse_adam", "lr": 0.1}, "default": {"name": "adamw", "lr": 0.1}}
    assert [sharding.unit_of(role, optim) for role in ("table", "vector")] == ["parameter", "entry"]
    optim["table"] = optim["default"]
    assert sharding.unit_of("table", optim) == "entry"


@pytest.mark.parametrize("n_rows", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("n_ranks", [1, 2, 4])
def test_ranks_keep_the_rows_that_chunk_deals_out(n_rows, n_ranks):
    dealt = [len(part) for part in torch.arange(n_rows).chunk(n_ranks)]
    kept = [sharding._rows_of(n_rows, rank, n_ranks) for rank in range(n_ranks)]
    assert [part.stop - part.start for part in kept] == dealt + [0] * (n_ranks - len(dealt))
    assert kept[0].start == 0
    assert all(a.stop == b.start for a, b in itertools.pairwise(kept))
