"""The ways a command can end early, and what it exits with."""

from __future__ import annotations

from typing import Any


class UserError(ValueError):
    """A mistake the user can mend: what was found, what was wanted, how to mend it."""

    exit_code = 2
    """1 where it is no mistake, but a network that failed for good."""


class RunFailed(RuntimeError):
    """A run that ended without its result: diverged, or missed a required target. Exit code 1."""

    result: dict[str, Any] | None = None
    """What `--json` prints all the same, of a run that only missed its target."""


class RankLost(RunFailed):
    """A run that another rank's end took along: that rank tells its own exit code, if it still can."""


class Stopped(Exception):
    """A run that was asked to stop and saved a checkpoint; the text says how to resume. Exit code 75."""


class StoppedEarly(KeyboardInterrupt):
    """A signal that asks a run to stop came where none takes steps yet; the text names it. Exit code 75."""


def nearest(word: str, known: list[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest of `known`, or an empty string."""
    import difflib

    by_lower = {one.lower(): one for one in reversed(known)}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.5)
    return f" Did you mean {by_lower[found[0]]!r}?" if found else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def printable(text: str) -> str:
    """Return `text` with control characters, line breaks aside, shown as escapes: names come from files."""
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(name: object) -> str:
    """Return a file's name, or another word from outside, on one line: what would not print is escaped."""
    text = str(name)
    return text if text.isprintable() else printable(text).replace("\n", "\\n")
