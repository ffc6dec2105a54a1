"""Damage checkpoints in every way that a disk, a copy or a mistake can, and count what is loaded all the same.

Single bits are flipped at random places, as many in each file of a checkpoint, its manifest too; files are cut short,
removed and exchanged between checkpoints, and whole checkpoints between runs. `refused by name` means that the error
names the checkpoint and the file. Beside it the same flips in the files that torch.save and safetensors write of the
same model and optimizers, read with torch.load and load_file as they come.

    python scripts/flip_bits.py --flips 300 --out records/benchmarks/flips.json
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from nanorun.config import ModelConfig
from nanorun.errors import UserError
from nanorun.model import GPT
from nanorun.optim.build import OptimizerSet, build_optimizers
from nanorun.training import checkpoint
from nanorun.training.machine import software

VOCAB_SIZE = 256
STEPS = (100, 200)
RUNS = ("a" * 64, "b" * 64)
"""The identities of two runs of one config but for the seed."""


def trained(seed: int, n_steps: int) -> tuple[GPT, OptimizerSet]:
    """Return a small model and its optimizers after some steps on made-up tokens."""
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=64, context_len=32), VOCAB_SIZE)
    model.initialise(seed)
    matrix = {"name": "muon", "lr": 0.02}
    optimizers = build_optimizers(model, {"matrix": matrix, "default": {"name": "adamw", "lr": 0.003}})
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_steps):
        idx_BT = torch.randint(VOCAB_SIZE, (4, 33), generator=generator)
        logits_BTV = model(idx_BT[:, :-1])
        torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), idx_BT[:, 1:].flatten()).backward()
        optimizers.step()
        optimizers.zero_grad()
    return model, optimizers


def saved_runs(place: Path) -> list[list[Path]]:
    """Return the checkpoints of two runs, two of each, with weights to be judged by beside those that train."""
    runs = []
    for seed, run in enumerate(RUNS):
        paths = []
        for step in STEPS:
            model, optimizers = trained(seed, n_steps=1 + step // 100)
            snapshot = checkpoint.Snapshot.of(
                step,
                model=model.state_dict(),
                optimizer=optimizers.state_dict(),
                state={"step": step, "clock": {"train": 1.5 * step + seed}},
                evaluation={name: tensor / 2 for name, tensor in model.state_dict().items()},
            )
            paths.append(checkpoint.write(place / f"run-{seed}" / "checkpoints", snapshot, run=run, keep=2))
        runs.append(paths)
    return runs


def outcome(path: Path, run: str, files: Sequence[str]) -> str:
    """Return what loading a checkpoint comes to whose `files` were damaged."""
    try:
        checkpoint.load(path, run=run)
    except UserError as error:
        named = path.name in str(error) and any(name in str(error) for name in files)
        return "refused by name" if named else "refused"
    return "loaded silently"


def flip(path: Path, draw: random.Random) -> tuple[int, int]:
    """Flip one bit of a file and return its place, which `unflip` takes back."""
    place = draw.randrange(path.stat().st_size), draw.randrange(8)
    unflip(path, place)
    return place


def unflip(path: Path, place: tuple[int, int]) -> None:
    at, bit = place
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def flips_in_a_checkpoint(path: Path, n_flips: int, draw: random.Random) -> dict[str, dict[str, int]]:
    """Return for each file of a checkpoint what came of its share of `n_flips` flips, each undone after."""
    names = sorted(one.name for one in path.iterdir())
    counts = {name: Counter[str]() for name in names}
    for n in range(n_flips):
        name = names[n % len(names)]
        place = flip(path / name, draw)
        counts[name][outcome(path, RUNS[0], [name])] += 1
        unflip(path / name, place)
    assert outcome(path, RUNS[0], []) == "loaded silently", "the checkpoint is not what it was"
    return {name: dict(count) for name, count in counts.items()}


def flips_elsewhere(
    path: Path, load: Callable[[Path], Any], n_flips: int, draw: random.Random
) -> dict[str, int]:
    """Return what came of flips in a file of another kind."""
    counts: Counter[str] = Counter()
    for _ in range(n_flips):
        place = flip(path, draw)
        try:
            load(path)
            counts["loaded silently"] += 1
        except Exception:  # whatever the damage makes the reader raise
            counts["refused"] += 1
        unflip(path, place)
    return dict(counts)


def other_damage(runs: list[list[Path]], place: Path, draw: random.Random) -> dict[str, dict[str, int]]:
    """Return what came of every other kind of damage, each done to a fresh copy."""
    mine, earlier, theirs = runs[0][1], runs[0][0], runs[1][1]
    counts: dict[str, Counter[str]] = {}

    def tried(kind: str, damage: Callable[..., Any], *words: Any, of: str, name: str = mine.name) -> None:
        copy = place / name
        shutil.copytree(mine, copy)
        damage(copy, *words)
        counts.setdefault(kind, Counter())[outcome(copy, RUNS[0], [of])] += 1
        shutil.rmtree(copy)

    for file in sorted(mine.iterdir()):
        for _ in range(10):
            tried("files cut short", _cut, file.name, draw.randrange(file.stat().st_size), of=file.name)
        tried("files removed", _remove, file.name, of=file.name)
        # A manifest from elsewhere fits neither the folder nor the files.
        of = mine.name if file.name == checkpoint.MANIFEST else file.name
        tried("files of another step", _exchange, earlier / file.name, of=of)
        tried("files of another run", _exchange, theirs / file.name, of=of)
    tried("checkpoints of another run", _replace, theirs, of="config.toml")
    tried("checkpoints under another step", lambda copy: None, of=mine.name, name=f"step-{STEPS[1] + 1:08d}")
    return {kind: dict(count) for kind, count in counts.items()}


def _cut(copy: Path, name: str, length: int) -> None:
    (copy / name).write_bytes((copy / name).read_bytes()[:length])


def _remove(copy: Path, name: str) -> None:
    (copy / name).unlink()


def _exchange(copy: Path, other: Path) -> None:
    shutil.copyfile(other, copy / other.name)


def _replace(copy: Path, other: Path) -> None:
    shutil.rmtree(copy)
    shutil.copytree(other, copy)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flips", type=int, default=300, help="In a checkpoint, and in each file beside it.")
    parser.add_argument("--seed", type=int, default=0, help="Of the places.")
    parser.add_argument("--out", type=Path, help="Where the figures go, as JSON.")
    options = parser.parse_args(argv)
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        runs = saved_runs(place)
        model, optimizers = trained(0, n_steps=2)
        torch_file, tensor_file = place / "plain.pt", place / "plain.safetensors"
        torch.save({"model": model.state_dict(), "optimizer": optimizers.state_dict()}, torch_file)
        save_file(model.state_dict(), tensor_file)
        document = {
            "command": f"python scripts/flip_bits.py --flips {options.flips} --seed {options.seed}",
            "software": software(False),
            "bytes": {one.name: one.stat().st_size for one in sorted(runs[0][1].iterdir())},
            "checkpoint": flips_in_a_checkpoint(runs[0][1], options.flips, draw),
            "torch.save": flips_elsewhere(
                torch_file, lambda path: torch.load(path, weights_only=True), options.flips, draw
            ),
            "safetensors": flips_elsewhere(tensor_file, load_file, options.flips, draw),
            "other damage": other_damage(runs, place / "copies", draw),
        }
    text = json.dumps(document, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
