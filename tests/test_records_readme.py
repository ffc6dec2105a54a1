"""records/README.md: rendered from the records, the same bytes each time, and checked."""

import os
import shutil
from pathlib import Path

import pytest
from records_samples import a_record

from nanorun.records.readme import readme_text
from nanorun.records.record import write_record
from nanorun.records.states import contest

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _with_two_records(nanorun):
    for seed in range(2):
        write_record(Path("records"), a_record(seed=seed), config_toml="", source_patch=None)


def test_it_holds_the_table_of_every_track_with_records(nanorun):
    assert nanorun("report", "--readme") == (0, "", "records/README.md is rendered\n")
    text = Path("records/README.md").read_text(encoding="utf-8")
    assert "### sotu: validation loss 1.5" in text
    assert "| muon | muon + adamw | 2 |" in text
    assert "shakespeare" not in text
    assert "`nanorun report --readme`" in text


def test_it_is_stale_once_a_record_comes_or_someone_edits_it(nanorun):
    code, _, err = nanorun("report", "--readme", "--check")
    assert (code, "records/README.md is missing; render it again: nanorun report --readme" in err) == (
        1,
        True,
    )
    nanorun("report", "--readme")
    assert nanorun("report", "--readme", "--check")[0] == 0
    write_record(Path("records"), a_record(seed=2), config_toml="", source_patch=None)
    before = Path("records/README.md").read_bytes()
    code, out, err = nanorun("report", "--readme", "--check")
    assert (code, out) == (1, "")
    assert err == "nanorun: failed: records/README.md is stale; render it again: nanorun report --readme\n"
    assert Path("records/README.md").read_bytes() == before
    nanorun("report", "--readme")
    assert nanorun("report", "--readme", "--check")[0] == 0
    Path("records/README.md").write_bytes(before + b"\xff")
    assert nanorun("report", "--readme", "--check")[0] == 1


def test_it_says_which_records_are_contested_and_is_stale_until_it_does(nanorun):
    nanorun("report", "--readme")
    record = a_record(seed=1)
    contest(record.id, records=Path("records"), reason="validated on <b>training</b> text", by="Eve")
    assert nanorun("report", "--readme", "--check")[0] == 1
    nanorun("report", "--readme")
    text = Path("records/README.md").read_text(encoding="utf-8")
    assert f"muon: 1 of 2 records contested; {record.id}: contested by Eve" in text
    assert "\\<b\\>training" in text


def test_line_ends_of_another_system_are_not_stale(nanorun):
    nanorun("report", "--readme")
    path = Path("records/README.md")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert nanorun("report", "--readme", "--check")[0] == 0


def test_the_same_records_elsewhere_and_later_give_the_same_bytes(nanorun, tmp_path, monkeypatch):
    (Path("records/sotu/2026-01-01-broken-00000000")).mkdir()
    first = readme_text(Path("records"))
    shutil.copytree("records", tmp_path / "elsewhere" / "kept")
    for path in (tmp_path / "elsewhere").rglob("*"):
        os.utime(path, (1, 1))
    assert readme_text(tmp_path / "elsewhere" / "kept") == first
    assert "skipped sotu/2026-01-01-broken-00000000: record.json is missing" in first
    assert str(tmp_path) not in first


def test_the_command_it_names_has_the_options_that_were_given(nanorun, tmp_path):
    shutil.move("records", "kept")
    _, _, err = nanorun("report", "--readme", "--check", "--records", "kept", "--out", "tables.md")
    assert "render it again: nanorun report --readme --records kept --out tables.md" in err
    assert nanorun("report", "--readme", "--records", "kept", "--out", "tables.md")[0] == 0
    assert nanorun("report", "--readme", "--check", "--records", "kept", "--out", "tables.md")[0] == 0


def test_tracks_that_are_not_here_are_named_and_their_names_are_harmless(nanorun):
    Path("records/<b>_x_").mkdir()
    (Path("records/<b>_x_/2026-01-01-broken-00000000")).mkdir()
    assert "### \\<b\\>\\_x\\_\n\nRecords of a track that is not here.\n" in readme_text(Path("records"))


def test_no_records_at_all_say_how_to_make_one(tmp_path):
    assert "Make one: `nanorun train`" in readme_text(tmp_path / "none")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--check"], "add --readme"),
        (["--readme", "--track", "sotu"], "--readme renders every record"),
        (["--readme", "--json"], "--readme renders every record"),
        (["--readme", "--format", "svg"], "--readme renders every record"),
        (["--readme", "--no-curves"], "--readme renders every record"),
        (["--readme", "--records", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_what_does_not_go_with_it_is_refused(words, said, nanorun):
    code, out, err = nanorun("report", *words)
    assert (code, out) == (2, "")
    assert said in err
    assert not Path("nowhere").exists()


def test_ci_and_make_check_fail_when_it_is_stale():
    for name in (".ci/run", "Makefile"):
        assert "/nanorun report --readme --check" in (ROOT / name).read_text(encoding="utf-8")
