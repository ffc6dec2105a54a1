"""A record and its run made again: what agrees, by which criterion, and when seconds are judged."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from records_samples import a_dict, a_record

from nanorun.records.agreement import (
    OTHER_SEED,
    SAME_SECONDS,
    SAME_SEED,
    compare_runs,
    differences,
)
from nanorun.records.record import Reached, Record, ValidationPoint

RECORD = a_record(final=1.5)


def again(*, bits: str = "f" * 64, **changes: Any) -> Record:
    """The same run once more, with other final weights unless said."""
    return a_record(**{"final": 1.5, "final_weights_sha256": bits, **changes})


def row(*finals: float) -> list[Record]:
    return [RECORD, *(a_record(seed=1 + k, final=final) for k, final in enumerate(finals))]


def compare(
    one: Record, *, others: tuple[float, ...] = (), same_code: bool = True, busy: str = "", of=RECORD
):
    return compare_runs(of, one, row(*others), same_code=same_code, busy=busy)


def test_the_same_bits_agree():
    found = compare(RECORD)
    assert (found.verdict, found.loss_agrees, found.same_final_weights) == ("agrees", True, True)
    assert found.largest_difference == 0
    assert found.points_compared == len(RECORD.validation)
    assert "to the bit" in found.loss_test


def test_the_same_weights_with_another_loss_disagree_however_near():
    claimed = dataclasses.replace(RECORD, validation=(), final_val_loss=1.4995)
    found = compare(RECORD, of=claimed)
    assert found.verdict == "disagrees"
    assert "are not theirs" in found.reasons[1]


def test_the_same_weights_with_another_point_in_between_disagree():
    curve = list(RECORD.validation)
    curve[3] = curve[3]._replace(val_loss=curve[3].val_loss - 0.1)
    found = compare(RECORD, of=dataclasses.replace(RECORD, validation=tuple(curve)))
    assert found.verdict == "disagrees"
    assert found.largest_difference == pytest.approx(0.1)
    assert found.largest_difference_step == curve[3].step


@pytest.mark.parametrize(
    ("apart", "verdict"), [(0.9, "agrees"), (-0.9, "agrees"), (1.1, "disagrees"), (-1.1, "disagrees")]
)
def test_without_two_other_seeds_one_seed_may_differ_by_a_stated_share(apart: float, verdict: str):
    found = compare(again(final=1.5 * (1 + apart * SAME_SEED)), others=(1.51,))
    assert found.verdict == verdict
    assert found.loss_tolerance == pytest.approx(1.5 * SAME_SEED)
    assert "rule of thumb" in found.loss_test


def test_the_spread_of_other_seeds_narrows_what_is_allowed():
    found = compare(again(final=1.5), others=(1.5, 1.501, 1.499, 1.5005))
    import scipy.stats

    s = scipy.stats.tstd([1.5, 1.501, 1.499, 1.5005])
    assert found.loss_tolerance == pytest.approx(scipy.stats.t.ppf(0.975, 3) * s * 2**0.5)
    assert found.loss_tolerance < 1.5 * SAME_SEED
    assert "3 degrees of freedom" in found.loss_test
    assert "it assumes normal losses" in found.loss_test


def test_a_wrong_loss_does_not_widen_its_own_tolerance():
    far = dataclasses.replace(RECORD, final_val_loss=1.2, validation=())
    found = compare_runs(far, again(final=1.5), [far, *row(1.5, 1.502, 1.501)[1:]], same_code=True)
    assert found.verdict == "disagrees"
    assert found.loss_tolerance < 0.02


def test_a_row_of_equal_losses_tells_no_spread():
    assert compare(again(final=1.501), others=(1.5, 1.5)).loss_tolerance == pytest.approx(1.5 * SAME_SEED)


@pytest.mark.parametrize("changes", [{"seed": 9}, {"initial_weights_sha256": "0" * 64}])
def test_other_initial_weights_are_allowed_what_other_seeds_are(changes: dict[str, Any]):
    found = compare(again(final=1.5 * 1.02, **changes))
    assert found.verdict == "agrees"
    assert found.loss_tolerance == pytest.approx(1.5 * OTHER_SEED)


@pytest.mark.parametrize(("changes", "share"), [({}, SAME_SEED), ({"seed": 9}, OTHER_SEED)])
def test_the_spread_of_other_seeds_never_widens_what_is_allowed(changes: dict[str, Any], share: float):
    for others in ((1.48, 1.52), (1.48, 1.52, 1.5)):
        found = compare(again(final=1.57, **changes), others=others)
        assert found.loss_tolerance == pytest.approx(1.5 * share)
        assert found.verdict == "disagrees"


def with_curve(record: Record, **changes: float) -> Record:
    """The record with other losses at some steps, as in `s500=1.54`, and its crossing as that curve has it."""
    losses = {int(name[1:]): loss for name, loss in changes.items()}
    curve = tuple(p._replace(val_loss=losses.get(p.step, p.val_loss)) for p in record.validation)
    crossing = next((p for p in curve if p.val_loss <= record.target_val_loss), None)
    reached = crossing and Reached(crossing.step, crossing.train_seconds)
    return dataclasses.replace(record, validation=curve, reached=reached)


@pytest.mark.parametrize("changes", [{}, {"seed": 9}, {"initial_weights_sha256": "0" * 64}])
def test_a_crossing_that_the_run_again_does_not_bear_out_contests_the_record(changes: dict[str, Any]):
    claimed = with_curve(RECORD, s500=1.54)
    assert claimed.reached == Reached(500, 15.6)
    found = compare(again(**changes), of=claimed)
    assert abs(found.recorded_val_loss - found.reproduced_val_loss) == 0
    assert (found.verdict, found.loss_agrees, found.crossing_step) == ("disagrees", False, 500)
    assert "at step 500, where the record first reached its target, 1.540000 recorded" in found.reasons[1]
    assert compare(again(**changes)).verdict == "agrees"


def test_a_crossing_borne_out_within_the_tolerance_or_from_below_agrees():
    for loss in (1.545, 1.2):
        assert compare(with_curve(again(), s500=loss), of=with_curve(RECORD, s500=1.54)).verdict == "agrees"


def test_a_crossing_at_a_step_that_the_run_again_does_not_validate_contests_the_record():
    invented = ValidationPoint(450, 450 * 4096, 14.0, 1.54)
    curve = (*RECORD.validation[:5], invented, *RECORD.validation[5:])
    claimed = dataclasses.replace(RECORD, validation=curve, reached=Reached(450, 14.0))
    found = compare(again(), of=claimed)
    assert found.verdict == "disagrees"
    assert "at step 450, which was not validated here" in found.reasons[1]


def test_a_crossing_claimed_without_a_curve_is_held_against_the_target():
    claimed = dataclasses.replace(RECORD, validation=(), reached=Reached(500, 15.6))
    assert compare(again(), of=claimed).verdict == "disagrees"
    assert compare(with_curve(again(), s500=1.55), of=claimed).verdict == "agrees"


def test_a_run_that_ends_at_its_target_before_the_record_did_bears_it_out():
    claimed = dataclasses.replace(with_curve(RECORD, s600=1.551), stop_at_target=True)
    earlier = with_curve(again(), s600=1.549)
    cut = earlier.validation[:7]
    earlier = dataclasses.replace(earlier, validation=cut, steps=600, final_val_loss=1.549)
    assert claimed.reached is not None
    assert claimed.reached.step > cut[-1].step
    assert compare(earlier, of=claimed).verdict == "agrees"


def test_losses_over_other_validation_tokens_do_not_agree():
    found = compare(again(validation_tokens=10))
    assert found.verdict == "disagrees"
    assert "not the same measurement" in found.reasons[1]


def test_runs_without_a_common_step_do_not_agree():
    found = compare(again(points=2, steps=730, config=RECORD.config, validation=[]))
    assert found.verdict == "disagrees"
    assert "no step was validated in both runs" in found.reasons[0]


@pytest.mark.parametrize(
    ("factor", "agrees"), [(1.0, True), (SAME_SECONDS - 0.01, True), (1.3, False), (0.81, True), (0.7, False)]
)
def test_seconds_agree_within_a_factor_on_like_hardware(factor: float, agrees: bool):
    found = compare(again(bits=RECORD.final_weights_sha256, seconds=31.2 * factor))
    assert found.seconds_agree is agrees
    assert found.verdict == ("agrees" if agrees else "disagrees")
    assert found.seconds_ratio == pytest.approx(factor)


OTHER_HARDWARE = {**a_dict()["hardware"], "n_threads": 1}
OTHER_TORCH = {**a_dict()["software"], "torch": "3.0.0"}


@pytest.mark.parametrize(
    ("changes", "options", "why"),
    [
        ({"hardware": OTHER_HARDWARE}, {}, "the hardware differs"),
        ({"software": OTHER_TORCH}, {}, "torch differs"),
        ({"software": {**a_dict()["software"], "deterministic": True}}, {}, "one of them was deterministic"),
        ({"resumed": 1}, {}, "resumed"),
        ({}, {"same_code": False}, "the code differs"),
        ({}, {"busy": "this machine was not quiet"}, "not quiet"),
    ],
)
def test_seconds_are_told_and_not_judged_where_they_cannot_be(changes, options, why: str):
    found = compare(again(seconds=500.0, **changes), **options)
    assert found.seconds_agree is None
    assert found.verdict == "agrees"
    assert why in found.seconds_test
    assert found.reproduced_seconds == 500.0


def test_what_differs_between_then_and_now_is_named_and_what_does_not_is_not():
    other = again(
        software=OTHER_TORCH, hardware=OTHER_HARDWARE, code={**a_dict()["code"], "commit": "b" * 40}
    )
    assert differences(RECORD, RECORD.code, RECORD.hardware, RECORD.software) == ()
    said = differences(RECORD, other.code, other.hardware, other.software)
    assert said == (
        "code: nanorun 0.1.0 at aaaaaaaa then, nanorun 0.1.0 at bbbbbbbb here",
        "hardware: Intel Xeon @ 2.80GHz, 2 of 2 cores then, Intel Xeon @ 2.80GHz, 1 of 2 cores here",
        "torch: 2.9.0 then, 3.0.0 here",
    )
