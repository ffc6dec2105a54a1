"""Scale of the learning rate at a step, as pure functions.

A schedule scales and never sets: `group["lr"] = group["base_lr"] * scale`. `step` counts completed steps,
so the first update of a run asks for step 0 and the last for steps - 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from nanorun.errors import UserError, nearest


def constant(progress: float, final_scale: float) -> float:
    """Return 1 whatever the progress."""
    return 1.0


def linear(progress: float, final_scale: float) -> float:
    """Return the straight line from 1 at progress 0 to `final_scale` at progress 1."""
    return 1.0 + (final_scale - 1.0) * progress


def cosine(progress: float, final_scale: float) -> float:
    """Return half a cosine from 1 at progress 0 to `final_scale` at progress 1 (arXiv:1608.03983)."""
    return final_scale + (1.0 - final_scale) * 0.5 * (1.0 + math.cos(math.pi * progress))


DECAYS: dict[str, Callable[[float, float], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    # Warm-up, stable, decay (arXiv:2404.06395): a linear decay over the last part of the run alone.
    "wsd": linear,
    # Warm-up and cosine again and again, as AlgoPerf's submission cyclic_lr of 2024 has it.
    "cyclic": cosine,
}


def names() -> list[str]:
    """Return the schedules' names."""
    return list(DECAYS)


def scale_at(
    name: str,
    step: int,
    *,
    steps: int,
    warmup_steps: int = 0,
    cooldown_fraction: float = 1.0,
    final_scale: float = 0.0,
    cycles: int = 1,
) -> float:
    """Return the scale of the update that follows `step` completed steps, in [0, 1].

    The warm-up rises in equal parts and reaches 1 at its last step, so no step is wasted at scale 0. The
    decay starts at 1 and would reach `final_scale` just after the last step. `linear` and `cosine` decay from
    the end of the warm-up; `wsd` stays at 1 and decays over the last `cooldown_fraction` of all steps. A run
    shorter than its warm-up ends inside it, as a trial of a few steps does.

    `cyclic` cuts the run into `cycles` of equal length, to within a step, each of which is a run of `cosine`
    with a warm-up of its own; the other schedules take no notice of `cycles`.
    """
    check(
        name,
        steps=steps,
        warmup_steps=warmup_steps,
        cooldown_fraction=cooldown_fraction,
        final_scale=final_scale,
        cycles=cycles,
    )
    if not 0 <= step < steps:
        raise UserError(f"step {step} is outside a run of {steps} steps: wanted 0 to {steps - 1}")
    if name == "cyclic":
        step, steps = _within_cycle(step, steps, cycles)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    start = float(warmup_steps)
    if name == "wsd":
        start = max(start, steps - cooldown_fraction * steps)
    progress = max(0.0, step - start) / (steps - start) if steps > start else 0.0
    return DECAYS[name](progress, final_scale)


def _within_cycle(step: int, steps: int, cycles: int) -> tuple[int, int]:
    """Return which step of its cycle `step` is, and the length of that cycle, in whole numbers throughout."""
    cycle = step * cycles // steps
    # The first step that the line above puts into a cycle: cycle * steps / cycles, rounded up.
    first, after = (-(-number * steps // cycles) for number in (cycle, cycle + 1))
    return step - first, after - first


def check(
    name: str,
    *,
    steps: int,
    warmup_steps: int,
    cooldown_fraction: float,
    final_scale: float,
    cycles: int = 1,
) -> None:
    """Refuse an unknown schedule or a value outside its range, by name."""
    if name not in DECAYS:
        raise UserError(
            f"unknown schedule {name!r}: wanted one of {', '.join(DECAYS)}.{nearest(name, names())}"
        )
    if steps < 1:
        raise UserError(f"steps = {steps}: wanted at least 1")
    if warmup_steps < 0:
        raise UserError(f"warmup_steps = {warmup_steps}: wanted at least 0")
    if not 1 <= cycles <= steps:
        raise UserError(f"cycles = {cycles}: wanted at least 1 and at most one a step, so {steps}")
    for option, value in (("cooldown_fraction", cooldown_fraction), ("final_scale", final_scale)):
        if not 0.0 <= value <= 1.0:
            raise UserError(f"{option} = {value}: wanted a number from 0 to 1")
