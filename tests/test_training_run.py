"""Runs from start to end on a model of seconds: bits, resuming, losses that are not finite, messages."""

import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from nanorun.errors import RunFailed, Stopped, UserError
from nanorun.records.record import read_records
from nanorun.training import checkpoint
from nanorun.training.run import resume_run, train_seeds
from nanorun.training.step import Stepper

TINY = [
    "train.steps=6",
    "train.batch_tokens=512",
    "validation.from_step=6",
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=32",
    "log.every_steps=1",
]
QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(*settings, seed=0, optim="muon", **options):
    return train_seeds("shakespeare-sprint", optim, [*TINY, *settings], seed, 1, options, QUIET)[0]


def test_a_seed_decides_every_bit_of_a_run():
    first, again, other = train(), train(), train(seed=1)
    assert first["final_weights_sha256"] == again["final_weights_sha256"]
    assert first["initial_weights_sha256"] != other["initial_weights_sha256"]
    assert first["final_val_loss"] < 4.2


@pytest.mark.parametrize(
    ("optim", "settings"),
    [("muon", []), ("adamw", []), ("adamw", ["train.length_schedule=[16, 32, 64, 64]"])],
)
def test_a_resumed_run_ends_with_the_bits_of_one_never_stopped(monkeypatch, optim, settings):
    whole = train(*settings, optim=optim)
    real = Stepper.step

    def stopping(self, step, scale, *, stop_vote=False):
        if step == 2:
            import signal

            signal.raise_signal(signal.SIGINT)
        return real(self, step, scale, stop_vote=stop_vote)

    monkeypatch.setattr(Stepper, "step", stopping)
    with pytest.raises(Stopped, match="nanorun train --resume") as stopped:
        train(*settings, optim=optim)
    monkeypatch.setattr(Stepper, "step", real)
    from pathlib import Path

    folder = Path(str(stopped.value).rpartition(" ")[2])
    resumed = resume_run(folder, QUIET)
    assert resumed["final_weights_sha256"] == whole["final_weights_sha256"]
    assert resumed["final_val_loss"] == whole["final_val_loss"]
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6, 6]
    with pytest.raises(UserError, match="finished"):
        resume_run(folder, QUIET)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(monkeypatch):
    real = Stepper.backward
    calls = []

    def poisoned(self, idx_BT, targets_BT):
        calls.append(1)
        loss = real(self, idx_BT, targets_BT)
        return loss * float("nan") if len(calls) == 5 else loss

    monkeypatch.setattr(Stepper, "backward", poisoned)
    with pytest.raises(RunFailed, match=r"not finite at step [1-6] of 6 .*training rows"):
        train()
    assert read_records(__import__("pathlib").Path("records"))[0] == []


def test_micro_batches_do_not_move_the_loss():
    losses = [train(f"train.micro_batch_rows={rows}")["final_val_loss"] for rows in (1, 3, 8)]
    assert max(losses) - min(losses) < 1e-4


def test_recomputed_activations_end_with_the_same_bits():
    plain, recomputed = train(), train("train.checkpoint_activations=block")
    assert plain["final_weights_sha256"] == recomputed["final_weights_sha256"]


def test_bf16_master_weights_learn():
    result = train("train.precision=bf16_master", record=False)
    assert result["final_val_loss"] < 4.2


def test_compiling_that_fails_is_said_and_the_run_goes_on(monkeypatch, capsys):
    def broken(*arguments, **options):
        def call(*arguments):
            raise RuntimeError("no C++ compiler here")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    console = Console(width=200)
    train_seeds("shakespeare-sprint", "muon", [*TINY, "train.compile=on"], 0, 1, {"record": False}, console)
    assert "going on without it: no C++ compiler here" in capsys.readouterr().out


def test_a_missed_target_fails_the_run_only_when_it_was_required():
    with pytest.raises(RunFailed, match=r"above the required 1\.88"):
        train(require_target=True)


def test_a_width_beyond_64_bits_is_refused_in_a_sentence():
    with pytest.raises(UserError, match=r"does not fit this machine .* make model\.n_embd"):
        train(f"model.n_embd={4 * 10**30}")
    with pytest.raises(
        UserError, match=r"make model\.n_embd, model\.ngram_buckets or model\.n_layer smaller"
    ):
        train("model.ngrams=[2]", f"model.ngram_buckets={10**15}")


def test_a_flipped_byte_in_a_checkpoint_is_refused_by_name():
    from pathlib import Path

    result = train(record=False)
    newest = checkpoint.checkpoints(Path(result["run"]) / "checkpoints")[0]
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is missing or not what was saved"):
        checkpoint.load(newest, run=checkpoint.identity(newest.parents[1]))


def test_the_command_line_prints_one_json_document_and_a_record_that_reads_back(tmp_path):
    words = [sys.executable, "-m", "nanorun", "train", "--track", "shakespeare-sprint", "--json"]
    words += [word for setting in TINY for word in ("--set", setting)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    keys = "run record reached steps final_val_loss initial_weights_sha256 final_weights_sha256 clock"
    assert set(keys.split()) <= set(result)
    assert all(len(result[f"{which}_weights_sha256"]) == 64 for which in ("initial", "final"))
    clock = {f"{what}_seconds" for what in ("train", "compile", "validation", "checkpoint", "total")}
    assert clock <= set(result["clock"])
    assert result["reached"] is None
    records, skipped = read_records(tmp_path / "records")
    assert (len(records), skipped) == (1, [])
    assert records[0].final_val_loss == result["final_val_loss"]


BAD = {
    "no track 'sotuu'": ["--track", "sotuu"],
    "Did you mean 'muon'": ["--optim", "muno"],
    "Did you mean 'train.steps'": ["--set", "train.stepz=3"],
    "train.steps = 'abc'": ["--set", "train.steps=abc"],
    "fixes model.n_layer = 3, and this run has 2": ["--set", "model.n_layer=2"],
    "shows 0 CUDA devices": ["--device", "cuda:7"],
    "no run here": ["--resume", "runs/none"],
    "make it with: nanorun prepare-data text": ["--track", "text"],
}


@pytest.mark.parametrize("said", BAD)
def test_a_mistake_gets_one_sentence_and_exit_code_2(said, monkeypatch, capsys):
    from nanorun import cli

    if "CUDA" in said and torch.cuda.is_available():
        pytest.skip("this machine has CUDA devices")
    monkeypatch.setattr(sys, "argv", ["nanorun", "train", *BAD[said]])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


HEAVY = ("torch", "numpy", "scipy", "pydantic", "rich", "psutil", "wandb", "pyarrow", "tiktoken")
HELP = "sys.argv = ['nanorun', '--help']; from nanorun import cli\ntry:\n    cli.main()\nexcept SystemExit:\n    pass"


@pytest.mark.parametrize(
    "code", ["import nanorun", "import nanorun.cli", HELP], ids=["package", "cli", "help"]
)
def test_importing_and_helping_load_no_heavy_package(code):
    code = f"import sys; {code}\nprint([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("[]"), done.stdout[-300:] + done.stderr


@pytest.mark.parametrize(
    "words", [["report"], ["compare", "a", "b"], ["power", "--sigma", "1", "--delta", "1"]]
)
def test_commands_that_train_nothing_load_no_torch(words, tmp_path):
    code = (
        f"import sys; sys.argv = ['nanorun', *{words}]\nfrom nanorun import cli\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip().endswith("False"), done.stdout[-300:] + done.stderr
