"""Token files that others made, made ours: shards of llm.c and modded-nanogpt, nanoGPT's files, datatrove's.

Shards of llm.c's form stay as they are, under their own names: as hard links where the disk allows it, else as copies.
Files of the other forms are written anew, with a header, in shards of at most 100M tokens, in the order of the inputs.

What is held out is what names say: `val` in the name of a file, or a folder called so. Where no name says it, the end
of the last file is held out: a twentieth of all tokens, at most 10,485,760 and at most half of that file, from the
start of a document where one is near; both parts of that file are then written anew. Files called `test` are left out.

The tokenizer is the one that the files name: the characters of a `meta.pkl`, `gpt2` in datatrove's metadata, or, for
shards of llm.c's form that hold 50256 and no higher id, GPT-2's; otherwise it has to be said. `inputs.json` beside the
manifest keeps which files it was made from, by path, size and date, and which shards are done.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nanorun.data import foreign
from nanorun.data.foreign import Found, TokenFile, chunks_of, documents_between, shown
from nanorun.data.foreign.planning import Output, plan, said_of, val_spans
from nanorun.data.shards import (
    INPUTS_NAME,
    Manifest,
    ShardEntry,
    cannot_write,
    is_whole,
    replacing,
    shard_header,
    token_dtype,
)
from nanorun.data.sources import InputFile, Reading, Step
from nanorun.data.tally import Tally
from nanorun.data.tokenizers import Tokenizer, make_tokenizer
from nanorun.errors import Stopped, UserError

NAME = "shards"
SUMMARY = "token files that others made: llm.c, modded-nanogpt, nanoGPT, datatrove (--input FOLDER or FILE)"
EMBEDDED = False
TAKES_INPUT = True
OPTIONS: tuple[str, ...] = ("input", "shards")
DEFAULT_TOKENIZER = "gpt2"

_VERSION = 1
_GPT2_EOT = 50256
_OURS = {"gpt2": "gpt2", "openai-community/gpt2": "gpt2"}
"""What datatrove's metadata may name, by our names."""
_EXPANDS = 2.2
"""Bytes of English text that a byte of GPT-2's ids in uint16 stands for."""


def files(reading: Reading) -> list[InputFile]:
    """As `ReadySource.files`."""
    return [
        InputFile(shown(one.path), size, _EXPANDS, str(mtime_ns), one.n_tokens)
        for one in _look(reading).files
        for size, mtime_ns in [_state(one.path)]
    ]


def is_current(out: Path, manifest: Manifest, reading: Reading) -> bool:
    """As `ReadySource.is_current`; `UserError` if `out` was made from other inputs."""
    kept = _Kept.read(out, _request(_look(reading), reading))
    return (
        kept.is_of_request
        and kept.done == {entry.file: entry for entry in manifest.shards}
        and all(is_whole(out, entry) for entry in manifest.shards)
    )


def make_ready(out: Path, reading: Reading, tokenizer: str | None) -> Manifest:
    """As `ReadySource.make_ready`."""
    found = _look(reading)
    _refuse_own_folder(out, found)
    kept = _Kept.read(out, _request(found, reading))
    chosen = _tokenizer(found, tokenizer)
    outputs = plan(found, NAME, chosen.eot, reading)
    kept.restrict(chosen, {output.name for output in outputs}, out)
    kept.held_out = next((said_of(span) for span in val_spans(outputs) if span.file.part != "val"), None)
    _remove_leftovers(out)
    work = _Work(out, reading, chosen, _new_ids(found, chosen), sum(output.n_tokens for output in outputs))
    try:
        entries = tuple(_made(output, work, kept) for output in outputs)
        for name, content in chosen.files().items():
            with replacing(out / name) as file:
                file.write(content)
        kept.write(out)
    except KeyboardInterrupt:
        if not kept.done:
            raise
        raise Stopped(
            f"stopped. {len(kept.done)} of {len(outputs)} shards are done and stay in {out}: the same command goes on "
            "from there."
        ) from None
    lines = "".join(f"{entry.file} {entry.sha256}\n" for entry in entries)
    return Manifest(NAME, hashlib.sha256(lines.encode()).hexdigest(), chosen.to_manifest(), entries)


def _look(reading: Reading) -> Found:
    """Return what the inputs are; UserError if they are not sound, of several forms or of none."""
    if not reading.inputs:
        raise UserError(
            "Corpus 'shards' needs token files: nanorun prepare-data shards --input FOLDER (or FILE, several times)"
        )
    if "-" in reading.inputs:
        raise UserError("--input -: token files cannot come on standard input; name files or folders.")
    paths = foreign.gather(reading.inputs)
    formats = foreign.recognise(paths)
    given = ", ".join(shown(one) for one in reading.inputs[:3])
    if not formats:
        raise UserError(
            f"--input {given}: no token files that nanorun knows; expected shards of llm.c or modded-nanogpt, "
            "nanoGPT's train.bin and val.bin, or datatrove's .ds files; for text take corpus text."
        )
    if len(formats) > 1:
        names = " and ".join(one.NAME for one in formats)
        raise UserError(
            f"--input {given}: files of several forms ({names}); prepare each into a folder of its own."
        )
    found = formats[0].look(paths)
    if found.faults:
        more = len(found.faults) - 1
        rest = (
            f" There are {more} more faults: nanorun prepare-data --check FOLDER lists them." if more else ""
        )
        raise UserError(found.faults[0] + rest)
    return replace(found, files=[file for file in found.files if file.n_tokens])


def _refuse_own_folder(out: Path, found: Found) -> None:
    for file in found.files:
        if file.path.resolve().parent == out.resolve():
            raise UserError(
                f"{out}: is the folder of the inputs themselves; choose another folder with --out."
            )


def _tokenizer(found: Found, named: str | None) -> Tokenizer:
    """Return the tokenizer that the files say, or the user where they say nothing."""
    vocabulary = found.vocabulary
    said = "char" if vocabulary.chars else _OURS.get(vocabulary.name or "")
    if said and named not in (None, said):
        raise UserError(f"--tokenizer {named}: the files themselves say {said}; leave --tokenizer out.")
    if vocabulary.chars:
        return make_tokenizer("char", [vocabulary.chars])
    name = named or said
    if name is None and found.format == "llm.c" and _are_gpt2s(found.files):
        name = "gpt2"
    if name is None:
        knows = (
            f"they name {shown(vocabulary.name)}, which nanorun does not know by that name"
            if vocabulary.name
            else "nothing in them says which tokenizer made them"
        )
        raise UserError(
            f"{shown(found.files[0].path)} and the files with it: {knows}; say it with --tokenizer, for example "
            "--tokenizer gpt2 or --tokenizer path/to/tokenizer.json."
        )
    if name == "char":
        raise UserError(
            "--tokenizer char: no table of characters is there; bring the meta.pkl that belongs to the files, or name "
            "the tokenizer that made them."
        )
    return make_tokenizer(name)


def _are_gpt2s(token_files: list[TokenFile]) -> bool:
    """Return whether GPT-2's end of text comes up before any id beyond it; later ids are looked at on the way."""
    for file in token_files:
        for chunk in chunks_of(file):
            if int(chunk.max()) > _GPT2_EOT:
                return False
            if bool((chunk == _GPT2_EOT).any()):
                return True
    return False


def _new_ids(found: Found, tokenizer: Tokenizer) -> npt.NDArray[np.uint16] | None:
    """Return our id for each of a table of characters that is not in our order, which is sorted."""
    chars = found.vocabulary.chars
    if not chars or list(chars) == sorted(chars):
        return None
    ours = {char: i for i, char in enumerate(sorted(chars))}
    return np.array([ours[char] for char in chars], dtype=np.uint16)


@dataclass
class _Work:
    """What all shards are made with."""

    out: Path
    reading: Reading
    tokenizer: Tokenizer
    new_ids: npt.NDArray[np.uint16] | None
    n_tokens: int
    """Of all shards together."""
    done: int = 0

    def tell(self, n_tokens: int, note: str) -> None:
        self.done += n_tokens
        self.reading.report(Step("read", self.done, self.n_tokens, "tokens", note))


def _made(output: Output, work: _Work, kept: _Kept) -> ShardEntry:
    """Return the entry of a shard, which is made unless it is there already."""
    path = work.out / output.name
    before = kept.done.get(output.name)
    if before and is_whole(path.parent, before):
        work.tell(output.n_tokens, output.name)
        return before
    entry = _taken_as_it_is(output, work) if output.as_it_is else _written(output, work)
    for span in output.spans:
        kept.refuse_changed(span.file.path)
    if before and entry.sha256 != before.sha256:
        path.unlink(missing_ok=True)
        raise UserError(
            f"{shown(output.spans[0].file.path)}: its content has changed though its size and date have not; take a "
            f"sound copy and delete {shown(work.out)}."
        )
    kept.done[entry.file] = entry
    kept.write(work.out)
    return entry


def _tokens(output: Output, work: _Work, tally: Tally) -> Iterator[tuple[bytes, npt.NDArray[Any]]]:
    """Yield a shard's tokens, counted: as they lie in the file, and with our ids. An id beyond them is a UserError."""
    vocab_size = work.tokenizer.vocab_size
    for span in output.spans:
        for chunk in chunks_of(span.file, span.first, span.last):
            if tally.see(chunk) >= vocab_size:
                raise UserError(
                    f"{shown(span.file.path)}: holds the id {tally.largest}, but the ids of tokenizer "
                    f"{work.tokenizer.name!r} are below {vocab_size:,}; say with --tokenizer which one made it."
                )
            data = chunk.tobytes()
            tokens = chunk if work.new_ids is None else work.new_ids[chunk]
            tally.count(tokens)
            work.reading.bytes_done += len(data)
            work.tell(len(tokens), output.name)
            yield data, tokens


def _taken_as_it_is(output: Output, work: _Work) -> ShardEntry:
    """Look through a file that is a shard already, then link or copy it."""
    (span,) = output.spans
    source = span.file.path
    tally = Tally(work.tokenizer.eot, work.tokenizer.bytes_of)
    found = hashlib.sha256(foreign.head_of(source, span.file.offset))
    for data, _ in _tokens(output, work, tally):
        found.update(data)
    _link_or_copy(source, work.out / output.name, found.hexdigest())
    return _entry(output, tally, found.hexdigest())


def _link_or_copy(source: Path, path: Path, sha256: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        # A link to a link would be only as good as that.
        os.link(source.resolve(), temporary)
        os.replace(temporary, path)
    except OSError:
        _copy(source, path, sha256)
    finally:
        # It is still there if `path` was the same file already.
        with suppress(OSError):
            temporary.unlink()


def _copy(source: Path, path: Path, sha256: str) -> None:
    """Copy a file whose hash is known; UserError if it has changed since."""
    copied = hashlib.sha256()
    with foreign.opened(source) as file, replacing(path) as target:
        while data := _read_some(file, source):
            copied.update(data)
            target.write(data)
        if copied.hexdigest() != sha256:
            raise UserError(f"{shown(source)}: changed while it was read; leave it alone and start again.")


def _read_some(file: Any, source: Path) -> bytes:
    try:
        return bytes(file.read(1 << 23))
    except OSError as error:
        raise foreign.cannot_read(source, error) from error


def _written(output: Output, work: _Work) -> ShardEntry:
    """Write a shard anew from what its spans hold."""
    dtype = token_dtype(work.tokenizer.vocab_size)
    tally = Tally(work.tokenizer.eot, work.tokenizer.bytes_of)
    header = shard_header(output.n_tokens, dtype)
    found = hashlib.sha256(header)
    with replacing(work.out / output.name) as file:
        file.write(header)
        for _, tokens in _tokens(output, work, tally):
            data = np.ascontiguousarray(tokens, dtype=dtype).data
            found.update(data)
            file.write(data)
    return _entry(output, tally, found.hexdigest())


def _entry(output: Output, tally: Tally, sha256: str) -> ShardEntry:
    return ShardEntry(
        output.name, output.split, tally.tokens, tally.bytes, _n_documents(output, tally), sha256
    )


def _n_documents(output: Output, tally: Tally) -> int:
    """Return how many documents begin in a shard: by an index, else by the ends of text.

    Where neither tells documents apart, each file that begins in it counts as one.
    """
    by_index = [documents_between(*span) for span in output.spans]
    if all(n is not None for n in by_index):
        return sum(n or 0 for n in by_index)
    return tally.eots or sum(span.first == 0 for span in output.spans)


def _state(path: Path) -> tuple[int, int]:
    """Return a file's size and its date in ns."""
    try:
        state = path.stat()
    except OSError as error:
        raise foreign.cannot_read(path, error) from error
    return state.st_size, state.st_mtime_ns


def _request(found: Found, reading: Reading) -> dict[str, Any]:
    """Return what two runs must have in common for the second to go on with what the first has done."""
    inputs = [[str(file.path.resolve()), *_state(file.path)] for file in found.files]
    return {"inputs": inputs, "shards": reading.shards}


class _Kept:
    """`inputs.json`: what was asked for, and which shards are done."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        self.is_of_request = False
        """Whether what is done was done for just this request."""
        self.tokenizer: dict[str, Any] | None = None
        self.held_out: str | None = None
        """Of a validation split that no name chose: what it is."""
        self.done: dict[str, ShardEntry] = {}

    @classmethod
    def read(cls, out: Path, request: dict[str, Any]) -> _Kept:
        """Return what `out` keeps of `request`; UserError if it was made from other inputs."""
        kept = cls(request)
        try:
            content = json.loads((out / INPUTS_NAME).read_bytes())
            if content["version"] != _VERSION:
                return kept
            before = content["request"]["inputs"]
            done = {entry["file"]: ShardEntry(**entry) for entry in content["done"]}
            if any(Path(name).name != name for name in done):
                return kept
            tokenizer = dict(content["tokenizer"])
        except (OSError, ValueError, KeyError, TypeError):
            return kept
        if before != request["inputs"]:
            raise UserError(
                f"{shown(out)}: was made from {_difference(before, request['inputs'])}; choose another folder with "
                "--out, or delete this one."
            )
        kept.done, kept.tokenizer = done, tokenizer
        kept.is_of_request = content["request"] == request
        return kept

    def restrict(self, tokenizer: Tokenizer, names: set[str], out: Path) -> None:
        """Forget what was counted with another tokenizer, and delete shards that are not wanted any more."""
        entry = tokenizer.to_manifest()
        if self.tokenizer != entry:
            self.tokenizer, self.done = entry, {}
        for name in self.done.keys() - names:
            (out / name).unlink(missing_ok=True)
            del self.done[name]

    def write(self, out: Path) -> None:
        content = {
            "version": _VERSION,
            "request": self.request,
            "tokenizer": self.tokenizer,
            "held_out": self.held_out,
            "done": [asdict(one) for one in self.done.values()],
        }
        with replacing(out / INPUTS_NAME) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())

    def refuse_changed(self, path: Path) -> None:
        """Raise `UserError` if a file is not what it was at the beginning."""
        now = [str(path.resolve()), *_state(path)]
        if now not in self.request["inputs"]:
            raise UserError(f"{shown(path)}: changed while it was read; leave it alone and start again.")


def _difference(before: Any, now: list[list[Any]]) -> str:
    """Return in a few words how the inputs of before are others than those of now."""
    then = {one[0]: one[1:] for one in before} if isinstance(before, list) else {}
    for path, *state in now:
        if path not in then:
            return f"other files than those given now, without {shown(path)}"
        if then[path] != state:
            return f"{shown(path)} as it was before a change of its size or date"
    return "more files than those given now, or in another order"


def _remove_leftovers(out: Path) -> None:
    """Delete temporary files of a run that was killed; the folder is ours alone meanwhile."""
    try:
        for path in out.glob("*.bin.*.tmp"):
            path.unlink()
    except OSError as error:
        raise cannot_write(out, error) from error
