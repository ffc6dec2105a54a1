"""Save and restore a run: written beside, hashed in a manifest, renamed; checked before it is believed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanorun.data.shards import sha256_of
from nanorun.errors import UserError
from nanorun.training import sharding

FORMAT_VERSION = 1
FILES = ("model.safetensors", "optimizer.pt", "state.json")
EVALUATION = "evaluation.safetensors"
"""The weights a run is judged by, there only where they are not those it trains (an average, schedule-free)."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, read into memory on the CPU."""

    path: Path
    model: dict[str, torch.Tensor]
    """The weights that training goes on with."""
    evaluation: dict[str, torch.Tensor]
    """The weights that the run is judged by: `model`, or an average of it."""
    optimizer: dict[str, Any]
    state: dict[str, Any]
    """What else the run needs: step, clock, validation points, choices the machine made."""


def weights_sha256(model: torch.nn.Module) -> str:
    """Return the hash of all weights: name, dtype, shape and bytes of each, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        whole = sharding.whole(tensor).detach().cpu().contiguous()
        digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}\n".encode())
        digest.update(whole.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save(
    folder: Path,
    step: int,
    *,
    model: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, Any],
    state: Mapping[str, Any],
    evaluation: Mapping[str, torch.Tensor] | None = None,
    keep: int,
) -> Path:
    """Write `folder/step-<step>` whole or not at all, drop all but the newest `keep`, return its path.

    `evaluation` are weights the run is judged by, where they are others than the model's.
    Raises UserError when the disk is full; earlier checkpoints stay as they were.
    """
    final = folder / f"step-{step:08d}"
    beside = folder / f".{final.name}.partial"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        save_file(_unshared(model), beside / FILES[0])
        files = list(FILES)
        if evaluation is not None:
            save_file(_unshared(evaluation), beside / EVALUATION)
            files.append(EVALUATION)
        torch.save(dict(optimizer), beside / FILES[1])
        (beside / FILES[2]).write_text(json.dumps(dict(state), allow_nan=False))
        manifest = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "sha256": {name: sha256_of(beside / name) for name in files},
        }
        (beside / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for name in (*files, "manifest.json"):
            _sync(beside / name)
        shutil.rmtree(final, ignore_errors=True)
        beside.rename(final)
        _sync(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save reports a full disk as RuntimeError, safetensors as an error of its own.
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(
            f"{final}: the checkpoint could not be written ({error}); earlier ones are untouched. "
            "Free some disk, or move the run with --runs DIR"
        ) from None
    for old in checkpoints(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders, newest first."""
    return sorted((path for path in folder.glob("step-*") if path.is_dir()), reverse=True)


def load_newest(folder: Path) -> tuple[Checkpoint, list[str]]:
    """Return the newest checkpoint that verifies and a line for each newer one passed over.

    Raises UserError when none does.
    """
    passed_over: list[str] = []
    for path in checkpoints(folder):
        try:
            return load(path), passed_over
        except UserError as error:
            passed_over.append(str(error))
    if passed_over:
        raise UserError("no checkpoint verifies: " + "; ".join(passed_over))
    raise UserError(
        f"{folder}: no checkpoint here; a run saves one at its end, on Ctrl-C and every checkpoint.every_steps"
    )


def load(path: Path) -> Checkpoint:
    """Return the checkpoint at `path`; raises UserError naming the file that is missing or was changed."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        version, hashes = manifest["format_version"], dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: its manifest.json is missing or broken ({error})") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: checkpoint format {version!r}, and this nanorun reads {FORMAT_VERSION}")
    for name in (*FILES, EVALUATION) if EVALUATION in hashes else FILES:
        if not (path / name).is_file() or sha256_of(path / name) != hashes.get(name):
            raise UserError(
                f"{path}: {name} is missing or not what was saved; remove this folder to use an older one"
            )
    try:
        optimizer = torch.load(path / FILES[1], map_location="cpu", weights_only=True)
        state = json.loads((path / FILES[2]).read_text())
        model = load_file(path / FILES[0])
        evaluation = load_file(path / EVALUATION) if EVALUATION in hashes else model
        return Checkpoint(path, model, evaluation, optimizer, state)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read ({reason}); remove this folder to use an older one") from None


def _unshared(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # safetensors refuses two names for one storage; a tied head is a single parameter of the model, and
    # only its first name is kept.
    seen: set[int] = set()
    kept = {}
    for name, tensor in weights.items():
        if tensor.data_ptr() not in seen or not tensor.numel():
            kept[name] = tensor.detach().cpu().contiguous()
            seen.add(tensor.data_ptr())
    return kept


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
