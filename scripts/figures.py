"""The JSON file that a script leaves of its figures: the machine, the software, the command and what it found."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nanorun.training.machine import hardware, runs_kernels, software


def write_figures(
    path: Path, script: str, words: Sequence[str] | None, *, n_ranks: int = 1, **found: Any
) -> None:
    """Write what `python scripts/SCRIPT WORDS` found on a CPU; without words, those of this process.

    The command can be pasted; of a folder or file by its absolute path it tells the name alone, for it is elsewhere
    on another machine.
    """
    told = [Path(word).name if Path(word).is_absolute() else word for word in words or sys.argv[1:]]
    command, cpu = shlex.join(["python", f"scripts/{script}", *told]), torch.device("cpu")
    about = {"hardware": hardware(cpu, n_ranks), "software": software(False, kernels=runs_kernels(cpu))}
    path.write_text(json.dumps({**about, "command": command, **found}, indent=1) + "\n")
