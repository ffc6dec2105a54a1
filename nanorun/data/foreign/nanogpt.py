"""nanoGPT's `train.bin` and `val.bin`: bare little-endian uint16, with a `meta.pkl` beside them or without.

`meta.pkl` is a pickle of {"vocab_size": n, "itos": {id: character}, "stoi": {character: id}}. It is read without
unpickling. Where there is none nanoGPT takes the ids for GPT-2's, but nothing in the files says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanorun.data.foreign import Found, TokenFile, Vocabulary, chunks_of, head_of, part_of, shown, size_of
from nanorun.data.foreign.llmc import is_llmc
from nanorun.data.foreign.meta_pickle import MOST_BYTES, read_plain_pickle
from nanorun.errors import UserError

NAME = "nanoGPT"
HAS_NO_HASH = (
    "files of this form have neither a header nor a hash: a changed byte that gives another id of the vocabulary, and "
    "a file cut between two tokens, cannot be found"
)
META = "meta.pkl"
_FILES = ("train.bin", "val.bin", "test.bin")
_MEND = "run the prepare.py that made it again"
_SUSPECT_TOKENS = 1 << 16


def claims(files: Sequence[Path]) -> bool:
    return any(path.name in _FILES[:2] and not is_llmc(path) for path in files)


def look(files: Sequence[Path]) -> Found:
    """As `Format.look`; a `meta.pkl` is looked for beside each file, whether it is among `files` or not."""
    found = Found(NAME, "token files of nanoGPT")
    vocabularies: dict[Path, Vocabulary] = {}
    for path in files:
        if path.name not in _FILES or is_llmc(path):
            continue
        try:
            size = size_of(path)
            if path.parent not in vocabularies:
                vocabularies[path.parent] = _vocabulary(path.parent / META, found.notes)
        except UserError as error:
            found.faults.append(str(error))
            vocabularies.setdefault(path.parent, Vocabulary())
            if not path.is_file():
                continue
            size = size_of(path)
        if size % 2 or not size:
            said = f"{size:,} bytes, which is no whole number of tokens of 2" if size else "empty"
            found.faults.append(f"{shown(path)}: {said}; {_MEND}.")
        if size > 1:
            found.files.append(TokenFile(path, part_of(path), 0, np.dtype("<u2"), size // 2))
    if len(set(vocabularies.values())) > 1:
        found.faults.append(
            f"the folders {', '.join(map(shown, vocabularies))} have different vocabularies; prepare each by itself."
        )
    found.vocabulary = next(iter(vocabularies.values()), Vocabulary())
    return found


def _vocabulary(path: Path, notes: list[str]) -> Vocabulary:
    """Return what a `meta.pkl` says; nothing if there is none; UserError if it makes no sense."""
    where = shown(path)
    if not path.exists() and not path.is_symlink():
        notes.append(f"{where}: not there, so nothing says which tokenizer made the files")
        return Vocabulary()
    meta = read_plain_pickle(head_of(path, MOST_BYTES + 1), where)
    if not isinstance(meta, dict):
        raise UserError(f"{where}: holds a {type(meta).__name__}, where a dict is expected; {_MEND}.")
    size, itos, stoi = (meta.get(key) for key in ("vocab_size", "itos", "stoi"))
    if size is not None and (type(size) is not int or not 0 < size <= 1 << 16):
        raise UserError(f"{where}: vocab_size is {_short(size)}, where 1 to 65,536 is expected; {_MEND}.")
    if itos is None:
        if size is None:
            raise UserError(f"{where}: says neither vocab_size nor itos; {_MEND}, or leave it out.")
        return Vocabulary(size=size)
    texts = _texts(where, itos, len(itos) if size is None else size)
    if stoi is not None and stoi != {text: i for i, text in enumerate(texts)}:
        raise UserError(f"{where}: its stoi is not itos the other way round; {_MEND}.")
    if any(len(text) != 1 for text in texts):
        notes.append(f"{where}: its tokens are not single characters, which nanorun has no tokenizer for")
        return Vocabulary(size=len(texts))
    return Vocabulary("char", len(texts), "".join(texts))


def _texts(where: str, itos: Any, size: int) -> list[str]:
    """Return what the ids 0, 1, … stand for."""
    table = dict(enumerate(itos)) if isinstance(itos, list) else itos
    if not isinstance(table, dict) or not all(type(key) is int for key in table):
        raise UserError(f"{where}: its itos is no table of ids; {_MEND}.")
    if len(table) != size or set(table) != set(range(size)):
        raise UserError(f"{where}: its itos has not the ids 0 to {size - 1:,}, each once; {_MEND}.")
    texts = [table[i] for i in range(size)]
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text or any("\ud800" <= c <= "\udfff" for c in text):
            raise UserError(f"{where}: id {i} stands for {_short(text)}, where text is expected; {_MEND}.")
    if len(set(texts)) != size:
        raise UserError(f"{where}: two ids stand for the same text; {_MEND}.")
    return texts


def _short(value: Any) -> str:
    """Return a value for a message; never the whole of something large."""
    if isinstance(value, list | dict):
        return f"a {type(value).__name__}"
    if isinstance(value, int) and value.bit_length() > 64:
        return "a number of many digits"
    return shown(repr(value)[:60])


def closer_look(file: TokenFile) -> list[str]:
    """Return a fault if a file seems to hold numbers of 4 bytes, which nothing in it could say."""
    for chunk in chunks_of(file, 0, min(file.n_tokens, _SUSPECT_TOKENS) // 2 * 2):
        low, high = chunk[::2], chunk[1::2]
        if low.max() >= 256 and high.max() < 8:
            return [
                f"{shown(file.path)}: every second number is below 8: it seems to hold tokens of 4 bytes, where 2 are "
                f"expected; {_MEND}, with np.uint16."
            ]
    return []
