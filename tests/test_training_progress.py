"""What a run leaves behind as it goes: metrics.jsonl, the wandb folder, lines on a plain console."""

import io
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console

from nanorun.errors import UserError
from nanorun.training import progress
from nanorun.training.progress import MetricsFile, RunProgress


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_can_be_read_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, after_step=0)
    file.write({"step": 1, "loss": 4.0})
    assert rows(path) == [{"step": 1, "loss": 4.0}]
    file.close()


def test_resuming_drops_what_lies_ahead_and_a_line_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 4}\n{"step": 2, "loss": 3}\n{"step": 2, "val_loss": 3}\n{"step": 3, "lo'
    )
    file = MetricsFile(path, after_step=2)
    file.write({"step": 3, "loss": 2})
    file.close()
    assert [(row["step"], *row.keys()) for row in rows(path)] == [
        (1, "step", "loss"),
        (2, "step", "loss"),
        (2, "step", "val_loss"),
        (3, "step", "loss"),
    ]
    file = MetricsFile(path, after_step=1)
    file.close()
    assert [row["step"] for row in rows(path)] == [1]
    assert [one.name for one in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_plain_console_gets_validations_at_once_and_steps_every_ten_seconds(monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[0])
    out = io.StringIO()
    console = Console(file=out, width=200)
    with RunProgress(console, steps=100, first_step=0, batch_tokens=1000, target=2.0) as shown:
        shown.train(10, 3.0, 5.0)
        assert out.getvalue() == ""
        seconds[0] = 11.0
        shown.train(20, 2.9, 10.0)
        shown.validation(20, 2.5, 10.0)
        shown.validation(30, 1.75, 15.0, "about 2.5247 bits a byte")
        seconds[0] = 22.0
        shown.train(30, 1.9, 15.0)
    assert out.getvalue().splitlines() == [
        "step 20/100  loss 2.900  2.0k tok/s  10.0 s  ends in 0:40  +0.900 to target (train)",
        "step 20/100  val loss 2.5000 nats, 0.5000 above the target  10.0 s counted",
        "step 30/100  val loss 1.7500 nats (about 2.5247 bits a byte), 0.2500 below the target  15.0 s counted",
        "step 30/100  loss 1.900  2.0k tok/s  15.0 s  ends in 0:35  -0.250 to target",
    ]


def test_a_resumed_run_is_timed_from_where_it_went_on(monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[0])
    out = io.StringIO()
    with RunProgress(
        Console(file=out, width=200), steps=100, first_step=50, batch_tokens=1000, target=2.0
    ) as shown:
        shown.train(51, 3.0, 500.0)
        seconds[0] = 11.0
        shown.train(61, 3.0, 505.5)
    # Ten steps in 5.5 s, of which the first row's step began the count: two steps a second.
    assert "ends in 0:20" in out.getvalue()


def wandb_records(path):
    """Yield the records of a .wandb file: LevelDB's log format, 32 KiB blocks behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, place, whole = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a record in one piece, or the last piece of one
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def test_wandb_offline_writes_a_run_folder_with_every_loss(tmp_path, shakespeare_folder, tiny_settings):
    words = [
        sys.executable,
        "-m",
        "nanorun",
        "train",
        "--track",
        "shakespeare-sprint",
        "--json",
        "--no-record",
    ]
    words += ["--wandb", "offline", "--data", str(shakespeare_folder)]
    words += [word for setting in tiny_settings for word in ("--set", setting)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    folder = tmp_path / result["run"]
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    logged = {}
    for record in wandb_records(file):
        for item in record.history.item:
            logged.setdefault(item.key or ".".join(item.nested_key), []).append(json.loads(item.value_json))
    assert logged["val_loss"] == [result["final_val_loss"]]
    assert logged["loss"] == [row["loss"] for row in rows(folder / "metrics.jsonl") if "loss" in row]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_full_disk_is_told_once_with_the_command_that_goes_on(tmp_path):
    file = progress.MetricsFile(tmp_path / "metrics.jsonl", after_step=0)
    file._file.close()
    file._file = open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(UserError, match=r"No space left on device.*nanorun train --resume"):
        file.write({"step": 1})
    file.close()


def test_lines_of_metrics_that_are_none_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n' + b"[" * 100_000 + b'\n{"step": 2}\n{"step": 3}\n{"st')
    progress.MetricsFile(path, after_step=2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
