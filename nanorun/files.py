"""Files written whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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


LOCK_NAME = ".lock"


@contextmanager
def locked(
    folder: Path, *, on_wait: Callable[[str], None], sleep: Callable[[float], None] = time.sleep
) -> Iterator[None]:
    """Hold a folder alone; wait while another process does, and tell `on_wait` once which one.

    The lock goes with the process that holds it, however that ends. UserError where it cannot be had at all.
    """
    path = folder / LOCK_NAME
    told = False
    while (descriptor := _try_lock(path)) is None:
        if not told:
            on_wait(_holder(path))
            told = True
        sleep(0.2)
    try:
        yield
    finally:
        # Removed while it is held: whoever opened it meanwhile sees that it is no longer the file of that name.
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _try_lock(path: Path) -> int | None:
    """Return the descriptor of a lock file that is ours now, or None where another process has it."""
    try:
        # Whoever held it before may have removed an empty folder.
        path.parent.mkdir(parents=True, exist_ok=True)
        # A folder may be a stranger's, and its lock a link to a file of the user's: that is not to be written.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); choose a folder that can, or mend its permissions"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_ino == os.lstat(path).st_ino:
            with suppress(OSError):  # a full disk: the lock holds all the same
                os.truncate(descriptor, 0)
                os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
            return descriptor
    except BlockingIOError:
        pass
    except FileNotFoundError:
        pass  # it was removed between opening and locking
    except OSError as error:
        os.close(descriptor)
        raise UserError(
            f"{path}: this disk keeps no locks ({error.strerror}); choose another folder"
        ) from None
    os.close(descriptor)
    return None


def _holder(path: Path) -> str:
    """Return who holds a lock, as far as its file tells."""
    try:
        held = json.loads(path.read_text())
        return f"process {int(held['pid'])} on {str(held['host'])!a}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
