"""The benchmark of prepare-data measures what it says; its figures are not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_data.py"


def _run(*words):
    command = [sys.executable, SCRIPT, *map(str, words)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return json.loads(done.stdout)


@pytest.mark.slow
def test_rates_are_of_the_same_tokens(tmp_path):
    found = _run(
        "rates", "--mb", "0.3", "--rounds", "1", "--folder", tmp_path, "--json", tmp_path / "out.json"
    )
    assert json.loads((tmp_path / "out.json").read_text()) == found
    counts = {way: rounds[0]["tokens"] for way, rounds in found["rounds"].items()}
    n_documents = counts["gpt2"] - counts["tiktoken"]  # an end of text before each
    assert 50 < n_documents < 200
    assert counts["byte"] - n_documents == found["text_bytes"]
    assert 0.9 * found["text_bytes"] < counts["char"] <= found["text_bytes"]
    assert found["gpt2_over_tiktoken"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"out.json"}


@pytest.mark.slow
def test_sizes_tell_time_and_memory_of_each(tmp_path):
    found = _run("sizes", "--mb", "0.2", "0.4", "--rounds", "1", "--folder", tmp_path)
    assert [row["mb"] for row in found["rows"]] == [0.2, 0.4]
    assert found["rows"][1]["tokens"] > 1.8 * found["rows"][0]["tokens"]
    assert all(20 < memory < 1000 for memory in found["peak_memory_mib"].values())


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    command = [sys.executable, SCRIPT, "rates", "--folder", tmp_path / "absent"]
    assert "is no folder" in subprocess.run(command, capture_output=True, text=True).stderr
