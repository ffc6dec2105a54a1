"""The clock: what counts, what does not, and what a resumed run goes on from."""

from nanorun.training.clock import TrainingClock


class FakeTime:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


def test_validation_time_is_not_counted():
    time = FakeTime()
    clock = TrainingClock(now=time)
    time.seconds = 3.0
    with clock.paused("validation"):
        time.seconds = 10.0
    time.seconds = 12.0
    assert clock.train_seconds() == 5.0
    assert clock.seconds() == {"train_seconds": 5.0, "validation_seconds": 7.0, "total_seconds": 12.0}


def test_a_pause_inside_a_pause_is_charged_to_the_inner_one():
    time = FakeTime()
    clock = TrainingClock(now=time)
    with clock.paused("setup"):
        time.seconds = 1.0
        with clock.paused("compile"):
            time.seconds = 4.0
        time.seconds = 6.0
    assert clock.seconds() == {
        "train_seconds": 0.0,
        "setup_seconds": 3.0,
        "compile_seconds": 3.0,
        "total_seconds": 6.0,
    }


def test_a_resumed_clock_goes_on_from_the_counted_seconds_it_had():
    time = FakeTime()
    before = TrainingClock(now=time)
    time.seconds = 30.0
    state = before.state_dict()
    after = TrainingClock(now=time)
    with after.paused("setup"):
        time.seconds = 40.0
        after.load_state_dict(state)
    time.seconds = 41.0
    assert after.train_seconds() == 31.0


def test_the_device_is_waited_for_at_both_edges_of_a_pause():
    waits = []
    clock = TrainingClock(now=FakeTime(), synchronise=lambda: waits.append(1))
    with clock.paused("validation"):
        assert len(waits) == 1
    assert len(waits) == 2
