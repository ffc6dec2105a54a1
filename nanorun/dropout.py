"""Dropout whose masks are functions of a row's key and a place in the network, and of nothing else.

A mask is computed from counters and not drawn from a generator: it is the same however the rows of a step are split
into micro-batches and ranks, when activations are computed again, compiled or not, and on every device.

Shapes: B rows, L lines of a row (positions, or heads times positions), C numbers of a line.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanorun.operators import operator

BITS = 0xFFFFFFFF


def mix(x: Tensor) -> Tensor:
    """Return a permutation of the 32-bit numbers in which every bit depends on every bit of `x`, both int64.

    Two xor-shift-multiply rounds, with the least biased multipliers of Wellons' hash-prospector that are under 2³¹:
    no product overflows, so that compiled code has nothing to assume.
    """
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD & BITS
    x = x ^ (x >> 15)
    x = x * 0x735A2D97 & BITS
    return x ^ (x >> 15)


def row_keys(seed: int, first_row: int, n_rows: int, device: torch.device) -> Tensor:
    """Return the keys_B of rows that are counted over the whole run, so that no step repeats another's masks."""
    rows_B = torch.arange(first_row, first_row + n_rows, device=device)
    return mix(mix(mix(rows_B & BITS) ^ (rows_B >> 32)) ^ seed)


def keys_at(keys_B: Tensor, place: int) -> Tensor:
    """Return the rows' keys at one of the places that `keys_B` stands for."""
    return mix(keys_B ^ place)


# An operator of its own is left alone by torch.compile, which has changed what this computes in two ways: integers
# that passed through floats, and a C++ compiler that took signed numbers not to wrap around.
@operator("kept")
def kept(keys_B: Tensor, n_lines: int, width: int, p: float, dtype: torch.dtype) -> Tensor:
    """Return kept_BLC: 1 with probability 1 − `p` (to 2⁻³²) and 0 elsewhere."""
    lines_BL, columns_C = lines_and_columns(keys_B, n_lines, width)
    # A full mix for each line and each column; where they meet, a sum in int32, which wraps around, and x·(2x+1), the
    # permutation of RC6 (Rivest et al. 1998) whose highest bits depend on all of x: one operation where `mix` has nine.
    x_BLC = lines_BL[:, :, None] + columns_C
    for _ in range(2):
        x_BLC.addcmul_(x_BLC, x_BLC, value=2)
    return (x_BLC >= round(p * 2**32) - 2**31).to(dtype)


def lines_and_columns(keys_B: Tensor, n_lines: int, width: int) -> tuple[Tensor, Tensor]:
    """Return what `kept` adds up for the number at a line (B, L) and a column (C), in int32."""
    device = keys_B.device
    lines_BL = mix(keys_B[:, None] ^ mix(torch.arange(n_lines, device=device)))
    columns_C = mix(torch.arange(width, device=device))
    return (lines_BL - 2**31).int(), (columns_C - 2**31).int()


@torch.library.register_fake("nanorun::kept")
def _(keys_B: Tensor, n_lines: int, width: int, p: float, dtype: torch.dtype) -> Tensor:
    return keys_B.new_empty((keys_B.size(0), n_lines, width), dtype=dtype)


def dropout(x_BLC: Tensor, keys_B: Tensor, p: float) -> Tensor:
    """Return `x` with a share `p` of its numbers set to 0 and the rest scaled up to keep the mean."""
    kept_BLC = kept(keys_B, x_BLC.size(1), x_BLC.size(2), p, x_BLC.dtype)
    return x_BLC * kept_BLC * (1 / (1 - p))
