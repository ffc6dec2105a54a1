"""Whether a run that was made again agrees with its record: in loss, and on like hardware in seconds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from nanorun.records.record import Code, Hardware, Record, Software
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
    recorded, reproduced = _losses(record), _losses(again)
    common = sorted(recorded.keys() & reproduced.keys())
    same_initial = record.initial_weights_sha256 == again.initial_weights_sha256
    same_final = record.final_weights_sha256 == again.final_weights_sha256
    if not common:
        return _without_common_step(record, again, same_initial, same_final)
    step = common[-1]
    largest = max(common, key=lambda one: abs(recorded[one] - reproduced[one]))
    paired = same_initial and record.seed == again.seed
    if same_final and step == record.steps == again.steps:
        tolerance, test = _same_bits(recorded[step])
        agrees = all(abs(recorded[k] - reproduced[k]) <= SAME_BITS * recorded[k] for k in common)
    else:
        tolerance, test = _tolerance(recorded[step], _spread(record, row), paired)
        agrees = abs(recorded[step] - reproduced[step]) <= tolerance
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
        loss_agrees=agrees and same_tokens,
        points_compared=len(common),
        largest_difference=abs(recorded[largest] - reproduced[largest]),
        largest_difference_step=largest,
        recorded_seconds=seconds[0],
        reproduced_seconds=seconds[1],
        seconds_agree=seconds_agree,
        seconds_test=seconds_test,
        verdict="",
        reasons=(),
    )
    return _with_verdict(found, record, again)


def _losses(record: Record) -> dict[int, float]:
    """Step to validation loss, the last step's included."""
    return {record.steps: record.final_val_loss} | {p.step: p.val_loss for p in record.validation}


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


def _tolerance(loss: float, spread: tuple[float, int] | None, paired: bool) -> tuple[float, str]:
    """Return how far the two losses may lie apart, in nats, and the criterion in words."""
    share = SAME_SEED if paired else OTHER_SEED
    seeds = "the same seed and initial weights" if paired else "another seed or other initial weights"
    if spread is None:
        return share * loss, (
            f"the losses may differ by {share * loss:.4f}: {100 * share:g} % of the recorded one, for {seeds}; "
            "a rule of thumb, since the row has no two other seeds to tell its spread"
        )
    from scipy.special import stdtrit

    s, n = spread
    by_spread = float(stdtrit(n - 1, 1 - LEVEL / 2)) * s * math.sqrt(2)
    test = (
        f"t-test of one difference against the spread of the row's {n} other seeds (s = {s:.4f}, {n - 1} degrees of "
        f"freedom, two-sided, {LEVEL:g}): {by_spread:.4f}; it assumes normal losses of one spread"
    )
    if not paired:
        return by_spread, f"the losses may differ by {by_spread:.4f}, for {seeds}: {test}"
    tolerance = min(by_spread, share * loss)
    return tolerance, (
        f"the losses may differ by {tolerance:.4f}, for {seeds}: the smaller of {share * loss:.4f}, "
        f"{100 * share:g} % of the recorded one, and of a {test}"
    )


def _judge_seconds(record: Record, again: Record, same_code: bool, busy: str) -> tuple[bool | None, str]:
    """Return whether the seconds agree, None where they cannot be judged, and the criterion in words."""
    why = _not_like(record, again, same_code) or busy
    if why:
        return None, f"seconds are told and not judged: {why}"
    test = f"seconds have to agree within a factor of {SAME_SECONDS:g}: like hardware, software and code"
    recorded, reproduced = record.clock["train_seconds"], again.clock["train_seconds"]
    return recorded / SAME_SECONDS <= reproduced <= recorded * SAME_SECONDS, test


def _not_like(record: Record, again: Record, same_code: bool) -> str:
    """Return why the two runs' seconds cannot be expected to be the same; empty where they can."""
    checks = {
        f"the hardware differs ({record.hardware.label}; {again.hardware.label})": (
            record.hardware.label == again.hardware.label
        ),
        f"the runs have {record.steps} and {again.steps} steps": record.steps == again.steps,
        "torch differs": record.software.torch == again.software.torch,
        "one of them was compiled": record.software.compiled == again.software.compiled,
        "a run was stopped and resumed": not record.resumed and not again.resumed,
        "the code differs": same_code,
    }
    return next((why for why, alike in checks.items() if not alike), "")


def _with_verdict(found: Agreement, record: Record, again: Record) -> Agreement:
    """The same comparison with its verdict and the reasons for it."""
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
