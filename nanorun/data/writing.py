"""Tokens into shards, in a thread of its own, so that whatever happens the journal is never ahead of the files."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from nanorun.data.journal import Journal, Position, Progress
from nanorun.data.passes import Mark, Piece
from nanorun.data.shards import (
    HEADER_BYTES,
    PARTIAL,
    ShardEntry,
    Tokens,
    cannot_write,
    is_full,
    sha256_of,
    shard_header,
    token_dtype,
)
from nanorun.data.sources import SPLITS, Split
from nanorun.data.tokenizers import Tokenizer
from nanorun.errors import UserError

SHARD_TOKENS = 100_000_000
"""At most this many in a shard; a document may run on into the next."""
MARK_SECONDS = 15.0
"""The journal is told at least so far apart how far the work is; an interruption costs no more than that."""


class Encoded(NamedTuple):
    """A chunk's tokens of one split."""

    split: Split
    tokens: Tokens
    begins: np.ndarray[tuple[int], np.dtype[np.int64]]
    """Where documents begin."""
    n_bytes: int


def encode_chunk(pieces: list[Piece], tokenizer: Tokenizer) -> list[Encoded]:
    """Return the tokens of a chunk's pieces, split by split."""
    found = []
    for split in SPLITS:
        of_split = [piece for piece in pieces if piece.split == split]
        if of_split:
            begins = [piece.begins for piece in of_split]
            tokens, starts = tokenizer.encode_pieces([piece.text for piece in of_split], begins)
            n_bytes = sum(piece.n_bytes for piece in of_split)
            found.append(Encoded(split, tokens, starts[np.asarray(begins)], n_bytes))
    return found


class SplitWriter:
    """Cuts one split's tokens into shards; goes on where `position` says, and leaves finished shards alone."""

    def __init__(self, out: Path, stem: str, tokenizer: Tokenizer, progress: Progress, split: Split) -> None:
        self._out, self._stem, self._tokenizer, self._split = out, stem, tokenizer, split
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._is_finished = {entry.file for entry in progress.shards}
        self.at = replace(progress.positions[split])
        self._file: IO[bytes] | None = None
        if self.at.tokens and self._path.name not in self._is_finished:
            self._take_up()

    @property
    def _path(self) -> Path:
        return self._out / f"{self._stem}_{self._split}_{self.at.shard:06d}.bin"

    @property
    def _partial(self) -> Path:
        return self._path.with_name(self._path.name + PARTIAL)

    def _take_up(self) -> None:
        """Cut the half-filled shard back to what the journal knows of it."""
        size = HEADER_BYTES + self.at.tokens * self._dtype.itemsize
        # Closed by `fill` or `close`.
        self._file = open(self._partial, "r+b")  # noqa: SIM115
        if os.fstat(self._file.fileno()).st_size < size:
            raise ValueError(f"{self._partial} is shorter than the journal says")
        self._file.truncate(size)
        self._file.seek(size)

    def write(self, encoded: Encoded) -> list[tuple[Path, ShardEntry]]:
        """Append tokens; return the paths and entries, without a hash, of the shards that this has filled."""
        tokens, begins, n_bytes = encoded.tokens, encoded.begins, encoded.n_bytes
        filled = []
        while len(tokens):
            room = SHARD_TOKENS - self.at.tokens
            part = tokens[:room]
            fits = len(part) == len(tokens)
            self._append(part)
            part_bytes = n_bytes if fits else self._bytes_of(part, n_bytes, len(tokens))
            self.at.tokens += len(part)
            self.at.bytes += part_bytes
            self.at.documents += int(np.count_nonzero(begins < len(part)))
            tokens, n_bytes = tokens[len(part) :], n_bytes - part_bytes
            begins = begins[begins >= len(part)] - len(part)
            if self.at.tokens == SHARD_TOKENS:
                filled += self.fill()
        return filled

    def _append(self, tokens: Tokens) -> None:
        if self._path.name in self._is_finished:
            return
        if self._file is None:
            self._file = open(self._partial, "wb")  # noqa: SIM115
            self._file.write(bytes(HEADER_BYTES))
        self._file.write(np.ascontiguousarray(tokens, dtype=self._dtype).data)

    def _bytes_of(self, part: Tokens, n_bytes: int, n_tokens: int) -> int:
        """Return the bytes of text of the first tokens of several; a share of theirs where no one can tell."""
        if self._tokenizer.counts_bytes:
            return self._tokenizer.bytes_of(part)
        return n_bytes * len(part) // n_tokens

    def fill(self) -> list[tuple[Path, ShardEntry]]:
        """End the shard that is being filled, if there is anything in it, and turn to the next."""
        if not self.at.tokens:
            return []
        path, at = self._path, self.at
        found = []
        if self._file is not None:
            self._file.seek(0)
            self._file.write(shard_header(at.tokens, self._dtype))
            self._file.close()
            self._file = None
            entry = ShardEntry(path.name, self._split, at.tokens, at.bytes, at.documents, "")
            found = [(path, entry)]
        self.at = Position(at.shard + 1)
        return found

    def sync(self) -> None:
        """Let the disk have what was written."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Writer:
    """Writes chunks in their order in the background, finishes shards, and keeps the journal.

    What goes wrong in the background is raised by the next call. `close` ends everything.
    """

    def __init__(
        self,
        writers: dict[Split, SplitWriter],
        journal: Journal,
        *,
        in_flight: int,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._writers, self._journal, self._now = writers, journal, now
        self._queue: queue.Queue[tuple[Future[list[Encoded]], Mark | None] | None] = queue.Queue()
        self._room = threading.Semaphore(in_flight)
        self._finisher = ThreadPoolExecutor(1)
        self._finishing: list[Future[None]] = []
        self._error: BaseException | None = None
        self._marked_at = now()
        self._is_at_end = False
        self.n_tokens = 0
        """Written so far."""
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def put(self, encoding: Future[list[Encoded]], mark: Mark | None) -> None:
        """Hand over the next chunk, waiting while too many are on their way."""
        while not self._room.acquire(timeout=0.1):
            self._raise_error()
        self._raise_error()
        self._queue.put((encoding, mark))

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        mark: Mark | None = None
        try:
            while (item := self._queue.get()) is not None:
                encoding, mark = item
                for encoded in encoding.result():
                    self._finish_all(self._writers[encoded.split].write(encoded))
                    self.n_tokens += len(encoded.tokens)
                self._room.release()
                if mark and self._now() - self._marked_at >= MARK_SECONDS:
                    self._note(mark)
            if mark and not self._is_at_end:
                self._wait_for_shards()
                self._note(mark)
        except OSError as error:
            self._error = _interrupted_by_disk(self._journal.path.parent, error)
        except BaseException as error:
            self._error = error

    def _note(self, mark: Mark) -> None:
        """Tell the journal, unless a shard that this is behind is not finished yet."""
        if not all(future.done() for future in self._finishing):
            return
        self._wait_for_shards()
        for writer in self._writers.values():
            writer.sync()
        self._journal.reached(*mark, {split: writer.at for split, writer in self._writers.items()})
        self._marked_at = self._now()

    def _finish_all(self, filled: list[tuple[Path, ShardEntry]]) -> None:
        for path, entry in filled:
            self._finishing.append(self._finisher.submit(finish_shard, path, entry, self._journal))

    def _wait_for_shards(self) -> None:
        for future in self._finishing:
            future.result()
        self._finishing.clear()

    def finish(self) -> None:
        """Write everything that was handed over, and end the last shards; `close` notes nothing after that.

        Nor does this: to have the disk take the last shards takes longer than to make their hashes.
        """
        self._is_at_end = True
        self._stop()
        self._raise_error()
        try:
            for writer in self._writers.values():
                self._finish_all(writer.fill())
            self._wait_for_shards()
        except OSError as error:
            raise _interrupted_by_disk(self._journal.path.parent, error) from error

    def close(self) -> None:
        """End the threads; what was handed over is still written, and noted in the journal."""
        self._stop()
        self._finisher.shutdown()
        for writer in self._writers.values():
            writer.close()

    def _stop(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()


def _interrupted_by_disk(folder: Path, error: OSError) -> UserError:
    if not is_full(error):
        return cannot_write(folder, error)
    return UserError(
        f"{folder}: the disk is full; what is finished stays: free some space there and run the same command again, "
        "and it goes on from here."
    )


def finish_shard(path: Path, entry: ShardEntry, journal: Journal) -> None:
    """Give a filled shard its name. From the journal's line on it counts as finished.

    It is not forced onto the disk: a shard that a power failure has eaten has another hash than the journal and the
    manifest say, and is made again.
    """
    partial = path.with_name(path.name + PARTIAL)
    journal.finished(replace(entry, sha256=sha256_of(partial)))
    os.replace(partial, path)


def finish_name(path: Path) -> None:
    """Give a shard its name that was finished when the process was killed, just before it could."""
    partial = path.with_name(path.name + PARTIAL)
    if not path.exists() and partial.exists():
        os.replace(partial, path)
