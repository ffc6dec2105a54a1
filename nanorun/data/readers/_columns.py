"""What is said when a file has no such column."""

from __future__ import annotations

import difflib

from nanorun.errors import shown

MOST_NAMED = 12


def missing(what: str, column: str, known: list[str]) -> tuple[str, str]:
    """Return what was found and how to mend it, for a file or an object whose `what`s are `known`."""
    names = [shown(name)[:60] for name in known]
    listed = ", ".join(map(repr, names[:MOST_NAMED])) + (", …" if len(names) > MOST_NAMED else "")
    close = difflib.get_close_matches(column, names, n=1, cutoff=0.5)
    mend = f"try --column {close[0]}" if close else f"name the {what} that holds the text with --column"
    return f"no {what} {shown(column)!r}, but {listed or 'none at all'}", mend
