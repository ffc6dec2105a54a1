"""What a folder of tokens holds, and whether it is sound: `nanorun prepare-data --check FOLDER`.

Nothing is changed. All faults are listed, not only the first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nanorun.data import foreign
from nanorun.data.foreign import Found, TokenFile, Vocabulary, chunks_of, documents_between, shown
from nanorun.data.shards import (
    HEADER_BYTES,
    INPUTS_NAME,
    JOURNAL_NAME,
    MAKE_AGAIN,
    MANIFEST_NAME,
    MANIFEST_VERSION,
    PARTIAL,
    PREPARE_AGAIN,
    ShardEntry,
    load_manifest,
    open_shard,
    sha256_of,
)
from nanorun.data.sources import SPLITS, Step
from nanorun.data.tally import Tally
from nanorun.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer
from nanorun.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID
    from rich.table import Table

SOUND, NOT_SOUND, UNKNOWN = 0, 1, 2
"""Exit codes."""
_UNFINISHED = (PARTIAL, ".tmp")
_GPT2_EOT = 50256
_READY_MADE = ("shards",)
"""Corpora whose documents may have been counted by an index, and not by ends of text."""

Report = Callable[[Step], None]


@dataclass
class CheckedFile:
    """One file of tokens."""

    name: str
    split: str | None
    """None where nothing says it."""
    size: int | None
    """Bytes on disk; None where it is not there."""
    dtype: str | None = None
    tokens: int | None = None
    bytes: int | None = None
    """Of text; None where it cannot be known."""
    documents: int | None = None
    sha256: str = "none kept"
    """`right`, `wrong`, `not there`, or `none kept` where there is nothing to compare with."""


@dataclass
class Checked:
    """What a folder holds."""

    folder: Path
    holds: str
    """`nanorun`, `unfinished`, `llm.c`, `nanoGPT`, `datatrove` or `unknown`."""
    title: str
    """The same for people."""
    corpus: str | None = None
    tokenizer: str | None = None
    """For people: a name, and how it is known."""
    files: list[CheckedFile] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    is_known: bool = True
    """False where nothing can be said of whether it is sound."""

    @property
    def exit_code(self) -> int:
        if not self.is_known:
            return UNKNOWN
        return NOT_SOUND if self.faults else SOUND

    def total(self, key: str, split: str) -> int | None:
        """Return the sum of `tokens`, `bytes` or `documents` of a split; None where one is not known."""
        values = [getattr(file, key) for file in self.files if file.split == split]
        return None if None in values else sum(values)


def check_folder(folder: Path, report: Report = lambda step: None) -> Checked:
    """Return what is in `folder`; UserError if it is none, or cannot be looked into."""
    if not folder.is_dir():
        found = "a file" if folder.exists() else "not there"
        raise UserError(f"--check {shown(folder)}: {found}; expected a folder of token files.")
    files = foreign.plain_files(folder)
    names = {path.name for path in files}
    progress = _Progress(report)
    if MANIFEST_NAME in names:
        return _check_ours(folder, files, progress)
    if JOURNAL_NAME in names or INPUTS_NAME in names or any(name.endswith(_UNFINISHED) for name in names):
        return _check_unfinished(folder, files, progress)
    formats = foreign.recognise(files)
    if not formats:
        return _nothing_known(folder, files)
    checked = _check_foreign(folder, formats[0], files, progress)
    checked.notes += [
        f"there are files of {other.NAME} as well, which were not looked at; move them into a folder of their own"
        for other in formats[1:]
    ]
    return checked


class _Progress:
    """Adds up what was read."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._done = 0
        self.total: int | None = None

    def read(self, n_bytes: int, name: str) -> None:
        self._done += n_bytes
        self._report(Step("check", self._done, self.total, "bytes", name))


def _nothing_known(folder: Path, files: Sequence[Path]) -> Checked:
    said = f"{len(files):,} files, none of a form that is known" if files else "no files"
    checked = Checked(folder, "unknown", said, is_known=False)
    checked.faults.append(
        f"{shown(folder)}: {said}; expected a {MANIFEST_NAME}, shards of llm.c or modded-nanogpt, nanoGPT's train.bin "
        "and val.bin, or datatrove's .ds files."
    )
    return checked


def _check_ours(folder: Path, files: Sequence[Path], progress: _Progress) -> Checked:
    checked = Checked(folder, "nanorun", "prepared by nanorun")
    try:
        load_manifest(folder)
    except UserError as error:
        checked.faults.append(str(error))
    # What an altered manifest says is compared with the shards all the same.
    content = _json(folder / MANIFEST_NAME)
    if not content:
        return checked
    if _is_newer(content):
        checked.is_known = False
    entries = _entries(content, checked)
    tokenizer = _table(content, "tokenizer")
    checked.corpus = shown(str(content["corpus"])) if "corpus" in content else None
    checked.tokenizer = _our_tokenizer(tokenizer)
    progress.total = sum(size for entry in entries if (size := _size(folder / entry.file)))
    for entry in entries:
        checked.files.append(_check_shard(folder, entry, checked, tokenizer, progress))
    _check_splits(folder, entries, checked)
    _check_tokenizer_file(folder, tokenizer, checked)
    _check_leftovers(files, entries, tokenizer, checked)
    _tell_what_is_held_out(folder, checked)
    return checked


def _table(content: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the table under `key`; an empty one where there is none."""
    found = content.get(key)
    return found if isinstance(found, dict) else {}


def _is_newer(content: dict[str, Any]) -> bool:
    version = content.get("format_version")
    return isinstance(version, int) and version > MANIFEST_VERSION


def _entries(content: dict[str, Any], checked: Checked) -> list[ShardEntry]:
    """Return the entries that can be read; those that cannot are part of the manifest's own fault."""
    found: list[ShardEntry] = []
    listed = content.get("shards")
    for one in listed if isinstance(listed, list) else []:
        with suppress(TypeError, ValueError):
            entry = ShardEntry(**one)
            numbers = (entry.tokens, entry.bytes, entry.documents)
            texts = (entry.file, entry.split, entry.sha256)
            plain = all(type(n) is int for n in numbers) and all(isinstance(text, str) for text in texts)
            if plain and Path(entry.file).name == entry.file and "\0" not in entry.file:
                found.append(entry)
    names = [entry.file for entry in found]
    for name in sorted({name for name in names if names.count(name) > 1}):
        checked.faults.append(f"{MANIFEST_NAME}: names {shown(name)} twice; {PREPARE_AGAIN}.")
    return found


def _our_tokenizer(entry: dict[str, Any]) -> str | None:
    if not entry:
        return None
    return f"{shown(str(entry.get('name')))}, {_number(entry.get('vocab_size'))} entries"


def _number(value: Any) -> str:
    return f"{value:,}" if type(value) is int else shown(str(value)[:40])


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size if foreign.is_plain(path) else None
    except OSError:
        return None


def _check_shard(
    folder: Path,
    entry: ShardEntry,
    checked: Checked,
    tokenizer: dict[str, Any],
    progress: _Progress,
    by: str = "manifest",
) -> CheckedFile:
    """Return what one of our shards is; what is wrong with it goes to the faults. `by` is what names it."""
    path, faults = folder / entry.file, checked.faults
    file = CheckedFile(entry.file, entry.split, _size(path), None, entry.tokens, entry.bytes, entry.documents)
    if file.size is None:
        file.sha256 = "not there"
        faults.append(f"{shown(path)}: the {by} names it and it is not there; {MAKE_AGAIN}.")
        return file
    try:
        tokens = open_shard(path)
        file.dtype = tokens.dtype.name
        as_file = TokenFile(path, None, HEADER_BYTES, tokens.dtype, len(tokens))
        del tokens
        found, tally = _read_through(as_file, tokenizer, progress)
    except UserError as error:
        faults.append(shown(str(error)))
        try:
            file.sha256 = "right" if sha256_of(path) == entry.sha256 else "wrong"
        except OSError:
            file.sha256 = "not there"
        return file
    file.sha256 = "right" if found == entry.sha256 else "wrong"
    if file.sha256 == "wrong":
        faults.append(
            f"{shown(path)}: sha256 {found}, its {by} says {shown(entry.sha256)}: damaged or altered; "
            f"{MAKE_AGAIN}."
        )
    _check_counts(path, entry, tally, tokenizer, checked, by)
    return file


def _read_through(file: TokenFile, tokenizer: dict[str, Any], progress: _Progress) -> tuple[str, Tally]:
    """Return the sha256 of one of our shards and what its tokens come to."""
    tally = _tally(tokenizer.get("eot"), _counting_tokenizer(tokenizer))
    found = hashlib.sha256(foreign.head_of(file.path, HEADER_BYTES))
    for chunk in chunks_of(file):
        data = chunk.tobytes()
        found.update(data)
        tally.see(chunk)
        tally.count(chunk)
        progress.read(len(data), file.path.name)
    return found.hexdigest(), tally


def _tally(eot: Any, tokenizer: Tokenizer | None) -> Tally:
    """Return a tally that leaves out of the bytes what is no id of `tokenizer`: that is a fault of its own."""

    def bytes_of(ids: npt.NDArray[Any]) -> int:
        assert tokenizer is not None
        return tokenizer.bytes_of(ids[ids < tokenizer.vocab_size])

    return Tally(eot if type(eot) is int else None, bytes_of if tokenizer else None)


def _counting_tokenizer(entry: dict[str, Any]) -> Tokenizer | None:
    """Return the tokenizer of a manifest if it can count bytes of text and needs no file of a vocabulary for it."""
    if entry.get("name") == "byte":
        return ByteTokenizer()
    chars = entry.get("chars")
    if entry.get("name") == "char" and isinstance(chars, str) and chars:
        return CharTokenizer(chars)
    return None


def _check_counts(
    path: Path, entry: ShardEntry, tally: Tally, tokenizer: dict[str, Any], checked: Checked, by: str
) -> None:
    """Compare what a shard's tokens come to with what its manifest, or journal, says."""
    where, faults = shown(path), checked.faults
    vocab_size = tokenizer.get("vocab_size")
    if type(vocab_size) is int and tally.largest >= vocab_size:
        faults.append(
            f"{where}: token {tally.largest:,} at place {tally.largest_at:,} is beyond the vocabulary, whose ids are "
            f"below {vocab_size:,}; {MAKE_AGAIN}."
        )
    pairs = [("tokens", tally.tokens, entry.tokens)]
    if type(tokenizer.get("eot")) is int and checked.corpus not in _READY_MADE:
        pairs.append(("documents", tally.eots, entry.documents))
    if _counting_tokenizer(tokenizer):
        pairs.append(("bytes of text", tally.bytes, entry.bytes))
    faults += [
        f"{where}: {found:,} {what}, its {by} says {said:,}; {MAKE_AGAIN}."
        for what, found, said in pairs
        if found != said
    ]


def _check_splits(folder: Path, entries: Sequence[ShardEntry], checked: Checked) -> None:
    if not entries:
        checked.faults.append(f"{shown(folder / MANIFEST_NAME)}: names no shards; {PREPARE_AGAIN}.")
        return
    checked.faults += [
        f"{shown(folder / MANIFEST_NAME)}: names no {split} shards; {PREPARE_AGAIN}."
        for split in SPLITS
        if not any(entry.split == split for entry in entries)
    ]


def _check_tokenizer_file(folder: Path, tokenizer: dict[str, Any], checked: Checked) -> None:
    """Compare tokenizer.json with the hash that the manifest has of it, if it has one."""
    wanted = tokenizer.get("sha256")
    if wanted is None:
        return
    path = folder / "tokenizer.json"
    try:
        found = sha256_of(path)
    except OSError as error:
        checked.faults.append(f"{shown(path)}: cannot be read ({error.strerror}); {PREPARE_AGAIN}.")
        return
    if found != wanted:
        checked.faults.append(
            f"{shown(path)}: sha256 {found}, the manifest says {shown(str(wanted))}: it was altered; {PREPARE_AGAIN}."
        )


def _check_leftovers(
    files: Sequence[Path], entries: Sequence[ShardEntry], tokenizer: dict[str, Any], checked: Checked
) -> None:
    """Tell of files that the manifest does not name: what looks like part of a preparation is a fault."""
    ours = {entry.file for entry in entries} | {MANIFEST_NAME, INPUTS_NAME}
    ours |= {"tokenizer.json"} if tokenizer.get("sha256") is not None else set()
    for path in files:
        if path.name in ours:
            continue
        if path.suffix == ".bin" or path.name.endswith(_UNFINISHED) or path.name == JOURNAL_NAME:
            checked.faults.append(
                f"{shown(path)}: the manifest does not name it, nothing reads it; delete it."
            )
        else:
            checked.notes.append(f"{shown(path.name)} is no part of the corpus")


def _tell_what_is_held_out(folder: Path, checked: Checked) -> None:
    """Add what inputs.json knows of a validation split that no name chose."""
    content = _json(folder / INPUTS_NAME)
    held_out = content.get("held_out")
    if isinstance(held_out, str):
        checked.notes.append(shown(held_out))


def _json(path: Path) -> dict[str, Any]:
    """Return a JSON object of ours, or nothing."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _check_unfinished(folder: Path, files: Sequence[Path], progress: _Progress) -> Checked:
    """Tell how far a preparation of ours has come that was interrupted, or is still going on."""
    checked = Checked(folder, "unfinished", "an unfinished preparation of nanorun")
    lines = _journal_lines(folder / JOURNAL_NAME)
    kept = _json(folder / INPUTS_NAME)
    first = lines[0] if lines else kept
    request = first.get("request")
    if lines and isinstance(request, dict):
        checked.corpus = shown(str(request.get("corpus")))
        checked.tokenizer = shown(str(request.get("tokenizer")))
    elif kept:
        checked.corpus = shown(str(kept.get("corpus", "shards")))
    tokenizer = _table(first, "tokenizer")
    checked.tokenizer = _our_tokenizer(tokenizer) or checked.tokenizer
    finished = [line["shard"] for line in lines if "shard" in line] or kept.get("done")
    entries = _entries({"shards": finished}, checked)
    progress.total = sum(size for entry in entries if (size := _size(folder / entry.file)))
    by = "journal" if lines else INPUTS_NAME
    for entry in entries:
        # The journal knows of a shard a moment before it has its name.
        if foreign.is_plain(folder / entry.file) or not foreign.is_plain(folder / f"{entry.file}{PARTIAL}"):
            checked.files.append(_check_shard(folder, entry, checked, tokenizer, progress, by))
    n_finished = sum(path.suffix == ".bin" for path in files)
    n_begun = sum(path.name.endswith(_UNFINISHED) for path in files)
    checked.faults.insert(
        0,
        f"{shown(folder)}: {n_finished:,} shards are finished and {n_begun:,} files begun, and there is no "
        f"{MANIFEST_NAME}; run the same prepare-data again and it goes on, or delete the folder.",
    )
    return checked


def _journal_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a journal up to one that is broken."""
    lines: list[dict[str, Any]] = []
    try:
        content = path.read_bytes()
    except OSError:
        return lines
    for line in content.splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(entry, dict):
            break
        lines.append(entry)
    return lines


def _check_foreign(folder: Path, form: foreign.Format, files: Sequence[Path], progress: _Progress) -> Checked:
    """Return what files that others made are; the tokens are read through once."""
    found = form.look(files)
    checked = Checked(folder, form.NAME, found.title, faults=found.faults, notes=found.notes)
    progress.total = sum(file.n_bytes for file in found.files)
    tokenizer = _counting_tokenizer({"name": found.vocabulary.name, "chars": found.vocabulary.chars})
    eot = None if found.vocabulary.size else _GPT2_EOT
    tallies: list[Tally] = []
    for file in found.files:
        tally = _tally(eot, tokenizer)
        try:
            for chunk in chunks_of(file):
                tally.see(chunk)
                tally.count(chunk)
                progress.read(chunk.nbytes, file.path.name)
            checked.faults += form.closer_look(file)
        except UserError as error:
            checked.faults.append(str(error))
        tallies.append(tally)
    _check_vocabulary(found, tallies, checked)
    checked.tokenizer, is_gpt2 = _foreign_tokenizer(found, tallies)
    checked.files = [
        _foreign_file(file, tally, is_gpt2, has_bytes=tokenizer is not None)
        for file, tally in zip(found.files, tallies)
    ]
    if not any(tally.tokens for tally in tallies) and not checked.faults:
        checked.faults.append(f"{shown(folder)}: its files hold no tokens; make them again.")
    checked.notes.append(form.HAS_NO_HASH)
    return checked


def _check_vocabulary(found: Found, tallies: Sequence[Tally], checked: Checked) -> None:
    """Find ids beyond the vocabulary, where the files say how large that is."""
    size = found.vocabulary.size
    if size is None and found.vocabulary.name in ("gpt2", "openai-community/gpt2"):
        size = _GPT2_EOT + 1
    for file, tally in zip(found.files, tallies):
        if size is not None and tally.largest >= size:
            checked.faults.append(
                f"{shown(file.path)}: token {tally.largest:,} at place {tally.largest_at:,} is beyond the vocabulary, "
                f"whose ids are below {size:,}; it belongs to another tokenizer or is damaged: make it again."
            )


def _foreign_tokenizer(found: Found, tallies: Sequence[Tally]) -> tuple[str, bool]:
    """Return what can be said of the tokenizer, and whether it is GPT-2's."""
    vocabulary: Vocabulary = found.vocabulary
    if vocabulary.chars:
        return f"char, {len(vocabulary.chars):,} entries by meta.pkl", False
    if vocabulary.name:
        is_gpt2 = vocabulary.name in ("gpt2", "openai-community/gpt2")
        return f"{shown(vocabulary.name)} by the metadata", is_gpt2
    if vocabulary.size:
        return f"unknown, {vocabulary.size:,} entries by meta.pkl", False
    largest = max((tally.largest for tally in tallies), default=-1)
    if largest == _GPT2_EOT and any(tally.eots for tally in tallies):
        return f"gpt2, by the ids: the largest is {_GPT2_EOT}", True
    return f"unknown; the largest id is {largest:,}", False


def _foreign_file(file: TokenFile, tally: Tally, is_gpt2: bool, *, has_bytes: bool) -> CheckedFile:
    documents = documents_between(file, 0, file.n_tokens)
    if documents is None and is_gpt2:
        documents = tally.eots
    return CheckedFile(
        file.path.name,
        file.part,
        _size(file.path),
        np.dtype(file.dtype).name,
        file.n_tokens,
        tally.bytes if has_bytes else None,
        documents,
    )


def check_and_show(folder: Path, console: Console) -> dict[str, Any]:
    """Check a folder under a progress bar, print what it holds, and return the document that `--json` prints.

    Its `exit_code` is what the command exits with: 0 sound, 1 not sound, 2 nothing that is known.
    """
    checked = _check_under_a_bar(folder, console)
    _print(checked, console)
    return to_dict(checked)


def to_dict(checked: Checked) -> dict[str, Any]:
    """Return a check as JSON has it; what is not known is null."""
    return {
        "folder": str(checked.folder),
        "holds": checked.holds,
        "title": checked.title,
        "corpus": checked.corpus,
        "tokenizer": checked.tokenizer,
        "sound": checked.exit_code == SOUND,
        "exit_code": checked.exit_code,
        **{
            key: {split: checked.total(key, split) for split in SPLITS}
            for key in ("tokens", "bytes", "documents")
        },
        "files": [asdict(file) for file in checked.files],
        "faults": checked.faults,
        "notes": checked.notes,
    }


def _check_under_a_bar(folder: Path, console: Console) -> Checked:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("check"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} bytes"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task: TaskID = bar.add_task("check", total=None, name="")

        def report(step: Step) -> None:
            bar.update(task, completed=step.done, total=step.total, name=shown(step.note))

        return check_folder(folder, report)


def _print(checked: Checked, console: Console) -> None:
    verdict = {SOUND: "sound", NOT_SOUND: "not sound", UNKNOWN: "nothing can be said of it"}[
        checked.exit_code
    ]
    of_what = f", corpus {checked.corpus}" if checked.corpus else ""
    lines = [f"{shown(checked.folder)}: {checked.title}{of_what}: {verdict}"]
    if checked.tokenizer:
        lines.append(f"tokenizer: {checked.tokenizer}")
    _say(lines, console)
    if checked.files:
        # Into a file or a pipe names go whole; on a terminal they are folded.
        wide = console if console.is_terminal else type(console)(file=console.file, width=1000)
        wide.print(_grid(checked))
    _say([f"fault: {one}" for one in checked.faults] + [f"note: {one}" for one in checked.notes], console)


def _say(lines: list[str], console: Console) -> None:
    if lines:
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _grid(checked: Checked) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    for title in ("File", "Split"):
        grid.add_column(title, overflow="fold")
    for title in ("Tokens", "Bytes of text", "Documents"):
        grid.add_column(title, justify="right")
    for title in ("Type", "sha256"):
        grid.add_column(title)
    for file in checked.files:
        counts = ("–" if n is None else f"{n:,}" for n in (file.tokens, file.bytes, file.documents))
        texts = (shown(file.name), shown(file.split or "–"), *counts, file.dtype or "–", file.sha256)
        grid.add_row(*map(Text, texts))
    return grid
