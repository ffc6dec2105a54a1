"""The state of a record: computed from the files beside it, none of which is believed further than it checks."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from records_samples import a_dict, a_record
from rich.console import Console

from nanorun.errors import UserError
from nanorun.records import states as states_module
from nanorun.records.agreement import compare_runs
from nanorun.records.record import MAX_BYTES, Record, load_json, read_records, write_record
from nanorun.records.report import TrackView, build_table, print_terminal, to_csv, to_dict, to_markdown
from nanorun.records.show import report_text
from nanorun.records.significance import Rule
from nanorun.records.states import (
    FOLDER,
    MOST_FILES,
    Objection,
    Reproduction,
    State,
    content_sha256,
    contest,
    find_record,
    state_of,
    states_of,
    who,
    write_beside,
)

SOTU = TrackView("sotu", 1.55, "seconds", Rule("t", n=3, alpha=0.05))
HOSTILE = "\x1b[2J\u202e[red]<b>=1+1|`\n\x00"


@pytest.fixture
def record() -> Record:
    return a_record()


@pytest.fixture
def folder(tmp_path: Path, record: Record) -> Path:
    return write_record(tmp_path / "records", record, config_toml="", source_patch=None)


def a_reproduction(
    folder: Path, record: Record, *, loss: float | None = None, **changes: Any
) -> Reproduction:
    """The record's run once more, ending with `loss` and other bits where one is given."""
    again = record if loss is None else a_record(final=loss, final_weights_sha256="e" * 64)
    kept: dict[str, Any] = {
        "format_version": 1,
        "kind": "reproduction",
        "record": record.id,
        "record_sha256": content_sha256(load_json(folder / "record.json")),
        "by": "Ada",
        "created": "2026-11-25T10:00:00+00:00",
        "seed": again.seed,
        "hardware": again.hardware,
        "software": again.software,
        "code": again.code,
        "differences": ("torch: 2.9.0 then, 2.10.0 here",),
        "initial_weights_sha256": again.initial_weights_sha256,
        "final_weights_sha256": again.final_weights_sha256,
        "steps": again.steps,
        "validation": again.validation,
        "final_val_loss": again.final_val_loss,
        "clock": again.clock,
        "peak_memory_mib": again.peak_memory_mib,
        "agreement": compare_runs(record, again, [record], same_code=True),
    }
    return Reproduction(**{**kept, **changes})


def an_objection(folder: Path, reason: str = "it validated on training text", **changes: Any) -> Objection:
    kept = {
        "format_version": 1,
        "kind": "objection",
        "record": folder.name,
        "record_sha256": content_sha256(load_json(folder / "record.json")),
        "by": "Eve",
        "created": "2026-11-26T10:00:00+00:00",
        "reason": reason,
    }
    return Objection(**{**kept, **changes})


def put(folder: Path, content: dict[str, Any], name: str | None = None) -> Path:
    """Write a file as anyone could, under the name that its content asks for unless said."""
    path = folder / FOLDER / (name or f"2026-11-25-{content_sha256(content)[:8]}.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def content_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_record_that_nobody_looked_at_is_claimed(folder: Path):
    assert state_of(folder).name == "claimed"
    assert state_of(folder).describe() == "claimed"


def test_a_reproduction_reads_back_and_makes_the_record_reproduced(folder: Path, record: Record):
    one = a_reproduction(folder, record)
    path, state = write_beside(folder, one)
    assert state == state_of(folder) == State(reproductions=(one,))
    assert state.name == "reproduced"
    assert state.describe() == "reproduced by Ada, 2026-11-25, Intel Xeon @ 2.80GHz, 2 of 2 cores"
    assert os.listdir(folder / FOLDER) == [path.name]
    assert read_records(folder.parent.parent) == ([record], [])


def test_one_disagreeing_reproduction_contests_whatever_agrees(folder: Path, record: Record):
    write_beside(folder, a_reproduction(folder, record))
    write_beside(folder, a_reproduction(folder, record, loss=1.7, by="Bob"))
    state = state_of(folder)
    assert state.name == "contested"
    assert "contested by Bob" in state.describe()
    assert "loss 1.5400 recorded, 1.7000 there" in state.describe()


def test_an_objection_contests_and_removing_it_withdraws_it(folder: Path, record: Record):
    write_beside(folder, a_reproduction(folder, record))
    path, state = write_beside(folder, an_objection(folder))
    assert state.name == "contested"
    assert state.describe() == "contested by Eve, 2026-11-26: it validated on training text"
    path.unlink()
    assert state_of(folder).name == "reproduced"


def test_a_file_is_never_written_over_another(folder: Path, record: Record):
    one = a_reproduction(folder, record)
    path, _ = write_beside(folder, one)
    before = path.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        write_beside(folder, one)
    assert path.read_bytes() == before
    assert os.listdir(folder / FOLDER) == [path.name]


@pytest.mark.parametrize("call", ["fsync", "link"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_refuses_leaves_nothing_half_written(folder, record, monkeypatch, call: str, number: int):
    def refuse(*_arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(states_module.os, call, refuse)
    if call == "link":
        monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match=os.strerror(number)):
        write_beside(folder, a_reproduction(folder, record))
    assert os.listdir(folder / FOLDER) == []
    assert state_of(folder).name == "claimed"


def test_a_disk_without_hard_links_keeps_the_file_and_never_overwrites(folder, record, monkeypatch):
    def refuse(*_arguments: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(states_module.os, "link", refuse)
    one = a_reproduction(folder, record)
    path, state = write_beside(folder, one)
    assert state.name == "reproduced"
    with pytest.raises(UserError, match="exists already"):
        write_beside(folder, one)
    assert os.listdir(folder / FOLDER) == [path.name]


def test_ctrl_c_while_writing_leaves_nothing_half_written(folder, record, monkeypatch):
    def interrupt(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(states_module.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_beside(folder, a_reproduction(folder, record))
    assert os.listdir(folder / FOLDER) == []


def test_a_long_curve_is_thinned_to_the_size_that_is_read_back(folder: Path, record: Record):
    curve = a_record(points=1001).validation
    path, state = write_beside(folder, a_reproduction(folder, record, validation=curve))
    assert path.stat().st_size < MAX_BYTES
    assert state.name == "reproduced"
    assert state.reproductions[0].validation[0] == curve[0]
    assert state.reproductions[0].validation[-1] == curve[-1]
    assert curve[800] in state.reproductions[0].validation


BROKEN = {
    "altered": (lambda c: c.update(by="Mallory"), "was altered"),
    "another record": (
        lambda c: c.update(record="2026-11-24-other-00000000"),
        "record is '2026-11-24-other-0",
    ),
    "other content": (lambda c: c.update(record_sha256="0" * 64), "has changed since"),
    "kind": (lambda c: c.update(kind="praise"), "kind is 'praise'; wanted reproduction or objection"),
    "no kind": (lambda c: c.pop("kind"), "kind is None"),
    "version": (lambda c: c.update(format_version=7), "upgrade nanorun"),
    "field missing": (lambda c: c.pop("clock"), "clock is missing"),
    "inner field": (lambda c: c["agreement"].pop("verdict"), "agreement.verdict is missing"),
    "negative": (lambda c: c.update(steps=-1), "steps is -1"),
    "a text for a list": (lambda c: c.update(differences="x"), "differences is 'x'; wanted a list"),
    "a number among texts": (lambda c: c.update(differences=[1]), "differences[0] is 1; wanted a text"),
    "date": (lambda c: c.update(created="yesterday"), "created is 'yesterday'"),
    "nobody": (lambda c: c.update(by="  "), "by is empty"),
    "device": (lambda c: c["hardware"].update(device="abacus"), "hardware.device is 'abacus'"),
    "verdict": (lambda c: c["agreement"].update(verdict="disagrees"), "its own numbers say otherwise"),
    "seconds": (lambda c: c["agreement"].update(seconds_agree=False), "its own numbers say otherwise"),
    "loss": (
        lambda c: c["agreement"].update(reproduced_val_loss=9.0),
        "agreement.loss_agrees is true of losses 7",
    ),
    "huge": (lambda c: c.update(note="x" * MAX_BYTES), "wanted fewer than"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_that_cannot_be_believed_is_named_and_decides_nothing(folder, record, what: str):
    path, _ = write_beside(folder, a_reproduction(folder, record))
    content = content_of(path)
    path.unlink()
    change, why = BROKEN[what]
    change(content)
    put(folder, content, path.name if what == "altered" else None)
    state = state_of(folder)
    assert state.name == "claimed"
    ((_, said),) = state.broken
    assert why in said
    assert read_records(folder.parent.parent) == ([record], [])


RAW = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe",
    b'{"format_version": 1, "kind": NaN}',
    b"[" * 50_000,
    b"9" * 5000,
]
RAW += [b'{"format_version": 1, "kind": "reproduction", "steps": ' + b"9" * 4000 + b"}"]


def end_elsewhere(content: dict[str, Any]) -> None:
    """The file's run ends with another loss than its agreement compares."""
    content["final_val_loss"] = content["validation"][-1]["val_loss"] = 9.0


def compare_earlier(content: dict[str, Any]) -> None:
    end_elsewhere(content)
    step = content["validation"][-2]["step"]
    loss = content["validation"][-2]["val_loss"]
    content["agreement"].update(compared_step=step, recorded_val_loss=loss, reproduced_val_loss=loss)


def widen(content: dict[str, Any]) -> None:
    end_elsewhere(content)
    content["final_weights_sha256"] = "e" * 64
    content["agreement"].update(same_final_weights=False, reproduced_val_loss=9.0, loss_tolerance=8.0)


def claim_another_loss(content: dict[str, Any]) -> None:
    """A record of a wrong loss, judged by the right one."""
    end_elsewhere(content)
    content["agreement"].update(recorded_val_loss=9.0, reproduced_val_loss=9.0)


def miss_the_crossing(content: dict[str, Any]) -> None:
    content["final_weights_sha256"] = "e" * 64
    content["agreement"].update(same_final_weights=False)
    content["validation"][8]["val_loss"] = 1.7


def differ_halfway(content: dict[str, Any]) -> None:
    content["validation"][4]["val_loss"] = 5.0


def take_longer(content: dict[str, Any]) -> None:
    content["clock"]["train_seconds"] = 100.0
    content["agreement"].update(reproduced_seconds=100.0)


def take_as_long_and_disagree(content: dict[str, Any]) -> None:
    content["agreement"].update(seconds_agree=False, verdict="disagrees")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (end_elsewhere, "agreement.reproduced_val_loss is 1.54; the record and the run beside it say 9.0"),
        (compare_earlier, "agreement.compared_step is 900; the record and the run beside it say 1000"),
        (
            widen,
            "agreement.loss_tolerance is 8; wanted at most 0.0077, for the same seed and initial weights",
        ),
        (claim_another_loss, "agreement.recorded_val_loss is 9.0; the record and the run beside it say 1.54"),
        (miss_the_crossing, "agreement.loss_agrees is true, and at step 800, where the record first reached"),
        (differ_halfway, "agreement.loss_agrees is true, and the losses after step 400 are not of one run"),
        (take_longer, "agreement.seconds_agree is True, of 31.2 and 100 seconds"),
        (take_as_long_and_disagree, "agreement.seconds_agree is False, of 31.2 and 31.2 seconds"),
        (lambda c: c["agreement"].update(recorded_seconds=1.0), "agreement.recorded_seconds is 1.0"),
        (lambda c: c["agreement"].update(reproduced_seconds=1.0), "agreement.reproduced_seconds is 1.0"),
        (lambda c: c.update(final_weights_sha256="e" * 64), "agreement.same_final_weights is True"),
        (lambda c: c.update(initial_weights_sha256="e" * 64), "agreement.same_initial_weights is True"),
    ],
)
def test_a_verdict_that_does_not_follow_from_record_curve_and_clock_decides_nothing(
    folder, record, change, why: str
):
    path, _ = write_beside(folder, a_reproduction(folder, record))
    content = content_of(path)
    path.unlink()
    change(content)
    put(folder, content)
    state = state_of(folder)
    assert state.name == "claimed"
    ((_, said),) = state.broken
    assert why in said


@pytest.mark.parametrize(
    "changes", [{"steps": 730, "points": 2, "validation": []}, {"validation_tokens": 10}]
)
def test_a_disagreement_for_another_reason_than_a_loss_contests(folder, record, changes: dict[str, Any]):
    again = a_record(**changes, reached=None) if "steps" in changes else a_record(**changes)
    found = compare_runs(record, again, [record], same_code=True)
    kept = {"steps": again.steps, "validation": again.validation, "agreement": found}
    _, state = write_beside(folder, a_reproduction(folder, record, **kept))
    assert (state.name, state.broken) == ("contested", ())


def test_the_committed_reproduction_is_believed():
    folder = Path(__file__).parent.parent / "records/shakespeare-sprint/2026-11-25-muon-0708d573"
    assert (state_of(folder).name, state_of(folder).broken) == ("reproduced", ())


@pytest.mark.parametrize("raw", RAW)
def test_a_file_of_anything_else_is_named_and_hides_no_good_one(folder, record, raw: bytes):
    write_beside(folder, a_reproduction(folder, record))
    (folder / FOLDER / "2026-11-25-00000000.json").write_bytes(raw)
    (folder / FOLDER / "notes.txt").write_text("hello")
    (folder / FOLDER / ".writing-half").write_text("half")
    os.mkfifo(folder / FOLDER / "2026-11-25-11111111.json")
    (folder / FOLDER / "2026-11-25-22222222.json").symlink_to("/dev/zero")
    (folder / FOLDER / "2026-11-25-33333333.json").mkdir()
    state = state_of(folder)
    assert state.name == "reproduced"
    assert len(state.broken) == 5


@pytest.mark.parametrize("kind", ["file", "loop"])
def test_something_else_in_the_place_of_the_folder_is_named(folder: Path, kind: str):
    if kind == "file":
        (folder / FOLDER).write_text("in the way")
    else:
        (folder / FOLDER).symlink_to(FOLDER)
    state = state_of(folder)
    assert state.name == "claimed"
    assert len(state.broken) == 1


def test_nothing_is_written_through_a_link_in_the_place_of_the_folder(folder, record, tmp_path: Path):
    elsewhere = tmp_path / "elsewhere\x1b[2J"
    elsewhere.mkdir()
    (folder / FOLDER).symlink_to(elsewhere)
    for one in (a_reproduction(folder, record), an_objection(folder)):
        with pytest.raises(UserError, match=r"is a link to .*remove the link") as caught:
            write_beside(folder, one)
        assert str(caught.value).isprintable()
    assert os.listdir(elsewhere) == []


def test_a_folder_of_too_many_files_is_read_so_far_and_the_rest_is_named(folder: Path, monkeypatch):
    monkeypatch.setattr(states_module, "MOST_FILES", 3)
    for n in range(5):
        write_beside(folder, an_objection(folder, f"reason {n}"))
    state = state_of(folder)
    assert len(state.objections) == 3
    assert "holds 2 files beyond 3" in state.broken[0].why
    assert MOST_FILES >= 1000


def test_a_record_changed_after_it_was_reproduced_is_not_reproduced(folder: Path, record: Record):
    write_beside(folder, a_reproduction(folder, record))
    content = content_of(folder / "record.json")
    (folder / "record.json").write_text(json.dumps({**content, "peak_memory_mib": 1.0}))
    state = state_of(folder)
    assert state.name == "claimed"
    assert "has changed since" in state.broken[0].why


def test_another_layout_of_the_same_record_stays_reproduced(folder: Path, record: Record):
    write_beside(folder, a_reproduction(folder, record))
    content = content_of(folder / "record.json")
    (folder / "record.json").write_text(json.dumps(content, indent=4, sort_keys=True))
    assert state_of(folder).name == "reproduced"


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_change_of_a_good_file_is_read_or_named_and_never_raises(folder: Path, record: Record, data):
    content = json.loads(json.dumps(dataclasses.asdict(a_reproduction(folder, record))))
    content["validation"] = [point._asdict() for point in record.validation]
    inside = data.draw(
        st.sampled_from([content, content["agreement"], content["hardware"], content["clock"]])
    )
    inside[data.draw(st.sampled_from(sorted(inside)))] = data.draw(plain)
    text = json.dumps(content)
    is_json = not ("NaN" in text or "Infinity" in text)
    digest = content_sha256(json.loads(text))[:8] if is_json else "a" * 8
    path = folder / FOLDER / f"2026-11-25-{digest}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    state = state_of(folder)
    assert len(state.reproductions) + len(state.objections) + len(state.broken) == 1
    assert state.describe().isprintable()
    path.unlink()


def table(root: Path):
    records, skipped = read_records(root)
    return build_table(SOTU, records, skipped=skipped, states=states_of(root, records))


def test_the_report_tells_of_each_row_how_many_records_are_reproduced_or_contested(tmp_path: Path):
    root = tmp_path / "records"
    folders = []
    for seed in range(3):
        one = a_record(seed=seed, final=1.54 + 0.001 * seed)
        folders.append((write_record(root, one, config_toml="", source_patch=None), one))
    write_beside(folders[0][0], a_reproduction(*folders[0]))
    write_beside(folders[1][0], an_objection(folders[1][0]))
    (row,) = table(root).rows
    assert (row.runs, row.reproduced, row.contested) == (3, 1, 1)
    assert to_dict(table(root))["rows"][0]["reproduced"] == 1
    notes = "\n".join(table(root).notes)
    assert f"muon: 1 of 3 records contested; {folders[1][1].id}: contested by Eve, 2026-11-26" in notes
    assert f"muon: 1 of 3 records reproduced; {folders[0][1].id}: reproduced by Ada, 2026-11-25" in notes
    header, line = to_csv(table(root)).splitlines()
    assert header.endswith("reproduced,contested")
    assert line.endswith("1,1")


def test_a_copy_of_the_id_in_another_track_hides_no_contest(tmp_path: Path):
    root = tmp_path / "records"
    content = a_dict()
    contested = write_record(root, Record.from_dict(content), config_toml="", source_patch=None)
    write_beside(contested, an_objection(contested))
    copied = Record.from_dict({**content, "track": "zoo"})
    copy = write_record(root, copied, config_toml="", source_patch=None)
    assert (copy.name, copy.parent.name) == (contested.name, "zoo")
    write_beside(copy, a_reproduction(copy, copied))
    (row,) = table(root).rows
    assert (row.reproduced, row.contested) == (0, 1)
    page = report_text(root, track=None, form="html", since=None, hardware=None, console=Console())
    assert ">contested<" in page
    assert ">reproduced<" not in page


def test_the_report_of_records_that_nobody_looked_at_says_nothing_of_it(tmp_path: Path):
    write_record(tmp_path, a_record(), config_toml="", source_patch=None)
    assert not [note for note in table(tmp_path).notes if "reproduced" in note or "contested" in note]
    assert table(tmp_path).rows[0].reproduced == 0


def test_hostile_words_reach_no_form_of_the_report_unescaped(folder: Path, record: Record):
    root = folder.parent.parent
    write_beside(folder, an_objection(folder, reason=f"why {HOSTILE}", by=f"Eve {HOSTILE}"))
    (folder / FOLDER / "\x1b[31mevil\n.json").write_text("{}")
    console = Console(width=200, force_terminal=False)
    with console.capture() as captured:
        print_terminal(table(root), console)
    out = captured.get()
    assert "contested by Eve" in out
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "evil" in out
    markdown = to_markdown(table(root))
    assert "<b>" not in markdown
    assert "\x1b" not in markdown
    assert state_of(folder).describe().isprintable()


def test_contesting_writes_one_file_and_says_what_came_of_it(folder: Path, tmp_path: Path):
    root = folder.parent.parent
    done = contest(folder.name, records=root, reason=f"  wrong {HOSTILE}", by=f" Eve  {HOSTILE} ")
    assert done["state"] == "contested"
    (objection,) = state_of(folder).objections
    assert objection.reason.isprintable()
    assert objection.by.isprintable()
    assert objection.reason.startswith("wrong ")
    with pytest.raises(UserError, match="--reason is empty"):
        contest(folder.name, records=root, reason=" \n ", by="Eve")
    with pytest.raises(UserError, match="--by is empty"):
        contest(folder.name, records=root, reason="wrong", by="  ")


def test_a_record_is_found_by_its_folder_its_file_or_its_id(folder: Path, tmp_path: Path):
    root = folder.parent.parent
    for text in (str(folder), str(folder / "record.json"), folder.name):
        assert find_record(text, root) == folder.resolve()
    for text in ("../../etc/passwd", "*", "", "muon", "\x1b[2J", "x" * 10_000, "2026-11-24-../../x-00000000"):
        with pytest.raises(UserError, match="neither a record's folder"):
            find_record(text, root)
    with pytest.raises(UserError, match=f"no record 2026-11-24-muon-00000000 .*Did you mean '{folder.name}'"):
        find_record("2026-11-24-muon-00000000", root)
    other = root / "other" / folder.name
    other.mkdir(parents=True)
    (other / "record.json").write_text("{}")
    with pytest.raises(UserError, match=r"lies in .* and in "):
        find_record(folder.name, root)


def test_a_name_is_taken_from_git_or_is_anonymous(monkeypatch, tmp_path: Path):
    assert who("  Ada   Lovelace ") == "Ada Lovelace"
    assert len(who("x" * 500)) <= 80
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    assert who(None) == "anonymous"
    (tmp_path / ".gitconfig").write_text("[user]\n\tname = Grace Hopper\n")
    assert who(None) == "Grace Hopper"
    monkeypatch.setenv("PATH", "")
    assert who(None) == "anonymous"


def test_the_commands_import_no_torch_and_end_in_a_sentence(folder: Path):
    code = (
        "import sys; sys.argv = ['nanorun', 'contest', *sys.argv[1:]]\n"
        "from nanorun import cli\n"
        "try:\n    cli.main()\nexcept SystemExit as ended:\n    print('code', ended.code)\n"
        "print('torch' in sys.modules)"
    )
    words = [folder.name, "--records", str(folder.parent.parent), "--reason", "wrong", "--by", "Eve"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert "contested by Eve" in done.stdout, done.stderr
    assert done.stdout.endswith("False\n")
    done = subprocess.run([sys.executable, "-c", code, "nothing", *words[1:]], capture_output=True, text=True)
    assert "code 2" in done.stdout
    assert "neither a record's folder" in done.stderr
    assert "Traceback" not in done.stderr
