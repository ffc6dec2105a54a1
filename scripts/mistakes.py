"""How a script ends where its user made a mistake: with a line that says which, and nanorun's exit code for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from nanorun.errors import RunFailed, UserError, printable


@contextmanager
def telling_mistakes(script: str) -> Iterator[None]:
    """Have a UserError end the process with exit code 2, a run that failed with 1; decorates a script's `main`."""
    try:
        yield
    except (UserError, RunFailed) as error:
        print(f"{script}: {printable(str(error))}", file=sys.stderr)
        raise SystemExit(error.exit_code if isinstance(error, UserError) else 1) from None
