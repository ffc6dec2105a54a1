"""Token files that others made: what they are, and that the corpus made of them is theirs, token for token."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from foreign_samples import (
    EOT,
    documents,
    flipped,
    joined,
    metadata_lines,
    write_datatrove,
    write_llmc,
    write_nanogpt,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorun.data import foreign
from nanorun.data import shards as shard_files
from nanorun.data.batches import open_tokens
from nanorun.data.foreign import TokenFile, documents_between, load_format, part_of, planning
from nanorun.data.shards import load_manifest, open_shard, sha256_of, write_shard
from nanorun.data.sources import Reading, is_ready, load_source, shards
from nanorun.data.space import needed
from nanorun.errors import Stopped, UserError

TEXT = "To be, or not to be, that is the question.\n" * 40


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def given_folder(tmp_path):
    folder = tmp_path / "given"
    folder.mkdir()
    return folder


def _prepare(out, *inputs, tokenizer=None, **reading):
    """What prepare-data does with such a source."""
    manifest = shards.make_ready(out, Reading(inputs=tuple(map(str, inputs)), **reading), tokenizer)
    manifest.write(out)
    return manifest


def _is_current(out, *inputs, **reading):
    wanted = Reading(inputs=tuple(map(str, inputs)), **reading)
    return shards.is_current(out, load_manifest(out), wanted)


def _tokens(out, split):
    return open_tokens(out, split).slice(0, open_tokens(out, split).n_tokens).tolist()


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def _found(*paths):
    files = foreign.gather([str(path) for path in paths])
    (form,) = foreign.recognise(files)
    return form.look(files)


def _three_llmc(folder):
    """A val shard and two train shards of documents that begin with their end of text."""
    parts = [joined(documents(20, seed=seed, eot_first=True)) for seed in range(3)]
    write_llmc(folder / "fineweb_val_000000.bin", parts[0])
    write_llmc(folder / "fineweb_train_000001.bin", parts[1])
    write_llmc(folder / "fineweb_train_000002.bin", parts[2])
    return parts


def test_shards_is_a_corpus_that_comes_ready():
    source = load_source("shards")
    assert is_ready(source)
    assert (source.NAME, source.EMBEDDED) == ("shards", False)


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("fineweb_val_000000.bin", "val"),
        ("fineweb_train_000001.bin", "train"),
        ("TinyStories_val.bin", "val"),
        ("train.bin", "train"),
        ("my-validation.03.ds", "val"),
        ("dev.ds", "val"),
        ("train_data_test.bin", "test"),
        ("validity_trainer.bin", None),
        ("000_shuffled.ds", None),
        ("val/00000_shuffled.ds", "val"),
        ("train/00000_val.ds", "val"),
        ("test data/000.ds", None),
    ],
)
def test_names_say_what_a_file_is_for(tmp_path, path, part):
    assert part_of(tmp_path / path) == part


def test_llmc_shards_become_ours_under_their_own_names_without_a_copy(given_folder, out):
    val, *train = _three_llmc(given_folder)
    manifest = _prepare(out, given_folder)
    assert [entry.file for entry in manifest.shards] == [
        "fineweb_train_000001.bin",
        "fineweb_train_000002.bin",
        "fineweb_val_000000.bin",
    ]
    for entry in manifest.shards:
        assert os.path.samefile(out / entry.file, given_folder / entry.file)
        assert entry.sha256 == sha256_of(given_folder / entry.file)
        assert entry.documents == 20
    assert _tokens(out, "val") == val.tolist()
    assert _tokens(out, "train") == joined(train).tolist()
    assert manifest.tokenizer["name"] == "gpt2"
    assert manifest.n_bytes("val") > len(val)
    assert _names(out) == sorted([*(e.file for e in manifest.shards), "inputs.json", "manifest.json"])


def test_bytes_of_text_are_those_of_the_tokens(given_folder, out):
    ids = [EOT, 15496, 11, 995]  # Hello, world
    write_llmc(given_folder / "a_train.bin", ids)
    write_llmc(given_folder / "a_val.bin", ids[:2])
    manifest = _prepare(out, given_folder)
    assert (manifest.n_bytes("train"), manifest.n_bytes("val")) == (len("Hello, world"), len("Hello"))


def test_where_no_link_can_be_made_shards_are_copied(given_folder, out, monkeypatch):
    def no_link(*args, **options):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    _three_llmc(given_folder)
    monkeypatch.setattr(os, "link", no_link)
    _prepare(out, given_folder)
    for path in given_folder.iterdir():
        assert not os.path.samefile(path, out / path.name)
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_a_link_in_the_inputs_is_followed(given_folder, out, tmp_path):
    _three_llmc(given_folder)
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in given_folder.iterdir():
        (linked / path.name).symlink_to(path)
    _prepare(out, linked)
    for path in given_folder.iterdir():
        assert not (out / path.name).is_symlink()
        assert os.path.samefile(path, out / path.name)


def test_wide_llmc_shards_need_a_tokenizer_and_stay_as_they_are(given_folder, out):
    write_llmc(given_folder / "a_train.bin", [3, 70_000, 5], wide=True)
    write_llmc(given_folder / "a_val.bin", [1, 2], wide=True)
    with pytest.raises(UserError, match=r"a_train\.bin and .*nothing in them says .*--tokenizer gpt2"):
        _prepare(out, given_folder)
    with pytest.raises(
        UserError, match=r"holds the id 70000, but the ids of tokenizer 'gpt2' are below 50,257"
    ):
        _prepare(out, given_folder, tokenizer="gpt2")
    assert _names(out) == []
    found = _found(given_folder)
    assert found.title == "shards of llm.c in uint32"
    assert [foreign.tokens_of(file).tolist() for file in found.files] == [[3, 70_000, 5], [1, 2]]


def test_ids_that_are_not_gpt2s_need_a_tokenizer(given_folder, out):
    write_llmc(given_folder / "a_train.bin", [EOT + 1, EOT])
    write_llmc(given_folder / "a_val.bin", [1])
    with pytest.raises(UserError, match="nothing in them says which tokenizer"):
        _prepare(out, given_folder)
    write_llmc(given_folder / "a_train.bin", [5, 6, 7])
    with pytest.raises(UserError, match="nothing in them says which tokenizer"):
        _prepare(out, given_folder)
    assert _prepare(out, given_folder, tokenizer="byte").tokenizer["name"] == "byte"


def test_an_id_beyond_gpt2s_behind_an_end_of_text_is_found(given_folder, out):
    write_llmc(given_folder / "a_train.bin", [EOT, 5])
    write_llmc(given_folder / "a_val.bin", [EOT, 60_000])
    with pytest.raises(
        UserError, match=r"a_val\.bin: holds the id 60000, .*below 50,257; say with --tokenizer"
    ):
        _prepare(out, given_folder)


@pytest.mark.parametrize("wide", [False, True])
def test_what_files_would_become_is_told_by_the_tokens_that_they_hold(given_folder, wide):
    write_llmc(given_folder / "a_train.bin", [3, 4, 5], wide=wide)
    write_llmc(given_folder / "a_val.bin", [1, 2], wide=wide)
    files = shards.files(Reading(inputs=(str(given_folder),)))
    assert [file.tokens for file in files] == [3, 2]
    assert needed(files, "gpt2", ready=True).tokens == 5


def test_the_tokens_of_nanogpts_files_are_counted_without_a_header(given_folder):
    ids = write_nanogpt(given_folder, TEXT)
    files = shards.files(Reading(inputs=(str(given_folder),)))
    assert needed(files, "gpt2", ready=True).tokens == len(ids)


@pytest.mark.parametrize("protocol", range(6))
def test_nanogpts_files_become_ours_with_their_characters(given_folder, out, protocol):
    ids = write_nanogpt(given_folder, TEXT, protocol=protocol)
    manifest = _prepare(out, given_folder)
    assert manifest.tokenizer["name"] == "char"
    assert manifest.tokenizer["chars"] == "".join(sorted(set(TEXT)))
    assert _tokens(out, "train") + _tokens(out, "val") == ids.tolist()
    assert manifest.n_bytes("train") + manifest.n_bytes("val") == len(TEXT.encode())
    assert manifest.n_documents("train") == manifest.n_documents("val") == 1
    assert [entry.file for entry in manifest.shards] == ["shards_train_000000.bin", "shards_val_000000.bin"]


def test_a_table_of_characters_in_another_order_is_sorted_with_its_ids(given_folder, out):
    chars = sorted(set(TEXT), reverse=True)
    write_nanogpt(given_folder, TEXT, chars=chars)
    manifest = _prepare(out, given_folder)
    text = "".join(manifest.tokenizer["chars"][i] for i in _tokens(out, "train") + _tokens(out, "val"))
    assert text == TEXT
    assert manifest.n_bytes("train") + manifest.n_bytes("val") == len(TEXT)


def test_nanogpts_files_without_a_table_need_a_tokenizer(given_folder, out):
    write_nanogpt(given_folder, TEXT)
    (given_folder / "meta.pkl").unlink()
    with pytest.raises(UserError, match=r"train\.bin .*nothing in them says .*--tokenizer"):
        _prepare(out, given_folder)
    with pytest.raises(UserError, match="no table of characters is there; bring the meta"):
        _prepare(out, given_folder, tokenizer="char")
    assert _prepare(out, given_folder, tokenizer="gpt2").tokenizer["name"] == "gpt2"


def test_a_tokenizer_that_contradicts_the_table_is_refused(given_folder, out):
    write_nanogpt(given_folder, TEXT)
    with pytest.raises(UserError, match="--tokenizer gpt2: the files themselves say char"):
        _prepare(out, given_folder, tokenizer="gpt2")
    assert _prepare(out, given_folder, tokenizer="char").tokenizer["name"] == "char"


def test_an_id_beyond_the_table_is_named(given_folder, out):
    write_nanogpt(given_folder, TEXT)
    with open(given_folder / "val.bin", "ab") as file:
        file.write(b"\xff\x00")
    with pytest.raises(
        UserError, match=r"val\.bin: holds the id 255, but the ids of tokenizer 'char' are below"
    ):
        _prepare(out, given_folder)


@pytest.mark.parametrize(
    ("meta", "complaint"),
    [
        ([1, 2], "holds a list, where a dict is expected"),
        ({}, "says neither vocab_size nor itos"),
        ({"vocab_size": "7"}, "vocab_size is '7'"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"vocab_size": 10**400}, "vocab_size is a number of many digits"),
        ({"vocab_size": 3, "itos": {0: "a", 1: "b"}}, "has not the ids 0 to 2"),
        ({"vocab_size": 2, "itos": {0: "a", 2: "b"}}, "has not the ids 0 to 1"),
        ({"vocab_size": 2, "itos": {0: "a", 1: "a"}}, "two ids stand for the same text"),
        ({"vocab_size": 2, "itos": {0: "a", 1: 7}}, "id 1 stands for 7"),
        ({"vocab_size": 2, "itos": {0: "a", 1: "\ud800"}}, r"id 1 stands for '\\ud800'"),
        ({"vocab_size": 1, "itos": {"a": 0}}, "its itos is no table of ids"),
        (
            {"vocab_size": 2, "itos": {0: "a", 1: "b"}, "stoi": {"a": 1, "b": 0}},
            "not itos the other way round",
        ),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(given_folder, out, meta, complaint):
    write_nanogpt(given_folder, TEXT)
    (given_folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(UserError, match=rf"meta\.pkl: .*{complaint}"):
        _prepare(out, given_folder)


def test_a_table_that_would_run_a_command_runs_nothing(given_folder, out, tmp_path):
    write_nanogpt(given_folder, TEXT)
    marker = tmp_path / "ran"
    (given_folder / "meta.pkl").write_bytes(b"cos\nsystem\n(S'touch " + os.fsencode(marker) + b"'\ntR.")
    with pytest.raises(UserError, match=r"meta\.pkl: byte 0, opcode GLOBAL: .*refused"):
        _prepare(out, given_folder)
    assert not marker.exists()
    pickle.loads((given_folder / "meta.pkl").read_bytes())
    assert marker.exists()


def test_a_table_of_words_has_no_tokenizer_of_ours(given_folder, out):
    write_nanogpt(given_folder, TEXT)
    (given_folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 2, "itos": {0: "to", 1: "be"}}))
    assert "not single characters" in " ".join(_found(given_folder).notes)
    with pytest.raises(UserError, match="nothing in them says which tokenizer"):
        _prepare(out, given_folder)


def test_numbers_of_four_bytes_in_nanogpts_files_are_suspected(given_folder):
    np.arange(70_000, dtype="<u4").tofile(given_folder / "train.bin")
    (file,) = _found(given_folder).files
    assert "seems to hold tokens of 4 bytes" in load_format("nanogpt").closer_look(file)[0]
    np.arange(60_000, dtype="<u2").tofile(given_folder / "train.bin")
    assert load_format("nanogpt").closer_look(_found(given_folder).files[0]) == []


@pytest.mark.parametrize("token_size", [2, 4])
def test_datatroves_files_become_ours_with_the_documents_of_their_index(given_folder, out, token_size):
    train, val = documents(30, seed=1), documents(10, seed=2)
    tokens = write_datatrove(given_folder / "000_train.ds", train, token_size=token_size)
    held_out = write_datatrove(given_folder / "000_val.ds", val, token_size=token_size)
    manifest = _prepare(out, given_folder)
    assert _tokens(out, "train") == tokens.tolist()
    assert _tokens(out, "val") == held_out.tolist()
    assert (manifest.n_documents("train"), manifest.n_documents("val")) == (30, 10)
    assert manifest.tokenizer["name"] == "gpt2"
    assert open_shard(out / "shards_train_000000.bin").dtype == np.uint16


def test_folders_called_train_and_val_say_which_is_which(tmp_path, out):
    for name, seed in (("train", 1), ("val", 2)):
        (tmp_path / name).mkdir()
        write_datatrove(tmp_path / name / "00000_00000_shuffled.ds", documents(8, seed=seed))
    _prepare(out, tmp_path / "train", tmp_path / "val")
    assert _tokens(out, "val") == joined(documents(8, seed=2)).tolist()
    assert _tokens(out, "train") == joined(documents(8, seed=1)).tolist()


def test_a_tokenizer_that_metadata_name_and_we_do_not_know_has_to_be_said(given_folder, out):
    for split in ("train", "val"):
        write_datatrove(given_folder / f"{split}.ds", documents(5), tokenizer="someone/their-tokenizer")
    with pytest.raises(UserError, match="they name someone/their-tokenizer, which nanorun does not know"):
        _prepare(out, given_folder)
    assert _prepare(out, given_folder, tokenizer="gpt2").tokenizer["name"] == "gpt2"


def test_without_metadata_the_index_tells_how_wide_tokens_are(given_folder):
    write_datatrove(given_folder / "a.ds", documents(5), token_size=4, metadata=False)
    (file,) = _found(given_folder).files
    assert file.dtype == np.dtype("<u4")
    assert foreign.tokens_of(file).tolist() == joined(documents(5)).tolist()
    (given_folder / "a.ds.index").unlink()
    assert "tell whether its tokens take 2 bytes or 4" in _found(given_folder).faults[0]


def test_an_unknown_tokenizer_in_metadata_says_nothing(given_folder):
    write_datatrove(given_folder / "a.ds", documents(5), tokenizer="Unknown Tokenizer|2")
    found = _found(given_folder)
    assert (found.faults, found.vocabulary.name) == ([], None)


def test_what_a_worker_without_documents_leaves_is_no_fault(given_folder):
    write_datatrove(given_folder / "a.ds", documents(5))
    write_datatrove(given_folder / "b.ds", [], metadata=False)
    found = _found(given_folder)
    assert found.faults == []
    assert [file.path.name for file in found.files] == ["a.ds"]
    assert "b.ds: empty" in found.notes[0]


def test_files_shuffled_by_chunks_are_sound(given_folder):
    random = np.random.default_rng(3)
    tokens = random.integers(0, 50_000, 4096)
    starts = np.sort(random.choice(np.arange(1, 4096), 60, replace=False))
    tokens[starts - 1] = EOT
    ends = sorted({*starts.tolist(), *range(512, 4097, 512)})
    pieces = np.split(tokens, ends[:-1])
    write_datatrove(given_folder / "a.ds", [piece.tolist() for piece in pieces])
    found = _found(given_folder)
    assert found.faults == []
    assert load_format("datatrove").closer_look(found.files[0]) == []


def test_an_index_is_looked_at_in_pieces(given_folder, monkeypatch):
    datatrove = load_format("datatrove")
    monkeypatch.setattr(datatrove, "_PIECE", 7)
    random = np.random.default_rng(5)
    texts = [[*random.integers(0, 50_000, n).tolist(), EOT] if n else [] for n in random.integers(0, 9, 50)]
    write_datatrove(given_folder / "a.ds", texts)
    (file,) = _found(given_folder).files
    assert datatrove.closer_look(file) == []
    ends = np.cumsum([len(text) for text in texts])
    place = int(np.flatnonzero(np.diff(ends) > 1)[20])
    index = given_folder / "a.ds.index"
    content = index.read_bytes()
    index.write_bytes(content[: 8 * place] + struct.pack("<Q", ends[place] + 1) + content[8 * place + 8 :])
    assert _found(given_folder).faults == []
    (fault,) = datatrove.closer_look(_found(given_folder).files[0])
    assert (
        f"a.ds.index: a document ends at token {ends[place] + 1}, where no end of text (50256) stands"
        in fault
    )
    index.write_bytes(content[: 8 * place] + bytes(8) + content[8 * place + 8 :])
    (fault,) = _found(given_folder).faults
    assert f"document {place + 1} ends at token 0, before document {place}" in fault


def test_documents_that_end_with_a_full_stop_are_not_taken_for_ends_of_text(given_folder):
    random = np.random.default_rng(4)
    texts = [[*random.choice([13, 7, 8, 9], 30).tolist(), 13] for _ in range(40)]
    texts[7][-1] = 0
    write_datatrove(given_folder / "a.ds", texts)
    assert load_format("datatrove").closer_look(_found(given_folder).files[0]) == []


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
    st.lists(st.integers(0, 40), min_size=0, max_size=4),
)
@settings(max_examples=200, deadline=None)
def test_documents_are_counted_where_they_begin_and_each_once(lengths, cuts):
    ends = np.cumsum(lengths).astype("<u8")
    n_tokens = int(ends[-1])
    file = TokenFile(None, None, 0, np.dtype("<u2"), n_tokens, ends)
    starts = [int(end) - length for end, length in zip(ends, lengths) if length]
    places = [0, *sorted(min(cut, n_tokens) for cut in cuts), n_tokens]
    for first, last in itertools.pairwise(places):
        assert documents_between(file, first, last) == sum(first <= start < last for start in starts)


def test_shards_written_anew_are_cut_where_ours_are(given_folder, out, monkeypatch):
    monkeypatch.setattr(planning, "SHARD_TOKENS", 100)
    train = documents(20, seed=5)
    tokens = write_datatrove(given_folder / "000_train.ds", train[:12])
    tokens = np.concatenate([tokens, write_datatrove(given_folder / "001_train.ds", train[12:])])
    write_datatrove(given_folder / "000_val.ds", documents(2))
    manifest = _prepare(out, given_folder)
    of_train = manifest.of_split("train")
    assert [entry.tokens for entry in of_train] == [100] * (len(tokens) // 100) + [len(tokens) % 100]
    assert sum(entry.documents for entry in of_train) == 20
    assert _tokens(out, "train") == tokens.tolist()


def test_without_a_val_file_the_end_of_the_last_is_held_out_from_a_document_on(given_folder, out):
    parts = [joined(documents(100, seed=seed, eot_first=True)) for seed in (1, 2)]
    for number, part in enumerate(parts, 1):
        write_llmc(given_folder / f"web_train_{number:06d}.bin", part)
    steps = []
    manifest = _prepare(out, given_folder, report=steps.append)
    held_out = _tokens(out, "val")
    assert _tokens(out, "train") + held_out == joined(parts).tolist()
    assert held_out[0] == EOT
    n_all = len(joined(parts))
    assert n_all // 40 <= len(held_out) <= n_all // 20
    assert os.path.samefile(out / "web_train_000001.bin", given_folder / "web_train_000001.bin")
    assert [entry.file for entry in manifest.shards] == [
        "web_train_000001.bin",
        "shards_train_000000.bin",
        "shards_val_000000.bin",
    ]
    assert any(
        f"the last {len(held_out)} tokens of web_train_000002.bin are held out" in s.note for s in steps
    )


def test_where_ends_of_text_follow_documents_the_held_out_part_begins_behind_one(given_folder, out):
    tokens = write_datatrove(given_folder / "a.ds", documents(200, seed=3))
    (given_folder / "a.ds.index").unlink()
    _prepare(out, given_folder)
    assert _tokens(out, "train") + _tokens(out, "val") == tokens.tolist()
    assert _tokens(out, "train")[-1] == EOT


def test_an_index_says_where_the_held_out_part_begins(given_folder, out):
    lengths = [50] * 40
    write_datatrove(given_folder / "a.ds", [[7] * length for length in lengths])
    manifest = _prepare(out, given_folder)
    assert manifest.n_tokens("val") in (50, 100)
    assert (manifest.n_tokens("train") + manifest.n_tokens("val")) == 2000
    assert manifest.n_documents("train") + manifest.n_documents("val") == 40


def test_too_few_tokens_to_hold_some_out_are_refused(given_folder, out):
    write_llmc(given_folder / "a_train.bin", [EOT, 1, 2])
    with pytest.raises(
        UserError, match=r"a_train\.bin: 3 tokens are too few .*give a file with val in its name"
    ):
        _prepare(out, given_folder)


def test_val_files_alone_are_refused(given_folder, out):
    write_llmc(given_folder / "a_val.bin", [EOT, 1, 2])
    with pytest.raises(UserError, match=r"no file to train on, by their names: a_val\.bin"):
        _prepare(out, given_folder)


def test_test_files_are_left_out_and_questions_too(given_folder, out):
    _three_llmc(given_folder)
    write_llmc(given_folder / "fineweb_test_000003.bin", [EOT, 1, 2])
    (given_folder / "hellaswag_val.bin").write_bytes(struct.pack("<256i", 20240522, 1, 3, 99, *[0] * 252))
    steps = []
    manifest = _prepare(out, given_folder, report=steps.append)
    assert len(manifest.shards) == 3
    assert "fineweb_test_000003.bin: for tests, left out" in [step.note for step in steps]
    assert "hellaswag_val.bin: multiple-choice questions" in " ".join(_found(given_folder).notes)


def test_as_many_training_shards_are_taken_as_are_asked_for(given_folder, out):
    _three_llmc(given_folder)
    manifest = _prepare(out, given_folder, shards=1)
    assert [entry.file for entry in manifest.of_split("train")] == ["fineweb_train_000001.bin"]
    assert not _is_current(out, given_folder)
    assert len(_prepare(out, given_folder).of_split("train")) == 2
    assert _is_current(out, given_folder)
    _prepare(out, given_folder, shards=1)
    assert not (out / "fineweb_train_000002.bin").exists()
    with pytest.raises(UserError, match="--shards 3: there are 2 to train on"):
        _prepare(out, given_folder, shards=3)


def test_several_files_and_folders_are_one_corpus_and_names_stay_apart(tmp_path, out):
    parts = {}
    for folder, seed in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        parts[folder] = joined(documents(10, seed=seed, eot_first=True))
        write_llmc(tmp_path / folder / "web_train.bin", parts[folder])
    write_llmc(tmp_path / "b" / "val.raw", [EOT, 9])
    manifest = _prepare(out, tmp_path / "a" / "web_train.bin", tmp_path / "b", tmp_path / "b" / "val.raw")
    assert [entry.file for entry in manifest.shards] == ["web_train.bin", "b-web_train.bin", "val.raw.bin"]
    assert _tokens(out, "train") == [*parts["a"].tolist(), *parts["b"].tolist()]


def test_globs_are_followed(given_folder, out):
    _three_llmc(given_folder)
    manifest = _prepare(out, given_folder / "fineweb_*_00000[01].bin")
    assert len(manifest.shards) == 2


def test_inputs_of_several_forms_are_refused(given_folder, tmp_path, out):
    _three_llmc(given_folder)
    write_datatrove(tmp_path / "a.ds", documents(3))
    with pytest.raises(UserError, match=r"files of several forms \(datatrove and llm\.c\)"):
        _prepare(out, given_folder, tmp_path / "a.ds")


@pytest.mark.parametrize(
    ("inputs", "complaint"),
    [
        ((), "needs token files"),
        (("-",), "cannot come on standard input"),
        (("nowhere\n",), r"--input nowhere\\n: there is no such file"),
        (("{folder}",), "no token files that nanorun knows"),
        (("{folder}/pipe",), "pipe: no plain file"),
        (("{folder}/loop",), "loop: cannot be read .*symbolic links"),
    ],
)
def test_inputs_that_are_none_are_refused(given_folder, out, inputs, complaint):
    (given_folder / "notes.txt").write_text("no tokens")
    os.mkfifo(given_folder / "pipe")
    (given_folder / "loop").symlink_to(given_folder / "loop")
    with pytest.raises(UserError, match=complaint):
        _prepare(out, *(one.format(folder=given_folder) for one in inputs))


def test_the_folder_of_the_inputs_is_no_place_for_the_shards(given_folder):
    _three_llmc(given_folder)
    with pytest.raises(UserError, match="is the folder of the inputs themselves"):
        _prepare(given_folder, given_folder)


def test_a_damaged_input_is_refused_by_name_and_nothing_is_left(given_folder, out):
    _three_llmc(given_folder)
    path = given_folder / "fineweb_train_000002.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"fineweb_train_000002\.bin: truncated: .*fetch it or make it again"):
        _prepare(out, given_folder)
    assert _names(out) == []


def test_files_tells_sizes_and_changes_with_the_files(given_folder):
    _three_llmc(given_folder)
    reading = Reading(inputs=(str(given_folder),))
    before = shards.files(reading)
    assert [file.size for file in before] == [path.stat().st_size for path in sorted(given_folder.iterdir())]
    os.utime(given_folder / "fineweb_val_000000.bin", ns=(1, 1))
    assert [a.version == b.version for a, b in zip(before, shards.files(reading))] == [True, True, False]


def test_what_is_prepared_is_current_until_an_input_or_a_shard_changes(given_folder, out):
    write_nanogpt(given_folder, TEXT)
    first = _prepare(out, given_folder)
    assert _is_current(out, given_folder)
    shard = out / "shards_val_000000.bin"
    content = shard.read_bytes()
    shard.write_bytes(flipped(content, 1030, 0))
    assert not _is_current(out, given_folder)
    assert _prepare(out, given_folder) == first
    assert shard.read_bytes() == content
    os.utime(given_folder / "val.bin", ns=(1, 1))
    with pytest.raises(
        UserError, match=r"out: was made from .*val\.bin as it was before a change of its size or date"
    ):
        _is_current(out, given_folder)
    with pytest.raises(UserError, match="was made from"):
        _prepare(out, given_folder)


def test_a_folder_made_from_other_inputs_is_refused(given_folder, tmp_path, out):
    _three_llmc(given_folder)
    _prepare(out, given_folder)
    other = tmp_path / "other"
    other.mkdir()
    write_llmc(other / "a_train.bin", [EOT, 1])
    for inputs in ([other], [other, given_folder], [given_folder / "fineweb_train_000001.bin"]):
        with pytest.raises(UserError, match=r"was made from .* choose another folder with --out"):
            _is_current(out, *inputs)


def test_an_input_that_changed_without_its_date_is_noticed_when_it_is_read_again(given_folder, out):
    _three_llmc(given_folder)
    _prepare(out, given_folder)
    path = given_folder / "fineweb_train_000001.bin"
    state = path.stat()
    (out / path.name).unlink()
    path.write_bytes(flipped(path.read_bytes(), 1100, 0))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(UserError, match="content has changed though its size and date have not"):
        _prepare(out, given_folder)


def test_the_same_inputs_give_the_same_manifest_wherever_they_lie(given_folder, tmp_path, out):
    _three_llmc(given_folder)
    moved = tmp_path / "elsewhere" / "deep"
    shutil.copytree(given_folder, moved)
    second = tmp_path / "second"
    second.mkdir()
    assert _prepare(out, given_folder).sha256 == _prepare(second, moved).sha256


class _Interrupted:
    """A report that ends the work with `error` at the n-th step."""

    def __init__(self, n, error):
        self.left, self.error = n, error

    def __call__(self, step):
        self.left -= 1
        if self.left == 0:
            raise self.error


@pytest.mark.parametrize("form", ["llmc", "nanogpt", "datatrove"])
def test_an_interruption_at_any_step_leaves_whole_shards_and_the_next_run_ends_the_same(
    form, given_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(planning, "SHARD_TOKENS", 400)
    monkeypatch.setattr(foreign, "CHUNK_TOKENS", 150)
    if form == "llmc":
        _three_llmc(given_folder)
    elif form == "nanogpt":
        write_nanogpt(given_folder, TEXT)
    else:
        write_datatrove(given_folder / "a.ds", documents(60))
    whole = tmp_path / "whole"
    whole.mkdir()
    steps = []
    expected = _prepare(whole, given_folder, report=steps.append)
    assert len(steps) > 6
    for n in range(1, len(steps) + 1):
        out = tmp_path / f"out-{n}"
        out.mkdir()
        with pytest.raises((KeyboardInterrupt, Stopped)) as stopped:
            _prepare(out, given_folder, report=_Interrupted(n, KeyboardInterrupt()))
        assert not list(out.glob("*.tmp"))
        finished = {path.name: path.stat().st_mtime_ns for path in out.glob("*.bin")}
        assert (stopped.type is Stopped) == (out / "inputs.json").exists()
        assert _prepare(out, given_folder) == expected
        noted = json.loads((out / "inputs.json").read_text())["done"]
        assert [entry["file"] for entry in noted] == [entry.file for entry in expected.shards]
        for name in list(finished)[:-1]:
            assert (out / name).stat().st_mtime_ns == finished[name]
        for entry in expected.shards:
            assert (out / entry.file).read_bytes() == (whole / entry.file).read_bytes()


KILLED = """
import os, signal, sys
from pathlib import Path
from nanorun.data import foreign
from nanorun.data.foreign import planning
from nanorun.data.sources import Reading, shards
planning.SHARD_TOKENS, foreign.CHUNK_TOKENS = 400, 150
steps = 0
def report(step):
    global steps
    steps += 1
    if steps == 6:
        os.kill(os.getpid(), signal.SIGKILL)
shards.make_ready(Path(sys.argv[2]), Reading(inputs=(sys.argv[1],), report=report), None)
"""


def test_after_a_kill_the_next_run_goes_on_and_removes_what_was_half_written(given_folder, out, monkeypatch):
    write_nanogpt(given_folder, TEXT)
    words = [sys.executable, "-c", KILLED, str(given_folder), str(out)]
    assert subprocess.run(words, check=False, timeout=60).returncode == -signal.SIGKILL
    assert list(out.glob("*.bin.*.tmp"))
    monkeypatch.setattr(planning, "SHARD_TOKENS", 400)
    (first,) = out.glob("*.bin")
    written_at = first.stat().st_mtime_ns
    _prepare(out, given_folder)
    assert first.stat().st_mtime_ns == written_at
    assert not list(out.glob("*.tmp"))


def test_a_full_disk_is_told_and_leaves_nothing_half_written(given_folder, out, monkeypatch):
    write_nanogpt(given_folder, TEXT)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shard_files.os, "fsync", full)
    with pytest.raises(UserError, match=r"shards_train_000000\.bin: the disk is full"):
        _prepare(out, given_folder)
    assert _names(out) == []
    monkeypatch.undo()
    _prepare(out, given_folder)


def test_an_input_that_changes_while_it_is_read_is_refused(given_folder, out):
    _three_llmc(given_folder)
    path = given_folder / "fineweb_train_000001.bin"

    def change(step):
        os.utime(path, ns=(5, 5))

    with pytest.raises(UserError, match=r"fineweb_train_000001\.bin: changed while it was read"):
        _prepare(out, given_folder, report=change)


def test_an_input_that_becomes_shorter_while_it_is_read_is_refused(given_folder, out, monkeypatch):
    monkeypatch.setattr(foreign, "CHUNK_TOKENS", 100)
    write_llmc(given_folder / "a_train.bin", np.full(100_000, EOT))
    write_llmc(given_folder / "a_val.bin", [EOT])

    def change(step):
        os.truncate(given_folder / "a_train.bin", 2000)

    with pytest.raises(UserError, match=r"a_train\.bin: became shorter while it was read"):
        _prepare(out, given_folder, report=change)


def test_a_broken_inputs_file_starts_over(given_folder, out):
    _three_llmc(given_folder)
    first = _prepare(out, given_folder)
    for broken in ("", "[]", '{"version": 1}', '{"version": 1, "request": {"inputs": []}, "done": 7}'):
        (out / "inputs.json").write_text(broken)
        assert not _is_current(out, given_folder)
        assert _prepare(out, given_folder) == first


def test_the_order_of_inputs_is_the_order_of_tokens(tmp_path, out):
    for name, seed in (("z", 1), ("a", 2)):
        (tmp_path / name).mkdir()
        write_datatrove(tmp_path / name / "train.ds", documents(4, seed=seed))
    write_datatrove(tmp_path / "val.ds", documents(2))
    _prepare(out, tmp_path / "z", tmp_path / "a", tmp_path / "val.ds")
    assert _tokens(out, "train") == joined([*documents(4, seed=1), *documents(4, seed=2)]).tolist()


def test_metadata_lines_are_as_people_write_them():
    assert metadata_lines("gpt2", 2, 512).splitlines()[2] == "512 T"
    assert metadata_lines("gpt2", 2, 12_345).splitlines()[2] == "12.3 kT"


def _read_as_llmc(path, *, rank_count=1, batch_tokens=8):
    """The tokens of a shard by the demands of llm.c's loader: each line is one of its checks."""
    content = path.read_bytes()
    header = struct.unpack("<256i", content[:1024])
    assert header[0] == 20240520
    assert header[1] == 1
    assert header[2] > 0
    assert len(content) == 256 * 4 + header[2] * 2
    assert header[2] >= rank_count * batch_tokens + 1
    return np.frombuffer(content, dtype="<u2", offset=1024)


def _read_as_modded_nanogpt(path):
    """The tokens of a shard as modded-nanogpt takes them: as many as the header says, and no fewer are there."""
    header = np.fromfile(path, dtype=np.int32, count=256)
    assert (int(header[0]), int(header[1])) == (20240520, 1)
    tokens = np.empty(int(header[2]), dtype=np.uint16)
    with path.open("rb", buffering=0) as file:
        file.seek(1024)
        assert file.readinto(tokens) == 2 * len(tokens)
    return tokens


def test_what_we_write_loads_as_llmc_and_modded_nanogpt_load(given_folder, out, monkeypatch):
    monkeypatch.setattr(planning, "SHARD_TOKENS", 500)
    train, val = documents(60, seed=1), documents(20, seed=2)
    write_datatrove(given_folder / "train.ds", train)
    write_datatrove(given_folder / "val.ds", val)
    _prepare(out, given_folder)
    for read in (_read_as_llmc, _read_as_modded_nanogpt):
        found = [read(path) for path in sorted(out.glob("*_train_*.bin"))]
        assert len(found) > 2
        assert np.concatenate(found).tolist() == joined(train).tolist()
    # Where sequences are to begin with a document, its end of text is looked for.
    val_tokens = np.concatenate([_read_as_modded_nanogpt(path) for path in sorted(out.glob("*_val_*.bin"))])
    assert len(np.flatnonzero(val_tokens == EOT)) == 20


LOADER = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
    FILE *file = fopen(argv[1], "rb");
    int header[256];
    if (!file || fread(header, sizeof(int), 256, file) != 256) return 10;
    if (header[0] != 20240520) return 11;
    if (header[1] != 1) return 12;
    int64_t n_tokens = header[2];
    if (n_tokens <= 0) return 13;
    fseek(file, 0, SEEK_END);
    if (ftell(file) != (int64_t)sizeof(header) + n_tokens * (int64_t)sizeof(uint16_t)) return 14;
    fseek(file, sizeof(header), SEEK_SET);
    uint16_t *tokens = malloc(n_tokens * sizeof(uint16_t));
    if (fread(tokens, sizeof(uint16_t), n_tokens, file) != (size_t)n_tokens) return 15;
    for (int64_t i = 0; i < n_tokens; i++) printf("%d\n", (int)tokens[i]);
    free(tokens);
    fclose(file);
    return 0;
}
"""


@pytest.mark.skipif(not shutil.which("gcc"), reason="no C compiler here")
def test_what_we_write_loads_in_c(tmp_path):
    tokens = np.array([EOT, 0, 65535, 7], dtype=np.uint16)
    write_shard(tmp_path / "a.bin", tokens)
    (tmp_path / "load.c").write_text(textwrap.dedent(LOADER))
    subprocess.run(["gcc", "-o", tmp_path / "load", tmp_path / "load.c"], check=True, timeout=60)
    words = [tmp_path / "load", tmp_path / "a.bin"]
    read = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)
    assert [int(line) for line in read.stdout.split()] == tokens.tolist()
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-1])
    assert subprocess.run(words, check=False, capture_output=True, timeout=60).returncode == 14
