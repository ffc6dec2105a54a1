"""nanorun beside nanoGPT on one machine: to a loss, and with the same model.

    python scripts/bench_race.py sprint --nanogpt DIR [--optim muon] [--seeds 5] [--repeats 2] [--out JSON]
    python scripts/bench_race.py target [--optim muon] [--seeds 3] [--out JSON]
    python scripts/bench_race.py like-for-like --nanogpt DIR [--rounds 4] [--iterations 150] [--out JSON]

DIR is a checkout of nanoGPT. What runs is a copy of its code, on the tokens that its own prepare.py would make,
written from the text that nanorun holds. Both sides run in processes of their own, by turns, neither compiled
nor given other threads than the other (`sprint` and `target` leave `--compile` to nanorun's `auto`).

`sprint`: nanorun's seconds to the track's target, counted from the first step, validation and checkpoints aside,
beside the training seconds of the 2,000 iterations that nanoGPT documents for a CPU. nanoGPT times each iteration
from the end of the one before, so those that begin with an evaluation hold it: each of them is counted as the
median of the others, and the iteration after the 2,000th, which trains once more behind the last evaluation, is
left out. `--iterations` runs fewer and scales. Its last weights are read over the whole validation tenth, as ours.

`target`: nanorun's seconds to 1.4697, beside the three minutes on an A100 that nanoGPT documents for it.

`like-for-like`: tokens/s of nanoGPT's model, batch and AdamW, in nanoGPT and in nanorun (its preset `nanogpt`),
the first iterations of each turn aside. That they are the same is checked first: from nanoGPT's initial weights,
both must find the same losses over a few steps. The share of the best GEMM rate of the same run is told for both,
by GPT.flops_per_token.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from figures import write_figures
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nanorun.config import resolve
from nanorun.data.batches import open_tokens, token_set
from nanorun.data.prepare import default_out, prepare
from nanorun.doctor import gemm_gflops
from nanorun.errors import RunFailed, UserError
from nanorun.model import GPT
from nanorun.optim.build import build_optimizers
from nanorun.tracks import load_track
from nanorun.training.distributed import Ranks
from nanorun.training.evaluate import validation_loss
from nanorun.training.machine import code_identity
from nanorun.training.step import Stepper

DOCUMENTED = (
    *("config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20"),
    *("--log_interval=1", "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128"),
    *("--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
)
"""What nanoGPT's README gives train.py for a CPU."""
ITERATIONS = 2000
TOKENS = 12 * 64
"""Of one of its iterations."""
SPRINT, TARGET, SAME = "shakespeare-sprint", "shakespeare", "nanogpt"
"""The tracks of nanoGPT's two results, and the preset of its CPU run under the first."""
DOCUMENTED_TARGET = "1.4697 in about 3 minutes on an A100 (nanoGPT's README; not run here)"
WANTED_SPRINT, WANTED_SAME, BAR_MINUTES, AMBITION_MINUTES = 50.0, 1.4, 10.0, 3.0
SETTLING = 10
"""First iterations of a turn that are not counted: nanoGPT's first holds an evaluation, and neither is warm."""
COMPARED_STEPS = 5
"""Over which the losses of the two may differ by TOLERANCE nats."""
TOLERANCE = 1e-5
LOG_LINE = re.compile(r"^iter (\d+): loss \S+, time ([\d.]+)ms", re.MULTILINE)
EVALUATION = re.compile(r"^step (\d+): train loss \S+, val loss (\S+)$", re.MULTILINE)
THEIR_STEPS = """
import sys
import torch
from model import GPT, GPTConfig
shape, betas = dict(n_layer=4, n_head=4, n_embd=128, block_size=64, bias=False, dropout=0.0), (0.9, 0.99)
idx, targets, vocab_size, steps = torch.load(sys.argv[1])
torch.manual_seed(1)
model = GPT(GPTConfig(vocab_size=vocab_size, **shape))
weights = {name: weight.clone() for name, weight in model.state_dict().items()}
optimizer, losses = model.configure_optimizers(0.1, 1e-3, betas, "cpu"), []
for _ in range(steps):
    loss = model(idx, targets)[1]
    losses.append(loss.item())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
torch.save((weights, losses), sys.argv[2])
"""
"""A program of the checkout's model and optimizer: the weights it begins with, and a loss before each step."""
RENAMED = (
    *(("transformer.h.", "blocks."), ("transformer.ln_f", "norm_f"), ("transformer.", "")),
    *((".ln_1.", ".norm_1."), (".ln_2.", ".norm_2."), (".c_attn.", ".qkv."), (".c_proj.", ".proj.")),
    (".c_fc.", ".fc."),
)


class Place(NamedTuple):
    """A temporary folder: the corpus, nanorun's runs, and a copy of nanoGPT."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def corpus(self) -> Path:
        return default_out("shakespeare", root=self.data)

    @property
    def nanogpt(self) -> Path:
        return self.folder / "nanogpt"

    def lay_out(self, checkout: Path | None) -> None:
        """Prepare the corpus, and copy a checkout's code beside the same tokens in nanoGPT's form."""
        prepare("shakespeare", out=self.corpus)
        if checkout is None:
            return
        self.nanogpt.mkdir()
        for path in checkout.glob("*.py"):
            shutil.copy(path, self.nanogpt)
        shutil.copytree(checkout / "config", self.nanogpt / "config")
        there = self.nanogpt / "data" / "shakespeare_char"
        there.mkdir(parents=True)
        for split in ("train", "val"):
            tokens = open_tokens(self.corpus, split)
            tokens.slice(0, tokens.n_tokens).astype("uint16").tofile(there / f"{split}.bin")
        (there / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": self.vocab_size}))

    @property
    def vocab_size(self) -> int:
        manifest = open_tokens(self.corpus, "val").manifest
        assert manifest is not None
        return manifest.vocab_size


def check_checkout(folder: Path) -> dict[str, Any]:
    """Return the commit of a checkout of nanoGPT, None outside git, and whether its code was changed since."""
    for name in ("train.py", "model.py", "configurator.py", DOCUMENTED[0]):
        if not (folder / name).is_file():
            raise UserError(
                f"--nanogpt {folder}: no {name} there, so no checkout of nanoGPT: clone github.com/karpathy/nanoGPT "
                "and name its folder"
            )

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    if not shutil.which("git") or git("rev-parse", "--show-toplevel") != str(folder.resolve()):
        return {"commit": None, "changed": None}
    return {
        "commit": git("rev-parse", "HEAD"),
        "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
    }


def run_process(name: str, words: Sequence[str], folder: Path | None = None) -> str:
    """Return what a process prints; RunFailed with its last lines where it fails."""
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-10:])
        raise RunFailed(f"{name} ended with exit code {done.returncode}:\n{last}")
    return done.stdout


def run_nanogpt(place: Place, *changes: str) -> str:
    """Return the log of nanoGPT's documented run, with changes at the end of its command."""
    return run_process("nanoGPT", [sys.executable, "train.py", *DOCUMENTED, *changes], place.nanogpt)


def run_nanorun(place: Place, track: str, preset: str, seed: int, *words: str) -> dict[str, Any]:
    """Return the result of one `nanorun train`."""
    command = [
        sys.executable,
        "-m",
        "nanorun",
        "train",
        "--track",
        track,
        "--optim",
        preset,
        "--seed",
        str(seed),
    ]
    where = ["--device", "cpu", "--data", str(place.data), "--runs", str(place.folder / "runs")]
    result: dict[str, Any] = json.loads(
        run_process("nanorun train", [*command, *where, "--no-record", "--json", *words])
    )
    return result


def training_seconds(log: str, iterations: int) -> list[float]:
    """Return the seconds of each of nanoGPT's first iterations, those that hold an evaluation as the median.

    RunFailed where the log does not hold them all.
    """
    seconds = {int(number): float(ms) / 1e3 for number, ms in LOG_LINE.findall(log)}
    missing = [number for number in range(iterations) if number not in seconds]
    evaluated = {int(number) for number, _ in EVALUATION.findall(log)}
    plain = [seconds[number] for number in range(iterations) if number in seconds and number not in evaluated]
    if missing or not plain:
        raise RunFailed(
            f"nanoGPT's log lacks {len(missing)} of {iterations} lines 'iter N: loss …, time …ms'; it ends with:\n"
            + "\n".join(log.splitlines()[-10:])
        )
    usual = statistics.median(plain)
    return [usual if number in evaluated else seconds[number] for number in range(iterations)]


def in_turn(counts: dict[str, int]) -> list[str]:
    """Return each name as often as asked, spread evenly: the middles of equal parts of the time, in order."""
    places = [((part + 0.5) / n, name) for name, n in counts.items() for part in range(n)]
    return [name for _, name in sorted(places)]


def ours_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return nanoGPT's weights under nanorun's names; its head is the embedding."""
    renamed = {}
    for name, weight in weights.items():
        for theirs, ours in RENAMED:
            name = name.replace(theirs, ours)
        renamed[name] = weight
    renamed.pop("lm_head.weight", None)
    return renamed


def same_model(place: Place) -> GPT:
    """Return a model of nanoGPT's shape, with torch's weights."""
    return GPT(resolve(load_track(SPRINT), SAME).model, place.vocab_size)


def whole_loss(model: GPT, place: Place) -> float:
    """Return the loss over the whole validation tenth, read as a run of the track reads it."""
    context_len, cpu = model.config.context_len, torch.device("cpu")
    return validation_loss(
        model,
        open_tokens(place.corpus, "val"),
        n_tokens=0,
        context_len=context_len,
        stride=context_len,
        device=cpu,
        ranks=Ranks(),
        autocast=torch.autocast("cpu", enabled=False),
    )[0]


def check_same(place: Place) -> list[float]:
    """Return the losses of a few steps from nanoGPT's initial weights; RunFailed where nanorun's differ."""
    tokens = open_tokens(place.corpus, "train").slice(0, TOKENS + 1)
    idx_BT, targets_BT = (torch.from_numpy(part).view(12, 64) for part in (tokens[:-1], tokens[1:]))
    asked, found = place.folder / "asked.pt", place.folder / "found.pt"
    torch.save((idx_BT, targets_BT, place.vocab_size, COMPARED_STEPS), asked)
    run_process("nanoGPT", [sys.executable, "-c", THEIR_STEPS, str(asked), str(found)], place.nanogpt)
    weights, theirs = torch.load(found, weights_only=True)
    ours = own_steps(same_model(place), ours_of(weights), idx_BT, targets_BT)
    apart = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
    if not apart <= TOLERANCE:
        raise RunFailed(
            f"nanorun's preset {SAME!r} is not nanoGPT's run: from the same weights and batch the losses of "
            f"{COMPARED_STEPS} steps are {theirs} there and {ours} here, wanted within {TOLERANCE}"
        )
    return ours


def own_steps(model: GPT, weights: dict[str, Tensor], idx_BT: Tensor, targets_BT: Tensor) -> list[float]:
    """Return nanorun's loss before each of a few steps of the preset on one batch, from given weights."""
    config = resolve(load_track(SPRINT), SAME)
    model.load_state_dict(weights)
    optimizers = build_optimizers(model, config.optim_by_role)
    tokens = token_set([idx_BT.flatten().numpy()])
    stepper = Stepper(model, optimizers, tokens, config, device=torch.device("cpu"), ranks=Ranks())
    losses = []
    for _ in range(COMPARED_STEPS):
        loss = stepper.backward(idx_BT, targets_BT) / config.train.batch_tokens
        losses.append(float(loss))
        stepper.update(loss, 1.0, torch.zeros(()))
    stepper.close()
    return losses


def to_target(place: Place, track: str, preset: str, seed: int) -> dict[str, Any]:
    """Return seconds and step at which one run reached the track's target, None where it did not, and its end."""
    result = run_nanorun(place, track, preset, seed)
    reached = result["reached"] or {"seconds": None, "step": None}
    row = {
        "side": "nanorun",
        "seed": seed,
        **reached,
        "run_steps": result["steps"],
        "run_seconds": result["clock"]["train_seconds"],
        "compile_seconds": result["clock"]["compile_seconds"],
        "val_loss": result["final_val_loss"],
    }
    told = "misses" if row["seconds"] is None else f"{row['seconds']:.2f} s to"
    print(f"nanorun {preset}, seed {seed}: {told} the target, ends at {row['val_loss']:.4f}", file=sys.stderr)
    return row


def nanogpt_whole(place: Place, iterations: int) -> dict[str, Any]:
    """Return the training seconds of nanoGPT's 2,000 iterations, measured or scaled, and the loss it ends at."""
    log = run_nanogpt(place, f"--max_iters={iterations}", "--always_save_checkpoint=True", "--out_dir=out")
    seconds = training_seconds(log, iterations)
    row: dict[str, Any] = {
        "side": "nanogpt",
        "seconds": sum(seconds) * ITERATIONS / iterations,
        "median_ms": statistics.median(seconds) * 1e3,
        "iterations_run": iterations,
    }
    readings = dict(EVALUATION.findall(log))
    if iterations == ITERATIONS and str(ITERATIONS) in readings:
        saved = torch.load(place.nanogpt / "out" / "ckpt.pt", weights_only=True)
        model = same_model(place)
        model.load_state_dict(ours_of(saved["model"]))
        row |= {"own_estimate": float(readings[str(ITERATIONS)]), "val_loss": whole_loss(model, place)}
    print(f"nanoGPT: {row['seconds']:.1f} s for {ITERATIONS} iterations", file=sys.stderr)
    return row


def mean_seconds(rows: Sequence[dict[str, Any]], side: str) -> float | None:
    """Return the mean seconds of one side; None where a run of it missed its target."""
    seconds = [row["seconds"] for row in rows if row["side"] == side]
    return None if None in seconds else statistics.mean(seconds)


def sprint(asked: argparse.Namespace, place: Place) -> dict[str, Any]:
    rows, seeds = [], iter(range(asked.seeds))
    for side in in_turn({"nanorun": asked.seeds, "nanogpt": asked.repeats}):
        if side == "nanorun":
            rows.append(to_target(place, SPRINT, asked.optim, next(seeds)))
        else:
            rows.append(nanogpt_whole(place, asked.iterations))
    ours, theirs = mean_seconds(rows, "nanorun"), mean_seconds(rows, "nanogpt")
    assert theirs is not None
    return {
        "target_val_loss": load_track(SPRINT).target_val_loss,
        "rows": rows,
        "nanorun_seconds": ours,
        "nanogpt_seconds": theirs,
        "ratio": ours and theirs / ours,
        "wanted_ratio": WANTED_SPRINT,
    }


def target(asked: argparse.Namespace, place: Place) -> dict[str, Any]:
    rows = [to_target(place, TARGET, asked.optim, seed) for seed in range(asked.seeds)]
    return {
        "target_val_loss": load_track(TARGET).target_val_loss,
        "rows": rows,
        "nanorun_seconds": mean_seconds(rows, "nanorun"),
        "bar_minutes": BAR_MINUTES,
        "ambition_minutes": AMBITION_MINUTES,
        "nanogpt_documents": DOCUMENTED_TARGET,
    }


def turn_of_nanogpt(place: Place, iterations: int) -> float:
    """Return nanoGPT's tokens/s over a turn."""
    log = run_nanogpt(place, f"--max_iters={iterations}", "--eval_iters=1", "--out_dir=out")
    return TOKENS / statistics.mean(training_seconds(log, iterations)[SETTLING:])


def turn_of_nanorun(place: Place, iterations: int) -> float:
    """Return nanorun's tokens/s over a turn, each step logged as nanoGPT logs each."""
    settings = [f"train.steps={iterations}", "validation.every_steps=0", "validation.from_step=0"]
    settings += ["checkpoint.every_steps=0", "log.every_steps=1"]
    words = [word for setting in settings for word in ("--set", setting)]
    result = run_nanorun(place, SPRINT, SAME, 0, "--compile", "off", *words)
    lines = (Path(result["run"]) / "metrics.jsonl").read_text().splitlines()
    seconds = {row["step"]: row["train_seconds"] for row in map(json.loads, lines) if "loss" in row}
    rate: float = TOKENS * (iterations - SETTLING) / (seconds[iterations] - seconds[SETTLING])
    return rate


def like_for_like(asked: argparse.Namespace, place: Place) -> dict[str, Any]:
    losses = check_same(place)
    turns = [("nanogpt", turn_of_nanogpt), ("nanorun", turn_of_nanorun)]
    rows, rate = [], gemm_gflops()
    for _ in range(asked.rounds):
        rows.append({side: turn(place, asked.iterations) for side, turn in turns})
        rate = max(rate, gemm_gflops())
        print(", ".join(f"{side} {rows[-1][side]:,.0f} tokens/s" for side, _ in turns), file=sys.stderr)
        turns.reverse()
    tokens = {side: statistics.median(row[side] for row in rows) for side in ("nanogpt", "nanorun")}
    flops = same_model(place).flops_per_token()
    return {
        "rounds": rows,
        "compared_losses": losses,
        "n_parameters": same_model(place).n_parameters(),
        "flops_per_token": flops,
        "gemm_gflops": rate,
        "tokens_per_second": tokens,
        "share_of_gemm": {side: flops * value / 1e9 / rate for side, value in tokens.items()},
        "ratio": statistics.median(row["nanorun"] / row["nanogpt"] for row in rows),
        "wanted_ratio": WANTED_SAME,
    }


def race_table(found: dict[str, Any], preset: str) -> Table:
    """Return the runs of `sprint` or `target`, and their means."""
    table = Table("side", "seconds", "step", "its end", title=f"to {found['target_val_loss']} nats a token")
    for row in found["rows"]:
        seconds = "missed" if row["seconds"] is None else f"{row['seconds']:.2f}"
        end = f"{row['val_loss']:.4f}" if "val_loss" in row else f"scaled from {row['iterations_run']}"
        if row["side"] == "nanogpt":
            table.add_row("nanoGPT", seconds, str(ITERATIONS), end)
        else:
            table.add_row(f"nanorun {preset}, seed {row['seed']}", seconds, str(row["step"] or ""), end)
    ours = found["nanorun_seconds"]
    table.add_section()
    table.add_row("nanorun, mean", "a seed missed" if ours is None else f"{ours:.2f}", "", "")
    if "nanogpt_seconds" in found:
        table.add_row("nanoGPT, mean", f"{found['nanogpt_seconds']:.2f}", "", "")
        table.add_row("ratio", told(found["ratio"]), "", f"wanted {found['wanted_ratio']:g}")
    else:
        table.add_row("nanoGPT", "180", "", found["nanogpt_documents"])
        bars = f"bar {found['bar_minutes']:g}, ambition {found['ambition_minutes']:g}"
        table.add_row("minutes", told(ours and ours / 60), "", bars)
    return table


def told(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def same_table(found: dict[str, Any]) -> Table:
    """Return the rates of `like-for-like`."""
    title = f"{found['n_parameters']:,} parameters, {TOKENS} tokens a step, GEMM {found['gemm_gflops']:.0f} GFLOP/s"
    table = Table("side", "tokens/s", "share of GEMM", "by round", title=title)
    for side, tokens in found["tokens_per_second"].items():
        by_round = " ".join(f"{row[side]:.0f}" for row in found["rounds"])
        table.add_row(side, f"{tokens:,.0f}", f"{found['share_of_gemm'][side]:.2f}", by_round)
    ratios = " ".join(f"{row['nanorun'] / row['nanogpt']:.2f}" for row in found["rounds"])
    table.add_row("ratio", told(found["ratio"]), f"wanted {found['wanted_ratio']:g}", ratios)
    return table


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    races = parser.add_subparsers(dest="what", required=True)
    for name, does in (("sprint", sprint), ("target", target), ("like-for-like", like_for_like)):
        race = races.add_parser(name)
        race.set_defaults(does=does, nanogpt=None)
        race.add_argument("--out", type=Path, metavar="JSON", help="a file for the figures")
        if name != "target":
            race.add_argument("--nanogpt", type=Path, metavar="DIR", required=True)
        if name != "like-for-like":
            race.add_argument("--optim", default="muon", help="the preset")
            race.add_argument("--seeds", type=int, default=5 if name == "sprint" else 3)
    races.choices["sprint"].add_argument("--repeats", type=int, default=2, help="runs of nanoGPT")
    races.choices["sprint"].add_argument(
        "--iterations", type=int, default=ITERATIONS, help="of nanoGPT's run"
    )
    races.choices["like-for-like"].add_argument("--rounds", type=int, default=4)
    races.choices["like-for-like"].add_argument("--iterations", type=int, default=150, help="of a turn")
    return parser


def checked(asked: argparse.Namespace) -> dict[str, Any]:
    """Return what is known of the contenders before anything runs; UserError for what cannot run."""
    for name, least in (("seeds", 1), ("repeats", 1), ("rounds", 1), ("iterations", 2 * SETTLING)):
        value = getattr(asked, name, least)
        if value < least:
            raise UserError(f"--{name} {value}: wanted {least} or more")
    if asked.what == "sprint" and asked.iterations > ITERATIONS:
        raise UserError(f"--iterations {asked.iterations}: wanted at most nanoGPT's {ITERATIONS}")
    preset = getattr(asked, "optim", SAME)
    resolve(load_track(TARGET if asked.what == "target" else SPRINT), preset)
    about: dict[str, Any] = {"what": asked.what, "preset": preset, "code": code_identity()[0]}
    if asked.nanogpt is not None:
        about["nanogpt"] = {**check_checkout(asked.nanogpt), "command": " ".join(["train.py", *DOCUMENTED])}
    return about


def command_of(asked: argparse.Namespace) -> list[str]:
    """Return the words of a command for its figures, every option told and no folder of this machine."""
    words = [asked.what] + ([] if asked.nanogpt is None else ["--nanogpt", "DIR"])
    for name in ("optim", "seeds", "repeats", "rounds", "iterations"):
        if hasattr(asked, name):
            words += [f"--{name}", str(getattr(asked, name))]
    return words


def main(words: Sequence[str] | None = None) -> int:
    asked = make_parser().parse_args(words)
    try:
        about = checked(asked)
        with tempfile.TemporaryDirectory() as name:
            place = Place(Path(name))
            place.lay_out(asked.nanogpt)
            found = asked.does(asked, place)
    except (UserError, RunFailed) as error:
        print(f"bench_race: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, UserError) else 1
    console = Console()
    console.print(same_table(found) if asked.what == "like-for-like" else race_table(found, about["preset"]))
    if asked.out:
        write_figures(asked.out, "bench_race.py", command_of(asked), **about, **found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
