"""Schedules as pure functions of the step."""

import itertools
import math
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorun.errors import UserError
from nanorun.optim.schedules import names, scale_at


@st.composite
def schedules(draw):
    steps = draw(st.integers(1, 300))
    return draw(st.sampled_from(names())), {
        "steps": steps,
        "warmup_steps": draw(st.integers(0, steps)),
        "cooldown_fraction": draw(st.floats(0, 1)),
        "final_scale": draw(st.floats(0, 1)),
    }


@settings(max_examples=100, deadline=None)
@given(schedules())
def test_scale_rises_to_one_and_then_never_rises(schedule):
    name, options = schedule
    scales = [scale_at(name, step, **options) for step in range(options["steps"])]
    warmup = options["warmup_steps"]
    assert all(0.0 <= scale <= 1.0 for scale in scales)
    assert all(a < b for a, b in itertools.pairwise(scales[:warmup]))
    assert all(a >= b for a, b in itertools.pairwise(scales[warmup:]))
    if warmup:
        assert scales[0] > 0.0
        assert scales[warmup - 1] == 1.0
    assert all(scale >= options["final_scale"] - 1e-12 for scale in scales[warmup:])


@pytest.mark.parametrize("name", names())
def test_without_warm_up_the_first_step_is_whole(name):
    assert scale_at(name, 0, steps=10, cooldown_fraction=0.5) == 1.0


def test_known_values():
    assert [scale_at("linear", s, steps=4) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [scale_at("wsd", s, steps=8, cooldown_fraction=0.5) for s in range(8)] == [
        1,
        1,
        1,
        1,
        1,
        0.75,
        0.5,
        0.25,
    ]
    assert scale_at("cosine", 5, steps=10, final_scale=0.2) == pytest.approx(0.6)
    assert [scale_at("constant", s, steps=4, warmup_steps=2) for s in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert scale_at("linear", 9, steps=10, final_scale=0.1) == pytest.approx(0.19)


def test_cool_down_longer_than_what_warm_up_leaves_begins_after_it():
    scales = [scale_at("wsd", s, steps=10, warmup_steps=5, cooldown_fraction=0.9) for s in range(10)]
    assert scales[4:6] == [1.0, 1.0]
    assert scales[6] == pytest.approx(0.8)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 300), st.integers(0, 40), st.floats(0, 1))
def test_each_cycle_is_a_cosine_run_of_its_own(data, steps, warmup_steps, final_scale):
    cycles = data.draw(st.integers(1, steps))
    options = {"warmup_steps": warmup_steps, "final_scale": final_scale}
    scales = [scale_at("cyclic", step, steps=steps, cycles=cycles, **options) for step in range(steps)]
    cuts = [math.ceil(Fraction(steps * cycle, cycles)) for cycle in range(cycles + 1)]
    lengths = [end - start for start, end in itertools.pairwise(cuts)]
    assert scales == [
        scale_at("cosine", s, steps=length, **options) for length in lengths for s in range(length)
    ]
    assert max(lengths) - min(lengths) <= 1


def test_cycles_follow_the_curves_of_the_submission():
    def submitted(time):
        """AlgoPerf's cyclic_lr over 20 steps with 2 cycles and a warm-up of 4, its least rate taken as 0."""
        start = 0 if time <= 10 else 10
        if time <= start + 4:
            return (time - start) / 4
        return 0.5 * (1 + math.cos(math.pi * (time - start - 4) / 6))

    scales = [scale_at("cyclic", step, steps=20, warmup_steps=4, cycles=2) for step in range(20)]
    # There a cycle begins with an update at scale 0; here its warm-up is one step ahead.
    assert scales == pytest.approx([submitted(s + 1 if s % 10 < 4 else s) for s in range(20)])
    assert scales[9] < scales[10] == 0.25


def test_cycles_of_the_other_schedules_are_one():
    for name in set(names()) - {"cyclic"}:
        assert scale_at(name, 7, steps=10, cycles=3) == scale_at(name, 7, steps=10)


def test_unknown_schedule_names_the_nearest():
    with pytest.raises(UserError, match="'cosine'"):
        scale_at("cosin", 0, steps=10)


@pytest.mark.parametrize(
    ("step", "options", "named"),
    [
        (10, {"steps": 10}, "step 10"),
        (-1, {"steps": 10}, "step -1"),
        (0, {"steps": 0}, "steps = 0"),
        (0, {"steps": 10, "warmup_steps": -1}, "warmup_steps = -1"),
        (0, {"steps": 10, "cooldown_fraction": 1.5}, "cooldown_fraction = 1.5"),
        (0, {"steps": 10, "final_scale": float("nan")}, "final_scale = nan"),
        (0, {"steps": 10, "cycles": 0}, "cycles = 0: wanted at least 1"),
        (0, {"steps": 10, "cycles": 11}, "cycles = 11.*at most one a step, so 10"),
    ],
)
def test_value_out_of_range_is_named(step, options, named):
    with pytest.raises(UserError, match=named):
        scale_at("wsd", step, **options)


def test_schedules_import_no_torch():
    code = "import sys, nanorun.optim.schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
