"""Your own files: which ones are found, in which order, and what inputs that give none get."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import socket
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanorun.data.sources import Reading, load_source, text
from nanorun.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that the test stands in, so that names are short."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stdin(monkeypatch):
    """Return a function that puts bytes on standard input."""

    def put(content):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))

    return put


def _fill(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) if "json" in name else name)


def _found(*inputs, **options):
    return [file.name for file in text.files(Reading(inputs=inputs, **options))]


def _documents(*inputs, **options):
    return list(text.documents(Reading(inputs=inputs, **options)))


def _refused(pattern, *inputs, **options):
    with pytest.raises(UserError, match=pattern) as raised:
        _documents(*inputs, **options)
    assert "\n" not in str(raised.value)


def test_text_is_a_source():
    source = load_source("text")
    assert source is text
    assert (source.NAME, source.EMBEDDED, source.DEFAULT_TOKENIZER, source.SOURCE_SHA256) == (
        "text", False, "byte", None,
    )  # fmt: skip
    assert source.SUMMARY


def test_folders_give_the_known_endings_sorted_and_nothing_hidden(folder):
    names = [
        "b.txt",
        "a.MD",
        "sub/c.md",
        "sub/d.jsonl.gz",
        "sub.txt",
        "sub/a/x.csv",
        "z.parquet",
        "A.ndjson.zst",
    ]
    _fill(folder / "in", *names, "sub/d.py", "e.json", ".git/e.txt", ".f.txt", "sub/.g/h.md", "x.parquet.gz")
    assert _found("in") == [
        f"in/{name}"
        for name in (
            "A.ndjson.zst", "a.MD", "b.txt", "sub/a/x.csv", "sub/c.md", "sub/d.jsonl.gz", "sub.txt", "z.parquet",
        )
    ]  # fmt: skip
    assert _found("in/") == _found("in")
    assert _found(".")[0] == "./in/A.ndjson.zst"


def test_the_order_is_that_of_the_path_parts_whatever_the_folder_says(folder, monkeypatch):
    names = [f"{a}{b}/{c}.txt" for a in "aBé-" for b in ("", ".d", " ") for c in "xYz"]
    random.Random(1).shuffle(names)
    _fill(folder, *names)
    expected = sorted(names, key=lambda name: name.split("/"))
    assert [name.removeprefix("./") for name in _found(".")] == expected
    scandir = os.scandir

    class Shuffled:
        def __init__(self, path):
            self._entries = list(scandir(path))
            random.Random(len(self._entries)).shuffle(self._entries)

        def __enter__(self):
            return iter(self._entries)

        def __exit__(self, *error):
            return None

    monkeypatch.setattr("os.scandir", Shuffled)
    assert [name.removeprefix("./") for name in _found(".")] == expected
    assert _found("*/*.txt") == expected


def test_inputs_come_in_the_order_given_and_no_file_twice(folder):
    _fill(folder, "b/x.txt", "a/y.txt", "a/z.txt")
    assert _found("b", "a") == ["b/x.txt", "a/y.txt", "a/z.txt"]
    assert _found("a/z.txt", "a", "b/x.txt", "*") == ["a/z.txt", "a/y.txt", "b/x.txt"]
    assert _found("a", "a", "./a/../a") == ["a/y.txt", "a/z.txt"]


def test_a_file_named_outright_may_have_any_ending(folder):
    _fill(folder, "corpus.log", "noending")
    assert [document.text for document in _documents("corpus.log", "noending")] == ["corpus.log", "noending"]


def test_a_format_that_is_said_holds_for_every_file(folder):
    (folder / "a").mkdir()
    (folder / "a/x.dump").write_text('{"text": "one"}\n{"text": "two"}')
    (folder / "a/y.dump.gz").write_bytes(gzip.compress(b'{"text": "three"}'))
    (folder / "a/.hidden").write_text("x")
    assert [document.text for document in _documents("a", format="jsonl")] == ["one", "two", "three"]
    assert len(_documents("a/x.dump", format="plain")) == 1
    _refused(r"--format jsonll: there is no such format.*'jsonl'", "a", format="jsonll")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.txt", ["a.txt", "b.txt"]),
        ("?.md", ["c.md"]),
        ("[ab].txt", ["a.txt", "b.txt"]),
        ("*", ["a.txt", "b.txt", "c.md", "d.log", "e.json", "s/a.txt", "s/t/b.txt"]),
        ("s/*", ["s/a.txt", "s/t/b.txt"]),
        ("**/b.txt", ["b.txt", "s/t/b.txt"]),
        ("**", ["a.txt", "b.txt", "c.md", "s/a.txt", "s/t/b.txt"]),
        ("s/**", ["s/a.txt", "s/t/b.txt"]),
        ("**/*.log", ["d.log", "s/t/x.log"]),
        ("s/**/t/*.txt", ["s/t/b.txt"]),
        (".h/*", [".h/a.txt"]),
        (".*/*.txt", [".h/a.txt"]),
        ("./s/../*.md", ["./s/../c.md"]),
    ],
)
def test_globs(folder, pattern, names):
    _fill(
        folder,
        "b.txt",
        "a.txt",
        "c.md",
        "d.log",
        "e.json",
        "s/t/b.txt",
        "s/a.txt",
        "s/t/x.log",
        ".h/a.txt",
        "s/.b.txt",
    )
    assert [name.removeprefix("./") if pattern == "**" else name for name in _found(pattern)] == names
    absolute = [name.removeprefix(f"{folder}/") for name in _found(f"{folder}/{pattern}")]
    assert absolute == names


def test_a_file_whose_name_is_a_pattern_is_that_file(folder):
    _fill(folder, "a[1].txt", "a1.txt", "-")
    assert _found("a[1].txt") == ["a[1].txt"]
    assert _found("./-") == ["./-"]
    assert [document.text for document in _documents("[-]")] == ["-"]


def test_symlinks_are_followed_and_loops_end(folder):
    _fill(folder, "in/a.txt", "in/sub/b.txt", "elsewhere/c.txt")
    for name, target in [
        ("in/up", ".."),
        ("in/sub/here", "."),
        ("in/other", "../elsewhere"),
        ("in/d.txt", "../elsewhere/c.txt"),
        ("in/e.txt", "a.txt"),
    ]:
        (folder / name).symlink_to(target)
    assert _found("in") == ["in/a.txt", "in/d.txt", "in/sub/b.txt"]
    assert _found("in/**/*.txt") == ["in/a.txt", "in/d.txt", "in/sub/b.txt"]
    assert _found("in/other") == ["in/other/c.txt"]


def test_many_symlinks_between_folders_are_gone_through_in_no_time(folder):
    for i in range(30):
        _fill(folder, f"{i}/x.txt")
        (folder / f"{i}/a").symlink_to(f"../{i + 1}")
        (folder / f"{i}/b").symlink_to(f"../{i + 1}")
    assert len(_found("0")) == len(_found("0/**/*.txt")) == 30


def test_a_symlink_to_itself_or_to_nothing_is_refused_by_name_or_left_out(folder):
    _fill(folder, "in/a.txt")
    for name, target, found in [
        ("in/loop", "loop", "a symlink that leads to itself"),
        ("in/b.txt", "nowhere", "a symlink to something that is not there"),
    ]:
        (folder / name).symlink_to(target)
        _refused(rf"--input {name}: {found}; mend or remove it, or .*--skip-bad", "in")
        _refused(rf"--input {name}: {found}", "in/*")
        _refused(rf"--input {name}: {found}\.", name, skip_bad=True)
        reading = Reading(inputs=("in",), skip_bad=True)
        assert [document.name for document in text.documents(reading)] == ["in/a.txt"]
        assert reading.skipped == [f"--input {name}: {found}"]
        (folder / name).unlink()
    (folder / "in/link").symlink_to("nowhere")
    assert _found("in") == ["in/a.txt"]


def test_pipes_and_sockets_in_a_folder_are_passed_over_and_refused_when_named(folder):
    _fill(folder, "in/a.txt")
    os.mkfifo("in/pipe.txt")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("in/socket.txt")
        assert _found("in") == _found("in/*") == ["in/a.txt"]
        for name in ("in/pipe.txt", "in/socket.txt", "/dev/null"):
            _refused(rf"--input {name}: a pipe or a device, expected .*--input - < {name}", name)


@pytest.mark.parametrize("given", ["nowhere.txt", "a.txt/b", "", "x\0y", "n" * 300])
def test_an_input_that_is_not_there_is_named(folder, given):
    _fill(folder, "a.txt")
    _refused(
        r"^--input .*: (there is no such file or folder|a name cannot hold a NUL|cannot be looked at)", given
    )


def test_a_folder_or_a_glob_without_text_is_refused(folder):
    _fill(folder, "in/a.py", "in/.b.txt", "in/c/d.png")
    _refused(r"--input in: no file in this folder whose name ends in \.csv, \.jsonl, .*\.txt.*--format", "in")
    _refused(r"--input in/\*\.txt: no text file matches", "in/*.txt")
    _refused(r"--input none/\*\*/\*: no text file matches", "none/**/*")
    _refused(r"--input in/c\*: no text file matches", "in/c*")


def test_a_folder_that_may_not_be_looked_into_is_refused_by_name(folder, monkeypatch):
    _fill(folder, "in/a.txt", "in/closed/b.txt")
    scandir = os.scandir

    def refusing(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("os.scandir", refusing)
    _refused(r"--input in/closed: a folder that cannot be looked into \(Permission denied\)", "in")
    _refused(r"--input in/closed: a folder that cannot be looked into", "in/closed")
    assert _found("in", skip_bad=True) == ["in/a.txt"]
    _refused("no file in this folder", "in/closed", skip_bad=True)


@pytest.mark.parametrize("name", ["a\nb.txt", "a\x1b[31m.txt", "a\u202eb.txt", "a\udcff.txt"])
def test_names_with_odd_characters_are_shown_escaped_on_one_line(folder, name):
    (folder / os.fsencode(name).decode("utf-8", "surrogateescape")).write_text("words")
    shown = name.encode("unicode_escape").decode()
    for given in (name, "."):
        (document,) = _documents(given)
        assert document.name.removeprefix("./") == shown
        assert document.text == "words"
    (folder / name).write_bytes(b"\xff")
    _refused(r"^" + shown.replace("\\", r"\\").replace("[", r"\["), name)
    _refused(r"^--input " + shown.replace("\\", r"\\").replace("[", r"\["), f"{name}x")


def test_files_tell_sizes_versions_and_how_much_they_expand(folder):
    _fill(folder, "a.txt", "b.md.gz", "c.parquet")
    files = text.files(Reading(inputs=(".",)))
    assert [(file.size, file.version) for file in files] == [
        (path.stat().st_size, str(path.stat().st_mtime_ns)) for path in sorted(folder.iterdir())
    ]
    plain, packed, parquet = (file.expands for file in files)
    assert plain == 1.0 < parquet < packed


def test_files_are_looked_for_once_for_each_reading(folder):
    _fill(folder, "a.txt")
    reading = Reading(inputs=(".",))
    assert len(text.files(reading)) == 1
    _fill(folder, "b.txt")
    assert [document.name for document in text.documents(reading)] == ["./a.txt"]
    assert len(_documents(".")) == 2


def test_formats_can_be_mixed_and_the_documents_come_file_by_file(folder):
    (folder / "a.csv").write_text("text\none\n")
    (folder / "b.jsonl").write_text('{"text": "two"}\n{"text": " "}\n{"text": "three"}\n')
    pq.write_table(pa.table({"text": ["four"]}), folder / "c.parquet")
    (folder / "d.txt").write_text("five|six")
    reading = Reading(inputs=(".",), separator="|")
    for _ in range(2):
        reading.bytes_done = reading.empty = 0
        found = [(document.name, document.text, document.split) for document in text.documents(reading)]
        assert found == [
            ("./a.csv line 2", "one", None),
            ("./b.jsonl line 1", "two", None),
            ("./b.jsonl line 3", "three", None),
            ("./c.parquet row 1", "four", None),
            ("./d.txt document 1", "five", None),
            ("./d.txt document 2", "six", None),
        ]
        assert reading.bytes_done == sum(file.size for file in text.files(reading))
        assert reading.empty == 1


def test_an_option_that_no_input_heeds_is_refused(folder):
    _fill(folder, "a.txt", "b.jsonl")
    _refused(r"--column body: is for jsonl, csv and parquet, and none", "a.txt", column="body")
    _refused(r"--separator \|: is for plain text, and none", "b.jsonl", separator="|")
    assert len(_documents(".", separator="|")) == 2


def test_without_inputs_it_is_said_what_to_type():
    _refused("prepare-data text --input PATH")
    with pytest.raises(UserError, match="prepare-data text --input PATH"):
        text.files(Reading())


@pytest.mark.parametrize("content", [b"", b" \n\t\n", b"\xef\xbb\xbf"])
def test_inputs_without_any_text_are_refused(folder, content):
    for name in ("a.txt", "b.txt"):
        (folder / name).write_bytes(content)
    _refused(r"--input a\.txt: empty \(1 empty documents\); expected some text", "a.txt")
    _refused(r"--input a\.txt, b\.txt: empty \(2 empty documents\)", "a.txt", "b.txt")
    _refused(r"--input a\.txt, a\.txt, a\.txt, …: empty", *["a.txt"] * 4)
    _fill(folder, "c.txt")
    assert [document.name for document in _documents(".")] == ["./c.txt"]


def test_inputs_of_which_everything_is_bad_are_refused(folder):
    (folder / "a.jsonl").write_text("{\n[]\n")
    _refused(r"empty \(0 empty documents and 2 things left out as bad\)", "a.jsonl", skip_bad=True)


def test_standard_input_is_read_once_and_in_the_end_a_file_like_others(folder, stdin):
    stdin(b"0123456789" * 500_000)
    steps = []
    reading = Reading(inputs=("-", "-"), scratch=folder / "deep/scratch", report=steps.append)
    (before,) = text.files(reading)
    assert (before.name, before.size, before.version) == ("standard input", 0, "")
    for _ in range(2):
        (document,) = text.documents(reading)
        assert (document.name, len(document.text)) == ("standard input", 5_000_000)
    (after,) = text.files(reading)
    assert (after.size, after.version) == (5_000_000, "")
    assert reading.bytes_done == 10_000_000
    assert len(list((folder / "deep/scratch").iterdir())) == 1
    assert [step.done for step in steps] == [1 << 20, 2 << 20, 3 << 20, 4 << 20, 5_000_000]


def test_the_format_of_standard_input_can_be_said(folder, stdin):
    stdin(b'{"text": "a"}\n{"text": 3}')
    _refused(r"^standard input line 2: 'text' holds a number", "-", format="jsonl", scratch=folder)
    stdin(gzip.compress(b"text\ta\nb\t1\n"))
    (document,) = _documents("-", format="tsv.gz", scratch=folder)
    assert (document.name, document.text) == ("standard input line 2", "b")
    target = io.BytesIO()
    pq.write_table(pa.table({"text": ["c"]}), target)
    stdin(target.getvalue())
    assert _documents("-", format="parquet", scratch=folder)[0].text == "c"


def test_standard_input_beside_files_keeps_its_place(folder, stdin):
    stdin(b"from a pipe")
    _fill(folder, "a.txt", "b.txt")
    names = [document.name for document in _documents("b.txt", "-", "a.txt", scratch=folder / "scratch")]
    assert names == ["b.txt", "standard input", "a.txt"]


def test_standard_input_that_cannot_be_kept_or_read_is_refused(folder, stdin, monkeypatch):
    stdin(b"words")
    _fill(folder, "file")
    _refused(
        r"^standard input: cannot be kept in .*file while it is read .*make room",
        "-",
        scratch=folder / "file",
    )

    class Full(io.BytesIO):
        def write(self, block):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fdopen", lambda handle, mode: os.close(handle) or Full())
        _refused(r"cannot be kept in .* \(No space left on device\)", "-", scratch=folder / "scratch")
    assert list((folder / "scratch").iterdir()) == []

    class Failing(io.BytesIO):
        def read(self, size=-1):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=Failing()))
    _refused(r"^standard input: cannot be read \(.*Input/output error\)", "-", scratch=folder / "scratch")
    assert list((folder / "scratch").iterdir()) == []
    monkeypatch.setattr("sys.stdin", None)
    _refused("--input -: there is no standard input here", "-", scratch=folder)


def test_standard_input_without_text_is_refused(folder, stdin):
    stdin(b"")
    _refused(r"--input -: empty", "-", scratch=folder)
