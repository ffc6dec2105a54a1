"""Whether torch.compile pays for the run at hand, and warm-up either way."""

from __future__ import annotations

import time
from typing import NamedTuple

from nanorun.errors import first_line
from nanorun.training.step import Stepper


class Known(NamedTuple):
    """What compiling a step has been measured to cost and to save."""

    to_width: float
    """Holds for models up to so wide."""
    seconds: float
    """To compile, with nothing cached."""
    saved: float
    """Share of the eager step that compiled code saves."""


KNOWN_CPU = (Known(128, 21.0, 0.20), Known(256, 21.0, 0.11), Known(float("inf"), 22.0, 0.06))
"""Of plain operations: three or four layers on two CPU cores, whole steps with Muon (docs/performance.md)."""
FUSED_TO_WIDTH = 384
"""Width up to which fused blocks have been measured beside compiled code (docs/performance.md)."""


def compile_if_it_pays(
    stepper: Stepper, asked: str, *, steps: int, eager: float | None = None
) -> tuple[bool, str]:
    """Warm the stepper up, compiled or not; return whether it is compiled and a line that says why, or ''.

    `asked` is `on`, `off` or `auto`. Under `auto` a run on a CPU that is too short to win back what compiling costs
    stays eager; any other is compiled in trial, and keeps whichever code is the faster, now that both are there.
    Where compiling fails, eager code goes on and the line says so. `eager` are the seconds of an eager step, of the
    slowest rank, where the stepper was warmed up and timed already: it runs no further one.
    """
    timed = eager is not None
    if eager is None:
        # Eager first: a micro-batch that does not fit is found before anything is compiled for its shape.
        eager = stepper.ranks.slowest(stepper.warm_up())
    if asked == "off":
        return False, ""
    if asked == "auto":
        why_not = _cannot_pay(stepper, eager * steps)
        if not why_not and not timed:
            # The first step was long by what it made; only a run that is long by it is worth a second look.
            eager = _step_seconds(stepper)
            why_not = _cannot_pay(stepper, eager * steps)
        if why_not:
            return False, why_not
    began = time.perf_counter()
    failed = _try_to_compile(stepper)
    seconds = stepper.ranks.slowest(time.perf_counter() - began)
    # All ranks compute alike, or the run would have other bits when it is resumed.
    if stepper.ranks.any(bool(failed)):
        stepper.forget_compiled()
        return False, f"torch.compile failed here, going on without it: {failed or 'on another rank'}"
    if asked == "on":
        return True, f"compiled code, as asked; compiling took {seconds:.0f} s"
    compiled = _step_seconds(stepper)
    found = f"compiling took {seconds:.0f} s, and a step {compiled:.3g} s in place of {eager:.3g} s"
    if compiled < eager:
        return True, f"compiled code: {found}, {(eager - compiled) * steps:.0f} s less in all"
    stepper.forget_compiled()
    return False, f"eager code: {found}"


def _cannot_pay(stepper: Stepper, run_seconds: float) -> str:
    """Return why a run of so many seconds is not worth compiling for; empty where it could be, and on CUDA.

    Compiled code has no fused blocks: it took 1.15 to 1.23 times as long at widths 64 to 384 (docs/performance.md).
    """
    if stepper.device.type != "cpu":
        return ""
    # One rank without kernels has all try: what they send each other has to match.
    fused = not stepper.ranks.any(not stepper.is_fused())
    if fused and stepper.config.model.n_embd <= FUSED_TO_WIDTH:
        return "eager code: its fused blocks are faster than compiled code"
    known = next(one for one in KNOWN_CPU if stepper.config.model.n_embd <= one.to_width)
    saved = run_seconds * known.saved
    if saved > known.seconds:
        return ""
    return f"eager code: compiling takes about {known.seconds:.0f} s, and would save about {saved:.0f} s of this run"


def _step_seconds(stepper: Stepper) -> float:
    """Return the seconds of the better of two steps, of the slowest rank."""
    return stepper.ranks.slowest(min(stepper.warm_up() for _ in range(2)))


def _try_to_compile(stepper: Stepper) -> str:
    """Have the stepper run compiled code; return why it cannot, in a line, or ''."""
    try:
        stepper.compile()
        stepper.warm_up()
    except Exception as error:  # the compiler's own errors have no common class
        stepper.forget_compiled()
        stepper.optimizers.zero_grad()
        stepper.warm_up()
        return first_line(error)[:200]
    return ""
