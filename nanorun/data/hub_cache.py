"""The hub's own cache on this machine, shared with every program that uses it.

Its layout is documented for that ("Hub Local Cache" in the hub's documentation): `blobs/` holds contents by their hash,
`snapshots/COMMIT/PATH` are links into it, `.locks/` keeps two programs from fetching one blob at the same time.
"""

from __future__ import annotations

import os
from pathlib import Path

from nanorun.data.hub import HubFile, Snapshot, safe_parts
from nanorun.data.hub_fetch import Job
from nanorun.errors import UserError


def cache_job(snapshot: Snapshot, file: HubFile) -> Job:
    """Return the job that leaves `file` in the cache, for `pointer` to be made afterwards."""
    path = _pointer(snapshot, file)
    # Where links are not possible the cache holds the file itself in their place.
    if path.is_file() and not path.is_symlink():
        return Job(file, path)
    folder = _folder(snapshot)
    lock = folder.parent / ".locks" / folder.name / f"{file.etag}.lock"
    return Job(file, folder / "blobs" / file.etag, lock)


def pointer(snapshot: Snapshot, file: HubFile) -> Path:
    """Return the path under which programs find `file`, which `cache_job` has brought; it bears the file's name."""
    path = _pointer(snapshot, file)
    blob = cache_job(snapshot, file).target
    if blob == path or (path.is_symlink() and path.resolve() == blob.resolve()):
        return path
    beside = path.with_name(f".{path.name}.{os.getpid()}.link")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.unlink(missing_ok=True)
        try:
            beside.symlink_to(os.path.relpath(blob, path.parent))
        except (OSError, NotImplementedError):
            os.replace(blob, path)
        else:
            os.replace(beside, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); set HF_HUB_CACHE to a folder that can be."
        ) from error
    return path


def _folder(snapshot: Snapshot) -> Path:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).expanduser()
    return cache.resolve() / f"datasets--{snapshot.repository.replace('/', '--')}"


def _pointer(snapshot: Snapshot, file: HubFile) -> Path:
    return _folder(snapshot).joinpath("snapshots", snapshot.commit, *safe_parts(file.path))
