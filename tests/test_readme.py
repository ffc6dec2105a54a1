"""Every command of the README runs here, or in CI, which runs the make targets."""

import lzma
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LOGS = ROOT / "tests/logs"
TIMES = ROOT / "tests/algoperf/algoperf_v05_external_times.csv"
SHORT = ["--set", "train.steps=2", "--set", "train.warmup_steps=0", "--set", "model.dropout=0.0"]
"""Laid over the train commands: the same paths, seconds instead of minutes."""


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def test_the_make_targets_of_the_readme_are_what_ci_runs():
    targets = [line for line in commands() if line.startswith("make ")]
    ci = (ROOT / ".ci/run").read_text()
    assert targets == ["make speedrun", "make test"]
    assert all(target in ci for target in targets)


@pytest.mark.slow
def test_every_nanorun_command_of_the_readme_runs(tmp_path):
    ran = [line for line in commands() if line.startswith("nanorun ")]
    assert len(ran) >= 8
    shutil.copytree(ROOT / "records", tmp_path / "records")
    kept = set(tmp_path.glob("records/sotu/*"))
    (tmp_path / "logs").mkdir()
    for name in ("seconds_one_run.txt", "seconds_twenty_runs.txt"):
        (tmp_path / "logs" / name).write_bytes(lzma.decompress((LOGS / f"{name}.xz").read_bytes()))
    shutil.copy(TIMES, tmp_path / "times.csv")
    for line in ran:
        words = shlex.split(line)[1:]
        if words[0] == "train":
            words += SHORT
        if "RECORD" in words:
            made_here = sorted(set(tmp_path.glob("records/sotu/*")) - kept)
            words[words.index("RECORD")] = str(made_here[0])
        done = subprocess.run(
            [sys.executable, "-m", "nanorun", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, (line, done.stderr[-500:])
        written = words[words.index("--out") + 1] if "--out" in words else None
        assert (tmp_path / written).stat().st_size if written else (done.stdout + done.stderr).strip(), line


def test_every_track_of_the_readme_exists_and_every_track_is_in_the_readme():
    rules = README.partition("## The rules")[2].partition("## Adding")[0]
    rows = re.findall(r"^\| `([a-z-]+)` \|", rules, flags=re.MULTILINE)
    assert sorted(rows) == sorted(path.parent.name for path in (ROOT / "configs").glob("*/track.toml"))


def test_every_local_file_the_readme_names_exists():
    for name in ("CONTRIBUTING.md", "LICENSE", "data/README.md", "configs/sotu/README.md"):
        assert (ROOT / name).exists(), name
