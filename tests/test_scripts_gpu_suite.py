"""The GPU's suite, dry: every section gives its figures on a CPU, and the budget and failures are told."""

import json
import math

import pytest
from scripts_loader import script


@pytest.fixture(scope="module")
def suite():
    with script("gpu_suite") as module:
        yield module


def leaves(found):
    for value in found.values():
        if isinstance(value, dict):
            yield from leaves(value)
        else:
            yield value


@pytest.mark.slow
def test_a_dry_run_fills_every_section_but_the_tests_with_finite_figures(suite, tmp_path, capsys):
    names = [name for name in suite.SECTIONS if name != "tests"]
    assert suite.main(["--dry-run", "--only", ",".join(names), "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert list(found) == ["about", *names]
    numbers = [value for value in leaves(found) if isinstance(value, float)]
    assert len(numbers) > 40
    assert all(map(math.isfinite, numbers))
    printed = capsys.readouterr().out
    for name in names:
        assert f"\n{name} · " in printed
    speed = found["speed"]
    assert set(speed) >= {"nanorun", "nanorun, eager", "simple", "plain PyTorch"}
    assert found["golden"]["adamw"]["largest_move"] == 0.0
    assert found["newton_schulz"]["48×32×32"]["eager"]["error"] < 1e-5
    assert found["documents"]["blocks_from_mask"] < 0.02


def test_what_the_budget_has_no_room_for_is_left_out_and_a_failure_costs_its_own_section_alone(
    suite, tmp_path, monkeypatch
):
    def failing(suite):
        raise RuntimeError("out of order")

    sections = {"late": (failing, 1e9), "bad": (failing, 0.0), "good": (lambda suite: {"n": 1.0}, 0.0)}
    monkeypatch.setattr(suite, "SECTIONS", sections)
    made = suite.Suite(True, tmp_path, 100.0)
    made.dry = False
    suite.run(made, list(sections))
    found = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert "wanted" in found["late"]["left_out"]
    assert found["bad"]["failed"] == "RuntimeError: out of order"
    assert found["good"]["n"] == 1.0


@pytest.fixture
def allocator(monkeypatch):
    """CUDA's account of its memory as this list of bytes has it: allocated now, and the most so far."""
    import torch

    bytes_of = [0, 0]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: bytes_of[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: bytes_of[1])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: bytes_of.__setitem__(1, bytes_of[0]))
    return bytes_of


def test_a_contenders_peak_is_its_own_weights_state_and_step_whatever_the_others_hold(
    suite, tmp_path, allocator
):
    import torch

    made, gib = suite.Suite(True, tmp_path, 100.0), 2**30
    made.device = torch.device("cuda")

    def contender(weights, state, activations):
        allocator[0] += weights * gib
        states = iter([state * gib])

        def step():
            allocator[0] += next(states, 0)
            allocator[1] = max(allocator[1], allocator[0] + activations * gib)

        return step

    peaks = []
    for sizes in ((2, 4, 10), (1, 2, 3)):
        before = made.held()
        peaks.append(made.peak_gib(contender(*sizes), before))
    assert peaks == [16.0, 6.0]


def test_each_contender_is_made_and_measured_before_the_next_is_made(suite, tmp_path, monkeypatch):
    made, told = suite.Suite(True, tmp_path, 100.0), []
    alive = []
    build, peak = made.stepper, made.peak_gib
    monkeypatch.setattr(made, "held", lambda: len(alive))
    monkeypatch.setattr(
        made, "stepper", lambda *given, **named: alive.append(build(*given, **named)) or alive[-1]
    )
    monkeypatch.setattr(
        made, "peak_gib", lambda call, before: told.append((before, len(alive))) or peak(call, before)
    )
    suite.memory(made)
    assert told == [(0, 1), (1, 2)]


def test_the_references_learn(suite):
    import torch
    from gpu_references import Plain, Simple

    torch.manual_seed(0)
    idx_BT = torch.randint(16, (4, 16))
    for kind in (Simple, Plain):
        model = kind(64, 1, 2, 32, 16)
        model.build_optimizers()
        model.micro_batch_rows = 2
        losses = [float(model.train_step(idx_BT, idx_BT)) for _ in range(30)]
        assert losses[0] == pytest.approx(math.log(64), abs=0.4)
        assert losses[-1] < losses[0] - 0.3


def test_without_a_gpu_the_suite_says_how_to_run_dry(suite, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        suite.main([])
    assert ended.value.code == 2
    assert "--dry-run" in capsys.readouterr().err
