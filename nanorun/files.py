"""Files written whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from nanorun.errors import UserError


def write_whole(path: Path, text: str, *, mend: str) -> None:
    """Leave `text` at `path`, its folder made first, or nothing; UserError with the path, why, and `mend`."""
    if not path.name:
        raise UserError(f"{path}: is a folder, and no name of a file; {mend}")
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); {mend}") from None
    finally:
        with suppress(OSError):
            beside.unlink()


def new_folder(base: Path, *, mend: str) -> Path:
    """Make and return `base`, or the first of `base-2`, `base-3`, … that is not there yet; UserError with `mend`."""
    for n in range(1, 1000):
        folder = base if n == 1 else base.with_name(f"{base.name}-{n}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error.strerror}); {mend}") from None
        return folder
    raise UserError(f"{base}: a thousand of these were made in this second; start again")
