"""What may be a track's name, and how other names become parts of a path."""

import re

NO_TRACK = frozenset({"benchmarks"})
"""Folders under `records/` that hold something else."""

_TRACK = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def path_word(name: str) -> str:
    """Return `name` as a word that is harmless in a path, of 1 to 60 characters."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:60].strip("-.") or "run"


def is_track_name(name: str) -> bool:
    """Return whether `name` can be a track's."""
    return bool(_TRACK.fullmatch(name)) and name not in NO_TRACK
