"""Shards, manifests, and the folder that `prepare` leaves or does not leave."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from nanorun.data import prepare as prepare_module
from nanorun.data import shards
from nanorun.data.batches import open_tokens
from nanorun.data.prepare import default_out, prepare
from nanorun.data.shards import load_manifest, open_shard, sha256_of, write_shard
from nanorun.data.sources import shakespeare, sotu
from nanorun.data.tokenizers import tokenizer_from_manifest
from nanorun.errors import UserError

SHARD_NAMES = {"text_train_000000.bin", "text_val_000000.bin", "manifest.json"}


@pytest.fixture
def texts(tmp_path):
    """A folder of forty short documents."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"Document {i}, Größe {i * i}.\n" * (i + 1), encoding="utf-8")
    return folder


@pytest.fixture
def out(tmp_path):
    return tmp_path / "deep" / "out"


def _names(folder):
    return {path.name for path in folder.iterdir()}


def _prepare(texts, out, **options):
    return prepare("text", out=out, inputs=[str(texts)], **options)


def _rewrite_header(path, **values):
    content = bytearray(path.read_bytes())
    header = np.frombuffer(content, dtype="<i4", count=256)
    header.flags.writeable = True
    for place, value in values.items():
        header[int(place[1:])] = value
    path.write_bytes(content)


def test_a_shard_is_the_documented_bytes(tmp_path):
    path = tmp_path / "a.bin"
    write_shard(path, np.array([1, 256, 65535], dtype=np.uint16))
    header = np.array([20240520, 1, 3] + [0] * 253, dtype="<i4").tobytes()
    assert path.read_bytes() == header + bytes([1, 0, 0, 1, 255, 255])
    assert open_shard(path).tolist() == [1, 256, 65535]
    assert _names(tmp_path) == {"a.bin"}


@pytest.mark.parametrize(
    ("change", "complaint"), [(lambda c: c[:-1], "truncated"), (lambda c: c + b"00", "too long")]
)
def test_a_shard_of_the_wrong_length_is_named(tmp_path, change, complaint):
    path = tmp_path / "a.bin"
    write_shard(path, np.arange(10, dtype=np.uint16))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=rf"a\.bin: {complaint}: .*10 tokens take 1,044"):
        open_shard(path)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [({"_0": 7}, "not a token shard: it begins with 7"), ({"_1": 2}, "version 2"), ({"_2": 0}, "no tokens")],
)
def test_a_shard_with_a_strange_header_is_named(tmp_path, values, complaint):
    path = tmp_path / "a.bin"
    write_shard(path, np.arange(10, dtype=np.uint16))
    _rewrite_header(path, **values)
    with pytest.raises(UserError, match=rf"a\.bin: .*{complaint}"):
        open_shard(path)


@pytest.mark.parametrize("content", [b"", b"short", bytes(1024)])
def test_a_file_that_is_no_shard_is_named(tmp_path, content):
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.bin: not a token shard"):
        open_shard(path)


def test_tokens_beyond_the_vocabulary_are_named(tmp_path):
    path = tmp_path / "a.bin"
    write_shard(path, np.array([5, 257, 3], dtype=np.uint16))
    open_shard(path, vocab_size=258)
    with pytest.raises(UserError, match=r"a\.bin: token 257 at place 1 is beyond .* below 257"):
        open_shard(path, vocab_size=257)


def test_shakespeare_is_token_for_token_nanogpt(tmp_path):
    prepared = prepare("shakespeare", out=tmp_path)
    text = "".join(d.text for split in ("train", "val") for d in shakespeare.documents(split))
    ids = {char: i for i, char in enumerate(sorted(set(text)))}
    expected = np.array([ids[char] for char in text])
    cut = int(len(text) * 0.9)
    assert prepared.manifest.vocab_size == 65
    np.testing.assert_array_equal(open_shard(tmp_path / "shakespeare_train_000000.bin"), expected[:cut])
    np.testing.assert_array_equal(open_shard(tmp_path / "shakespeare_val_000000.bin"), expected[cut:])
    assert (cut, len(text) - cut) == (1_003_854, 111_540)


def test_sotu_by_bytes_gives_back_every_address(tmp_path):
    prepared = prepare("sotu", out=tmp_path)
    manifest = prepared.manifest
    assert (manifest.n_tokens("train"), manifest.n_tokens("val")) == (11_620_820, 565_180)
    assert (manifest.n_documents("train"), manifest.n_documents("val")) == (239, 10)
    assert manifest.n_bytes("train") + manifest.n_bytes("val") == 12_185_751
    for split in ("train", "val"):
        tokens = open_shard(tmp_path / f"sotu_{split}_000000.bin", vocab_size=257)
        starts = np.flatnonzero(tokens == 256)
        assert starts[0] == 0
        pieces = np.split(np.asarray(tokens), starts[1:])
        for piece, document in zip(pieces, sotu.documents(split), strict=True):
            assert piece[1:].astype(np.uint8).tobytes() == document.text.encode(), document.name


def test_the_identity_of_a_corpus_is_the_same_everywhere(tmp_path):
    """Shards made on another machine carry this hash; changing it makes old records foreign."""
    assert prepare("shakespeare", out=tmp_path / "a").manifest.sha256 == (
        "ff81b0b2a950d9c89bcb575ffa7075ea11ae1437ee269168a18b865ccbe4b7a7"
    )
    assert prepare("shakespeare", out=tmp_path / "b").manifest == load_manifest(tmp_path / "a")


@pytest.mark.parametrize("tokenizer", ["byte", "gpt2"])
def test_each_document_follows_an_end_of_text(texts, out, tokenizer):
    manifest = _prepare(texts, out, tokenizer=tokenizer, workers=2).manifest
    codec = tokenizer_from_manifest(manifest.tokenizer)
    found = []
    for split in ("train", "val"):
        tokens = np.asarray(open_shard(out / f"text_{split}_000000.bin"))
        assert tokens[0] == codec.eot
        found += codec.decode(tokens).split("<|endoftext|>")[1:]
        assert np.count_nonzero(tokens == codec.eot) == manifest.n_documents(split)
    assert sorted(found) == sorted(path.read_text(encoding="utf-8") for path in texts.iterdir())
    n_bytes = sum(manifest.n_bytes(split) for split in ("train", "val"))
    assert n_bytes == sum(path.stat().st_size for path in texts.iterdir())


def test_gpt2_takes_a_literal_end_of_text_as_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one <|endoftext|> two\n" * 30)
    manifest = prepare("text", out=tmp_path / "out", inputs=[str(path)], tokenizer="gpt2").manifest
    tokens = open_shard(tmp_path / "out" / "text_train_000000.bin")
    assert np.flatnonzero(tokens == 50256).tolist() == [0]
    assert manifest.n_bytes("train") + manifest.n_bytes("val") == 22 * 30


@pytest.mark.parametrize("tokenizer", ["byte", "char", "gpt2"])
def test_many_small_shards_hold_what_one_does(texts, tmp_path, monkeypatch, tokenizer):
    whole = _prepare(texts, tmp_path / "one", tokenizer=tokenizer).manifest
    monkeypatch.setattr(prepare_module, "SHARD_TOKENS", 500)
    monkeypatch.setattr(prepare_module, "BATCH_CHARS", 900)
    cut = _prepare(texts, tmp_path / "many", tokenizer=tokenizer).manifest
    assert len(cut.of_split("train")) > 3
    assert all(shard.tokens == 500 for shard in cut.of_split("train")[:-1])
    for split in ("train", "val"):
        one, many = open_tokens(tmp_path / "one", split), open_tokens(tmp_path / "many", split)
        np.testing.assert_array_equal(one.slice(0, one.n_tokens), many.slice(0, many.n_tokens))
        assert whole.n_bytes(split) == cut.n_bytes(split)
        assert whole.n_documents(split) == cut.n_documents(split)


def test_file_names_match_what_other_programs_look_for(texts, out):
    _prepare(texts, out)
    assert _names(out) == SHARD_NAMES
    assert len(list(out.glob("*train*.bin"))) == len(list(out.glob("*val*.bin"))) == 1


def test_twice_does_nothing_the_second_time(texts, out):
    first = _prepare(texts, out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    second = _prepare(texts, out, on_progress=lambda split, n: pytest.fail("worked again"))
    assert (first.wrote, second.wrote) == (True, False)
    assert second.manifest == first.manifest
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_damaged_shard_is_made_again(texts, out):
    first = _prepare(texts, out)
    (out / "text_val_000000.bin").write_bytes(b"damaged")
    assert _prepare(texts, out).wrote
    assert sha256_of(out / "text_val_000000.bin") == first.manifest.of_split("val")[0].sha256


def test_another_request_for_a_filled_folder_is_refused(texts, out):
    _prepare(texts, out)
    with pytest.raises(UserError, match=r"holds corpus 'text' with tokenizer 'byte', not 'text' with 'char'"):
        _prepare(texts, out, tokenizer="char")
    with pytest.raises(UserError, match="not 'shakespeare' with 'char'"):
        prepare("shakespeare", out=out)
    (texts / "new.txt").write_text("one more")
    with pytest.raises(UserError, match="other texts"):
        _prepare(texts, out)
    open_tokens(out, "train")


def test_progress_adds_up_to_the_tokens(texts, out):
    told = {"train": 0, "val": 0}

    def on_progress(split, n_tokens):
        told[split] += n_tokens

    prepared = _prepare(texts, out, on_progress=on_progress)
    assert told == {split: prepared.manifest.n_tokens(split) for split in told}
    assert prepared.tokens_per_second > 0


@pytest.mark.parametrize("interrupted_split", ["train", "val"])
def test_an_interruption_leaves_nothing(texts, out, interrupted_split):
    def on_progress(split, n_tokens):
        if split == interrupted_split:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _prepare(texts, out, on_progress=on_progress)
    assert not out.parent.exists()


def test_an_interruption_spares_what_was_there(texts, out):
    def on_progress(split, n_tokens):
        raise KeyboardInterrupt

    out.mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        _prepare(texts, out, on_progress=on_progress)
    assert _names(out) == {"notes.txt"}


def test_a_killed_run_does_not_look_whole_and_is_overwritten(texts, out):
    """SIGKILL leaves shards and a temporary file, but no manifest."""
    command = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from nanorun.data.prepare import prepare\n"
        "def kill(split, n):\n"
        "    if split == 'val': os.kill(os.getpid(), signal.SIGKILL)\n"
        f"prepare('text', out=Path({str(out)!r}), inputs=[{str(texts)!r}], on_progress=kill)\n"
    )
    subprocess.run([sys.executable, "-c", command], check=False, timeout=60)
    left = _names(out)
    assert "text_train_000000.bin" in left
    assert not left & {"manifest.json", "text_val_000000.bin"}
    with pytest.raises(UserError, match="no prepared corpus here"):
        open_tokens(out, "train")

    (out / "text_train_000007.bin").write_bytes(b"of a longer text, prepared before")
    for path in out.glob("*.tmp"):
        os.utime(path, (0, 0))
    _prepare(texts, out)
    assert _names(out) == SHARD_NAMES


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_full_disk_leaves_nothing_half_written(texts, out, monkeypatch, fails_at):
    calls = 0

    def full(descriptor):
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        _prepare(texts, out)
    assert calls == fails_at
    assert not out.exists()


def test_a_disk_that_is_really_full_is_told(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    path = tmp_path / "a.bin"
    path.with_name(f"a.bin.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="the disk is full"):
        write_shard(path, np.zeros(100_000, dtype=np.uint16))
    assert _names(tmp_path) == set()


def test_a_full_disk_keeps_the_older_shard(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    write_shard(path, np.arange(3, dtype=np.uint16))

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        write_shard(path, np.arange(9, dtype=np.uint16))
    assert _names(tmp_path) == {"a.bin"}
    assert open_shard(path).tolist() == [0, 1, 2]


def test_a_file_where_the_folder_should_be_is_named(texts, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        _prepare(texts, tmp_path / "out")


def test_an_empty_split_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="no text for its training split"):
        prepare("text", out=tmp_path / "out", inputs=[str(tmp_path / "a.txt")])
    assert not (tmp_path / "out").exists()


def test_bad_names_and_workers_are_refused(out):
    with pytest.raises(UserError, match="no corpus 'sotuu'"):
        prepare("sotuu", out=out)
    with pytest.raises(UserError, match="no tokenizer 'bytes'"):
        prepare("sotu", out=out, tokenizer="bytes")
    with pytest.raises(UserError, match="--workers 0"):
        prepare("sotu", out=out, workers=0)
    assert not out.exists()


def test_the_default_folder_names_a_tokenizer_only_where_it_is_unusual(tmp_path):
    assert default_out("sotu", root=tmp_path) == tmp_path / "sotu"
    assert default_out("sotu", "byte", tmp_path) == tmp_path / "sotu"
    assert default_out("sotu", "gpt2", tmp_path) == tmp_path / "sotu-gpt2"


def test_a_flipped_bit_in_a_shard_is_found(texts, out):
    _prepare(texts, out)
    path = out / "text_train_000000.bin"
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"text_train_000000\.bin: sha256 .*, its manifest says"):
        open_tokens(out, "train")
    open_tokens(out, "train", verify=False)
    open_tokens(out, "val")


def test_a_corpus_with_tokens_beyond_its_vocabulary_is_refused(texts, out):
    _prepare(texts, out)
    path = out / "text_train_000000.bin"
    tokens = np.array(open_shard(path))
    tokens[100] = 300
    write_shard(path, tokens)
    with pytest.raises(UserError, match="token 300 at place 100 is beyond the vocabulary"):
        open_tokens(out, "train")


def test_a_shard_with_another_count_than_the_manifest_is_refused(texts, out):
    _prepare(texts, out)
    write_shard(out / "text_val_000000.bin", np.arange(10, dtype=np.uint16))
    with pytest.raises(UserError, match="10 tokens, its manifest says"):
        open_tokens(out, "val", verify=False)


def test_a_missing_shard_is_named(texts, out):
    _prepare(texts, out)
    (out / "text_val_000000.bin").unlink()
    with pytest.raises(UserError, match=r"text_val_000000\.bin: cannot be read"):
        open_tokens(out, "val")


def _edit_manifest(out, edit):
    path = out / "manifest.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda m: m.update(format_version=2), "format version 2, this nanorun reads up to 1; upgrade"),
        (lambda m: m.update(format_version="1"), "format version '1', expected 1"),
        (lambda m: m["shards"][0].update(bytes=1), "it was altered"),
        (lambda m: m["tokenizer"].update(vocab_size=9), "it was altered"),
        (lambda m: m.pop("sha256"), "it was altered"),
        (lambda m: m.pop("corpus"), "damaged"),
        (lambda m: m.update(tokenizer=3), "damaged"),
        (lambda m: m["shards"][0].update(extra=1), "damaged"),
        (lambda m: m["shards"][0].update(file="../secret.bin"), "not a plain file name"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(texts, out, edit, complaint):
    _prepare(texts, out)
    _edit_manifest(out, edit)
    with pytest.raises(UserError, match=rf"manifest\.json: .*{complaint}"):
        open_tokens(out, "train")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_manifest_that_is_not_json_of_ours_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json: "):
        load_manifest(tmp_path)


def test_a_folder_that_is_not_prepared_says_what_to_type(tmp_path):
    with pytest.raises(UserError, match="nanorun prepare-data CORPUS --out"):
        open_tokens(tmp_path / "nowhere", "train")


def test_preparing_imports_neither_torch_nor_the_network():
    command = (
        "import sys, nanorun.data.prepare, nanorun.data.batches\n"
        "heavy = ('torch', 'scipy', 'wandb', 'tiktoken', 'requests', 'pydantic')\n"
        "print([module for module in heavy if module in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
