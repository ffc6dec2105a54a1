"""Runs of any origin, read as one: what each kind says, what counts once, and what may be averaged."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path

import pytest
from records_samples import a_record, on_a_mix
from runs_samples import a_log, a_logged_run, put_import, put_record, put_run, write_log

from nanorun.errors import UserError
from nanorun.records.logs import LoggedMachine
from nanorun.records.reading import read_logs
from nanorun.records.record import read_record
from nanorun.records.runs import VAL_LOSS, by_seed, from_log, from_record, group_runs, read_runs


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_record_keeps_what_is_compared():
    record = a_record(seed=4)
    run = from_record(record, "records/sotu/x")
    assert (run.seed, run.declared_steps, run.complete, run.stops_on_loss) == (4, 1000, True, False)
    assert run.curves[VAL_LOSS][-1].loss == record.final_val_loss
    assert run.at(VAL_LOSS, 1000).seconds == record.clock["train_seconds"]
    assert run.at(VAL_LOSS, 100).seconds == pytest.approx(3.12)
    assert run.at(VAL_LOSS, 101) is None
    assert run.identity["hardware"] == record.hardware.label
    assert "seed" not in run.identity


def test_a_log_keeps_its_other_losses_and_the_seconds_beside_them():
    logged = a_logged_run(other_losses={"val_ema_loss": ((90, 3.27), (100, 3.26)), "empty": ()})
    run = from_log(logged)
    assert set(run.curves) == {VAL_LOSS, "val_ema_loss"}
    assert run.at("val_ema_loss", 100) == (100, 3.26, pytest.approx(10.0))
    assert run.identity == {
        "total steps": 100,
        "gpu": "NVIDIA H100 80GB HBM3",
        "world size": 8,
        "source sha256": "a" * 64,
        "format": "modded_nanogpt",
        "last step": None,
    }


def test_one_record_a_track_and_all_tracks_are_all_read():
    folders = [put_record(Path("records"), seed=seed) for seed in range(2)]
    put_record(Path("records"), track="shakespeare")
    Path("records/benchmarks").mkdir()
    Path("records/README.md").write_text("table")
    assert [run.seed for run in read_runs([folders[0]]).runs] == [0]
    assert [run.seed for run in read_runs([folders[0] / "record.json"]).runs] == [0]
    assert sorted(run.seed for run in read_runs(["records/sotu"]).runs) == [0, 1]
    assert len(read_runs(["records"]).runs) == 3


@pytest.mark.parametrize("up", [0, 1, 2])
def test_a_folder_of_records_is_found_from_within(up: int, monkeypatch):
    folder = put_record(Path("records"))
    monkeypatch.chdir([folder, *folder.parents][up])
    assert len(read_runs(["."]).runs) == 1


def test_overlapping_paths_count_a_run_once():
    folder = put_record(Path("records"), seed=0)
    put_record(Path("records"), seed=1)
    found = read_runs([folder, "records/sotu", "records", folder.resolve()])
    assert len(found.runs) == 2
    shutil.copytree("records", "copies")
    found = read_runs(["records", "copies"])
    assert len(found.runs) == 2
    assert [one.why.startswith("the same run as records/sotu") for one in found.skipped] == [True, True]


def test_a_broken_record_is_named_and_hides_no_other():
    put_record(Path("records"), seed=1)
    broken = put_record(Path("records"), seed=2)
    (broken / "record.json").write_text('{"format_version": 1')
    found = read_runs(["records/sotu"])
    assert [run.seed for run in found.runs] == [1]
    assert [one.file for one in found.skipped] == [str(broken)]


def test_a_run_is_read_by_its_record_and_counts_once_with_it():
    folder = put_record(Path("records"), seed=3)
    put_run(Path("runs/a"), read_record(folder.resolve()), named=folder)
    found = read_runs(["runs", "records"])
    assert [(run.kind, run.seed) for run in found.runs] == [("record", 3)]


def test_a_record_that_moved_is_found_where_the_options_say():
    folder = put_record(Path("elsewhere"), seed=3)
    put_run(
        Path("runs/a"),
        read_record(folder.resolve()),
        named=Path("records/sotu") / folder.name,
        records="elsewhere",
    )
    assert [run.kind for run in read_runs(["runs/a"]).runs] == ["record"]


def test_another_runs_record_is_not_taken_for_this_ones():
    other = put_record(Path("records"), seed=9, final=1.2)
    put_run(Path("runs/a"), a_record(seed=3), named=other)
    assert [(run.kind, run.seed) for run in read_runs(["runs/a"]).runs] == [("run", 3)]


def test_a_run_without_a_record_says_the_same_as_its_record_would():
    record = a_record(seed=3)
    run = read_runs([put_run(Path("runs/a"), record, named=None)]).runs[0]
    same = from_record(record, "there")
    assert run.kind == "run"
    assert [one[:2] for one in run.curves[VAL_LOSS]] == [one[:2] for one in same.curves[VAL_LOSS]]
    assert run.at(VAL_LOSS, 500).seconds == pytest.approx(15.6)
    for name in (
        "seed",
        "declared_steps",
        "complete",
        "track",
        "validation_tokens",
        "train_seconds",
        "config",
    ):
        assert getattr(run, name) == getattr(same, name)
    assert run.corpus["manifest_sha256"] == same.corpus["manifest_sha256"]
    assert {key: run.identity[key] for key in ("hardware", "train.steps", "optim.matrix.lr")} == {
        key: same.identity[key] for key in ("hardware", "train.steps", "optim.matrix.lr")
    }
    assert len(read_runs(["runs/a", "runs"]).runs) == 1


def test_a_run_on_a_mix_is_told_by_it_with_a_record_and_without():
    record = a_record(seed=3, **on_a_mix())
    same = from_record(record, "there")
    run = read_runs([put_run(Path("runs/a"), record, named=None)]).runs[0]
    label = f"sotu:0.7 ({'c' * 16}), novels:0.3 ({'d' * 16})"
    assert (
        run.corpus["mix"]
        == same.corpus["mix"]
        == run.identity["data.mix"]
        == same.identity["data.mix"]
        == label
    )
    assert not [key for key in (*run.identity, *same.identity) if key.startswith("data.mix.")]
    assert "mix" not in from_record(a_record(), "there").corpus


def test_a_run_that_was_cut_off_is_incomplete_and_one_that_may_stop_says_so():
    put_run(Path("runs/a"), a_record(seed=1), named=None, done=500)
    put_run(Path("runs/b"), a_record(seed=2), named=None, stop_at_target=True)
    cut, stopping = read_runs(["runs"]).runs
    assert (cut.complete, cut.last_step, cut.declared_steps) == (False, 500, 1000)
    assert (stopping.complete, stopping.stops_on_loss) == (True, True)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.toml", "steps = [[["),
        ("config.toml", "a" + ".a" * 5000 + " = 1"),
        ("config.toml", "a = " + "[" * 5000),
        ("config.toml", "a = " + "9" * 5000),
        ("result.json", "[" * 100_000),
        ("result.json", '{"record": NaN}'),
        ("result.json", "[]"),
        ("options.json", "null"),
        ("metrics.jsonl", '{"step": 1, "val_loss": 1e999}\n[1]\n{"step": "1", "val_loss": 2.0}\n'),
    ],
)
def test_a_run_that_cannot_be_believed_is_skipped_with_a_reason(name: str, text: str):
    put_run(Path("runs/a"), a_record(), named=None)
    (Path("runs/a") / name).write_text(text)
    found = read_runs(["runs/a"])
    assert not found.runs
    assert found.skipped[0].file == "runs/a"
    assert found.skipped[0].why


def test_a_config_of_nan_and_dates_and_a_broken_checkpoint_do_no_harm():
    put_run(Path("runs/a"), a_record(), named=None)
    text = Path("runs/a/config.toml").read_text()
    Path("runs/a/config.toml").write_text("when = 2026-01-01\nbad = nan\n" + text)
    next(Path("runs/a").glob("checkpoints/*/state.json")).write_text("{")
    run = read_runs(["runs/a"]).runs[0]
    assert json.dumps(dict(run.identity), allow_nan=False)
    assert run.validation_tokens is None


def test_logs_are_read_from_files_folders_and_patterns():
    for index in range(3):
        write_log(Path(f"logs/a{index}.txt"), 3.27 + index / 1000)
    write_log(Path("logs/b.txt"), 3.3)
    Path("logs/README.md").write_text("no log")
    assert len(read_runs(["logs/a0.txt"]).runs) == 1
    assert len(read_runs(["logs"]).runs) == 4
    assert [run.file for run in read_runs(["logs/a*.txt"]).runs] == [f"logs/a{k}.txt" for k in range(3)]
    assert len(read_runs(["logs/b.txt", "logs", "logs/*.txt"]).runs) == 4


def test_logs_and_records_can_be_read_together():
    put_record(Path("records"))
    write_log(Path("logs/a.txt"), 3.27)
    assert {run.kind for run in read_runs(["records", "logs"]).runs} == {"record", "log"}


def test_an_import_is_read_as_its_log_and_counts_once_with_it():
    path = write_log(Path("logs/a.txt"), 3.27)
    logged = read_logs([path]).runs[0]
    logged = dataclasses.replace(logged, source="import sys\n", source_sha256="e" * 64)
    folder = put_import(Path("records"), logged)
    put_record(Path("records"))
    imported = read_runs([folder]).runs[0]
    assert (imported.kind, imported.track, imported.source) == ("log", "sotu", "import sys\n")
    assert imported.curves == from_log(logged).curves
    assert imported.identity == from_log(logged).identity
    assert [run.kind for run in read_runs(["records"]).runs] == ["record", "log"]
    for names in (["logs", "records/sotu"], [folder / "import.json", "logs"], [folder, folder.parent]):
        assert len([run for run in read_runs(names).runs if run.kind == "log"]) == 1
    assert "the same run as" in read_runs([folder, "logs"]).skipped[0].why


def test_a_broken_import_is_named():
    folder = put_import(Path("records"), a_logged_run())
    (folder / "import.json").write_text("{}")
    assert [one.file for one in read_runs([folder]).skipped] == [str(folder)]
    assert [one.file for one in read_runs(["records"]).skipped] == [str(folder)]


def test_a_name_that_leads_nowhere_says_what_was_wanted():
    for name in ("nowhere", "no*.txt", "nowhere/muon"):
        with pytest.raises(UserError, match="no such file or folder"):
            read_runs([name])
    with pytest.raises(UserError, match="no track 'sotoo'"):
        read_runs(["sotoo:muon"])
    put_record(Path("records"))
    with pytest.raises(UserError, match="Did you mean 'muon'"):
        read_runs(["sotu:muom"])


def test_track_and_optimizer_take_the_highest_row_of_the_table():
    for seed in range(3):
        put_record(Path("records"), seed=seed, final=1.40 + seed / 100, seconds=30.0)
        put_record(Path("records"), seed=seed, final=1.41 + seed / 100, seconds=20.0, steps=900)
        put_record(Path("records"), seed=seed, name="adamw", final=1.43)
    found = read_runs(["sotu:muon"])
    assert {run.declared_steps for run in found.runs} == {900}
    assert len(found.runs) == 3
    assert "highest of 2 rows" in found.notes[0]


def test_numbers_that_no_run_has_are_named_and_left_out():
    put_record(Path("records"), seed=1, final=2e6)
    put_record(Path("records"), seed=2, seconds=1e11)
    put_record(Path("records"), seed=3)
    found = read_runs(["records"])
    assert [run.seed for run in found.runs] == [3]
    assert [one.why.rsplit(" ", 2)[0] for one in found.skipped] == [
        "holds a validation loss of",
        "holds a time of",
    ]


def test_groups_part_by_steps_machine_and_source_and_by_nothing_else():
    other = LoggedMachine(gpu="NVIDIA A40", world_size=8, torch="2.9.0")
    runs = [
        a_log(3.27, file="x/a.txt", seed=1),
        a_log(
            3.28,
            file="y/b.txt",
            seed=2,
            machine=dataclasses.replace(other, gpu="NVIDIA H100 80GB HBM3", torch="2.8"),
        ),
        a_log(3.27, file="x/c.txt", machine=other),
        a_log(3.27, file="x/d.txt", source_sha256="b" * 64),
        a_log(3.27, file="x/e.txt", steps=110),
    ]
    groups = group_runs(runs)
    assert [len(group.runs) for group in groups] == [2, 1, 1, 1]
    pooled = group_runs(runs, pool=True)
    assert len(pooled) == 1
    assert set(pooled[0].differs) == {"gpu", "source sha256", "total steps"}
    assert pooled[0].identity["world size"] == 8


def test_groups_of_one_name_are_told_apart():
    runs = [a_log(3.27, file="x/a.txt", steps=steps) for steps in (100, 110)]
    labels = [(group.label, group.apart) for group in group_runs(runs)]
    assert labels == [("a", "total steps = 100"), ("a (2)", "total steps = 110")]


def test_thousands_of_groups_are_told_apart_without_a_wait():
    runs = [a_log(3.27, file="x/a.txt", total_steps=steps) for steps in range(100, 3100)]
    start = time.process_time()
    groups = group_runs(runs)
    assert time.process_time() - start < 5  # comparing each with each takes a minute
    assert (groups[0].label, groups[-1].label) == ("a", "a (3000)")
    assert groups[-1].apart == "total steps = 3099"


def test_a_repeated_seed_of_ours_counts_once_and_every_run_of_a_log_by_itself():
    ours = [
        from_record(a_record(seed=seed, final=final), "x") for seed, final in ((1, 1.4), (1, 1.6), (2, 1.3))
    ]
    assert by_seed([(run, run.curves[VAL_LOSS][-1].loss) for run in ours]) == pytest.approx([1.5, 1.3])
    logs = [a_log(3.2, file=f"{name}.txt", seed=1) for name in "ab"]
    assert len(by_seed([(run, 1.0) for run in logs])) == 2
