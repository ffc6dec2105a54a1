"""Two sets of runs against each other: numbers against scipy's, and nothing compared that cannot be."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import scipy.stats
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from runs_samples import log_text, put_record, put_run, write_log

from nanorun.errors import UserError
from nanorun.records.compare import compare, print_comparison
from nanorun.records.record import plain_fields, read_record
from nanorun.records.significance import compare_means

A = [1.401, 1.407, 1.398, 1.412]
B = [1.431, 1.425, 1.444]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def two_presets():
    """Four records of muon and three of adamw, the second a hundred steps longer."""
    for seed, final in enumerate(A):
        put_record(Path("records"), seed=seed, final=final, seconds=30.0 + seed / 10)
    for seed, final in enumerate(B):
        put_record(
            Path("records"), name="adamw", seed=seed, final=final, seconds=60.0 + seed / 10, steps=1100
        )


def test_the_difference_is_welchs_and_the_effect_size_hedges(two_presets):
    found = compare("sotu:muon", "sotu:adamw").difference
    expected = scipy.stats.ttest_ind(A, B, equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert found.difference == pytest.approx(sum(A) / 4 - sum(B) / 3)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-6)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-6)
    assert (found.n_a, found.n_b) == (4, 3)
    pooled = math.sqrt((scipy.stats.tvar(A) * 3 + scipy.stats.tvar(B) * 2) / 5)
    # Hedges' usual approximation of the exact correction, good to a percent at five degrees of freedom.
    assert found.effect_size == pytest.approx(found.difference / pooled * (1 - 3 / (4 * 5 - 1)), rel=0.01)


def test_swapping_the_sides_turns_every_sign():
    one, other = compare_means(A, B), compare_means(B, A)
    assert one.difference == -other.difference
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    assert one.p_value == pytest.approx(other.p_value)
    assert one.effect_size == pytest.approx(-other.effect_size)


@pytest.mark.parametrize(("a", "b"), [([1.0], [2.0, 3.0]), ([1.0], [2.0]), ([1.0, 1.0], [2.0, 2.0])])
def test_without_a_spread_there_is_a_difference_and_no_interval(a: list[float], b: list[float]):
    found = compare_means(a, b)
    assert found.difference < 0
    assert (found.low, found.high, found.p_value) == (None, None, None)


def test_spreads_too_small_or_losses_too_large_for_a_float_end_in_no_traceback():
    assert compare_means([0.0, 1e-200], [1.0, 1.0]).p_value is None
    for bad in (math.nan, math.inf, 1e300):
        with pytest.raises(ValueError, match="loss"):
            compare_means([bad, 1.0], [1.0, 2.0])


def test_seconds_and_steps_to_the_target_are_of_the_first_crossing(two_presets):
    found = compare("sotu:muon", "sotu:adamw")
    assert found.target == 1.55
    a, b = found.crossings
    assert (a.reached, a.runs, b.reached, b.runs) == (4, 4, 3, 3)
    assert found.ratios["steps_to_target"].ratio == pytest.approx(
        scipy.stats.gmean(a.steps) / scipy.stats.gmean(b.steps)
    )
    assert found.ratios["seconds_to_target"].ratio == pytest.approx(
        scipy.stats.gmean(a.seconds) / scipy.stats.gmean(b.seconds)
    )
    assert found.ratios["seconds"].ratio == pytest.approx(0.5, rel=0.01)
    assert a.steps == tuple(
        next(p.step for p in read_record(Path(run.file).resolve()).validation if p.val_loss <= 1.55)
        for run, _ in found.a.judged
    )


def test_a_target_that_some_runs_miss_is_told(two_presets):
    found = compare("sotu:muon", "sotu:adamw", target=1.43)
    assert (found.crossings[0].reached, found.crossings[1].reached) == (4, 1)
    assert any("B reached the target in 1 of 3 runs" in line for line in found.weaknesses)


def falling(path: str, final: float, slope: float, *, steps: int = 100, seconds: float = 0.1) -> str:
    """Write a log whose last readings lie on a line of `slope` nats a step."""
    losses = {step: final + slope * (steps - step) for step in range(0, steps + 1, 5)}
    Path(path).write_text(log_text(losses, steps=steps, seconds=seconds))
    return path


def test_the_exchange_is_the_difference_over_the_slope_of_a():
    a = falling("a.txt", 3.30, 0.001)
    b = falling("b.txt", 3.28, 0.002, seconds=0.2)
    found = compare(a, b).exchange
    assert found.slope == pytest.approx(-0.001, rel=1e-3)
    assert (found.from_step, found.to_step) == (90, 100)
    assert found.steps == pytest.approx(20, rel=1e-3)
    assert found.net_steps == pytest.approx(20, rel=1e-3)
    assert compare(b, a).exchange.steps == pytest.approx(-10, rel=1e-3)


def test_fewer_declared_steps_are_added_to_what_the_loss_is_worth():
    a = falling("a.txt", 3.30, 0.001)
    b = falling("b.txt", 3.28, 0.002, steps=80)
    found = compare(a, b)
    assert found.exchange.net_steps == pytest.approx(40, rel=1e-3)
    assert any("of different steps: 100 and 80" in line for line in found.weaknesses)
    assert compare(a, b, step=80).exchange.net_steps == pytest.approx((3.32 - 3.28) / 0.001, rel=1e-3)


def test_a_curve_that_does_not_fall_has_no_exchange():
    a = falling("a.txt", 3.30, -0.001)
    b = falling("b.txt", 3.28, 0.002)
    found = compare(a, b)
    assert found.exchange is None
    console = Console(file=io.StringIO(), width=200)
    print_comparison(found, console)
    assert "does not fall" in console.file.getvalue()


def test_what_differs_is_named_part_by_part():
    put_record(Path("records"), seed=0)
    other = {"version": "0.2.0", "commit": "b" * 40, "dirty": True, "patch": None}
    software = {"python": "3.12", "platform": "Linux", "torch": "2.10.0", "numpy": "2.1.0", "compiled": True}
    b = put_record(Path("records"), name="adamw", seed=5, code=other, software=software)
    found = compare("sotu:muon", str(b)).differs
    assert found["config"]["optim.matrix.name"] == ("muon", "adamw")
    assert found["code"]["commit"] == ("a" * 40, "b" * 40)
    assert found["software"]["torch"] == ("2.9.0", "2.10.0")
    assert "corpus" not in found
    assert "hardware" not in found
    assert "seed" not in found["config"]


def test_the_code_that_logs_embed_is_told_line_by_line():
    head, tail = "import sys\nlr = {}\nwd = 0.1\n", "=" * 100 + "\n"
    for name, lr in (("a", 0.02), ("b", 0.03)):
        Path(f"{name}.txt").write_text(
            head.format(lr) + tail + log_text({10: 3.3 + lr, 20: 3.2 + lr}, steps=20)
        )
    found = compare("a.txt", "b.txt")
    assert found.source_diff == ("-lr = 0.02", "+lr = 0.03")
    assert "source sha256" in found.differs["code"]


def test_other_data_is_refused_unless_forced(two_presets):
    other = {
        **plain_fields(read_record(next(Path("records/sotu").iterdir()).resolve()).corpus),
        "manifest_sha256": "d" * 64,
    }
    b = put_record(Path("other"), seed=0, corpus=other)
    with pytest.raises(UserError, match=r"different corpora.*--force"):
        compare("sotu:muon", str(b))
    forced = compare("sotu:muon", str(b), force=True)
    assert forced.differs["corpus"]["manifest_sha256"] == ("c" * 64, "d" * 64)
    c = put_record(Path("other"), seed=1, validation_tokens=7)
    with pytest.raises(UserError, match="different validation tokens"):
        compare("sotu:muon", str(c))


def test_several_groups_are_refused_with_their_names_unless_pooled(two_presets):
    with pytest.raises(UserError, match=r"2 groups.*adamw, n = 3.*muon, n = 4.*--pool"):
        compare("records/sotu", "sotu:muon")
    found = compare("records/sotu", "sotu:muon", pool=True)
    assert any("pooled over 2 values of preset" in line for line in found.weaknesses)
    assert any("4 runs on both sides" in line for line in found.weaknesses)


def test_seconds_of_different_machines_have_no_ratio_unless_forced(two_presets):
    hardware = {**vars(read_record(next(Path("records/sotu").iterdir()).resolve()).hardware), "n_threads": 1}
    b = put_record(Path("other"), seed=0, hardware=hardware)
    found = compare("sotu:muon", str(b))
    assert found.ratios["seconds"] is None
    assert found.ratios["seconds_to_target"] is None
    assert found.ratios["steps_to_target"] is not None
    assert any("different hardware" in line for line in found.weaknesses)
    assert compare("sotu:muon", str(b), force=True).ratios["seconds"] is not None


def test_a_run_a_record_and_a_log_can_be_compared_and_what_is_not_known_is_said(two_presets):
    record = next(Path("records/sotu").glob("*muon*"))
    run = put_run(Path("runs/a"), read_record(record.resolve()), named=None)
    assert compare(str(run), "sotu:adamw").difference.n_a == 1
    write_log(Path("a.txt"), 1.6)
    found = compare(str(record), "a.txt")
    assert any("do not say their corpus" in line for line in found.weaknesses)
    assert any("A has one run, so there is no interval" in line for line in found.weaknesses)


def test_a_side_without_a_whole_run_is_refused_with_the_reason():
    Path("cut.txt").write_text(log_text({10: 3.3}, steps=20))
    write_log(Path("a.txt"), 3.2)
    with pytest.raises(UserError, match=r"no run to compare.*step 10, before step 20"):
        compare("a.txt", "cut.txt")
    assert compare("a.txt", "cut.txt", step=10).difference.n_b == 1


def test_the_json_holds_all_of_it(nanorun, two_presets):
    code, out, _ = nanorun("compare", "sotu:muon", "sotu:adamw", "--json")
    assert code == 0
    document = json.loads(out)
    assert document["a"]["n"] == 4
    assert document["b"]["step"] == 1100
    assert document["a"]["to_target"]["reached"] == 4
    assert document["difference"]["p_value"] < 0.05
    assert document["differs"]["config"]["name"] == {"a": "muon", "b": "adamw"}
    assert "Welch" in document["test"]
    assert set(document["ratios"]) == {"steps_to_target", "seconds_to_target", "seconds"}


def test_the_command_tells_a_person_the_same(nanorun, two_presets):
    code, out, _ = nanorun("compare", "sotu:muon", "sotu:adamw")
    text = " ".join(out.split())
    assert code == 0
    for said in (
        "nats lower",
        "95 % interval",
        "Hedges' g",
        "step exchange",
        "times B's",
        "differs in config",
    ):
        assert said in text
    same = " ".join(nanorun("compare", "sotu:muon", "sotu:muon")[1].split())
    assert "4 runs on both sides" in same


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sotu:muon", "nowhere"], "no such file or folder"),
        (["sotu:muon", "sotu:soap"], "no record of 'soap'"),
        (["sotu:muon", "sotu:adamw", "--loss", "val_ema_loss"], "no run has it"),
        (["sotu:muon", "sotu:adamw", "--target", "inf"], "--target"),
        (["sotu:muon", "sotu:adamw", "--step", "7"], "no reading of val_loss at step 7"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence_and_exit_code_2(words, said, nanorun, two_presets):
    code, _, err = nanorun("compare", *words)
    assert code == 2
    assert said in err


def test_hostile_names_and_code_reach_no_terminal(nanorun):
    bad = "[red]\x1b[31m\u202e"
    tail = "=" * 100 + "\n"
    for name, lr in (("a", "1"), ("b", "2")):
        text = f"import sys\nlr = '{bad}{lr}'\n{tail}" + log_text(
            {10: 3.3 + int(lr), 20: 3.2 + int(lr)}, steps=20
        )
        Path(f"{bad}{name}.txt").write_text(text)
    code, out, _ = nanorun("compare", f"{bad}a.txt", f"{bad}b.txt")
    assert code == 0
    assert "[red]?[31m?" in out
    assert not [char for char in out if char != "\n" and not char.isprintable()]


READINGS = st.lists(
    st.tuples(st.integers(0, 30), st.floats(0, 1e4), st.floats(0, 1e7)), min_size=1, max_size=5
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(READINGS, READINGS, st.one_of(st.none(), st.floats(0.1, 1e4)))
def test_whatever_two_logs_say_the_comparison_is_a_document_or_a_sentence(a, b, target):
    for name, readings in (("a", a), ("b", b)):
        by_step = {step: (step, loss, seconds) for step, loss, seconds in readings}
        Path(f"{name}.txt").write_text(
            "".join(
                f"step:{step}/30 val_loss:{loss:.5f} train_time:{seconds:.3f}s step_avg:1.0ms\n"
                for step, loss, seconds in sorted(by_step.values())
            )
        )
    try:
        found = compare("a.txt", "b.txt", target=target)
    except UserError:
        return
    json.dumps(found.to_dict(), allow_nan=False)
    print_comparison(found, Console(file=io.StringIO()))


def test_another_driver_is_other_software_and_leaves_the_ratio_of_seconds():
    for name, driver in (("a", "535.129.03"), ("b", "570.195.03")):
        path = write_log(Path(f"{name}.txt"), 3.27)
        gpus = "".join(
            f"|   {n}  NVIDIA H100 80GB HBM3          On  | 00000000:19:00.0 Off |\n" for n in range(8)
        )
        header = f"| NVIDIA-SMI {driver}    Driver Version: {driver}   CUDA Version: 12.6 |\n{gpus}"
        path.write_text(header + path.read_text().replace("3.27000", f"3.27{ord(name)}"))
    found = compare("a.txt", "b.txt", target=3.28)
    assert found.differs == {"software": {"driver": ("535.129.03", "570.195.03")}}
    assert found.ratios["seconds_to_target"].ratio == 1
    assert not any("hardware" in line for line in found.weaknesses)


def test_hardware_that_no_log_says_is_taken_for_granted_aloud():
    write_log(Path("a.txt"), 3.27)
    write_log(Path("b.txt"), 3.26, seconds=0.2)
    found = compare("a.txt", "b.txt")
    assert found.ratios["seconds"].ratio == pytest.approx(0.5)
    assert any("do not say their hardware" in line for line in found.weaknesses)
    b = Path("b.txt")
    b.write_text("Running on device_name=NVIDIA A40 with world_size=2\n" + b.read_text())
    found = compare("a.txt", "b.txt")
    assert found.ratios["seconds"] is None
    assert any("not known to be the same" in line for line in found.weaknesses)
