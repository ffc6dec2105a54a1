"""The JSON file that a script leaves of its figures: the machine, the software, the command and what it found."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nanorun.training.machine import hardware, runs_kernels, software


def write_figures(
    path: Path, script: str, words: Sequence[str] | None, *, n_ranks: int = 1, **found: Any
) -> None:
    """Write what `python scripts/SCRIPT WORDS` found on a CPU; without words, those of this process."""
    command = " ".join([f"python scripts/{script}", *(words or sys.argv[1:])])
    cpu = torch.device("cpu")
    about = {"hardware": hardware(cpu, n_ranks), "software": software(False, kernels=runs_kernels(cpu))}
    path.write_text(json.dumps({**about, "command": command, **found}, indent=1) + "\n")
