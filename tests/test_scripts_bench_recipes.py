"""Recipes take turns, and what is told of them is what `nanorun compare` finds."""

import json
import math
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
from runs_samples import put_record
from scripts_loader import script

from nanorun.records.compare import compare

SECONDS = {"a": 30.0, "b1": 40.0, "b2": 50.0}


@pytest.fixture
def recipes(monkeypatch, tmp_path):
    """The script, its runs replaced by records made up, and the words that each run got."""
    with script("bench_recipes") as module:
        words = []

        def made_up(said):
            words.append(said)
            option = dict(pairwise(said))
            side, seed = Path(option["--records"]).name, int(option["--seed"])
            kept = {"seconds": SECONDS[side] + seed / 10, "final": 1.45 + 0.001 * seed, "seed": seed}
            put_record(Path(option["--records"]), name=option["--optim"], **kept)
            return {"final_val_loss": kept["final"], "clock": {"train_seconds": kept["seconds"]}}

        monkeypatch.setattr(module, "train", made_up)
        monkeypatch.chdir(tmp_path)
        yield module, words


def test_recipes_take_turns_and_the_figures_are_those_of_compare(recipes, tmp_path, capsys):
    module, words = recipes
    other = "muon --set train.steps=9 --set 'optim.default.betas=[0.9, 0.95]'"
    command = ["--a", "fast", "--b", "muon", "--b", other, "--seeds", "3", "--first-seed", "7"]
    module.main([*command, "--keep", "kept", "--out", str(tmp_path / "out.json")])
    names = [dict(pairwise(said))["--run-name"] for said in words]
    assert names == [f"{side}-s{seed}" for seed in (7, 8, 9) for side in ("a", "b1", "b2")]
    assert "optim.default.betas=[0.9, 0.95]" in words[2]
    figures = json.loads(Path("out.json").read_text())
    assert figures["compared"]["b2"] == json.loads(json.dumps(compare("kept/a", "kept/b2").to_dict()))
    assert len(figures["runs"]) == 9
    assert shlex.split(figures["command"])[2:] == [*command, "--keep", "kept", "--out", "out.json"]
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1:3] + row[4:5] for row in rows] == [["3", "1000", "yes"]] * 3
    ratio = math.exp(sum(math.log((30 + s / 10) / (50 + s / 10)) for s in (7, 8, 9)) / 3)
    assert rows[2][6].startswith(f"{ratio:.3f} (")
    assert rows[2][8] == "+20.0 |"


def test_a_run_that_fails_ends_the_race_with_its_last_words(tmp_path):
    with script("bench_recipes") as module:
        words = module.Side("a", "moun").words("sotu", 0, tmp_path, tmp_path)
        with pytest.raises(SystemExit, match=r"(?s)ended with 2.*no preset 'moun'.*Did you mean 'muon'"):
            module.train(words)
