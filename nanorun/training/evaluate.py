"""Validation loss over all ranks."""

from __future__ import annotations

import torch

from nanorun.data.batches import TokenSet, n_validation_windows, validation_rows
from nanorun.model import GPT
from nanorun.training.distributed import Ranks

TOKENS_PER_PASS_CPU = 4096
"""Tokens of one forward pass on a CPU: at 2,048 to 8,192 the rate was the same within 3 % (scripts/bench_step.py)."""
TOKENS_PER_PASS_CUDA = 65536
LOGITS_PER_PASS_CUDA = 2**28
"""Tokens times vocabulary of one forward pass on CUDA: 1 GiB in fp32, of which the loss holds three copies."""


def windows_per_pass(device: torch.device, context_len: int, vocab_size: int) -> int:
    """Return how many windows one forward pass reads."""
    if device.type == "cpu":
        return max(1, TOKENS_PER_PASS_CPU // context_len)
    return max(1, min(TOKENS_PER_PASS_CUDA, LOGITS_PER_PASS_CUDA // vocab_size) // context_len)


@torch.no_grad()
def validation_loss(
    model: GPT,
    tokens: TokenSet,
    *,
    n_tokens: int,
    context_len: int,
    stride: int,
    device: torch.device,
    ranks: Ranks,
    autocast: torch.autocast,
) -> tuple[float, int]:
    """Return the mean loss in nats a token and the count of predicted tokens.

    Every validation token but the first is predicted once; the windows are dealt out over the ranks, and the
    sums travel in float64, so the number of ranks and of windows a pass moves only the rounding.
    """
    was_training = model.training
    model.eval()
    n_windows = n_validation_windows(
        tokens, n_tokens=n_tokens or None, context_len=context_len, stride=stride
    )
    first = n_windows * ranks.rank // ranks.n_ranks
    last = n_windows * (ranks.rank + 1) // ranks.n_ranks
    per_pass = windows_per_pass(device, context_len, model.vocab_size)
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    # All ranks make as many passes as the one that has most windows, the last over padding perhaps: each pass of a
    # model that is shared out needs all of them.
    most = -(-n_windows // ranks.n_ranks)
    for window in range(first, first + most, per_pass):
        n_left = max(0, last - window)
        idx_BT, targets_BT = validation_rows(
            tokens,
            n_tokens=n_tokens or None,
            context_len=context_len,
            stride=stride,
            first_window=window if n_left else n_windows,
            n_windows=min(per_pass, n_left) or 1,
        )
        with autocast:
            loss_sum, n_predicted = model(
                torch.from_numpy(idx_BT).to(device), torch.from_numpy(targets_BT).to(device)
            )
        totals += torch.stack([loss_sum.double(), n_predicted.double()])
        ranks.works()
    model.train(was_training)
    loss_sum_all, n_all = ranks.sum_(totals).tolist()
    return loss_sum_all / n_all, int(n_all)
