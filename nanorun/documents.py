"""Attention that stays within a document of its row.

Shapes: B rows, T positions, H heads, D channels per head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def document_mask(idx_BT: Tensor, token: int, *, in_blocks: bool = False) -> Any:
    """Return which positions each position sees: from the newest `token` at or before it, up to itself.

    Booleans_B1TT, or where `in_blocks` the BlockMask of torch's flex_attention, which passes over blocks of positions
    that see nothing of each other; it needs compiled code to be fast.
    """
    document_BT = (idx_BT == token).cumsum(1)
    if not in_blocks:
        return (document_BT[:, :, None] == document_BT[:, None, :]).tril()[:, None]
    # Imported late: it costs a start that does not use it.
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(row: Tensor, head: Tensor, position: Tensor, other: Tensor) -> Tensor:
        return (position >= other) & (document_BT[row, position] == document_BT[row, other])

    n_rows, n_positions = idx_BT.shape
    return create_block_mask(sees, n_rows, None, n_positions, n_positions, device=idx_BT.device)


def attention_in_documents(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, mask: Any) -> Tensor:
    """Return attention under what `document_mask` returned."""
    if isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, attn_mask=mask)
    from torch.nn.attention.flex_attention import flex_attention

    attended = flex_attention(q_BHTD, k_BHTD, v_BHTD, block_mask=mask)
    assert isinstance(attended, torch.Tensor)
    return attended
