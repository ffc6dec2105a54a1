"""The corpora: one module per corpus, found by its file name.

A corpus is a module here with the names of `Source`. Adding one touches no other file. A corpus that comes as
ready-made shards may one day offer a further function for them beside `documents`; nothing asks for it yet.
"""

from __future__ import annotations

import hashlib
import lzma
import pkgutil
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.resources import files
from typing import Literal, NamedTuple, Protocol, cast

from nanorun.errors import UserError, nearest

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")


class Document(NamedTuple):
    """One text that belongs together: an address, a file."""

    name: str
    text: str


class Source(Protocol):
    """What a module in this folder offers."""

    NAME: str
    SUMMARY: str
    """One line for listings."""
    EMBEDDED: bool
    """The texts ship inside the package: no network, no `--input`."""
    DEFAULT_TOKENIZER: str

    def documents(self, split: Split, inputs: Sequence[str] = ()) -> Iterator[Document]:
        """Yield the documents of one split, always in the same order."""

    def source_sha256(self, inputs: Sequence[str] = ()) -> str:
        """Return a hash of the contents of both splits, free of paths and dates."""


def source_names() -> list[str]:
    """Return the names of all corpora, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def load_source(name: str) -> Source:
    """Return the corpus `name`; a name that is not there is a `UserError`."""
    known = source_names()
    if name not in known:
        raise UserError(f"There is no corpus {name!r}; there are {', '.join(known)}.{nearest(name, known)}")
    return cast(Source, import_module(f"{__name__}.{name}"))


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


def refuse_inputs(name: str, inputs: Sequence[str]) -> None:
    """Raise `UserError` when an embedded corpus is given inputs: it would ignore them."""
    if inputs:
        raise UserError(
            f"Corpus {name!r} ships inside nanorun and takes no --input (found {inputs[0]!r}); "
            "for your own files: nanorun prepare-data text --input PATH"
        )
