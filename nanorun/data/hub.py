"""Dataset repositories on the Hugging Face hub: which commit a revision is, which files it holds, and their hashes.

Requests go through `huggingface_hub`'s own client, so proxies, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they
mean elsewhere. What waits, retries and explains is here: the library would wait for minutes without a word.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit

from nanorun import __version__
from nanorun.errors import UserError, printable

ATTEMPTS = 6
"""Failures in a row, with nothing new received between them, before giving up."""
FIRST_WAIT_SECONDS = 1.0
"""After the first failure; it doubles from there, unless the hub says how long."""
LONGEST_WAIT_SECONDS = 900.0
"""What the hub may ask for; its rates are counted over five minutes (its documentation, "Rate limits")."""
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})

COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME_PART = r"\w(?:[\w.-]{0,94}\w)?"
_NAME = re.compile(rf"(?!.*(?:--|\.\.)){_NAME_PART}/{_NAME_PART}(?<!\.git)", re.ASCII)
_RATE_LIMIT = re.compile(r"\br\s*=\s*0\s*;\s*t\s*=\s*(\d+)")


class Unreachable(UserError):
    """The hub does not answer, or not usefully, and trying again did not help."""

    exit_code = 1


class Stopped(Exception):
    """Somebody else has failed, or was interrupted; there is nothing to say."""


@dataclass(frozen=True)
class HubFile:
    """One file of a repository at some commit."""

    path: str
    size: int
    etag: str
    """sha256 of the content where the file lies in LFS, else git's sha1: what the hub and its caches name it by."""

    def hasher(self) -> hashlib._Hash:
        """Return a hash that ends as `etag` once it has seen the whole content."""
        if len(self.etag) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


@dataclass(frozen=True)
class Snapshot:
    """What a dataset repository holds at one commit."""

    repository: str
    commit: str
    files: tuple[HubFile, ...]
    """In the order of their paths."""

    @property
    def page(self) -> str:
        """Where a person can see and fetch the files."""
        return f"{endpoint()}/datasets/{self.repository}/tree/{self.commit}"


def pause(seconds: float, stop: Event) -> None:
    """Return after `seconds`, or as soon as `stop` is set."""
    stop.wait(seconds)


def check_repository(name: str) -> str:
    """Return `name`; `UserError` unless it can be OWNER/NAME on the hub."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} is no repository on the hub: expected OWNER/NAME of letters, digits, '-', '_' and '.', "
            "for example hub:roneneldan/TinyStories."
        )
    return name


def endpoint() -> str:
    """Return the hub's address: HF_ENDPOINT's, or huggingface.co."""
    from huggingface_hub import constants

    if not constants.ENDPOINT.startswith(("http://", "https://")):
        raise UserError(
            f"HF_ENDPOINT is {constants.ENDPOINT!r}; expected an address such as https://huggingface.co."
        )
    return constants.ENDPOINT


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE forbids every request."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def headers() -> dict[str, str]:
    """Return what goes with every request.

    Not the library's `build_hf_headers`: it first asks the hub for a list that its telemetry needs.
    """
    from huggingface_hub import __version__ as hub_version
    from huggingface_hub import constants, get_token

    found = {"user-agent": f"nanorun/{__version__}; hf_hub/{hub_version}"}
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    if token:
        found["authorization"] = f"Bearer {token}"
    return found


def timeout_seconds() -> float:
    """Return how long a connection or a read may take: HF_HUB_DOWNLOAD_TIMEOUT, else the library's 10."""
    from huggingface_hub import constants

    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)


Tell = Callable[[str], None]
"""Takes a sentence about what is being waited for."""


def resolve(repository: str, revision: str | None, tell: Tell) -> str:
    """Return the commit that `revision` (a branch, a tag, a commit; None: the default branch) is now."""
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    where = f"api/datasets/{check_repository(repository)}"
    if revision is not None:
        where += f"/revision/{quote(revision, safe='')}"
    answer, _ = _get_json(where, Asked(repository, revision), tell)
    commit = answer.get("sha") if isinstance(answer, dict) else None
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise _unexpected(where, f"the commit is {commit!r}")
    return commit


def snapshot(repository: str, commit: str, tell: Tell) -> Snapshot:
    """Return the files of `repository` at `commit`."""
    where = f"api/datasets/{check_repository(repository)}/tree/{quote(commit, safe='')}?recursive=true"
    files: list[HubFile] = []
    following: str | None = where
    while following:
        entries, following = _get_json(following, Asked(repository, commit), tell)
        try:
            files += [_hub_file(entry) for entry in entries if entry["type"] == "file"]
        except (KeyError, TypeError, ValueError) as error:
            raise _unexpected(where, f"{type(error).__name__}: {error}") from error
    return Snapshot(repository, commit, tuple(sorted(files, key=lambda file: file.path)))


def _hub_file(entry: dict[str, Any]) -> HubFile:
    content = entry.get("lfs") or entry
    path, size, etag = entry["path"], content["size"], content["oid"]
    if (
        not isinstance(path, str)
        or not isinstance(size, int)
        or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", etag)
    ):
        raise ValueError(f"{entry!r:.200}")
    return HubFile(path, size, etag)


@dataclass(frozen=True)
class Asked:
    """What a request is about, for messages."""

    repository: str
    revision: str | None = None
    path: str | None = None

    def __str__(self) -> str:
        return printable(self.path or self.repository)


class Patience:
    """Takes failures: waits after those that may pass, longer each time, and raises `UserError` for the others."""

    def __init__(self, asked: Asked, stop: Event, tell: Tell) -> None:
        self.asked = asked
        self.stop = stop
        self.tell = tell
        self.failures = 0

    def renew(self) -> None:
        """Begin to count again: something new has arrived."""
        self.failures = 0

    def after(self, error: Exception) -> None:
        """Return when it is time to try again; `UserError` where that is no use."""
        response = getattr(error, "response", None)
        if response is not None and not _may_pass(response):
            _refuse(error, self.asked)
        if is_offline():
            raise Unreachable(
                f"{self.asked}: HF_HUB_OFFLINE is set, so nothing was asked of the hub; unset it to fetch."
            ) from error
        self.failures += 1
        reason = _reason(error)
        if self.failures >= ATTEMPTS:
            mend = (
                "see whether there is a network, and a proxy to name in HTTPS_PROXY"
                if response is None
                else "try again later"
            )
            raise Unreachable(
                f"{self.asked}: {endpoint()} failed {ATTEMPTS} times in a row ({reason}); {mend}."
            ) from error
        wait = _wait_asked_for(response)
        if wait is None:
            wait = FIRST_WAIT_SECONDS * 2 ** (self.failures - 1)
        elif wait > LONGEST_WAIT_SECONDS:
            raise Unreachable(
                f"{self.asked}: {endpoint()} asks to come back in {wait:,.0f} s ({reason}); do so."
            ) from error
        self.tell(f"{self.asked}: {reason}; trying again in {wait:,.0f} s")
        pause(wait, self.stop)
        if self.stop.is_set():
            raise Stopped


def transport_errors() -> tuple[type[Exception], ...]:
    """Return what the library's client and `hf_raise_for_status` raise when a request fails."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # The client is httpx or httpx2, by the library's version; the library's own error derives from its base.
    base = next(kind for kind in HfHubHTTPError.__mro__ if kind.__module__.split(".")[0].startswith("httpx"))
    return (base, OfflineModeIsEnabled)


def _get_json(where: str, asked: Asked, tell: Tell) -> tuple[Any, str | None]:
    """Return what the hub's API answers at `where`, and the `where` of the next page."""
    from huggingface_hub import get_session, hf_raise_for_status

    failures = transport_errors()
    patience = Patience(asked, Event(), tell)
    while True:
        try:
            response = get_session().get(
                f"{endpoint()}/{where}", headers=headers(), timeout=timeout_seconds()
            )
            hf_raise_for_status(response)
            break
        except failures as error:
            patience.after(error)
    try:
        answer = response.json()
    except ValueError as error:
        raise _unexpected(where, f"no JSON, but {response.text[:60]!r}") from error
    following = response.links.get("next", {}).get("url")
    # The address of the next page is the hub's own even where a mirror answers: only its path and query are taken.
    parts = urlsplit(following) if following else None
    return answer, f"{parts.path.lstrip('/')}?{parts.query}" if parts else None


def _unexpected(where: str, found: str) -> UserError:
    return UserError(
        f"{endpoint()}/{where} answers with something else than the hub does ({printable(found)}); see whether "
        "HF_ENDPOINT, a proxy or a login page of the network stands in between."
    )


def _may_pass(response: Any) -> bool:
    """Return whether another try may fare better.

    403 from where the hub redirects to is an address that is no longer valid; the next try asks for a new one.
    416 is answered to a Range that does not fit; the next try begins anew.
    """
    status = response.status_code
    return status in TRANSIENT or status == 416 or (status == 403 and bool(response.history))


def _reason(error: Exception) -> str:
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP {response.status_code}"
    text = printable(str(error)).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _wait_asked_for(response: Any) -> float | None:
    """Return how many seconds the hub asks to wait: Retry-After, or its RateLimit's reset."""
    if response is None:
        return None
    after = response.headers.get("Retry-After", "").strip()
    if after.isdecimal():
        return float(after)
    limit = _RATE_LIMIT.search(response.headers.get("RateLimit", ""))
    return float(limit[1]) if limit and response.status_code == 429 else None


def _refuse(error: Exception, asked: Asked) -> NoReturn:
    """Raise the `UserError` of an answer that will stay the same: what was refused, and how to mend it."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    repository, revision = asked.repository, asked.revision or "its default branch"
    page = f"{endpoint()}/datasets/{repository}"
    log_in = "set HF_TOKEN to a token of an account that may (`hf auth login` keeps one)"
    if isinstance(error, errors.GatedRepoError):
        found = f"{repository} is gated: accept its conditions at {page}, then {log_in}."
    elif isinstance(error, errors.RevisionNotFoundError):
        found = (
            f"{repository} has no revision {revision!r}; choose a branch, tag or commit of {page}/commits, or leave "
            "--revision out."
        )
    elif isinstance(error, errors.EntryNotFoundError):
        found = f"{repository} has no file {asked.path!r} at {revision}; {page}/tree/{revision} shows what it has."
    elif isinstance(error, errors.DisabledRepoError):
        found = f"{repository} was disabled by the hub; see {page}."
    elif isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        found = (
            f"There is no dataset {repository!r} on {endpoint()}, or it is private and the token (HF_TOKEN) may not "
            f"read it: check the name, or {log_in}."
        )
    elif status == 403:
        found = f"{endpoint()} forbids to read {repository} (403); {log_in}."
    else:
        said = printable(str(getattr(error, "server_message", None) or "")).strip()
        found = f"{asked}: {endpoint()} answers HTTP {status}{f' ({said:.200})' if said else ''}; try again later."
    raise UserError(found) from error


def safe_parts(path: str) -> tuple[str, ...]:
    """Return the parts of a file's path in a repository; `UserError` where it would lead out of a folder."""
    parts = tuple(path.split("/"))
    if (
        not all(parts)
        or {".", ".."} & set(parts)
        or "\\" in path
        or ":" in parts[0]
        or not path.isprintable()
    ):
        raise UserError(
            f"The hub names a file {path!r}, which is no plain path; leave it out with --include."
        )
    return parts
