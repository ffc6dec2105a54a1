"""Whose code a run may import: what the command line names, and nothing that a file alone asks for.

A config's optimizer may be a class from outside, "package.module:Class" or "path/to/file.py:Class", and importing
it runs its code. A preset, or the folder of a run, may come from anybody.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path

from nanorun.config import RunConfig
from nanorun.data.shards import sha256_of
from nanorun.errors import UserError, shown
from nanorun.tables import nested, parse_setting

HARMLESS = "torch.optim"
"""Loaded with torch before any config is read, so naming it runs nothing new."""


def outside_names(config: RunConfig) -> list[str]:
    """Return the optimizers whose import would run code from outside nanorun and torch, each once."""
    names = [table.get("name") for table in config.optim.values()]
    outside = [name for name in names if isinstance(name, str) and ":" in name]
    return [name for name in dict.fromkeys(outside) if name.rpartition(":")[0] != HARMLESS]


def names_on_the_command_line(optim: str | None, settings: Sequence[str]) -> set[str]:
    """Return the names that `--optim` and `--set optim.ROLE.name=…` hold."""
    tables = nested(parse_setting(text) for text in settings).get("optim")
    roles = tables.values() if isinstance(tables, dict) else ()
    return {optim or "", *(str(role.get("name")) for role in roles if isinstance(role, dict))}


def check_trusted(config: RunConfig, *, named: Iterable[str], trust_code: bool, where: str) -> str:
    """Return a line on the code that is trusted though the user did not name it; empty where there is none.

    `named` are the names on the command line, `where` says where the config lies. Raises UserError that shows what
    would run, unless `trust_code` is given.
    """
    strangers = [name for name in outside_names(config) if name not in named]
    told = "; ".join(_told(name) for name in strangers)
    if not strangers or trust_code:
        return told and f"trusted, as asked: {told}"
    raise UserError(
        f"{where} takes an optimizer from outside nanorun, and importing it runs its code with your rights: {told}. "
        "Read it, then add --trust-code, or name it yourself with --optim or --set optim.ROLE.name=…"
    )


def trust_flag(config: RunConfig) -> str:
    """Return what a command that takes the run up again needs to import the same code: " --trust-code" or nothing."""
    return " --trust-code" if outside_names(config) else ""


def _told(name: str) -> str:
    """Return the class and, as far as it can be known without importing, the file that would run, with its hash."""
    where = name.rpartition(":")[0]
    path = Path(where) if where.endswith(".py") else _file_of_package(where)
    if path is None or not path.is_file():
        return f"{shown(name)} (not found here)"
    digest = sha256_of(path)[:12]
    return f"{shown(name)} ({shown(path.resolve())}, sha256 {digest})"


def _file_of_package(module: str) -> Path | None:
    """Return the file that importing a module would run first; only the outermost package is looked up."""
    try:
        found = importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError, AttributeError):
        return None
    return Path(found.origin) if found and found.origin else None
