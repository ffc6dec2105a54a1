"""Text from a run whose tokenizer lies in a file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

TRACK = """
summary = "a track"
kind = "open"
target_val_loss = 2.0
scored_in = "seconds"
significance = { rule = "t", n = 3, alpha = 0.05 }
[fixed.data]
corpus = "shakespeare"
tokenizer = "bpe300"
"""
PRESET = """
[model]
n_layer = 1
n_head = 2
n_embd = 32
context_len = 64
[train]
steps = 2
batch_tokens = 512
[validation]
tokens = 640
[optim.default]
name = "adamw"
lr = 0.001
"""


@pytest.fixture
def run_in_trained_tokens(nanorun):
    folder = Path("configs/mine")
    folder.mkdir(parents=True)
    (folder / "track.toml").write_text(TRACK)
    (folder / "adamw.toml").write_text(PRESET)
    assert nanorun("prepare-data", "shakespeare", "--train-bpe", 300)[0] == 0
    code, _, err = nanorun("train", "--track", "mine", "--optim", "adamw", "--no-record")
    assert code == 0, err
    return next(Path("runs").iterdir())


def test_a_tokenizer_in_a_file_is_found_beside_the_shards_or_in_the_run(run_in_trained_tokens, nanorun):
    words = ("sample", run_in_trained_tokens, "--prompt", "KING:", "--tokens", 10)
    code, text, _ = nanorun(*words)
    assert code == 0
    assert text.startswith("KING:")
    file = Path("data/shakespeare-bpe300/tokenizer.json")
    shutil.move(file, run_in_trained_tokens)
    assert nanorun(*words)[:2] == (0, text)
    (run_in_trained_tokens / file.name).unlink()
    code, _, err = nanorun(*words)
    assert code == 2
    assert f"{run_in_trained_tokens / file.name}: cannot be read" in err
    assert "put it there" in err
