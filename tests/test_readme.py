"""Every command of the README runs here, or in CI, which runs the make targets."""

import json
import lzma
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from foreign_samples import write_llmc
from hub_server import HubServer

from nanorun.data.sources.fineweb10B import CORPUS

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


def _write_others(folder):
    """Two shards as llm.c leaves them."""
    folder.mkdir()
    for split, n_tokens in (("val", 700), ("train", 3000)):
        tokens = np.arange(n_tokens) % 5000
        tokens[::100] = 50256
        write_llmc(folder / f"web_{split}_000000.bin", tokens)


@pytest.fixture
def hub():
    """A hub on loopback with the datasets that the README names."""
    server = HubServer()
    rows = "".join(json.dumps({"text": f"Row {i} of a dataset on the hub."}) + "\n" for i in range(60))
    server.add("OWNER/NAME", {"data/train.jsonl": rows.encode()}, commit="a" * 40)
    shards = {f"fineweb_{name}.bin": bytes(2048) for name in ("val_000000", "train_000001")}
    server.add(CORPUS.repository, shards, commit=CORPUS.pinned)
    yield server
    server.close()


@pytest.mark.slow
def test_every_nanorun_command_of_the_readme_runs(tmp_path, hub):
    ran = [line for line in commands() if line.startswith(("nanorun ", "torchrun "))]
    assert len(ran) >= 8
    shutil.copytree(ROOT / "records", tmp_path / "records")
    kept = set(tmp_path.glob("records/sotu/*"))
    (tmp_path / "logs").mkdir()
    for name in ("seconds_one_run.txt", "seconds_twenty_runs.txt"):
        (tmp_path / "logs" / name).write_bytes(lzma.decompress((LOGS / f"{name}.xz").read_bytes()))
    shutil.copy(TIMES, tmp_path / "times.csv")
    (tmp_path / "notes").mkdir()
    for i in range(40):
        words = " ".join(f"word{(i * k) % 97} and note {k}" for k in range(200))
        (tmp_path / "notes" / f"{i}.md").write_text(f"# Note {i}\n{words}\n")
    _write_others(tmp_path / "others")
    for line in ran:
        program, *words = shlex.split(line)
        if "train" in words and "launch" not in words:
            words += SHORT
        if "RECORD" in words:
            made_here = sorted(set(tmp_path.glob("records/sotu/*")) - kept)
            words[words.index("RECORD")] = str(made_here[0])
        done = subprocess.run(
            [sys.executable, "-m", {"torchrun": "torch.distributed.run"}.get(program, program), *words],
            cwd=tmp_path,
            env={
                **os.environ,
                "HF_ENDPOINT": hub.url,
                "HF_HOME": str(tmp_path / "hf"),
                "NO_PROXY": "127.0.0.1",
                # As the kept records: beside other programs a run would choose fewer, and be of other hardware.
                "OMP_NUM_THREADS": "2",
            },
            capture_output=True,
            text=True,
            timeout=200,
        )
        if "fineweb10B" in words:
            # Its shards' hashes are known, and the hub of this test has others.
            assert (done.returncode, "names a mirror that altered it" in done.stderr) == (2, True), line
            continue
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
