"""Shards of tokens on disk, and the manifest that says what they are.

A shard is 256 little-endian int32 and then tokens: 20240520, 1, token count, zeros before uint16 tokens, what
llm.c and modded-nanogpt read and write; 20240801, 7, token count, zeros before uint32 tokens, llm.c's form for
vocabularies above 65,536. `manifest.json` beside the shards names corpus, tokenizer and source, and for
each shard its tokens, bytes of text, documents and sha256. It holds neither dates nor paths, so its own
sha256 is the identity of a prepared corpus on any machine.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from nanorun.errors import UserError

MAGIC = 20240520
SHARD_VERSION = 1
WIDE_MAGIC = 20240801
WIDE_VERSION = 7
MOST_NARROW = 1 << 16
"""Entries of the largest vocabulary whose tokens are kept as uint16."""
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MANIFEST_NAME = "manifest.json"
INPUTS_NAME = "inputs.json"
"""Which files a corpus was made from, beside its manifest: names, sizes and dates, of this machine alone."""
JOURNAL_NAME = "journal.jsonl"
"""What a preparation has done so far; gone when it has ended."""
PARTIAL = ".partial"
"""What follows the name of a file that is being filled."""
MANIFEST_VERSION = 1
PREPARE_AGAIN = "delete the folder and run `nanorun prepare-data` again"
MAKE_AGAIN = "run the same `nanorun prepare-data` command again, which makes it anew"

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the little-endian type that shards of a vocabulary hold: uint16, or uint32 above 65,536 entries."""
    return np.dtype("<u2" if vocab_size <= MOST_NARROW else "<u4")


def shard_header(n_tokens: int, dtype: np.dtype[Any]) -> bytes:
    """Return the 1,024 bytes before `n_tokens` tokens of `dtype`, which is one of `token_dtype`'s."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    kind = (MAGIC, SHARD_VERSION) if dtype.itemsize == 2 else (WIDE_MAGIC, WIDE_VERSION)
    header[:3] = *kind, n_tokens
    return header.tobytes()


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file that becomes `path` at the end, whole or not at all; a full disk is a `UserError`."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def is_full(error: OSError) -> bool:
    """Return whether a disk, or a share of one, had no more room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def cannot_write(path: Path, error: OSError) -> UserError:
    """Return the error of a file that could not be written, a full disk told apart."""
    if is_full(error):
        return UserError(
            f"{path}: the disk is full; nothing half-written was left. Free some space or choose another "
            "folder with --data, or with --out of prepare-data."
        )
    return UserError(
        f"{path}: cannot be written ({error.strerror or error}); choose another folder with --data, "
        "or with --out of prepare-data."
    )


def write_shard(path: Path, tokens: Tokens) -> None:
    """Write `tokens`, uint16 or uint32, as a shard at `path`, whole or not at all."""
    dtype = np.dtype("<u4" if tokens.dtype.itemsize == 4 else "<u2")
    with replacing(path) as file:
        file.write(shard_header(len(tokens), dtype))
        file.write(np.ascontiguousarray(tokens, dtype=dtype).data)


def open_shard(path: Path, vocab_size: int | None = None) -> np.memmap[Any, np.dtype[Any]]:
    """Return the tokens of a shard, uint16 or uint32, mapped from disk.

    `UserError` if it is not a shard, of another version, truncated or too long, or (given `vocab_size`)
    holds a token at or beyond it.
    """
    try:
        _check_is_file(path)
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = np.frombuffer(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), dtype="<i4")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {MAKE_AGAIN}.") from error
    magic, version, n_tokens = (int(value) for value in header[:3])
    if magic not in (MAGIC, WIDE_MAGIC):
        raise UserError(
            f"{path}: not a token shard: it begins with {magic}, expected {MAGIC} or {WIDE_MAGIC}; {MAKE_AGAIN}."
        )
    wanted_version, dtype = (SHARD_VERSION, "<u2") if magic == MAGIC else (WIDE_VERSION, "<u4")
    if version != wanted_version:
        raise UserError(f"{path}: shard version {version}, expected {wanted_version}; {MAKE_AGAIN}.")
    if n_tokens <= 0:
        raise UserError(f"{path}: the shard holds no tokens; {MAKE_AGAIN}.")
    expected = HEADER_BYTES + np.dtype(dtype).itemsize * n_tokens
    if size != expected:
        fault = "truncated" if size < expected else "too long"
        raise UserError(
            f"{path}: {fault}: {size:,} bytes, but its header's {n_tokens:,} tokens take {expected:,}; "
            f"{MAKE_AGAIN}."
        )
    tokens = np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(n_tokens,))
    if vocab_size is not None and (largest := int(tokens.max())) >= vocab_size:
        raise UserError(
            f"{path}: token {largest} at place {int(tokens.argmax())} is beyond the vocabulary, whose ids "
            "are below "
            f"{vocab_size}; the shard belongs to another tokenizer or is damaged: {MAKE_AGAIN}."
        )
    return tokens


def _check_is_file(path: Path) -> None:
    """Raise OSError for a pipe or a device, which may never end; a link to a file is followed, for its hash decides."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "no regular file")


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class ShardEntry:
    """One shard as the manifest knows it."""

    file: str
    """Its name in the manifest's folder."""
    split: str
    tokens: int
    bytes: int
    """UTF-8 bytes of text that the tokens stand for."""
    documents: int
    """Documents that begin in it."""
    sha256: str


def is_whole(folder: Path, shard: ShardEntry) -> bool:
    """Return whether a shard lies in `folder` with the hash that is written of it."""
    try:
        return sha256_of(folder / shard.file) == shard.sha256
    except OSError:
        return False


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds."""

    corpus: str
    source_sha256: str
    """Of the texts both splits were made from."""
    tokenizer: dict[str, Any]
    """name, vocab_size, eot, and for `char` its chars."""
    shards: tuple[ShardEntry, ...]
    revision: str | None = None
    """Commit of the repository on the hub that it all came from; a manifest without one does not mention it."""

    def of_split(self, split: str) -> list[ShardEntry]:
        """Return the shards of one split, in order."""
        return [shard for shard in self.shards if shard.split == split]

    def n_tokens(self, split: str) -> int:
        return sum(shard.tokens for shard in self.of_split(split))

    def n_bytes(self, split: str) -> int:
        return sum(shard.bytes for shard in self.of_split(split))

    def n_documents(self, split: str) -> int:
        return sum(shard.documents for shard in self.of_split(split))

    @property
    def vocab_size(self) -> int:
        return int(self.tokenizer["vocab_size"])

    @property
    def sha256(self) -> str:
        """The identity of the prepared corpus: a hash of everything in the manifest."""
        content = json.dumps(self._content(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def _content(self) -> dict[str, Any]:
        content = {"format_version": MANIFEST_VERSION, **asdict(self)}
        if self.revision is None:
            del content["revision"]
        return content

    def write(self, folder: Path) -> None:
        """Write manifest.json into `folder`, whole or not at all."""
        text = json.dumps({**self._content(), "sha256": self.sha256}, indent=1, ensure_ascii=True) + "\n"
        with replacing(folder / MANIFEST_NAME) as file:
            file.write(text.encode())


def load_manifest(folder: Path) -> Manifest:
    """Return the manifest in `folder`; `UserError` if there is none, or it is damaged, altered or too new."""
    path = folder / MANIFEST_NAME
    try:
        _check_is_file(path)
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: no prepared corpus here (no {MANIFEST_NAME}); run `nanorun prepare-data CORPUS "
            f"--out {folder}`."
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); {PREPARE_AGAIN}.") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > MANIFEST_VERSION:
        raise UserError(
            f"{path}: format version {version}, this nanorun reads up to {MANIFEST_VERSION}; upgrade "
            f"nanorun or {PREPARE_AGAIN}."
        )
    if version != MANIFEST_VERSION:
        raise UserError(f"{path}: format version {version!r}, expected {MANIFEST_VERSION}; {PREPARE_AGAIN}.")
    try:
        manifest = _manifest_of(content)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); {PREPARE_AGAIN}.") from error
    if manifest.sha256 != content.get("sha256"):
        raise UserError(
            f"{path}: its content hashes to {manifest.sha256}, it says {content.get('sha256')}: it was "
            f"altered; {PREPARE_AGAIN}."
        )
    return manifest


def _manifest_of(content: dict[str, Any]) -> Manifest:
    shards = tuple(ShardEntry(**shard) for shard in content["shards"])
    for shard in shards:
        for key, value in asdict(shard).items():
            kind = int if key in ("tokens", "bytes", "documents") else str
            if type(value) is not kind or (type(value) is int and not 0 <= value < 2**63):
                raise ValueError(f"{key} is {ascii(value)[:60]}; expected a {kind.__name__}")
        if Path(shard.file).name != shard.file or shard.file in ("", "..") or "\0" in shard.file:
            raise ValueError(f"{shard.file!r} is not a plain file name")
    tokenizer = dict(content["tokenizer"])
    if type(tokenizer["name"]) is not str or type(tokenizer["vocab_size"]) is not int:
        raise ValueError("its tokenizer has no name or no vocab_size")
    revision = content.get("revision")
    return Manifest(
        str(content["corpus"]),
        str(content["source_sha256"]),
        tokenizer,
        shards,
        None if revision is None else str(revision),
    )
