"""Numbers and texts of a log that may be hostile: short, plain and finite, or not believed."""

from __future__ import annotations

import re

from nanorun.records.significance import LARGEST_LOSS

STEP = r"[0-9]{1,12}"
"""A step; longer ones are nobody's, and would cost time to read."""

_LOSS = re.compile(r"([0-9]{1,9})(?:\.([0-9]{1,20}))?(?:[eE][+-]?[0-9]{1,3})?")
_SECONDS = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,12})?)(ms|s)")
_NOT_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)


def loss(text: str) -> float | None:
    """Return the number from 0 to `LARGEST_LOSS` that `text` is, or None."""
    if not _LOSS.fullmatch(text):
        return None
    value = float(text)
    return value if value <= LARGEST_LOSS else None


def is_not_finite(text: str) -> bool:
    """Whether `text` is how a diverged loss is printed."""
    return bool(_NOT_FINITE.fullmatch(text))


def seconds(text: str) -> float | None:
    """Return the seconds of `231445ms` or `231.445s`, or None for anything else; the suffix says which."""
    found = _SECONDS.fullmatch(text)
    if not found:
        return None
    return float(found[1]) / 1000 if found[2] == "ms" else float(found[1])


def n_decimals(text: str) -> int:
    """Return how many digits stand after the point."""
    found = _LOSS.fullmatch(text)
    return len(found[2] or "") if found else 0


def shown(text: str) -> str:
    """The start of a text, for a note: whoever prints the note escapes it."""
    text = text.strip()
    return repr(text if len(text) <= 30 else text[:27] + "...")
