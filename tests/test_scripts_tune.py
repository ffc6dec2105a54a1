"""The search: points of a space, a shortened track, going on where it stopped, and the preset it writes."""

import json
import math
import sys
from pathlib import Path

import pytest
from scripts_loader import script

from nanorun.config import resolve
from nanorun.tables import read_toml
from nanorun.tracks import load_track

SPACE = """
[preset.optim.default]
name = "adamw"
lr = 0.01
betas = [0.9, 0.95]

[space."optim.default.lr"]
low = 0.001
high = 0.064
scale = "log"

[space."optim.default.betas.1"]
low = 0.9
high = 0.99
scale = "log1m"

[space."train.warmup_steps"]
low = 0
high = 3

[space."model.zero_init_projections"]
choices = [true, false]
"""
TRACK = """
summary = "a track of seconds"
kind = "optimizer"
target_val_loss = 3.0
scored_in = "seconds"

[significance]
rule = "t"
n = 3
alpha = 0.05

[fixed.data]
corpus = "shakespeare"
tokenizer = "char"

[fixed.model]
n_layer = 1
n_head = 2
n_embd = 32
context_len = 64

[fixed.train]
batch_tokens = 1024

[fixed.validation]
tokens = 4096
every_steps = 2
from_step = 2
"""


@pytest.fixture
def tune(tmp_path, monkeypatch):
    """The script as a module, in a folder with a track of its own."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs" / "tiny"
    (folder / "search").mkdir(parents=True)
    (folder / "track.toml").write_text(TRACK)
    (folder / "search" / "adamw.toml").write_text(SPACE)
    (folder / "search" / "common.toml").write_text("[preset.train]\ngrad_clip = 1.0\n\n[space]\n")
    with script("tune") as module:
        yield module


def run(tune, monkeypatch, *words, out="trials.json", trials=4):
    words = ["tune.py", "--track", "tiny", "--optim", "adamw", "--trials", str(trials), "--out", out, *words]
    monkeypatch.setattr(sys, "argv", words)
    tune.main()
    return json.loads(Path(out).read_text())


def counting(tune, monkeypatch):
    calls = []

    def trial(arguments, track, preset, point):
        calls.append(point)
        return {"final_val_loss": abs(math.log(point["optim.default.lr"] / 0.01)), "train_seconds": 1.0}

    monkeypatch.setattr(tune, "run_trial", trial)
    return calls


def test_points_fill_the_space_evenly_in_its_own_scale(tune):
    space = read_toml(Path("configs/tiny/search/adamw.toml"))["space"]
    drawn = tune.points(space, 16)
    assert drawn == tune.points(space, 16)
    assert len({json.dumps(point) for point in drawn}) == 16
    for point in drawn:
        assert 0.001 <= point["optim.default.lr"] <= 0.064
        assert isinstance(point["train.warmup_steps"], int)
    # Sobol's property: of 16 points each half of the logarithmic range holds eight.
    assert sum(point["optim.default.lr"] < 0.008 for point in drawn) == 8
    assert sum(point["model.zero_init_projections"] for point in drawn) == 8
    assert sum(1 - point["optim.default.betas.1"] < math.sqrt(0.1 * 0.01) for point in drawn) == 8


def test_a_search_goes_on_where_it_was_stopped(tune, monkeypatch):
    calls = counting(tune, monkeypatch)
    run(tune, monkeypatch, trials=2)
    document = run(tune, monkeypatch, trials=4)
    assert len(calls) == 4
    assert [trial["trial"] for trial in document["trials"]] == [0, 1, 2, 3]
    assert [trial["point"] for trial in document["trials"]] == calls


@pytest.mark.parametrize(
    "words", [("--set", "train.steps=9"), ("--seed", "7"), ("--optim", "adam"), ("held", "lr")]
)
def test_trials_of_another_search_are_not_mixed_in(tune, monkeypatch, capsys, words):
    counting(tune, monkeypatch)
    run(tune, monkeypatch, trials=2)
    search = Path("configs/tiny/search/adamw.toml")
    search.with_name("adam.toml").write_text(search.read_text())
    if words[0] == "held":
        search.write_text(search.read_text().replace("lr = 0.01", "lr = 0.02"))
        words = ()
    with pytest.raises(SystemExit, match="2"):
        run(tune, monkeypatch, *words, trials=4)
    assert "holds trials of another search" in capsys.readouterr().err
    assert len(json.loads(Path("trials.json").read_text())["trials"]) == 2


def test_the_best_trial_becomes_the_preset_under_its_command(tune, monkeypatch):
    counting(tune, monkeypatch)
    document = run(tune, monkeypatch, "--set", "train.steps=3", "--write", "50", trials=8)
    best = min(document["trials"], key=lambda trial: trial["final_val_loss"])
    text = Path("configs/tiny/adamw.toml").read_text()
    assert f"# Trial {best['trial']} of 8" in text
    command = "--track tiny --optim adamw --trials 8 --out trials.json --set train.steps=3 --write 50"
    assert f"# python scripts/tune.py {command}\n" in text
    config = resolve(load_track("tiny"), "adamw")
    assert config.train.steps == 50
    assert config.train.grad_clip == 1.0
    assert config.optim["default"]["lr"] == best["point"]["optim.default.lr"]
    assert config.optim["default"]["betas"] == [0.9, best["point"]["optim.default.betas.1"]]
    assert config.train.warmup_steps == best["point"]["train.warmup_steps"]


def test_trials_run_on_a_shortened_track_and_the_document_says_how(tune, monkeypatch):
    words = ["--set", "train.steps=4", "--set", "train.batch_tokens=256", "--set", "validation.tokens=2048"]
    document = run(tune, monkeypatch, *words, "--threads", "1", trials=2)
    assert document["held"] == words[1::2]
    losses = [trial["final_val_loss"] for trial in document["trials"]]
    assert all(2.0 < loss < 4.5 for loss in losses)
    assert losses[0] != losses[1]


def test_a_trial_that_fails_is_kept_and_never_the_best(tune, monkeypatch):
    losses = iter([None, 2.0, 1.0, None])
    monkeypatch.setattr(tune, "run_trial", lambda *words: {"final_val_loss": next(losses)})
    document = run(tune, monkeypatch)
    assert len(document["trials"]) == 4
    assert tune.best_trial(document)["final_val_loss"] == 1.0


def test_a_search_without_a_single_loss_says_so(tune, monkeypatch, capsys):
    monkeypatch.setattr(tune, "run_trial", lambda *words: {"final_val_loss": None})
    with pytest.raises(SystemExit, match="2"):
        run(tune, monkeypatch, "--write", "10")
    assert "every trial failed: lower the learning rates" in capsys.readouterr().err
