"""What the files of a checkpoint may hold, looked at before anything is made of them.

A manifest's hashes find what was changed by accident. Whoever makes a checkpoint makes its manifest too, so its
files are read as a stranger's: no code runs, nothing is unpacked beyond the file's own size, and what does not fit
is refused by the file's name.
"""

from __future__ import annotations

import json
import math
import stat
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanorun.errors import UserError, first_line, shown
from nanorun.model import CHEAPEST_FIRST
from nanorun.optim.build import OptimizerSet
from nanorun.records.record import (
    Code,
    MixedCorpus,
    Reached,
    RecordError,
    ValidationPoint,
    read_fields,
)
from nanorun.training.outcome import Outcome

MOST_STATE_BYTES = 20_000_000
"""Of state.json; ours have kilobytes."""
MOST_PICKLE_BYTES = 50_000_000
"""Of the part of an optimizer's file that says what lies where; the tensors' own bytes are no part of it."""
MOST_THREADS = 4096
MEND = "remove this folder to use an older one"


@dataclass(frozen=True)
class _Choices:
    """What the machine chose, as `setup.choices` has it."""

    micro_batch_rows: int
    compiled: bool
    n_threads: int
    n_ranks: int
    torch: str
    hardware: str
    checkpoint_activations: str = "none"


@dataclass(frozen=True)
class _State:
    """state.json, its clock aside."""

    step: int
    choices: _Choices
    outcome: Outcome
    corpus_sha256: str | None
    tokenizer: dict[str, Any] | None
    mix: tuple[MixedCorpus, ...] = ()
    saved: float = 0.0


@dataclass(frozen=True)
class _Readings:
    """The parts of an Outcome that a record holds, as a record wants them."""

    validation: tuple[ValidationPoint, ...]
    reached: Reached | None
    code: Code


def check_file(path: Path) -> None:
    """Raise UserError unless `path` is a file in its own right: no link, no pipe, no folder."""
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise UserError(
            f"{path.parent}: {path.name} is missing or not what was saved ({error.strerror}); {MEND}"
        ) from None
    if not stat.S_ISREG(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "no file"
        raise UserError(f"{path.parent}: {path.name} is missing or not what was saved (it is {kind}); {MEND}")


def read_state(path: Path) -> dict[str, Any]:
    """Return the object in a state.json; UserError for anything else."""
    check_file(path)
    try:
        if path.stat().st_size > MOST_STATE_BYTES:
            raise ValueError(f"more than {MOST_STATE_BYTES:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({_first_line(error)}); {MEND}") from None
    return content


def check_state(state: Mapping[str, Any], path: Path, *, steps: int) -> None:
    """Raise UserError that names the first key of a checkpoint's state that is missing or no value of its kind."""
    try:
        found: _State = read_fields(_State, dict(state))
        read_fields(_Readings, vars(found.outcome))
        if found.step > steps:
            raise RecordError(f"is {found.step}, of a run of {steps} steps", "step")
        if found.choices.micro_batch_rows < 1:
            raise RecordError("is 0; wanted a row or more", "choices.micro_batch_rows")
        if not 1 <= found.choices.n_threads <= MOST_THREADS:
            raise RecordError(
                f"is {found.choices.n_threads}; wanted 1 to {MOST_THREADS}", "choices.n_threads"
            )
        if found.choices.checkpoint_activations not in CHEAPEST_FIRST:
            raise RecordError(
                f"is {ascii(found.choices.checkpoint_activations)[:60]}; wanted {', '.join(CHEAPEST_FIRST)}",
                "choices.checkpoint_activations",
            )
        clock = state.get("clock")
        if not isinstance(clock, dict) or not all(_is_seconds(value) for value in clock.values()):
            raise RecordError(f"is {ascii(clock)[:60]}; wanted seconds by their reason", "clock")
    except RecordError as error:
        raise UserError(f"{path / 'state.json'}: {error}; {MEND}") from None


def read_optimizer(path: Path) -> dict[str, Any]:
    """Return what torch saved of the optimizers, as plain containers and tensors on the CPU; UserError for all else.

    The archive has to hold its bytes as they are, so that what is read is never larger than the file.
    """
    check_file(path)
    try:
        _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        _check_plain(content, path.stat().st_size)
    except Exception as error:  # a damaged pickle makes torch raise whatever the damage leads to
        raise UserError(f"{path} cannot be read ({_first_line(error)}); {MEND}") from None
    return dict(content)


def _check_archive(path: Path) -> None:
    """Raise ValueError for an archive that would unpack to more than itself, or that two readers read differently."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if _directory_offsets(path, size) != {archive.start_dir}:
            raise ValueError("its directory lies elsewhere than it says")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed, and a run does not compress")
    if any(entry.file_size != entry.compress_size for entry in entries):
        raise ValueError("it gives two sizes for one part")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError(f"it says that it holds more than its own {size:,} bytes")
    if any(entry.file_size > MOST_PICKLE_BYTES for entry in entries if entry.filename.endswith(".pkl")):
        raise ValueError(f"its index has more than {MOST_PICKLE_BYTES:,} bytes")


def _directory_offsets(path: Path, size: int) -> set[int]:
    """Return where an archive's two ends, one for sizes beyond 4 GiB, say that its directory begins."""
    with path.open("rb") as file:
        file.seek(max(0, size - 42))
        wide, end = (tail := file.read(42))[:-22], tail[-22:]
        if end[:4] != b"PK\x05\x06" or wide[:4] != b"PK\x06\x07":
            raise ValueError("it does not end as torch ends an archive")
        file.seek(int.from_bytes(wide[8:16], "little") + 48)
        offsets = {int.from_bytes(file.read(8), "little"), int.from_bytes(end[16:20], "little")}
    return offsets - {0xFFFFFFFF}


def _check_plain(content: object, size: int) -> None:
    """Raise ValueError unless `content` is a dict of plain containers and dense tensors of at most `size` bytes."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, and no dict")
    left, seen, n_bytes = [content], {id(content)}, 0
    while left:
        one: Any = left.pop()
        if isinstance(one, Tensor):
            if one.layout != torch.strided or one.device.type != "cpu" or one.is_quantized or one.is_nested:
                raise ValueError("it holds a tensor of a kind that no optimizer keeps")
            n_bytes += one.numel() * one.element_size()
            if n_bytes > size:
                raise ValueError(f"its tensors would take more than its own {size:,} bytes")
        elif isinstance(one, (dict, list, tuple, set)):
            inner = [*one, *one.values()] if isinstance(one, dict) else list(one)
            fresh = {id(part): part for part in inner if id(part) not in seen}
            left += fresh.values()
            seen |= fresh.keys()
        elif not isinstance(one, (bool, int, float, str, torch.dtype, type(None))):
            raise ValueError(f"it holds a {type(one).__name__}")


def check_weights(weights: Mapping[str, Tensor], model: torch.nn.Module, path: Path) -> None:
    """Raise UserError unless a checkpoint's weights are those of `model` in name, shape and dtype."""
    wanted = {name: (tuple(one.shape), one.dtype) for name, one in model.state_dict().items()}
    found = {name: (tuple(one.shape), one.dtype) for name, one in weights.items()}
    for name in {**wanted, **found}:
        if wanted.get(name) != found.get(name):
            there, here = (_kind(one.get(name)) for one in (found, wanted))
            raise UserError(
                f"{path}: the weight {shown(name)[:80]} is {there} there, and the run's config makes it {here}; {MEND}"
            )


def _kind(one: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "missing" if one is None else f"{one[1]} of shape {one[0]}"


def check_optimizer(
    content: Mapping[str, Any],
    optimizers: OptimizerSet,
    path: Path,
    shapes: Sequence[Mapping[int, Mapping[str, torch.Size]]],
) -> None:
    """Raise UserError unless the saved options are those that the run's optimizers have, each of its own kind.

    And unless each state tensor has its shape, as far as `shapes` says it, by optimizer, parameter and key.
    """
    with refused(path):
        states = content["optimizers"]
        if not isinstance(states, list) or len(states) != len(optimizers.optimizers):
            raise ValueError("it holds another number of optimizers than the run has")
        for saved, optimizer in zip(states, optimizers.optimizers, strict=True):
            groups = optimizer.param_groups
            for there, here in zip(saved["param_groups"], groups, strict=True):
                for key in {**there, **here}:
                    if key != "params" and not _alike(there[key], here[key]):
                        raise ValueError(
                            f"{ascii(key)[:60]} is a {type(there[key]).__name__}, and the run has a "
                            f"{type(here[key]).__name__}"
                        )
            n_parameters = sum(len(group["params"]) for group in groups)
            for key, state in saved["state"].items():
                if type(key) is not int or not 0 <= key < n_parameters or not isinstance(state, dict):
                    raise ValueError(
                        f"it holds a state for {ascii(key)[:60]}, and there is no such parameter"
                    )
        for name, saved, wanted in zip(content["names"], states, shapes):
            for number, keys in wanted.items():
                _check_shapes(saved["state"].get(number, {}), keys, f"{name}, parameter {number}", path)


def _check_shapes(state: Mapping[str, Any], wanted: Mapping[str, torch.Size], where: str, path: Path) -> None:
    """Raise UserError that names the first tensor of a parameter's state with another shape than it shall have."""
    for key, shape in wanted.items():
        found = state.get(key)
        if isinstance(found, Tensor) and found.shape != shape:
            raise UserError(
                f"{path / 'optimizer.pt'}: the state {key!r} of {shown(where)[:100]} has shape {tuple(found.shape)}, "
                f"and the run's config makes it {tuple(shape)}; {MEND}"
            )


def _alike(there: object, here: object) -> bool:
    """Return whether a saved option is of the kind that the run's own is; numbers are, among themselves."""
    numbers = (int, float)
    if isinstance(here, numbers) and isinstance(there, numbers):
        return isinstance(here, bool) == isinstance(there, bool)
    if isinstance(here, Tensor) and isinstance(there, Tensor):
        return here.shape == there.shape
    if isinstance(here, (list, tuple)) and isinstance(there, (list, tuple)):
        return len(here) == len(there) and all(map(_alike, there, here))
    return type(there) is type(here)


@contextmanager
def refused(path: Path) -> Iterator[None]:
    """Turn what a checkpoint's content makes the code inside raise into a UserError that names the checkpoint."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(
            f"{path} does not fit this run ({type(error).__name__}: {_first_line(error)}); {MEND}"
        ) from error


def _first_line(error: BaseException) -> str:
    return shown(first_line(error))[:300]


def _is_seconds(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and 0 <= value < 1e12


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
