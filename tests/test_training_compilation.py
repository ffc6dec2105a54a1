"""Compiled code is tried where it could pay, and kept where it is faster; all by given seconds, none measured."""

from types import SimpleNamespace

import pytest
import torch

from nanorun.training.compilation import FUSED_TO_WIDTH, KNOWN_CPU, compile_if_it_pays
from nanorun.training.distributed import Ranks


class FakeStepper:
    """Steps that take given seconds, eager and compiled."""

    ranks = Ranks()

    def __init__(self, eager, compiled, *, device="cpu", width=128, fused=False):
        self.seconds = {False: eager, True: compiled}
        self.device = torch.device(device)
        self.config = SimpleNamespace(model=SimpleNamespace(n_embd=width))
        self.compiled, self.n_compiled, self.stepped = False, 0, []
        self.is_fused = lambda: fused

    def warm_up(self):
        self.stepped.append(self.compiled)
        return self.seconds[self.compiled]

    def compile(self):
        self.compiled, self.n_compiled = True, self.n_compiled + 1

    def forget_compiled(self):
        self.compiled = False


@pytest.mark.parametrize("width", [32, 128, 192, 384, 1024])
def test_a_cpu_run_is_compiled_in_trial_only_where_what_is_known_says_that_it_could_pay(width):
    known = next(one for one in KNOWN_CPU if width <= one.to_width)
    enough = known.seconds / known.saved
    short, long = (FakeStepper(0.5, 0.4, width=width) for _ in range(2))
    compiled, line = compile_if_it_pays(short, "auto", steps=int(enough))
    assert (compiled, short.n_compiled) == (False, 0)
    assert line.startswith("eager code: compiling takes about")
    assert "of this run" in line
    compiled, line = compile_if_it_pays(long, "auto", steps=int(2.1 * enough))
    assert (compiled, long.compiled, long.n_compiled) == (True, True, 1)
    assert "a step 0.4 s in place of 0.5 s" in line


def test_fused_blocks_are_left_as_they_are_unless_compiled_code_is_asked_for():
    stepper = FakeStepper(0.5, 0.4, fused=True)
    compiled, line = compile_if_it_pays(stepper, "auto", steps=10**6)
    assert (compiled, stepper.n_compiled) == (False, 0)
    assert line == "eager code: its fused blocks are faster than compiled code"
    assert compile_if_it_pays(stepper, "on", steps=1)[0] is True
    wider = FakeStepper(0.5, 0.4, fused=True, width=2 * FUSED_TO_WIDTH)
    assert compile_if_it_pays(wider, "auto", steps=10**6)[0] is True


def test_one_rank_without_fused_blocks_has_all_ranks_try_compiled_code(monkeypatch):
    stepper = FakeStepper(0.5, 0.4, fused=True)
    monkeypatch.setattr(stepper, "ranks", Ranks())
    monkeypatch.setattr(Ranks, "any", lambda self, mine: mine or not stepper.compiled)
    compiled, _ = compile_if_it_pays(stepper, "auto", steps=10**6)
    assert (compiled, stepper.n_compiled) == (True, 1)


def test_code_that_turned_out_slower_is_not_kept_and_the_line_has_both_times():
    stepper = FakeStepper(0.5, 0.6)
    compiled, line = compile_if_it_pays(stepper, "auto", steps=10**6)
    assert (compiled, stepper.compiled, stepper.n_compiled) == (False, False, 1)
    assert line.startswith("eager code: compiling took")
    assert "a step 0.6 s in place of 0.5 s" in line


def test_what_was_asked_for_is_done_whatever_it_takes():
    slower = FakeStepper(0.5, 0.6)
    assert compile_if_it_pays(slower, "on", steps=1)[0] is True
    assert slower.compiled
    assert compile_if_it_pays(FakeStepper(0.5, 0.1), "off", steps=10**9) == (False, "")


def test_on_cuda_where_nothing_is_known_the_trial_alone_decides():
    assert compile_if_it_pays(FakeStepper(0.5, 0.4, device="cuda"), "auto", steps=1)[0] is True
    assert compile_if_it_pays(FakeStepper(0.5, 0.6, device="cuda"), "auto", steps=10**6)[0] is False


def test_a_real_run_stays_eager_when_it_is_short_and_says_so(make_stepper, monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    compiled, line = compile_if_it_pays(make_stepper(), "auto", steps=6)
    assert compiled is False
    assert line.startswith("eager code")


def test_a_step_that_was_timed_already_is_not_run_again():
    timed, untimed = FakeStepper(0.5, 0.4), FakeStepper(0.5, 0.4)
    told = compile_if_it_pays(timed, "auto", steps=10**6, eager=0.5)[1]
    assert "a step 0.4 s in place of 0.5 s" in told
    assert timed.stepped == [True] * 3
    compile_if_it_pays(untimed, "auto", steps=10**6)
    assert untimed.stepped == [False] * 3 + [True] * 3
    for asked in ("off", "auto"):
        short = FakeStepper(0.5, 0.4)
        assert compile_if_it_pays(short, asked, steps=2, eager=0.5)[0] is False
        assert short.stepped == []
