"""`--deterministic`: what it turns on, says, keeps, and cannot do."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from nanorun.errors import Stopped, UserError
from nanorun.records.record import Software, read_fields, read_records
from nanorun.training import checkpoint, machine
from nanorun.training.run import resume_run, train_seeds
from nanorun.training.step import Stepper

PUTTING = """
import torch


class Putting(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.view(-1).put_(torch.tensor([0]), torch.tensor([0.5]))
"""


@pytest.fixture
def train(tmp_path, monkeypatch, tiny_settings, shakespeare_folder):
    """Train a tiny run in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)

    def run(*settings, optim="muon", console=None, **options):
        options = {"data": shakespeare_folder, **options}
        settings = [*tiny_settings, *settings]
        console = console or Console(quiet=True)
        return train_seeds("shakespeare-sprint", optim, settings, 0, 1, options, console)[0]

    return run


@pytest.fixture
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def seen_while_training(monkeypatch):
    """Return a list that fills with what was switched on in each step."""
    seen, real = [], Stepper.step

    def watching(self, *words, **options):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return real(self, *words, **options)

    monkeypatch.setattr(Stepper, "step", watching)
    return seen


@pytest.mark.usefixtures("_two_threads")
def test_two_threads_give_the_same_bits_twice_and_the_record_says_what_was_on(train, monkeypatch):
    seen = seen_while_training(monkeypatch)
    first, again = train(deterministic=True), train(deterministic=True)
    assert first["final_weights_sha256"] == again["final_weights_sha256"]
    train()
    assert seen == [True] * 12 + [False] * 6
    assert not torch.are_deterministic_algorithms_enabled()
    kept = [record.software.deterministic for record in read_records(Path("records"))[0]]
    assert sorted(kept) == [False, True, True]


def test_a_deterministic_run_says_what_it_costs(train, capsys):
    train(deterministic=True, console=Console(width=200))
    assert "deterministic algorithms alone: " in capsys.readouterr().out
    train(console=Console(width=200))
    assert "deterministic" not in capsys.readouterr().out


def test_an_operation_without_a_deterministic_form_is_named(nanorun, tiny_settings, shakespeare_folder):
    Path("putting.py").write_text(PUTTING)
    settings = [word for setting in tiny_settings for word in ("--set", setting)]
    words = ["train", "--track", "shakespeare-sprint", "--optim", "putting.py:Putting", *settings]
    words += ["--set", "optim.default.lr=0.01", "--data", shakespeare_folder, "--no-record"]
    code, _, said = nanorun(*words, "--deterministic")
    assert code == 2
    assert (
        "--deterministic: torch's put_ has no deterministic form on this device; start the run without"
        in said
    )
    assert nanorun(*words)[0] == 0


def test_other_errors_pass_through_and_the_switch_is_put_back():
    def fail(error):
        assert torch.are_deterministic_algorithms_enabled()
        raise error

    for error in (UserError("a wrong name"), RuntimeError("out of luck")):
        with pytest.raises(type(error), match=str(error)), machine.deterministic_algorithms(True):
            fail(error)
        assert not torch.are_deterministic_algorithms_enabled()


def test_a_resumed_run_is_as_deterministic_as_it_was(nanorun, train, stop_in_step, monkeypatch):
    stop_in_step(3)
    with pytest.raises(Stopped) as stopped:
        train(deterministic=True)
    folder = Path(str(stopped.value).rpartition(" ")[2])
    code, _, said = nanorun("train", "--resume", folder, "--deterministic")
    assert code == 2
    assert "--deterministic beside --resume" in said
    seen = seen_while_training(monkeypatch)
    resume_run(folder, Console(quiet=True))
    assert seen == [True] * 3
    assert [one.software.deterministic for one in read_records(Path("records"))[0]] == [True]


def test_the_switch_is_among_the_choices_that_resuming_compares(train, stop_in_step, monkeypatch):
    real = checkpoint.newest_of

    def was_deterministic(folder):
        found, passed_over = real(folder)
        found.state["choices"] |= {"deterministic": True}
        return found, passed_over

    stop_in_step(3)
    with pytest.raises(Stopped) as stopped:
        train()
    monkeypatch.setattr(checkpoint, "newest_of", was_deterministic)
    with pytest.raises(UserError, match=r"the bits would differ .*deterministic True then, False now"):
        resume_run(Path(str(stopped.value).rpartition(" ")[2]), Console(width=200))


def test_a_record_from_before_the_option_was_not_deterministic():
    old = {"python": "3.12", "platform": "Linux", "torch": "2.9", "numpy": "2.1", "compiled": True}
    assert read_fields(Software, old).deterministic is False
    assert read_fields(Software, machine.software(compiled=True, deterministic=True)).deterministic is True
