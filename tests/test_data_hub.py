"""The hub through the real `huggingface_hub`: what is fetched, what is found out, what is not asked twice.

The server is on loopback (tests/hub_server.py); waits are recorded, not waited.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from hub_server import Fault, HubServer, blob_sha1, sha256
from huggingface_hub import HfApi, close_session, constants, errors, hf_hub_download

from nanorun.data import hub, hub_fetch, hub_shards
from nanorun.data.batches import open_tokens, train_rows, validation_rows
from nanorun.data.hub_shards import HubShards
from nanorun.data.shards import Manifest, load_manifest, sha256_of, shard_header
from nanorun.data.sources import Reading, fineweb10B, fineweb100B, finewebedu10B, load_source
from nanorun.data.tokenizers import make_tokenizer
from nanorun.errors import UserError

REPOSITORY = "kjj0/fineweb10B-gpt2"
PIN = "889765ea1f903759787add96995d81171b632d0c"
NEWER = "b" * 40
PINNED = HubShards("fineweb10B", REPOSITORY, "fineweb", pinned=PIN)
UNPINNED = HubShards("fineweb10B", REPOSITORY, "fineweb")
VAL = "fineweb_val_000000.bin"
N_TOKENS = 6000
EOT = 50256


def train(n):
    return f"fineweb_train_{n:06d}.bin"


def shard(seed, *, n_tokens=N_TOKENS, largest=EOT):
    """A shard of GPT-2 tokens: a document every 500."""
    tokens = np.random.default_rng(seed).integers(0, 50256, n_tokens).astype("<u2")
    tokens[::500] = EOT
    tokens[-1] = largest
    return shard_header(n_tokens, tokens.dtype) + tokens.tobytes()


SHARDS = {
    VAL: shard(0),
    **{train(n): shard(n) for n in range(1, 13)},
    "README.md": b"# FineWeb\n",
    ".gitattributes": b"",
}


def point_at(monkeypatch, url, home):
    """Let the library, which reads its environment once, speak to `url` and keep its things under `home`."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
    # Its own telemetry is not what these tests count.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = HubServer()
    server.add(REPOSITORY, SHARDS, commit=PIN)
    point_at(monkeypatch, server.url, tmp_path / "hf")
    close_session()
    yield server
    server.close()
    close_session()


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The seconds that would have been waited."""
    found = []
    monkeypatch.setattr(hub, "pause", lambda seconds, stop: found.append(seconds))
    return found


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def make_ready(out, corpus=PINNED, **options):
    """Prepare two training shards, or as `options` say, and write the manifest, as the command does."""
    manifest = corpus.make_ready(out, Reading(**{"shards": 2, **options}), None)
    manifest.write(out)
    return manifest


def names(out):
    return sorted(path.name for path in out.iterdir())


def bodies(server, name):
    """The Range headers of the requests for a body; None for the whole."""
    etag = sha256(SHARDS[name])
    return [request.headers.get("range") for request in server.asked(etag, origin="cdn")]


# The server itself


def test_the_server_satisfies_the_librarys_own_client(server, tmp_path):
    api = HfApi(endpoint=server.url)
    assert api.dataset_info(REPOSITORY).sha == PIN
    assert api.dataset_info(REPOSITORY, revision="main").sha == PIN
    tree = {
        entry.path: entry for entry in api.list_repo_tree(REPOSITORY, repo_type="dataset", recursive=True)
    }
    assert tree[VAL].lfs.sha256 == sha256(SHARDS[VAL])
    assert tree["README.md"].lfs is None
    assert tree["README.md"].blob_id == blob_sha1(SHARDS["README.md"])
    (info,) = api.get_paths_info(REPOSITORY, [VAL], repo_type="dataset")
    assert info.size == len(SHARDS[VAL])
    for name in (VAL, "README.md"):
        path = hf_hub_download(
            REPOSITORY, name, repo_type="dataset", local_dir=tmp_path / "copy", endpoint=server.url
        )
        assert Path(path).read_bytes() == SHARDS[name]
    with pytest.raises(errors.RevisionNotFoundError):
        api.dataset_info(REPOSITORY, revision="nowhere")
    with pytest.raises(errors.RemoteEntryNotFoundError):
        hf_hub_download(REPOSITORY, "none.bin", repo_type="dataset", endpoint=server.url)
    server.gated.add(REPOSITORY)
    with pytest.raises(errors.GatedRepoError):
        hf_hub_download(REPOSITORY, train(1), repo_type="dataset", revision=PIN, endpoint=server.url)


def test_the_library_itself_takes_a_body_of_the_right_length_with_a_wrong_byte(server, tmp_path):
    server.fault(VAL, flip=4321)
    path = hf_hub_download(REPOSITORY, VAL, repo_type="dataset", local_dir=tmp_path, endpoint=server.url)
    assert sha256_of(Path(path)) != sha256(SHARDS[VAL])


# A clean fetch


def test_a_clean_fetch_leaves_the_shards_and_their_manifest(server, out):
    manifest = make_ready(out, shards=3)
    chosen = [train(1), train(2), train(3), VAL]
    assert names(out) == sorted([*chosen, "manifest.json"])
    for name in chosen:
        assert (out / name).read_bytes() == SHARDS[name]
    assert [entry.file for entry in manifest.shards] == chosen
    assert [entry.split for entry in manifest.shards] == ["train"] * 3 + ["val"]
    assert {entry.tokens for entry in manifest.shards} == {N_TOKENS}
    # A document every 500 tokens, and the last token begins one more.
    assert {entry.documents for entry in manifest.shards} == {13}
    assert manifest.corpus == "fineweb10B"
    assert manifest.revision == PIN
    assert manifest.tokenizer == {"name": "gpt2", "vocab_size": 50257, "eot": 50256}
    lines = "".join(f"{name} {sha256(SHARDS[name])}\n" for name in chosen)
    assert manifest.source_sha256 == sha256(lines.encode())
    assert load_manifest(out) == manifest
    # A place in a compressed body would be no place in the file.
    assert {request.headers["accept-encoding"] for request in server.requests if request.origin == "cdn"} == {
        "identity"
    }


def test_the_bytes_of_text_and_the_documents_are_those_of_the_texts(server, out):
    texts = ["Größe zählt — 大小 counts.\n" * 40, "", "A second one"]
    gpt2 = make_tokenizer("gpt2")
    tokens = np.concatenate([np.append(EOT, gpt2.encode(text)) for text in texts]).astype("<u2")
    content = shard_header(len(tokens), tokens.dtype) + tokens.tobytes()
    server.add(REPOSITORY, {**SHARDS, train(1): content}, commit=NEWER)
    entry = make_ready(out, shards=1, revision=NEWER).shards[0]
    assert (entry.tokens, entry.documents) == (len(tokens), 3)
    assert entry.bytes == sum(len(text.encode()) for text in texts)


def test_only_the_pinned_commit_is_asked_for(server, out):
    server.add(REPOSITORY, {**SHARDS, VAL: shard(99)}, commit=NEWER)
    make_ready(out)
    on_the_hub = [request.path for request in server.requests if request.origin == "hub"]
    assert len(on_the_hub) == 4
    assert all(PIN in path for path in on_the_hub)


def test_the_pages_of_a_listing_are_all_read_from_the_same_hub(server, out):
    server.page_size = 3
    assert len(make_ready(out, shards=12).of_split("train")) == 12
    assert len(server.asked(f"/tree/{PIN}")) == 5


def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(server, out, monkeypatch):
    server.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    make_ready(out)
    assert all(
        request.headers["authorization"] == "Bearer hf_secret"
        for request in server.requests
        if request.origin == "hub"
    )
    assert not any(
        "authorization" in request.headers for request in server.requests if request.origin == "cdn"
    )


def test_nothing_is_asked_but_the_listing_and_the_files(server, out, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    make_ready(out)
    assert not [request for request in server.requests if "harness" in request.path]


def test_several_files_are_fetched_at_once(server, out):
    together = threading.Barrier(4, timeout=20)
    for n in range(1, 5):
        server.fault(train(n), before=together.wait)
    make_ready(out, shards=4)
    assert not together.broken


def test_progress_grows_to_the_whole_size(server, out):
    server.fault(train(1), flip=2000)
    server.fault(train(2), cut_after=5000)
    steps = []
    PINNED.make_ready(out, Reading(shards=3, report=steps.append), None)
    fetched = [step for step in steps if step.stage == "fetch"]
    total = 4 * len(SHARDS[VAL])
    assert {step.total for step in steps} == {total}
    assert fetched[-1].done == total
    assert all(0 <= step.done <= total for step in fetched)
    checked = [step.done for step in steps if step.stage == "check"]
    assert checked == [total * k // 4 for k in range(1, 5)]


def test_a_dry_run_names_files_and_sizes_and_fetches_none(server):
    files = PINNED.files(Reading(shards=2))
    assert [(file.name, file.size) for file in files] == [
        (name, len(SHARDS[VAL])) for name in (train(1), train(2), VAL)
    ]
    assert [file.version for file in files] == [sha256(SHARDS[file.name]) for file in files]
    assert not [request for request in server.requests if request.origin == "cdn"]


def test_nine_training_shards_are_the_default(server):
    assert len(PINNED.files(Reading())) == 10


# Bodies that end early, or are wrong


def test_a_cut_body_goes_on_where_it_stopped(server, out, waits):
    server.fault(train(1), cut_after=7000)
    make_ready(out)
    assert bodies(server, train(1)) == [None, "bytes=7000-"]
    assert bodies(server, train(2)) == [None]
    assert (out / train(1)).read_bytes() == SHARDS[train(1)]
    assert waits == [1.0]


def test_a_body_cut_many_times_arrives_as_long_as_each_brings_something(server, out, waits):
    server.fault(train(1), cut_after=1000, times=10)
    make_ready(out)
    assert bodies(server, train(1)) == [None, *(f"bytes={1000 * k}-" for k in range(1, 11))]
    assert set(waits) == {1.0}


def test_a_reset_connection_is_taken_up_again(server, out):
    server.fault(train(1), cut_after=7000, reset=True)
    make_ready(out)
    assert (out / train(1)).read_bytes() == SHARDS[train(1)]
    assert len(bodies(server, train(1))) == 2


def test_a_truncated_body_with_a_fitting_content_length_is_completed(server, out):
    server.fault(train(1), short=5000)
    make_ready(out)
    assert bodies(server, train(1)) == [None, "bytes=5000-"]
    assert (out / train(1)).read_bytes() == SHARDS[train(1)]


def test_empty_bodies_are_given_up(server, out, waits):
    server.fault(train(1), short=0, times=99)
    with pytest.raises(UserError, match="failed 6 times in a row"):
        make_ready(out)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0]


def test_a_server_that_ignores_the_range_is_read_from_the_start(server, out):
    server.fault(train(1), cut_after=7000)
    server.fault(train(1), ignore_range=True)
    make_ready(out)
    assert bodies(server, train(1)) == [None, "bytes=7000-"]
    assert (out / train(1)).read_bytes() == SHARDS[train(1)]


def test_a_wrong_byte_is_found_by_the_hash_and_fetched_once_more(server, out):
    server.fault(train(1), flip=5555)
    make_ready(out)
    assert bodies(server, train(1)) == [None, None]
    assert (out / train(1)).read_bytes() == SHARDS[train(1)]


def test_a_body_that_is_too_long_is_fetched_once_more(server, out):
    server.fault(train(1), longer=10)
    make_ready(out)
    assert (out / train(1)).read_bytes() == SHARDS[train(1)]


def test_a_body_that_stays_wrong_is_refused_and_not_kept(server, out):
    server.fault(train(1), flip=5555, times=99)
    with pytest.raises(UserError, match=rf"{train(1)} of {REPOSITORY} arrived twice with a hash") as caught:
        make_ready(out)
    assert sha256(SHARDS[train(1)]) in str(caught.value)
    assert bodies(server, train(1)) == [None, None]
    assert not {train(1), f"{train(1)}.partial", "manifest.json"} & set(names(out))


def test_a_damaged_beginning_from_an_earlier_run_is_thrown_away(server, out):
    out.mkdir()
    (out / f"{train(1)}.partial").write_bytes(b"x" * 3000)
    make_ready(out)
    assert bodies(server, train(1)) == ["bytes=3000-", None]
    assert (out / train(1)).read_bytes() == SHARDS[train(1)]


def test_a_damaged_beginning_does_not_count_as_a_damaged_body(server, out):
    out.mkdir()
    (out / f"{train(1)}.partial").write_bytes(b"x" * 3000)
    server.fault(train(1), times=1)
    server.fault(train(1), flip=5555)
    make_ready(out)
    assert bodies(server, train(1)) == ["bytes=3000-", None, None]
    assert (out / train(1)).read_bytes() == SHARDS[train(1)]


def test_a_body_without_end_is_not_kept_reading(server, out, monkeypatch):
    append, sizes = hub_fetch._Partial.append, []

    def record(partial, chunk):
        append(partial, chunk)
        sizes.append(partial.size)

    monkeypatch.setattr(hub_fetch._Partial, "append", record)
    server.fault(train(1), longer=20_000_000)
    make_ready(out)
    assert max(sizes) < 1_000_000
    assert (out / train(1)).read_bytes() == SHARDS[train(1)]


def test_an_interrupted_fetch_stops_in_the_middle_of_a_body(server, out, monkeypatch):
    long = shard(5, n_tokens=3_000_000)
    server.add(REPOSITORY, {**SHARDS, train(1): long}, commit=NEWER)
    held = threading.Event()
    server.fault(train(1), hold=held, hold_after=2000)

    class Pool(hub_fetch.ThreadPoolExecutor):
        def shutdown(self, **options):
            held.set()
            super().shutdown(**options)

    partial = out / f"{train(1)}.partial"

    def interrupt(_):
        if partial.exists() and partial.stat().st_size >= 2000:
            raise KeyboardInterrupt

    monkeypatch.setattr(hub_fetch, "ThreadPoolExecutor", Pool)
    with pytest.raises(KeyboardInterrupt):
        PINNED.make_ready(out, Reading(shards=1, revision=NEWER, report=interrupt), None)
    assert 2000 <= partial.stat().st_size < len(long) // 2


def test_a_beginning_longer_than_the_file_is_thrown_away(server, out):
    out.mkdir()
    (out / f"{train(1)}.partial").write_bytes(SHARDS[train(1)] + b"more")
    make_ready(out)
    assert bodies(server, train(1)) == [None]
    assert (out / train(1)).read_bytes() == SHARDS[train(1)]


def test_an_address_that_is_no_longer_valid_is_asked_for_again(server, out):
    server.fault(train(1), cdn_status=403)
    make_ready(out)
    assert len(server.asked(f"/{PIN}/{train(1)}")) == 2


# Answers that ask for patience, or refuse


def test_retry_after_is_waited_for(server, out, waits):
    server.fault(train(1), status=429, headers={"Retry-After": "37"}, times=2)
    make_ready(out)
    assert waits == [37.0, 37.0]


def test_the_reset_of_the_rate_limit_is_waited_for(server, out, waits):
    server.fault(train(1), status=429, headers={"RateLimit": '"resolvers";r=0;t=55'})
    make_ready(out)
    assert waits == [55.0]


def test_a_wait_beyond_reason_is_refused(server, out, waits):
    server.fault(train(1), status=429, headers={"Retry-After": "86400"})
    with pytest.raises(UserError, match="asks to come back in 86,400 s"):
        make_ready(out)
    assert waits == []


def test_the_listing_is_retried_too(server, out, waits):
    server.api_faults.append(Fault(status=500, times=3))
    steps = []
    make_ready(out, report=steps.append)
    assert waits == [1.0, 2.0, 4.0]
    assert [step.note for step in steps if step.total is None] == [
        f"{REPOSITORY}: HTTP 500; trying again in {wait} s" for wait in (1, 2, 4)
    ]


def test_a_hub_that_keeps_failing_is_named_with_what_is_missing(server, out, waits):
    server.fault(train(2), status=503, times=99)
    with pytest.raises(UserError) as caught:
        make_ready(out)
    said = str(caught.value)
    assert f"{train(2)}: {server.url} failed 6 times in a row (HTTP 503)" in said
    assert f"Missing are {train(2)}" in said
    assert str(out) in said
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0]


def test_a_damaged_file_that_cannot_be_fetched_again_is_named(server, out):
    manifest = make_ready(out)
    (out / train(2)).write_bytes(shard(77))
    assert not PINNED.is_current(out, manifest, Reading(shards=2))
    server.fault(train(2), status=503, times=99)
    with pytest.raises(UserError, match=rf"{train(2)}: .* failed 6 times .*What has arrived is kept"):
        make_ready(out)


def test_what_arrived_before_the_failure_is_not_fetched_again(server, out):
    fault = server.fault(train(2), status=503, times=99)
    with pytest.raises(UserError):
        make_ready(out)
    assert not (out / "manifest.json").exists()
    fault.times = 0
    server.requests.clear()
    whole = {name for name in (train(1), VAL) if (out / name).exists()}
    make_ready(out)
    assert train(1) in whole
    for name in whole:
        assert bodies(server, name) == []


def test_a_server_that_is_down_is_a_plain_statement(server, out, waits):
    server.close()
    with pytest.raises(UserError) as caught:
        make_ready(out, shards=5)
    said = str(caught.value)
    assert caught.value.exit_code == 1, "no mistake of the user's"
    assert "failed 6 times in a row (Connect" in said
    assert f"Missing in {out}: {train(1)}, {train(2)}, {train(3)}, {train(4)}, {train(5)} and 1 more" in said
    assert f"huggingface.co/datasets/{REPOSITORY}/tree/{PIN}" in said
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0]


def test_a_server_that_does_not_answer_in_time_is_a_plain_statement(server, out, monkeypatch):
    monkeypatch.setattr(hub_fetch, "timeout_seconds", lambda: 0.05)
    monkeypatch.setattr(hub, "ATTEMPTS", 2)
    held = threading.Event()
    server.fault(train(1), cut_after=0, hold=held, times=99)
    try:
        with pytest.raises(UserError, match=rf"{train(1)}: .* failed 2 times in a row \(ReadTimeout"):
            make_ready(out)
    finally:
        held.set()


def test_offline_mode_asks_nothing(server, out, monkeypatch, waits):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"HF_HUB_OFFLINE is set.*Missing in .*{train(1)}"):
        make_ready(out)
    assert server.requests == []
    assert waits == []


def test_more_shards_than_there_are_says_how_many_there_are(server, out):
    for wanted in (0, -1, 13):
        with pytest.raises(
            UserError, match=rf"--shards {wanted}: .* has 12 training shards at {PIN}; ask for 1 to 12"
        ):
            make_ready(out, shards=wanted)


def test_a_gap_in_the_numbers_ends_what_there_is(server, out):
    server.add(
        REPOSITORY, {name: content for name, content in SHARDS.items() if name != train(5)}, commit=NEWER
    )
    with pytest.raises(UserError, match="has 4 training shards"):
        make_ready(out, shards=6, revision=NEWER)


def test_a_shard_that_is_listed_but_not_there_is_named(server, out):
    server.fault(train(2), status=404, headers={"X-Error-Code": "EntryNotFound"}, times=99)
    with pytest.raises(UserError, match=f"{REPOSITORY} has no file '{train(2)}' at {PIN}"):
        make_ready(out)


def test_a_repository_without_shards_is_refused(server, out):
    server.add(REPOSITORY, {"README.md": b"moved"}, commit=NEWER)
    with pytest.raises(UserError, match=f"has no {train(1)} or no {VAL} at {NEWER}"):
        make_ready(out, shards=None, revision=NEWER)


def test_a_gated_dataset_says_where_to_accept_its_conditions(server, out, waits):
    server.gated.add(REPOSITORY)
    with pytest.raises(
        UserError, match=f"is gated: accept its conditions at {server.url}/datasets/{REPOSITORY}.*HF_TOKEN"
    ):
        make_ready(out)
    assert waits == []


@pytest.mark.parametrize(
    ("status", "headers", "said"),
    [
        (401, {}, "There is no dataset .* or it is private and the token"),
        (403, {}, "forbids to read .*403.*HF_TOKEN"),
        (403, {"X-Error-Message": "Access to this resource is disabled."}, "was disabled by the hub"),
        (404, {"X-Error-Code": "RepoNotFound"}, "There is no dataset"),
        (418, {}, r"answers HTTP 418 \(as ordered\)"),
    ],
)
def test_what_the_hub_refuses_is_said_at_once(server, out, waits, status, headers, said):
    server.api_faults.append(Fault(status=status, headers=headers, times=99))
    with pytest.raises(UserError, match=said):
        make_ready(out)
    assert waits == []
    assert len(server.requests) == 1


def test_a_revision_that_is_not_there_is_named(server, out):
    with pytest.raises(UserError, match=r"has no revision 'v9'.*leave --revision out"):
        make_ready(out, revision="v9")


def test_a_dataset_that_is_not_there_is_named(server, out):
    with pytest.raises(UserError, match="There is no dataset 'kjj0/none'"):
        make_ready(out, corpus=HubShards("none", "kjj0/none", "fineweb"))


def test_an_answer_that_is_not_the_hubs_is_told_apart(server, out, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", server.cdn_url + "/nothing/here")
    monkeypatch.setattr("hub_server._Handler._answer", lambda self: _login_page(self))
    with pytest.raises(UserError, match=r"answers with something else than the hub does.*<html>"):
        make_ready(out)


def _login_page(handler):
    handler._head(200, {"Content-Length": "6", "Content-Type": "text/html"})
    handler.wfile.write(b"<html>")


def test_an_endpoint_that_is_no_address_is_refused(server, out, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "huggingface.co")
    with pytest.raises(UserError, match=r"HF_ENDPOINT is 'huggingface\.co'; expected an address"):
        make_ready(out)


def test_a_known_hash_that_the_hub_contradicts_is_refused(server, out):
    corpus = dataclasses.replace(PINNED, known={train(1): "0" * 64})
    with pytest.raises(UserError, match=r"is known to have 0{64}"):
        make_ready(out, corpus=corpus)


# Again, and more


def test_a_second_run_asks_nothing(server, out):
    make_ready(out)
    server.requests.clear()
    manifest = load_manifest(out)
    assert PINNED.is_current(out, manifest, Reading(shards=2))
    assert PINNED.is_current(out, manifest, Reading(shards=1))
    assert PINNED.is_current(out, manifest, Reading(shards=2, revision=PIN))
    assert PINNED.is_current(out, manifest, Reading(shards=2, revision=PIN[:10]))
    assert not PINNED.is_current(out, manifest, Reading(shards=3))
    assert not PINNED.is_current(out, manifest, Reading())
    assert not PINNED.is_current(out, manifest, Reading(shards=2, revision=NEWER))
    assert not PINNED.is_current(out, manifest, Reading(shards=2, revision="main"))
    assert not dataclasses.replace(PINNED, NAME="other").is_current(out, manifest, Reading(shards=2))
    assert server.requests == []


def test_more_shards_later_fetch_and_count_only_those(server, out, monkeypatch):
    before = make_ready(out)
    counted = []
    count = hub_shards.shard_entry
    monkeypatch.setattr(
        hub_shards, "shard_entry", lambda path, *rest: counted.append(path.name) or count(path, *rest)
    )
    server.requests.clear()
    after = make_ready(out, shards=4)
    fetched = {request.path.rsplit("/", 1)[1] for request in server.requests if "/resolve/" in request.path}
    assert fetched == {train(3), train(4)}
    assert counted == [train(3), train(4)]
    assert [entry.file for entry in after.shards] == [train(1), train(2), train(3), train(4), VAL]
    assert set(before.shards) < set(after.shards)


def test_fewer_shards_later_keep_those_that_are_there(server, out):
    make_ready(out, shards=4)
    (out / train(4)).write_bytes(b"damaged")
    assert len(make_ready(out, shards=2).of_split("train")) == 4
    assert (out / train(4)).read_bytes() == SHARDS[train(4)]


@pytest.mark.parametrize("place", [0, 8, 1023, 1024, 9000])
def test_a_flipped_byte_on_disk_is_found_and_mended_alone(server, out, place):
    manifest = make_ready(out)
    content = bytearray(SHARDS[train(2)])
    content[place] ^= 0x80
    (out / train(2)).write_bytes(content)
    assert not PINNED.is_current(out, manifest, Reading(shards=2))
    server.requests.clear()
    assert make_ready(out) == manifest
    assert PINNED.is_current(out, manifest, Reading(shards=2))
    fetched = {request.path.rsplit("/", 1)[1] for request in server.requests if "/resolve/" in request.path}
    assert fetched == {train(2)}


def test_a_missing_file_is_found(server, out):
    manifest = make_ready(out)
    (out / VAL).unlink()
    assert not PINNED.is_current(out, manifest, Reading(shards=2))


def test_a_copy_that_lies_there_already_is_not_fetched(server, out):
    out.mkdir()
    for name in (train(1), VAL):
        (out / name).write_bytes(SHARDS[name])
    (out / train(2)).write_bytes(SHARDS[train(3)])
    make_ready(out)
    fetched = [request.path.rsplit("/", 1)[1] for request in server.requests if "/resolve/" in request.path]
    assert fetched == [train(2)]
    assert (out / train(2)).read_bytes() == SHARDS[train(2)]


def test_without_a_network_files_brought_by_hand_are_enough(server, out, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    out.mkdir()
    for name in (train(1), train(2), VAL):
        (out / name).write_bytes(SHARDS[name])
    known = {VAL: sha256(SHARDS[VAL])}
    manifest = make_ready(out, corpus=dataclasses.replace(PINNED, known=known))
    assert manifest.revision is None
    assert [entry.sha256 for entry in manifest.shards] == [
        sha256(SHARDS[name]) for name in (train(1), train(2), VAL)
    ]
    assert PINNED.is_current(out, manifest, Reading(shards=2))
    with pytest.raises(UserError, match="--revision main cannot be looked up"):
        make_ready(out, revision="main")


def test_without_a_network_a_file_with_another_hash_than_the_known_is_refused(server, out, monkeypatch):
    make_ready(out)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (out / train(1)).write_bytes(shard(77))
    with pytest.raises(UserError, match=f"{train(1)}: sha256 .* is damaged or another file"):
        make_ready(out)


def test_a_folder_keeps_to_the_commit_it_was_begun_with(server, out):
    fault = server.fault(train(2), status=503, times=99)
    with pytest.raises(UserError):
        make_ready(out, corpus=UNPINNED)
    fault.times = 0
    server.add(REPOSITORY, {**SHARDS, VAL: shard(99), train(3): shard(98)}, commit=NEWER)
    assert make_ready(out, corpus=UNPINNED).revision == PIN
    assert "revision.partial" not in names(out)
    assert (out / VAL).read_bytes() == SHARDS[VAL]
    manifest = make_ready(out, corpus=UNPINNED, shards=3)
    assert manifest.revision == PIN
    assert (out / train(3)).read_bytes() == SHARDS[train(3)]


def test_another_revision_replaces_what_differs(server, out):
    make_ready(out, corpus=UNPINNED)
    changed = shard(99)
    server.add(REPOSITORY, {**SHARDS, VAL: changed}, commit=NEWER)
    server.requests.clear()
    manifest = make_ready(out, corpus=UNPINNED, revision="main")
    assert manifest.revision == NEWER
    assert (out / VAL).read_bytes() == changed
    fetched = {request.path.rsplit("/", 1)[1] for request in server.requests if "/resolve/" in request.path}
    assert fetched == {VAL}


def test_a_killed_run_goes_on_where_it_was(server, out):
    held = threading.Event()
    server.fault(train(1), cut_after=9000, hold=held)
    script = (
        "import sys; from pathlib import Path\n"
        "from nanorun.data.hub_shards import HubShards\n"
        "from nanorun.data.sources import Reading\n"
        f"corpus = HubShards('fineweb10B', {REPOSITORY!r}, 'fineweb')\n"
        "corpus.make_ready(Path(sys.argv[1]), Reading(shards=1), None)\n"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "NO_PROXY": "127.0.0.1",
        "HF_HOME": str(out.parent / "home"),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    run = subprocess.Popen([sys.executable, "-c", script, str(out)], env=environment)
    partial, whole = out / f"{train(1)}.partial", out / VAL
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size == 9000 and whole.exists()):
        assert run.poll() is None
        assert time.monotonic() < deadline
        held.wait(0.01)
    run.kill()
    run.wait()
    held.set()
    assert partial.stat().st_size == 9000
    server.requests.clear()
    server.add(REPOSITORY, {**SHARDS, train(1): shard(99)}, commit=NEWER)
    manifest = make_ready(out, corpus=UNPINNED, shards=1)
    assert manifest.revision == PIN
    assert bodies(server, train(1)) == ["bytes=9000-"]
    assert bodies(server, VAL) == []
    assert (out / train(1)).read_bytes() == SHARDS[train(1)]
    assert names(out) == sorted([train(1), VAL, "manifest.json"])


# What is fetched but is no shard


def test_a_file_that_is_no_shard_is_refused_by_name(server, out):
    server.add(REPOSITORY, {**SHARDS, train(1): b"\x00" * 5000}, commit=NEWER)
    with pytest.raises(
        UserError, match=rf"{train(1)}: not a token shard.*{NEWER}: choose another --revision"
    ):
        make_ready(out, revision=NEWER)


def test_a_shard_shorter_than_its_header_says_is_refused(server, out):
    server.add(REPOSITORY, {**SHARDS, train(1): SHARDS[train(1)][:-2]}, commit=NEWER)
    with pytest.raises(UserError, match=f"{train(1)}: truncated"):
        make_ready(out, revision=NEWER)


def test_tokens_beyond_the_vocabulary_are_refused_by_place(server, out):
    server.add(REPOSITORY, {**SHARDS, train(1): shard(1, largest=50257)}, commit=NEWER)
    with pytest.raises(UserError, match=f"token 50257 at place {N_TOKENS - 1} is beyond gpt2's vocabulary"):
        make_ready(out, revision=NEWER)


def test_a_shard_that_changes_between_fetching_and_checking_is_refused(server, out):
    def meddle(step):
        path = out / train(1)
        if path.exists():
            path.write_bytes(shard(77))

    with pytest.raises(UserError, match=f"{train(1)}: changed after it was fetched"):
        PINNED.make_ready(out, Reading(shards=1, report=meddle), None)


def test_another_tokenizer_and_inputs_are_refused(server, out):
    with pytest.raises(UserError, match="ready-made with tokenizer gpt2"):
        PINNED.make_ready(out, Reading(), "byte")
    assert PINNED.make_ready(out, Reading(shards=1), "gpt2").n_tokens("train") == N_TOKENS
    with pytest.raises(UserError, match=r"takes no --input .found 'x\.bin'.*prepare-data shards --input"):
        PINNED.make_ready(out, Reading(inputs=("x.bin",)), None)
    with pytest.raises(UserError, match="takes no --input"):
        PINNED.files(Reading(inputs=("x.bin",)))


# Disk


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(server, out, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 20_000))
    with pytest.raises(
        UserError, match=r"3 files of 0.0 GB are to be fetched, and 0.0 GB are free.*--shards"
    ):
        make_ready(out)
    assert not [request for request in server.requests if "/resolve/" in request.path]


def test_a_disk_that_fills_up_keeps_what_arrived(server, out, monkeypatch):
    append = hub_fetch._Partial.append

    def full(partial, chunk):
        if partial.job.target.name == train(1) and partial.size:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(partial, chunk)

    server.fault(train(1), cut_after=5000)
    with monkeypatch.context() as patch:
        patch.setattr(hub_fetch._Partial, "append", full)
        with pytest.raises(UserError, match=f"{train(1)}: the disk is full; what has arrived of it is kept"):
            make_ready(out)
    kept = (out / f"{train(1)}.partial").stat().st_size
    assert 0 < kept <= 5000
    server.requests.clear()
    make_ready(out)
    assert bodies(server, train(1)) == [f"bytes={kept}-"]


def test_a_folder_that_cannot_be_made_is_refused(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        make_ready(tmp_path / "file" / "out")


# Training


def test_reading_prepared_shards_makes_no_connection(server, out, monkeypatch):
    make_ready(out)

    def refuse(*_):
        raise AssertionError("a connection was made")

    server.requests.clear()
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert PINNED.is_current(out, load_manifest(out), Reading(shards=2))
    tokens = open_tokens(out, "train")
    idx_BT, _ = train_rows(tokens, seed=1, first_row=0, n_rows=8, context_len=64)
    assert idx_BT.shape == (8, 64)
    val = open_tokens(out, "val")
    idx_BT, _ = validation_rows(val, n_tokens=None, context_len=64, stride=64, first_window=0, n_windows=4)
    assert idx_BT[0, 0] == EOT
    assert server.requests == []


# The corpora, and the manifest


def test_the_three_corpora_are_the_speedruns():
    for module, repository, prefix in (
        (fineweb10B, "kjj0/fineweb10B-gpt2", "fineweb"),
        (fineweb100B, "kjj0/fineweb100B-gpt2", "fineweb"),
        (finewebedu10B, "kjj0/finewebedu10B-gpt2", "finewebedu"),
    ):
        assert (module.CORPUS.repository, module.CORPUS.prefix) == (repository, prefix)
        assert load_source(module.CORPUS.NAME) is module.CORPUS
        assert module.__name__.endswith(f".{module.CORPUS.NAME}")
    assert fineweb10B.CORPUS.pinned == PIN
    assert {name: len(known) for name, known in fineweb10B.CORPUS.known.items()} == {VAL: 64, train(1): 64}


def test_the_edu_corpus_has_its_own_names(server, out):
    files = {name.replace("fineweb", "finewebedu"): content for name, content in SHARDS.items()}
    server.add("kjj0/finewebedu10B-gpt2", files, commit=NEWER)
    manifest = finewebedu10B.CORPUS.make_ready(out, Reading(shards=1), None)
    assert [entry.file for entry in manifest.shards] == [
        "finewebedu_train_000001.bin",
        "finewebedu_val_000000.bin",
    ]
    assert (manifest.corpus, manifest.revision) == ("finewebedu10B", NEWER)


def test_a_manifest_without_a_revision_is_written_and_hashed_as_before(tmp_path):
    manifest = Manifest("c", "0" * 64, {"name": "byte", "vocab_size": 257, "eot": 256}, ())
    content = {
        "format_version": 1,
        "corpus": "c",
        "source_sha256": "0" * 64,
        "tokenizer": {"name": "byte", "vocab_size": 257, "eot": 256},
        "shards": [],
    }
    plain = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert manifest.sha256 == sha256(plain.encode())
    manifest.write(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text()) == {**content, "sha256": manifest.sha256}
    assert load_manifest(tmp_path) == manifest


def test_a_revision_in_a_manifest_is_part_of_its_hash(tmp_path):
    manifest = Manifest("c", "0" * 64, {"name": "byte", "vocab_size": 1}, (), "a" * 40)
    manifest.write(tmp_path)
    assert load_manifest(tmp_path) == manifest
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace("a" * 40, "a" * 39 + "b"))
    with pytest.raises(UserError, match="it was altered"):
        load_manifest(tmp_path)


def test_the_library_is_recent_enough():
    assert int(huggingface_hub.__version__.split(".")[0]) >= 1
