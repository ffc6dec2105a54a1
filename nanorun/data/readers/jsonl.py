"""JSON lines: one object a line, the text under one of its keys."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from typing import Any

from nanorun.data.readers._columns import missing
from nanorun.data.readers._input import DEFAULT_COLUMN, FileInput, lone_surrogate, not_utf8
from nanorun.data.sources import Document

SUMMARY = "JSON lines, the text under --column of each object"
SUFFIXES: tuple[str, ...] = (".jsonl", ".ndjson")
NAMED_SUFFIXES: tuple[str, ...] = (".json",)
"""In folders most of these are settings and the like, not JSON lines."""
PACKABLE = True
EXPANDS = 0.9
OPTION = "column"

_decode = json.JSONDecoder().decode
_fast: Callable[[bytes], Any] | None = None
"""orjson's parser, which takes half the time; what it refuses Python's own has the last word on."""
with suppress(ImportError):
    _fast = import_module("orjson").loads
_KINDS = {
    dict: "an object",
    list: "an array",
    int: "a number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


def documents(file: FileInput) -> Iterator[Document]:
    """Yield the text of each line that has some."""
    column = file.reading.column or DEFAULT_COLUMN
    reading, name = file.reading, file.name
    number = 0
    for lines in file.lines():
        for line in lines:
            number += 1
            try:
                text = _value(line, column)
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                if line and not line.isspace():
                    reading.bad(f"{name} line {number}", *_why(line, column, error))
                continue
            if type(text) is not str:
                if text is None:
                    reading.empty += 1
                else:
                    found = f"{column!r} holds {_KINDS[type(text)]}, not text"
                    reading.bad(
                        f"{name} line {number}", found, "name the key that holds the text with --column"
                    )
            elif not text or text.isspace():
                reading.empty += 1
            elif not text.isascii() and (half := lone_surrogate(text)):
                found = f"\\u{ord(half):04x} without its other half, which is no character"
                reading.bad(
                    f"{name} line {number}", found, "write it again with a program that keeps pairs whole"
                )
            else:
                yield Document(f"{name} line {number}", text)
    if not number:
        reading.empty += 1


def _value(line: bytes, column: str) -> Any:
    """Return what a line has under `column`; whichever parser is there, the same."""
    if _fast is not None:
        with suppress(ValueError, LookupError, TypeError, RecursionError):
            return _fast(line)[column]
    return _decode(line.decode())[column]


def _why(line: bytes, column: str, error: Exception) -> tuple[str, str]:
    """Return what is wrong with a line of which no text could be had, and how to mend it."""
    if isinstance(error, UnicodeDecodeError):
        return not_utf8(error, f"byte {error.start} of the line")
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON ({error.msg} at column {error.colno})", "expected one JSON object a line"
    if isinstance(error, RecursionError):
        return "JSON nested too deep", "expected one JSON object a line"
    if isinstance(error, ValueError):
        return f"JSON that cannot be read ({str(error).partition(';')[0]})", "expected one JSON object a line"
    row = _decode(line.decode())
    if isinstance(row, dict):
        return missing("key", column, list(row))
    wanted = "expected one JSON object a line"
    if isinstance(row, list):
        wanted += "; of an array makes jq -c '.[]' FILE that"
    return f"{_KINDS[type(row)]}, not an object", wanted
