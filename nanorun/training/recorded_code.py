"""The code that a record ran with: shown before anything of it runs, and checked out where it may run.

A record's patch and the optimizers in it are programs of somebody else. Nothing here runs them; `worktree` lays
them out for whoever was told to trust them.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from rich.console import Console

import nanorun
from nanorun.errors import UserError, printable
from nanorun.records.record import Record
from nanorun.training import machine
from nanorun.training.setup import PATCH, say

MAX_BYTES = 2 * machine.MAX_PATCH_BYTES
"""A patch is smaller than this: what a run keeps of its tree, and its optimizers from outside."""
SHOWN_LINES = 400
SHOWN_CHARS = 20_000
ALLOWED = ("nanorun", "configs", "outside")
"""The folders that a run's patch can be about."""

_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_UNREADABLE = re.compile(
    r"^(GIT binary patch|Binary files |(?:rename|copy) (?:from|to|old|new) )|\0", re.MULTILINE
)
"""What git applies and a reader of the patch does not see: code as bytes, and code that comes from another name."""
_COMPILED = (".pyc", ".pyo", ".so", ".pyd", ".dll", ".dylib")


def outside_names(record: Record) -> list[str]:
    """Return the optimizers that the config takes from outside nanorun, as it names them."""
    optim = record.config.get("optim")
    tables = optim.values() if isinstance(optim, dict) else ()
    names = [str(table.get("name")) for table in tables if isinstance(table, dict)]
    return list(dict.fromkeys(name for name in names if ":" in name))


def read_recorded_patch(folder: Path, record: Record) -> str | None:
    """Return the text of the record's patch; None where its code was that of its commit. Raises UserError."""
    if record.code.patch is None:
        return None
    path = folder / PATCH
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_BYTES:
            raise UserError(
                f"{path} is no file of at most {MAX_BYTES:,} bytes, so it is no patch that a run left"
            )
        content = path.read_bytes()
        _check_hash(content, record.code.patch_sha256, path)
        return content.decode("utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}), and the record says it is there"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 at byte {error.start}, so it is no patch that a run left"
        ) from None


def _check_hash(content: bytes, wanted: str, path: Path) -> None:
    """Raise UserError where a patch is not the one whose hash the record holds; older records hold none."""
    found = hashlib.sha256(content).hexdigest()
    if wanted and found != wanted:
        raise UserError(
            f"{path} is not the patch that the record's run left: its sha256 is {found[:12]}…, and the record says "
            f"{printable(wanted)[:12]}…; take the record's whole folder from where it was published"
        )


def show_code(console: Console, record: Record, patch: str | None, path: Path) -> None:
    """Print the code that a record brings along, control characters as escapes, and where the whole of it is."""
    for name in outside_names(record):
        say(console, f"the record's config takes an optimizer from outside nanorun: {printable(name)}")
    if patch is None:
        return
    shown = "\n".join(patch[:SHOWN_CHARS].split("\n")[:SHOWN_LINES])
    say(
        console,
        f"the code that the record adds to commit {printable(str(record.code.commit))}, from {path}:\n",
    )
    say(console, printable(shown.replace("\t", "    ")))
    left = len(patch) - len(shown)
    if left > 0:
        say(console, f"\n... and {left:,} characters more, not shown: read the whole in {path}")


def same_code(record: Record, recorded_patch: str | None) -> bool:
    """Return whether the code here is the one that the record ran with, all of nanorun/ compared."""
    code, patch = machine.code_identity()
    mine = (code["version"], code["commit"])
    if record.code.dirty or recorded_patch is not None:
        return mine == (record.code.version, record.code.commit) and bool(patch) and patch == recorded_patch
    if not code["dirty"] and mine == (record.code.version, record.code.commit):
        return True
    package = Path(nanorun.__file__).resolve().parent
    commit = record.code.commit
    if code["commit"] is None or code["dirty"] or commit is None or not _COMMIT.fullmatch(commit):
        return False
    # Commits that differ elsewhere, in records or words, ran the same code.
    return _git(package, "diff", "--quiet", commit, "HEAD", "--", str(package)).returncode == 0


def is_in_history(record: Record) -> bool:
    """Return whether the record's commit is one that the code here grew out of."""
    commit = record.code.commit or ""
    package = Path(nanorun.__file__).resolve().parent
    if not _COMMIT.fullmatch(commit) or machine.code_identity()[0]["commit"] is None:
        return False
    return _git(package, "merge-base", "--is-ancestor", commit, "HEAD").returncode == 0


def repository_of(record: Record) -> Path:
    """Return a repository that holds the record's commit, nanorun's own or that of this folder. Raises UserError."""
    commit = record.code.commit
    if commit is None:
        raise UserError(
            f"{record.id} does not say which commit it ran at (nanorun {printable(record.code.version)}, not from a "
            "clone), so its code cannot be checked out; ask whoever made it for the commit"
        )
    if not _COMMIT.fullmatch(commit):
        raise UserError(f"{record.id} names the commit {ascii(commit)[:60]}, which is no full hash of git's")
    for folder in (Path(nanorun.__file__).resolve().parent, Path.cwd()):
        if _git(folder, "cat-file", "-e", f"{commit}:nanorun/__init__.py").returncode == 0:
            return Path(_git(folder, "rev-parse", "--show-toplevel").stdout.rstrip("\n"))
    raise UserError(
        f"{record.id} ran at commit {commit}, and neither nanorun nor this folder is a git clone that holds it: run "
        "this in a clone of nanorun after `git fetch --all`, or ask whoever made the record where the commit is"
    )


@contextmanager
def worktree(repository: Path, commit: str, patch: str | None, place: Path) -> Iterator[Path]:
    """Lay a commit with a patch out at `place`, and take it away after. Raises UserError.

    No hook runs, and git refuses a patch that reaches out of the tree; one that touches anything but nanorun,
    configs and outside, or whose text does not show the code it makes, is refused here.
    """
    _remove(repository, place)
    try:
        made = _git(repository, "worktree", "add", "--detach", "--force", str(place), commit)
        if made.returncode:
            raise UserError(f"commit {commit} cannot be checked out to {place}: {_last_words(made)}")
        if patch is not None:
            _apply(place, patch)
        yield place
    finally:
        _remove(repository, place)


def _apply(place: Path, patch: str) -> None:
    hidden = _UNREADABLE.search(patch)
    listed = _git(place, "apply", "--numstat", "-z", "-", said=patch)
    if hidden or re.search(r"(?:^|\0)-\t-\t", listed.stdout):
        what = ascii(hidden[0].strip()) if hidden else "bytes that are no text"
        raise UserError(
            f"the record's patch holds {what}, so its text does not show all the code that would run: nothing of it "
            "was applied"
        )
    for line in listed.stdout.split("\0"):
        if line.count("\t") >= 2:
            _check_name(line.split("\t", 2)[2])
    done = _git(place, "apply", "--index", "--whitespace=nowarn", "-", said=patch)
    if listed.returncode or done.returncode:
        raise UserError(
            f"the record's patch does not apply to its commit ({_last_words(listed if listed.returncode else done)}): "
            "it is damaged, or it belongs to another commit"
        )
    # A link would run a file of this machine in place of the text that was shown.
    if re.search(r"^:[0-7]+ 120000 ", _git(place, "diff", "--cached", "--raw", "HEAD").stdout, re.MULTILINE):
        raise UserError(
            "the record's patch makes a symbolic link, and no run leaves such a patch: it was not run"
        )


def _check_name(name: str) -> None:
    """Return nothing, or raise UserError for a file that no run's patch is about."""
    parts = PurePath(name).parts
    if name.startswith("/") or ".." in parts or not parts or parts[0] not in ALLOWED:
        raise UserError(
            f"the record's patch touches {ascii(name)[:80]}, and a run's patch is about {', '.join(ALLOWED)} "
            "alone: nothing of it was applied"
        )
    lower = [part.casefold() for part in parts]
    hidden = any(part == "__pycache__" or part.startswith(".git") for part in lower)
    if hidden or lower[-1].endswith(_COMPILED):
        raise UserError(
            f"the record's patch touches {ascii(name)[:80]}, which is compiled code or git's own, and no run leaves "
            "such a patch: nothing of it was applied"
        )


def _remove(repository: Path, place: Path) -> None:
    _git(repository, "worktree", "remove", "--force", str(place))
    shutil.rmtree(place, ignore_errors=True)


def _git(folder: Path, *words: str, said: str | None = None) -> subprocess.CompletedProcess[str]:
    """Return what git did in `folder`, without hooks, whatever repository the environment points at."""
    surroundings = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        return subprocess.run(
            ["git", "-c", "core.hooksPath=/dev/null", "-C", str(folder), *words],
            input=said,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=surroundings,
            timeout=120,
        )
    except (OSError, subprocess.SubprocessError) as error:  # 127: what a shell says where there is no git
        return subprocess.CompletedProcess(words, 127, "", str(error))


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines() or [f"git ended with {done.returncode}"]
    return printable(lines[-1])[:300]


def with_recorded_optimizers(config: dict[str, Any], tree: Path) -> dict[str, Any]:
    """Return the config with `path/to/file.py:Class` pointing at the file of that name in the patch.

    A `package.module:Class` stays: it is taken from what is installed here. Raises UserError for a file that the
    record does not hold.
    """
    optim = {}
    for role, table in config["optim"].items():
        name = table.get("name")
        where, colon, class_name = str(name).rpartition(":")
        if colon and where.endswith(".py"):
            file = tree / "outside" / PurePath(where.replace("\\", "/")).name
            if not file.is_file():
                raise UserError(
                    f"the config takes {ascii(name)[:100]}, and the record's patch holds no outside/{file.name}: the "
                    "record does not hold its optimizer"
                )
            table = {**table, "name": f"{file}:{class_name}"}
        optim[role] = table
    return {**config, "optim": optim}


def trusting(tree: Path) -> list[str]:
    """Return the option that lets the code in `tree` import an optimizer; older code neither has nor needs one."""
    return ["--trust-code"] if (tree / "nanorun" / "training" / "trust.py").is_file() else []
