"""Save and restore a run: written beside, hashed in a manifest, renamed; checked before it is believed.

A checkpoint is a folder `step-<step>` of weights, optimizer state and what else the run needs, with a manifest that
names the run and the step and holds the length and sha256 of every file, and a sha256 of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanorun.data.shards import sha256_of
from nanorun.errors import UserError, first_line
from nanorun.training import sharding
from nanorun.training.saved import check_file, read_optimizer, read_state

FORMAT_VERSION = 2
FILES = ("model.safetensors", "optimizer.pt", "state.json")
EVALUATION = "evaluation.safetensors"
"""The weights a run is judged by, there only where they are not those it trains (an average, schedule-free)."""
MANIFEST = "manifest.json"
BACKGROUND_NICENESS = 19
"""Of the thread that writes: where it and a step want the same core, the step has it."""


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


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint will hold, copied: nothing that training does afterwards changes it."""

    step: int
    model: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, Any]
    state: str
    """JSON."""
    evaluation: Mapping[str, torch.Tensor] | None

    @classmethod
    def of(
        cls,
        step: int,
        *,
        model: Mapping[str, torch.Tensor],
        optimizer: Mapping[str, Any],
        state: Mapping[str, Any],
        evaluation: Mapping[str, torch.Tensor] | None = None,
    ) -> Snapshot:
        """Return copies on the CPU; `evaluation` are weights the run is judged by, where they are others."""
        return cls(
            step,
            _copied(_unshared(model)),
            _copied(optimizer),
            json.dumps(dict(state), allow_nan=False),
            None if evaluation is None else _copied(_unshared(evaluation)),
        )


def weights_sha256(model: torch.nn.Module) -> str:
    """Return the hash of all weights: name, dtype, shape and bytes of each, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        whole = sharding.whole(tensor).detach().cpu().contiguous()
        digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}\n".encode())
        digest.update(whole.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write(
    folder: Path,
    snapshot: Snapshot,
    *,
    run: str,
    keep: int,
    name: str = "",
    also: Path | None = None,
    passed_over: Collection[str] = (),
) -> Path:
    """Write `folder/step-<step>` whole or not at all, drop all but the newest `keep`, return its path.

    `run` says which run it belongs to. A checkpoint with a `name` of its own is none that is resumed from or dropped.
    `also` is a file that has to have reached the disk before the checkpoint counts. `passed_over` are the names of
    checkpoints that do not verify: they take the place of none that is kept.
    Raises UserError when the disk refuses; earlier checkpoints stay as they were.
    """
    final = folder / (name or f"step-{snapshot.step:08d}")
    beside = folder / f".{final.name}.partial"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        _fill(beside, snapshot, run)
        if also is not None:
            _sync(also)
        _remove(final)
        beside.rename(final)
        _sync(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save reports a full disk as RuntimeError, safetensors as an error of its own.
        shutil.rmtree(beside, ignore_errors=True)
        reason = first_line(error)
        raise UserError(
            f"{final}: the checkpoint could not be written ({reason}); earlier ones are untouched. "
            "Free some disk"
        ) from None
    whole = [one for one in checkpoints(folder) if one == final or one.name not in passed_over]
    for old in whole[keep:]:
        _remove(old)
    return final


def _fill(folder: Path, snapshot: Snapshot, run: str) -> None:
    """Write and sync every file of a checkpoint, the manifest last."""
    save_file(dict(snapshot.model), folder / FILES[0])
    torch.save(dict(snapshot.optimizer), folder / FILES[1])
    (folder / FILES[2]).write_text(snapshot.state)
    names = list(FILES)
    if snapshot.evaluation is not None:
        save_file(dict(snapshot.evaluation), folder / EVALUATION)
        names.append(EVALUATION)
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names
    }
    (folder / MANIFEST).write_text(manifest_text(run, snapshot.step, files))
    for name in (*names, MANIFEST):
        _sync(folder / name)
    _sync(folder)


def manifest_text(run: str, step: int, files: Mapping[str, Any]) -> str:
    """Return the manifest of a checkpoint whose `files` are names to bytes and sha256."""
    content = {"format_version": FORMAT_VERSION, "run": run, "step": step, "files": dict(files)}
    return json.dumps({**content, "sha256": hash_of_text(json.dumps(content))}, indent=1)


def _remove(folder: Path) -> None:
    """Remove a checkpoint: out of sight first, so that one half removed is never looked at."""
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    with suppress(FileNotFoundError):
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


class Saver:
    """Writes the checkpoints of a run beside its steps, one at a time.

    The thread that writes takes what a step leaves of the processor. It waits for the disk, and so holds nobody up.
    """

    def __init__(self, folder: Path, *, run: str, keep: int, also: Path | None = None) -> None:
        """`also` is as in `write`: the metrics up to the checkpoint."""
        self.folder, self.run, self.keep, self.also = folder, run, keep, also
        self.passed_over: set[str] = set()
        """Names of newer checkpoints than the one that the run was taken up from."""
        self._thread: threading.Thread | None = None
        self._problem: UserError | None = None

    def clear(self) -> None:
        """Remove what a killed run left half written or half removed."""
        for left in [*self.folder.glob(".step-*.partial"), *self.folder.glob(".step-*.old")]:
            shutil.rmtree(left, ignore_errors=True)

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, snapshot: Snapshot) -> None:
        """Begin to write; `wait` first, which tells how the one before ended."""
        assert self._thread is None, "one checkpoint at a time"
        # Daemonic: whoever stops at once does not wait for a large file.
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait for the thread; whatever becomes of its checkpoint, the run has ended otherwise."""
        with suppress(UserError):
            self.wait()

    def wait(self) -> None:
        """Wait until what was begun is written; raises UserError where it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._problem is not None:
            problem, self._problem = self._problem, None
            raise problem

    def _write(self, snapshot: Snapshot) -> None:
        with suppress(OSError, AttributeError):  # Linux has a niceness for each thread
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BACKGROUND_NICENESS)
        try:
            written = write(
                self.folder,
                snapshot,
                run=self.run,
                keep=self.keep,
                also=self.also,
                passed_over=self.passed_over,
            )
            self.passed_over.discard(written.name)
        except UserError as error:
            self._problem = error
        except Exception as error:  # a thread's error would be lost
            self._problem = UserError(f"{self.folder}: the checkpoint could not be written ({error})")


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders, newest first."""
    return sorted(
        (path for path in folder.glob("step-*") if path.is_dir() and not path.is_symlink()), reverse=True
    )


def newest_of(run: Path) -> tuple[Checkpoint, list[str]]:
    """Return the newest checkpoint that verifies of the run in a folder, as `load_newest` does."""
    return load_newest(run / "checkpoints", run=identity(run))


def load_newest(folder: Path, *, run: str) -> tuple[Checkpoint, list[str]]:
    """Return the newest checkpoint of `run` that verifies, and a line for each newer one passed over.

    Raises UserError when none does.
    """
    if folder.is_symlink():
        raise UserError(
            f"{folder}: is a link, and checkpoints are written and removed there; make it a folder"
        )
    passed_over: list[str] = []
    for path in checkpoints(folder):
        try:
            return load(path, run=run), passed_over
        except UserError as error:
            passed_over.append(str(error))
    if passed_over:
        raise UserError("no checkpoint verifies: " + "; ".join(passed_over))
    raise UserError(
        f"{folder}: no checkpoint here; a run saves one at its end, on Ctrl-C and every checkpoint.every_steps"
    )


def load(path: Path, *, run: str) -> Checkpoint:
    """Return the checkpoint at `path`; raises UserError naming the file that is missing or was changed."""
    names = _verified(path, run)
    try:
        optimizer = read_optimizer(path / FILES[1])
        state = read_state(path / FILES[2])
        model = load_file(path / FILES[0])
        evaluation = load_file(path / EVALUATION) if EVALUATION in names else model
        return Checkpoint(path, model, evaluation, optimizer, state)
    except UserError:
        raise
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        reason = first_line(error)
        raise UserError(f"{path} cannot be read ({reason}); remove this folder to use an older one") from None


def _verified(path: Path, run: str) -> list[str]:
    """Return the names of a checkpoint's files after comparing each with the manifest."""
    if path.is_symlink():
        raise UserError(f"{path}: is a link, and may lead anywhere; put the checkpoint itself there")
    try:
        check_file(path / MANIFEST)
        text = (path / MANIFEST).read_text()
        manifest = json.loads(text)
        version = manifest["format_version"]
        if version == FORMAT_VERSION:
            files = {
                str(name): (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()
            }
            owner, step = str(manifest["run"]), int(manifest["step"])
            whole = text == manifest_text(owner, step, manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: its {MANIFEST} is missing or broken ({error})") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: checkpoint format {version!r}, and this nanorun reads {FORMAT_VERSION}")
    if not whole:
        raise UserError(f"{path}: {MANIFEST} is not what was saved; remove this folder to use an older one")
    if path.name.startswith("step-") and path.name != f"step-{step:08d}":
        raise UserError(
            f"{path}: it was saved after step {step}, so its name is wrong; call it step-{step:08d}"
        )
    if owner != run:
        raise UserError(
            f"{path}: it belongs to a run with another config.toml; put it back into that run's folder, or this "
            "run's config.toml as it was"
        )
    if set(files) not in ({*FILES}, {*FILES, EVALUATION}):
        raise UserError(
            f"{path}: {MANIFEST} lists {', '.join(sorted(files))[:200]}; wanted {', '.join(FILES)} and perhaps "
            f"{EVALUATION}"
        )
    for name, found in files.items():
        file = path / name
        check_file(file)
        if (file.stat().st_size, sha256_of(file)) != found:
            raise UserError(
                f"{path}: {name} is missing or not what was saved; remove this folder to use an older one"
            )
    return list(files)


def hash_of_text(text: str) -> str:
    """Return the sha256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def identity(folder: Path) -> str:
    """Return what tells the checkpoints of the run in `folder` from those of another: its config's sha256."""
    return sha256_of(folder / "config.toml")


def _copied(value: Any) -> Any:
    """Return a copy of nested containers whose tensors are copies on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(one) for one in value)
    return value


def _unshared(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # safetensors refuses two names for one storage; a tied head is a single parameter of the model, and
    # only its first name is kept.
    seen: set[int] = set()
    kept = {}
    for name, tensor in weights.items():
        if tensor.data_ptr() not in seen or not tensor.numel():
            kept[name] = tensor.detach().contiguous()
            seen.add(tensor.data_ptr())
    return kept


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
