from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from log_samples import a_log

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_records.py"


def test_the_benchmark_measures_the_folder_it_is_given(tmp_path):
    (tmp_path / "a.txt").write_text(a_log())
    (tmp_path / "b.txt").write_text("no log\n")
    out = tmp_path / "out.json"
    command = [sys.executable, SCRIPT, tmp_path, "--repeats", "1", "--json", out]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert (result["files"], result["repeats"][0]["runs"], result["repeats"][0]["skipped"]) == (2, 1, 1)
    assert result["seconds"] > 0
    assert 5 < result["peak_memory_mib"] < 500
    assert json.loads(out.read_text()) == result


def test_the_benchmark_refuses_what_is_no_folder(tmp_path):
    command = [sys.executable, SCRIPT, tmp_path / "absent"]
    assert "is no folder" in subprocess.run(command, capture_output=True, text=True).stderr
