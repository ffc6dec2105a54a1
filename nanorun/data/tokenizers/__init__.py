"""Text to token ids and back: bytes, the corpus' own characters, tiktoken's vocabularies, or a tokenizer.json.

Where a tokenizer has an end-of-text token, `prepare` puts it BEFORE each document, as llm.c and
modded-nanogpt do: then the first prediction of every document is made from that token. `char` has none, as
in nanoGPT.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanorun.data.tokenizers.base import Encoded, Tokenizer
from nanorun.data.tokenizers.json_file import FILE_NAME, JsonTokenizer, json_name
from nanorun.data.tokenizers.merges import TiktokenTokenizer, fingerprint_of
from nanorun.data.tokenizers.plain import ByteTokenizer, CharTokenizer
from nanorun.data.tokenizers.tiktoken_files import FILES_OF, encoding_names, load_encoding
from nanorun.errors import UserError, nearest

__all__ = [
    "TOKENIZER_NAMES",
    "ByteTokenizer",
    "CharTokenizer",
    "Encoded",
    "JsonTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "check_tokenizer_name",
    "make_tokenizer",
    "prepare_option",
    "tokenizer_from_manifest",
    "tokenizer_name",
    "tokenizer_of_file",
]

TOKENIZER_NAMES = ("byte", "char", "gpt2")
"""Those that are always there; tiktoken's other encodings and tokenizer.json files come on top."""
TRAINED_NAME = re.compile(r"bpe(\d+)")
FROM_FILE_NAME = re.compile(r"json-[0-9a-f]{8}")


def tokenizer_name(spec: str) -> str:
    """Return the name of what a user asks for: a name, or the path of a tokenizer.json or of a folder with one."""
    path = _path_of(spec)
    if path is not None:
        return json_name(_read(path))
    if trained := TRAINED_NAME.fullmatch(spec):
        raise UserError(
            f"Tokenizer {spec!r} is trained on the corpus: use --train-bpe {trained[1]} in its place."
        )
    if FROM_FILE_NAME.fullmatch(spec):
        raise UserError(f"Tokenizer {spec!r} comes from a file: give the path of its tokenizer.json.")
    check_tokenizer_name(spec)
    return spec


def make_tokenizer(spec: str, texts: Iterable[str] = ()) -> Tokenizer:
    """Return the tokenizer that a user asks for, see `tokenizer_name`; `char` takes its vocabulary from `texts`."""
    path = _path_of(spec)
    if path is not None:
        return JsonTokenizer(_read(path), where=str(path))
    name = tokenizer_name(spec)
    if name == "byte":
        return ByteTokenizer()
    if name != "char":
        return _tiktoken_tokenizer(name)
    chars: set[str] = set()
    for text in texts:
        chars.update(text)
    return CharTokenizer("".join(chars))


def tokenizer_of_file(content: bytes, name: str) -> Tokenizer:
    """Return the tokenizer of the content of a tokenizer.json, under a name of its own."""
    return JsonTokenizer(content, name)


def tokenizer_from_manifest(entry: dict[str, Any], folder: Path | None = None) -> Tokenizer:
    """Return the tokenizer that a manifest's `tokenizer` entry describes.

    `folder` is the manifest's: there lies the tokenizer.json that some need. `UserError` where that is missing or
    altered, or where this machine's vocabulary of that name is another one.
    """
    name = str(entry.get("name"))
    if "file" in entry:
        tokenizer: Tokenizer = _from_file_beside(entry, folder)
    elif name == "char":
        tokenizer = CharTokenizer(str(entry.get("chars", "")))
    elif name == "byte":
        tokenizer = ByteTokenizer()
    else:
        # By its name alone: a manifest does not choose which files are read here.
        check_tokenizer_name(name)
        tokenizer = _tiktoken_tokenizer(name)
    found = tokenizer.to_manifest()
    for key in ("vocab_size", "eot", "vocabulary_sha256"):
        if key in entry and entry[key] != found.get(key):
            raise UserError(
                f"Tokenizer {name!r} has another vocabulary here than when the corpus was prepared ({key} "
                f"{found.get(key)}, expected {entry[key]}); install what it came from then, or prepare the "
                "corpus again."
            )
    return tokenizer


def prepare_option(name: str) -> str:
    """Return the options of `nanorun prepare-data` that give a tokenizer of this name."""
    if trained := TRAINED_NAME.fullmatch(name):
        return f"--train-bpe {trained[1]}"
    return "--tokenizer PATH/tokenizer.json" if FROM_FILE_NAME.fullmatch(name) else f"--tokenizer {name}"


def check_tokenizer_name(name: str) -> None:
    """Raise `UserError` unless `name` is one that a manifest may hold."""
    if (
        name in TOKENIZER_NAMES
        or name in FILES_OF
        or TRAINED_NAME.fullmatch(name)
        or FROM_FILE_NAME.fullmatch(name)
    ):
        return
    known = [*TOKENIZER_NAMES, *(other for other in encoding_names() if other not in TOKENIZER_NAMES)]
    if name not in known:
        raise UserError(
            f"There is no tokenizer {name!r}; there are {', '.join(known)}, and paths of a tokenizer.json."
            f"{nearest(name, known)}"
        )


def _path_of(spec: str) -> Path | None:
    """Return the tokenizer.json that `spec` names, if it is a path: it holds a slash, ends in .json, or is there."""
    if spec in TOKENIZER_NAMES or spec in FILES_OF:
        return None
    path = Path(spec)
    is_folder = os.path.isdir(spec)
    if not (is_folder or os.path.isfile(spec) or "/" in spec or spec.endswith(".json")):
        return None
    return path / FILE_NAME if is_folder else path


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise ValueError("a folder, a pipe or a device")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); expected a tokenizer.json."
        ) from error


def _tiktoken_tokenizer(name: str) -> TiktokenTokenizer:
    encoding = load_encoding(name)
    # tiktoken checks the hashes of its own encodings; what a plugin calls by a name may change.
    return TiktokenTokenizer(
        name, encoding, fingerprint=None if name in FILES_OF else fingerprint_of(encoding)
    )


def _from_file_beside(entry: dict[str, Any], folder: Path | None) -> JsonTokenizer:
    if folder is None:
        raise UserError(
            f"Tokenizer {entry.get('name')!r} lies beside the manifest as tokenizer.json; name that folder."
        )
    path = folder / FILE_NAME
    try:
        content = _read(path)
    except UserError as error:
        raise UserError(f"{error} It is the one with sha256 {entry.get('sha256')}; put it there.") from error
    found = hashlib.sha256(content).hexdigest()
    if found != entry.get("sha256"):
        raise UserError(
            f"{path} has sha256 {found}, expected {entry.get('sha256')}: it is not the one that the corpus was "
            "prepared with; put that back, or delete the folder and run `nanorun prepare-data` again."
        )
    return JsonTokenizer(content, str(entry.get("name")), where=str(path))
