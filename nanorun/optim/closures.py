"""What every `step` does with a closure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """Return what the closure returns, gradients recorded inside it; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
