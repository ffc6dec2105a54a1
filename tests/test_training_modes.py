"""Runs judged by other weights than those they train: averages and schedule-free optimizers."""

import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console

from nanorun.errors import Stopped, UserError
from nanorun.optim.build import OptimizerSet
from nanorun.sample import load_model
from nanorun.tracks import load_track
from nanorun.training import checkpoint
from nanorun.training import train as train_module
from nanorun.training.run import resume_run, train_seeds
from nanorun.training.step import Stepper

QUIET = Console(quiet=True)
TINY = [
    "train.steps=6",
    "train.batch_tokens=512",
    "validation.from_step=2",
    "validation.every_steps=2",
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=32",
    "log.every_steps=1",
]
OPTIMIZERS = {
    "lawa_queue": "adamw",
    "lawa_ema": "adamw",
    "schedulefree_adamw": "schedulefree_adamw",
    "schedulefree_prodigy": "schedulefree_prodigy",
    "schedulefree_under_lawa": "schedulefree_adamw",
}
AVERAGES = {
    "lawa_queue": ["average.kind=queue", "average.snapshots=2", "average.every_steps=1"],
    "lawa_ema": ["average.kind=ema", "average.beta=0.8", "average.every_steps=2"],
    "schedulefree_under_lawa": ["average.kind=ema", "average.beta=0.8", "average.every_steps=1"],
}
WAYS = list(OPTIMIZERS)
RATES = {"adamw": "lr = 0.01", "schedulefree_adamw": "lr = 0.01", "schedulefree_prodigy": "d0 = 0.001"}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    """A track of the folder's own, shakespeare-sprint with one preset for each optimizer."""
    theirs = load_track("shakespeare-sprint").folder.resolve() / "track.toml"
    monkeypatch.chdir(tmp_path)
    track = tmp_path / "configs" / "tiny"
    track.mkdir(parents=True)
    # A few validation tokens are enough here.
    (track / "track.toml").write_text(theirs.read_text().replace("tokens = 0", "tokens = 4096"))
    for name, rate in RATES.items():
        (track / f"{name}.toml").write_text(f'[optim.default]\nname = "{name}"\n{rate}\n')


def train(way, *settings):
    changes = [*TINY, *AVERAGES.get(way, []), *settings]
    return train_seeds("tiny", OPTIMIZERS[way], changes, 0, 1, {}, QUIET)[0]


def stop_at(monkeypatch, wanted):
    real = Stepper.step

    def stopping(self, step, scale, *, stop_vote=False):
        if step == wanted:
            signal.raise_signal(signal.SIGINT)
        return real(self, step, scale, stop_vote=stop_vote)

    monkeypatch.setattr(Stepper, "step", stopping)
    return real


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_ends_with_the_bits_of_one_never_stopped(monkeypatch, way):
    whole = train(way)
    real = stop_at(monkeypatch, 2)
    with pytest.raises(Stopped, match="nanorun train --resume") as stopped:
        train(way)
    monkeypatch.setattr(Stepper, "step", real)
    resumed = resume_run(Path(str(stopped.value).rpartition(" ")[2]), QUIET)
    assert resumed["final_weights_sha256"] == whole["final_weights_sha256"]
    assert resumed["final_val_loss"] == whole["final_val_loss"]


@pytest.mark.parametrize("way", WAYS)
def test_how_often_a_run_is_validated_moves_no_bit_of_it(way):
    often, seldom = train(way), train(way, "validation.every_steps=0")
    assert often["final_weights_sha256"] == seldom["final_weights_sha256"]
    assert often["final_val_loss"] == seldom["final_val_loss"]


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_holds_the_weights_to_go_on_with_and_those_the_run_is_judged_by(way):
    result = train(way)
    saved = checkpoint.newest_of(Path(result["run"]))[0]
    assert saved.model.keys() == saved.evaluation.keys()
    assert any(not torch.equal(saved.model[name], saved.evaluation[name]) for name in saved.model)
    model, _ = load_model(Path(result["run"]))
    assert checkpoint.weights_sha256(model) == result["final_weights_sha256"]
    assert all(torch.equal(tensor, saved.evaluation[name]) for name, tensor in model.state_dict().items())


def test_bf16_passes_with_master_weights_validate_the_average_too():
    result = train("lawa_queue", "train.precision=bf16_master", "average.snapshots=6")
    run = Path(result["run"])
    plain = train_seeds("tiny", "adamw", [*TINY, "train.precision=bf16_master"], 0, 1, {}, QUIET)[0]
    saved = checkpoint.newest_of(run)[0]
    theirs = checkpoint.newest_of(Path(plain["run"]))[0]
    assert all(torch.equal(tensor, theirs.model[name]) for name, tensor in saved.model.items())
    assert abs(result["final_val_loss"] - plain["final_val_loss"]) > 0.01


def test_a_changed_file_of_evaluation_weights_is_refused_by_name():
    result = train("lawa_ema", "checkpoint.keep=1")
    path = next((Path(result["run"]) / "checkpoints").glob("*/evaluation.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"evaluation\.safetensors is missing or not what was saved"):
        load_model(Path(result["run"]))


def test_a_run_without_an_average_saves_its_weights_once():
    result = train_seeds("tiny", "adamw", TINY, 0, 1, {}, QUIET)[0]
    files = {path.name for path in Path(result["run"]).glob("checkpoints/*/*")}
    assert files == {"model.safetensors", "optimizer.pt", "state.json", "manifest.json"}


@pytest.mark.parametrize("way", WAYS)
def test_validation_reads_the_averaged_weights_and_the_swap_is_counted(monkeypatch, way):
    calls = []
    real_validation, real_swap = train_module.validation_loss, OptimizerSet.to_evaluation

    def watched_validation(model, *args, **kwargs):
        calls.append(("validation", checkpoint.weights_sha256(model), runs[0].clock._reasons[-1]))
        return real_validation(model, *args, **kwargs)

    def watched_swap(self):
        calls.append(("swap", None, runs[0].clock._reasons[-1]))
        return real_swap(self)

    runs = []
    real_loop = train_module._loop
    monkeypatch.setattr(
        train_module, "_loop", lambda run, *rest: (runs.append(run), real_loop(run, *rest))[1]
    )
    monkeypatch.setattr(train_module, "validation_loss", watched_validation)
    monkeypatch.setattr(OptimizerSet, "to_evaluation", watched_swap)
    result = train(way)
    validations = [call for call in calls if call[0] == "validation"]
    assert len(validations) == 3
    assert validations[-1][1] == result["final_weights_sha256"]
    before_each = [calls[calls.index(call) - 1] for call in validations]
    assert all(what == "swap" and paused == "train" for what, _, paused in before_each)
    assert all(paused == "validation" for _, _, paused in validations)
