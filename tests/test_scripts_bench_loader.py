"""The loader's benchmark runs, and its figures are what their names say."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scripts_loader import script

from nanorun.data.shards import open_shard

SCRIPTS = Path(__file__).parent.parent / "scripts"
TINY = ["model.n_layer=1", "model.n_head=2", "model.n_embd=32", "train.batch_tokens=512"]


@pytest.fixture(scope="module")
def bench():
    with script("bench_loader") as module:
        yield module


def test_tracks_and_made_up_shards_are_measured_and_the_file_holds_what_was_printed(
    bench, shakespeare_folder, tmp_path, capsys
):
    out = tmp_path / "loader.json"
    (tmp_path / "scratch").mkdir()
    words = ["--track", "shakespeare-sprint", "--steps", "3", "--data", str(shakespeare_folder)]
    words += [word for setting in TINY for word in ("--set", setting)]
    words += ["--shards", "2", "--shard-tokens", "60000", "--speed", "0", "--out", str(out)]
    bench.main([*words, "--scratch", str(tmp_path / "scratch")])
    document = json.loads(out.read_text())
    assert document == json.loads(capsys.readouterr().out)
    (track,) = document["tracks"]
    assert (track["track"], track["tokens_per_step"]) == ("shakespeare-sprint", 512)
    fineweb = document["fineweb"]["rows"]
    assert [(row["rows_of_rank"], row["cold"]) for row in fineweb] == [
        *((64, False), (64, True), (512, False), (512, True))
    ]
    assert [row["ahead"]["step_ms"] for row in fineweb] == [146.2, 146.2, 8 * 146.2, 8 * 146.2]
    for row in (track, *fineweb):
        for way in (row["ahead"], row["without"]):
            assert way["loader_ms"] > 0
            assert way["waiting_share"] == pytest.approx(way["waiting_ms"] / way["step_ms"])
            assert way["worst_waiting_ms"] >= way["waiting_ms"] > 0
        # Whoever prepares nothing waits for all of it.
        assert row["without"]["waiting_ms"] >= row["without"]["loader_ms"]
    assert list((tmp_path / "scratch").iterdir()) == []


def test_what_is_prepared_ahead_is_work_and_no_waiting(bench, monkeypatch):
    """By a clock for each thread, which stands still but for the reading of rows, 30 ms each time."""
    clock = threading.local()

    def now():
        return getattr(clock, "now", 0.0)

    def read(*, first_row, n_rows):
        clock.now = now() + 0.03
        return np.zeros((n_rows, 4), np.int64), np.zeros((n_rows, 4), np.int64)

    found = {}
    for ahead in (True, False):
        feed = bench.TimedFeed(read, torch.device("cpu"), ahead=ahead)

        def while_the_next_is_prepared(seconds, feed=feed):
            coming = feed._prepared._coming
            assert coming is None or coming[1].result(10)

        monkeypatch.setattr(
            bench, "time", SimpleNamespace(perf_counter=now, sleep=while_the_next_is_prepared)
        )
        readings = bench.Readings()
        for step in range(3):
            readings.measured(feed, lambda step=step, feed=feed: bench.one_step(feed, step, 8, 0.06))
        feed.close()
        found[ahead] = readings.summary(step_ms=60.0)
    assert found[True] == pytest.approx(
        {
            "step_ms": 60.0,
            "waiting_ms": 0.0,
            "waiting_share": 0.0,
            "worst_waiting_ms": 0.0,
            "first_waiting_ms": 30.0,
            "loader_ms": 30.0,
        }
    )
    assert found[False] == pytest.approx(
        {**found[True], "waiting_ms": 30.0, "waiting_share": 0.5, "worst_waiting_ms": 30.0}
    )


def test_made_up_shards_read_the_same_after_their_pages_were_dropped(bench, tmp_path):
    paths = bench.make_shards(tmp_path, 2, 5000)
    mapped = [open_shard(path) for path in paths]
    before = [np.array(tokens) for tokens in mapped]
    bench.drop_pages(mapped, paths)
    for tokens, wanted in zip(mapped, before, strict=True):
        np.testing.assert_array_equal(tokens, wanted)
    assert not np.array_equal(*before)
    assert max(tokens.max() for tokens in before) < bench.VOCAB_SIZE
