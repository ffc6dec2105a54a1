"""Bytes of text behind the tokens that a validation predicts, so that losses can be told in bits per byte."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from nanorun.data.batches import TokenSet
from nanorun.data.shards import Manifest
from nanorun.data.tokenizers import Tokenizer, tokenizer_from_manifest
from nanorun.data.tokenizers.tiktoken_files import is_at_hand
from nanorun.errors import UserError

TOKENS_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class PredictedText:
    """What a validation predicts."""

    n_tokens: int
    n_bytes: float
    """UTF-8 bytes that those tokens stand for; the end-of-text token stands for none."""
    exact: bool
    """Counted, token by token; otherwise what as many tokens of the split have on average."""

    def bits_per_byte(self, loss: float) -> float | None:
        """Return a mean loss in nats a token as bits a byte of text; None where nobody knows the bytes."""
        return loss * self.n_tokens / math.log(2) / self.n_bytes if self.n_bytes else None

    def describe(self, loss: float) -> str:
        """Return the same in words, such as `1.8764 bits a byte`; empty where nobody knows the bytes."""
        bits = self.bits_per_byte(loss)
        return "" if bits is None else f"{'' if self.exact else 'about '}{bits:.4f} bits a byte"


def predicted_text(tokens: TokenSet, n_tokens: int, folder: Path) -> PredictedText:
    """Return what is predicted of the first `n_tokens` (0: all): every token but the very first.

    `folder` is where the manifest lies. A tokenizer that is not at hand without a network, or cannot tell the bytes
    of a run of tokens, gives the average of the split.
    """
    n_used = n_tokens or tokens.n_tokens
    tokenizer = _tokenizer_at_hand(tokens.manifest, folder)
    if tokenizer is None:
        return PredictedText(n_used - 1, tokens.n_bytes / tokens.n_tokens * (n_used - 1), exact=False)
    n_bytes = sum(
        tokenizer.bytes_of(tokens.slice(start, min(TOKENS_AT_ONCE, n_used - start)))
        for start in range(1, n_used, TOKENS_AT_ONCE)
    )
    return PredictedText(n_used - 1, n_bytes, exact=True)


def _tokenizer_at_hand(manifest: Manifest | None, folder: Path) -> Tokenizer | None:
    """Return a tokenizer that counts bytes exactly; None where there is none here. Nothing is fetched."""
    if manifest is None or _would_be_fetched(str(manifest.tokenizer.get("name"))):
        return None
    try:
        tokenizer = tokenizer_from_manifest(manifest.tokenizer, folder)
    except UserError:
        return None
    return tokenizer if tokenizer.counts_bytes else None


def _would_be_fetched(tokenizer: str) -> bool:
    return not is_at_hand(tokenizer)
