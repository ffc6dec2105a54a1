"""Attention within documents: against an explicit mask, and as a switch of the model."""

import pytest
import torch
import torch.nn.functional as F
from conftest import VOCAB_SIZE

from nanorun.config import ModelConfig
from nanorun.documents import attention_in_documents, document_mask
from nanorun.errors import UserError
from nanorun.model import GPT
from nanorun.training.setup import document_token

TOKEN = 7


def rows_of_documents(n_rows=2, n_positions=24):
    idx_BT = torch.randint(8, VOCAB_SIZE, (n_rows, n_positions), generator=torch.Generator().manual_seed(0))
    for row, at in ((0, 5), (0, 6), (0, 17), (1, 0), (1, 23)):
        idx_BT[row, at] = TOKEN
    return idx_BT


def sees(row, position, other):
    """Whether `other` is no later than `position`, and no document begins after it and up to `position`."""
    return other <= position and TOKEN not in row[other + 1 : position + 1]


@pytest.mark.parametrize("in_blocks", [False, True])
def test_attention_in_documents_is_that_under_an_explicit_mask(in_blocks):
    idx_BT = rows_of_documents()
    n_positions = idx_BT.size(1)
    explicit = torch.tensor(
        [
            [[sees(row, i, j) for j in range(n_positions)] for i in range(n_positions)]
            for row in idx_BT.tolist()
        ]
    )
    qkv = torch.randn(3, 2, 2, n_positions, 16, generator=torch.Generator().manual_seed(1))
    expected = F.scaled_dot_product_attention(*qkv, attn_mask=explicit[:, None])
    found = attention_in_documents(*qkv, document_mask(idx_BT, TOKEN, in_blocks=in_blocks))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - F.scaled_dot_product_attention(*qkv, is_causal=True)).abs().max() > 0.1


@pytest.mark.parametrize(("recompute", "ngrams"), [("none", []), ("block", []), ("none", [2, 4])])
def test_under_the_switch_a_document_s_logits_are_those_it_has_alone(recompute, ngrams):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_len": 24}
    model = GPT(ModelConfig(**sizes, ngrams=ngrams, document_mask=True), VOCAB_SIZE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.document_token, model.checkpoint_activations = TOKEN, recompute
    idx_BT = rows_of_documents()
    together = model(idx_BT)[0, 6:17]
    # Rotary positions tell distances alone, so a document may stand anywhere in its row.
    torch.testing.assert_close(together, model(idx_BT[:1, 6:17])[0], rtol=0, atol=1e-4)


def test_a_tokenizer_without_a_token_between_documents_is_refused():
    with pytest.raises(UserError, match="'char' has none"):
        document_token("char", None)


def test_masked_documents_and_dropout_are_refused_together():
    with pytest.raises(ValueError, match="do not go together"):
        ModelConfig(document_mask=True, dropout=0.1)
