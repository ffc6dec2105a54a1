"""Text datasets on the hub: which files are read, in which order, from which commit, and what is asked of the hub.

The reader of JSON lines here is a stand-in of a few lines: what reading files does has tests of its own.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
from hub_server import HubServer, blob_sha1, sha256
from huggingface_hub import close_session, constants, hf_hub_download, try_to_load_from_cache
from test_data_hub import point_at

from nanorun.data import hub
from nanorun.data.sources import Document, Reading, load_source
from nanorun.errors import UserError

REPOSITORY = "someone/stories"
COMMIT = "c" * 40
NEWER = "d" * 40


def lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


FILES = {
    "README.md": b"# Stories\n",
    "data/train-00000.parquet": lines("a", "b"),
    "data/train-00001.parquet": lines("c"),
    "data/validation-00000.parquet": lines("v"),
    "extra/test.parquet": lines("t"),
    "extra/more.jsonl": lines("m"),
}


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = HubServer()
    server.add(REPOSITORY, FILES, commit=COMMIT)
    point_at(monkeypatch, server.url, tmp_path / "hf")
    monkeypatch.setattr(hub, "pause", lambda seconds, stop: None)
    close_session()
    yield server
    server.close()
    close_session()


@pytest.fixture
def home(tmp_path):
    """A folder that is being prepared."""
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def opened(monkeypatch):
    """Put the stand-in in place of the readers; returns the paths they were given."""
    found = []

    def documents_of(path, reading, name):
        found.append(path)
        for number, line in enumerate(path.read_text().splitlines(), 1):
            yield Document(f"{name} line {number}", json.loads(line)[reading.column or "text"])
        reading.bytes_done += path.stat().st_size

    module = ModuleType("nanorun.data.readers")
    module.documents_of = documents_of
    monkeypatch.setitem(sys.modules, "nanorun.data.readers", module)
    return found


def read(reading=None, name=f"hub:{REPOSITORY}"):
    return [document.text for document in load_source(name).documents(reading or Reading())]


def listed(**options):
    return [file.name for file in load_source(f"hub:{REPOSITORY}").files(Reading(**options))]


def resolved(server):
    return [request.path.split("/resolve/")[1] for request in server.requests if "/resolve/" in request.path]


def test_a_dataset_is_a_corpus_of_its_name():
    source = load_source(f"hub:{REPOSITORY}")
    assert f"hub:{REPOSITORY}" == source.NAME
    assert (source.EMBEDDED, source.DEFAULT_TOKENIZER, source.SOURCE_SHA256) == (False, "gpt2", None)
    assert source.SUMMARY


@pytest.mark.parametrize(
    "name",
    [
        "foo",
        "../x",
        "a/b/c",
        "a/..",
        "a//b",
        "/a",
        "a/",
        "a/b.git",
        "a--b/c",
        "a/b\n",
        "a/\x1b[31m",
        "a b/c",
        "é/b",
        "-a/b",
        "",
    ],
)
def test_a_name_that_cannot_be_a_repository_is_refused_and_shown_escaped(name):
    with pytest.raises(UserError, match="is no repository on the hub: expected OWNER/NAME") as caught:
        load_source(f"hub:{name}")
    assert str(caught.value).isprintable()


def test_the_family_alone_says_how_to_name_one():
    with pytest.raises(UserError, match="expected hub:OWNER/NAME"):
        load_source("hub")


def test_every_training_parquet_is_read_in_the_order_of_the_paths(server):
    reading = Reading()
    assert read(reading) == ["a", "b", "c"]
    assert reading.bytes_done == sum(file.size for file in load_source(f"hub:{REPOSITORY}").files(Reading()))


def test_documents_are_named_by_dataset_file_and_place(server):
    documents = list(load_source(f"hub:{REPOSITORY}").documents(Reading()))
    assert documents[2].name == f"hub:{REPOSITORY}/data/train-00001.parquet line 1"
    assert documents[2].split is None


def test_files_of_other_splits_are_left_out_and_said(server):
    steps = []
    read(Reading(report=steps.append))
    assert (
        steps[0].note
        == "2 files of other splits are left out: data/validation-00000.parquet, extra/test.parquet"
    )
    source = load_source(f"hub:{REPOSITORY}")
    assert source.left_out(Reading()) == ["data/validation-00000.parquet", "extra/test.parquet"]


def test_without_training_files_every_split_is_read(server):
    server.add(REPOSITORY, {"a/validation.parquet": b"", "b/test.parquet": b""}, commit=NEWER)
    assert listed() == ["a/validation.parquet", "b/test.parquet"]


def test_a_word_that_only_contains_the_name_of_a_split_is_none(server):
    files = [
        "contest/x.parquet",
        "testament.parquet",
        "train.parquet",
        "devtest/train/1.parquet",
        "test/train-1.parquet",
    ]
    server.add(REPOSITORY, dict.fromkeys(files, b""), commit=NEWER)
    assert listed() == sorted(files)


def test_json_lines_are_read_where_there_is_no_parquet(server):
    files = {"b.jsonl": lines("2"), "a.jsonl": lines("1"), "c.txt": b"3"}
    server.add(REPOSITORY, files, commit=NEWER)
    assert read() == ["1", "2"]


def test_include_chooses_the_files(server):
    assert listed(include="extra/*") == ["extra/more.jsonl", "extra/test.parquet"]
    assert listed(include="*validation*") == ["data/validation-00000.parquet"]
    with pytest.raises(UserError, match=r"--include '\*\.csv' matches none of the 6 files"):
        listed(include="*.csv")


def test_a_dataset_without_a_file_that_can_be_read_says_what_to_try(server):
    server.add(REPOSITORY, {"a.csv": b""}, commit=NEWER)
    with pytest.raises(
        UserError, match=r"no .parquet and no .jsonl file.*--include GLOB.*refs/convert/parquet"
    ):
        read()


def test_a_revision_may_hold_slashes(server):
    server.add(REPOSITORY, {"x.parquet": lines("converted")}, commit=NEWER, branch="refs/convert/parquet")
    assert read(Reading(revision="refs/convert/parquet")) == ["converted"]
    assert all(request.path != "/" for request in server.requests)
    assert resolved(server) == [f"{NEWER}/x.parquet"]


def test_a_path_that_leads_out_of_the_cache_is_refused(server):
    for path in ("../../x.parquet", "a/../x.parquet", "a\\..\\x.parquet", "x\n.parquet"):
        server.add(REPOSITORY, {path: b""}, commit=NEWER)
        with pytest.raises(UserError, match="which is no plain path") as caught:
            read()
        assert str(caught.value).isprintable()


def test_inputs_are_refused(server):
    with pytest.raises(UserError, match="takes no --input"):
        read(Reading(inputs=("x",)))


def test_a_preparation_keeps_to_the_commit_it_was_begun_with(server, home, tmp_path):
    first = load_source(f"hub:{REPOSITORY}").documents(Reading(home=home))
    assert next(first).text == "a"
    first.close()
    server.add(REPOSITORY, {"data/train.parquet": lines("new")}, commit=NEWER)
    assert read(Reading(home=home)) == ["a", "b", "c"]
    assert read(Reading(home=tmp_path)) == ["new"]


def test_a_pin_of_another_dataset_or_a_broken_one_is_not_taken(server, tmp_path):
    pin = tmp_path / "hub.json"
    for content in (
        "{",
        "[]",
        "null",
        json.dumps({"repository": "x/y", "asked": None, "commit": NEWER, "files": []}),
    ):
        pin.write_text(content)
        assert read(Reading(home=tmp_path)) == ["a", "b", "c"]
        assert json.loads(pin.read_text())["commit"] == COMMIT


def test_without_a_folder_nothing_is_written_down(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        listed()
        == listed(home=tmp_path / "not there yet")
        == ["data/train-00000.parquet", "data/train-00001.parquet"]
    )
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_second_run_asks_nothing(server, home):
    assert read(Reading(home=home)) == ["a", "b", "c"]
    server.requests.clear()
    assert read(Reading(home=home)) == ["a", "b", "c"]
    assert server.requests == []


def test_the_files_are_asked_of_the_hub_once_in_a_process(server):
    source = load_source(f"hub:{REPOSITORY}")
    reading = Reading()
    source.files(reading)
    list(source.documents(reading))
    assert len([request for request in server.requests if request.path.startswith("/api/datasets/")]) == 2


def test_what_the_library_has_cached_is_not_fetched(server):
    for name in ("data/train-00000.parquet", "data/train-00001.parquet"):
        hf_hub_download(REPOSITORY, name, repo_type="dataset", revision=COMMIT, endpoint=server.url)
    server.requests.clear()
    assert read() == ["a", "b", "c"]
    assert resolved(server) == []


def test_what_is_fetched_here_the_library_finds(server):
    read()
    server.requests.clear()
    for name in ("data/train-00000.parquet", "data/train-00001.parquet"):
        found = try_to_load_from_cache(
            REPOSITORY, name, revision=COMMIT, repo_type="dataset", cache_dir=constants.HF_HUB_CACHE
        )
        assert Path(found).read_bytes() == FILES[name]
        path = hf_hub_download(
            REPOSITORY,
            name,
            repo_type="dataset",
            revision=COMMIT,
            local_files_only=True,
            cache_dir=constants.HF_HUB_CACHE,
        )
        assert path == found
        assert Path(path).resolve().name == sha256(FILES[name])
    assert server.requests == []


def test_the_librarys_listing_of_its_cache_stays_sound(server):
    from huggingface_hub import scan_cache_dir

    read()
    found = scan_cache_dir(constants.HF_HUB_CACHE)
    assert not found.warnings
    (repository,) = found.repos
    assert (repository.repo_id, repository.nb_files) == (REPOSITORY, 2)


def test_files_that_git_keeps_are_checked_by_its_hash(server, opened):
    server.add(REPOSITORY, {"x.jsonl": lines("x")}, commit=NEWER)
    server.fault("x.jsonl", flip=3)
    assert read() == ["x"]
    assert opened[0].resolve().name == blob_sha1(lines("x"))
    assert resolved(server) == [f"{NEWER}/x.jsonl"] * 2


def test_a_damaged_file_in_the_cache_is_fetched_again(server):
    read()
    blob = (
        Path(constants.HF_HUB_CACHE)
        / "datasets--someone--stories/blobs"
        / sha256(FILES["data/train-00001.parquet"])
    )
    blob.write_bytes(b"?" * blob.stat().st_size)
    server.requests.clear()
    assert read() == ["a", "b", "c"]
    assert resolved(server) == [f"{COMMIT}/data/train-00001.parquet"]


def test_a_cut_is_gone_on_from_in_the_cache_too(server):
    server.fault("data/train-00000.parquet", cut_after=5)
    assert read() == ["a", "b", "c"]
    etag = sha256(FILES["data/train-00000.parquet"])
    assert [request.headers.get("range") for request in server.asked(etag)] == [None, "bytes=5-"]


def test_a_cache_without_links_is_used_as_it_is(server, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    assert read() == ["a", "b", "c"]
    path = (
        Path(constants.HF_HUB_CACHE)
        / "datasets--someone--stories/snapshots"
        / COMMIT
        / "data/train-00000.parquet"
    )
    assert not path.is_symlink()
    server.requests.clear()
    assert read() == ["a", "b", "c"]
    assert resolved(server) == []


def test_only_the_next_files_are_fetched_ahead(server):
    files = {f"{n}.parquet": lines(str(n)) for n in range(6)}
    server.add(REPOSITORY, files, commit=NEWER)
    documents = load_source(f"hub:{REPOSITORY}").documents(Reading())
    assert next(documents).text == "0"
    documents.close()
    assert set(resolved(server)) <= {f"{NEWER}/{n}.parquet" for n in range(3)}


def test_the_next_file_is_fetched_while_one_is_read(server):
    asked = threading.Event()
    server.fault("data/train-00001.parquet", before=asked.set)
    documents = load_source(f"hub:{REPOSITORY}").documents(Reading())
    assert next(documents).text == "a"
    assert asked.wait(20)
    documents.close()


def test_two_files_of_the_same_content_are_fetched_once(server):
    same = lines("same")
    server.add(REPOSITORY, {"a.parquet": same, "b.parquet": same, "c.parquet": lines("other")}, commit=NEWER)
    assert read() == ["same", "same", "other"]
    assert len(resolved(server)) == 2


def test_another_program_that_holds_the_lock_is_waited_for(server):
    from filelock import FileLock

    name = "data/train-00000.parquet"
    path = Path(constants.HF_HUB_CACHE) / ".locks/datasets--someone--stories" / f"{sha256(FILES[name])}.lock"
    path.parent.mkdir(parents=True)
    lock = FileLock(path)
    lock.acquire()
    steps = []

    def report(step):
        steps.append(step)
        if "waiting for another program" in step.note:
            lock.release()

    assert read(Reading(report=report)) == ["a", "b", "c"]
    assert any("waiting for another program" in step.note for step in steps)


def test_without_a_network_it_says_what_is_missing_and_how_to_do_without(server, home):
    load_source(f"hub:{REPOSITORY}").files(Reading(home=home))
    server.close()
    with pytest.raises(UserError) as caught:
        read(Reading(home=home))
    said = str(caught.value)
    assert "Missing are data/train-00000.parquet, data/train-00001.parquet" in said
    assert "prepare-data text --input" in said


def test_a_gated_dataset_says_where_to_accept_its_conditions(server):
    server.gated.add(REPOSITORY)
    with pytest.raises(UserError, match=f"{REPOSITORY} is gated: accept its conditions"):
        read()
