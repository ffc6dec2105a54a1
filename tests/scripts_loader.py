"""The scripts as modules, for tests of what is in them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).parent.parent / "scripts"


@contextmanager
def script(name: str) -> Iterator[ModuleType]:
    """Yield the module of scripts/NAME.py; it and the scripts it imports are new, and forgotten afterwards."""
    names = [path.stem for path in SCRIPTS.glob("*.py")]
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(SCRIPTS))
        for one in names:
            sys.modules.pop(one, None)
