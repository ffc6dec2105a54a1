"""Operators of nanorun's own: functions of tensors that torch.compile and torch's modes take as one piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_library = torch.library.Library("nanorun", "FRAGMENT")


def operator(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that makes a function `torch.ops.nanorun.<name>`, its schema read off its annotations.

    What torch.library.custom_op does for a function that changes none of its inputs and that no gradient goes
    through; but that imports torch's compiler at the first call, a second of every start. Its shapes for the compiler
    are registered with torch.library.register_fake("nanorun::<name>").
    """

    def made(function: Callable[P, R]) -> Callable[P, R]:
        schema = torch.library.infer_schema(function, mutates_args=())
        _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, function, "CompositeExplicitAutograd")
        found: Callable[P, R] = getattr(torch.ops.nanorun, name).default
        return found

    return made
