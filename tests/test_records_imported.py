from __future__ import annotations

import csv
import datetime
import hashlib
import io
import json
import os

import pytest
from log_samples import CODE, a_log, expected_rows, unpack_logs, val_line
from records_samples import a_record
from rich.console import Console
from typer.testing import CliRunner

from nanorun.cli import app
from nanorun.errors import UserError
from nanorun.records.imported import ImportedRun, read_imported, run_sha256
from nanorun.records.importing import import_logs, print_terminal
from nanorun.records.reading import read_logs
from nanorun.records.record import RecordError, read_records, write_record
from nanorun.records.show import report_text

NOW = datetime.datetime(2026, 11, 25, 12, tzinfo=datetime.UTC)
DATED = "Run UTC timestamp=2026-05-25T00:53:53Z\nRunning on device_name=NVIDIA H100 with world_size=8\n"
EVIL = "[bold]<script>alert(1)</script>\x1b[31m|=cmd"


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "My Log.txt"
    path.write_text(a_log(header=DATED))
    return path


def imported(path, root, **options):
    return import_logs([path], track="sotu", records=root, now=NOW, **options)


def tree(root) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def report(root, form: str) -> str:
    console = Console(width=160, force_terminal=False)
    return report_text(root, track="sotu", form=form, since=None, hardware=None, console=console)


def test_a_dry_run_gives_every_run_and_writes_nothing(tmp_path, monkeypatch):
    logs = unpack_logs(tmp_path / "logs")
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    result = CliRunner().invoke(app, ["import", str(logs), "--dry-run", "--json"])
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert set(document) == {"runs", "skipped"}
    found = {(os.path.basename(run["file"]), run["run"]): run for run in document["runs"]}
    for row in expected_rows():
        run = found[row["file"], int(row["run"])]
        assert set(run) == {
            *("file", "run", "first_val_step", "last_val_step", "total_steps", "complete", "final_val_loss"),
            *("train_seconds", "world_size", "gpu", "torch", "peak_memory_mib"),
        }
        assert run["final_val_loss"] == float(row["last_val_loss"])
        assert run["train_seconds"] == (
            float(row["last_train_seconds"]) if row["last_train_seconds"] else None
        )
        assert run["total_steps"] == (int(row["total_steps"]) if row["total_steps"] else None)
    assert tree(tmp_path) == before


def test_an_import_holds_what_the_log_says_and_what_is_claimed_apart(tmp_path, log):
    root = tmp_path / "records"
    (folder,) = imported(log, root, claimed_seconds=29.5).written
    assert folder.parent == root / "sotu"
    assert folder.name.startswith("2026-05-25-my-log-")
    assert sorted(path.name for path in folder.iterdir()) == ["curve.csv", "import.json", "source.txt"]
    (found,), skipped = read_imported(root, "sotu")
    assert skipped == []
    assert (found.claimed_seconds, found.train_seconds, found.state) == (29.5, 30.0, "claimed")
    assert (found.date, found.date_is_of_import, found.imported) == (
        "2026-05-25",
        False,
        "2026-11-25T12:00:00Z",
    )
    assert (found.machine.gpu, found.machine.world_size, found.complete) == ("NVIDIA H100", 8, True)
    assert found.log.sha256 == hashlib.sha256(log.read_bytes()).hexdigest()
    assert (folder / "source.txt").read_text() == CODE
    assert found.source_sha256 == hashlib.sha256((folder / "source.txt").read_bytes()).hexdigest()
    assert not os.path.exists("ran")
    with open(folder / "curve.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert last == {"step": "300", "train_seconds": "30.0", "val_loss": "3.27"}


def test_an_import_reads_back_as_the_run_it_came_from(tmp_path, log):
    (run,) = import_logs([log], track=None, records=tmp_path, dry_run=True).runs
    imported(log, tmp_path / "records")
    (found,), _ = read_imported(tmp_path / "records")
    again = found.to_logged_run()
    assert (again.points, again.machine, again.total_steps) == (run.points, run.machine, run.total_steps)
    assert run_sha256(again) == found.run_sha256


def test_importing_twice_writes_nothing_new_and_says_so(tmp_path, log):
    root = tmp_path / "records"
    imported(log, root)
    before = tree(root)
    copy = tmp_path / "copy.txt"
    copy.write_text(log.read_text())
    for path in (log, copy):
        result = import_logs([path], track="sotu", records=root, now=NOW + datetime.timedelta(days=3))
        assert (result.written, len(result.known)) == ((), 1)
    assert tree(root) == before
    console = Console(width=200, record=True, file=io.StringIO())
    print_terminal(result, console)
    assert "imported before" in console.export_text()


def test_a_log_without_a_day_takes_that_of_its_import(tmp_path):
    (tmp_path / "log.txt").write_text(a_log(header=""))
    (folder,) = imported(tmp_path / "log.txt", tmp_path / "records").written
    assert folder.name.startswith("2026-11-25-log-")
    assert read_imported(tmp_path / "records")[0][0].date_is_of_import


def test_every_run_of_a_file_is_an_import_of_its_own(tmp_path):
    result = imported(unpack_logs(tmp_path / "logs"), tmp_path / "records")
    assert len(result.written) == len(expected_rows())
    found, skipped = read_imported(tmp_path / "records")
    assert (len(found), skipped) == (len(expected_rows()), [])


def test_a_name_made_of_path_tricks_stays_in_its_place(tmp_path):
    for place, name in enumerate(["..", "...txt", "-rf", "a\n$(ls).txt", "x" * 200, "\udcff.txt"]):
        folder = tmp_path / f"logs{place}"
        folder.mkdir()
        path = folder / (name if name != ".." else "..log")
        path.write_text(a_log(seconds=20.0 + place))
        (written,) = imported(path, tmp_path / "records").written
        assert written.parent == tmp_path / "records" / "sotu"
    assert len(read_imported(tmp_path / "records")[0]) == 6
    assert {path.name for path in (tmp_path / "records").iterdir()} == {"sotu"}


def test_an_import_is_read_again_as_the_run_that_it_holds(tmp_path, log):
    log.write_text(f"import os\n{val_line(300, 1.5)}" + log.read_text())
    root = tmp_path / "records"
    (folder,) = imported(log, root).written
    for path in (root, folder, folder / "import.json"):
        found = read_logs([path])
        assert [(run.file, run.final_val_loss) for run in found.runs] == [(str(folder / "import.json"), 3.27)]
        assert found.skipped == ()
    assert import_logs([root], track="sotu", records=root, now=NOW).written == ()
    (folder / "import.json").write_text("{}")
    assert "format_version is missing" in read_logs([root]).skipped[0].why


def test_imports_are_no_records_and_hide_none(tmp_path, log):
    root = tmp_path / "records"
    write_record(root, a_record(), config_toml="", source_patch=None)
    imported(log, root)
    records, skipped = read_records(root)
    assert (len(records), skipped) == (1, [])
    assert len(read_imported(root)[0]) == 1


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"format_version": 2}, "upgrade nanorun"),
        ({"train_seconds": 12.0}, "train_seconds is 12.0, and the rest of the file says 30.0"),
        ({"train_seconds": "30"}, "train_seconds"),
        ({"final_val_loss": 1.0}, "final_val_loss"),
        ({"complete": False}, "complete"),
        ({"claimed_seconds": -1}, "claimed_seconds"),
        ({"claimed_seconds": 1e200}, "claimed_seconds is 1e+200; wanted a number"),
        ({"state": "proven"}, "state"),
        ({"date": "2026-02-31"}, "date"),
        ({"id": "../../x"}, "id"),
        ({"track": "../x"}, "track"),
        ({"validation": []}, "validation"),
        ({"notes": "none"}, "notes"),
        ({"machine": None}, "machine"),
        ({"source": None}, "source"),
    ],
)
def test_an_import_that_cannot_be_believed_is_refused_by_its_field(tmp_path, log, changes, what):
    (folder,) = imported(log, tmp_path / "records").written
    content = json.loads((folder / "import.json").read_text())
    with pytest.raises(RecordError) as refused:
        ImportedRun.from_dict({**content, **changes})
    assert what in str(refused.value)
    (folder / "import.json").write_text(json.dumps({**content, **changes}))
    found, skipped = read_imported(tmp_path / "records")
    assert (found, len(skipped)) == ([], 1)
    assert read_records(tmp_path / "records") == ([], [])


def test_a_long_curve_is_thinned_and_says_so(tmp_path):
    lines = [val_line(step, 9 - step / 9999, f"{step}s", 9999) for step in range(10_000)]
    (tmp_path / "log.txt").write_text("".join(lines))
    (folder,) = imported(tmp_path / "log.txt", tmp_path / "records").written
    assert (folder / "import.json").stat().st_size < 100_000
    (found,), _ = read_imported(tmp_path / "records")
    assert len(found.validation) + found.validation_left_out == 10_000
    assert found.final_val_loss == 8.0
    assert len((folder / "curve.csv").read_text().splitlines()) == 10_001


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"track": "no-such-track"}, "no track 'no-such-track'"),
        ({"track": None}, "--track is missing"),
        ({"track": "sotu", "claimed_seconds": float("nan")}, "--claimed-seconds nan"),
        ({"track": "sotu", "claimed_seconds": -3.0}, "--claimed-seconds -3.0"),
    ],
)
def test_a_mistake_of_the_users_is_named_before_anything_is_written(tmp_path, log, options, what):
    with pytest.raises(UserError) as refused:
        import_logs([log], records=tmp_path / "records", **options)
    assert what in str(refused.value)
    assert not (tmp_path / "records").exists()


def test_the_report_shows_imports_apart_and_without_a_rank(tmp_path, log):
    root = tmp_path / "records"
    write_record(root, a_record(), config_toml="", source_patch=None)
    (tmp_path / "other.txt").write_text(a_log((10.8, 4.5, 3.6, 3.25), header=DATED, seconds=32.0))
    short = a_log(header=DATED, seconds=31.0).splitlines(keepends=True)[:-1]
    (tmp_path / "short.txt").write_text("".join(short))
    import_logs([tmp_path], track="sotu", records=root, claimed_seconds=29.0, now=NOW)
    document = json.loads(report(root, "json"))
    (row,) = document["imported"]["rows"]
    assert (row["n"], row["left_out"], row["hardware"]) == (2, 1, "8 × NVIDIA H100")
    assert row["loss_mean"] == pytest.approx(3.26)
    assert (row["seconds_mean"], row["claimed_seconds"]) == (31.0, [29.0])
    assert [own["name"] for own in document["rows"]] == ["muon"]
    for form in ("table", "markdown"):
        text = report(root, form)
        assert text.index("muon") < text.index("imported logs") < text.index("3.26000 ±0.01414")
        assert "1 of 3 runs ended before the declared last step" in text
    assert "imported" not in report(root, "csv")


def test_a_report_without_imports_says_nothing_of_them(tmp_path):
    write_record(tmp_path, a_record(), config_toml="", source_patch=None)
    assert "imported" not in report(tmp_path, "table") + report(tmp_path, "markdown")
    assert json.loads(report(tmp_path, "json"))["imported"]["rows"] == []


def test_hostile_text_of_a_log_is_escaped_wherever_it_is_shown(tmp_path):
    header = f"Running on device_name={EVIL} with world_size=8\n"
    (tmp_path / "log.txt").write_text(a_log(header=header))
    result = imported(tmp_path / "log.txt", tmp_path / "records")
    assert result.runs[0].machine.gpu == EVIL
    console = Console(width=200, record=True, file=io.StringIO(), force_terminal=True)
    print_terminal(result, console)
    shown = console.export_text(styles=True)
    assert "[bold]<script>" in shown
    assert "\x1b[31m" not in shown
    markdown = report(tmp_path / "records", "markdown")
    assert "<script>" not in markdown.replace("\\<script", "")
    assert "\x1b" not in markdown + report(tmp_path / "records", "table")


def test_the_help_of_import_names_its_formats():
    result = CliRunner().invoke(app, ["import", "--help"])
    assert all(word in result.stdout for word in ("modded-nanogpt", "llm.c", "nanoGPT"))
