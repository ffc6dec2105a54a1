"""AdaGrad, torch's, fused on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from nanorun.optim.adam import GradientsInOrder, fused_params
from nanorun.optim.options import REQUIRED, Option

SUMMARY = "Gradient over the root of the sum of all its squares, so that steps only get shorter."
PAPER = "Duchi et al. 2011, https://jmlr.org/papers/v12/duchi11a.html"
SOURCE = "torch.optim.Adagrad"
ROLES = ("embedding", "head", "matrix", "vector")
UNIT = "entry"
OPTIONS = {
    "lr": Option(REQUIRED, "learning rate", low=0.0),
    "lr_decay": Option(0.0, "lr is divided by 1 + (step − 1) times this", low=0.0),
    "weight_decay": Option(0.0, "L2 penalty, added to the gradient", low=0.0),
    "initial_accumulator_value": Option(0.0, "what the sum of squares starts from", low=0.0),
    "eps": Option(1e-10, "added to the root, outside it unless eps_inside", low=0.0),
    "eps_inside": Option(False, "√(sum + eps) in place of √sum + eps"),
}

FUSED_DEVICES = frozenset({"cpu"})
"""Where every torch since 2.9 has the fused kernel. CUDA's came later, and torch's foreach serves there."""


class Adagrad(GradientsInOrder, torch.optim.Adagrad):
    """torch.optim.Adagrad with a keyword-only signature, the fused kernel on the CPU, and `eps_inside`.

    The default is torch's and the paper's √sum + ε; `eps_inside` gives √(sum + ε). Since that is the root of a
    sum that started ε higher, `sum` then holds ε from the start and torch's kernel adds none.

    State per parameter, from construction on: `sum` and `step`. Differs from torch in that a group's own
    `initial_accumulator_value` counts. Bad steps are torch's fused kernel's to skip, or else the host's.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        eps_inside: bool = False,
    ) -> None:
        params, fused = fused_params(params, FUSED_DEVICES)
        self.skips_on_host, self.eps_inside = not fused, eps_inside
        super().__init__(
            params,
            lr=lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
            fused=fused,
        )
        # torch's constructor has written its own start over that of add_param_group.
        for group in self.param_groups:
            self._start_sums(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and start its sums."""
        super().add_param_group({"eps_inside": self.eps_inside, **param_group})
        self._start_sums(self.param_groups[-1])

    def _start_sums(self, group: dict[str, Any]) -> None:
        start = group["initial_accumulator_value"] + (group["eps"] if group["eps_inside"] else 0.0)
        for parameter in group["params"]:
            step = torch.zeros((), device=parameter.device if group["fused"] else None, dtype=torch.float32)
            self.state[parameter] = {"step": step, "sum": torch.full_like(parameter, start)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; the kernel stays the one for this device."""
        groups = [{**group, "fused": not self.skips_on_host} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what `closure` returns."""
        eps = [group["eps"] for group in self.param_groups]
        for group in self.param_groups:
            if group["eps_inside"]:
                group["eps"] = 0.0
        try:
            return super().step(closure)
        finally:
            for group, value in zip(self.param_groups, eps, strict=True):
                group["eps"] = value


CLASS = Adagrad
