"""Ranks end, and agree, each by itself and all together."""

import os
import signal

import psutil
import pytest
from hostile_samples import QUIET, stopped_run

from nanorun.errors import RunFailed, UserError
from nanorun.training import distributed
from nanorun.training.distributed import Ranks
from nanorun.training.setup import read_saved
from nanorun.training.taking_up import Begun


@pytest.fixture
def signals(monkeypatch):
    """The signals that would have been sent, by a rank that torchrun may start twice more."""
    for key, value in {"RUN_ID": "none", "RESTART_COUNT": "1", "MAX_RESTARTS": "3"}.items():
        monkeypatch.setenv(f"TORCHELASTIC_{key}", value)
    monkeypatch.setenv("LOCAL_RANK", "0")
    sent = []
    monkeypatch.setattr(os, "kill", lambda *words: sent.append(words))
    before = signal.getsignal(signal.SIGTERM)
    yield sent
    signal.signal(signal.SIGTERM, before)


def test_the_torchrun_that_started_a_rank_is_asked_to_end(signals, monkeypatch):
    monkeypatch.setattr(psutil.Process, "environ", lambda process: {"HOME": "/"})
    distributed._stop_torchrun()
    assert signals == [(os.getppid(), signal.SIGTERM)]


def test_what_inherited_torchruns_environment_is_not_taken_for_torchrun(signals, monkeypatch):
    monkeypatch.setattr(psutil.Process, "environ", lambda process: {"TORCHELASTIC_RUN_ID": "none"})
    before = signal.getsignal(signal.SIGTERM)
    distributed._stop_torchrun()
    assert signals == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_that_a_collective_may_have_made_is_looked_into_whatever_it_became():
    def became(cause, *, told):
        try:
            try:
                raise cause
            except RuntimeError as error:
                raise UserError("the checkpoint does not fit") from error if told else None
        except UserError as error:
            return error

    for told in (True, False):
        assert distributed._may_come_of_another_rank(
            became(RuntimeError("Connection closed by peer"), told=told)
        )
    assert distributed._may_come_of_another_rank(RuntimeError("Connection closed by peer"))
    assert not distributed._may_come_of_another_rank(UserError("no such file"))
    assert not distributed._may_come_of_another_rank(RunFailed("not finite at step 3"))


def test_all_ranks_go_on_from_the_checkpoint_that_the_first_one_found(tmp_path, shakespeare_folder):
    run = stopped_run(tmp_path, shakespeare_folder, settings=("checkpoint.every_steps=2",))
    found = {path.name for path in (run / "checkpoints").iterdir()}
    assert found == {"step-00000002", "step-00000004"}

    class Second(Ranks):
        def broadcast_text(self, text):
            assert text == "step-00000004"
            return "step-00000002"

    saved = read_saved(Begun(str(run), resumes=True), QUIET, Second(rank=1, n_ranks=2))
    assert (saved.path.name, saved.state["step"]) == ("step-00000002", 2)
    assert read_saved(Begun(str(run), resumes=True), QUIET, Ranks()).state["step"] == 4
