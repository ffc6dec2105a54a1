"""datatrove's tokenized files.

`NAME.ds` is bare little-endian tokens, of 2 bytes or, for vocabularies above 65,536, of 4. Beside it may lie
`NAME.ds.index`, a little-endian uint64 for each document that says before which token it ends; `NAME.ds.loss`, a byte
for each token; and `NAME.ds.metadata`, three lines of text: tokenizer|bytes of a token, the count of tokens, and that
count for people, such as 12.3 kT. When files are merged, to 000_NAME.ds and on, `NAME.ds.metadata` says the sum.
A document ends with its end-of-text token, if the tokenizer was given one. In files shuffled by chunks the index has
the chunks' ends as well, so parts of documents count as documents.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nanorun.data.foreign import (
    Found,
    TokenFile,
    Vocabulary,
    chunks_of,
    head_of,
    is_plain,
    part_of,
    shown,
    size_of,
    tokens_of,
)
from nanorun.errors import UserError

NAME = "datatrove"
HAS_NO_HASH = (
    "files of this form keep no hash of their tokens: a changed byte that gives another id of the vocabulary cannot "
    "be found"
)
_BESIDE = (".index", ".loss", ".metadata")
_MOST_METADATA = 1 << 16
_PIECE = 1 << 20
_MEND = "make it again, or take a sound copy"
_UNKNOWN = "Unknown Tokenizer"
_SCALES = {"": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}


class _Metadata(NamedTuple):
    tokenizer: str | None
    token_size: int | None
    n_tokens: int


def claims(files: Sequence[Path]) -> bool:
    return any(path.suffix == ".ds" for path in files)


def look(files: Sequence[Path]) -> Found:
    """As `Format.look`; the files beside a `.ds` are looked for whether they are among `files` or not."""
    found = Found(NAME, "tokenized files of datatrove")
    names: set[str] = set()
    of_tokens = [path for path in files if path.suffix == ".ds"]
    for path in of_tokens:
        try:
            _look_at(path, found, names)
        except UserError as error:
            found.faults.append(str(error))
    if len(names) > 1:
        said = ", ".join(shown(repr(name)) for name in sorted(names))
        found.faults.append(
            f"the metadata name several tokenizers ({said}); prepare the files of each by themselves."
        )
    found.vocabulary = Vocabulary(min(names) if names else None)
    with_index = [file for file in found.files if file.ends is not None]
    if with_index:
        found.faults += [
            f"{shown(file.path)}: has no index beside it, where others have; bring {shown(file.path.name)}.index."
            for file in found.files
            if file.ends is None
        ]
    _look_at_the_rest(files, found)
    return found


def _look_at(path: Path, found: Found, names: set[str]) -> None:
    """Add a file, what is wrong with it and its tokenizer's name; UserError for the rest of what is wrong."""
    where, size = shown(path), size_of(path)
    ends = _ends(_beside(path, ".index"), found.faults)
    metadata = _metadata(_beside(path, ".metadata"), found.faults)
    if not size and (ends is None or not ends.any()):
        found.notes.append(f"{where}: empty, as a worker without documents leaves it: left out")
        return
    if metadata and metadata.tokenizer:
        names.add(metadata.tokenizer)
    item = metadata.token_size if metadata else None
    if item is None and ends is not None and len(ends) and size:
        item = next((n for n in (2, 4) if int(ends[-1]) * n == size), None)
    if item is None:
        raise UserError(
            f"{where}: neither an index nor metadata beside it tell whether its tokens take 2 bytes or 4; bring "
            f"{shown(path.name)}.metadata or {shown(path.name)}.index."
        )
    if size % item:
        found.faults.append(
            f"{where}: {size:,} bytes, which is no whole number of tokens of {item}; {_MEND}."
        )
    n_tokens = size // item
    _compare(path, n_tokens, ends, metadata, found.faults)
    found.files.append(TokenFile(path, part_of(path), 0, np.dtype(f"<u{item}"), n_tokens, ends))


def _compare(
    path: Path,
    n_tokens: int,
    ends: npt.NDArray[np.uint64] | None,
    metadata: _Metadata | None,
    faults: list[str],
) -> None:
    """Add what does not fit together of a file and those beside it."""
    where = shown(path)
    if ends is not None:
        last = int(ends[-1]) if len(ends) else 0
        if last != n_tokens:
            faults.append(
                f"{where}.index: its last document ends at token {last:,}, but {shown(path.name)} has {n_tokens:,}; "
                f"{_MEND}."
            )
    if metadata and metadata.n_tokens != n_tokens:
        faults.append(
            f"{where}.metadata: says {metadata.n_tokens:,} tokens, but {shown(path.name)} has {n_tokens:,}; {_MEND}."
        )
    loss = _beside(path, ".loss")
    if loss and (n_loss := size_of(loss)) != n_tokens:
        faults.append(
            f"{shown(loss)}: {n_loss:,} bytes, where one is expected for each of {n_tokens:,} tokens; {_MEND}."
        )


def _beside(path: Path, ending: str) -> Path | None:
    beside = path.with_name(path.name + ending)
    return beside if is_plain(beside) or beside.is_symlink() else None


def _ends(path: Path | None, faults: list[str]) -> npt.NDArray[np.uint64] | None:
    """Return where an index says that documents end, mapped from disk; None where there is none of use."""
    if path is None:
        return None
    size, where = size_of(path), shown(path)
    if size % 8:
        faults.append(f"{where}: {size:,} bytes, which is no whole number of entries of 8; {_MEND}.")
    if size < 8:
        return np.empty(0, dtype="<u8")
    head_of(path, 1)
    ends: npt.NDArray[np.uint64] = np.asarray(np.memmap(path, dtype="<u8", mode="r", shape=(size // 8,)))
    for start in range(0, len(ends), _PIECE):
        piece = ends[max(0, start - 1) : start + _PIECE]
        falls = piece[1:] < piece[:-1]
        if falls.any():
            i = max(0, start - 1) + int(np.argmax(falls))
            faults.append(
                f"{where}: document {i + 2:,} ends at token {int(ends[i + 1]):,}, before document {i + 1:,}, which "
                f"ends at {int(ends[i]):,}; {_MEND}."
            )
            break
    return ends


def _metadata(path: Path | None, faults: list[str]) -> _Metadata | None:
    """Return what metadata say; None where there are none of use."""
    if path is None:
        return None
    where = shown(path)
    try:
        lines = head_of(path, _MOST_METADATA).decode("utf-8").split("\n")
        name, bar, digits = lines[0].rpartition("|")
        token_size = int(digits) if bar else None
        n_tokens = int(lines[1])
        fits = token_size in (None, 2, 4) and n_tokens >= 0 and lines[1] == str(n_tokens)
    except (ValueError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        fits = False
    if not fits:
        faults.append(f"{where}: not the lines TOKENIZER|2 (or 4) and a count of tokens; {_MEND}.")
        return None
    if len(lines) > 2 and not _says(lines[2], n_tokens):
        faults.append(
            f"{where}: its third line, {shown(lines[2][:40])!r}, is not the count {n_tokens:,}; {_MEND}."
        )
    name = name if bar else lines[0]
    return _Metadata(None if name.startswith(_UNKNOWN) or not name else name, token_size, n_tokens)


def _says(line: str, n_tokens: int) -> bool:
    """Return whether `line` is a count of tokens as people read it, rounded: 12.3 kT."""
    match = re.fullmatch(r"([0-9]+)(?:\.([0-9]+))? ?([kMGTPE]?)T", line)
    if not match:
        return False
    whole, decimals, scale = match.groups()
    value = float(f"{whole}.{decimals or 0}")
    return bool(abs(value - n_tokens / 10 ** _SCALES[scale]) <= 0.6 * 10 ** -len(decimals or ""))


def _look_at_the_rest(files: Sequence[Path], found: Found) -> None:
    """Add what is wrong with files that lie beside no `.ds`: a sum of merged files that does not fit, a stray index."""
    there = {file.path: file for file in found.files}
    names = {path for path in files if path.suffix == ".ds"}
    for path in files:
        ending = path.suffix
        owner = path.with_name(path.name.removesuffix(ending))
        if ending not in _BESIDE or owner.suffix != ".ds" or owner in names:
            continue
        merged = [
            file
            for one, file in there.items()
            if one.parent == path.parent and re.fullmatch(r"\d{3,}_" + re.escape(owner.name), one.name)
        ]
        if ending != ".metadata" or not merged:
            found.faults.append(
                f"{shown(path)}: belongs to {shown(owner.name)}, which is not there; bring that file."
            )
            continue
        total = _metadata(path, found.faults)
        n_tokens = sum(file.n_tokens for file in merged)
        if total and total.n_tokens != n_tokens:
            found.faults.append(
                f"{shown(path)}: says {total.n_tokens:,} tokens, but its {len(merged)} files have {n_tokens:,}; bring "
                "those that are missing."
            )


def closer_look(file: TokenFile) -> list[str]:
    """Return a fault for documents that do not end with the token that the others end with, as far as can be known.

    There is such a token if it stands almost nowhere else. Ends of chunks, the multiples of one number, need none.
    """
    if file.ends is None or not file.n_tokens or int(file.ends.max(initial=0)) != file.n_tokens:
        return []
    tokens = tokens_of(file)
    counts: Counter[int] = Counter()
    for ends in _distinct(file.ends):
        values, n_each = np.unique(tokens[ends - 1], return_counts=True)
        counts.update(dict(zip(values.tolist(), n_each.tolist())))
    eot, n_at_ends = counts.most_common(1)[0]
    n_ends = counts.total()
    others = (ends[tokens[ends - 1] != eot] for ends in _distinct(file.ends))
    first, step = _first_and_step(others, file.n_tokens)
    # Every multiple of a chunk's length is an end.
    n_multiples = sum(int(np.count_nonzero(ends % step == 0)) for ends in _distinct(file.ends))
    if first is None or n_multiples == file.n_tokens // step or n_at_ends < 0.9 * n_ends:
        return []
    n_everywhere = sum(int(np.count_nonzero(chunk == eot)) for chunk in chunks_of(file))
    if n_everywhere > 1.1 * n_at_ends + n_ends - n_at_ends:
        return []
    return [
        f"{shown(file.path)}.index: a document ends at token {first:,}, where no end of text ({eot}) stands as at "
        f"{n_at_ends:,} of {n_ends:,} ends; {_MEND}."
    ]


def _distinct(ends: npt.NDArray[np.uint64]) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the ends of documents that have a token, a million at a time."""
    last = 0
    for start in range(0, len(ends), _PIECE):
        piece = ends[start : start + _PIECE].astype(np.int64)
        yield piece[piece > np.concatenate([[last], piece[:-1]])]
        last = int(piece[-1])


def _first_and_step(pieces: Iterable[npt.NDArray[np.int64]], n_tokens: int) -> tuple[int | None, int]:
    """Return the first of some places, None if there is none, and what divides them all and `n_tokens`."""
    first, step = None, n_tokens
    for places in pieces:
        if len(places):
            first = int(places[0]) if first is None else first
            step = int(np.gcd.reduce(np.append(places, step)))
    return first, step
