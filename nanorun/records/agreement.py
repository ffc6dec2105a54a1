"""Whether a run that was made again agrees with its record: in loss, and on like hardware in seconds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from nanorun.records.record import Code, Hardware, Record, Software, ValidationPoint
from nanorun.records.significance import SAME_LOSS, mean, std

SAME_BITS = 1e-5
"""Losses of the same weights on the same tokens differ by rounding alone: less than this share of them."""
SAME_SEED = 0.005
"""Runs of one seed from the same initial weights may end this share of the recorded loss apart: a rule of thumb,
half the usual spread of seeds. Rounding alone, by micro-batches of one row, moved Muon's 200 steps on
shakespeare-sprint by a millionth of a nat; longer runs and bf16 move more."""
OTHER_SEED = 0.03
"""Runs of different seeds may, where the row is too small to tell its spread. The seeds of the rows under
records/ spread by 0.3 to 1.2 % of their loss, so two of them lie closer than this in about 9 of 10 cases or more."""
LEVEL = 0.05
"""Two-sided level of the test against the spread of a row's other seeds."""
SAME_SECONDS = 1.25
"""Seconds agree within this factor, either way."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What comparing a record with its run again came to; losses in nats a token."""

    same_initial_weights: bool
    same_final_weights: bool
    compared_step: int
    """The last validated step that both have."""
    recorded_val_loss: float
    reproduced_val_loss: float
    loss_tolerance: float
    loss_test: str
    """The criterion and what it assumes, one sentence."""
    loss_agrees: bool
    points_compared: int
    largest_difference: float
    """Over all validations that both have, in nats."""
    largest_difference_step: int
    recorded_seconds: float
    reproduced_seconds: float
    seconds_agree: bool | None
    """None where they are told and not judged."""
    seconds_test: str
    verdict: str
    """`agrees` or `disagrees`."""
    reasons: tuple[str, ...]
    crossing_step: int | None = None
    """The step at which the record first reached its target; None where it never did. Its loss is judged too."""

    @property
    def seconds_ratio(self) -> float | None:
        """Seconds here over seconds recorded."""
        return self.reproduced_seconds / self.recorded_seconds if self.recorded_seconds else None


def differences(record: Record, code: Code, hardware: Hardware, software: Software) -> tuple[str, ...]:
    """Return what was otherwise when the record was made, one short text each; nothing for what is alike."""
    then: dict[str, object] = {"hardware": record.hardware.label, "code": code_text(record.code)}
    now: dict[str, object] = {"hardware": hardware.label, "code": code_text(code)}
    if record.hardware.n_devices != hardware.n_devices:
        then["ranks"], now["ranks"] = record.hardware.n_devices, hardware.n_devices
    if record.code.outside or code.outside:
        then["outside optimizer"], now["outside optimizer"] = record.code.outside, code.outside
    for field in dataclasses.fields(Software):
        then[field.name], now[field.name] = (
            getattr(record.software, field.name),
            getattr(software, field.name),
        )
    return tuple(
        f"{key}: {then[key]} then, {now[key]} here"
        for key in sorted(then, key=lambda key: key != "code")
        if then[key] != now[key]
    )


def code_text(code: Code) -> str:
    """Return a state of the code in few words: version, commit, and whether the tree was changed."""
    where = f" at {code.commit[:8]}" if code.commit else ", no commit"
    return f"nanorun {code.version}{where}{' with changes' if code.dirty else ''}"


def compare_runs(
    record: Record, again: Record, row: Sequence[Record], *, same_code: bool, busy: str = ""
) -> Agreement:
    """Return how `again`, a new run of what `record` holds, agrees with it.

    `row` are the records that the report averages with `record`; those of other seeds tell the spread.
    `busy` says why this machine was not quiet; the seconds are then not judged.
    """
    recorded = losses_by_step(record.steps, record.final_val_loss, record.validation)
    reproduced = losses_by_step(again.steps, again.final_val_loss, again.validation)
    common = sorted(recorded.keys() & reproduced.keys())
    same_initial = record.initial_weights_sha256 == again.initial_weights_sha256
    same_final = record.final_weights_sha256 == again.final_weights_sha256
    if not common:
        return _without_common_step(record, again, same_initial, same_final)
    step = common[-1]
    largest = max(common, key=lambda one: abs(recorded[one] - reproduced[one]))
    share, kind = widest_share(record, again.seed, same_initial, same_final and again.steps == record.steps)
    tolerance, test = (
        _same_bits(recorded[step])
        if share == SAME_BITS
        else _tolerance(recorded[step], share, kind, _spread(record, row))
    )
    against = loss_contradiction(record, reproduced, share, tolerance)
    same_tokens = record.validation_tokens == again.validation_tokens
    seconds_agree, seconds_test = _judge_seconds(record, again, same_code, busy)
    seconds = record.clock["train_seconds"], again.clock["train_seconds"]
    found = Agreement(
        same_initial_weights=same_initial,
        same_final_weights=same_final,
        compared_step=step,
        recorded_val_loss=recorded[step],
        reproduced_val_loss=reproduced[step],
        loss_tolerance=tolerance,
        loss_test=test,
        loss_agrees=not against and same_tokens,
        points_compared=len(common),
        largest_difference=abs(recorded[largest] - reproduced[largest]),
        largest_difference_step=largest,
        recorded_seconds=seconds[0],
        reproduced_seconds=seconds[1],
        seconds_agree=seconds_agree,
        seconds_test=seconds_test,
        verdict="",
        reasons=(),
        crossing_step=record.reached.step if record.reached else None,
    )
    return _with_verdict(found, record, again, against)


def losses_by_step(steps: int, final: float, validation: Sequence[ValidationPoint]) -> dict[int, float]:
    """Return step to validation loss, the last step's included."""
    return {steps: final} | {point.step: point.val_loss for point in validation}


def widest_share(record: Record, seed: int, same_initial: bool, same_final: bool) -> tuple[float, str]:
    """Return the share of a recorded loss that a run again may differ by at most, and in words what it is for.

    `same_final` is for runs of the same length alone.
    """
    if same_final:
        return SAME_BITS, "the same final weights"
    if same_initial and seed == record.seed:
        return SAME_SEED, "the same seed and initial weights"
    return OTHER_SEED, "another seed or other initial weights"


def loss_contradiction(
    record: Record, reproduced: Mapping[int, float], share: float, tolerance: float
) -> str | None:
    """Return what of the record's losses a run again contradicts, its losses being `reproduced`; None for nothing.

    `share` is the widest that there is for such a pair, and `tolerance` what holds here, in nats.
    """
    recorded = losses_by_step(record.steps, record.final_val_loss, record.validation)
    common = sorted(recorded.keys() & reproduced.keys())
    if not common:
        return "no step was validated in both runs"
    step = common[-1]
    if abs(recorded[step] - reproduced[step]) > tolerance:
        return f"the losses after step {step} are {abs(recorded[step] - reproduced[step]):.4g} apart"
    apart = [k for k in common if abs(recorded[k] - reproduced[k]) > SAME_BITS * recorded[k]]
    if share == SAME_BITS and apart:
        return f"the losses after step {apart[0]} are not of one run"
    return _crossing_contradiction(record, recorded, reproduced, share, tolerance)


def _crossing_contradiction(
    record: Record,
    recorded: Mapping[int, float],
    reproduced: Mapping[int, float],
    share: float,
    tolerance: float,
) -> str | None:
    """Return why the run again does not bear out the record's first crossing of its target; None where it does.

    A lower loss there, or an earlier crossing, bears it out. The spread of a row tells of last steps, so that it
    narrows the tolerance here for runs of one seed alone: other seeds lie further apart halfway.
    """
    if record.reached is None:
        return None
    step = record.reached.step
    if step not in reproduced:
        if any(loss <= record.target_val_loss for at, loss in reproduced.items() if at < step):
            return None
        return f"the record first reached its target at step {step}, which was not validated here"
    # A record without its curve says of this step only that its loss was at the target or below.
    claimed = recorded.get(step, record.target_val_loss)
    allowed = share * claimed if share == OTHER_SEED else tolerance
    if reproduced[step] - claimed <= allowed:
        return None
    return (
        f"at step {step}, where the record first reached its target, {claimed:.6f} recorded, {reproduced[step]:.6f} "
        f"here, more than {allowed:.6f} above"
    )


def _without_common_step(record: Record, again: Record, same_initial: bool, same_final: bool) -> Agreement:
    why = f"no step was validated in both runs: the record ends after step {record.steps}, this one after {again.steps}"
    return Agreement(
        same_initial_weights=same_initial,
        same_final_weights=same_final,
        compared_step=0,
        recorded_val_loss=record.final_val_loss,
        reproduced_val_loss=again.final_val_loss,
        loss_tolerance=0.0,
        loss_test="losses are compared at the last step that both runs validated",
        loss_agrees=False,
        points_compared=0,
        largest_difference=abs(record.final_val_loss - again.final_val_loss),
        largest_difference_step=0,
        recorded_seconds=record.clock["train_seconds"],
        reproduced_seconds=again.clock["train_seconds"],
        seconds_agree=None,
        seconds_test="seconds are not judged: the runs have different lengths",
        verdict="disagrees",
        reasons=(why,),
        crossing_step=record.reached.step if record.reached else None,
    )


def _same_bits(loss: float) -> tuple[float, str]:
    return (
        SAME_BITS * loss,
        "the final weights are the same to the bit, so every validation has to be the same but for rounding "
        f"({SAME_BITS:g} of the loss)",
    )


def _spread(record: Record, row: Sequence[Record]) -> tuple[float, int] | None:
    """Spread and number of the row's other seeds; None where fewer than two full runs tell it.

    The record itself is left out: a wrong loss would widen its own tolerance.
    """
    by_seed: dict[int, list[float]] = {}
    for one in row:
        if one.completed and not one.stop_at_target and one.seed != record.seed:
            by_seed.setdefault(one.seed, []).append(one.final_val_loss)
    losses = [mean(values) for values in by_seed.values()]
    spread = std(losses)
    return None if spread is None or spread < SAME_LOSS else (spread, len(losses))


def _tolerance(loss: float, share: float, kind: str, spread: tuple[float, int] | None) -> tuple[float, str]:
    """Return how far the two losses may lie apart, in nats, and the criterion in words.

    The spread of a row only narrows it: that of two seeds is so ill known that its test allows 18 times of it.
    """
    widest = share * loss
    if spread is None:
        return widest, (
            f"the losses may differ by {widest:.4f}: {100 * share:g} % of the recorded one, for {kind}; "
            "a rule of thumb, since the row has no two other seeds to tell its spread"
        )
    from scipy.special import stdtrit

    s, n = spread
    by_spread = float(stdtrit(n - 1, 1 - LEVEL / 2)) * s * math.sqrt(2)
    test = (
        f"t-test of one difference against the spread of the row's {n} other seeds (s = {s:.4f}, {n - 1} degrees of "
        f"freedom, two-sided, {LEVEL:g}): {by_spread:.4f}; it assumes normal losses of one spread"
    )
    tolerance = min(by_spread, widest)
    return tolerance, (
        f"the losses may differ by {tolerance:.4f}, for {kind}: the smaller of {widest:.4f}, "
        f"{100 * share:g} % of the recorded one, and of a {test}"
    )


def _judge_seconds(record: Record, again: Record, same_code: bool, busy: str) -> tuple[bool | None, str]:
    """Return whether the seconds agree, None where they cannot be judged, and the criterion in words."""
    why = _not_like(record, again, same_code) or busy
    if why:
        return None, f"seconds are told and not judged: {why}"
    test = f"seconds have to agree within a factor of {SAME_SECONDS:g}: like hardware, software and code"
    recorded, reproduced = record.clock["train_seconds"], again.clock["train_seconds"]
    return seconds_are_near(recorded, reproduced), test


def seconds_are_near(recorded: float, reproduced: float) -> bool:
    """Return whether the seconds of two like runs agree."""
    return recorded / SAME_SECONDS <= reproduced <= recorded * SAME_SECONDS


def _not_like(record: Record, again: Record, same_code: bool) -> str:
    """Return why the two runs' seconds cannot be expected to be the same; empty where they can."""
    checks = {
        f"the hardware differs ({record.hardware.label}; {again.hardware.label})": (
            record.hardware.label == again.hardware.label
        ),
        f"the runs have {record.steps} and {again.steps} steps": record.steps == again.steps,
        "torch differs": record.software.torch == again.software.torch,
        "one of them was compiled": record.software.compiled == again.software.compiled,
        "one of them was deterministic": record.software.deterministic == again.software.deterministic,
        "one of them ran without kernels": record.software.kernels == again.software.kernels,
        "a run was stopped and resumed": not record.resumed and not again.resumed,
        "the code differs": same_code,
    }
    return next((why for why, alike in checks.items() if not alike), "")


def _with_verdict(found: Agreement, record: Record, again: Record, against: str | None) -> Agreement:
    """The same comparison with its verdict and the reasons for it; `against` is what the losses contradict."""
    apart = abs(found.recorded_val_loss - found.reproduced_val_loss)
    sign = "at most" if apart <= found.loss_tolerance else "more than"
    reasons = [
        f"loss after step {found.compared_step}: {found.recorded_val_loss:.6f} recorded, "
        f"{found.reproduced_val_loss:.6f} here, {apart:.6f} apart, {sign} {found.loss_tolerance:.6f}"
    ]
    if found.same_final_weights and found.loss_agrees:
        reasons.append("the final weights are the same to the bit")
    elif found.same_final_weights:
        reasons.append("the final weights are the same to the bit, and the recorded losses are not theirs")
    elif against and apart <= found.loss_tolerance:
        reasons.append(against)
    if record.validation_tokens != again.validation_tokens:
        reasons.append(
            f"a validation of the record predicts {record.validation_tokens:,} tokens, here "
            f"{again.validation_tokens:,}: not the same measurement"
        )
    if found.seconds_agree is not None:
        reasons.append(
            f"{found.recorded_seconds:.1f} s recorded, {found.reproduced_seconds:.1f} s here: "
            f"{'within' if found.seconds_agree else 'not within'} a factor of {SAME_SECONDS:g}"
        )
    agrees = found.loss_agrees and found.seconds_agree is not False
    return dataclasses.replace(found, verdict="agrees" if agrees else "disagrees", reasons=tuple(reasons))
