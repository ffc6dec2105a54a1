"""Records: written once and whole, read back strictly, and never a traceback for what a file holds."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from records_samples import A_MIX, a_dict, a_record, on_a_mix

from nanorun.errors import UserError
from nanorun.records import record as record_module
from nanorun.records.record import (
    FORMAT_VERSION,
    LARGEST_NUMBER,
    MAX_BYTES,
    Record,
    RecordError,
    ValidationPoint,
    holds_import,
    read_records,
    record_id,
    write_record,
)
from nanorun.records.significance import mean, std


def put(root: Path, content: dict[str, Any], *, track: str | None = None, folder: str | None = None) -> Path:
    """Write a record's content, however wrong, where its id says."""
    place = root / (track or content["track"]) / (folder or content["id"])
    place.mkdir(parents=True)
    (place / "record.json").write_text(json.dumps(content), encoding="utf-8")
    return place


def changed(path: str, value: object) -> dict[str, Any]:
    """A good record's content with one dotted key set; `...` deletes it."""
    content = copy.deepcopy(a_dict())
    *outer, last = path.split(".")
    inner: Any = content
    for key in outer:
        inner = inner[int(key) if key.isdigit() else key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return content


def test_a_record_reads_back_as_it_was_written(tmp_path: Path):
    record = a_record(code={**a_dict()["code"], "dirty": True, "patch": "source.patch"})
    folder = write_record(tmp_path, record, config_toml="seed = 0\n", source_patch="--- a\n+++ b\n")
    assert folder == tmp_path / "sotu" / record.id
    assert sorted(os.listdir(folder)) == ["config.toml", "curve.csv", "record.json", "source.patch"]
    assert os.listdir(folder.parent) == [record.id]
    assert read_records(tmp_path) == ([record], [])
    assert (folder / "config.toml").read_text() == "seed = 0\n"
    curve = (folder / "curve.csv").read_text().splitlines()
    assert curve[0] == "step,tokens,train_seconds,val_loss"
    assert len(curve) == 1 + len(record.validation)


def test_a_mix_comes_back_and_a_record_without_one_does_not_name_it(tmp_path: Path):
    record = a_record(**on_a_mix())
    assert [one.share for one in record.corpus.mix] == [0.7, 0.3]
    folder = write_record(tmp_path, record, config_toml="", source_patch=None)
    assert json.loads((folder / "record.json").read_text())["corpus"]["mix"] == A_MIX
    assert read_records(tmp_path) == ([record], [])
    plain = a_record()
    assert plain.corpus.mix == ()
    assert set(plain.to_dict()["corpus"]) == set(a_dict()["corpus"])


def test_a_record_is_never_overwritten(tmp_path: Path):
    record = a_record()
    folder = write_record(tmp_path, record, config_toml="first", source_patch=None)
    with pytest.raises(UserError, match="exists already"):
        write_record(tmp_path, record, config_toml="second", source_patch=None)
    assert (folder / "config.toml").read_text() == "first"
    assert os.listdir(folder.parent) == [record.id]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_a_disk_that_refuses_leaves_nothing_half_written(tmp_path: Path, monkeypatch, number: int):
    def refuse(_descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(record_module.os, "fsync", refuse)
    with pytest.raises(UserError, match=os.strerror(number)):
        write_record(tmp_path, a_record(), config_toml="", source_patch=None)
    assert [path for path in tmp_path.rglob("*") if path.is_file() or path.name.startswith(".")] == []
    assert read_records(tmp_path) == ([], [])


def test_ctrl_c_while_writing_leaves_nothing_half_written(tmp_path: Path, monkeypatch):
    def interrupt(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(record_module.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_record(tmp_path, a_record(), config_toml="", source_patch=None)
    assert list((tmp_path / "sotu").iterdir()) == []


def test_a_long_curve_is_thinned_and_the_record_says_so(tmp_path: Path):
    record = a_record(points=5001, steps=5000)
    folder = write_record(tmp_path, record, config_toml="", source_patch=None)
    assert (folder / "record.json").stat().st_size < MAX_BYTES
    (read,), skipped = read_records(tmp_path)
    assert not skipped
    assert read.validation_left_out == len(record.validation) - len(read.validation) > 0
    assert read.validation[0] == record.validation[0]
    assert read.validation[-1] == record.validation[-1]
    assert read.reached == record.reached
    assert len((folder / "curve.csv").read_text().splitlines()) == 5002


def test_a_record_too_large_without_its_curve_is_refused(tmp_path: Path):
    record = a_record(config={"note": "x" * MAX_BYTES})
    with pytest.raises(UserError, match="fewer than"):
        write_record(tmp_path, record, config_toml="", source_patch=None)
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path):
    record = dataclasses.replace(a_record(), final_val_loss=float("nan"))
    with pytest.raises(RecordError, match="final_val_loss"):
        write_record(tmp_path, record, config_toml="", source_patch=None)
    with pytest.raises(RecordError, match=r"code\.patch"):
        write_record(tmp_path, a_record(), config_toml="", source_patch="a patch")
    assert list(tmp_path.iterdir()) == []


def test_an_id_is_the_day_a_safe_name_and_a_hash_of_the_content():
    content = a_dict()
    found = record_id("2026-11-24T12:30:00Z", "muon", content)
    assert found.startswith("2026-11-24-muon-")
    assert found == content["id"] == record_id("2026-11-24", "muon", dict(reversed(content.items())))
    assert found != record_id("2026-11-24", "muon", {**content, "seed": 1})
    hostile = record_id("2026-11-24", "../../Etc/pass wd\n", content)
    assert "/" not in hostile
    assert Record.from_dict({**content, "id": hostile}).id == hostile
    assert record_id("2026-11-24", "..", content).startswith("2026-11-24-run-")


@pytest.mark.parametrize(
    "path", [*a_dict(), "corpus.name", "clock.total_seconds", "hardware.n_cpus", "code.dirty"]
)
def test_a_missing_key_is_named(path: str):
    with pytest.raises(RecordError) as caught:
        Record.from_dict(changed(path, ...))
    assert str(caught.value) == f"{path} is missing"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", True),
        ("seed", 1.0),
        ("seed", -1),
        ("seed", 2**63),
        ("completed", 1),
        ("name", None),
        ("name", "  "),
        ("name", "half \ud800"),
        ("final_val_loss", float("nan")),
        ("final_val_loss", float("inf")),
        ("final_val_loss", "1.5"),
        ("final_val_loss", -0.1),
        ("created", "2026-11-24T12:30:00"),
        ("created", "2026-13-24T12:30:00Z"),
        ("created", "yesterday"),
        ("id", "../../etc"),
        ("track", "../sotu"),
        ("track", "benchmarks"),
        ("config", []),
        ("config.optim.matrix.lr", float("inf")),
        ("corpus", "sotu"),
        ("corpus.vocab_size", 2.5),
        ("corpus.mix", {}),
        ("corpus.mix", [{"name": "a", "share": 1.5, "manifest_sha256": "b"}]),
        ("corpus.mix", [{"name": "a", "share": 0, "manifest_sha256": "b"}]),
        ("code.patch", "/etc/passwd"),
        ("hardware.device", "tpu"),
        ("software.compiled", "no"),
        ("clock", None),
        ("clock.train_seconds", -1),
        ("validation", {}),
        ("reached.step", "800"),
        ("bits_per_byte", "2"),
        ("steps", 2000),
    ],
)
def test_a_wrong_value_is_named(path: str, value: object):
    with pytest.raises(RecordError) as caught:
        Record.from_dict(changed(path, value))
    assert str(caught.value).startswith(path + " ")
    assert str(caught.value).isprintable()


def test_a_wrong_validation_point_is_named_by_its_place():
    with pytest.raises(RecordError, match=r"^validation\[3\]\.val_loss is 'low'"):
        Record.from_dict(changed("validation.3.val_loss", "low"))
    with pytest.raises(RecordError, match=r"^validation\[3\]\.tokens is missing"):
        Record.from_dict(changed("validation.3.tokens", ...))
    with pytest.raises(RecordError, match=r"^validation\[3\] is step 100 after step 200"):
        Record.from_dict(changed("validation.3.step", 100))


def test_a_wrong_corpus_of_a_mix_is_named_by_its_place():
    with pytest.raises(RecordError, match=r"^corpus\.mix\[0\] is 3; wanted an object"):
        Record.from_dict(changed("corpus.mix", [3]))
    with pytest.raises(RecordError, match=r"^corpus\.mix\[1\]\.share is missing"):
        Record.from_dict(changed("corpus.mix", [A_MIX[0], {"name": "novels", "manifest_sha256": "d" * 64}]))


def test_fields_that_contradict_one_another_are_refused():
    with pytest.raises(RecordError, match="reached says step None, and the validation points say step 800"):
        Record.from_dict(changed("reached", None))
    with pytest.raises(RecordError, match=r"final_val_loss is 1\.2"):
        Record.from_dict(changed("final_val_loss", 1.2))
    with pytest.raises(RecordError, match="completed is true after 1000 of 2000"):
        Record.from_dict(changed("declared_steps", 2000))


def test_a_crossing_has_the_seconds_of_its_validation_point():
    with pytest.raises(
        RecordError, match=r"^reached\.seconds is 1\.0, and the validation point of step 800 says 2"
    ):
        Record.from_dict(changed("reached.seconds", 1.0))
    rounded = changed("reached.seconds", round(a_dict()["reached"]["seconds"], 3))
    assert Record.from_dict(rounded).reached.step == 800


@pytest.mark.parametrize(
    "path", ["clock.train_seconds", "final_val_loss", "validation.3.train_seconds", "peak_memory_mib"]
)
def test_a_number_too_large_to_compute_with_is_refused(path: str):
    with pytest.raises(RecordError, match=r"is 1e\+200; wanted a number of 0 or more and below 1e\+50$"):
        Record.from_dict(changed(path, 1e200))


def test_the_largest_numbers_that_are_read_have_a_mean_and_a_spread():
    values = [math.nextafter(LARGEST_NUMBER, 0), 0.0, 1.0]
    assert math.isfinite(mean(values))
    assert math.isfinite(std(values))


def test_a_folder_that_may_not_be_searched_holds_no_import(tmp_path, monkeypatch):
    def refuse(*_arguments: object, **_options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", refuse)
        found = holds_import(tmp_path)
    assert not found


def test_a_newer_version_says_to_upgrade():
    with pytest.raises(RecordError, match="upgrade nanorun"):
        Record.from_dict({"format_version": FORMAT_VERSION + 1, "anything": "else"})


def test_keys_of_later_versions_are_ignored_and_clock_totals_kept():
    content = changed("a_later_key", {"deep": [1]})
    content["clock"] |= {"averaging_seconds": 1.5, "paused": "text"}
    record = Record.from_dict(content)
    assert record.clock["averaging_seconds"] == 1.5
    assert "paused" not in record.clock
    assert "a_later_key" not in record.to_dict()
    assert record.validation[0] == ValidationPoint(0, 0, 0.0, 5.5)


def test_a_broken_record_among_good_ones_is_named_and_skipped(tmp_path: Path):
    good = [a_dict(seed=seed) for seed in range(3)]
    for content in good:
        put(tmp_path, content)
    broken = {
        "truncated": json.dumps(good[0])[:500].encode(),
        "empty": b"",
        "latin": '{"name": "é"}'.encode("latin-1"),
        "nan": b'{"format_version": 1, "seed": NaN}',
        "deep": b"[" * 90_000,
        "digits": b'{"format_version": ' + b"9" * 5000 + b"}",
        "list": b"[]",
        "huge": b" " * MAX_BYTES,
        "newer": b'{"format_version": 2}',
    }
    for name, content in broken.items():
        (tmp_path / "sotu" / name).mkdir()
        (tmp_path / "sotu" / name / "record.json").write_bytes(content)
    (tmp_path / "sotu" / "nothing").mkdir()
    (tmp_path / "sotu" / "pipe").mkdir()
    os.mkfifo(tmp_path / "sotu" / "pipe" / "record.json")
    records, skipped = read_records(tmp_path, "sotu")
    assert sorted(record.seed for record in records) == [0, 1, 2]
    assert {skip.path.name for skip in skipped} == {*broken, "nothing", "pipe"}
    assert all(skip.why and skip.why.isprintable() for skip in skipped)
    why = {skip.path.name: skip.why for skip in skipped}
    assert "whole JSON" in why["truncated"]
    assert "UTF-8 at byte 10" in why["latin"]
    assert "NaN" in why["nan"]
    assert "upgrade" in why["newer"]
    assert "wanted fewer than 100,000" in why["huge"]
    assert "missing" in why["nothing"]


def test_a_record_in_another_place_than_it_says_is_skipped(tmp_path: Path):
    content = a_dict()
    put(tmp_path, content, track="shakespeare")
    put(tmp_path, content, folder="2026-11-24-copy-00000000")
    records, skipped = read_records(tmp_path)
    assert records == []
    assert sorted(skip.why.split()[0] for skip in skipped) == ["id", "track"]


def test_what_is_no_record_of_a_track_is_passed_over(tmp_path: Path):
    put(tmp_path, a_dict())
    put(tmp_path, a_dict(track="shakespeare"))
    (tmp_path / "README.md").write_text("rendered")
    (tmp_path / "sotu" / "README.md").write_text("rendered")
    (tmp_path / "sotu" / ".writing-x").mkdir()
    (tmp_path / "benchmarks" / "gemm").mkdir(parents=True)
    records, skipped = read_records(tmp_path)
    assert [record.track for record in records] == ["shakespeare", "sotu"]
    assert skipped == []
    assert [record.track for record in read_records(tmp_path, "sotu")[0]] == ["sotu"]


def test_a_folder_that_is_not_there_holds_no_records(tmp_path: Path):
    assert read_records(tmp_path / "none") == ([], [])
    assert read_records(tmp_path, "none") == ([], [])


def test_hardware_that_takes_other_time_has_another_label():
    cpu = a_record().hardware
    assert cpu.label == "Intel Xeon @ 2.80GHz, 2 of 2 cores"
    assert dataclasses.replace(cpu, n_threads=1).label != cpu.label
    assert dataclasses.replace(cpu, n_devices=2).label != cpu.label
    gpu = dataclasses.replace(cpu, device="cuda", device_name="NVIDIA H100", n_devices=8)
    assert gpu.label == "8 × NVIDIA H100"


def test_reading_records_imports_nothing_heavy():
    code = (
        "import sys, nanorun.records.record, nanorun.records.report, nanorun.records.significance; "
        "print(sorted({'torch', 'scipy', 'numpy', 'pydantic', 'rich', 'wandb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
