"""The ways a run can end, and be taken up again."""

import io
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from nanorun.data.prepare import prepare
from nanorun.errors import RunFailed, Stopped, StoppedEarly, UserError
from nanorun.files import write_whole
from nanorun.records.record import read_records
from nanorun.training import checkpoint, machine, recording
from nanorun.training import train as train_module
from nanorun.training.progress import MetricsFile
from nanorun.training.run import resume_run, train_seeds
from nanorun.training.step import Stepper

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def train(shakespeare_folder, tiny_settings):
    """Return a function that trains a tiny run from settings and options, and returns its result."""

    def run(*settings, preset="muon", seed=0, n_seeds=1, console=QUIET, **options):
        options = {"data": shakespeare_folder, **options}
        track = "shakespeare-sprint"
        return train_seeds(track, preset, [*tiny_settings, *settings], seed, n_seeds, options, console)[-1]

    return run


def poison(monkeypatch, bad_step, what=float("nan")):
    """Make the loss of a step not finite; warm-up, which has no number, is left alone."""
    real_step, real_backward, now = Stepper.step, Stepper.backward, []

    def step(self, step, scale, *, stop_vote=False):
        now[:] = [step]
        return real_step(self, step, scale, stop_vote=stop_vote)

    def backward(self, idx_BT, targets_BT):
        loss_sum = real_backward(self, idx_BT, targets_BT)
        return loss_sum * what if now == [bad_step - 1] else loss_sum

    monkeypatch.setattr(Stepper, "step", step)
    monkeypatch.setattr(Stepper, "backward", backward)


def only_run():
    (folder,) = Path("runs").iterdir()
    return folder


def metrics(folder):
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith("seconds")} for line in lines]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("step", [1, 3, 6])
def test_a_run_stopped_in_any_step_ends_as_one_never_stopped(train, stop_in_step, number, step):
    every_two = ("validation.from_step=0", "validation.every_steps=2", "model.dropout=0.1")
    whole = train(*every_two)
    stop_in_step(step, number)
    with pytest.raises(
        Stopped, match=rf"stopped after step {step} of 6.*: nanorun train --resume "
    ) as stopped:
        train(*every_two)
    resumed = resume_run(Path(str(stopped.value).rpartition(" ")[2]), QUIET)
    for key in ("final_weights_sha256", "initial_weights_sha256", "final_val_loss", "steps"):
        assert resumed[key] == whole[key]
    assert metrics(resumed["run"]) == metrics(whole["run"])
    records = {Path(one["record"]).name: one for one in (whole, resumed)}
    found = {record.resumed: record for record in read_records(Path("records"))[0]}
    assert len(records) == len(found) == 2
    points = [
        [(p["step"], p["tokens"], p["val_loss"]) for p in found[n].to_dict()["validation"]] for n in (0, 1)
    ]
    assert points[0] == points[1]
    assert [step for step, *_ in points[0]] == [2, 4, 6]


def test_the_clock_of_a_resumed_run_holds_both_parts(train, stop_in_step):
    stop_in_step(3)
    with pytest.raises(Stopped):
        train()
    before = checkpoint.newest_of(only_run())[0].state["clock"]
    after = resume_run(only_run(), QUIET)["clock"]
    assert after["train_seconds"] > before["train"] > 0
    assert after["setup_seconds"] > before["setup"] > 0
    parts = [seconds for reason, seconds in after.items() if reason != "total_seconds"]
    assert after["total_seconds"] == pytest.approx(sum(parts))


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_gives_the_same_bits(train, stop_in_step):
    settings = ("checkpoint.every_steps=2", "checkpoint.keep=5")
    whole = train(*settings)
    kept = [path.name for path in checkpoint.checkpoints(Path(whole["run"]) / "checkpoints")]
    assert kept == ["step-00000006", "step-00000004", "step-00000002"]
    stop_in_step(5)
    with pytest.raises(Stopped) as stopped:
        train(*settings)
    folder = Path(str(stopped.value).rpartition(" ")[2])
    weights = folder / "checkpoints" / "step-00000005" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    out = io.StringIO()
    resumed = resume_run(folder, Console(file=out, width=400))
    assert "passed over: " in out.getvalue()
    assert "step-00000005: model.safetensors is missing or not what was saved" in out.getvalue()
    assert "resumed after step 4 of 6" in out.getvalue()
    assert resumed["final_weights_sha256"] == whole["final_weights_sha256"]
    assert metrics(folder) == metrics(whole["run"])


def test_ctrl_c_twice_stops_at_once_without_a_checkpoint(train, monkeypatch):
    real = Stepper.step

    def impatient(self, step, scale, *, stop_vote=False):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return real(self, step, scale, stop_vote=stop_vote)

    monkeypatch.setattr(Stepper, "step", impatient)
    with pytest.raises(KeyboardInterrupt):
        train()
    assert not list(only_run().glob("checkpoints/*"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_twice_names_the_checkpoint_there_is(train, monkeypatch):
    real = Stepper.step

    def impatient(self, step, scale, *, stop_vote=False):
        for _ in range(2 if step == 4 else 0):
            signal.raise_signal(signal.SIGINT)
        return real(self, step, scale, stop_vote=stop_vote)

    monkeypatch.setattr(Stepper, "step", impatient)
    with pytest.raises(Stopped, match=r"stopped at once, after step 4 of 6\. Resume from the newest"):
        train("checkpoint.every_steps=3")


def test_closing_what_was_written_to_is_not_counted(train, monkeypatch):
    real = MetricsFile.close
    monkeypatch.setattr(MetricsFile, "close", lambda self: (time.sleep(0.5), real(self)))
    train()
    (record,) = read_records(Path("records"))[0]
    assert record.clock["train_seconds"] - record.validation[-1].train_seconds < 0.4


def test_a_run_resumed_on_another_machine_is_a_row_of_its_own(train, stop_in_step, monkeypatch):
    stop_in_step(2)
    with pytest.raises(Stopped):
        train()
    monkeypatch.setattr(machine, "cpu_name", lambda: "Other CPU")
    with pytest.raises(
        UserError, match=r"the bits would differ .*\(hardware .* then, Other.* --allow-inexact"
    ):
        resume_run(only_run(), QUIET)
    resume_run(only_run(), QUIET, {"allow_inexact": True})
    (record,) = read_records(Path("records"))[0]
    assert record.resumed == 1  # what was refused took nothing up
    assert record.hardware.label.partition(" then ")[2].startswith("Other")
    assert record.hardware.label.partition(" then ")[0] == record.hardware.earlier != ""
    assert record.inexact.startswith("after step 2: hardware ")


def test_a_record_names_the_code_that_the_run_began_with(train, stop_in_step, monkeypatch):
    began = {"version": "1", "commit": "a" * 40, "dirty": True, "patch": "source.patch"}
    monkeypatch.setattr(machine, "code_identity", lambda: (began, "a patch\n"))
    stop_in_step(2)
    with pytest.raises(Stopped):
        train()
    after = {"version": "1", "commit": "b" * 40, "dirty": False, "patch": None}
    monkeypatch.setattr(machine, "code_identity", lambda: (after, None))
    out = io.StringIO()
    result = resume_run(only_run(), Console(file=out, width=400))
    assert "note: the run began with other code than this" in out.getvalue()
    (record,) = read_records(Path("records"))[0]
    assert record.code.commit == "a" * 40
    assert (Path(result["record"]) / "source.patch").read_text() == "a patch\n"


def test_a_record_names_the_optimizers_that_the_model_had_a_role_for(train):
    train("optim.vector.name=adam", "optim.vector.lr=0.1")
    (record,) = read_records(Path("records"))[0]
    assert sorted(record.optimizer.split(" + ")) == ["adamw", "muon"]


def test_a_run_that_stopped_at_its_target_takes_no_step_more_when_resumed(train, monkeypatch, tmp_path):
    monkeypatch.setattr("nanorun.training.train.validation_loss", lambda *a, **k: (1.5, 100))
    (tmp_path / "records").write_text("in the way")
    with pytest.raises(UserError, match="could not be written"):
        train("validation.every_steps=2", "validation.from_step=2", stop_at_target=True)
    assert resume_run(only_run(), QUIET, {"records": tmp_path / "elsewhere"})["steps"] == 2


def test_a_stopped_run_writes_no_record_and_no_result(train, stop_in_step):
    stop_in_step(2)
    with pytest.raises(Stopped):
        train()
    assert not Path("records").exists()
    assert not (only_run() / "result.json").exists()


def test_resuming_with_another_number_of_threads_than_before_keeps_the_one_before(train, stop_in_step):
    whole = train()
    stop_in_step(2)
    with pytest.raises(Stopped) as stopped:
        train()
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(n_threads + 1)
        resumed = resume_run(Path(str(stopped.value).rpartition(" ")[2]), QUIET)
        assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(n_threads)
    assert resumed["final_weights_sha256"] == whole["final_weights_sha256"]


@pytest.mark.parametrize("step", [1, 4, 6])
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_named_with_its_rows_and_leaves_nothing_that_counts(
    train, monkeypatch, step, what
):
    poison(monkeypatch, step, what)
    rows = f"training rows {8 * step - 8} to {8 * step - 1} of seed 7"
    with pytest.raises(RunFailed, match=rf"not finite at step {step} of 6 .*{rows}.*Lower the learning rate"):
        train(seed=7)
    assert not Path("records").exists()
    assert not (only_run() / "result.json").exists()
    folder = only_run() / f"bad-step-{step:08d}"
    kept = checkpoint.load(folder, run=checkpoint.identity(only_run()))
    assert (kept.state["bad_step"], kept.state["rows"]) == (step, [8 * step - 8, 8 * step - 1])
    assert all(weights.isfinite().all() for weights in kept.model.values())
    assert not list(only_run().glob("checkpoints/*"))
    assert len(metrics(only_run())) == step - 1


@pytest.mark.parametrize("optim", ["muon", "adam", "soap", "schedulefree_adamw"])
def test_bad_steps_that_are_allowed_leave_the_weights_alone_and_the_record_says_how_many(
    train, monkeypatch, optim
):
    seen = []
    real = Stepper.update

    def update(self, *words, **options):
        before = [p.detach().clone() for p in self.model.parameters()]
        result = real(self, *words, **options)
        same = all(torch.equal(a, b) for a, b in zip(before, self.model.parameters(), strict=True))
        seen.append((bool(result.bad), same))
        return result

    monkeypatch.setattr(Stepper, "update", update)
    poison(monkeypatch, 3)
    out = io.StringIO()
    settings = [] if optim == "muon" else [f"optim.default.name={optim}", "optim.default.lr=0.01"]
    preset = "muon" if optim == "muon" else "adamw"
    result = train(*settings, preset=preset, skip_bad_steps=1, console=Console(file=out, width=400))
    assert seen[-6:] == [(step == 3, step == 3) for step in range(1, 7)]
    assert "step 3 was not finite, and its update left out (1 of 1 allowed)" in out.getvalue()
    (record,) = read_records(Path("records"))[0]
    assert record.skipped_steps == 1
    assert [row["step"] for row in metrics(result["run"]) if row.get("skipped")] == [3]


def test_one_bad_step_more_than_allowed_fails_the_run(train, monkeypatch):
    real = Stepper.backward
    monkeypatch.setattr(Stepper, "backward", lambda self, *rows: real(self, *rows) * float("nan"))
    with pytest.raises(RunFailed, match="not finite at step 3 of 6 after 2 others were left out"):
        train(skip_bad_steps=2)


def test_a_resumed_run_remembers_how_many_steps_it_left_out(train, stop_in_step, monkeypatch):
    poison(monkeypatch, 2)
    stop_in_step(3)
    with pytest.raises(Stopped):
        train(skip_bad_steps=1)
    poison(monkeypatch, 5)
    with pytest.raises(RunFailed, match="not finite at step 5 of 6 after 1 others were left out"):
        resume_run(only_run(), QUIET)
    resume_run(only_run(), QUIET, {"skip_bad_steps": 2})
    (record,) = read_records(Path("records"))[0]
    assert record.skipped_steps == 2


def test_a_learning_rate_far_too_large_fails_the_run_before_it_counts(train):
    huge = ("optim.default.lr=1e30", "optim.matrix.lr=1e30", "model.logit_softcap=0.0")
    with pytest.raises(RunFailed, match=r"not finite at step|validation loss after step"):
        train(*huge)
    assert not Path("records").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_validation_that_is_not_finite_never_counts_as_reached(train, monkeypatch, value):
    monkeypatch.setattr("nanorun.training.train.validation_loss", lambda *_, **__: (value, 10))
    with pytest.raises(RunFailed, match=f"validation loss after step 6 is {value}"):
        train()
    assert not Path("records").exists()
    assert (only_run() / "bad-validation-00000006" / "manifest.json").is_file()


def read_as(monkeypatch, *values):
    left = list(values)
    monkeypatch.setattr("nanorun.training.train.validation_loss", lambda *_, **__: (left.pop(0), 10))


EACH_STEP = ("validation.from_step=0", "validation.every_steps=1")


def test_stopping_at_the_target_ends_the_run_and_is_recorded_as_not_complete(train, monkeypatch):
    read_as(monkeypatch, 3.0, 1.9, 1.88)
    result = train(*EACH_STEP, stop_at_target=True)
    assert (result["steps"], result["reached"]["step"], result["final_val_loss"]) == (3, 3, 1.88)
    (record,) = read_records(Path("records"))[0]
    assert (record.stop_at_target, record.completed, record.steps, record.declared_steps) == (
        True,
        False,
        3,
        6,
    )


def test_a_run_that_reaches_the_target_goes_on_and_keeps_the_first_time(train, monkeypatch):
    read_as(monkeypatch, 3.0, 1.9, 1.85, 1.9, 1.8, 1.7)
    result = train(*EACH_STEP)
    assert (result["steps"], result["reached"]["step"], result["final_val_loss"]) == (6, 3, 1.7)
    (record,) = read_records(Path("records"))[0]
    assert (record.stop_at_target, record.completed, record.steps) == (False, True, 6)


def test_a_required_target_looks_at_the_last_validation_and_the_record_is_kept(train, monkeypatch):
    read_as(monkeypatch, 3.0, 1.9, 1.85, 1.9, 1.8, 1.9)
    with pytest.raises(RunFailed, match=r"reads 1\.9000, above the required 1\.88"):
        train(*EACH_STEP, require_target=True)
    (record,) = read_records(Path("records"))[0]
    assert record.final_val_loss == 1.9
    read_as(monkeypatch, *[3.0] * 5, 1.88)
    assert train(*EACH_STEP, require_target=True)["final_val_loss"] == 1.88


def test_seeds_follow_one_another(train):
    last = train(seed=4, n_seeds=2)
    assert last["final_weights_sha256"] == train(seed=5)["final_weights_sha256"]
    assert sorted(record.seed for record in read_records(Path("records"))[0]) == [4, 5, 5]


def test_the_length_of_a_validation_pass_and_the_log_move_no_bit(train):
    often = train("validation.from_step=0", "validation.every_steps=1", "log.every_steps=1")
    seldom = train("validation.every_steps=0", "log.every_steps=100", "checkpoint.every_steps=1")
    assert often["final_weights_sha256"] == seldom["final_weights_sha256"]
    assert often["final_val_loss"] == seldom["final_val_loss"]


@pytest.mark.parametrize("fails", ["at once", "when called"])
def test_compiling_that_fails_is_one_line_and_moves_no_bit(train, monkeypatch, fails):
    eager = train()

    def broken(model, **options):
        if fails == "at once":
            raise RuntimeError("no compiler\nand much more\nbelow")

        def call(*pair):
            raise RuntimeError("no compiler\nand much more\nbelow")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    out = io.StringIO()
    result = train("train.compile=on", console=Console(file=out, width=400))
    said = [line for line in out.getvalue().splitlines() if "torch.compile failed here" in line]
    assert said == ["torch.compile failed here, going on without it: no compiler"]
    assert "and much more" not in out.getvalue()
    assert result["final_weights_sha256"] == eager["final_weights_sha256"]


def test_a_corpus_that_only_the_user_has_is_asked_for_with_the_command(tmp_path):
    with pytest.raises(
        UserError,
        match=r"no prepared data of 'text'.*nanorun prepare-data text --input PATH --tokenizer byte",
    ):
        train_seeds("text", None, [], 0, 1, {}, QUIET)
    assert not Path("runs").exists()


def test_prepared_data_of_another_corpus_is_refused(shakespeare_folder):
    with pytest.raises(
        UserError, match=r"holds 'shakespeare' in 'char' tokens, and the run wants 'sotu' in 'byte'"
    ):
        train_seeds("sotu", None, [], 0, 1, {"data": shakespeare_folder}, QUIET)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "content", [None, "", "[]", "{}", '{"runs": 3, "data": 4, "records": 5}', '{"spam": 1}']
)
def test_a_run_folder_with_broken_options_is_named(train, stop_in_step, content):
    stop_in_step(2)
    with pytest.raises(Stopped):
        train()
    path = only_run() / "options.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=r"options\.json is missing or broken"):
        resume_run(only_run(), QUIET)


def test_resuming_works_from_another_folder(train, stop_in_step, tmp_path, monkeypatch):
    whole = train()
    stop_in_step(2)
    with pytest.raises(Stopped) as stopped:
        train()
    folder = (tmp_path / str(stopped.value).rpartition(" ")[2]).resolve()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resume_run(folder, QUIET)["final_weights_sha256"] == whole["final_weights_sha256"]


def test_no_checkpoint_is_saved_after_a_step_that_is_not_finite_though_nobody_read_its_flag(
    train, monkeypatch
):
    poison(monkeypatch, 2)
    monkeypatch.setattr("nanorun.training.train._reads_flags", lambda run: False)
    with pytest.raises(RunFailed, match="not finite at step 2 of 6"):
        train("checkpoint.every_steps=3", "log.every_steps=100")
    assert not list(only_run().glob("checkpoints/*"))


def test_a_run_is_not_taken_up_again_on_another_corpus(train, stop_in_step, tmp_path):
    for name, text in (("one", "abc def\n"), ("other", "ghi jkl\n")):
        (tmp_path / f"{name}.txt").write_text(text * 2000)
        prepare("text", out=tmp_path / name, inputs=[str(tmp_path / f"{name}.txt")])
    stop_in_step(2)
    settings = ["train.steps=4", "train.batch_tokens=512", "validation.from_step=4", "model.context_len=64"]
    with pytest.raises(Stopped):
        train_seeds("text", "muon", settings, 0, 1, {"data": tmp_path / "one"}, QUIET)
    with pytest.raises(UserError, match="was trained on a prepared corpus with sha256"):
        resume_run(only_run(), QUIET, {"data": tmp_path / "other"})
    # What was refused is not kept.
    assert resume_run(only_run(), QUIET)["steps"] == 4


def test_a_run_whose_record_found_no_room_is_recorded_elsewhere_on_resuming(train, tmp_path):
    (tmp_path / "records").write_text("in the way")
    with pytest.raises(UserError, match="choose another folder with --records"):
        train()
    last = only_run() / "checkpoints/step-00000006"
    before = last.stat().st_ino
    result = resume_run(only_run(), QUIET, {"records": tmp_path / "elsewhere"})
    assert len(read_records(tmp_path / "elsewhere")[0]) == 1
    assert result["steps"] == 6
    assert last.stat().st_ino == before  # not for a moment without a checkpoint


def test_a_stopped_series_of_seeds_names_those_that_are_left(train, stop_in_step):
    stop_in_step(2)
    with pytest.raises(Stopped, match=r"then the 2 seeds left, from --seed 6 on"):
        train(seed=5, n_seeds=3)


def test_zero_seeds_are_as_many_as_the_rule_asks_for(train):
    train("train.steps=1", "validation.from_step=1", n_seeds=0)
    records, _ = read_records(Path("records"))
    assert sorted(record.seed for record in records) == [0, 1, 2]


def test_a_run_that_cannot_begin_leaves_no_folder(train, monkeypatch):
    monkeypatch.setattr("wandb.init", lambda **options: (_ for _ in ()).throw(RuntimeError("no login")))
    with pytest.raises(UserError, match=r"wandb cannot start \(no login\): use --wandb offline"):
        train(wandb="online")
    assert not list(Path("runs").iterdir())


def test_a_full_disk_ends_the_run_and_leaves_earlier_checkpoints_to_resume(train, monkeypatch):
    real = os.fsync
    calls = []

    def filling(handle):
        calls.append(handle)
        if len(calls) > 9:  # seven for the first checkpoint
            raise OSError(28, "No space left on device")
        real(handle)

    whole = train()
    monkeypatch.setattr(os, "fsync", filling)
    out = io.StringIO()
    with pytest.raises(
        UserError, match=r"step-00000006: .*No space left on device.*earlier ones are untouched"
    ):
        train("checkpoint.every_steps=2", console=Console(file=out, width=400))
    # The run goes on without the checkpoint in the middle, and ends where it cannot save its last.
    assert "step-00000004: the checkpoint could not be written" in out.getvalue()
    monkeypatch.setattr(os, "fsync", real)
    folder = max(Path("runs").iterdir(), key=lambda path: (len(path.name), path.name))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    assert resume_run(folder, QUIET)["final_weights_sha256"] == whole["final_weights_sha256"]


NAMED = {"run": "mine"}


def test_the_same_command_takes_a_named_run_up_again_and_then_says_its_result(train, stop_in_step):
    whole = train()
    stop_in_step(3)
    with pytest.raises(Stopped, match=r"nanorun train --resume runs/mine$"):
        train(**NAMED)
    resumed = train(**NAMED)
    assert resumed["run"] == "runs/mine"
    assert resumed["final_weights_sha256"] == whole["final_weights_sha256"]
    out = io.StringIO()
    assert train(**NAMED, console=Console(file=out, width=400)) == resumed
    assert f"runs/mine is finished already: {resumed['final_val_loss']:.4f} nats a token" in out.getvalue()
    assert len(read_records(Path("records"))[0]) == 2


def test_a_named_run_that_ended_before_it_saved_anything_begins_again(train, monkeypatch):
    whole = train()
    real = Stepper.step
    monkeypatch.setattr(
        Stepper, "step", lambda self, step, *w, **o: real(self, step, *w, **o) if step < 3 else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        train(**NAMED)
    monkeypatch.setattr(Stepper, "step", real)
    assert len(metrics("runs/mine")) == 3
    began = Path("runs/mine/config.toml").stat().st_mtime
    os.utime("runs/mine/metrics.jsonl", (began + 30, began + 30))
    again = train(**NAMED)
    assert again["final_weights_sha256"] == whole["final_weights_sha256"]
    assert metrics("runs/mine") == metrics(whole["run"])
    assert again["clock"]["lost_seconds"] == pytest.approx(30, abs=0.01)
    assert {record.resumed for record in read_records(Path("records"))[0]} == {0, 1}


def test_a_named_run_is_not_taken_up_with_another_config(train, stop_in_step):
    stop_in_step(3)
    with pytest.raises(Stopped):
        train(**NAMED)
    with pytest.raises(UserError, match=r"runs/mine is another run: seed = 0 there, and 1 is asked for"):
        train(**NAMED, seed=1)


def test_seeds_of_a_named_run_have_a_folder_each(train):
    train("train.steps=1", "validation.from_step=1", n_seeds=2, **NAMED)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["mine-s0", "mine-s1"]


def test_a_target_that_was_missed_is_missed_when_a_finished_run_is_named_again(train):
    wanted = {"run": "mine", "require_target": True}
    for _ in range(2):
        with pytest.raises(RunFailed, match=r"above the required 1\.88") as missed:
            train(**wanted)
        assert missed.value.result["run"] == "runs/mine"
    assert train(run="mine")["steps"] == 6


def test_a_run_killed_between_its_record_and_its_result_has_one_record(train, monkeypatch):
    real = write_whole

    def killed(path, *words, **options):
        if path.name == "result.json":
            raise ZeroDivisionError
        real(path, *words, **options)

    monkeypatch.setattr("nanorun.training.train.write_whole", killed)
    with pytest.raises(ZeroDivisionError):
        train(run="mine")
    (record,) = read_records(Path("records"))[0]
    monkeypatch.setattr("nanorun.training.train.write_whole", real)
    assert Path(train(run="mine")["record"]).name == record.id
    assert len(read_records(Path("records"))[0]) == 1


def test_a_signal_that_comes_while_a_seed_is_finished_stops_before_the_next_one(train, monkeypatch):
    real = recording.write

    def write(run, result):
        signal.raise_signal(signal.SIGTERM)
        return real(run, result)

    monkeypatch.setattr(recording, "write", write)
    with pytest.raises(
        Stopped, match=r"stopped when \S+ was finished; then the 2 seeds left, from --seed 4 on"
    ):
        train(seed=3, n_seeds=3)
    assert (only_run() / "result.json").exists()
    assert train(seed=5)["steps"] == 6


def test_a_signal_that_comes_between_seeds_names_those_left(train, monkeypatch):
    real, left = train_module.set_up, [None, StoppedEarly("SIGTERM")]

    def set_up(*words):
        if error := left.pop(0):
            raise error
        return real(*words)

    monkeypatch.setattr(train_module, "set_up", set_up)
    with pytest.raises(
        Stopped, match=r"stopped by SIGTERM after 1 of 3 seeds; go on with --seed 4 --seeds 2$"
    ):
        train(seed=3, n_seeds=3)
    assert (only_run() / "result.json").exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".hidden", "-x", "a b", "x" * 101, "a\n"])
def test_a_name_that_is_no_folder_right_under_runs_is_refused(train, name):
    with pytest.raises(UserError, match="wanted the name of one folder"):
        train(run=name)
    assert not Path("runs").exists()


def test_what_torchrun_starts_again_goes_on_with_the_run_it_was_on(train, monkeypatch):
    settings = ("checkpoint.every_steps=2",)
    whole = train(*settings)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    other = train(*settings, seed=1)
    real = Stepper.step
    monkeypatch.setattr(
        Stepper, "step", lambda self, step, *w, **o: real(self, step, *w, **o) if step < 3 else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        train(*settings)
    monkeypatch.setattr(Stepper, "step", real)
    (begun,) = {str(path) for path in Path("runs").iterdir()} - {whole["run"], other["run"], "runs/.torchrun"}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    out = io.StringIO()
    resumed = train(*settings, console=Console(file=out, width=400))
    assert "resumed after step 2 of 6" in out.getvalue()
    assert resumed["run"] == begun
    assert resumed["final_weights_sha256"] == whole["final_weights_sha256"]


def test_what_torchrun_starts_again_is_no_run_of_an_earlier_torchrun_with_its_id(train, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    earlier = [train("train.steps=2", "validation.from_step=2", seed=seed)["run"] for seed in (0, 1)]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-2")
    train("train.steps=2", "validation.from_step=2", seed=2)
    notes = set(Path("runs/.torchrun").iterdir())
    for note in notes:
        os.utime(note, (0, 0))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    first = train("train.steps=2", "validation.from_step=2", seed=0)["run"]
    assert {note.name.rpartition("-")[0] for note in notes & set(Path("runs/.torchrun").iterdir())} >= {
        "job-2"
    }
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train("train.steps=2", "validation.from_step=2", seed=0)["run"] == first
    assert train("train.steps=2", "validation.from_step=2", seed=1)["run"] not in earlier


def test_seconds_of_work_that_were_lost_are_told_apart_from_those_counted(train, monkeypatch):
    real = Stepper.step

    def step(self, step, *words, **options):
        if step == 5:
            raise ZeroDivisionError  # nothing is saved: as when the power goes
        return real(self, step, *words, **options)

    monkeypatch.setattr(Stepper, "step", step)
    settings = ("checkpoint.every_steps=2",)
    with pytest.raises(ZeroDivisionError):
        train(*settings)
    saved = checkpoint.newest_of(only_run())[0].state
    assert saved["step"] == 4
    alive = saved["saved"] + 30.0
    os.utime(only_run() / "metrics.jsonl", (alive, alive))
    with pytest.raises(ZeroDivisionError):
        resume_run(only_run(), QUIET)
    monkeypatch.setattr(Stepper, "step", real)
    clock = resume_run(only_run(), QUIET)["clock"]
    assert 30.0 <= clock["lost_seconds"] < 40.0
    (record,) = read_records(Path("records"))[0]
    assert record.resumed == 2
    assert record.clock["train_seconds"] < 20.0


def test_a_named_run_that_cannot_begin_again_keeps_what_is_there(train, monkeypatch):
    poison(monkeypatch, 2)
    with pytest.raises(RunFailed):
        train(**NAMED)
    monkeypatch.setattr("wandb.init", lambda **options: (_ for _ in ()).throw(RuntimeError("no login")))
    with pytest.raises(UserError, match="wandb cannot start"):
        train(wandb="online", **NAMED)
    assert (Path("runs/mine/bad-step-00000002") / "manifest.json").is_file()


def test_a_run_begun_before_a_key_of_the_config_was_there_is_taken_up_with_its_default(train, stop_in_step):
    stop_in_step(4)
    with pytest.raises(Stopped):
        train(**NAMED)
    path = Path("runs/mine/config.toml")
    later = ("ngram", "attention_dropout", "document_mask", "length_schedule", "fp8_head", "shard", "cycles")
    lines = path.read_text().splitlines(keepends=True)
    older = [line for line in lines if not line.startswith(later)]
    assert len(lines) - len(older) >= len(later)
    path.write_text("".join(older))
    saved = checkpoint.checkpoints(Path("runs/mine/checkpoints"))[0] / "manifest.json"
    manifest = json.loads(saved.read_text())
    text = checkpoint.manifest_text(
        checkpoint.identity(Path("runs/mine")), manifest["step"], manifest["files"]
    )
    saved.write_text(text)
    with pytest.raises(
        UserError, match=r"is another run: model\.attention_dropout = True there, and False is"
    ):
        train("model.attention_dropout=false", **NAMED)
    assert train(**NAMED)["final_weights_sha256"] == train()["final_weights_sha256"]


def test_a_named_folder_that_holds_anything_but_a_run_is_refused_and_stays(train):
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/notes.txt").write_text("mine")
    with pytest.raises(
        UserError, match=r"runs/mine holds no run .*but notes\.txt: choose another --run NAME"
    ):
        train(**NAMED)
    assert [path.name for path in Path("runs/mine").iterdir()] == ["notes.txt"]


def test_a_folder_that_a_run_left_as_it_began_is_taken(train):
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/.config.toml.7.partial").write_text("half")
    assert train(**NAMED)["steps"] == 6


def test_a_finished_run_that_missed_a_required_target_misses_it_when_asked_again(train):
    for _ in range(2):
        with pytest.raises(RunFailed, match=r"above the required 1\.88"):
            train(require_target=True, **NAMED)
    assert len(read_records(Path("records"))[0]) == 1


@pytest.mark.parametrize("content", ["[]", "{}", '{"final_val_loss": NaN}', "[" * 50_000, "\udcff", '{"fin'])
def test_a_result_that_is_none_is_named(train, content):
    train(**NAMED)
    Path("runs/mine/result.json").write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=r"runs/mine/result\.json is broken .*remove it"):
        train(**NAMED)


def test_a_run_that_was_killed_between_its_record_and_its_result_writes_no_second_record(train, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("nanorun.training.train.write_whole", lambda *words, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train()
    result = resume_run(only_run(), QUIET)
    (record,) = read_records(Path("records"))[0]
    assert Path(result["record"]).name == record.id


@pytest.mark.parametrize("noted", ["../../elsewhere", "..", "", "gone"])
def test_a_note_of_a_restart_leads_to_no_folder_elsewhere(train, monkeypatch, noted):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    train()
    (note,) = Path("runs/.torchrun").iterdir()
    note.write_text(noted)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert Path(train()["run"]).parent == Path("runs")
    assert not Path("elsewhere").exists()


def test_interruptions_that_are_none_are_not_counted(train, stop_in_step):
    stop_in_step(2)
    with pytest.raises(Stopped):
        train()
    lines = (b"\xff", b"[" * 50_000, b'{"at": "x"}', b'{"at": 1, "after_step": 1, "lost_seconds": NaN}')
    (only_run() / "interruptions.jsonl").write_bytes(b"\n".join(lines))
    resume_run(only_run(), QUIET)
    (record,) = read_records(Path("records"))[0]
    assert record.resumed == 1


def interrupt(*words, **options):
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["set_up", "compile_if_it_pays", "recording.write"])
def test_ctrl_c_outside_the_steps_names_the_checkpoint_there_is(train, stop_in_step, monkeypatch, where):
    stop_in_step(3)
    with pytest.raises(Stopped):
        train(**NAMED)
    monkeypatch.setattr(f"nanorun.training.train.{where}", interrupt)
    for again in (lambda: train(**NAMED), lambda: resume_run(Path("runs/mine"), QUIET)):
        with pytest.raises(Stopped, match=r"stopped at once.*with: nanorun train --resume runs/mine$"):
            again()


def test_a_signal_that_comes_while_a_line_is_written_stops_the_run_all_the_same(train, stop_in_step):
    class Busy(io.StringIO):
        def write(self, text):
            if "stopping after" in text:
                raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")
            return super().write(text)

    stop_in_step(3)
    with pytest.raises(Stopped, match="stopped after step 3 of 6"):
        train(console=Console(file=Busy(), width=400))


def test_a_damaged_newer_checkpoint_costs_no_older_one(train, stop_in_step):
    stop_in_step(5)
    with pytest.raises(Stopped):
        train("checkpoint.every_steps=3", "checkpoint.keep=2")
    checkpoints = only_run() / "checkpoints"
    (checkpoints / "step-00000005" / "state.json").write_text("{}")
    stop_in_step(4)
    with pytest.raises(Stopped, match="stopped after step 4"):
        resume_run(only_run(), QUIET)
    assert sorted(path.name[-1] for path in checkpoints.iterdir()) == ["3", "4", "5"]


def test_data_whose_preparation_was_interrupted_is_named(tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "journal.jsonl").write_text("")
    with pytest.raises(UserError, match=r"half: its preparation was interrupted; run the same"):
        train_seeds("sotu", None, [], 0, 1, {"data": tmp_path / "half"}, QUIET)
