"""The corpora: one module per corpus, found by its file name.

A corpus is a module here with the names of `Source`, or of `ReadySource` where somebody else has made the
shards already. Adding one touches no other file.
"""

from __future__ import annotations

import hashlib
import lzma
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

from typing_extensions import TypeIs

from nanorun.data.shards import Manifest
from nanorun.errors import UserError, nearest

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")
MOST_LISTED = 1000
"""Lines kept about what was left out; a file may have millions of bad ones."""


class LongText(NamedTuple):
    """A text too long to hold whole: it is read in pieces, the same ones each time."""

    pieces: Callable[[], Iterator[str]]
    """Joined they are the text; each ends where a word does, so that pieces can be tokenized by themselves."""


class Document(NamedTuple):
    """One text that belongs together: an address, a file, a row of a table."""

    name: str
    """Where it came from, for messages: `notes/a.txt`, `web.jsonl line 7`."""
    text: str | LongText
    split: Split | None = None
    """None where the hash of its content decides."""


class InputFile(NamedTuple):
    """One file that a corpus will be made from."""

    name: str
    size: int
    """Bytes on disk or on the wire, still compressed."""
    expands: float
    """About how many bytes of text a byte of it holds; 1.0 for plain text."""
    version: str
    """Changes when the content does: a modification time in ns, an ETag, a sha256."""
    tokens: int | None = None
    """How many it holds, where it holds tokens and that was looked at."""


class Step(NamedTuple):
    """How far a stage of the work is."""

    stage: str
    """`fetch`, `read`, `tokenize`, …"""
    done: float
    total: float | None
    """None where nobody can know."""
    unit: str
    """`bytes`, `documents` or `tokens`."""
    note: str = ""


def _silent(step: Step) -> None:
    pass


@dataclass
class Reading:
    """What a corpus is asked to read and how, and what came of it so far."""

    inputs: tuple[str, ...] = ()
    """Files, folders, globs, `-` for standard input."""
    format: str | None = None
    """Of the inputs, where their names do not tell: a module of nanorun/data/readers."""
    column: str | None = None
    """The field, column or key that holds the text; None takes `text`."""
    separator: str | None = None
    """Cuts a plain text file into documents; None makes each file one."""
    skip_bad: bool = False
    include: str | None = None
    """A glob over the files of a dataset on the hub; None lets the corpus choose."""
    revision: str | None = None
    """Commit of a repository on the hub; None takes the pinned one, or the newest where none is."""
    shards: int | None = None
    """How many training shards of a ready-made corpus; None takes its default."""
    workers: int = 1
    scratch: Path = field(default_factory=Path)
    """A folder for temporary files; what is left in it is removed at the end."""
    home: Path | None = None
    """The folder that is being prepared, for what has to outlive an interruption; None where there is none yet."""
    report: Callable[[Step], None] = _silent
    skipped: list[str] = field(default_factory=list)
    """One line for each thing left out under `skip_bad`, of the first `MOST_LISTED`."""
    n_skipped: int = 0
    """How many were left out in all."""
    empty: int = 0
    """Documents without text, passed over."""
    bytes_done: int = 0
    """Of the sizes of the inputs, how much has been read."""
    separated: int = 0
    """How often `separator` was met."""
    n_listed: int = 0
    """How many things were left out while the inputs were listed, which is done once for all passes."""
    kept: dict[Any, Any] = field(default_factory=dict)
    """What a corpus keeps from one call to the next: the files it found, standard input's copy."""

    def restart(self) -> None:
        """Forget what came of an earlier pass over the inputs."""
        del self.skipped[self.n_listed :]
        self.n_skipped = self.n_listed
        self.empty = self.bytes_done = self.separated = 0

    def bad(self, where: str, found: str, mend: str) -> None:
        """Note something that cannot be read, or raise `UserError` unless `skip_bad`.

        `where` names file and line or row, `found` says what is wrong there, `mend` what to do.
        """
        if not self.skip_bad:
            raise UserError(f"{where}: {found}; {mend}, or leave such things out with --skip-bad.")
        self.n_skipped += 1
        if self.n_skipped <= MOST_LISTED:
            self.skipped.append(f"{where}: {found}")


class Source(Protocol):
    """What a module in this folder offers."""

    NAME: str
    SUMMARY: str
    """One line for listings."""
    EMBEDDED: bool
    """The texts ship inside the package: no network, no `--input`."""
    TAKES_INPUT: bool
    """It is made from files that the user names."""
    OPTIONS: tuple[str, ...]
    """Which of input, format, column, separator, include, revision, shards, skip-bad and keep-duplicates it heeds."""
    DEFAULT_TOKENIZER: str
    SOURCE_SHA256: str | None
    """Of the texts, where it is known beforehand; None: the hash of the documents' hashes, in their order."""

    def files(self, reading: Reading) -> list[InputFile]:
        """Return what would be read, in its order; `UserError` if it is not there. Nothing is read or fetched."""

    def documents(self, reading: Reading) -> Iterator[Document]:
        """Yield the documents, always in the same order; `reading.bytes_done` grows on the way."""


class ReadySource(Protocol):
    """What a module in this folder offers whose corpus somebody has already made into shards."""

    NAME: str
    SUMMARY: str
    EMBEDDED: bool
    TAKES_INPUT: bool
    OPTIONS: tuple[str, ...]
    DEFAULT_TOKENIZER: str

    def files(self, reading: Reading) -> list[InputFile]:
        """As `Source.files`."""

    def is_current(self, out: Path, manifest: Manifest, reading: Reading) -> bool:
        """Return whether `manifest` in `out` is what `make_ready` would leave; without a network."""

    def make_ready(self, out: Path, reading: Reading, tokenizer: str | None) -> Manifest:
        """Leave the shards in `out` and return their manifest, which the caller writes.

        Can be interrupted at any point and called again; what is whole is not made again.
        """


def is_ready(source: Source | ReadySource) -> TypeIs[ReadySource]:
    """Return whether a corpus comes as shards."""
    return hasattr(source, "make_ready")


def source_names() -> list[str]:
    """Return the names of all corpora, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def load_source(name: str) -> Source | ReadySource:
    """Return the corpus `name`; a name that is not there is a `UserError`.

    A module may hold the corpus as `CORPUS`.
    Of `family:argument`, such as `hub:OWNER/NAME`, the module `family` makes the corpus by its function `named`.
    """
    family, colon, argument = name.partition(":")
    known = source_names()
    if family not in known and not colon and ("/" in name or Path(name).exists()):
        raise UserError(
            f"{name}: a path is no corpus; for your own files: nanorun prepare-data text --input {name}"
        )
    if family not in known:
        raise UserError(f"There is no corpus {name!r}; there are {', '.join(known)}.{nearest(name, known)}")
    module = import_module(f"{__name__}.{family}")
    if not colon and hasattr(module, "CORPUS"):
        return cast("ReadySource", module.CORPUS)
    if not colon and not hasattr(module, "NAME"):
        raise UserError(f"Corpus {name!r} is a family: expected {module.USAGE}.")
    if colon and not hasattr(module, "named"):
        raise UserError(
            f"There is no corpus {name!r}: {family!r} is one by itself; leave {colon + argument!r} out."
        )
    return cast("Source | ReadySource", module.named(argument) if colon else module)


def options_of(name: str) -> tuple[str, ...]:
    """Return the options that the corpus `name`, or a family's corpora, heed."""
    module = import_module(f"{__name__}.{name}")
    return cast("tuple[str, ...]", getattr(module, "CORPUS", module).OPTIONS)


def read_packed(name: str, sha256: str) -> bytes:
    """Return the unpacked content of `corpora/<name>.xz`, whose packed bytes must hash to `sha256`."""
    packed = files("nanorun.data").joinpath("corpora", f"{name}.xz")
    try:
        content = packed.read_bytes()
    except OSError as error:
        raise UserError(
            f"The embedded corpus {packed} cannot be read ({error}); install nanorun again."
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UserError(
            f"{packed} has sha256 {found}, expected {sha256}: it is damaged; install nanorun again."
        )
    return lzma.decompress(content)


def packed_file(name: str, sha256: str, text_bytes: int) -> InputFile:
    """Return what `read_packed` reads, `text_bytes` of text when it is unpacked."""
    packed = files("nanorun.data").joinpath("corpora", f"{name}.xz")
    size = packed.stat().st_size if isinstance(packed, Path) else 0
    return InputFile(f"{name}.xz", size, text_bytes / max(size, 1), sha256)


def refuse_inputs(name: str, reading: Reading) -> None:
    """Raise `UserError` when an embedded corpus is given inputs: it would ignore them."""
    if reading.inputs:
        raise UserError(
            f"Corpus {name!r} ships inside nanorun and takes no --input (found {reading.inputs[0]!r}); "
            "for your own files: nanorun prepare-data text --input PATH"
        )
