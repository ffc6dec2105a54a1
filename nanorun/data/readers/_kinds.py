"""What kind of file a name promises: the format, and whether it is packed."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from nanorun.data.sources import Document
from nanorun.errors import UserError, nearest, shown

if TYPE_CHECKING:
    from nanorun.data.readers._input import FileInput

PACKINGS = {".gz": "gz", ".zst": "zst"}
PACKED_EXPANDS = {"": 1.0, "gz": 2.7, "zst": 3.0}
"""About how many bytes a packed one becomes, for English text."""
PLAIN = "plain"


class Reader(Protocol):
    """What a module in this folder offers, beside being one format."""

    SUMMARY: str
    SUFFIXES: tuple[str, ...]
    """Endings of the files that are taken from a folder, in lower case."""
    NAMED_SUFFIXES: tuple[str, ...]
    """More endings, of files that are only taken when named outright or by a glob."""
    PACKABLE: bool
    """Whether .gz and .zst may come on top."""
    EXPANDS: float
    """About how many bytes of text a byte of an unpacked file holds."""
    OPTION: str
    """Which of the options `column` and `separator` it heeds."""

    def documents(self, file: FileInput) -> Iterator[Document]:
        """Yield the documents of one file; `Broken` where it cannot be read on."""


class Kind(NamedTuple):
    """How a file is to be read."""

    format: str
    """A module of this folder."""
    suffix: str
    """Which of the format's endings it has, or was said to have; empty where neither."""
    packing: str
    """`gz`, `zst` or nothing."""

    @property
    def expands(self) -> float:
        """About how many bytes of text a byte of the file holds."""
        return load_reader(self.format).EXPANDS * PACKED_EXPANDS[self.packing]


@lru_cache(maxsize=1)
def reader_names() -> tuple[str, ...]:
    """Return the names of all formats, sorted."""
    package = import_module("nanorun.data.readers")
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(sorted(name for name in found if not name.startswith("_")))


@lru_cache
def load_reader(name: str) -> Reader:
    """Return the reader of the format `name`, one of `reader_names`."""
    return cast(Reader, import_module(f"nanorun.data.readers.{name}"))


def suffixes_in_folders() -> list[str]:
    """Return the endings of the files that are taken from a folder, before .gz and .zst."""
    return sorted(suffix for name in reader_names() for suffix in load_reader(name).SUFFIXES)


def kind_of(name: str, *, outright: bool) -> Kind | None:
    """Return how the file `name` is to be read, or None if its ending tells nothing.

    `outright` means that somebody named this very file: then every ending will do, an unknown one for plain
    text.
    """
    stem, packing = _without_packing(name)
    suffix = _suffix(stem)
    format = _formats(outright).get(suffix)
    if format is None:
        return Kind(PLAIN, "", packing) if outright else None
    if packing and not load_reader(format).PACKABLE:
        if not outright:
            return None
        raise UserError(f"{shown(name)}: {suffix} files are not read packed; unpack it first.")
    return Kind(format, suffix, packing)


def kind_said(format: str, name: str) -> Kind:
    """Return how `name` is to be read when its format was said: `jsonl`, `tsv`, `plain`, `jsonl.gz`, …

    Without a packing in what was said, the one of the file's own ending holds.
    """
    said, packing = _without_packing(f".{format.lower().lstrip('.')}")
    found = said[1:] if said[1:] in reader_names() else _formats(True).get(said)
    if found is None:
        known = sorted({*reader_names(), *(suffix[1:] for suffix in _formats(True))})
        raise UserError(
            f"--format {shown(format)}: there is no such format; there are {', '.join(known)}, and .gz and .zst "
            f"on top of all but parquet.{nearest(said[1:], known)}"
        )
    if not load_reader(found).PACKABLE:
        if packing:
            raise UserError(f"--format {shown(format)}: {found} is not read packed; unpack it first.")
        return Kind(found, said, "")
    return Kind(found, said, packing or _without_packing(name)[1])


@lru_cache(maxsize=2)
def _formats(outright: bool) -> dict[str, str]:
    """Return the format by ending."""
    found = {}
    for name in reader_names():
        reader = load_reader(name)
        more = reader.NAMED_SUFFIXES if outright else ()
        found.update(dict.fromkeys((*reader.SUFFIXES, *more), name))
    return found


def _without_packing(name: str) -> tuple[str, str]:
    """Return `name` in lower case without the ending of a packing, and that packing."""
    name = name.lower()
    for suffix, packing in PACKINGS.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), packing
    return name, ""


def _suffix(name: str) -> str:
    dot = name.rfind(".")
    return name[dot:] if dot > name.rfind("/") else ""
