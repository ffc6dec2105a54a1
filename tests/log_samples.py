"""Real logs, and logs made up for tests: whole, plausible, and odd only where asked."""

from __future__ import annotations

import csv
import functools
import lzma
from collections.abc import Iterable
from pathlib import Path

LOGS = Path(__file__).parent / "logs"
SEPARATOR = "=" * 100
CODE = "import os\nimport torch\n\nprint('never run', file=open('ran', 'w'))\n"


@functools.cache
def real_logs() -> dict[str, bytes]:
    """The fourteen real logs by their names."""
    return {path.name.removesuffix(".xz"): lzma.decompress(path.read_bytes()) for path in LOGS.glob("*.xz")}


def unpack_logs(folder: Path) -> Path:
    """Return `folder` with the real logs in it."""
    folder.mkdir(exist_ok=True)
    for name, content in real_logs().items():
        (folder / name).write_bytes(content)
    return folder


def expected_rows() -> list[dict[str, str]]:
    """What each run of the real logs says, as texts; an empty one is not said."""
    with open(LOGS / "expected.csv", newline="") as file:
        return list(csv.DictReader(file))


def val_line(step: int, loss: object, time: str = "1.000s", total: int = 300, more: str = "") -> str:
    """A validation of modded-nanogpt."""
    return f"step:{step}/{total} val_loss:{loss} train_time:{time} step_avg:10.00ms{more}\n"


def a_log(
    losses: Iterable[float] = (10.8, 4.5, 3.6, 3.27),
    *,
    code: str = CODE,
    header: str = "Running PyTorch 2.9.0 compiled for CUDA 12.8\n",
    seconds: float = 30.0,
) -> str:
    """A log of modded-nanogpt with a validation each 100 steps, the last at the declared last step."""
    values = list(losses)
    total = 100 * (len(values) - 1)
    lines = [
        val_line(100 * index, f"{loss:.5f}", f"{seconds * index / (len(values) - 1):.3f}s", total)
        for index, loss in enumerate(values)
    ]
    return f"{code}{SEPARATOR}\n{header}{SEPARATOR}\n{''.join(lines)}"
