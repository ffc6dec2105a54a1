"""Verifying claims: verdicts against scipy's, groups kept apart, and every weakness named."""

from __future__ import annotations

import io
import json
import math
from decimal import Decimal
from pathlib import Path

import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from records_samples import a_record, on_a_mix
from rich.console import Console
from runs_samples import a_log, log_text, put_record, write_log

from nanorun.errors import UserError
from nanorun.records.logs import LoggedPoint, LoggedRun
from nanorun.records.runs import RunsRead, from_log, from_record, group_runs
from nanorun.records.significance import Rule
from nanorun.records.verify import (
    Claim,
    GroupVerdict,
    RuleOptions,
    Verification,
    judge_group,
    print_verification,
    resolve_rule,
    verify,
)

MARGIN = Rule("margin", n=1, margin=0.004)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def judged(
    runs, rule: Rule = MARGIN, *, target: float = 3.28, step=None, loss="val_loss", pool=True
) -> GroupVerdict:
    return judge_group(group_runs(runs, pool=pool)[0], Claim(target, rule, step, loss, None))


def some_logs(*finals: float, **changes):
    return [a_log(final, file=f"{index}.txt", **changes) for index, final in enumerate(finals)]


def records(*finals: float, **changes):
    return [
        from_record(
            a_record(final=final, seed=index, created=f"2026-11-24T12:{index:02d}:00Z", **changes),
            f"r{index}",
        )
        for index, final in enumerate(finals)
    ]


def test_the_t_rule_gives_scipys_p_value_and_the_sample_mean_and_spread():
    finals = [3.2781, 3.2795, 3.2774, 3.2790, 3.2769]
    found = judged(some_logs(*finals), Rule("t", n=1, alpha=0.01))
    expected = scipy.stats.ttest_1samp(finals, 3.28, alternative="less").pvalue
    assert found.p_value == pytest.approx(expected, rel=1e-9)
    assert found.mean_loss == pytest.approx(sum(finals) / 5)
    assert found.std_loss == pytest.approx(scipy.stats.tstd(finals))
    assert found.margin == pytest.approx((3.28 - sum(finals) / 5) * math.sqrt(5))
    assert found.passes == (expected < 0.01)
    assert found.files == ("0.txt", "1.txt", "2.txt", "3.txt", "4.txt")
    assert found.seconds_mean == pytest.approx(10.0)


def test_the_z_rule_gives_the_normal_p_value():
    found = judged(some_logs(3.277, 3.279), Rule("z", n=1, alpha=0.001, sigma=0.0013))
    assert found.p_value == pytest.approx(scipy.stats.norm.cdf((3.278 - 3.28) * math.sqrt(2) / 0.0013))
    assert not found.passes


@pytest.mark.parametrize("n", [1, 4, 9, 16, 25])
def test_a_margin_that_is_met_exactly_passes_and_one_printed_digit_less_does_not(n: int):
    # The highest loss of five decimals that meets the rule, worked out without rounding.
    final = next(
        loss
        for loss in (Decimal(k) / 100_000 for k in range(328_000, 327_000, -1))
        if (Decimal("3.28") - loss) ** 2 * n >= Decimal("0.004") ** 2
    )
    assert judged(some_logs(*[float(final)] * n)).passes
    assert not judged(some_logs(*[float(final) + 1e-5] * n)).passes


def test_one_run_can_pass_the_margin_and_never_a_t_test():
    assert judged(some_logs(3.2752)).passes
    found = judged(some_logs(3.2752), Rule("t", n=1, alpha=0.01))
    assert (found.passes, found.p_value, found.std_loss) == (False, None, None)


def test_a_claimed_step_is_read_where_the_log_goes_on_and_runs_without_it_are_named():
    runs = some_logs(3.27, 3.271)
    runs.append(a_log(3.0, file="short.txt", steps=50))
    found = judged(runs, step=90)
    assert (found.step, found.n) == (90, 2)
    assert found.mean_loss == pytest.approx(3.2805)
    assert [one.file for one in found.left_out] == ["short.txt"]
    assert "no reading of val_loss at step 90" in found.left_out[0].why
    assert "step 50" in found.left_out[0].why


def test_an_incomplete_run_is_named_and_left_out_of_the_mean():
    runs = [*some_logs(3.27, 3.272), a_log(2.0, file="cut.txt", total_steps=200)]
    found = judged(runs)
    assert found.mean_loss == pytest.approx(3.271)
    assert [one.file for one in found.left_out] == ["cut.txt"]
    assert "before step 200" in found.left_out[0].why


def test_without_a_whole_run_nothing_passes():
    found = judged([a_log(2.0, total_steps=200)])
    assert (found.n, found.passes, found.mean_loss, found.earliest_passing_step) == (0, False, None, None)


def test_the_earliest_step_is_the_first_at_which_the_rule_passes():
    found = judged(some_logs(3.26, 3.262, falls=0.01))
    assert (found.earliest_passing_step, found.holds_on) == (90, True)
    waving = [a_log(3.26, file=f"{k}.txt", falls=0.0) for k in range(2)]
    assert judged(waving).earliest_passing_step == 0


def test_a_pass_that_does_not_hold_on_is_told():
    runs = []
    for index in range(2):
        Path(f"{index}.txt").write_text(
            log_text({10: 3.27 + index / 1e3, 20: 3.30, 30: 3.27}, steps=30, seconds=index + 1)
        )
        runs.append(f"{index}.txt")
    group = verify(runs, RuleOptions(margin=0.004), target=3.28).groups[0]
    assert (group.earliest_passing_step, group.holds_on) == (10, False)


def test_another_loss_is_judged_where_it_is_asked_for():
    emas = ((90, 3.27), (100, 3.25))
    runs = [a_log(3.30, file=f"{k}.txt", other_losses={"val_ema_loss": emas}) for k in range(2)]
    assert judged(runs, loss="val_ema_loss").mean_loss == pytest.approx(3.25)
    assert not judged(runs).passes


def test_groups_are_never_averaged_in_silence():
    for index in range(2):
        write_log(Path(f"logs/a{index}.txt"), 3.20 + index / 100, steps=100)
        write_log(Path(f"logs/b{index}.txt"), 3.40 + index / 100, steps=200)
    result = verify(["logs"], RuleOptions(margin=0.004), target=3.28)
    assert [(group.n, group.passes) for group in result.groups] == [(2, True), (2, False)]
    assert [group.apart for group in result.groups] == ["total steps = 100", "total steps = 200"]
    pooled = verify(["logs"], RuleOptions(margin=0.004), target=3.28, pool=True).groups
    assert [group.n for group in pooled] == [4]
    assert pooled[0].step is None
    assert any("pooled over 2 values of total steps" in line for line in pooled[0].weaknesses)
    assert any("end at different steps" in line for line in pooled[0].weaknesses)


def test_a_repeated_seed_is_named_and_of_ours_counts_once():
    runs = records(1.40, 1.42, 1.44)
    again = from_record(a_record(final=1.50, seed=0, created="2026-11-24T13:00:00Z"), "again")
    found = judged([*runs, again], Rule("t", n=3, alpha=0.05), target=1.55)
    assert found.n == 3
    assert found.losses == pytest.approx((1.45, 1.42, 1.44))
    assert any("1 of 4 runs repeats a seed" in line and "counts once" in line for line in found.weaknesses)
    logs = judged(some_logs(3.27, 3.271, seed=0))
    assert logs.n == 2
    assert any("repeats a seed" in line and "run of its own" in line for line in logs.weaknesses)


def test_seeds_added_after_a_failed_test_are_named():
    rule = Rule("t", n=3, alpha=0.05)
    failing_first = [1.545, 1.56, 1.50]
    late = [1.50, 1.49, 1.495, 1.505]
    found = judged(records(*failing_first, *late), rule, target=1.55)
    assert found.passes
    assert any("the first 3 seeds made did not pass" in line for line in found.weaknesses)
    other_order = judged(records(*late, *failing_first), rule, target=1.55)
    assert other_order.passes
    assert not any("seeds made" in line for line in other_order.weaknesses)


def test_runs_that_could_stop_on_their_own_loss_are_named_and_left_out():
    runs = [*records(1.40, 1.41), from_record(a_record(final=1.0, seed=7, stop_at_target=True), "early")]
    found = judged(runs, Rule("t", n=2, alpha=0.05), target=1.55)
    assert found.n == 2
    assert found.left_out[0].file == "early"
    assert any("1 of 3 runs could stop on their own validation loss" in line for line in found.weaknesses)


def test_runs_on_a_mix_are_named():
    runs = [
        from_record(a_record(seed=seed, final=1.4 + seed / 100, **on_a_mix()), str(seed)) for seed in (1, 2)
    ]
    found = judged(runs, Rule("t", n=2, alpha=0.05), target=1.55)
    assert "2 of 2 runs trained on a mix of corpora, which a track that fixes its corpus does not count" in (
        found.weaknesses
    )


def test_logs_that_end_at_their_first_good_loss_at_different_steps_are_suspected():
    for index, last in enumerate((20, 30, 40)):
        losses = {
            step: 3.4 - 0.1 * (step == last) - 0.03 * (step == last) for step in range(10, last + 10, 10)
        }
        Path(f"{index}.txt").write_text(log_text(losses, steps=100, seconds=index + 1))
    found = verify(["0.txt", "1.txt", "2.txt"], RuleOptions(margin=0.004), target=3.28).groups[0]
    assert found.n == 0
    assert any("may have been stopped on their own loss" in line for line in found.weaknesses)


def test_different_validation_tokens_are_named():
    put_record(Path("records"), seed=1)
    put_record(Path("records"), seed=2, validation_tokens=1234)
    result = verify(["records"], RuleOptions(), target=1.6)
    assert len(result.groups) == 2
    assert any(
        "different validation tokens (1,234, 499,999)" in line for line in result.to_dict()["weaknesses"]
    )
    pooled = verify(["records"], RuleOptions(), target=1.6, pool=True).groups[0]
    assert any("numbers of validation tokens" in line for line in pooled.weaknesses)


def test_seeds_that_ended_with_the_same_weights_are_named():
    runs = records(1.40, 1.41, final_weights_sha256="d" * 64)
    assert any("same weights" in line for line in judged(runs, target=1.55).weaknesses)


def test_fewer_seeds_than_asked_do_not_pass():
    found = judged(some_logs(3.20, 3.21), Rule("margin", n=3, margin=0.004))
    assert not found.passes
    assert "2 seeds of the 3 asked for" in found.weaknesses


def test_target_and_rule_come_from_the_track_of_the_records():
    for seed in range(3):
        put_record(Path("records"), seed=seed, final=1.40 + seed / 1000, target_val_loss=1.5)
    result = verify(["records"], RuleOptions())
    assert (result.claim.target, result.claim.rule) == (1.5, Rule("t", n=3, alpha=0.05))
    assert result.groups[0].passes
    stricter = verify(["records"], RuleOptions(alpha=1e-9), target=1.45).claim
    assert (stricter.target, stricter.rule) == (1.45, Rule("t", n=1, alpha=1e-9))


@pytest.mark.parametrize(
    ("options", "track", "rule"),
    [
        (RuleOptions(), None, Rule("t", 1, alpha=0.01)),
        (RuleOptions(margin=0.004), None, MARGIN),
        (RuleOptions(sigma=0.0013, alpha=0.001), None, Rule("z", 1, alpha=0.001, sigma=0.0013)),
        (RuleOptions(n=5), Rule("margin", 2, margin=0.1), Rule("margin", 5, margin=0.1)),
        (RuleOptions(margin=0.2), Rule("t", 4, alpha=0.05), Rule("margin", 1, margin=0.2)),
        (RuleOptions(rule="t"), Rule("z", 4, alpha=0.05, sigma=1.0), Rule("t", 1, alpha=0.01)),
        (RuleOptions(alpha=0.02), Rule("z", 4, alpha=0.05, sigma=1.0), Rule("z", 1, alpha=0.02, sigma=1.0)),
    ],
)
def test_the_rule_is_what_was_asked_and_else_the_tracks(options: RuleOptions, track: Rule | None, rule: Rule):
    assert resolve_rule(options, track) == rule


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (RuleOptions(margin=0.004, sigma=0.0013), "--margin and --sigma"),
        (RuleOptions(margin=0.004, alpha=0.01), "--alpha has no place"),
        (RuleOptions(rule="t", margin=0.004), "--margin has no place"),
        (RuleOptions(rule="t", sigma=0.0013), "--sigma has no place"),
        (RuleOptions(rule="z"), "needs --sigma"),
        (RuleOptions(rule="margin"), "needs --margin"),
        (RuleOptions(rule="u"), "wanted t, z or margin"),
        (RuleOptions(alpha=1.5), "--alpha"),
        (RuleOptions(margin=math.nan), "--margin"),
        (RuleOptions(sigma=-1.0), "--sigma"),
        (RuleOptions(n=0), "--n"),
    ],
)
def test_options_that_contradict_or_lack_something_are_refused(options: RuleOptions, said: str):
    with pytest.raises(UserError, match=said):
        resolve_rule(options, None)


def test_the_json_has_the_keys_that_other_programs_read(nanorun):
    for index in range(3):
        write_log(Path(f"logs/{index}.txt"), 3.275 + index / 1000)
    Path("logs/none.txt").write_text("nothing of a log\n")
    code, out, _ = nanorun("verify", "logs", "--target", 3.28, "--rule", "t", "--alpha", 0.01, "--json")
    assert code == 0
    document = json.loads(out)
    keys = "n step mean_loss std_loss p_value margin passes earliest_passing_step seconds_mean files"
    assert set(keys.split()) <= set(document["groups"][0])
    assert document["groups"][0]["n"] == 3
    assert document["groups"][0]["step"] == 100
    assert document["groups"][0]["files"] == ["logs/0.txt", "logs/1.txt", "logs/2.txt"]
    assert [one["file"] for one in document["skipped"]] == ["logs/none.txt"]
    assert "t-test" in document["test"]


def test_every_form_of_the_rule_is_taken_by_the_command(nanorun):
    for index in range(4):
        write_log(Path(f"logs/{index}.txt"), 3.277 + index / 1000)
    for words, passes in (
        (["--margin", 0.004], False),
        (["--margin", 0.002], True),
        (["--rule", "z", "--sigma", 0.0013, "--alpha", 0.05], True),
        (["--rule", "t", "--alpha", 0.01], False),
        (["--margin", 0.002, "--n", 5], False),
        (["--margin", 0.002, "--step", 90], False),
    ):
        document = json.loads(nanorun("verify", "logs", "--target", 3.28, *words, "--json")[1])
        assert document["groups"][0]["passes"] is passes, words


def test_require_ends_with_1_where_a_group_fails(nanorun):
    write_log(Path("good.txt"), 3.27)
    write_log(Path("bad.txt"), 3.29, steps=200)
    asked = ["--target", 3.28, "--margin", 0.004]
    assert nanorun("verify", "good.txt", *asked, "--require")[0] == 0
    assert nanorun("verify", "good.txt", "bad.txt", *asked)[0] == 0
    code, out, err = nanorun("verify", "good.txt", "bad.txt", *asked, "--require", "--json")
    assert code == 1
    assert len(json.loads(out)["groups"]) == 2
    assert "1 of 2 groups" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere", "--target", "3.28"], "no such file or folder"),
        (["a.txt"], "add --target"),
        (["a.txt", "--target", "nan"], "--target"),
        (["a.txt", "--track", "sotoo"], "no track 'sotoo'"),
        (["a.txt", "--target", "3.28", "--loss", "val_los"], "Did you mean 'val_loss'"),
        (["empty.txt", "--target", "3.28"], "no run that can be read"),
        (["a.txt", "--target", "3.28", "--margin", "0.1", "--rule", "t"], "--margin has no place"),
    ],
)
def test_what_cannot_be_verified_is_one_sentence_and_exit_code_2(words, said, nanorun):
    write_log(Path("a.txt"), 3.27)
    Path("empty.txt").write_text("")
    code, _, err = nanorun("verify", *words)
    assert code == 2
    assert said in err


def test_hostile_names_reach_no_terminal(nanorun):
    name = "[red]\x1b[31m\u202e<b>.txt"
    write_log(Path("logs") / name, 3.27)
    write_log(Path("logs/b.txt"), 3.27, steps=200)
    (Path("logs") / "[bold]\x1b]0;x\x07none.txt").write_text("nothing\n")
    code, out, _ = nanorun("verify", "logs", "--target", 3.28, "--margin", 0.004)
    assert code == 0
    assert "[red]?[31m?<b>" in out.replace("\n", "")
    assert not [char for char in out if char != "\n" and not char.isprintable()]
    assert json.loads(nanorun("verify", "logs", "--target", 3.28, "--margin", 0.004, "--json")[1])


def test_the_table_says_what_was_tested_and_what_it_takes_for_granted():
    write_log(Path("a.txt"), 3.27)
    console = Console(file=io.StringIO(), width=200)
    print_verification(verify(["a.txt"], RuleOptions(margin=0.004), target=3.28), console)
    out = " ".join(console.file.getvalue().split())
    assert "3.270000" in out
    assert "margin rule: (3.28 - mean)·√n ≥ 0.004" in out
    assert "assumes independent runs" in out


def test_what_many_runs_have_to_be_said_of_them_is_said_once():
    runs = [a_log(3.27, file=f"{k}.txt", notes=(f"the clock counts {k} s too much",)) for k in range(9)]
    console = Console(file=io.StringIO(), width=200)
    group = judged(runs)
    print_verification(
        Verification(Claim(3.28, MARGIN, None, "val_loss", None), (group,), RunsRead(runs)), console
    )
    out = console.file.getvalue()
    assert out.count("the clock counts") == 1
    assert "and 8 more runs alike" in out
    assert len(group.notes) == 9


READINGS = st.lists(
    st.tuples(
        st.integers(0, 30), st.floats(-1e6, 1e6), st.one_of(st.none(), st.floats(0, 1e10), st.just(5e-324))
    ),
    min_size=1,
    max_size=5,
)
RULES = st.sampled_from([MARGIN, Rule("t", n=2, alpha=0.01), Rule("z", n=1, alpha=0.01, sigma=1e-300)])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(READINGS, min_size=1, max_size=4), RULES, st.one_of(st.none(), st.integers(0, 30)), st.booleans()
)
def test_whatever_logs_say_the_verdict_is_a_document_and_the_mean_is_theirs(logs, rule, step, pool):
    runs = []
    for index, readings in enumerate(logs):
        points = [
            LoggedPoint(at, seconds, loss)
            for at, loss, seconds in sorted({r[0]: r for r in readings}.values())
        ]
        runs.append(from_log(LoggedRun(f"{index}", 0, "llmc", tuple(points), points[-1].step)))
    claim = Claim(3.28, rule, step, "val_loss", None)
    verdicts = tuple(judge_group(group, claim) for group in group_runs(runs, pool=pool))
    result = Verification(claim, verdicts, RunsRead(runs))
    json.dumps(result.to_dict(), allow_nan=False)
    print_verification(result, Console(file=io.StringIO()))
    assert sum(len(one.files) + len(one.left_out) for one in verdicts) == len(runs)
    for one in verdicts:
        if one.n:
            assert min(one.losses) - 1e-6 <= one.mean_loss <= max(one.losses) + 1e-6
        else:
            assert not one.passes
