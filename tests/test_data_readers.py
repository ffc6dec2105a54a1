"""What each format gives back, and what damaged files get: the same documents or one plain sentence."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import os
import random
import re
import subprocess
import sys
import tracemalloc
import zlib
from functools import cache

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorun.data.pieces import cut
from nanorun.data.readers import documents_of, jsonl, kind_of, kind_said, load_reader, plain, reader_names
from nanorun.data.sources import LongText, Reading
from nanorun.errors import UserError

SEPARATOR = "<|endoftext|>"
TEXT_LIKE = ("txt", "jsonl", "csv", "tsv")
PACKINGS = ("", ".gz", ".zst")
NAMES = [f"a.{format}{packing}" for format in TEXT_LIKE for packing in PACKINGS] + ["a.parquet"]

UNICODE = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: not text.isspace()
)
DOCUMENTS = st.lists(UNICODE, min_size=1, max_size=8)
# the separator takes the line breaks around it, so documents with such at their ends do not come back as written
SEPARABLE = st.lists(
    UNICODE.map(lambda text: text.strip("\r\n")).filter(
        lambda text: text and not text.isspace() and SEPARATOR not in text
    ),
    min_size=1,
    max_size=8,
)


def _gzip(content):
    return gzip.compress(content, mtime=0)


def _zstd(content):
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


def _packed(content, name):
    return _gzip(content) if name.endswith(".gz") else _zstd(content) if name.endswith(".zst") else content


def _written(texts, name, column="text"):
    """Return the content of a file `name` with `texts` in it, written by other means than ours."""
    if name.endswith(".parquet"):
        sink = io.BytesIO()
        table = pa.table({"id": list(range(len(texts))), column: pa.array(texts, pa.string())})
        pq.write_table(table, sink, row_group_size=3, write_page_checksum=True)
        return sink.getvalue()
    if ".jsonl" in name:
        # every other line with escapes
        lines = [json.dumps({"id": i, column: text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
        content = "".join(f"{line}\n" for line in lines)
    elif ".csv" in name or ".tsv" in name:
        target = io.StringIO(newline="")
        rows = csv.writer(target, delimiter="\t" if ".tsv" in name else ",")
        rows.writerows([["id", column], *([i, text] for i, text in enumerate(texts))])
        content = target.getvalue()
    else:
        content = f"\n{SEPARATOR}\n".join(texts)
    return _packed(content.encode(), name)


def _read(path, name=None, **options):
    """Return the texts in the file at `path`, and the reading."""
    reading = Reading(scratch=path.parent / "scratch", **options)
    texts = []
    for document in documents_of(path, reading, name or path.name):
        text = document.text
        if isinstance(text, LongText):
            pieces = list(text.pieces())
            assert list(text.pieces()) == pieces, "pieces can be read again"
            text = "".join(pieces)
        texts.append(text)
    return texts, reading


def _refused(path, pattern, **options):
    """Check that `path` is refused by one sentence that begins with its name, and left out under `skip_bad`."""
    with pytest.raises(UserError, match=pattern) as raised:
        _read(path, **options)
    message = str(raised.value)
    assert message.startswith(path.name)
    assert "--skip-bad" in message
    assert "\n" not in message
    texts, reading = _read(path, skip_bad=True, **options)
    assert reading.n_skipped == len(reading.skipped) > 0
    assert reading.skipped[0].startswith(path.name)
    assert reading.bytes_done == path.stat().st_size
    return texts


@pytest.mark.parametrize("name", NAMES)
def test_what_was_written_is_read_back(name, tmp_path):
    @given(SEPARABLE if ".txt" in name else DOCUMENTS)
    @settings(max_examples=30)
    def check(texts):
        path = tmp_path / name
        path.write_bytes(_written(texts, name))
        found, reading = _read(path, separator=SEPARATOR if ".txt" in name else None)
        assert found == texts
        assert reading.bytes_done == path.stat().st_size
        assert (reading.empty, reading.n_skipped) == (0, 0)

    check()


@pytest.mark.parametrize("packing", PACKINGS)
@given(text=UNICODE)
@settings(max_examples=30)
def test_a_plain_file_is_one_document_as_it_is(text, packing, tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / f"a.md{packing}"
    path.write_bytes(_packed(text.encode(), path.name))
    found, _ = _read(path)
    assert found == [text.removeprefix("\ufeff")] or (found == [] and not text.strip("\ufeff"))


def test_formats_are_found_by_file_name():
    assert reader_names() == ("csv", "jsonl", "parquet", "plain")
    for name in reader_names():
        assert load_reader(name).SUMMARY
        assert load_reader(name).OPTION in ("column", "separator")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a/b.TXT", ("plain", ".txt", "")),
        ("b.md.gz", ("plain", ".md", "gz")),
        ("c.ndjson.zst", ("jsonl", ".ndjson", "zst")),
        ("c.tsv", ("csv", ".tsv", "")),
        ("hub:a/b/train-00000-of-00002.parquet", ("parquet", ".parquet", "")),
    ],
)
def test_endings_tell_the_kind_in_folders_too(name, kind):
    assert kind_of(name, outright=False) == kind_of(name, outright=True) == kind


@pytest.mark.parametrize("name", ["a.py", "a", "dump.gz", "c4.json", "c4.json.gz", "a.parquet.gz", "a.b/txt"])
def test_other_endings_are_no_text_in_folders(name):
    assert kind_of(name, outright=False) is None


def test_a_file_named_outright_has_a_kind_always():
    assert kind_of("access.log", outright=True) == ("plain", "", "")
    assert kind_of("dump.gz", outright=True) == ("plain", "", "gz")
    assert kind_of("c4.json.gz", outright=True) == ("jsonl", ".json", "gz")
    with pytest.raises(UserError, match=r"a\.parquet\.gz: \.parquet files are not read packed; unpack"):
        kind_of("a.parquet.gz", outright=True)


def test_a_format_can_be_said():
    assert kind_said("jsonl", "dump.gz") == ("jsonl", ".jsonl", "gz")
    assert kind_said("plain", "a.jsonl") == ("plain", ".plain", "")
    assert kind_said("tsv", "a.csv") == ("csv", ".tsv", "")
    assert kind_said("jsonl.zst", "") == ("jsonl", ".jsonl", "zst")
    assert kind_said("parquet", "x.gz") == ("parquet", ".parquet", "")
    with pytest.raises(UserError, match=r"--format jsnl: there is no such format.*mean 'jsonl'"):
        kind_said("jsnl", "a")
    with pytest.raises(UserError, match="not read packed"):
        kind_said("parquet.gz", "a")


def test_documents_are_named_by_file_and_place(tmp_path):
    for name, place in [
        ("a.jsonl", "line 2"),
        ("a.csv", "line 3"),
        ("a.parquet", "row 2"),
        ("a.txt", "document 2"),
    ]:
        (tmp_path / name).write_bytes(_written(["one", "two"], name))
        reading = Reading(separator=SEPARATOR)
        names = [document.name for document in documents_of(tmp_path / name, reading, f"in\n{name}")]
        assert names[1] == f"in\\n{name} {place}"


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_separator_takes_one_line_break_on_each_side_along(tmp_path, ending):
    path = tmp_path / "stories.txt"
    story = f"Once upon a time.{ending}"
    path.write_bytes(f"{story}{SEPARATOR}{ending}{story}{ending}{SEPARATOR}{ending}{ending}{story}".encode())
    found, reading = _read(path, separator=SEPARATOR)
    assert found == [story.strip(), story, f"{ending}{story}"]
    assert reading.empty == 0


@pytest.mark.parametrize("content", [f"a{SEPARATOR}", f"a\n{SEPARATOR}\n", f"a\r\n{SEPARATOR}"])
def test_nothing_after_the_last_separator_is_no_empty_document(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content.encode())
    found, reading = _read(tmp_path / "a.txt", separator=SEPARATOR)
    assert (found, reading.empty) == (["a"], 0)


def test_empty_documents_are_passed_over_and_counted(tmp_path):
    texts = ["a", "", " \n\t", "b", ""]
    for name in ("a.jsonl", "a.csv", "a.parquet", "a.txt"):
        (tmp_path / name).write_bytes(_written([*texts, "c"], name))
        found, reading = _read(tmp_path / name, separator=SEPARATOR)
        assert found == ["a", "b", "c"], name
        assert reading.empty == 3, name


def test_null_is_an_empty_document(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "a"}\n')
    pq.write_table(pa.table({"text": pa.array([None, "a"])}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.nulls(2)}), tmp_path / "nulls.parquet")
    for name, expected in [("a.jsonl", ["a"]), ("a.parquet", ["a"]), ("nulls.parquet", [])]:
        found, reading = _read(tmp_path / name)
        assert (found, reading.empty) == (expected, 2 - len(expected))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "a.parquet"])
def test_a_file_of_no_bytes_is_an_empty_document(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    for separator in (None, SEPARATOR):
        found, reading = _read(tmp_path / name, separator=separator)
        assert (found, reading.empty) == ([], 1)


def test_blank_lines_are_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    (tmp_path / "a.csv").write_bytes(b"\ntext\r\na\r\n\r\n\nb")
    for name in ("a.jsonl", "a.csv"):
        found, reading = _read(tmp_path / name)
        assert (found, reading.empty) == (["a", "b"], 0)


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name in ("a.txt", "a.jsonl", "a.csv", "a.csv.gz"):
        content = b"\xef\xbb\xbf" + (b"a" if name == "a.txt" else _written(["a"], name.removesuffix(".gz")))
        (tmp_path / name).write_bytes(_packed(content, name))
        for separator in (None, SEPARATOR):
            assert _read(tmp_path / name, separator=separator)[0] == ["a"]


def test_line_ends_and_nul_characters_are_kept(tmp_path):
    text = "a\r\nb\rc\0d\n"
    for name in NAMES:
        (tmp_path / name).write_bytes(_written([text, "last"], name))
        found, _ = _read(tmp_path / name, separator=SEPARATOR)
        assert found == [text, "last"], name


def test_another_column_can_be_named(tmp_path):
    for name in NAMES[3:]:
        (tmp_path / name).write_bytes(_written(["a"], name, column="my text"))
        assert _read(tmp_path / name, column="my text")[0] == ["a"]


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["a", None, "ü"], pa.large_string()),
        pa.array(["a", None, "ü"], pa.string_view()),
        pa.array(["a", None, "ü"]).dictionary_encode(),
        pa.array([b"a", None, "ü".encode()], pa.binary()),
        pa.array([b"a", None, "ü".encode()], pa.large_binary()),
    ],
    ids=lambda values: str(values.type),
)
def test_every_type_that_holds_text_is_read(tmp_path, values):
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    found, reading = _read(tmp_path / "a.parquet")
    assert (found, reading.empty) == (["a", "ü"], 1)


def test_rows_of_all_batches_and_row_groups_come_in_order(tmp_path):
    texts = [f"{i} " * (i % 50 * 40) + "." for i in range(3000)]
    for group in (3000, 700):
        pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=group)
        assert _read(tmp_path / "a.parquet")[0] == texts


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_long_plain_file_comes_in_the_pieces_of_its_text(tmp_path, packing):
    text = "A sentence of words, naïve ones — and so on.\r\n" * 250_000
    path = tmp_path / f"long.txt{packing}"
    path.write_bytes(_packed(b"\xef\xbb\xbf" + text.encode(), path.name))
    for skip_bad in (False, True):
        reading = Reading(skip_bad=skip_bad)
        done = [reading.bytes_done]
        (document,) = documents_of(path, reading, path.name)
        for _ in range(2):
            assert list(document.text.pieces()) == list(cut(text))
            done.append(reading.bytes_done)
        assert done == [0, path.stat().st_size, path.stat().st_size]


def test_progress_of_a_long_text_is_that_of_its_second_reading(tmp_path):
    path = tmp_path / "long.txt"
    path.write_bytes(b"some words " * 2_000_000)
    reading = Reading()
    documents = documents_of(path, reading, path.name)
    text = next(documents).text
    shares = []
    for _ in range(2):
        for _ in text.pieces():
            shares.append(reading.bytes_done / path.stat().st_size)
    assert shares == sorted(shares)
    n = len(shares) // 2
    assert max(shares[:n]) <= plain.FIRST_SHARE < shares[n] < shares[-1] == 1.0
    assert list(documents) == []


@pytest.mark.parametrize("packing", PACKINGS)
def test_long_documents_between_separators_are_kept_in_files_that_go_again(tmp_path, packing):
    long = "Many words, naïve ones. " * 600_000
    texts = ["short", long, "x", long[:-7] + "\n", "last"]
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(_written(texts, path.name))
    reading = Reading(separator=SEPARATOR, scratch=tmp_path / "scratch")
    found = []
    for document in documents_of(path, reading, path.name):
        text = document.text
        assert isinstance(text, LongText) == (len(found) in (1, 3))
        found.append("".join(text.pieces()) if isinstance(text, LongText) else text)
        del document, text
    assert found == texts
    assert list((tmp_path / "scratch").iterdir()) == []
    assert reading.bytes_done == path.stat().st_size


def test_a_long_document_that_is_not_utf8_is_known_before_it_is_given_out(tmp_path):
    content = b"some words " * 1_000_000
    bad = content[:9_000_000] + b"\xff" + content[9_000_000:]
    path = tmp_path / "a.txt"
    path.write_bytes(bad)
    with pytest.raises(UserError, match=r"^a\.txt: not UTF-8 at byte 9000000 \(0xff\)"):
        _read(path)
    assert _read(path, skip_bad=True)[0] == []
    path.write_bytes(b"a\n<>\n" + bad + b"<>b")
    assert _refused(path, r"a\.txt document 2: not UTF-8 at byte 9000005 \(0xff\)", separator="<>") == [
        "a",
        "b",
    ]
    assert list((tmp_path / "scratch").iterdir()) == []


@given(
    parts=st.lists(st.text("ab|\r\n", max_size=40), min_size=1, max_size=6),
    separator=st.sampled_from(["|", "||", "|\n|", "ab"]),
    block_bytes=st.integers(1, 9),
)
def test_separators_are_found_wherever_blocks_end(parts, separator, block_bytes, tmp_path_factory):
    path = tmp_path_factory.mktemp("blocks") / "a.txt"
    content = separator.join(parts)
    path.write_bytes(content.encode())
    *ended, last = content.split(separator)
    expected = [re.sub("\r?\n\\Z", "", part) for part in ended] + [last]
    expected[1:] = [re.sub("\\A\r?\n", "", part) for part in expected[1:]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanorun.data.readers._packings.BLOCK_BYTES", block_bytes)
        patch.setattr(plain, "BLOCK_BYTES", block_bytes)
        patch.setattr(plain, "LONG_BYTES", 20)
        found, _ = _read(path, separator=separator)
    # a long one of white space alone is not looked through for that
    assert [text for text in found if text.strip()] == [text for text in expected if text.strip()]


def test_a_wrong_separator_does_not_take_the_memory_of_the_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"some words " * 4_000_000)
    reading = Reading(separator="<|nowhere|>", scratch=tmp_path)
    tracemalloc.start()
    (document,) = documents_of(path, reading, path.name)
    assert sum(map(len, document.text.pieces())) == 44_000_000
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 40_000_000


def test_a_folder_for_long_documents_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    path = tmp_path / "a.txt"
    path.write_bytes(b"some words " * 1_000_000)
    reading = Reading(separator="<>", scratch=tmp_path / "file")
    with pytest.raises(UserError, match=r"more than 8 MB cannot be kept in .*file.*--separator"):
        list(documents_of(path, reading, path.name))


def test_an_empty_separator_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="--separator is empty"):
        _read(tmp_path / "a.txt", separator="")


JSON_LINES = [
    (b"{", r"invalid JSON \(.*at column 2\); expected one JSON object a line"),
    (b'{"text": "a"} x', r"invalid JSON \(Extra data at column 15\)"),
    (b'{"text": "a', r"invalid JSON \(Unterminated string starting at at column 10\)"),
    (b'["a"]', r"an array, not an object; .*jq"),
    (b'"text"', r"text, not an object"),
    (b"null", r"null, not an object"),
    (b"3", r"a number, not an object"),
    (b'{"txet": "a", "id": 1}', r"no key 'text', but 'txet', 'id'; try --column txet"),
    (b"{}", r"no key 'text', but none at all; name the key"),
    (b'{"a\\nb": 1}', r"but 'a\\\\n?b'|but 'a\\\\\\\\nb'"),
    (b'{"text": 3}', r"'text' holds a number, not text"),
    (b'{"text": true}', r"'text' holds true or false, not text"),
    (b'{"text": ["a"]}', r"'text' holds an array, not text"),
    (b'{"text": "\\ud800"}', r"\\ud800 without its other half"),
    (b'{"text": "a\\uDC00b"}', r"\\udc00 without its other half"),
    (b'{"text": "F\xfcnf"}', r"not UTF-8 at byte 11 of the line \(0xfc\)"),
    (b'{"text": "\xed\xa0\x80"}', r"not UTF-8 at byte 10 of the line \(0xed\)"),
    (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", r"JSON that cannot be read"),
    (b"[" * 200_000, r"nested too deep"),
]


@pytest.mark.parametrize(("line", "pattern"), JSON_LINES, ids=[str(line[:20]) for line, _ in JSON_LINES])
def test_a_bad_line_is_refused_by_its_number_and_the_others_can_be_had(tmp_path, line, pattern):
    lines = [json.dumps({"text": f"text {i}"}).encode() for i in range(1, 11)]
    lines[6] = line
    path = tmp_path / "web.jsonl"
    path.write_bytes(b"\n".join(lines))
    texts = _refused(path, r"^web\.jsonl line 7: (?s:.)*(" + pattern + ")")
    assert texts == [f"text {i}" for i in range(1, 11) if i != 7]


def test_pairs_of_surrogate_escapes_are_characters(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\\ud83d\\ude00 \\uD7FF"}')
    assert _read(tmp_path / "a.jsonl")[0] == ["\U0001f600 \ud7ff"]


CSV_ROWS = [
    (b"7,a,b", r"line 8: 3 fields, expected 2 as in the first row; put quotes"),
    (b"7", r"line 8: 1 fields, expected 2"),
    (b'7,"a"b', r"line 8: a row that cannot be read"),
    (b"7,a\rb", r"line 8: a carriage return in the middle of a row"),
    (b"7,F\xfcnf", r"line 8: not UTF-8 \(0xfc\); convert"),
]


@pytest.mark.parametrize(("row", "pattern"), CSV_ROWS)
def test_a_bad_row_is_refused_by_its_line_and_the_others_can_be_had(tmp_path, row, pattern):
    rows = [b"id,text", *(f"{i},text {i}".encode() for i in range(1, 11))]
    rows[7] = row
    path = tmp_path / "a.csv"
    path.write_bytes(b"\n".join(rows) + b"\n")
    texts = _refused(path, r"^a\.csv " + pattern)
    assert texts == [f"text {i}" for i in range(1, 11) if i != 7]


def test_an_open_quote_is_refused_by_the_line_it_stands_on(tmp_path):
    (tmp_path / "a.csv").write_text('text\na\n"b\nb"\n"c\nd\ne\n')
    assert _refused(tmp_path / "a.csv", r"line 5: a quote that begins a field and is not closed") == [
        "a",
        "b\nb",
    ]


def test_a_field_in_quotes_may_hold_lines_that_are_not_utf8_elsewhere(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'id,text\n1,"a\nb\xff\nc"\n2,"d\n\xc3\xa9"\n\xff,e\n')
    assert _refused(tmp_path / "a.csv", r"line 2: not UTF-8 \(0xff\)") == ["d\né", "e"]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv.gz", "a.parquet"])
def test_a_column_that_is_not_there_is_named_beside_those_that_are(tmp_path, name):
    (tmp_path / name).write_bytes(_written(["a"], name, column="contents"))
    pattern = rf"^{name}: no column 'content', but 'id', 'contents'; try --column contents"
    assert _refused(tmp_path / name, pattern, column="content") == []


def test_of_many_columns_the_first_are_named(tmp_path):
    pq.write_table(pa.table({f"c{i}": ["a"] for i in range(99)}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"'c11', …; name the column") as raised:
        _read(tmp_path / "a.parquet")
    assert "c12" not in str(raised.value)


@pytest.mark.parametrize("values", [[1, 2], [["a"], ["b"]], [{"a": "b"}, None], [b"x", b"y"]])
def test_a_column_that_holds_no_text_is_refused(tmp_path, values):
    kind = pa.binary(1) if values == [b"x", b"y"] else None
    pq.write_table(pa.table({"text": pa.array(values, kind)}), tmp_path / "a.parquet")
    assert _refused(tmp_path / "a.parquet", r"^a\.parquet: column 'text' holds .*, not text") == []


def test_a_row_that_is_not_utf8_is_refused_by_its_number(tmp_path):
    values = pa.array([b"a", b"F\xfcnf", b"b"], pa.binary())
    for kind in (pa.binary(), pa.string()):
        array = values if kind == pa.binary() else pa.Array.from_buffers(kind, 3, values.buffers())
        pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet")
        texts = _refused(
            tmp_path / "a.parquet", r"^a\.parquet row 2: not UTF-8 at byte 1 of the text \(0xfc\)"
        )
        assert texts == ["a", "b"]


def test_plain_text_that_is_not_utf8_names_the_byte(tmp_path):
    (tmp_path / "latin1.txt").write_bytes("Fünf Straßen".encode("latin-1"))
    assert _refused(tmp_path / "latin1.txt", r"not UTF-8 at byte 1 \(0xfc\); .*iconv -f LATIN1") == []
    (tmp_path / "word.txt").write_bytes("Fünf Straßen".encode("utf-16"))
    assert _refused(tmp_path / "word.txt", r"not UTF-8 at byte 0 \(0xff\); .*iconv -f UTF-16") == []
    (tmp_path / "cut.txt").write_bytes("Fünf €".encode()[:-1])
    assert _refused(tmp_path / "cut.txt", r"not UTF-8 at byte 6 \(0xe2\)") == []
    (tmp_path / "late.txt.gz").write_bytes(_gzip(b"a" * 5_000_000 + b"\xff"))
    assert _refused(tmp_path / "late.txt.gz", r"at byte 5000000 of its unpacked text") == []
    (tmp_path / "parts.txt").write_bytes(b"one|t\xffo|three")
    assert _refused(tmp_path / "parts.txt", r"document 2: not UTF-8 at byte 5", separator="|") == [
        "one",
        "three",
    ]


@cache
def _long_lines(n=40):
    make = random.Random(3)
    return ["".join(make.choices("abcdefgh \n", k=50_000)) for _ in range(n)]


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith((".gz", ".zst"))])
def test_a_cut_archive_is_refused_and_what_came_before_can_be_had(tmp_path, name):
    texts = _long_lines()
    content = _written(texts, name)
    path = tmp_path / name
    packing = "gzip" if name.endswith("gz") else "zstd"
    for n_bytes in (3, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:n_bytes])
        found = _refused(path, rf"^{name}: {packing} that ends in the middle", separator=SEPARATOR)
        assert found == texts[: len(found)]
        assert len(found) > 3 or n_bytes == 3


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_members_and_frames_follow_one_another(tmp_path, name):
    parts = [_written([f"part {i}"], name) for i in range(4)]
    empty = _packed(b"", name)
    between = [empty, empty, b"\0" * 600 if name.endswith("gz") else b"\x50\x2a\x4d\x18\x03\0\0\0abc", empty]
    path = tmp_path / name
    path.write_bytes(b"".join(part + after for part, after in zip(parts, between)))
    assert _read(path)[0] == [f"part {i}" for i in range(4)]
    path.write_bytes(b"".join(parts) + b"rubbish")
    assert len(_refused(path, "broken gzip|broken zstd")) <= 4


def test_an_archive_of_something_else_is_refused(tmp_path):
    for name in ("a.txt.gz", "a.txt.zst", "a.parquet"):
        for content in (b"plain text, not packed at all", bz2.compress(b"a")):
            (tmp_path / name).write_bytes(content)
            assert _refused(tmp_path / name, "broken (gzip|zstd|parquet)") == []


def test_a_parquet_file_of_no_bytes_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"")
    assert _refused(tmp_path / "a.parquet", "empty, not even parquet") == []


def test_a_zstd_window_beyond_memory_is_refused(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=28, write_content_size=False)
    packing = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.txt.zst").write_bytes(packing.compress(b"text") + packing.flush())
    assert _refused(tmp_path / "a.txt.zst", r"window of more than 128 MB; unpack it first: zstd -d") == []


def _damaged(content, damage):
    content = bytearray(content)
    for place, bit in damage:
        if content:
            content[place % len(content)] ^= 1 << bit
    return bytes(content)


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.txt.gz", "a.jsonl.zst", "a.csv.zst", "a.txt.zst", "a.parquet"]
)
def test_damage_gives_the_same_documents_or_one_sentence(name, tmp_path):
    texts = [f"document {i} " + "word " * 30 for i in range(20)]
    content = _written(texts, name)
    path = tmp_path / name

    @given(
        st.lists(st.tuples(st.integers(0, len(content)), st.integers(0, 7)), max_size=3),
        st.integers(0, len(content)),
    )
    @settings(max_examples=150, deadline=None)
    def check(damage, n_bytes):
        path.write_bytes(_damaged(content[:n_bytes] if n_bytes % 3 == 0 else content, damage))
        try:
            found, _ = _read(path, separator=SEPARATOR)
        except UserError as error:
            found = str(error)
        if path.stat().st_size:
            assert found == texts or str(found).startswith(name)
        else:
            assert found == [] or name == "a.parquet"

    check()


def test_a_huge_line_is_refused_before_it_fills_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("nanorun.data.readers._input.MOST_LINE_BYTES", 3_000_000)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "' + b"a" * 4_000_000 + b'"}\n')
    assert _refused(tmp_path / "a.jsonl", r"a line of more than 3 MB") == ["a"]


def test_an_archive_that_expands_enormously_is_unpacked_in_small_blocks(tmp_path):
    from nanorun.data.readers import _packings

    content = b"\0" * 300_000_000
    for packing, packed in (("gz", zlib.compress(content, wbits=31)), ("zst", _zstd(content))):
        n_bytes = 0
        for block in _packings.unpacked(io.BytesIO(packed), packing, "a"):
            assert len(block) <= _packings.UNPACKED_BLOCK_BYTES
            n_bytes += len(block)
        assert n_bytes == len(content)


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.csv.zst", "a.parquet"])
def test_a_file_that_changes_while_it_is_read_is_refused_always(tmp_path, name, skip_bad):
    path = tmp_path / name
    path.write_bytes(_written(_long_lines(), name))
    for change in (lambda: path.write_bytes(b""), lambda: os.utime(path, (1, 1))):
        path.write_bytes(_written(_long_lines(), name))
        reading = Reading(separator=SEPARATOR, skip_bad=skip_bad)
        documents = documents_of(path, reading, name)
        next(documents)
        change()
        with pytest.raises(UserError, match=rf"^{name}: was changed while it was read"):
            list(documents)


def test_a_long_file_that_changes_between_its_readings_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"some words " * 1_000_000)
    text = next(documents_of(path, Reading(skip_bad=True), "a.txt")).text
    assert sum(map(len, text.pieces())) == 11_000_000
    path.write_bytes(b"some words " * 1_000_001)
    with pytest.raises(UserError, match=r"had 11,000,000 bytes, has 11,000,011"):
        list(text.pieces())


def test_a_file_that_is_gone_when_its_turn_comes_is_refused_always(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a")
    documents = documents_of(path, Reading(skip_bad=True), "a.txt")
    path.unlink()
    with pytest.raises(UserError, match=r"a\.txt: was there when the inputs were listed"):
        list(documents)


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("a")

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("nanorun.data.readers._input.io.FileIO", refuse)
    assert _refused(path, r"cannot be read \(Permission denied\); make it readable") == []


def test_a_disk_that_fails_is_no_bad_document(tmp_path, monkeypatch):
    class Failing(io.FileIO):
        def read(self, size=-1):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("nanorun.data.readers._input.io.FileIO", Failing)
    for name in ("a.txt", "a.jsonl.gz", "a.csv.zst"):
        (tmp_path / name).write_bytes(_written(["a"], name))
        with pytest.raises(
            UserError, match=rf"^{name}: cannot be read on after byte 0 \(Input/output error\)"
        ):
            _read(tmp_path / name, skip_bad=True)


def test_without_pyarrow_it_is_said_how_to_get_it(tmp_path, monkeypatch):
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("a.parquet", "a.txt.zst"):
        (tmp_path / name).write_bytes(b"abc")
        with pytest.raises(UserError, match=rf"^{name}: .* takes pyarrow: pip install 'nanorun\[data\]'"):
            _read(tmp_path / name, skip_bad=True)


def test_of_millions_of_bad_lines_only_the_first_are_listed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{\n" * 5000 + b'{"text": "a"}')
    texts, reading = _read(path, skip_bad=True)
    assert (texts, reading.n_skipped, len(reading.skipped)) == (["a"], 5000, 1000)


def test_progress_grows_to_the_size_of_the_file(tmp_path):
    for name in NAMES:
        path = tmp_path / name
        path.write_bytes(_written(_long_lines(), name))
        reading = Reading(separator=SEPARATOR, bytes_done=1000)
        done = [reading.bytes_done for _ in documents_of(path, reading, name)]
        assert done == sorted(done)
        assert 1000 < done[len(done) // 2] <= done[-1] <= reading.bytes_done == 1000 + path.stat().st_size, (
            name
        )


HOW_MUCH_MEMORY = """
import sys
from pathlib import Path
from nanorun.data.readers import documents_of
from nanorun.data.sources import Reading
path = Path(sys.argv[1])
(document,) = documents_of(path, Reading(scratch=path.parent, separator=sys.argv[2] or None), path.name)
text = document.text
print(sum(map(len, text.pieces())) if hasattr(text, "pieces") else len(text))
status = Path("/proc/self/status").read_text()
print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak is read from /proc")
@pytest.mark.parametrize("separator", ["", SEPARATOR])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.zst", "a.csv", "a.parquet"])
def test_a_document_of_100_mb_takes_less_than_a_gigabyte(tmp_path, name, separator):
    if separator and ".txt" not in name:
        pytest.skip("only plain text has separators")
    text = "Fourscore and seven years ago our fathers, " * 2_500_000
    path = tmp_path / name
    path.write_bytes(_written([text], name))
    done = subprocess.run(
        [sys.executable, "-c", HOW_MUCH_MEMORY, str(path), separator],
        capture_output=True,
        text=True,
        check=True,
    )
    n_chars, n_bytes = map(int, done.stdout.split())
    assert n_chars == len(text) > 100_000_000
    assert n_bytes < 1_000_000_000


@pytest.mark.parametrize(
    ("content", "name", "found"),
    [
        (gzip.compress(b"text\n"), "a.txt", "gzip, not text; say --format plain.gz"),
        (gzip.compress(b'{"text": "x"}\n'), "a.jsonl", "gzip, not text; say --format jsonl.gz"),
        (b"PAR1\x15\x04\x15", "a.txt", "parquet, not text; say --format parquet"),
        (b"%PDF-1.7\n%\xe2\xe3", "a.txt", "a PDF, not text; take the text out of it first"),
        (b"id;text\n1;hello\n", "a.csv", "its columns are separated by ';'; write it again with ',' or tabs"),
        (b"id\ttext\n1\thello\n", "a.csv", "its columns are separated by tabs; say --format tsv"),
        (b"id,text\n1,hello\n", "a.tsv", "its columns are separated by ','; say --format csv"),
        (
            b"ab\0\0\xffcd",
            "a.txt",
            r"not UTF-8 at byte 4 \(0xff\), and with zero bytes; it looks like no text",
        ),
    ],
)
def test_what_a_name_does_not_say_is_told_by_what_it_looks_like(content, name, found, tmp_path):
    (tmp_path / name).write_bytes(content)
    _refused(tmp_path / name, found)


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_of_a_packed_file_that_breaks_off_all_whole_documents_before_the_cut_are_kept(packing, tmp_path):
    chance = random.Random(0)
    lines = [json.dumps({"text": f"{i} {chance.random()}"}) for i in range(20_000)]
    content = _packed("".join(f"{line}\n" for line in lines).encode(), f"a.jsonl{packing}")
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(content[: len(content) * 2 // 3])
    texts = _refused(path, "that ends in the middle")
    assert texts == [json.loads(line)["text"] for line in lines[: len(texts)]]
    # zstd unpacks blocks of 128 KiB, whole or not at all
    n_bytes = sum(len(line) + 1 for line in lines)
    kept = sum(len(line) + 1 for line in lines[: len(texts)])
    assert kept > n_bytes * 2 // 3 - (1 << 17) - 10_000


ODD_LINES = [
    b'{"text": "as usual"}',
    b'{"a": 1, "text": "\\u00e9\\n\\ud83d\\ude00", "text": "the last one"}',
    b'{"text": NaN}',
    b'{"n": NaN, "text": "beside no number"}',
    b'{"n": 1e999, "text": "beside a huge number"}',
    b'{"n": ' + b"1" * 400 + b', "text": "beside many digits"}',
    b'{"n": ' + b"1" * 5000 + b', "text": "beside too many digits"}',
    b'{"text": "half \\ud800"}',
    b'{"text": "raw \xed\xa0\x80"}',
    b'{"text": "\xff"}',
    b'{"text": "tab\t"}',
    b'{"text": null}',
    b'["text"]',
    b'"text"',
    b'{"Text": "x"}',
    b'{"text": 01}',
    b"  ",
    b'\xef\xbb\xbf{"text": "marked"}',
    b"[" * 100_000,
]


def test_json_lines_are_read_the_same_with_and_without_the_faster_parser(tmp_path, monkeypatch):
    pytest.importorskip("orjson")
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(ODD_LINES))
    texts, reading = _read(path, skip_bad=True)
    monkeypatch.setattr(jsonl, "_fast", None)
    assert _read(path, skip_bad=True)[0] == texts
    assert _read(path, skip_bad=True)[1].skipped == reading.skipped
    assert len(texts) == 5
    assert reading.n_skipped == 12


@pytest.mark.slow
def test_a_line_of_100_mb_with_wide_characters_takes_less_than_a_gigabyte(tmp_path):
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.write(b'{"text": "')
        for _ in range(100):
            file.write("ab \U0001f600 \u65e5\u672c\u8a9e ".encode() * (1_000_000 // 18))
        file.write(b'"}\n{"text": "short"}\n')
    program = (
        "import sys; from pathlib import Path; from nanorun.data.prepare import prepare\n"
        "prepare('text', out=Path(sys.argv[1]) / 'out', inputs=[sys.argv[1] + '/a.jsonl'])\n"
        "print(next(line for line in open('/proc/self/status') if 'VmHWM' in line).split()[1])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) / 1024 < 1000
