"""Shards, manifests, and the folder that `prepare` leaves or does not leave."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from nanorun.data import passes, shards, space, writing
from nanorun.data import prepare as prepare_module
from nanorun.data.batches import open_tokens
from nanorun.data.prepare import default_out, prepare
from nanorun.data.shards import load_manifest, open_shard, sha256_of, write_shard
from nanorun.data.sources import InputFile, Reading, shakespeare, sotu, text
from nanorun.data.tokenizers import tokenizer_from_manifest
from nanorun.errors import Stopped, UserError

SHARD_NAMES = {"text_train_000000.bin", "text_val_000000.bin", "manifest.json", "inputs.json"}


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
    text = "".join(document.text for document in shakespeare.documents(Reading()))
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
        documents = [document for document in sotu.documents(Reading()) if document.split == split]
        for piece, document in zip(pieces, documents, strict=True):
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
    monkeypatch.setattr(writing, "SHARD_TOKENS", 500)
    monkeypatch.setattr(passes, "CHUNK_BYTES", 900)
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
    second = _prepare(texts, out, report=lambda step: pytest.fail("worked again"))
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


def test_progress_adds_up_to_the_inputs(texts, out, monkeypatch):
    monkeypatch.setattr(passes, "CHUNK_BYTES", 900)
    told = []
    prepared = _prepare(texts, out, report=told.append)
    size = sum(path.stat().st_size for path in texts.iterdir())
    done = [step.done for step in told if step.stage == "tokenize"]
    assert len(done) > 10
    assert done == sorted(done)
    assert done[-1] == size
    assert {step.total for step in told} == {size}
    assert prepared.tokens_per_second > 0


def _interrupt_at(n_steps):
    """Return a report that is interrupted by Ctrl-C when it is told the n-th time."""
    told = []

    def report(step):
        told.append(step)
        if len(told) == n_steps:
            raise KeyboardInterrupt

    return report


def test_an_interruption_before_anything_is_done_leaves_nothing(texts, out, monkeypatch):
    monkeypatch.setattr(text, "documents", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        _prepare(texts, out)
    assert not out.parent.exists()


def _interrupted(reading):
    raise KeyboardInterrupt
    yield


def test_an_interruption_spares_what_was_there(texts, out, monkeypatch):
    monkeypatch.setattr(text, "documents", _interrupted)
    out.mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        _prepare(texts, out)
    assert _names(out) == {"notes.txt"}


def _small(monkeypatch):
    monkeypatch.setattr(writing, "SHARD_TOKENS", 1500)
    monkeypatch.setattr(passes, "CHUNK_BYTES", 700)


def _content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "inputs.json"}


@pytest.mark.parametrize("n_steps", [1, 4, 9, 17])
@pytest.mark.parametrize("tokenizer", ["byte", "char", "gpt2"])
def test_after_ctrl_c_the_same_command_goes_on_and_ends_with_the_same_bytes(
    texts, out, tmp_path, monkeypatch, n_steps, tokenizer
):
    _small(monkeypatch)
    whole = _prepare(texts, tmp_path / "whole", tokenizer=tokenizer)
    with pytest.raises(Stopped, match=r"documents are done and stay in .*: the same command goes on"):
        _prepare(texts, out, tokenizer=tokenizer, report=_interrupt_at(n_steps))
    with pytest.raises(UserError, match="no prepared corpus here"):
        open_tokens(out, "train")
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.bin")}
    again = _prepare(texts, out, tokenizer=tokenizer)
    assert again.resumed_at > 0
    assert again.manifest == whole.manifest
    assert _content(out) == _content(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


KILLED = """
import os, random, signal, sys
from pathlib import Path
from nanorun.data import journal, passes, writing
from nanorun.data.prepare import prepare
writing.SHARD_TOKENS, passes.CHUNK_BYTES, writing.MARK_SECONDS = 1500, 700, 0.0
chance = random.Random(int(sys.argv[3]))
# Any write, flush, rename or line of the journal may be the last thing that happens.
def deadly(function):
    def wrapped(*args, **kwargs):
        if chance.random() < 0.03:
            os.kill(os.getpid(), signal.SIGKILL)
        done = function(*args, **kwargs)
        if chance.random() < 0.03:
            os.kill(os.getpid(), signal.SIGKILL)
        return done
    return wrapped
os.replace, os.fsync, os.truncate = map(deadly, (os.replace, os.fsync, os.truncate))
writing.SplitWriter._append = deadly(writing.SplitWriter._append)
journal.Journal._add = deadly(journal.Journal._add)
prepare("text", out=Path(sys.argv[1]), inputs=[sys.argv[2]], tokenizer=sys.argv[4])
"""


@pytest.mark.parametrize("tokenizer", ["byte", pytest.param("char", marks=pytest.mark.slow)])
def test_killed_at_any_point_and_again_it_ends_with_the_bytes_of_a_whole_run(
    texts, out, tmp_path, monkeypatch, tokenizer
):
    """SIGKILL before and after writes, flushes and renames, until one run gets through."""
    _small(monkeypatch)
    _prepare(texts, tmp_path / "whole", tokenizer=tokenizer)
    kills = 0
    for seed in range(40):
        finished = {path: path.stat().st_mtime_ns for path in out.glob("*.bin")}
        command = [sys.executable, "-c", KILLED, str(out), str(texts), str(seed), tokenizer]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        assert {path: path.stat().st_mtime_ns for path in finished} == finished
        if done.returncode == 0:
            break
        kills += 1
        assert not (out / "manifest.json").exists() or load_manifest(out)
    assert kills > 2
    assert (out / "manifest.json").exists()
    monkeypatch.undo()
    assert _content(out) == _content(tmp_path / "whole")


def test_a_killed_run_does_not_look_whole(texts, out, monkeypatch):
    _small(monkeypatch)
    with pytest.raises(Stopped):
        _prepare(texts, out, report=_interrupt_at(9))
    with pytest.raises(UserError, match="no prepared corpus here"):
        open_tokens(out, "train")


def test_an_unfinished_preparation_of_another_kind_is_not_overwritten(texts, out, monkeypatch):
    _small(monkeypatch)
    with pytest.raises(Stopped):
        _prepare(texts, out, report=_interrupt_at(9))
    with pytest.raises(
        UserError, match=r"unfinished preparation of another kind \(corpus text, tokenizer byte\)"
    ):
        _prepare(texts, out, tokenizer="gpt2")
    assert _prepare(texts, out).resumed_at > 0


def test_an_interruption_is_not_trusted_where_the_inputs_have_changed(texts, out, tmp_path, monkeypatch):
    _small(monkeypatch)
    with pytest.raises(Stopped):
        _prepare(texts, out, report=_interrupt_at(12))
    (texts / "0.txt").write_text("Another beginning.")
    told = []
    again = _prepare(texts, out, report=told.append)
    assert again.resumed_at == 0
    assert any("beginning again" in step.note for step in told)
    assert again.manifest == _prepare(texts, tmp_path / "whole").manifest
    assert _content(out) == _content(tmp_path / "whole")


def test_a_damaged_shard_of_an_interrupted_run_is_made_again(texts, out, tmp_path, monkeypatch):
    _small(monkeypatch)
    with pytest.raises(Stopped):
        _prepare(texts, out, report=_interrupt_at(17))
    path = sorted(out.glob("*.bin"))[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    _prepare(texts, out)
    _prepare(texts, tmp_path / "whole")
    assert _content(out) == _content(tmp_path / "whole")


@pytest.mark.parametrize("keep", [0, 1, 40, -1, -7])
def test_a_journal_that_was_cut_off_is_used_as_far_as_it_goes(texts, out, tmp_path, monkeypatch, keep):
    _small(monkeypatch)
    monkeypatch.setattr(writing, "MARK_SECONDS", 0.0)
    with pytest.raises(Stopped):
        _prepare(texts, out, report=_interrupt_at(17))
    path = out / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:keep])
    _prepare(texts, out)
    _prepare(texts, tmp_path / "whole")
    assert _content(out) == _content(tmp_path / "whole")


@pytest.mark.parametrize("workers", [1, 2])
def test_the_shards_do_not_depend_on_the_threads(texts, out, tmp_path, monkeypatch, workers):
    _small(monkeypatch)
    monkeypatch.setattr(prepare_module, "usable_cores", lambda: 8)
    many = _prepare(texts, tmp_path / "many", tokenizer="gpt2", workers=8)
    one = _prepare(texts, out, tokenizer="gpt2", workers=workers)
    assert many.manifest == one.manifest
    assert _content(out) == _content(tmp_path / "many")


def test_a_second_preparation_waits_for_the_first_and_finds_it_done(texts, out, monkeypatch):
    _small(monkeypatch)
    told, both = [], []

    def second(step):
        told.append(step)

    def first(step):
        if not both:
            thread = threading.Thread(target=lambda: both.append(_prepare(texts, out, report=second)))
            both.append(thread)
            thread.start()
            while not told:
                pass
            assert told[0].stage == "wait"
            assert f"process {os.getpid()}" in told[0].note

    assert _prepare(texts, out, report=first).wrote
    both[0].join(timeout=30)
    assert not both[1].wrote
    assert _names(out) == {path.name for path in out.iterdir()} - {".lock"}


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_full_disk_at_the_beginning_leaves_nothing(texts, out, monkeypatch, fails_at):
    calls = 0

    def full(descriptor):
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        _prepare(texts, out)
    assert calls >= fails_at
    monkeypatch.undo()
    assert _prepare(texts, out).wrote


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
    with pytest.raises(UserError, match="--workers -1"):
        prepare("sotu", out=out, workers=-1)
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


def test_a_finished_preparation_waits_for_no_disk_but_that_of_its_small_files(texts, out, monkeypatch):
    synced = []
    monkeypatch.setattr(writing.SplitWriter, "sync", lambda self: synced.append(self))
    _prepare(texts, out)
    assert not synced


def test_what_was_left_out_is_said_again_by_a_run_that_finds_everything_there(texts, out):
    (texts / "loop").symlink_to("loop")
    (texts / "bad.jsonl").write_text("{\n")
    (texts / "copy.txt").write_bytes((texts / "1.txt").read_bytes())
    (texts / "empty.txt").write_text("")
    first = _prepare(texts, out, skip_bad=True)
    assert next(iter(first.skipped)).endswith("a symlink that leads to itself")
    assert (first.n_skipped, first.duplicates, first.empty) == (2, 1, 1)
    second = _prepare(texts, out, skip_bad=True)
    assert not second.wrote
    for key in prepare_module.LEFT_OUT:
        assert (
            list(getattr(second, key)) == list(getattr(first, key))
            if key in ("skipped", "notes")
            else (getattr(second, key) == getattr(first, key))
        )


@pytest.mark.parametrize(
    ("contents", "separator", "note"),
    [
        (["one document\n" * 30], None, "its last tenth"),
        (["a", "b"], None, "the one with the least hash was held out"),
        (["one document\n" * 30], "<end>", "'<end>' occurs nowhere"),
    ],
)
def test_what_came_out_otherwise_than_one_might_think_is_noted(contents, separator, note, out, tmp_path):
    for i, content in enumerate(contents):
        (tmp_path / f"{i}.txt").write_text(content)
    done = prepare("text", out=out, inputs=[str(tmp_path / "*.txt")], separator=separator)
    assert any(note in one for one in done.notes)


def test_a_corpus_as_it_should_be_is_noted_by_nothing(out, tmp_path):
    (tmp_path / "a.txt").write_text("<end>".join(f"document {i}" for i in range(100)))
    assert prepare("text", out=out, inputs=[str(tmp_path / "a.txt")], separator="<end>").notes == ()


@pytest.mark.parametrize(
    ("corpus", "options"),
    [
        ("sotu", {"column": "x"}),
        ("sotu", {"shards": 3}),
        ("shakespeare", {"separator": "x"}),
        ("text", {"include": "*"}),
        ("text", {"revision": "main"}),
        ("fineweb10B", {"column": "x"}),
        ("hub:a/b", {"shards": 2}),
        ("shards", {"column": "x"}),
        ("sotu", {"skip_bad": True}),
        ("fineweb10B", {"keep_duplicates": True}),
        ("shards", {"keep_duplicates": True}),
    ],
)
def test_an_option_that_a_corpus_does_not_heed_is_refused_by_name(corpus, options, out):
    option = next(iter(options)).replace("_", "-")
    with pytest.raises(
        UserError, match=rf"--{option}.*: corpus '{corpus}' takes no --{option} .* can\); leave it out"
    ):
        prepare(corpus, out=out, **options)
    assert not out.exists()


def test_the_corpora_are_named_that_heed_an_option(out):
    with pytest.raises(UserError, match=r"--column x: corpus 'sotu' takes no --column \(hub, text can\)"):
        prepare("sotu", out=out, column="x")


def test_an_empty_tokenizer_and_a_path_for_a_corpus_are_refused_with_the_mend(texts, out):
    with pytest.raises(UserError, match="--tokenizer is empty"):
        prepare("sotu", out=out, tokenizer="")
    with pytest.raises(UserError, match=rf"nanorun prepare-data text --input {texts}"):
        prepare(str(texts), out=out)
    with pytest.raises(UserError, match="Did you mean 'gpt2'"):
        prepare("sotu", out=out, tokenizer="GPT2")


def test_too_little_space_is_told_of_and_refused_by_the_disk_alone(texts, out, monkeypatch):
    monkeypatch.setattr(space, "free_bytes", lambda folder: 1000)
    told = []
    assert _prepare(texts, out, report=told.append).wrote
    assert next(step.note for step in told if step.stage == "note").endswith("the same command goes on")


def test_an_estimate_of_tokens_is_near_what_comes_out(out):
    done = prepare("sotu", out=out)
    guess = space.needed(sotu.files(Reading()), "byte", ready=False).tokens
    n_tokens = done.manifest.n_tokens("train") + done.manifest.n_tokens("val")
    assert guess == pytest.approx(n_tokens, rel=0.001)
    files = [InputFile("a.bin", 1024 + 2 * 500, 2.5, "")]
    assert space.needed(files, "gpt2", ready=True).tokens == 500
    assert space.needed([InputFile("a.txt", 2_300, 1.0, "")], "bpe512", ready=False).tokens == 1000
