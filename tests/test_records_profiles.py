"""AlgoPerf's score: the published leaderboard, the rules one by one, and what bad files get."""

import csv
import io
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from records_samples import a_dict, a_record, on_a_mix

from nanorun.errors import UserError
from nanorun.records.profiles import TAUS, held_out_pairs, performance_profiles
from nanorun.records.record import Record, write_record
from nanorun.records.report import TrackView
from nanorun.records.show_score import scored_times, to_csv, to_dict, to_markdown, to_svg
from nanorun.records.significance import Rule
from nanorun.records.times import MAX_BYTES, Timing, medians, of_records, parse_timings, read_timings

FILES = Path(__file__).parent / "algoperf"
TIMES = FILES / "algoperf_v05_external_times.csv"
HELD_OUT = {
    "criteo1tb_embed_init": "criteo1tb",
    "fastmri_tanh": "fastmri",
    "imagenet_resnet_large_bn_init": "imagenet_resnet",
    "librispeech_conformer_layernorm": "librispeech_conformer",
    "ogbg_model_size": "ogbg",
    "wmt_glu_tanh": "wmt",
}
PAIRS = [f"{variant}={base}" for variant, base in HELD_OUT.items()]
HEADER = "submission,workload,seconds\n"
SOTU = TrackView("sotu", 1.55, "seconds", Rule("t", n=3, alpha=0.05))
SPRINT = TrackView("sprint", 1.55, "seconds", Rule("t", n=3, alpha=0.05))
MISS = math.inf


def parsed(text, where="times.csv"):
    return parse_timings(text.encode(), where)


def test_the_published_leaderboard_comes_out_to_four_decimals(nanorun):
    words = [word for pair in PAIRS for word in ("--held-out", pair)]
    code, out, _ = nanorun("score", TIMES, *words, "--json")
    with open(FILES / "algoperf_v05_external_expected.csv", encoding="utf-8") as file:
        published = {row["submission"]: row["score"] for row in csv.DictReader(file)}
    assert code == 0
    found = json.loads(out)
    assert {name: f"{score:.4f}" for name, score in found["scores"].items()} == published
    assert list(found["scores"]) == list(published)
    profile = found["profiles"]["shampoo_submission"]
    assert len(profile["tau"]) == len(profile["fraction"]) == 100
    assert (profile["tau"][0], profile["tau"][-1]) == (1, 4)
    assert found["scores_by_tau_max"]["shampoo_submission"][-1] == found["scores"]["shampoo_submission"]


def test_without_the_held_out_variants_the_scores_are_others():
    with_all = performance_profiles(medians(read_timings(TIMES), "external").times, {})
    assert len(with_all.workloads) == 14
    assert f"{with_all.scores['shampoo_submission']:.4f}" != "0.7784"


def plain_scores(times, held_out):
    """The rules once more, as arrays: submissions down, workloads across."""
    names = list(dict.fromkeys(workload for row in times.values() for workload in row))
    table = np.array([[row.get(name, np.inf) for name in names] for row in times.values()])
    table[table > 4 * table.min(axis=0)] = np.inf
    for variant, base in held_out.items():
        table[np.isinf(table[:, names.index(variant)]), names.index(base)] = np.inf
    table = table[:, [index for index, name in enumerate(names) if name not in held_out]]
    with np.errstate(invalid="ignore"):
        ratios = np.where(np.isinf(table), np.inf, table / table.min(axis=0))
    taus = np.linspace(1, 4, 100)
    fractions = (ratios[:, :, None] <= taus).mean(axis=1)
    return dict(zip(times, np.trapezoid(fractions, taus, axis=1) / 3))


@pytest.mark.parametrize("seed", range(30))
def test_scores_are_those_of_an_independent_reading_of_the_rules(seed):
    rng = random.Random(seed)
    workloads = ["a", "b", "c", "a_variant", "b_variant", "b_other"]
    times = {
        f"s{index}": {
            name: rng.choice([MISS, *(math.exp(rng.uniform(0, 2.2)) for _ in range(4))])
            for name in workloads
            if rng.random() < 0.9
        }
        for index in range(7)
    }
    times["all"] = dict.fromkeys(workloads, 5.0)
    held_out = {"a_variant": "a", "b_variant": "b", "b_other": "b"}
    found = performance_profiles(times, held_out).scores
    assert found == pytest.approx(plain_scores(times, held_out), abs=1e-12)


def test_a_time_of_exactly_four_times_the_best_is_no_miss():
    just = performance_profiles({"x": {"w": 10.0}, "y": {"w": 40.0}}, {})
    beyond = performance_profiles({"x": {"w": 10.0}, "y": {"w": math.nextafter(40.0, 50)}}, {})
    assert just.ratios["y"]["w"] == 4
    assert just.fractions["y"] == (0.0,) * 99 + (1.0,)
    assert beyond.ratios["y"]["w"] == MISS


def test_a_base_is_lost_when_its_variant_is_missed_absent_or_too_slow():
    times = {
        "missed": {"w": 1.0, "v": MISS},
        "absent": {"w": 1.0},
        "slow": {"w": 1.0, "v": 81.0},
        "good": {"w": 3.0, "v": 20.0},
    }
    found = performance_profiles(times, {"v": "w"})
    assert {one.submission for one in found.lost} == {"missed", "absent", "slow"}
    assert found.workloads == ("w",)
    assert found.scores == {"missed": 0, "absent": 0, "slow": 0, "good": pytest.approx(1)}


def test_ratios_are_to_the_best_that_survives():
    times = {"fast": {"w": 1.0}, "good": {"w": 2.0, "v": 1.0}, "late": {"w": 4.0, "v": 1.0}}
    assert performance_profiles(times, {"v": "w"}).ratios == {
        "fast": {"w": MISS},
        "good": {"w": 1.0},
        "late": {"w": 2.0},
    }


def test_a_workload_that_nobody_reaches_counts_among_the_workloads():
    found = performance_profiles({"x": {"w": 1.0, "hard": MISS}, "y": {"w": 1.0}}, {})
    assert found.scores == {"x": pytest.approx(0.5), "y": pytest.approx(0.5)}


def test_the_score_by_tau_max_is_the_mean_height_of_the_profile_so_far():
    found = performance_profiles({"x": {"a": 1.0, "b": 2.0}, "y": {"a": 2.0, "b": 1.0}}, {})
    curve = found.score_by_tau_max("x")
    assert curve[0] == 0.5
    assert curve[-1] == found.scores["x"]
    middle = TAUS.index(min(TAUS, key=lambda tau: abs(tau - 2.5)))
    assert curve[middle] == pytest.approx((0.5 * 1 + 0.5) / 1.5, abs=0.01)


def test_medians_over_studies_count_a_miss_as_infinite():
    rows = ["x,w,10", "x,w,30", "x,w,20", "y,w,5", "y,w,", "y,w,", "z,w,4", "z,w,8"]
    found = medians(parsed(HEADER + "\n".join(rows)), "external")
    assert found.times == {"x": {"w": 20.0}, "y": {"w": MISS}, "z": {"w": 6.0}}
    assert found.n_studies == {"x": {"w": 3}, "y": {"w": 3}, "z": {"w": 2}}


def test_the_fastest_trial_of_a_study_counts_and_self_tuning_has_one():
    text = "submission,workload,study,seconds\nx,w,1,30\nx,w,1,10\nx,w,1,\nx,w,2,20\n"
    assert medians(parsed(text), "external").times == {"x": {"w": 15.0}}
    with pytest.raises(UserError, match=r"line 3: a second trial of study 1 of 'x'.*one trial a study"):
        medians(parsed(text), "self")
    assert medians(parsed(HEADER + "x,w,10\nx,w,30\n"), "self").times == {"x": {"w": 20.0}}


def test_a_time_above_the_budget_is_a_miss_and_self_tuning_has_three_times_as_much():
    text = "submission,workload,seconds,budget\nx,w,100,100\ny,w,101,\nz,w,301,100\n"
    assert medians(parsed(text), "external").times == {
        "x": {"w": 100.0},
        "y": {"w": MISS},
        "z": {"w": MISS},
    }
    assert medians(parsed(text), "self").times == {"x": {"w": 100.0}, "y": {"w": 101.0}, "z": {"w": MISS}}
    with pytest.raises(UserError, match="line 3: the budget of 'w' is 9 seconds, and line 2 says 8"):
        medians(parsed("submission,workload,seconds,budget\nx,w,1,8\ny,w,1,9\n"), "external")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no times"),
        (b"\n \n", "holds no times"),
        (HEADER.encode(), "holds no times"),
        (b"submission,seconds\nx,1\n", "no column 'workload'; it has 'submission', 'seconds'"),
        (b"submission;workload;seconds\nx;w;1\n", "split by commas"),
        (b"submission,workload,seconds,seconds\nx,w,1,2\n", "two columns 'seconds'"),
        (HEADER.encode() + b"x,w\n", "line 2: has 2 cells"),
        (HEADER.encode() + b"x,w,1\n,w,1\n", "line 3: the submission is empty"),
        (HEADER.encode() + b"x,,1\n", "line 2: the workload is empty"),
        (HEADER.encode() + b"x,w,1\n\nx,w,-1\n", "line 4: seconds is '-1'; wanted a number above 0"),
        (HEADER.encode() + b"x,w,0\n", "line 2: seconds is '0'"),
        (HEADER.encode() + b"x,w,nan\n", "empty cell where the target was not reached"),
        (HEADER.encode() + b"x,w,inf\n", "seconds is 'inf'"),
        (HEADER.encode() + b"x,w,1_000\n", "seconds is '1_000'"),
        (HEADER.encode() + "x,w,١\n".encode(), "line 2: seconds is"),
        (HEADER.encode() + b"x,w," + b"9" * 1000 + b"\n", "seconds is '9999"),
        (HEADER.encode() + b"x,w,1e999\n", "seconds is '1e999'"),
        (HEADER.encode() + b"x,w,1e13\n", "up to 1e"),
        (b"submission,workload,seconds,budget\nx,w,1,-3\n", "line 2: budget is '-3'"),
        (HEADER.encode() + b"x,\xff,1\n", "line 2: is not UTF-8"),
        ("x".encode("utf-16"), "is not UTF-8"),
        (HEADER.encode() + b'x,"w,1\n', "is no CSV"),
        (HEADER.encode() + b"x," + b"w" * 200_000 + b",1\n", "line 2: is no CSV"),
        (b" " * (MAX_BYTES + 1), "more than 64,000,000 bytes"),
    ],
)
def test_a_bad_file_ends_in_one_sentence_with_the_line(content, said):
    with pytest.raises(UserError) as caught:
        medians(parse_timings(content, "times.csv"), "external")
    assert said in str(caught.value)
    assert str(caught.value).startswith("times.csv")
    assert len(str(caught.value)) < 500


def test_a_byte_order_mark_quotes_and_other_columns_are_read():
    text = '\ufeffsubmission , workload,note,seconds\r\n"x, the first",w,"a\nb",1.5e1\r\n'
    assert parsed(text) == [Timing(3, "x, the first", "w", 15.0)]


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (["fastmri_tanh"], "wanted VARIANT=BASE"),
        (["=fastmri"], "wanted VARIANT=BASE"),
        (["fastmri_than=fastmri"], "Did you mean 'fastmri_tanh'"),
        (["fastmri_tanh=fastmir"], "Did you mean 'fastmri'"),
        (["fastmri_tanh=fastmri", "fastmri_tanh=wmt"], "twice"),
        (["fastmri_tanh=fastmri", "fastmri=wmt"], "itself a held-out variant of 'wmt'"),
        (["wmt=wmt"], "itself a held-out variant"),
    ],
)
def test_a_held_out_pair_that_fits_nothing_is_refused(pairs, said):
    workloads = {timing.workload for timing in read_timings(TIMES)}
    with pytest.raises(UserError, match=said):
        held_out_pairs(pairs, workloads)


HOSTILE = "<script>&\x1b[31m|=1+1\u202e"


def test_hostile_names_are_harmless_in_every_form():
    rows = io.StringIO()
    csv.writer(rows).writerows([["submission", "workload", "seconds"], [HOSTILE, HOSTILE, 3], ["=x", "w", 2]])
    scored = scored_times(medians(parsed(rows.getvalue()), "external"), ruleset="external", held_out=[])
    for text in (to_csv(scored), to_markdown(scored), to_svg(scored, "profiles"), to_svg(scored, "tau-max")):
        assert "\x1b" not in text
        assert "\u202e" not in text
    assert "<script>" not in to_markdown(scored)
    assert "<script>" not in to_svg(scored, "profiles")
    assert "'=x" in to_csv(scored)
    assert HOSTILE in json.loads(json.dumps(to_dict(scored)))["scores"]


def test_the_table_names_the_method_the_studies_and_what_was_lost(nanorun, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = nanorun("score", TIMES, "--held-out", PAIRS[-2], "--held-out", PAIRS[-1])
    assert code == 0
    assert "1   shampoo_submission" in out
    assert (
        "AlgoPerf asks 5 studies of 5 trials, the fastest trial of each; these times have 1 a workload" in out
    )
    assert "area under the performance profile for tau from 1 to 4 (100 points, trapezoids) over 3" in out
    assert "cyclic_lr loses ogbg: it misses ogbg_model_size" in out
    assert "share of workloads against" not in out


def test_curves_and_pictures_come_when_asked(nanorun, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8")
    code, out, _ = nanorun("score", TIMES, "--curves")
    assert code == 0
    assert "share of workloads against" in out
    assert nanorun("score", TIMES, "--format", "svg", "--plot", "tau-max", "--out", "curves/a.svg")[0] == 0
    assert "Score against τ max" in (tmp_path / "curves" / "a.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "either a file of times or --track"),
        ([TIMES, "--track", "sotu"], "leave one out"),
        (["none.csv"], "none.csv: cannot be read (No such file or directory)"),
        (["."], "cannot be read (Is a directory)"),
        ([TIMES, "--hardware", "H100"], "it chooses among records"),
        (["--track", "sotu", "--track", "sotu"], "names a track twice"),
        (["--track", "sotu"], "no records of track 'sotu'; make one: nanorun train --track sotu"),
        (["--track", "nope"], "no track 'nope'"),
    ],
)
def test_what_cannot_be_scored_is_said_in_a_sentence(words, said, nanorun):
    code, out, err = nanorun("score", *words)
    assert (code, out) == (2, "")
    assert said in err


def test_our_own_records_are_scored_by_first_crossings():
    records = [
        *(a_record(name="muon", seed=seed, seconds=10 + seed) for seed in range(3)),
        *(a_record(name="adamw", seed=seed, seconds=20 + 2 * seed) for seed in range(3)),
        *(a_record(name="muon", seed=seed, seconds=8, track="sprint") for seed in range(3)),
        *(a_record(name="adamw", seed=0, seconds=8, final=1.6, track="sprint") for _ in range(1)),
    ]
    found = of_records([SOTU, SPRINT], records, hardware=None)
    muon = next(record for record in records if record.name == "muon" and record.seed == 1)
    assert muon.reached is not None
    assert found.times["muon"] == {"sotu": pytest.approx(muon.reached.seconds), "sprint": pytest.approx(6.4)}
    assert found.times["adamw"]["sotu"] == pytest.approx(2 * found.times["muon"]["sotu"])
    assert found.times["adamw"]["sprint"] == MISS
    assert found.n_studies["muon"] == {"sotu": 3, "sprint": 3}


def test_an_interrupted_run_is_no_miss_of_a_seed_that_ran_again():
    cut = {"completed": False, "steps": 500, "final_val_loss": 1.9, "validation": [], "reached": None}
    records = [a_record(seconds=10), Record.from_dict({**a_dict(seconds=10), **cut, "tokens": 1})]
    assert of_records([SOTU], records, hardware=None).times == {
        "muon": {"sotu": pytest.approx(records[0].reached.seconds)}
    }
    assert of_records([SOTU], records[1:], hardware=None).times == {"muon": {"sotu": MISS}}


def test_of_several_rows_of_a_preset_the_first_counts_and_a_note_says_so():
    records = [
        *(a_record(seed=seed, seconds=10, steps=500, final=1.53 + seed / 1000) for seed in range(3)),
        *(a_record(seed=seed, seconds=30, steps=1000, final=1.53 + seed / 999) for seed in range(3)),
    ]
    found = of_records([SOTU], records, hardware=None)
    assert found.times["muon"]["sotu"] == pytest.approx(records[0].reached.seconds)
    assert found.notes == ("muon on sotu: the first of 2 rows of its table",)


def test_runs_on_a_mix_score_nothing_on_a_track_that_fixes_its_corpus():
    alone = [a_record(seed=seed, seconds=10 + seed, final=1.54 + seed / 1000) for seed in range(3)]
    records = [*alone, *(a_record(seed=seed, seconds=1, final=1.3, **on_a_mix()) for seed in range(3))]
    found = of_records([SOTU], records, hardware=None)
    assert found.times == of_records([SOTU], alone, hardware=None).times
    assert found.n_studies == {"muon": {"sotu": 3}}
    assert found.notes == (
        "muon (2) on sotu is left out: trained on a mix of corpora (sotu 70 %, novels 30 %), and the track fixes its "
        "corpus",
    )


def test_records_of_two_machines_are_refused_until_one_is_chosen(tmp_path, nanorun):
    gpu = {**a_dict()["hardware"], "device": "cuda", "device_name": "NVIDIA H100"}
    for hardware, seconds in ((a_dict()["hardware"], 30), (gpu, 5)):
        record = a_record(hardware=hardware, seconds=seconds, final=1.4, target_val_loss=1.5)
        write_record(tmp_path / "records", record, config_toml="", source_patch=None)
    code, _, err = nanorun("score", "--track", "sotu")
    assert code == 2
    assert "2 machines, whose seconds don't compare" in err
    assert "1 × NVIDIA H100" in err
    code, out, _ = nanorun("score", "--track", "sotu", "--hardware", "h100", "--json")
    assert code == 0
    assert json.loads(out)["scores"] == {"muon": pytest.approx(1.0)}
    (tmp_path / "records/sotu/2026-01-01-broken-00000000").mkdir()
    _, out, _ = nanorun("score", "--track", "sotu", "--hardware", "h100", "--json")
    assert (
        "skipped records/sotu/2026-01-01-broken-00000000: record.json is missing" in json.loads(out)["notes"]
    )
    code, _, err = nanorun("score", "--track", "sotu", "--hardware", "TPU")
    assert (code, "no records of track 'sotu' on hardware with 'TPU'" in err) == (2, True)


REAL = TIMES.read_bytes()
CELLS = st.sampled_from(["", "1", "-1", "nan", "inf", "9" * 400, "1e400", "a", "b", '"', "\x00", "=1", "é"])
LINES = st.lists(st.lists(CELLS, max_size=5).map(",".join), max_size=8).map("\n".join)


@st.composite
def mutated(draw):
    """The real file with some bytes put over it, cut or doubled."""
    content = bytearray(REAL[: draw(st.integers(0, 1500))])
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(content)))
        content[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=6))
    return bytes(content)


ANYTHING = st.one_of(
    st.binary(max_size=200),
    LINES.map(lambda text: (HEADER + text).encode()),
    LINES.map(lambda text: ("submission,workload,study,seconds,budget\n" + text).encode()),
    mutated(),
)


def check_ends_well(content, ruleset):
    """Whatever the bytes: scores between 0 and 1 for whatever was read, or one sentence."""
    try:
        timings = parse_timings(content, "times.csv")
        scored = scored_times(medians(timings, ruleset), ruleset=ruleset, held_out=[])
    except UserError:
        return
    assert all(0 <= score <= 1 + 1e-12 for score in scored.profiles.scores.values())
    assert set(scored.profiles.scores) == {timing.submission for timing in timings}
    json.dumps(to_dict(scored), allow_nan=False)
    to_svg(scored, "profiles").encode()
    to_markdown(scored).encode()


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(ANYTHING, st.sampled_from(["external", "self"]))
def test_no_bytes_end_in_a_traceback(content, ruleset):
    check_ends_well(content, ruleset)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(ANYTHING, st.sampled_from(["external", "self"]))
def test_no_ten_thousand_byte_strings_end_in_a_traceback(content, ruleset):
    check_ends_well(content, ruleset)
