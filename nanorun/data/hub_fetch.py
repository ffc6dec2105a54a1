"""Files of the hub brought to disk: several at once, resumed where they stopped, each checked against its hash.

The library's `hf_hub_download` is not used for this. Since its version 1.18 it begins anew after every interruption
(it writes to a file of a random name and removes that), it compares a body's length but never its hash, and it deletes
a file before it fetches it again. Here a file arrives as `NAME.partial`, to which the next attempt or the next run
appends by a Range request; it takes its name once its hash is the hub's. Plain HTTP is used throughout: the hub serves
what lies in Xet storage that way too, up to 50 GB a file.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from threading import Event, Lock
from typing import Any

from nanorun.data.hub import (
    Asked,
    HubFile,
    Patience,
    Snapshot,
    Stopped,
    Unreachable,
    endpoint,
    headers,
    timeout_seconds,
    transport_errors,
)
from nanorun.data.shards import PARTIAL, is_full
from nanorun.data.sources import Reading, Step
from nanorun.errors import UserError, printable

WORKERS = 4
REPORT_SECONDS = 0.1
READ_BYTES = 1 << 20
MOST_NAMED = 5
"""Missing files that a message names before it counts."""


@dataclass(frozen=True)
class Job:
    """A file, and where it has to lie."""

    file: HubFile
    target: Path
    lock: Path | None = None
    """A lock file shared with other programs that write `target`; None where nobody else does."""

    @property
    def partial(self) -> Path:
        return self.target.with_name(self.target.name + PARTIAL)

    def is_whole(self) -> bool:
        """Return whether the file lies there with the hub's size and hash."""
        try:
            if self.target.stat().st_size != self.file.size:
                return False
            return _hash_of(self.target, self.file.hasher()).hexdigest() == self.file.etag
        except OSError:
            return False


def fetch(
    snapshot: Snapshot,
    jobs: Sequence[Job],
    *,
    report: Callable[[Step], None],
    by_hand: str,
    workers: int = WORKERS,
    ahead: int | None = None,
) -> Generator[Path, None, None]:
    """Yield each job's target, whole, in the order of `jobs`; what is whole already costs no request.

    At most `ahead` files (None: all) are begun beyond the one that was last asked for. `by_hand` ends the message
    where the hub cannot be reached: how to do without it. `UserError` for that, for what the hub refuses, for a body
    that twice has another hash, for a disk that is too small or full; what has arrived stays for the next run.
    """
    _check_room(jobs)
    work = _Work(snapshot)
    total = sum(job.file.size for job in jobs)
    waiting: deque[tuple[Job, Future[None]]] = deque()
    remaining = iter(jobs)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="fetch")
    try:
        for job in islice(remaining, ahead):
            waiting.append((job, pool.submit(work.bring, job)))
        while waiting:
            _await(waiting, lambda: report(Step("fetch", work.done, total, "bytes", work.note)))
            job, _ = waiting.popleft()
            waiting.extend((job, pool.submit(work.bring, job)) for job in islice(remaining, 1))
            yield job.target
    except Unreachable as error:
        raise Unreachable(f"{error} {_missing(jobs, work)} {by_hand}") from error
    finally:
        work.stop.set()
        pool.shutdown(cancel_futures=True)


def telling(reading: Reading) -> Callable[[str], None]:
    """Return what reports a sentence as a step of `reading`, for what is asked before anything is fetched."""
    return lambda note: reading.report(Step("fetch", 0, None, "bytes", note))


def _await(waiting: deque[tuple[Job, Future[None]]], report: Callable[[], None]) -> None:
    """Return when the first of `waiting` is done; raise what any of them has raised."""
    first = waiting[0][1]
    while True:
        wait([first], timeout=REPORT_SECONDS)
        report()
        for _, future in waiting:
            if future.done():
                future.result()
        if first.done():
            return


def _missing(jobs: Sequence[Job], work: _Work) -> str:
    """Return which files are not there, in a sentence."""
    missing = [job for job in jobs if job.target not in work.whole and _size(job.target) != job.file.size]
    if not missing:
        return "What has arrived is kept, and the same command goes on from there."
    named = ", ".join(printable(job.file.path) for job in missing[:MOST_NAMED])
    more = f" and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
    return f"Missing are {named}{more}; what has arrived is kept, and the same command goes on from there."


def _check_room(jobs: Sequence[Job]) -> None:
    """Raise `UserError` unless what is still to come fits on the disk."""
    missing = [job for job in jobs if _size(job.target) != job.file.size]
    needed = sum(max(0, job.file.size - _size(job.partial)) for job in missing)
    if not missing:
        return
    folder = missing[0].target.parent
    try:
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
    except OSError:
        return
    if needed > free:
        raise UserError(
            f"{folder}: {len(missing)} files of {needed / 1e9:,.1f} GB are to be fetched, and {free / 1e9:,.1f} GB are "
            "free; free some space, choose another disk, or ask for less (--shards, --include)."
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _hash_of(path: Path, hasher: hashlib._Hash) -> hashlib._Hash:
    """Return `hasher` after it has seen the content of `path`."""
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(READ_BYTES):
            hasher.update(chunk)
    return hasher


@dataclass
class _Work:
    """What the threads share: how far they are, and whether to stop."""

    snapshot: Snapshot
    stop: Event = field(default_factory=Event)
    whole: set[Path] = field(default_factory=set)
    """Targets that were found or brought."""
    done: int = 0
    note: str = ""
    _lock: Lock = field(default_factory=Lock)

    def advance(self, n_bytes: int) -> None:
        with self._lock:
            self.done += n_bytes

    def tell(self, note: str) -> None:
        self.note = note

    def bring(self, job: Job) -> None:
        """Leave `job.target` whole."""
        if self.stop.is_set():
            raise Stopped
        try:
            if not job.is_whole():
                job.target.parent.mkdir(parents=True, exist_ok=True)
                with self._holding(job):
                    # Whoever held the lock may have brought it.
                    if job.lock is None or not job.is_whole():
                        self._download(job)
                        self.whole.add(job.target)
                        return
            self.advance(job.file.size)
            self.whole.add(job.target)
        except OSError as error:
            raise _cannot_keep(job, error) from error

    def _holding(self, job: Job) -> AbstractContextManager[None]:
        return nullcontext() if job.lock is None else self._locked(job.lock, job)

    @contextmanager
    def _locked(self, path: Path, job: Job) -> Iterator[None]:
        from filelock import FileLock, Timeout

        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        while True:
            try:
                lock.acquire(timeout=REPORT_SECONDS)
                break
            except Timeout:
                self.tell(f"{printable(job.file.path)}: waiting for another program that fetches it ({path})")
                if self.stop.is_set():
                    raise Stopped from None
        self.tell("")
        try:
            yield
        finally:
            lock.release()

    def _download(self, job: Job) -> None:
        """Fetch the file, once more if its hash is wrong, and give it its name."""
        from_nothing = 0
        while from_nothing < 2:
            with _Partial(job, self.advance) as partial:
                # What an earlier run has left may be damaged; that is no fault of this body.
                from_nothing += partial.size == 0
                self._fill(job, partial)
                found = partial.hasher.hexdigest()
                is_whole = found == job.file.etag and partial.size == job.file.size
                if is_whole:
                    os.fsync(partial.file.fileno())
                else:
                    partial.restart()
            if is_whole:
                os.replace(job.partial, job.target)
                return
            job.partial.unlink()
            self.tell(f"{printable(job.file.path)}: arrived damaged, fetching it again")
        raise UserError(
            f"{printable(job.file.path)} of {self.snapshot.repository} arrived twice with a hash ({found}) that is not "
            f"the hub's ({job.file.etag}): {endpoint()}, or a proxy or cache on the way, hands out something else; it "
            "was thrown away. Try again later, or without the proxy."
        )

    def _fill(self, job: Job, partial: _Partial) -> None:
        """Receive until `partial` is as long as the file, or longer."""
        asked = Asked(self.snapshot.repository, self.snapshot.commit, job.file.path)
        patience = Patience(asked, self.stop, self.tell)
        failures = transport_errors()
        while partial.size < job.file.size:
            before = partial.size
            try:
                self._receive(job, partial)
                if partial.size > before:
                    continue
                failure: Exception = EOFError("the body ended before anything new came")
            except failures as error:
                failure = error
                if getattr(getattr(error, "response", None), "status_code", None) == 416:
                    partial.restart()
            if partial.size > before:
                patience.renew()
            patience.after(failure)

    def _receive(self, job: Job, partial: _Partial) -> None:
        """Append what one request brings."""
        from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status

        where = self.snapshot
        url = hf_hub_url(
            where.repository, job.file.path, repo_type="dataset", revision=where.commit, endpoint=endpoint()
        )
        # Places in a compressed body are not places in the file.
        wanted = {**headers(), "Accept-Encoding": "identity"}
        if partial.size:
            wanted["Range"] = f"bytes={partial.size}-"
        with get_session().stream(
            "GET", url, headers=wanted, timeout=timeout_seconds(), follow_redirects=True
        ) as response:
            hf_raise_for_status(response)
            self.tell("")
            if partial.size and _first_byte(response) != partial.size:
                partial.restart()
                if _first_byte(response) != 0:
                    return
            for chunk in response.iter_bytes():
                partial.append(chunk)
                if self.stop.is_set():
                    raise Stopped
                if partial.size > job.file.size:
                    return


def _first_byte(response: Any) -> int | None:
    """Return the place in the file at which a body begins; None where it cannot be told."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        return None if response.status_code == 206 else 0
    if response.status_code != 206:
        return 0
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


class _Partial:
    """The part of a file that has arrived, on disk, with its running hash."""

    def __init__(self, job: Job, advance: Callable[[int], None]) -> None:
        self.job = job
        self.advance = advance

    def __enter__(self) -> _Partial:
        # Unbuffered: what has arrived is there for the next run even if this one is killed.
        self.file = open(self.job.partial, "ab", buffering=0)
        self.hasher = _hash_of(self.job.partial, self.job.file.hasher())
        self.size = self.file.tell()
        self.advance(self.size)
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def append(self, chunk: bytes) -> None:
        left = memoryview(chunk)
        while left:
            left = left[self.file.write(left) :]
        self.hasher.update(chunk)
        self.size += len(chunk)
        self.advance(len(chunk))

    def restart(self) -> None:
        """Forget what has arrived."""
        self.file.truncate(0)
        self.advance(-self.size)
        self.size = 0
        self.hasher = self.job.file.hasher()


def _cannot_keep(job: Job, error: OSError) -> UserError:
    if is_full(error):
        return UserError(
            f"{job.target}: the disk is full; what has arrived of it is kept, and after some space was freed the "
            "same command goes on from there."
        )
    return UserError(
        f"{job.target}: cannot be written ({error.strerror or error}); choose another folder with --out, or with "
        "HF_HUB_CACHE for the hub's cache."
    )
