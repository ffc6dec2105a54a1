"""Nested tables: TOML in and out, `key=value` settings, dotted keys."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nanorun.errors import UserError


def parse_setting(text: str) -> tuple[str, Any]:
    """Return the dotted key and the value of one `--set key=value`; values are TOML, bare words strings."""
    key, equals, raw = text.partition("=")
    key, raw = key.strip(), raw.strip()
    if not equals or not key or not raw:
        raise UserError(f"--set {text!r}: wanted key=value, for example --set train.steps=100")
    try:
        table = tomllib.loads(f"value = {raw}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return key, raw
    # A line break in the value would begin another key.
    return key, table["value"] if list(table) == ["value"] else raw


def read_toml(path: Path) -> dict[str, Any]:
    """Return a TOML file's content; raises UserError with the line that is wrong."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not readable as TOML: {error}") from None


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested tables laid over each other, later ones on top."""
    out: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = out.get(key)
            both_tables = isinstance(value, Mapping) and isinstance(below, Mapping)
            out[key] = merged(below, value) if both_tables and below is not None else value
    return out


def nested(settings: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return nested tables from dotted keys; the last value of a key stays."""
    out: dict[str, Any] = {}
    for key, value in settings:
        for part in reversed(key.split(".")):
            value = {part: value}
        out = merged(out, value)
    return out


def flattened(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted keys of nested tables."""
    out: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            out.update(flattened(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = value
    return out


def to_toml(table: Mapping[str, Any]) -> str:
    """Return nested tables of scalars and lists as TOML, scalars before tables."""
    lines: list[str] = []
    _write_table(table, "", lines)
    return "\n".join(lines).lstrip("\n") + "\n"


def _write_table(table: Mapping[str, Any], prefix: str, lines: list[str]) -> None:
    scalars = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    if prefix and (scalars or not table):
        lines += ["", f"[{prefix}]"]
    lines += [
        f"{_toml_key(key)} = {_toml_value(value)}" for key, value in scalars.items() if value is not None
    ]
    for key, value in table.items():
        if isinstance(value, Mapping):
            dotted = _toml_key(key)
            _write_table(value, f"{prefix}.{dotted}" if prefix else dotted, lines)


def _toml_key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else _toml_value(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    # A JSON string is a TOML basic string once DEL, which JSON leaves bare, is escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
