"""Manifests of corpora that lie: each is refused in a sentence, and nothing outside the folder is read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import pytest

from nanorun.data.batches import open_tokens
from nanorun.data.shards import load_manifest
from nanorun.data.tokenizers import tokenizer_from_manifest
from nanorun.errors import UserError


@pytest.fixture
def folder(shakespeare_folder, tmp_path):
    return shutil.copytree(shakespeare_folder, tmp_path / "corpus")


def rewritten(folder, change):
    """Change a manifest and give it the hash that fits, as whoever made it could."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    del content["sha256"]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    path.write_text(json.dumps({**content, "sha256": hashlib.sha256(canonical.encode()).hexdigest()}))


def of_shard(**changes):
    return lambda content: content["shards"][0].update(changes)


def of_tokenizer(**changes):
    return lambda content: content["tokenizer"].update(changes)


LIES = {
    "a path above": of_shard(file="../../etc/passwd"),
    "an absolute path": of_shard(file="/etc/passwd"),
    "the folder above": of_shard(file=".."),
    "the folder": of_shard(file=""),
    "a zero in a name": of_shard(file="a\0b"),
    "a name that is none": of_shard(file=5),
    "tokens in words": of_shard(tokens="many"),
    "tokens below zero": of_shard(tokens=-1),
    "more tokens than a number holds": of_shard(tokens=2**70),
    "tokens that are no number": of_shard(tokens=float("nan")),
    "bytes that are a list": of_shard(bytes=[]),
    "a hash that is none": of_shard(sha256=None),
    "one key more": of_shard(hook="x"),
    "a vocabulary in words": of_tokenizer(vocab_size="65"),
    "a vocabulary without end": of_tokenizer(vocab_size=float("inf")),
    "a tokenizer without a name": lambda content: content["tokenizer"].pop("name"),
    "a tokenizer that is none": lambda content: content.update(tokenizer=[1]),
    "shards that are none": lambda content: content.update(shards=7),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies_is_refused_by_name(folder, lie):
    rewritten(folder, LIES[lie])
    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        load_manifest(folder)


def test_a_manifest_that_was_only_written_anew_is_taken(folder):
    rewritten(folder, lambda content: None)
    assert open_tokens(folder, "val").n_tokens > 0


@pytest.mark.parametrize("content", ["[" * 100_000, "\x00", "[]", "3", '{"format_version": 1}'])
def test_a_manifest_of_anything_else_is_refused_by_name(folder, content):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        load_manifest(folder)


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(folder):
    shard = next(folder.glob("*_val_*.bin"))
    for path in (shard, folder / "manifest.json"):
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(UserError, match="no regular file"):
            open_tokens(folder, "val")


def test_a_shard_that_is_a_link_is_read_only_where_its_content_is_the_manifests(folder, tmp_path):
    shard = next(folder.glob("*_val_*.bin"))
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    assert open_tokens(folder, "val").n_tokens > 0
    shard.unlink()
    shard.symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="not a token shard"):
        open_tokens(folder, "val")


@pytest.mark.parametrize(
    "name", ["/dev/zero", "../x.json", "a/b", "tokenizer.json", "json-12345678", "bpe9", "\x1b[2J"]
)
def test_a_tokenizer_that_a_manifest_names_is_never_a_path(folder, name, monkeypatch):
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.chdir(folder)
    with pytest.raises(UserError):
        tokenizer_from_manifest({"name": name, "vocab_size": 3})


def test_a_tokenizer_beside_the_manifest_that_is_a_pipe_is_not_waited_for(folder):
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(UserError, match="a folder, a pipe or a device"):
        tokenizer_from_manifest({"name": "json-12345678", "file": "tokenizer.json"}, folder)
