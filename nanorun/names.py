"""What may be a track's name: it becomes a folder under `configs/`, `records/` and `runs/`."""

import re

NO_TRACK = frozenset({"benchmarks"})
"""Folders under `records/` that hold something else."""

_TRACK = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def is_track_name(name: str) -> bool:
    """Return whether `name` can be a track's."""
    return bool(_TRACK.fullmatch(name)) and name not in NO_TRACK
