"""What several test files share: prepared data, and a tiny model with its optimizers and its steps."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch

from nanorun import cli
from nanorun.config import resolve
from nanorun.data.batches import token_set
from nanorun.data.prepare import prepare
from nanorun.model import GPT
from nanorun.optim.build import build_optimizers
from nanorun.tracks import load_track
from nanorun.training.distributed import Ranks
from nanorun.training.step import Stepper

VOCAB_SIZE = 65


@pytest.fixture(scope="session", autouse=True)
def _a_cache_of_their_own(tmp_path_factory):
    """Keep what the tests cache, in subprocesses too, out of the home of whoever runs them."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _one_number_of_threads():
    """State the number of threads, so that no run of a test chooses one by the clock."""
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))


@pytest.fixture(scope="session")
def shakespeare_folder(tmp_path_factory):
    """The prepared shakespeare corpus, made once; only to be read."""
    folder = tmp_path_factory.mktemp("data") / "shakespeare"
    prepare("shakespeare", out=folder)
    return folder


@pytest.fixture
def nanorun(monkeypatch, capsys, tmp_path):
    """Run the command line in this process and in a folder of the test's own; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr("sys.argv", ["nanorun", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


@pytest.fixture
def tiny_settings():
    """Settings that shrink a preset of shakespeare-sprint to eight rows of 64 tokens and one narrow block."""
    return (
        "train.steps=6",
        "train.batch_tokens=512",
        "validation.from_step=6",
        "model.n_layer=1",
        "model.n_head=2",
        "model.n_embd=32",
        "log.every_steps=1",
    )


@pytest.fixture
def make_stepper(tiny_settings):
    """A function from settings to a Stepper on 5000 made-up tokens that can be learned a little."""
    numbers = np.random.default_rng(0).integers(0, VOCAB_SIZE, 5000)
    tokens = token_set([np.minimum(numbers, np.roll(numbers, 1))])

    def make(*settings, preset="muon", ranks=Ranks()):  # noqa: B008
        config = resolve(load_track("shakespeare-sprint"), preset, [*tiny_settings, *settings])
        model = GPT(config.model, VOCAB_SIZE)
        model.initialise(config.seed)
        model.checkpoint_activations = config.train.checkpoint_activations
        optimizers = build_optimizers(model, config.optim_by_role)
        made.append(Stepper(model, optimizers, tokens, config, device=torch.device("cpu"), ranks=ranks))
        return made[-1]

    made: list[Stepper] = []
    yield make
    for stepper in made:
        stepper.close()


@pytest.fixture
def stop_in_step(monkeypatch):
    """Return a function that has a signal come in the middle of a step, once."""

    def stop(n, number=signal.SIGINT):
        real, left = Stepper.step, [number]

        def stopping(self, step, scale, *, stop_vote=False):
            if step == n - 1 and left:
                signal.raise_signal(left.pop())
            return real(self, step, scale, stop_vote=stop_vote)

        monkeypatch.setattr(Stepper, "step", stopping)

    return stop
