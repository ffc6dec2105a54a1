"""Whether torch.compile pays for the run at hand, and warm-up either way."""

from __future__ import annotations

import time

from nanorun.training.step import Stepper

COMPILE_SECONDS_CPU = 25.0
"""What compiling a small GPT's step costs on two CPU cores (scripts/bench_step.py --compile)."""
COMPILE_GAIN_CPU = 0.08
"""Share of the step that compiled code saves there (the same command)."""


def compile_if_it_pays(stepper: Stepper, asked: str, *, steps: int) -> tuple[bool, str]:
    """Warm the stepper up, compiled or not; return whether it is compiled and a line that says why, or ''.

    `asked` is `on`, `off` or `auto`: on CUDA always, on a CPU when the run is long enough to win back what
    compiling costs. Where compiling fails, eager code goes on and the line says so.
    """
    # Eager first: a micro-batch that does not fit is found before anything is compiled for its shape.
    stepper.warm_up()
    if asked == "off":
        return False, ""
    on_cpu = stepper.device.type == "cpu"
    if asked == "auto" and on_cpu and not stepper.ranks.any(_pays_on_cpu(stepper, steps)):
        return False, ""
    failed = ""
    try:
        stepper.compile()
        stepper.warm_up()
    except Exception as error:  # the compiler's own errors have no common class
        reason = str(error).strip().splitlines()
        failed = reason[0][:200] if reason else type(error).__name__
        stepper.forget_compiled()
        stepper.optimizers.zero_grad()
        stepper.warm_up()
    # All ranks compute alike, or the run would have other bits when it is resumed.
    if not stepper.ranks.any(bool(failed)):
        return True, ""
    stepper.forget_compiled()
    return False, f"torch.compile failed here, going on without it: {failed or 'on another rank'}"


def _pays_on_cpu(stepper: Stepper, steps: int) -> bool:
    began = time.perf_counter()
    stepper.warm_up()
    expected = (time.perf_counter() - began) * steps * stepper.rows_of_rank / _rows_warmed(stepper)
    return expected * COMPILE_GAIN_CPU > COMPILE_SECONDS_CPU


def _rows_warmed(stepper: Stepper) -> int:
    rest = stepper.rows_of_rank % stepper.micro_batch_rows
    return (stepper.micro_batch_rows + rest) * len(stepper.lengths)
