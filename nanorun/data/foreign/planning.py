"""Which shards are to be made of files that others made: what is held out, what is cut, what they are called."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanorun.data.foreign import Found, TokenFile, chunks_of, shown
from nanorun.data.sources import SPLITS, Reading, Split, Step
from nanorun.errors import UserError

SHARD_TOKENS = 100_000_000
"""At most this many in a shard that is written anew."""
MOST_HELD_OUT = 10_485_760
"""Tokens; as many as the speedruns on FineWeb validate on."""


class Span(NamedTuple):
    """Some of the tokens of a file."""

    file: TokenFile
    first: int
    last: int
    """The first that is not among them."""

    @property
    def n_tokens(self) -> int:
        return self.last - self.first


class Output(NamedTuple):
    """A shard to be made."""

    name: str
    split: Split
    spans: tuple[Span, ...]
    as_it_is: bool
    """Whether a file becomes a shard without a change."""

    @property
    def n_tokens(self) -> int:
        return sum(span.n_tokens for span in self.spans)


def plan(found: Found, stem: str, eot: int | None, reading: Reading) -> list[Output]:
    """Return the shards to be made, those to train on first; new ones are called `<stem>_<split>_<number>.bin`."""
    spans = _dealt(found, eot, reading)
    names = _Names()
    outputs = []
    for split in SPLITS:
        whole = found.format == "llm.c"
        as_they_are = [span for span in spans[split] if whole and span.n_tokens == span.file.n_tokens]
        cut = [span for span in spans[split] if span not in as_they_are]
        outputs += [Output(names.own(span.file.path), split, (span,), True) for span in as_they_are]
        outputs += [
            Output(names.new(f"{stem}_{split}_{number:06d}.bin"), split, group, False)
            for number, group in enumerate(_grouped(cut))
        ]
    train = [output for output in outputs if output.split == "train"]
    if reading.shards is not None and not 1 <= reading.shards <= len(train):
        raise UserError(
            f"--shards {reading.shards}: there are {len(train)} to train on; expected 1 to {len(train)}."
        )
    return train[: reading.shards] + outputs[len(train) :]


def _dealt(found: Found, eot: int | None, reading: Reading) -> dict[Split, list[Span]]:
    """Return what is trained and what is validated on."""
    spans: dict[Split, list[Span]] = {"train": [], "val": []}
    for file in found.files:
        if file.part == "test":
            reading.report(Step("read", 0, None, "bytes", f"{shown(file.path.name)}: for tests, left out"))
        else:
            spans[file.part or "train"].append(Span(file, 0, file.n_tokens))
    if not spans["train"]:
        there = ", ".join(shown(file.path.name) for file in found.files[:3]) or "none that holds tokens"
        raise UserError(
            f"no file to train on, by their names: {there}; give one with train in its name, or with neither train nor "
            "val."
        )
    if not spans["val"]:
        last = spans["train"].pop()
        at = _held_out_from(last, sum(span.n_tokens for span in spans["train"]) + last.n_tokens, eot)
        spans["train"].append(Span(last.file, 0, at))
        spans["val"].append(Span(last.file, at, last.last))
        reading.report(Step("read", 0, None, "bytes", said_of(spans["val"][0])))
    return spans


def said_of(span: Span) -> str:
    """Return a sentence on a held-out end of a file."""
    name, n_tokens = shown(span.file.path.name), span.file.n_tokens - span.first
    return f"no val in any name: the last {n_tokens:,} tokens of {name} are held out"


def val_spans(outputs: list[Output]) -> Iterator[Span]:
    """Yield what is validated on."""
    return (span for output in outputs if output.split == "val" for span in output.spans)


def _held_out_from(span: Span, n_all: int, eot: int | None) -> int:
    """Return where the held-out end of a file begins: with a document, if one begins soon enough."""
    n_held_out = min(n_all // 20, MOST_HELD_OUT, span.n_tokens // 2)
    if n_held_out < 1:
        raise UserError(
            f"{shown(span.file.path)}: {span.n_tokens:,} tokens are too few to hold a twentieth out for validation; "
            "give a file with val in its name as well."
        )
    first = span.last - n_held_out
    return _document_start(span.file, first, first + n_held_out // 2, eot) or first


def _document_start(file: TokenFile, first: int, last: int, eot: int | None) -> int | None:
    """Return where the first document begins in the tokens `first` to `last`; None where none does."""
    if file.ends is not None:
        at = int(np.searchsorted(file.ends, first, side="left"))
        return int(file.ends[at]) if at < len(file.ends) and file.ends[at] < last else None
    if eot is None or first >= last:
        return None
    # Whoever puts the end of text before documents begins the file with it.
    before = int(next(chunks_of(file, 0, 1))[0]) == eot
    for chunk in chunks_of(file, first, last):
        places = np.flatnonzero(chunk == eot)
        if len(places):
            return first + int(places[0]) + (0 if before else 1)
        first += len(chunk)
    return None


def _grouped(spans: list[Span]) -> Iterator[tuple[Span, ...]]:
    """Yield spans after one another, cut into groups of `SHARD_TOKENS`."""
    group: list[Span] = []
    room = SHARD_TOKENS
    for file, first, last in spans:
        while first < last:
            until = min(last, first + room)
            group.append(Span(file, first, until))
            room -= until - first
            first = until
            if not room:
                yield tuple(group)
                group, room = [], SHARD_TOKENS
    if group:
        yield tuple(group)


class _Names:
    """Gives each shard a name that no other has."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def own(self, path: Path) -> str:
        """Return a file's own name; with its folder's before it where another file has the same."""
        name = path.name if path.suffix == ".bin" else f"{path.name}.bin"
        return self.new(name if name not in self._taken else f"{path.absolute().parent.name}-{name}")

    def new(self, name: str) -> str:
        found, n = name, 2
        while found in self._taken:
            found, n = f"{name.removesuffix('.bin')}-{n}.bin", n + 1
        self._taken.add(found)
        return found
