"""Optimizers by name; torch is imported with the first of them and not before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanorun.optim.build import OptimizerSet as OptimizerSet
    from nanorun.optim.build import build_optimizers as build_optimizers
    from nanorun.optim.build import create as create

__all__ = ["OptimizerSet", "build_optimizers", "create"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from nanorun.optim import build

        return getattr(build, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
