"""Micro-batches prepared ahead: the rows of ever, nothing in vain, and a copy that is waited for where it must be."""

from __future__ import annotations

import contextlib
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from nanorun.data.batches import train_rows
from nanorun.errors import RunFailed, Stopped, UserError
from nanorun.training import feed as feed_module
from nanorun.training import step as step_module
from nanorun.training.distributed import Ranks
from nanorun.training.feed import Feed, Span
from nanorun.training.run import resume_run, train_seeds
from nanorun.training.step import Stepper

QUIET = Console(quiet=True)
CPU = torch.device("cpu")


def ahead_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("nanorun-ahead")]


def listened(stepper, monkeypatch):
    """Return a list that fills with the inputs of every micro-batch, as `backward` gets them."""
    seen = []
    real = stepper.backward
    monkeypatch.setattr(
        stepper,
        "backward",
        lambda idx_BT, targets_BT: (seen.append(idx_BT.clone()), real(idx_BT, targets_BT))[1],
    )
    return seen


class Arrived:
    def wait(self):
        pass


def wanted_rows(stepper, first_row, n_rows):
    shape = {"seed": 0, "first_row": first_row, "n_rows": n_rows, "context_len": 64}
    return torch.from_numpy(train_rows(stepper.tokens, **shape)[0])


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("ranks", [Ranks(), Ranks(1, 2, 1)])
def test_steps_train_on_the_rows_of_their_number(make_stepper, monkeypatch, ahead, ranks):
    stepper = make_stepper("train.micro_batch_rows=3", ranks=ranks)
    monkeypatch.setattr(Ranks, "start_sum", lambda self, tensor: Arrived())
    stepper.feed.ahead = ahead
    seen = listened(stepper, monkeypatch)
    size = 8 // ranks.n_ranks
    for step in (0, 1, 4, 5):
        del seen[:]
        stepper.step(step, 1.0)
        assert max(map(len, seen)) <= 3
        assert torch.equal(torch.cat(seen), wanted_rows(stepper, 8 * step + size * ranks.rank, size))


def test_another_size_of_micro_batches_halfway_only_asks_differently(make_stepper, monkeypatch):
    stepper = make_stepper("train.micro_batch_rows=8")
    seen = listened(stepper, monkeypatch)
    for step, rows in enumerate((8, 2, 5)):
        stepper.micro_batch_rows = rows
        stepper.step(step, 1.0)
    assert torch.equal(torch.cat(seen), wanted_rows(stepper, 0, 24))


def test_each_row_of_a_run_is_read_once_and_none_beyond_its_last_step(make_stepper):
    stepper = make_stepper("train.micro_batch_rows=3")
    read = []

    def noting(*, first_row, n_rows):
        read.append(Span(first_row, n_rows))
        return train_rows(stepper.tokens, seed=0, first_row=first_row, n_rows=n_rows, context_len=64)

    stepper.close()
    stepper.feed = Feed(noting, CPU)
    for step in range(stepper.config.train.steps):
        stepper.step(step, 1.0)
    assert read == [Span(8 * step + first, min(3, 8 - first)) for step in range(6) for first in (0, 3, 6)]


def test_an_error_in_the_thread_is_raised_by_the_step_that_needed_the_rows(make_stepper):
    stepper = make_stepper("train.micro_batch_rows=8")

    def vanishing(*, first_row, n_rows):
        if first_row == 16:
            raise UserError("data/x_train_000003.bin: cannot be read (No such file or directory)")
        return train_rows(stepper.tokens, seed=0, first_row=first_row, n_rows=n_rows, context_len=64)

    stepper.close()
    stepper.feed = Feed(vanishing, CPU)
    stepper.step(0, 1.0)
    stepper.step(1, 1.0)
    with pytest.raises(UserError, match=r"x_train_000003\.bin: cannot be read"):
        stepper.step(2, 1.0)


class Cuda:
    """What of torch.cuda the feed uses, each call noted in its order; tensors are arrays that note theirs."""

    def __init__(self):
        self.calls = []
        self.now = SimpleNamespace(
            wait_event=lambda event: self.calls.append(("the pass waits for", event)), name="pass"
        )

    def Stream(self, device):
        return SimpleNamespace(record_event=lambda: self.note("copied"), name="copies", device=device)

    def current_stream(self, device):
        return self.now

    @contextlib.contextmanager
    def stream(self, stream):
        self.calls.append(("enter", stream.name))
        yield
        self.calls.append(("leave", stream.name))

    def note(self, what):
        self.calls.append(what)
        return what


class Noted:
    def __init__(self, rows, cuda, where="memory"):
        self.rows, self.cuda, self.where = rows, cuda, where

    def pin_memory(self):
        self.cuda.note("pin")
        return Noted(self.rows, self.cuda, "pinned memory")

    def to(self, device, *, non_blocking):
        assert self.where == "pinned memory"
        assert non_blocking
        self.cuda.note(f"copy to {device.type}")
        return Noted(self.rows, self.cuda, device.type)

    def record_stream(self, stream):
        self.cuda.note(f"kept for the {stream.name}")


def test_on_cuda_a_side_stream_copies_pinned_rows_and_the_pass_waits_for_it(monkeypatch):
    """The structure alone: that these calls do what they should is for a machine with a GPU to show."""
    cuda = Cuda()
    monkeypatch.setattr(
        feed_module,
        "torch",
        SimpleNamespace(cuda=cuda, from_numpy=lambda rows: Noted(rows, cuda)),
    )
    made = Feed(lambda *, first_row, n_rows: (first_row, n_rows), SimpleNamespace(type="cuda"), ahead=False)
    idx, targets = made.take(Span(8, 4))
    assert (idx.rows, targets.rows, idx.where, targets.where) == (8, 4, "cuda", "cuda")
    copying = ["pin", "copy to cuda"] * 2
    assert cuda.calls == [
        ("enter", "copies"),
        *copying,
        "copied",
        ("leave", "copies"),
        ("the pass waits for", "copied"),
        *["kept for the pass"] * 2,
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_on_a_gpu_are_those_in_memory():
    rng = np.random.default_rng(0)
    kept = {n: rng.integers(0, 50_000, (64, 1025)) for n in range(40)}
    made = Feed(
        lambda *, first_row, n_rows: (
            kept[first_row][:n_rows, :-1].copy(),
            kept[first_row][:n_rows, 1:].copy(),
        ),
        torch.device("cuda", 0),
    )
    busy = torch.randn(2048, 2048, device="cuda")
    for n in range(40):
        pair = made.take(Span(n, 64), Span(n + 1, 64) if n < 39 else None)
        for _ in range(3):
            busy = busy @ busy / 2048
        # Read by the pass's own stream, behind other work, as a pass would.
        assert torch.equal((pair[0] + 0).cpu(), torch.from_numpy(kept[n][:, :-1]))
        assert torch.equal((pair[1] + 0).cpu(), torch.from_numpy(kept[n][:, 1:]))
    made.close()


@pytest.fixture
def train(shakespeare_folder, tiny_settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*settings, **options):
        options = {"data": shakespeare_folder, **options}
        return train_seeds("shakespeare-sprint", "muon", [*tiny_settings, *settings], 0, 1, options, QUIET)[0]

    return run


def test_a_run_ends_with_the_bits_that_it_has_without_preparing_anything_ahead(train, monkeypatch):
    ahead = train("train.micro_batch_rows=3")
    assert not ahead_threads()
    monkeypatch.setattr(step_module, "Feed", lambda read, device: Feed(read, device, ahead=False))
    one_by_one = train("train.micro_batch_rows=3")
    assert ahead["final_weights_sha256"] == one_by_one["final_weights_sha256"]


@pytest.mark.parametrize("end", ["an error", "Ctrl-C", "Ctrl-C twice"])
def test_no_thread_outlives_a_run_that_ends_early(train, monkeypatch, end):
    real = Stepper.step

    def ending(self, step, scale, *, stop_vote=False):
        if step == 3:
            assert ahead_threads()
            if end == "an error":
                raise RunFailed("made up")
            for _ in range(2 if end == "Ctrl-C twice" else 1):
                signal.raise_signal(signal.SIGINT)
        return real(self, step, scale, stop_vote=stop_vote)

    monkeypatch.setattr(Stepper, "step", ending)
    with pytest.raises((RunFailed, Stopped, KeyboardInterrupt)) as ended:
        train()
    assert not ahead_threads()
    if end == "Ctrl-C":
        monkeypatch.setattr(Stepper, "step", real)
        resumed = resume_run(_folder(ended), QUIET)
        assert resumed["final_weights_sha256"] == train()["final_weights_sha256"]


def _folder(stopped):
    from pathlib import Path

    return Path(str(stopped.value).rpartition(" ")[2])
