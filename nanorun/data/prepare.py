"""Documents to tokens to shards and a manifest, in one folder, in bounded memory, and safe to interrupt.

The manifest is written last: a folder without one is not a prepared corpus. Until then a journal beside the shards
says what is done, and the same command goes on from there: it reads the inputs again up to that place, without
tokenizing, and finds by their hashes that they are still the same. The shards are byte for byte those of a run that
was never interrupted, whatever the number of threads.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from nanorun.data.freed import keep_freed_memory
from nanorun.data.journal import Journal, Progress
from nanorun.data.passes import CHUNK_BYTES, Pass, Rule
from nanorun.data.shards import (
    INPUTS_NAME,
    MANIFEST_NAME,
    PARTIAL,
    Manifest,
    ShardEntry,
    cannot_write,
    is_whole,
    load_manifest,
    replacing,
)
from nanorun.data.sources import (
    SPLITS,
    Document,
    InputFile,
    Reading,
    ReadySource,
    Source,
    Step,
    is_ready,
    load_source,
    options_of,
    source_names,
)
from nanorun.data.space import warn_if_full
from nanorun.data.tokenizers import (
    Tokenizer,
    make_tokenizer,
    prepare_option,
    tokenizer_from_manifest,
    tokenizer_name,
)
from nanorun.data.vocabularies import characters, trained_bpe
from nanorun.data.writing import SplitWriter, Writer, encode_chunk, finish_name
from nanorun.errors import Stopped, UserError, shown
from nanorun.files import locked

LEFT_OUT = ("duplicates", "skipped", "n_skipped", "empty", "notes")
"""What `inputs.json` keeps of a `Prepared`, to be said again by a later run that finds everything there."""
SCRATCH = ".scratch"
"""A folder beside the shards for temporary files."""


@dataclass(frozen=True)
class Request:
    """What a corpus is made from and how; what it reads stands in a `Reading`."""

    corpus: str
    out: Path
    tokenizer: str | None
    """As it was asked for: a name or the path of a tokenizer.json; None takes what the corpus says."""
    tokenizer_name: str
    """As the manifest will call it: for `--train-bpe 4096` bpe4096."""
    source: Source | ReadySource
    reading: Reading
    keep_duplicates: bool = False
    train_bpe: int | None = None

    def as_kept(self) -> dict[str, Any]:
        """Return what two runs must have in common for the second to go on with what the first has begun."""
        reading = self.reading
        return {
            "corpus": self.corpus,
            "tokenizer": self.tokenizer_name,
            "keep_duplicates": self.keep_duplicates,
            **{
                key: getattr(reading, key)
                for key in ("format", "column", "separator", "skip_bad", "include", "revision")
            },
        }


@dataclass(frozen=True)
class Prepared:
    """What `prepare` left behind."""

    out: Path
    manifest: Manifest
    wrote: bool
    """False when everything was there already and nothing was done."""
    seconds: float
    tokens_per_second: float
    """Of those that were tokenized now; 0.0 when nothing was done."""
    duplicates: int = 0
    """Exact copies of documents that were left out."""
    skipped: tuple[str, ...] = ()
    """One line for each thing that `skip_bad` left out, of the first thousand."""
    n_skipped: int = 0
    empty: int = 0
    """Documents without text, passed over."""
    resumed_at: int = 0
    """Documents that an interrupted run had done before."""
    notes: tuple[str, ...] = ()
    """Sentences on what came out otherwise than one might think."""


def default_out(corpus: str, tokenizer: str | None = None, root: Path = Path("data")) -> Path:
    """Return the folder for `corpus`: its name, and the tokenizer's where that is not the corpus' default."""
    default = load_source(corpus).DEFAULT_TOKENIZER
    stem = file_stem(corpus)
    return root / (stem if tokenizer in (None, default) else f"{stem}-{file_stem(str(tokenizer))}")


def prepare_command(corpus: str, tokenizer: str) -> str:
    """Return the command that prepares `corpus` in tokens that a manifest calls `tokenizer`."""
    inputs = " --input PATH" if load_source(corpus).TAKES_INPUT else ""
    return f"nanorun prepare-data {corpus}{inputs} {prepare_option(tokenizer)}"


def file_stem(name: str) -> str:
    """Return a corpus' or tokenizer's name as files and folders carry it: `OWNER--NAME` for `hub:OWNER/NAME`."""
    return name.removeprefix("hub:").replace("/", "--")


def make_request(
    corpus: str,
    *,
    out: Path,
    tokenizer: str | None = None,
    inputs: Sequence[str] = (),
    workers: int = 0,
    keep_duplicates: bool = False,
    train_bpe: int | None = None,
    report: Callable[[Step], None] | None = None,
    **reading: Any,
) -> Request:
    """Return a request, checked as far as can be without reading anything; `reading` are fields of `Reading`.

    `workers` threads tokenize; 0 takes as many as there are cores, and more than that are not taken.
    """
    source = load_source(corpus)
    _refuse_options(source, {"input": inputs, "keep_duplicates": keep_duplicates, **reading})
    if tokenizer == "":
        raise UserError("--tokenizer is empty; expected a name such as byte, or leave it out.")
    if workers < 0:
        raise UserError(f"--workers {workers}: expected 1 or more, or 0 for as many as there are cores.")
    if train_bpe is not None and tokenizer is not None:
        raise UserError(
            f"--train-bpe {train_bpe} makes a tokenizer, and --tokenizer {tokenizer} names one; give one of them."
        )
    if is_ready(source) and train_bpe is not None:
        raise UserError(f"Corpus {corpus!r} comes as tokens: no tokenizer can be trained on it.")
    cores = usable_cores()
    filled = Reading(
        inputs=tuple(inputs),
        workers=min(workers or cores, cores),
        scratch=out / SCRATCH,
        home=out,
        **reading,
    )
    if report is not None:
        filled.report = report
    spec = tokenizer or source.DEFAULT_TOKENIZER
    name = f"bpe{train_bpe}" if train_bpe else tokenizer_name(spec)
    return Request(corpus, out, tokenizer, name, source, filled, keep_duplicates, train_bpe)


def _refuse_options(source: Source | ReadySource, given: dict[str, Any]) -> None:
    """Raise `UserError` for an option that this corpus does not heed, with the corpora that do."""
    for key, value in given.items():
        option = key.replace("_", "-")
        if value in (None, (), [], False) or option in source.OPTIONS:
            continue
        said = "" if value is True else f" {shown(value if isinstance(value, (str, int)) else value[0])}"
        takers = [name for name in source_names() if option in options_of(name)]
        own = "; for your own files: nanorun prepare-data text --input PATH" if option == "input" else ""
        raise UserError(
            f"--{option}{said}: corpus {source.NAME!r} takes no --{option} ({', '.join(takers)} can); leave it "
            f"out{own}."
        )


def prepare(corpus: str, *, out: Path, **options: Any) -> Prepared:
    """Leave the shards `<corpus>_<split>_<number>.bin` and a manifest in `out`, and return what is there.

    The options are those of `make_request`. A folder that holds anything else than this corpus with this tokenizer, a
    full disk and a corpus with an empty split are `UserError`s. After those and after Ctrl-C, which is `Stopped`, the
    same call goes on where this one ended; if nothing was done yet, nothing stays.
    """
    return carry_out(make_request(corpus, out=out, **options))


def carry_out(request: Request) -> Prepared:
    """Do what `prepare` says, of a request from `make_request`."""
    started = time.perf_counter()
    keep_freed_memory()
    made = _make_folder(request.out)
    try:
        with locked(request.out, on_wait=_say_who_holds(request.reading)):
            try:
                done = _found_or_made(request)
            finally:
                shutil.rmtree(request.reading.scratch, ignore_errors=True)
                _leave_nothing_of_nothing(request)
    finally:
        for folder in made:
            _remove_if_empty(folder)
    return replace(done, seconds=time.perf_counter() - started)


def _found_or_made(request: Request) -> Prepared:
    found = _already_there(request)
    if found is None:
        return _make(request)
    _tidy(request, found)
    left_out = _kept_inputs(request.out).get("left_out")
    known = left_out if isinstance(left_out, dict) and left_out.keys() <= set(LEFT_OUT) else {}
    return replace(Prepared(request.out, found, False, 0.0, 0.0), **known)


def _make(request: Request) -> Prepared:
    """Make the shards and the manifest; UserErrors and Ctrl-C say what stays."""
    out = request.out
    try:
        _remove_leftovers(out)
        request.reading.scratch.mkdir(exist_ok=True)
        if is_ready(request.source):
            manifest = request.source.make_ready(out, request.reading, request.tokenizer)
            done = Prepared(out, manifest, True, 0.0, 0.0)
        else:
            if warning := warn_if_full(request):
                request.reading.report(Step("note", 0, None, "bytes", warning))
            # From here on the folder is not a prepared corpus.
            (out / MANIFEST_NAME).unlink(missing_ok=True)
            done = _Tokenizing(request).run()
        done.manifest.write(out)
        _keep_inputs(request, done)
    except KeyboardInterrupt:
        if not (stays := _what_stays(request)):
            raise
        raise Stopped(f"stopped. {stays}") from None
    except UserError as error:
        stays = "" if is_ready(request.source) else _what_stays(request)
        raise type(error)(f"{error} {stays}".rstrip()) from error
    except OSError as error:
        raise cannot_write(out, error) from error
    Journal(out).remove()
    return done


def _what_stays(request: Request) -> str:
    """Return a sentence on what an interrupted run has left, or nothing."""
    if is_ready(request.source):
        kept = [path for path in request.out.iterdir() if path.name.endswith((".bin", PARTIAL))]
        return f"What is whole stays in {request.out}: the same command goes on from there." if kept else ""
    progress = Journal(request.out).read()
    if progress is None or not progress.has_begun:
        return ""
    return f"{progress.documents:,} documents are done and stay in {request.out}: the same command goes on from there."


class _Tokenizing:
    """Carries one corpus of documents through the tokenizer."""

    def __init__(self, request: Request) -> None:
        self._request, self._out, self._reading = request, request.out, request.reading
        self._source = cast(Source, request.source)
        self._journal = Journal(request.out)
        self._files = self._source.files(self._reading)
        self._total = sum(file.size for file in self._files) or None
        self._stem = file_stem(request.corpus)

    def run(self) -> Prepared:
        """Tokenize everything, from where an interrupted run ended."""
        progress = self._taken_up() or self._from_the_beginning()
        while True:
            assert progress.tokenizer is not None
            tokenizer = tokenizer_from_manifest(progress.tokenizer, self._out)
            reader = Pass(
                self._source,
                self._reading,
                Rule(**progress.rule),
                keep_duplicates=self._request.keep_duplicates,
            )
            started = time.perf_counter()
            resumed_at = progress.documents
            n_tokens = self._one_pass(reader, tokenizer, progress)
            if n_tokens is None:
                self._tell("read", "the inputs have changed since the interruption: beginning again")
                progress = self._from_the_beginning()
            elif (better := self._better_rule(reader)) is not None:
                progress = self._from_the_beginning(better, progress.tokenizer)
            else:
                break
        rate = n_tokens / (time.perf_counter() - started)
        entries = self._entries()
        source_sha256 = self._source.SOURCE_SHA256 or reader.mark.sha256
        commit = getattr(self._source, "commit", None)
        revision = commit(self._reading) if commit else None
        manifest = Manifest(self._request.corpus, source_sha256, tokenizer.to_manifest(), entries, revision)
        return Prepared(
            self._out,
            manifest,
            True,
            0.0,
            rate,
            reader.duplicates,
            tuple(self._reading.skipped),
            self._reading.n_skipped,
            self._reading.empty,
            resumed_at,
            tuple(self._notes(progress.rule)),
        )

    def _notes(self, rule: dict[str, Any]) -> Iterator[str]:
        separator = self._reading.separator
        if separator is not None and not self._reading.separated:
            yield f"the separator {separator!r} occurs nowhere: each plain file was taken as one document"
        if rule["cut"]:
            yield "there is but one document: its last tenth is held out for validation"
        elif rule["val"]:
            yield "the corpus is small: no document's hash holds it out, so the one with the least hash was held out"
        elif rule["train"]:
            yield "the corpus is small: all documents' hashes hold them out, so the one with the greatest is trained on"

    def _taken_up(self) -> Progress | None:
        """Return how far an interrupted run of the same request came; None where there is nothing to go on with."""
        progress = self._journal.read()
        if progress is None:
            return None
        wanted = self._request.as_kept()
        is_other = {key: progress.request.get(key) for key in wanted} != wanted
        if is_other and not progress.has_begun:
            return None
        if is_other:
            kept = ", ".join(
                f"{key} {value}" for key, value in progress.request.items() if value and key != "files"
            )
            raise UserError(
                f"{self._out} holds an unfinished preparation of another kind ({kept}); run that command again to "
                "finish it, choose another --out, or delete that folder."
            )
        if not _is_same(progress.request.get("files"), _listing(self._files)):
            # What was made of all inputs together does not outlive a change of one, and what was finished after the
            # last mark may hold what is no longer there, or end where there is more now.
            if progress.rule != asdict(Rule()) or self._vocabulary_is_of_corpus():
                return None
            self._take_back(progress)
        return progress if self._shards_are_whole(progress) else None

    def _take_back(self, progress: Progress) -> None:
        """Make partial shards again of those that were finished after the last mark."""
        certain = [
            entry for entry in progress.shards if self._number(entry) < progress.positions[entry.split].shard
        ]
        for entry in progress.shards:
            path = self._out / entry.file
            if entry not in certain and path.exists():
                os.replace(path, path.with_name(path.name + PARTIAL))
        progress.shards = certain

    def _number(self, entry: ShardEntry) -> int:
        return int(entry.file.removesuffix(".bin").rpartition("_")[2])

    def _vocabulary_is_of_corpus(self) -> bool:
        return self._request.train_bpe is not None or self._request.tokenizer_name == "char"

    def _shards_are_whole(self, progress: Progress) -> bool:
        """Return whether all finished shards are as the journal says; a last renaming is made up for."""
        for entry in progress.shards:
            finish_name(self._out / entry.file)
        return all(is_whole(self._out, entry) for entry in progress.shards)

    def _from_the_beginning(
        self, rule: Rule | None = None, tokenizer: dict[str, Any] | None = None
    ) -> Progress:
        """Start the journal, with nothing done; make the tokenizer, unless there is one, and its files."""
        self._forget()
        if tokenizer is None:
            made, found = self._make_tokenizer()
            tokenizer, rule = made.to_manifest(), rule or found
            for name, content in made.files().items():
                with replacing(self._out / name) as file:
                    file.write(content)
        kept = {**self._request.as_kept(), "files": _listing(self._files)}
        self._journal.begin(kept, asdict(rule or Rule()), tokenizer)
        progress = self._journal.read()
        assert progress is not None
        return progress

    def _forget(self) -> None:
        """Remove the journal, and what it speaks of."""
        self._journal.remove()
        _remove_shards(self._out, self._stem)

    def _make_tokenizer(self) -> tuple[Tokenizer, Rule | None]:
        """Return the tokenizer, and the rule of validation where that had to be known first."""
        request = self._request
        if request.train_bpe is not None:
            return self._trained(request.train_bpe)
        if request.tokenizer_name != "char":
            return make_tokenizer(request.tokenizer or self._source.DEFAULT_TOKENIZER), None
        self._reading.restart()
        counted = characters(document.text for document in self._documents("count characters"))
        return make_tokenizer("char", [counted]), None

    def _documents(self, stage: str) -> Iterator[Document]:
        told = 0
        for document in self._source.documents(self._reading):
            if self._reading.bytes_done - told > CHUNK_BYTES:
                told = self._reading.bytes_done
                self._tell(stage)
            yield document

    def _trained(self, vocab_size: int) -> tuple[Tokenizer, Rule]:
        """Return a tokenizer trained on the training split, and the rule that says which that is."""
        keep = self._request.keep_duplicates
        counting = Pass(self._source, self._reading, keep_duplicates=keep)
        for _ in counting.chunks():
            self._tell("count documents")
        rule = self._better_rule(counting) or Rule()
        reader = Pass(self._source, self._reading, rule, keep_duplicates=keep)
        return trained_bpe(self._training_texts(reader), vocab_size), rule

    def _training_texts(self, reader: Pass) -> Iterator[str]:
        for chunk in reader.chunks():
            self._tell("train tokenizer")
            yield from (piece.text for piece in chunk.pieces if piece.split == "train")

    def _better_rule(self, reader: Pass) -> Rule | None:
        try:
            return reader.better_rule()
        except ValueError as error:
            split = "training" if str(error) == "train" else "validation"
            self._forget()
            raise UserError(
                f"Corpus {self._request.corpus!r} has no text for its {split} split; it needs a longer text, or "
                "several documents."
            ) from None

    def _one_pass(self, reader: Pass, tokenizer: Tokenizer, progress: Progress) -> int | None:
        """Tokenize all that the journal does not know; return how many tokens that were.

        None if what the journal knows is not what is read now. Where the pass has left a split empty, nothing is
        finished: another pass follows.
        """
        try:
            writers = {
                split: SplitWriter(self._out, self._stem, tokenizer, progress, split) for split in SPLITS
            }
        except (OSError, ValueError):
            return None
        workers = self._reading.workers
        writer = Writer(writers, self._journal, in_flight=workers + 2)
        known = progress.documents
        started = time.perf_counter()
        with ThreadPoolExecutor(workers) as pool:
            try:
                for chunk in reader.chunks(pause_at=known):
                    if reader.documents <= known:
                        if (
                            chunk.mark
                            and chunk.mark.documents == known
                            and chunk.mark.sha256 != progress.sha256
                        ):
                            return None
                        self._tell("read again", "what is done already")
                        continue
                    writer.put(pool.submit(encode_chunk, chunk.pieces, tokenizer), chunk.mark)
                    self._tell_rate(writer, started)
                if reader.documents < known:
                    return None
                if all(reader.kept.values()):
                    writer.finish()
                self._tell_rate(writer, started)
            finally:
                writer.close()
        return writer.n_tokens

    def _tell_rate(self, writer: Writer, started: float) -> None:
        rate = writer.n_tokens / (time.perf_counter() - started)
        self._tell("tokenize", f"{short_count(rate)} tokens/s")

    def _entries(self) -> tuple[ShardEntry, ...]:
        """Return all finished shards, those to train on first."""
        progress = self._journal.read()
        assert progress is not None
        by_name = sorted(progress.shards, key=lambda entry: entry.file)
        return tuple(entry for split in SPLITS for entry in by_name if entry.split == split)

    def _tell(self, stage: str, note: str = "") -> None:
        self._reading.report(Step(stage, self._reading.bytes_done, self._total, "bytes", note))


def short_count(value: float) -> str:
    """Return a count as people say it: 2.6M, 812,345."""
    return f"{value / 1e6:.1f}M" if value >= 1e6 else f"{value:,.0f}"


def _already_there(request: Request) -> Manifest | None:
    """Return the manifest in the folder if it is of what is asked for and its shards are whole; None if not.

    A manifest of anything else is a `UserError`: what the user keeps there is not ours to overwrite.
    """
    out = request.out
    if not (out / MANIFEST_NAME).exists():
        return None
    manifest = load_manifest(out)
    held = (manifest.corpus, str(manifest.tokenizer["name"]))
    wanted = (request.corpus, request.tokenizer_name)
    if is_ready(request.source):
        if held[0] != wanted[0] or (request.tokenizer and held[1] != wanted[1]):
            raise _holds_another(out, held, wanted)
        return manifest if request.source.is_current(out, manifest, request.reading) else None
    if held != wanted:
        raise _holds_another(out, held, wanted)
    if not _is_of_these_inputs(request, request.source, manifest):
        raise UserError(
            f"{out} already holds corpus {request.corpus!r}, made from other texts than those given now; "
            "choose another --out or delete that folder."
        )
    return manifest if all(is_whole(out, shard) for shard in manifest.shards) else None


def _holds_another(out: Path, held: tuple[str, str], wanted: tuple[str, str]) -> UserError:
    return UserError(
        f"{out} already holds corpus {held[0]!r} with tokenizer {held[1]!r}, not {wanted[0]!r} with "
        f"{wanted[1]!r}; choose another --out or delete that folder."
    )


def _is_of_these_inputs(request: Request, source: Source, manifest: Manifest) -> bool:
    """Return whether a manifest's texts are those given now; they are read again only where their files changed."""
    if source.SOURCE_SHA256 is not None:
        source.files(request.reading)  # refuses inputs
        return manifest.source_sha256 == source.SOURCE_SHA256
    kept = _kept_inputs(request.out)
    now = {**request.as_kept(), "manifest": manifest.sha256}
    if {key: kept.get(key) for key in now} == now and _is_same(
        kept.get("files"), _listing(source.files(request.reading))
    ):
        return True
    reader = Pass(source, request.reading, keep_duplicates=request.keep_duplicates)
    # What is read is kept there for `_make`: standard input comes but once.
    request.reading.scratch.mkdir(exist_ok=True)
    total = sum(file.size for file in source.files(request.reading)) or None
    for _ in reader.chunks():
        request.reading.report(Step("compare", request.reading.bytes_done, total, "bytes"))
    return reader.mark.sha256 == manifest.source_sha256


def _listing(files: Sequence[InputFile]) -> list[list[Any]]:
    return [[file.name, file.size, file.version] for file in files]


def _is_same(kept: Any, listing: list[list[Any]]) -> bool:
    """Return whether a kept listing is that of the same files, none of them of unknown content."""
    return bool(kept == listing and all(version for _, _, version in listing))


def _keep_inputs(request: Request, done: Prepared) -> None:
    if is_ready(request.source) or request.source.SOURCE_SHA256 is not None:
        return
    files = request.source.files(request.reading)
    kept = {**request.as_kept(), "manifest": done.manifest.sha256, "files": _listing(files)}
    kept["left_out"] = {key: getattr(done, key) for key in LEFT_OUT}
    with replacing(request.out / INPUTS_NAME) as file:
        file.write(json.dumps(kept).encode())


def _tidy(request: Request, manifest: Manifest) -> None:
    """Do what a run has left undone that was killed after it had written the manifest."""
    _remove_leftovers(request.out)
    Journal(request.out).remove()
    if _kept_inputs(request.out).get("manifest") != manifest.sha256:
        _keep_inputs(request, Prepared(request.out, manifest, False, 0.0, 0.0))


def _remove_leftovers(out: Path) -> None:
    """Delete the temporary files of runs that were killed; the folder is locked, so no other run has any here."""
    for pattern in ("*.json.*.tmp", "*.bin.*.tmp"):
        for path in out.glob(pattern):
            path.unlink(missing_ok=True)


def _kept_inputs(out: Path) -> dict[str, Any]:
    try:
        kept = json.loads((out / INPUTS_NAME).read_bytes())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def usable_cores() -> int:
    """Return how many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def _make_folder(out: Path) -> list[Path]:
    """Create `out`; return the folders that were not there before, the innermost first."""
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from error
    return missing


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _leave_nothing_of_nothing(request: Request) -> None:
    """Remove what a run has left that ended before there was anything to go on with."""
    progress = Journal(request.out).read()
    if progress is not None and not progress.has_begun:
        Journal(request.out).remove()
        _remove_shards(request.out, file_stem(request.corpus))


def _remove_shards(out: Path, stem: str) -> None:
    """Delete the shards, whole and partial, of an earlier preparation."""
    for split in SPLITS:
        number = "[0-9]" * 6
        for pattern in (f"{stem}_{split}_{number}.bin", f"{stem}_{split}_{number}.bin{PARTIAL}"):
            for path in out.glob(pattern):
                path.unlink()


def _say_who_holds(reading: Reading) -> Callable[[str], None]:
    return lambda holder: reading.report(Step("wait", 0, None, "bytes", f"{holder} prepares a corpus there"))
