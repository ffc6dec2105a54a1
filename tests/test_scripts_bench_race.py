"""The race with nanoGPT: what its log is read as, the sums, and what is said of a checkout that is none."""

import json
import os
from pathlib import Path

import pytest
import torch
from scripts_loader import script

from nanorun.config import resolve
from nanorun.errors import RunFailed
from nanorun.model import GPT
from nanorun.tracks import load_track

TRAIN_PY = """
import sys
last = next(int(word.split("=")[1]) for word in reversed(sys.argv) if word.startswith("--max_iters="))
print("number of parameters: 0.80M")
for number in range(last + 1):
    if number % 20 == 0:
        print(f"step {number}: train loss 2.0000, val loss 1.9000")
    print(f"iter {number}: loss 2.0000, time {900.0 if number % 20 == 0 else 50.0:.2f}ms, mfu 0.01%")
"""


@pytest.fixture
def bench():
    with script("bench_race") as module:
        yield module


@pytest.fixture
def checkout(tmp_path):
    """A folder with nanoGPT's files, whose train.py prints a log at once."""
    folder = tmp_path / "theirs"
    (folder / "config").mkdir(parents=True)
    for name in ("model.py", "configurator.py", "config/train_shakespeare_char.py"):
        (folder / name).write_text("")
    (folder / "train.py").write_text(TRAIN_PY)
    return folder


def log(*milliseconds, evaluated=()):
    lines = []
    for number, ms in enumerate(milliseconds):
        lines += [f"step {number}: train loss 1.9, val loss 1.88"] if number in evaluated else []
        lines.append(f"iter {number}: loss 4.2, time {ms:.2f}ms, mfu -100.00%")
    return "\n".join(lines)


def test_an_iteration_that_holds_an_evaluation_counts_as_the_median_of_the_others(bench):
    text = log(5000, 10, 30, 6000, 20, 7000, evaluated=(0, 3, 5))
    assert bench.training_seconds(text, 5) == pytest.approx([0.02, 0.01, 0.03, 0.02, 0.02])


def test_a_log_that_lacks_an_iteration_is_refused_with_its_end(bench):
    with pytest.raises(RunFailed, match=r"lacks 1 of 4 lines(.|\n)*iter 2: loss"):
        bench.training_seconds(log(10, 10, 10), 4)


def test_a_few_long_runs_stand_evenly_among_many_short_ones(bench):
    assert " ".join(bench.in_turn({"o": 5, "n": 2})) == "o n o o o n o"


@pytest.fixture
def results(bench, monkeypatch):
    """What nanorun's runs return in turn, without running them; None is a run that misses its target."""
    given = [0.5, 1.5]

    def run(place, track, preset, seed, *words):
        seconds = given[seed]
        return {
            "reached": None if seconds is None else {"step": 40, "seconds": seconds},
            "steps": 50,
            "final_val_loss": 1.87,
            "clock": {"train_seconds": 2.0, "compile_seconds": 0.1},
        }

    monkeypatch.setattr(bench, "run_nanorun", run)
    return given


def race(bench, checkout, out):
    words = [
        "--nanogpt",
        str(checkout),
        "--seeds",
        "2",
        "--repeats",
        "1",
        "--iterations",
        "40",
        "--out",
        str(out),
    ]
    assert bench.main(["sprint", *words]) == 0
    return out.read_text()


def test_the_sprints_ratio_is_of_the_mean_seconds_a_shorter_run_scaled(
    bench, checkout, results, tmp_path, capsys
):
    text = race(bench, checkout, tmp_path / "out.json")
    found = json.loads(text)
    assert found["nanogpt_seconds"] == pytest.approx(2000 * 0.05)
    assert found["nanorun_seconds"] == pytest.approx(1.0)
    assert found["ratio"] == pytest.approx(100.0)
    assert [row["side"] for row in found["rows"]] == ["nanorun", "nanogpt", "nanorun"]
    assert "100.00" in capsys.readouterr().out
    assert str(tmp_path) not in text
    assert found["nanogpt"]["commit"] is None
    assert "--nanogpt DIR" in found["command"]


def test_no_ratio_is_told_where_a_seed_missed_the_target(bench, checkout, results, tmp_path, capsys):
    results[1] = None
    found = json.loads(race(bench, checkout, tmp_path / "out.json"))
    assert found["ratio"] is None
    assert found["nanorun_seconds"] is None
    assert "a seed missed" in capsys.readouterr().out


def test_a_folder_that_is_no_checkout_is_refused_with_what_it_lacks(bench, tmp_path, capsys):
    assert bench.main(["sprint", "--nanogpt", str(tmp_path)]) == 2
    assert "no train.py there, so no checkout of nanoGPT: clone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["sprint", "--optim", "moun"], "Did you mean 'muon'?"),
        (["sprint", "--seeds", "0"], "--seeds 0: wanted 1 or more"),
        (["sprint", "--iterations", "2001"], "wanted at most nanoGPT's 2000"),
        (["like-for-like", "--iterations", "10"], "--iterations 10: wanted 20 or more"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_runs(bench, checkout, capsys, words, wanted):
    (checkout / "train.py").write_text("raise SystemExit('it ran')")
    assert bench.main([*words, "--nanogpt", str(checkout)]) == 2
    assert wanted in capsys.readouterr().err


def test_a_nanogpt_that_fails_is_told_with_its_last_lines(bench, checkout, results, capsys):
    (checkout / "train.py").write_text("print('found vocab_size = 65')\nraise SystemExit('no torch here')")
    assert bench.main(["sprint", "--nanogpt", str(checkout), "--repeats", "1", "--seeds", "1"]) == 1
    error = capsys.readouterr().err
    assert "nanoGPT ended with exit code 1:\nfound vocab_size = 65\nno torch here" in error


def test_nanogpt_trains_on_the_tokens_of_its_own_prepare(bench, checkout, tmp_path):
    place = bench.Place(tmp_path / "place")
    place.folder.mkdir()
    place.lay_out(checkout)
    folder = place.nanogpt / "data" / "shakespeare_char"
    assert (place.nanogpt / "config" / "train_shakespeare_char.py").is_file()
    # prepare.py's own words: train has 1,003,854 tokens, val has 111,540; uint16 each.
    assert [(folder / f"{split}.bin").stat().st_size // 2 for split in ("train", "val")] == [
        1_003_854,
        111_540,
    ]
    assert place.vocab_size == 65


def test_the_nanogpt_preset_has_the_parameters_that_nanogpts_log_tells():
    model = GPT(resolve(load_track("shakespeare-sprint"), "nanogpt").model, 65)
    assert model.wpe is not None
    # "number of parameters: 0.80M", position embeddings aside; decayed tensors 18, with 802,944 parameters.
    assert f"{(model.n_parameters() - model.wpe.weight.numel()) / 1e6:.2f}M" == "0.80M"
    decayed = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    assert (len(decayed), sum(parameter.numel() for parameter in decayed)) == (18, 802_944)


@pytest.mark.skipif("NANOGPT" not in os.environ, reason="NANOGPT names no checkout of nanoGPT")
def test_from_the_same_weights_nanorun_takes_nanogpts_steps_and_reads_its_checkpoint(
    bench, tmp_path, monkeypatch
):
    place = bench.Place(tmp_path)
    place.lay_out(Path(os.environ["NANOGPT"]))
    assert len(bench.check_same(place)) == bench.COMPARED_STEPS
    monkeypatch.setattr(bench, "ITERATIONS", 20)
    monkeypatch.setattr(bench, "DOCUMENTED", (*bench.DOCUMENTED, "--eval_interval=20"))
    row = bench.nanogpt_whole(place, 20)
    # Its own estimate is of 20 batches of the tenth that is read here whole.
    assert row["val_loss"] == pytest.approx(row["own_estimate"], abs=0.05)
    other = resolve(load_track("shakespeare-sprint"), "nanogpt", ["model.activation=gelu"])
    monkeypatch.setattr(bench, "resolve", lambda track, preset: other)
    with pytest.raises(RunFailed, match="is not nanoGPT's run"):
        bench.check_same(place)


def test_weights_of_nanogpt_fit_nanorun_under_its_names(bench):
    names = ["wte.weight", "wpe.weight", "ln_f.weight"]
    for layer in range(4):
        parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
        names += [f"h.{layer}.{part}.weight" for part in parts]
    theirs = {f"transformer.{name}": torch.zeros(1) for name in names} | {"lm_head.weight": torch.zeros(1)}
    config = resolve(load_track("shakespeare-sprint"), "nanogpt").model
    assert set(bench.ours_of(theirs)) == set(GPT(config, 65).state_dict())
