"""What --check says of a folder: what it holds, and every fault in it."""

from __future__ import annotations

import io
import json
import os
import shutil

import numpy as np
import pytest
from foreign_samples import EOT, documents, flipped, joined, write_datatrove, write_llmc, write_nanogpt
from rich.console import Console

from nanorun.data.check import check_and_show, check_folder
from nanorun.data.shards import Manifest, ShardEntry, sha256_of, write_shard
from nanorun.data.sources import Reading, shards
from nanorun.errors import UserError

TEXT = "All the world's a stage,\nAnd all the men and women merely players.\n" * 20


@pytest.fixture
def ours(tmp_path):
    """A corpus of bytes in three shards, with its manifest."""
    folder = tmp_path / "ours"
    folder.mkdir()
    parts = {"train": [[256, 72, 105], [256, 256, 10]], "val": [[256, 79]]}
    entries = []
    for split, shards_of_split in parts.items():
        for number, tokens in enumerate(shards_of_split):
            path = folder / f"text_{split}_{number:06d}.bin"
            write_shard(path, np.array(tokens, dtype=np.uint16))
            n_documents = tokens.count(256)
            entries.append(
                ShardEntry(
                    path.name, split, len(tokens), len(tokens) - n_documents, n_documents, sha256_of(path)
                )
            )
    tokenizer = {"name": "byte", "vocab_size": 257, "eot": 256}
    Manifest("text", "0" * 64, tokenizer, tuple(entries)).write(folder)
    return folder


@pytest.fixture
def llmc(tmp_path):
    folder = tmp_path / "llmc"
    folder.mkdir()
    for name, seed in (("web_val_000000.bin", 0), ("web_train_000001.bin", 1)):
        write_llmc(folder / name, [*joined(documents(12, seed=seed, eot_first=True)), 5])
    return folder


@pytest.fixture
def nanogpt(tmp_path):
    write_nanogpt(tmp_path / "nanogpt", TEXT)
    return tmp_path / "nanogpt"


@pytest.fixture
def datatrove(tmp_path):
    folder = tmp_path / "datatrove"
    folder.mkdir()
    write_datatrove(folder / "000_web.ds", documents(25), loss=True)
    return folder


def _rewrite_manifest(folder, change):
    """Write a manifest anew with its hash right, after `change` has been at its content."""
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    entries = tuple(ShardEntry(**entry) for entry in content["shards"])
    Manifest(content["corpus"], content["source_sha256"], content["tokenizer"], entries).write(folder)


def _shown(folder):
    """The printed text and the JSON document."""
    stream = io.StringIO()
    document = check_and_show(folder, Console(file=stream, width=200))
    assert json.loads(json.dumps(document)) == document
    return stream.getvalue(), document


def _flip(path, place, bit=0):
    path.write_bytes(flipped(path.read_bytes(), place, bit))


def test_our_own_corpus_is_sound_and_counted(ours):
    text, document = _shown(ours)
    assert (document["holds"], document["sound"], document["exit_code"]) == ("nanorun", True, 0)
    assert document["faults"] == document["notes"] == []
    assert document["tokens"] == {"train": 6, "val": 2}
    assert document["bytes"] == {"train": 3, "val": 1}
    assert document["documents"] == {"train": 3, "val": 1}
    assert [file["sha256"] for file in document["files"]] == ["right"] * 3
    assert {file["dtype"] for file in document["files"]} == {"uint16"}
    assert "prepared by nanorun, corpus text: sound" in text
    assert "tokenizer: byte, 257 entries" in text


def test_llmc_shards_are_sound_and_their_tokenizer_is_guessed(llmc):
    text, document = _shown(llmc)
    assert (document["holds"], document["exit_code"]) == ("llm.c", 0)
    assert document["tokenizer"] == "gpt2, by the ids: the largest is 50256"
    assert document["documents"] == {"train": 12, "val": 12}
    assert "shards of llm.c and modded-nanogpt: sound" in text
    assert "note: files of this form keep no hash of their tokens: a changed byte" in text


def test_wide_llmc_shards_are_told_apart(tmp_path):
    write_llmc(tmp_path / "a_train.bin", [5, 100_000], wide=True)
    text, document = _shown(tmp_path)
    assert "shards of llm.c in uint32: sound" in text
    assert document["tokenizer"] == "unknown; the largest id is 100,000"
    assert document["files"][0]["dtype"] == "uint32"


def test_nanogpts_files_are_sound_and_their_text_is_counted(nanogpt):
    text, document = _shown(nanogpt)
    assert (document["holds"], document["exit_code"]) == ("nanoGPT", 0)
    assert document["tokenizer"] == f"char, {len(set(TEXT))} entries by meta.pkl"
    assert document["bytes"]["train"] + document["bytes"]["val"] == len(TEXT)
    assert document["documents"] == {"train": None, "val": None}
    assert "have neither a header nor a hash" in text


def test_datatroves_files_are_sound_and_their_documents_counted(datatrove):
    text, document = _shown(datatrove)
    assert (document["holds"], document["exit_code"]) == ("datatrove", 0)
    assert document["tokenizer"] == "gpt2 by the metadata"
    assert document["files"][0]["documents"] == 25
    assert "tokenized files of datatrove: sound" in text


def test_what_was_made_from_others_shards_is_ours_and_sound(datatrove, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    shards.make_ready(out, Reading(inputs=(str(datatrove),)), None).write(out)
    text, document = _shown(out)
    assert (document["holds"], document["corpus"], document["exit_code"]) == ("nanorun", "shards", 0)
    assert "note: no val in any name: the last" in text


@pytest.mark.parametrize("content", [{}, {"notes.txt": b"x", "model.bin": b"PK\3\4" + bytes(2000)}])
def test_a_folder_of_nothing_known_exits_with_2(tmp_path, content):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    text, document = _shown(folder)
    assert (document["holds"], document["exit_code"], document["sound"]) == ("unknown", 2, False)
    assert "expected a manifest.json, shards of llm.c" in text


@pytest.mark.parametrize(("name", "found"), [("nowhere\x1b", r"nowhere\\x1b: not there"), ("file", "a file")])
def test_what_is_no_folder_is_refused(tmp_path, name, found):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{found}; expected a folder"):
        check_folder(tmp_path / name)


def test_every_flipped_bit_in_a_shard_of_ours_is_found(ours):
    path = ours / "text_train_000001.bin"
    content = path.read_bytes()
    for place in [*range(16), 500, 1023, *range(1024, len(content))]:
        for bit in (0, 5, 7):
            path.write_bytes(flipped(content, place, bit))
            checked = check_folder(ours)
            assert checked.exit_code == 1
            assert any("text_train_000001.bin" in fault for fault in checked.faults)
            assert [file.sha256 for file in checked.files] == ["right", "wrong", "right"]


def test_every_flipped_bit_in_our_manifest_is_found(ours):
    path = ours / "manifest.json"
    content = path.read_bytes()
    for place in range(len(content)):
        changed = flipped(content, place, place % 8)
        path.write_bytes(changed)
        checked = check_folder(ours)
        # White space between values, and a letter's case in an escape, say the same.
        if checked.exit_code == 0:
            assert json.loads(changed) == json.loads(content)
            assert content[place : place + 1].isspace()
        else:
            assert any("manifest.json" in fault for fault in checked.faults)


def test_all_faults_of_ours_are_listed_and_not_only_the_first(ours):
    _flip(ours / "text_train_000000.bin", 1024)
    (ours / "text_train_000001.bin").unlink()
    path = ours / "text_val_000000.bin"
    path.write_bytes(path.read_bytes()[:-1])
    (ours / "text_train_000002.bin").write_bytes(b"left over")
    (ours / "text_train_000003.bin.partial").write_bytes(b"left over")
    (ours / "README.md").write_text("mine")
    manifest = (ours / "manifest.json").read_text().replace('"corpus": "text"', '"corpus": "more"')
    (ours / "manifest.json").write_text(manifest)
    text, document = _shown(ours)
    assert document["exit_code"] == 1
    for name, said in [
        ("manifest.json", "it was altered"),
        ("text_train_000000.bin", "damaged or altered"),
        ("text_train_000001.bin", "the manifest names it and it is not there"),
        ("text_val_000000.bin", "truncated"),
        ("text_train_000002.bin", "nothing reads it; delete it"),
        ("text_train_000003.bin.partial", "nothing reads it; delete it"),
    ]:
        (fault,) = [fault for fault in document["faults"] if f"{name}: " in fault and said in fault]
        assert f"fault: {fault}" in text
    assert [file["sha256"] for file in document["files"]] == ["wrong", "not there", "wrong"]
    assert document["notes"] == ["README.md is no part of the corpus"]


@pytest.mark.parametrize(
    ("key", "complaint"),
    [
        ("tokens", "3 tokens, its manifest says 4"),
        ("documents", "1 documents, its manifest says 2"),
        ("bytes", "2 bytes of text, its manifest says 3"),
    ],
)
def test_counts_that_do_not_fit_are_found_though_every_hash_is_right(ours, key, complaint):
    def change(content):
        content["shards"][0][key] += 1

    _rewrite_manifest(ours, change)
    checked = check_folder(ours)
    assert [complaint in fault for fault in checked.faults] == [True]


def test_ids_beyond_our_vocabulary_are_found_though_every_hash_is_right(ours):
    write_shard(ours / "text_val_000000.bin", np.array([256, 300], dtype=np.uint16))

    def change(content):
        content["shards"][2].update(sha256=sha256_of(ours / "text_val_000000.bin"), bytes=0)

    _rewrite_manifest(ours, change)
    (fault,) = check_folder(ours).faults
    assert (
        "text_val_000000.bin: token 300 at place 1 is beyond the vocabulary, whose ids are below 257" in fault
    )


def test_a_manifest_without_a_split_is_a_fault(ours):
    _rewrite_manifest(ours, lambda content: content["shards"].pop())
    faults = " ".join(check_folder(ours).faults)
    assert "names no val shards" in faults
    assert "text_val_000000.bin: the manifest does not name it" in faults


def test_a_manifest_of_a_newer_version_cannot_be_judged(ours):
    content = json.loads((ours / "manifest.json").read_text())
    (ours / "manifest.json").write_text(json.dumps({**content, "format_version": 99}))
    text, document = _shown(ours)
    assert document["exit_code"] == 2
    assert "format version 99" in text


@pytest.mark.parametrize("broken", ["", "[]", "{}", "{"])
def test_a_manifest_of_which_nothing_can_be_read_is_the_only_fault(ours, broken):
    (ours / "manifest.json").write_text(broken)
    checked = check_folder(ours)
    assert checked.exit_code == 1
    assert len(checked.faults) == 1
    assert "manifest.json" in checked.faults[0]


@pytest.mark.parametrize("broken", ['{"shards": 7}', '{"format_version": 1, "shards": [7, {}]}'])
def test_a_manifest_that_says_nothing_is_a_fault_and_the_shards_are_told(ours, broken):
    (ours / "manifest.json").write_text(broken)
    checked = check_folder(ours)
    assert checked.exit_code == 1
    assert len([fault for fault in checked.faults if "the manifest does not name it" in fault]) == 3


def test_the_hash_of_tokenizer_json_is_compared(ours):
    (ours / "tokenizer.json").write_text("{}")

    def change(content):
        content["tokenizer"]["sha256"] = sha256_of(ours / "tokenizer.json")

    _rewrite_manifest(ours, change)
    assert check_folder(ours).faults == []
    (ours / "tokenizer.json").write_text("{} ")
    assert "tokenizer.json: sha256" in check_folder(ours).faults[0]
    (ours / "tokenizer.json").unlink()
    assert "tokenizer.json: cannot be read" in check_folder(ours).faults[0]


def test_an_unfinished_preparation_is_told_by_its_journal(ours):
    entries = json.loads((ours / "manifest.json").read_text())["shards"]
    lines = [
        {"version": 1, "request": {"corpus": "text", "tokenizer": "byte"}, "rule": {}, "tokenizer": None},
        {"shard": entries[0]},
        {"shard": entries[1]},
    ]
    (ours / "manifest.json").unlink()
    (ours / "text_val_000000.bin").rename(ours / "text_val_000000.bin.partial")
    (ours / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"docu')
    text, document = _shown(ours)
    assert (document["holds"], document["corpus"], document["exit_code"]) == ("unfinished", "text", 1)
    assert "2 shards are finished and 1 files begun" in text
    assert "run the same prepare-data again and it goes on" in text
    assert [file["sha256"] for file in document["files"]] == ["right", "right"]
    _flip(ours / "text_train_000000.bin", 1024)
    assert "its journal says" in check_folder(ours).faults[1]


@pytest.mark.parametrize("name", ["text_train_000000.bin.partial", "inputs.json", "x.bin.17.tmp"])
def test_what_a_killed_preparation_leaves_is_unfinished(tmp_path, name):
    (tmp_path / name).write_text("")
    assert check_folder(tmp_path).holds == "unfinished"


def test_every_flipped_bit_in_a_header_of_llmc_is_found(llmc):
    path = llmc / "web_train_000001.bin"
    content = path.read_bytes()
    for place in [*range(12), 12, 500, 1023]:
        for bit in range(8):
            path.write_bytes(flipped(content, place, bit))
            checked = check_folder(llmc)
            assert checked.exit_code == 1
            assert any("web_train_000001.bin: " in fault for fault in checked.faults)


def test_a_flipped_bit_in_a_header_is_found_where_it_is_the_only_file(tmp_path):
    path = write_llmc(tmp_path / "train.bin", joined(documents(5)))
    content = path.read_bytes()
    for place in range(12):
        for bit in range(8):
            path.write_bytes(flipped(content, place, bit))
            checked = check_folder(tmp_path)
            assert (checked.holds, checked.exit_code) == ("llm.c", 1)


def test_a_flipped_token_of_others_is_found_only_where_it_is_no_id(nanogpt):
    _flip(nanogpt / "val.bin", 3, 4)
    (fault,) = check_folder(nanogpt).faults
    assert "val.bin: token 4,1" in fault
    assert "is beyond the vocabulary" in fault
    _flip(nanogpt / "val.bin", 3, 4)
    _flip(nanogpt / "val.bin", 2, 0)
    checked = check_folder(nanogpt)
    assert checked.faults == []
    assert "a changed byte that gives another id of the vocabulary" in checked.notes[-1]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda c: c[:-1], "truncated"),
        (lambda c: c + b"\0\0", "too long"),
        (lambda c: c[:100], "100 bytes, too few for a header"),
        (lambda c: c[:1024], "truncated"),
        (lambda c: bytes(1500), "begins with 0, where 20240520"),
        (lambda c: b"", "begins with 0, where 20240520"),
    ],
)
def test_a_shard_of_llmc_that_is_not_whole_is_named(llmc, change, complaint):
    path = llmc / "web_train_000001.bin"
    path.write_bytes(change(path.read_bytes()))
    faults = check_folder(llmc).faults
    assert any(fault.startswith(f"{path}: ") and complaint in fault for fault in faults)


@pytest.mark.parametrize(("n", "complaint"), [(1, "no whole number of tokens of 2"), (10**9, "empty")])
def test_nanogpts_files_of_a_wrong_length_are_named(nanogpt, n, complaint):
    path = nanogpt / "val.bin"
    path.write_bytes(path.read_bytes()[:-n] if n == 1 else b"")
    (fault,) = check_folder(nanogpt).faults
    assert fault.startswith(f"{path}: ")
    assert complaint in fault


def test_every_flipped_bit_in_a_table_of_characters_is_found_or_stays_a_table(nanogpt):
    path = nanogpt / "meta.pkl"
    content = path.read_bytes()
    found = 0
    for place in range(len(content)):
        path.write_bytes(flipped(content, place, place % 7))
        checked = check_folder(nanogpt)
        if checked.faults:
            found += 1
            assert any("meta.pkl: " in fault or "beyond the vocabulary" in fault for fault in checked.faults)
        else:
            assert f"{len(set(TEXT))} entries by meta.pkl" in checked.tokenizer
    assert found > 0.8 * len(content)


def test_every_flipped_bit_in_an_index_is_found(datatrove):
    path = datatrove / "000_web.ds.index"
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(flipped(content, place, place % 8))
        checked = check_folder(datatrove)
        assert any("000_web.ds.index: " in fault for fault in checked.faults), place


def test_every_flipped_bit_in_metadata_is_found_but_in_the_tokenizers_name(datatrove):
    path = datatrove / "000_web.ds.metadata"
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in range(8):
            path.write_bytes(flipped(content, place, bit))
            checked = check_folder(datatrove)
            assert checked.exit_code == 1 or (place < 5 and checked.tokenizer != "gpt2 by the metadata")


def test_a_flipped_name_of_a_tokenizer_is_found_where_another_file_has_it_right(datatrove):
    write_datatrove(datatrove / "001_web.ds", documents(5), loss=True)
    assert check_folder(datatrove).faults == []
    _flip(datatrove / "000_web.ds.metadata", 3)
    (fault,) = check_folder(datatrove).faults
    assert "the metadata name several tokenizers ('gpt2', 'gpt3')" in fault


def test_everything_beside_a_file_of_datatrove_is_compared_with_it(datatrove):
    (datatrove / "000_web.ds.loss").write_bytes(b"\1")
    path = datatrove / "000_web.ds"
    path.write_bytes(path.read_bytes() + b"\1\0\3")
    faults = " ".join(check_folder(datatrove).faults)
    for said in (
        "000_web.ds: ",
        "no whole number of tokens of 2",
        "000_web.ds.index: its last document ends at token",
        "000_web.ds.metadata: says",
        "000_web.ds.loss: 1 bytes",
    ):
        assert said in faults


def test_stray_and_missing_files_of_datatrove_are_named(datatrove):
    write_datatrove(datatrove / "001_web.ds", documents(3), index=False)
    shutil.copy(datatrove / "000_web.ds.index", datatrove / "002_web.ds.index")
    (datatrove / "web.ds.metadata").write_text("gpt2|2\n7\n7.00 T")
    faults = " ".join(check_folder(datatrove).faults)
    assert "001_web.ds: has no index beside it" in faults
    assert "002_web.ds.index: belongs to 002_web.ds, which is not there" in faults
    assert "web.ds.metadata: says 7 tokens, but its 2 files have" in faults


def test_the_sum_that_a_merge_leaves_is_sound(datatrove):
    size = (datatrove / "000_web.ds").stat().st_size // 2
    lines = (datatrove / "000_web.ds.metadata").read_text()
    (datatrove / "web.ds.metadata").write_text(lines)
    assert str(size) in lines
    assert check_folder(datatrove).faults == []


def test_files_of_another_form_beside_them_are_told(llmc):
    write_nanogpt(llmc, TEXT)
    checked = check_folder(llmc)
    assert any("files of nanoGPT as well" in note for note in checked.notes)


def test_names_are_shown_escaped_and_markup_is_not_followed(tmp_path):
    folder = tmp_path / "bad\n[red]\x1b[31mname"
    folder.mkdir()
    write_llmc(folder / "a_train\n[bold]\x1b]0;.bin", [EOT, 1])
    (folder / "b_val\x07.bin").write_bytes(b"broken")
    text, document = _shown(folder)
    assert not set(text) & {"\x1b", "\x07"}
    assert r"bad\n[red]\x1b[31mname: shards of llm.c" in text
    assert r"a_train\n[bold]\x1b]0;.bin" in text
    assert r"b_val\x07.bin: begins with" in text
    assert document["files"][0]["name"] == "a_train\n[bold]\x1b]0;.bin"


def test_links_that_lead_nowhere_and_pipes_are_no_trap(llmc):
    (llmc / "loop_train.bin").symlink_to(llmc / "loop_train.bin")
    os.mkfifo(llmc / "pipe_train.bin")
    (llmc / "folder.bin").mkdir()
    (fault,) = check_folder(llmc).faults
    assert "loop_train.bin: cannot be read" in fault


def test_a_shard_of_ours_that_is_a_pipe_is_not_waited_for(ours):
    (ours / "text_val_000000.bin").unlink()
    os.mkfifo(ours / "text_val_000000.bin")
    (fault,) = check_folder(ours).faults
    assert "text_val_000000.bin: the manifest names it and it is not there" in fault


def test_a_check_changes_nothing(ours, llmc, nanogpt, datatrove):
    for folder in (ours, llmc, nanogpt, datatrove):
        before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
        check_folder(folder)
        assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()} == before


def test_progress_ends_at_the_size_of_what_was_read(ours, datatrove):
    for folder in (ours, datatrove):
        steps = []
        check_folder(folder, steps.append)
        assert steps[-1].total >= steps[-1].done > 0
        assert steps[-1].stage == "check"


def test_a_folder_of_text_without_its_manifest_is_called_by_its_corpus(ours):
    (ours / "manifest.json").unlink()
    (ours / "inputs.json").write_text(json.dumps({"corpus": "text", "files": []}))
    assert check_folder(ours).corpus == "text"


def test_names_go_whole_into_a_pipe(ours):
    content = json.loads((ours / "manifest.json").read_bytes())
    long = "n" * 120 + ".bin"
    content["shards"][0]["file"] = long
    (ours / "manifest.json").write_text(json.dumps(content))
    text = io.StringIO()
    check_and_show(ours, Console(file=text, width=80))
    assert sum(long in line for line in text.getvalue().splitlines() if not line.startswith("fault")) == 1
