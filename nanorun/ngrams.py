"""Embeddings of the tokens just read, as n-grams: what a small model would spend its first layers on, looked up.

Shapes: B rows, T positions, N lengths of n-grams, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanorun.dropout import kept, mix
from nanorun.operators import operator

ROUNDS = 0x2545F491
"""Any odd number: what keeps an n-gram's code apart from that of a shorter one with the same last tokens."""


class NgramEmbedding(nn.Module):
    """Adds up, at each position, a vector for each n-gram of the given lengths that ends there.

    All tables lie in one weight, `n_buckets` rows for each length. An n-gram's row is its number where there are
    no more of them than rows, and a hash of it elsewhere, so that some n-grams share a row. Before a row's first
    token stands a token of no text, and before a document's first token where `document_token` begins documents
    that are kept apart. Where `sparse` is set, the weight's gradient is a sparse tensor of the rows
    that were read: its size and its cost are those of the tokens, not of the tables.
    """

    def __init__(self, lengths: Sequence[int], n_buckets: int, n_embd: int, vocab_size: int) -> None:
        super().__init__()
        self.lengths, self.n_buckets, self.vocab_size = tuple(lengths), n_buckets, vocab_size
        self.sparse = False
        self.weight = nn.Parameter(torch.zeros(len(self.lengths) * n_buckets, n_embd))

    def rows(self, idx_BT: Tensor, document_token: int | None = None) -> Tensor:
        """Return rows_BTN, the row of the weight of each n-gram that ends at each position."""
        return ngram_rows(idx_BT, self.lengths, self.n_buckets, self.vocab_size, document_token)

    def forward(
        self, idx_BT: Tensor, drop_keys_B: Tensor | None, p: float, document_token: int | None = None
    ) -> Tensor:
        """Return the sums, (B, T, C); with keys, a share `p` of the n-grams dropped, each whole."""
        rows_BTN = self.rows(idx_BT, document_token)
        n_rows, n_positions, n_lengths = rows_BTN.shape
        weights_BTN = None
        if drop_keys_B is not None:
            kept_BTN = kept(drop_keys_B, n_positions, n_lengths, p, self.weight.dtype)
            weights_BTN = (kept_BTN / (1 - p)).flatten(0, 1)
        sums_NC = F.embedding_bag(
            rows_BTN.flatten(0, 1),
            self.weight,
            mode="sum",
            sparse=self.sparse,
            per_sample_weights=weights_BTN,
        )
        return sums_NC.view(n_rows, n_positions, -1)


# An operator of its own is left alone by torch.compile, which writes each use of a number out anew: a number is used
# twice in each round of `mix`, so that the code of one trigram's row came to 18,000 lines.
@operator("ngram_rows")
def ngram_rows(
    idx_BT: Tensor,
    lengths: Sequence[int],
    n_buckets: int,
    vocab_size: int,
    document_token: int | None = None,
) -> Tensor:
    """Return rows_BTN as NgramEmbedding.rows does."""
    tokens_BT, code_BT = idx_BT + 1, idx_BT + 1
    document_BT = None if document_token is None else (idx_BT == document_token).cumsum(1)
    n_codes = n_kinds = vocab_size + 1
    exact, found = True, []
    for length in range(2, max(lengths) + 1):
        before_BT = F.pad(tokens_BT, (length - 1, 0))[:, : tokens_BT.size(1)]
        if document_BT is not None:
            its_document_BT = F.pad(document_BT, (length - 1, 0))[:, : tokens_BT.size(1)]
            before_BT = before_BT.where(its_document_BT == document_BT, 0)
        n_codes *= n_kinds
        if exact and n_codes <= n_buckets:
            code_BT = code_BT * n_kinds + before_BT
            row_BT = code_BT
        else:
            exact = False
            code_BT = mix(mix(code_BT) ^ mix(before_BT + ROUNDS))
            row_BT = code_BT % n_buckets
        if length in lengths:
            found.append(row_BT + len(found) * n_buckets)
    return torch.stack(found, dim=-1)


@torch.library.register_fake("nanorun::ngram_rows")
def _(idx_BT: Tensor, lengths: Sequence[int], *rest: int | None) -> Tensor:
    return idx_BT.new_empty((*idx_BT.shape, len(lengths)))
