"""One pass over a corpus' documents: hashed, copies dropped, dealt out to the splits, gathered into chunks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from nanorun.data.pieces import PIECE_CHARS, cut
from nanorun.data.seen import Seen
from nanorun.data.sources import Document, LongText, Reading, Source, Split

HELD_OUT_EVERY = 20
"""About one document in so many is held out for validation."""
CHUNK_BYTES = 1 << 20
"""Documents go to the tokenizer together, up to about so many bytes of text."""
SINGLE_TRAIN_SHARE = 0.9
"""Of a corpus that is one document."""


class Piece(NamedTuple):
    """A document, or a part of a long one, on its way to the tokenizer."""

    split: Split
    text: str
    begins: bool
    """Whether a document begins with it."""
    n_bytes: int
    """Of UTF-8."""


class Mark(NamedTuple):
    """How far a pass has come."""

    documents: int
    """Documents read, copies included."""
    sha256: str
    """Of the hashes of all documents kept so far: two passes with the same mark have read the same."""


class Chunk(NamedTuple):
    pieces: list[Piece]
    mark: Mark | None
    """None in the middle of a long document."""


@dataclass(frozen=True)
class Rule:
    """Which documents are held out.

    A document is held out if the first 64 bits of the sha256 of its UTF-8 bytes are a multiple of 20: that
    depends on nothing but its content, so more data moves none across. The fields are for corpora so small that
    this leaves a split empty.
    """

    val: str = ""
    """The sha256 of a document that is held out all the same: the least there is."""
    train: str = ""
    """The sha256 of one that is trained on all the same: the greatest there is."""
    cut: bool = False
    """There is but one document: its last tenth is held out."""


class Pass:
    """Reads the documents of a source once, in their order."""

    def __init__(
        self, source: Source, reading: Reading, rule: Rule | None = None, *, keep_duplicates: bool = False
    ) -> None:
        self._source, self._reading, self._rule = source, reading, rule or Rule()
        self._seen = None if keep_duplicates else Seen(reading.scratch)
        self._hash = hashlib.sha256()
        self.documents = 0
        """Read so far."""
        self.duplicates = 0
        self.kept: dict[Split, int] = {"train": 0, "val": 0}
        self._least = self._greatest = ""

    @property
    def mark(self) -> Mark:
        return Mark(self.documents, self._hash.hexdigest())

    def chunks(self, pause_at: int = -1) -> Iterator[Chunk]:
        """Yield all pieces in chunks; one ends with document `pause_at`, whatever its size."""
        self._reading.restart()
        batch: list[Document] = []
        digests: list[bytes] = []
        sizes: list[int] = []
        gathered = 0
        for document in self._source.documents(self._reading):
            digest, n_bytes = _digest(document.text)
            self.documents += 1
            batch.append(document)
            digests.append(digest)
            sizes.append(n_bytes)
            gathered += n_bytes
            if gathered >= CHUNK_BYTES or self.documents == pause_at:
                yield from self._flush(batch, digests, sizes)
                batch, digests, sizes, gathered = [], [], [], 0
        if batch:
            yield from self._flush(batch, digests, sizes)
        if self._seen:
            self._seen.close()

    def _flush(self, batch: list[Document], digests: list[bytes], sizes: list[int]) -> Iterator[Chunk]:
        keys = np.frombuffer(b"".join([digest[:8] for digest in digests]), dtype=">u8").astype(np.uint64)
        new = self._new(batch, keys)
        self.duplicates += len(batch) - int(new.sum())
        self._remember([digest.hex() for digest, is_new in zip(digests, new.tolist()) if is_new])
        splits = self._splits(batch, digests, keys)
        pieces: list[Piece] = []
        for document, split, n_bytes, is_new in zip(batch, splits, sizes, new.tolist()):
            if not is_new:
                continue
            if n_bytes <= PIECE_CHARS and not self._rule.cut and isinstance(document.text, str):
                self.kept[split] += 1
                pieces.append(Piece(split, document.text, True, n_bytes))
                continue
            for piece in self._of_long(document, split):
                pieces.append(piece)
                if len(pieces) > 1 or piece.n_bytes >= CHUNK_BYTES:
                    yield Chunk(pieces, None)
                    pieces = []
        yield Chunk(pieces, self.mark)

    def _new(self, batch: list[Document], keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Return which documents are no copies; those with a split of their own are taken as they are."""
        if self._seen is None or batch[0].split is not None:
            return np.ones(len(batch), dtype=np.bool_)
        return self._seen.add(keys)

    def _remember(self, digests: list[str]) -> None:
        if digests:
            self._hash.update(("\n" if self._greatest else "").encode() + "\n".join(digests).encode())
            self._greatest = max(self._greatest, *digests)
            self._least = min(self._least or digests[0], *digests)

    def _splits(
        self, batch: list[Document], digests: list[bytes], keys: npt.NDArray[np.uint64]
    ) -> list[Split]:
        held_out: list[Split] = ["val" if one else "train" for one in (keys % HELD_OUT_EVERY == 0).tolist()]
        found = [document.split or split for document, split in zip(batch, held_out)]
        for split, digest in (("val", self._rule.val), ("train", self._rule.train)):
            if digest and (wanted := bytes.fromhex(digest)) in digests:
                # All copies, where copies are kept: none stands on both sides.
                found = [cast(Split, split) if one == wanted else now for one, now in zip(digests, found)]
        return found

    def _of_long(self, document: Document, split: Split) -> Iterator[Piece]:
        """Yield the pieces of a long document, or of the only one, which is cut in two."""
        if self._rule.cut and document.split is None:
            train, val = _cut_in_two(document.text)
            parts: list[tuple[Split, Iterator[str]]] = [("train", train), ("val", val)]
        else:
            parts = [(split, _pieces(document.text))]
        for part_split, texts in parts:
            begins = True
            for text in texts:
                yield Piece(part_split, text, begins, len(text.encode()))
                self.kept[part_split] += begins
                begins = False

    def better_rule(self) -> Rule | None:
        """Return the rule that fills the split which this pass has left empty; None where both have something.

        ValueError where no rule can: there is no document, or one too short to be cut.
        """
        if all(self.kept.values()):
            return None
        n_documents = sum(self.kept.values())
        if not n_documents or self._rule.cut:
            raise ValueError("train" if not self.kept["train"] else "val")
        if self._least == self._greatest:
            return Rule(cut=True)
        return Rule(val=self._least) if not self.kept["val"] else Rule(train=self._greatest)


def _digest(text: str | LongText) -> tuple[bytes, int]:
    """Return the sha256 of a text's UTF-8 bytes, and how many there are."""
    if isinstance(text, str) and len(text) <= PIECE_CHARS:
        data = text.encode()
        return hashlib.sha256(data).digest(), len(data)
    found, n_bytes = hashlib.sha256(), 0
    for piece in _pieces(text):
        data = piece.encode()
        found.update(data)
        n_bytes += len(data)
    return found.digest(), n_bytes


def _pieces(text: str | LongText) -> Iterator[str]:
    return iter(cut(text)) if isinstance(text, str) else text.pieces()


def _cut_in_two(text: str | LongText) -> tuple[Iterator[str], Iterator[str]]:
    """Return the first nine tenths and the last tenth of a text, from the start of a line where one is near."""
    n_chars = sum(len(piece) for piece in _pieces(text))
    at = int(SINGLE_TRAIN_SHARE * n_chars)
    line_start, start = 0, 0
    for piece in _pieces(text):
        low, high = max(0, at - n_chars // 20 - start), max(0, at - start)
        found = piece.rfind("\n", low, high) + 1 if low < len(piece) and high else 0
        line_start = start + found if found else line_start
        start += len(piece)
    at = line_start or at
    return _between(text, 0, at), _between(text, at, n_chars)


def _between(text: str | LongText, first: int, last: int) -> Iterator[str]:
    """Yield what lies in the characters `first` to `last`, in the pieces of the whole."""
    start = 0
    for piece in _pieces(text):
        part = piece[max(0, first - start) : max(0, last - start)]
        if part:
            yield part
        start += len(piece)
