"""The index of records: the same table as without it, whatever changed, and no trust in the index itself."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from records_samples import a_dict, on_a_mix

from nanorun.records import index
from nanorun.records.index import indexed_records, thinned
from nanorun.records.record import Record, read_records
from nanorun.records.report import TrackView, build_table
from nanorun.records.significance import Rule

SOTU = TrackView("sotu", 1.55, "seconds", Rule("t", n=3, alpha=0.05))


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder of eight records of three presets, written long ago as far as the index is concerned."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "LEAST_RECORDS", 1)
    monkeypatch.setattr(index, "SETTLED_NS", -(10**18))
    for number in range(8):
        write(
            tmp_path / "records",
            name=("muon", "adamw", "soap")[number % 3],
            seed=number // 3,
            seconds=30 + number,
            final=1.54 + number / 400,
        )
    return tmp_path / "records"


def write(root, **changes):
    content = a_dict(**changes)
    folder = root / content["track"] / content["id"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def tables(root, track=SOTU):
    """The table from the index and the table from the records themselves."""
    with_index, broken = indexed_records(root, None, lambda name: track.target_val_loss)
    plainly, skipped = read_records(root)
    return (
        build_table(track, with_index, skipped=broken),
        build_table(track, plainly, skipped=skipped),
    )


def place(root):
    found = index._index_place(root / "sotu")
    assert found is not None
    return found


def reads(root, monkeypatch, track="sotu"):
    """The names of the records that had to be read from their own files."""
    read = []
    plain = index.read_record

    def noted(folder):
        read.append(folder.name)
        return plain(folder)

    monkeypatch.setattr(index, "read_record", noted)
    indexed_records(root, track, lambda name: SOTU.target_val_loss)
    monkeypatch.setattr(index, "read_record", plain)
    return read


def test_an_index_is_written_and_then_no_record_is_read(root, monkeypatch):
    assert len(reads(root, monkeypatch)) == 8
    assert place(root).is_file()
    assert reads(root, monkeypatch) == []
    place(root).unlink()
    assert len(reads(root, monkeypatch)) == 8


def test_records_from_the_index_are_the_thinned_records(root):
    indexed_records(root, "sotu", lambda name: 1.6)
    found, _ = indexed_records(root, "sotu", lambda name: 1.6)
    plainly, _ = read_records(root, "sotu")
    assert found == [thinned(record, 1.6) for record in plainly]
    assert [dataclasses.replace(one, validation=(), validation_left_out=0) for one in found] == [
        dataclasses.replace(one, validation=(), validation_left_out=0) for one in plainly
    ]
    assert all(record.validation_left_out + len(record.validation) == 11 for record in found)


def test_a_mix_comes_back_from_the_index(root):
    write(root, seed=5, **on_a_mix())
    for _ in range(2):
        with_index, plainly = tables(root)
        assert with_index == plainly
    assert sum("trained on a mix" in row.why for row in plainly.rows) == 1


def test_a_thinned_curve_keeps_both_crossings_the_best_and_the_last():
    content = a_dict(final=1.54, points=21)
    content["validation"][10]["val_loss"] = 1.2
    content["reached"] = {
        "step": content["validation"][10]["step"],
        "seconds": content["validation"][10]["train_seconds"],
    }
    whole = Record.from_dict(content)
    steps = [point.step for point in thinned(whole, 2.0).validation]
    crossing = next(point.step for point in whole.validation if point.val_loss <= 2.0)
    assert steps == [crossing, whole.validation[10].step, 1000]
    assert thinned(whole, 2.0).validation_left_out == 18


def test_the_table_is_the_same_after_every_kind_of_change(root):
    folders = sorted((root / "sotu").iterdir())

    def agree():
        for _ in range(2):
            with_index, plainly = tables(root)
            assert with_index == plainly
        return plainly

    assert len(agree().skipped) == 0
    (folders[0] / "record.json").write_text("{", encoding="utf-8")
    assert len(agree().skipped) == 1
    shutil.rmtree(folders[1])
    folders[2].rename(folders[2].with_name("2026-01-01-other-00000000"))
    os.remove(folders[3] / "record.json")
    os.mkfifo(folders[3] / "record.json")
    assert len(agree().skipped) == 3
    write(root, name="new", seed=3)
    write(root, name="elsewhere", track="other")
    assert {row.preset for row in agree().rows} == {"muon", "soap", "new"}
    shutil.copytree(folders[5], root / "sotu" / "2026-01-02-copy-00000000")
    assert len(agree().skipped) == 4


def test_an_edit_that_keeps_size_and_time_of_modification_is_seen(root):
    tables(root)
    path = sorted((root / "sotu").iterdir())[0] / "record.json"
    before = path.stat()
    text = re.sub('"seed": [0-9]', '"seed": 7', path.read_text(encoding="utf-8"))
    path.write_text(text, encoding="utf-8")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    found, _ = indexed_records(root, "sotu", lambda name: 1.55)
    assert found == [thinned(record, 1.55) for record in read_records(root, "sotu")[0]]
    assert 7 in {record.seed for record in found}


def test_a_file_that_changed_a_moment_ago_is_read_again(root, monkeypatch):
    monkeypatch.setattr(index, "SETTLED_NS", 2 * 10**9)
    reads(root, monkeypatch)
    assert len(reads(root, monkeypatch)) == 8
    assert not place(root).exists()
    settled = time.time_ns() + 3 * 10**9
    monkeypatch.setattr(index.time, "time_ns", lambda: settled)
    assert len(reads(root, monkeypatch)) == 8
    assert reads(root, monkeypatch) == []


def test_another_target_gives_another_crossing(root):
    tables(root)
    sooner = dataclasses.replace(SOTU, target_val_loss=3.0)
    with_index, plainly = tables(root, sooner)
    assert with_index == plainly
    assert with_index.rows[0].reached_step_mean != tables(root)[0].rows[0].reached_step_mean


def test_the_index_holds_shared_parts_once_and_stays_small(root):
    tables(root)
    content = json.loads(place(root).read_bytes().partition(b"\n")[2])
    kinds = [name for name, _ in content["pool"]]
    assert {name: kinds.count(name) for name in ("hardware", "software", "code", "corpus")} == {
        "hardware": 1,
        "software": 1,
        "code": 1,
        "corpus": 1,
    }
    records, _ = indexed_records(root, "sotu", lambda name: 1.55)
    assert len({id(record.hardware) for record in records}) == 1


def test_few_records_get_no_index(root, monkeypatch):
    monkeypatch.setattr(index, "LEAST_RECORDS", 9)
    tables(root)
    assert not place(root).exists()


def test_nothing_is_written_beside_the_records(root):
    before = sorted(root.rglob("*"))
    tables(root)
    assert sorted(root.rglob("*")) == before


def test_a_cache_that_cannot_be_written_or_found_changes_nothing(root, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with_index, plainly = tables(root)
    assert with_index == plainly
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless():
        raise RuntimeError("no home")

    monkeypatch.setattr(index.Path, "home", homeless)
    with_index, plainly = tables(root)
    assert with_index == plainly


def signed(body):
    """Any bytes as an index that bears the hash of its body."""
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def check_ignored(root, content):
    """Whatever the index file holds, the table is that of the records, and the file is put right."""
    place(root).write_bytes(content)
    with_index, plainly = tables(root)
    assert with_index == plainly
    assert place(root).read_bytes() != content


def test_an_index_that_is_cut_changed_or_foreign_is_ignored_and_written_again(root):
    tables(root)
    good = place(root).read_bytes()
    _, _, body = good.partition(b"\n")
    content = json.loads(body)
    foreign = {**content, "format": content["format"] + 1, "pool": "of another form"}
    fewer = {**content, "fields": content["fields"][:-1]}
    for bad in (
        b"",
        b"\n",
        good[: len(good) // 2],
        good.replace(b"muon", b"mudn", 1),
        signed(b"[" * 100_000),
        signed(b'{"format": ' + b"9" * 10_000 + b"}"),
        signed(b"\xff"),
        signed(json.dumps(foreign).encode()),
        signed(json.dumps(fewer).encode()),
        signed(json.dumps({**content, "target": 9.0}).encode()),
        signed(json.dumps({**content, "pool": []}).encode()),
        signed(json.dumps({**content, "entries": [[0, []]]}).encode()),
        signed(body.replace(b"31.0", b"NaN")),
        signed(body.replace(b"31.0", b"-1.0")),
    ):
        check_ignored(root, bad)
    place(root).unlink()
    place(root).mkdir()
    with_index, plainly = tables(root)
    assert with_index == plainly


JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=4,
)


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_junk_under_the_right_hash_is_never_a_traceback_nor_a_record_that_is_none(root, data):
    if not place(root).exists():
        tables(root)
        shutil.copy(place(root), root.parent / "good")
    content = json.loads((root.parent / "good").read_bytes().partition(b"\n")[2])
    where = data.draw(st.sampled_from(["pool", "entries", "values", "config"]))
    junk = data.draw(JUNK)
    if where == "values":
        values = content["entries"][0][1]
        values[data.draw(st.integers(0, len(values) - 1))] = junk
    elif where == "config":
        content["entries"][0][1][content["fields"].index("config")] = [["a"], junk]
    else:
        content[where][data.draw(st.integers(0, len(content[where]) - 1))] = junk
    place(root).write_bytes(signed(json.dumps(content).encode()))
    found, skipped = indexed_records(root, "sotu", lambda name: 1.55)
    assert (len(found), skipped) == (8, [])
    for record in found:
        assert Record.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    build_table(SOTU, found)
