"""A run's memory: foreseen on stand-ins, as the allocator then gives it out; and what is chosen by it."""

import json
import signal
from pathlib import Path

import psutil
import pytest
import torch
from rich.console import Console

from nanorun import kernels
from nanorun.config import resolve
from nanorun.errors import Stopped
from nanorun.model import CHEAPEST_FIRST
from nanorun.tracks import load_track, preset_names
from nanorun.training import memory
from nanorun.training.memory import Rehearsal, Stopwatch, account, choose, foreseeing, measuring, rehearse
from nanorun.training.memory_show import lecture_account
from nanorun.training.run import resume_run, train_seeds

CPU = torch.device("cpu")
VOCAB_SIZE = 65
QUEUE = ["average.kind=queue", "average.snapshots=2", "average.every_steps=1"]


def tiny(tiny_settings, *settings, preset="adamw"):
    return resolve(load_track("shakespeare-sprint"), preset, [*tiny_settings, *settings])


def foreseen(config, rows):
    with foreseeing() as meter:
        rehearse(config, VOCAB_SIZE, CPU, meter, rows)
    return account(meter.readings, CHEAPEST_FIRST)


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("muon", ["train.micro_batch_rows=4"]),
        ("adamw", ["model.arch=gpt2", "model.dropout=0.1", "train.precision=bf16_master"]),
        ("adamw", [*QUEUE, "train.precision=bf16"]),
        ("ngram", ["model.ngram_buckets=4096", "model.ngram_dropout=0.5"]),
    ],
)
def test_what_is_foreseen_is_what_the_allocator_gives_out(tiny_settings, preset, settings):
    config = tiny(tiny_settings, *settings, preset=preset)
    rows = config.train.micro_batch_rows or 8
    wanted = foreseen(config, rows)
    with measuring(CPU) as meter:
        rehearse(config, VOCAB_SIZE, CPU, meter, rows)
    found = account(meter.readings, CHEAPEST_FIRST)
    for states in ("parameters", "copy", "gradients", "state", "average"):
        assert getattr(wanted, states) == pytest.approx(getattr(found, states), rel=0.05), states
    for way in CHEAPEST_FIRST:
        assert wanted.passes[way].activations == pytest.approx(found.passes[way].activations, rel=0.15)
        assert wanted.passes[way].peak == pytest.approx(found.passes[way].peak, rel=0.15)
    assert wanted.update_peak == pytest.approx(found.update_peak, rel=0.15)
    plain, selective, block = (found.passes[way].activations for way in CHEAPEST_FIRST)
    # A fused block keeps no more than selective ever does.
    fused = config.train.precision == "auto" and kernels.library() is not None
    assert (plain == selective) if fused else (plain > selective)
    assert selective > block > 0


def test_the_state_of_every_optimizer_is_foreseen(tiny_settings):
    sotu = load_track("sotu")
    for preset in preset_names(sotu):
        config = tiny(tiny_settings).model_copy(update={"optim": resolve(sotu, preset).optim})
        with foreseeing() as meter:
            (wanted := Rehearsal(config, VOCAB_SIZE, CPU, meter)).steps()
        (found := Rehearsal(config, VOCAB_SIZE, CPU, Stopwatch(CPU))).steps()
        assert wanted.by_optimizer() == found.by_optimizer(), preset
        assert sum(found.by_optimizer().values()) or preset == "sgd"


@pytest.mark.slow
def test_the_lectures_example_takes_no_memory_to_foresee():
    before = psutil.Process().memory_info().rss
    page = lecture_account()
    assert psutil.Process().memory_info().rss - before < 2**30
    rows = {row["what"]: row for row in page["rows"]}
    lecture = {what: row["lecture_bytes"] for what, row in rows.items()}
    assert lecture["states together"] == 24e9
    assert lecture["fp32 buffers of the update"] == 6e9
    assert lecture["activations"] == pytest.approx(60e9, rel=0.01)
    assert lecture["activations, block"] == pytest.approx(8e9, rel=0.1)
    assert rows["states together"]["nanorun_bytes"] == pytest.approx(16 * page["parameters"], rel=0.01)
    # With a CPU's kernels, where they can be made, these would be 15.3.
    assert rows["activations, block"]["nanorun_bytes"] == pytest.approx(25.2e9, rel=0.01)


def test_auto_takes_the_cheapest_that_fits_and_then_fewer_rows(tiny_settings):
    config = tiny(tiny_settings, "train.checkpoint_activations=auto", "model.n_layer=3")
    fits = {}
    room = 2**40
    while (choice := choose(config, VOCAB_SIZE, CPU, 8, room)).fits:
        fits.setdefault((choice.way, choice.rows), choice.peak)
        room = int(choice.peak / (1 - memory.HEADROOM)) - 1
    # Where blocks are fused "selective" gains nothing.
    ways = [way for way in CHEAPEST_FIRST if way != "selective" or kernels.library() is None]
    assert list(fits) == [(way, 8) for way in ways] + [("block", rows) for rows in (4, 2, 1)]
    assert list(fits.values()) == sorted(fits.values(), reverse=True)


def test_a_run_resumed_keeps_activations_as_it_first_chose(
    tiny_settings, shakespeare_folder, monkeypatch, tmp_path, stop_in_step, capsys
):
    monkeypatch.chdir(tmp_path)
    console = Console(width=300)
    monkeypatch.setattr(memory, "memory_at_hand", lambda device: 0)
    stop_in_step(3, signal.SIGTERM)
    settings = [*tiny_settings, "train.checkpoint_activations=auto"]
    options = {"data": shakespeare_folder, "record": False, "run": "one"}
    with pytest.raises(Stopped):
        train_seeds("shakespeare-sprint", "muon", settings, 0, 1, options, console)
    said = capsys.readouterr().out
    assert "activations: block" in said
    assert "8 rows do not fit the memory at once: 1 are taken at a time" in said
    assert "the same 512 tokens a step" in said
    state = json.loads(next(Path("runs/one/checkpoints").glob("*/state.json")).read_text())
    assert state["choices"]["checkpoint_activations"] == "block"
    monkeypatch.setattr(memory, "memory_at_hand", lambda device: 2**50)
    seen = []
    real = memory.Stepper.step

    def watching(self, *arguments, **options):
        seen.append((self.model.checkpoint_activations, self.micro_batch_rows))
        return real(self, *arguments, **options)

    monkeypatch.setattr(memory.Stepper, "step", watching)
    resume_run(Path("runs/one"), console)
    assert set(seen) == {("block", 1)}


def test_the_account_is_told_before_anything_runs_and_measured_when_asked(nanorun):
    words = ["memory", "--track", "fineweb-small", "--set", "model.n_layer=1", "--set", "model.n_embd=8"]
    words += ["--set", "model.n_head=1", "--set", "model.context_len=16", "--set", "train.batch_tokens=64"]
    code, out, _ = nanorun(*words, "--json", "--measure")
    lines = {line["what"]: line for line in json.loads(out)["lines"]}
    assert code == 0
    assert lines["parameters"]["predicted_bytes"] == lines["parameters"]["measured_bytes"] > 4 * 2 * 50257 * 8
    code, out, _ = nanorun(*words)
    assert code == 0
    assert "activations, block" in out
    code, _, err = nanorun("memory", "--track", "shakespeare")
    assert code == 2
    assert "make it with nanorun prepare-data shakespeare" in err
    code, _, err = nanorun("memory", "--lecture", "--measure")
    assert code == 2
    assert "--lecture is an account of its own shape" in err
