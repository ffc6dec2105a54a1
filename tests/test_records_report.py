"""The records table: what is averaged, what counts, what is claimed, and what hostile files cannot do."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from records_samples import A_MIX, TARGET, a_dict, a_record, on_a_mix
from rich.console import Console

from nanorun.config import RunConfig
from nanorun.errors import UserError
from nanorun.records import report
from nanorun.records.record import Record, Skipped, read_records
from nanorun.records.report import (
    LATER_KEYS,
    Row,
    Table,
    TrackView,
    build_table,
    clean,
    comparison_line,
    next_command,
    print_terminal,
    to_csv,
    to_dict,
    to_markdown,
)
from nanorun.records.significance import Rule
from nanorun.tables import merged

SOTU = TrackView("sotu", TARGET, "seconds", Rule("t", n=3, alpha=0.05))
GPU = {**a_dict()["hardware"], "device": "cuda", "device_name": "NVIDIA H100"}
ISSUE_KEYS = {
    *("rank", "name", "optimizer", "n", "seconds_mean", "seconds_std", "steps_mean", "tokens_mean"),
    *("loss_mean", "p_value", "counts", "hardware"),
}


def seeds(
    n: int = 3, *, first: int = 0, seconds: float = 31.0, final: float = 1.54, **changes: Any
) -> list[Record]:
    """`n` runs that differ a little, as seeds do."""
    return [
        a_record(seed=first + index, seconds=seconds + 0.4 * index, final=final + 0.001 * index, **changes)
        for index in range(n)
    ]


def by_name(table: Table) -> dict[str, Row]:
    return {row.name: row for row in table.rows}


def printed(table: Table, width: int = 80, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    print_terminal(table, Console(file=file, width=width, force_terminal=False, color_system=None))
    file.flush()
    return raw.getvalue().decode(encoding)


def test_a_row_holds_means_and_spreads_over_seeds():
    (row,) = build_table(SOTU, seeds()).rows
    assert (row.rank, row.name, row.counts, row.n, row.runs) == (1, "muon", True, 3, 3)
    assert row.seconds_mean == pytest.approx(31.4)
    assert row.seconds_std == pytest.approx(0.4)
    assert row.loss_mean == pytest.approx(1.541)
    assert row.loss_std == pytest.approx(0.001)
    assert (row.steps_mean, row.tokens_mean) == (1000, 4_096_000)
    assert (row.reached_n, row.reached_step_mean) == (3, 800)
    assert row.reached_seconds_mean == pytest.approx(31.4 * 0.8)
    assert row.distance is None
    t = (1.541 - TARGET) / (0.001 / math.sqrt(3))
    assert row.p_value == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)))


def test_rows_that_count_come_first_by_the_tracks_score():
    records = [
        *seeds(name="slow", seconds=60, steps=500),
        *seeds(name="fast", seconds=30, steps=2000),
        *seeds(2, name="few", seconds=1, final=1.4),
        *seeds(name="over", seconds=1, final=1.56),
    ]
    ranks = [(row.name, row.rank) for row in build_table(SOTU, records).rows]
    assert ranks == [("fast", 1), ("slow", 2), ("few", None), ("over", None)]
    in_steps = TrackView("sotu", TARGET, "steps", SOTU.rule)
    assert [row.name for row in build_table(in_steps, records).rows][:2] == ["slow", "fast"]
    in_tokens = TrackView("sotu", TARGET, "tokens", SOTU.rule)
    assert [row.name for row in build_table(in_tokens, records).rows][:2] == ["slow", "fast"]


def test_a_repeated_seed_counts_once_by_its_mean():
    records = [*seeds(2), a_record(seed=1, seconds=33.4, final=1.543, created="2026-11-25T00:00:00Z")]
    table = build_table(SOTU, records)
    (row,) = table.rows
    assert (row.n, row.seeds, row.runs, row.counts) == (2, 2, 3, False)
    assert row.seconds == pytest.approx((31.0, 32.4))
    assert row.loss_mean == pytest.approx((1.54 + 1.542) / 2)
    assert any("repeated seed counts once" in note for note in table.notes)


def test_copies_of_one_run_under_other_seeds_do_not_count():
    table = build_table(SOTU, [a_record(seed=seed, final_weights_sha256="f" * 64) for seed in range(3)])
    assert not table.rows[0].counts
    assert any("same weights" in note for note in table.notes)


@pytest.mark.parametrize(
    ("table_name", "key", "value"),
    [
        ("train", "micro_batch_rows", 8),
        ("train", "compile", "on"),
        ("log", "every_steps", 1),
        ("checkpoint", "keep", 9),
    ],
)
def test_settings_of_the_machine_do_not_split_a_row(table_name: str, key: str, value: object):
    config = a_dict()["config"]
    other = {**config, "seed": 7, table_name: {**config[table_name], key: value}}
    records = [*seeds(2), *seeds(1, first=2, final=1.545, config=other)]
    assert [row.n for row in build_table(SOTU, records).rows] == [3]


def test_runs_that_differ_in_their_config_are_rows_of_their_own():
    config = a_dict()["config"]
    config = {**config, "optim": {**config["optim"], "matrix": {"name": "muon", "lr": 0.03}}}
    table = build_table(SOTU, [*seeds(seconds=30), *seeds(seconds=40, config=config)])
    rows = by_name(table)
    assert list(rows) == ["muon", "muon (2)"]
    assert rows["muon"].differs == "optim.matrix.lr = 0.02"
    assert rows["muon (2)"].differs == "optim.matrix.lr = 0.03"
    assert "muon (2): optim.matrix.lr = 0.03" in table.notes


def test_a_preset_may_have_the_name_that_a_second_row_would_get():
    table = build_table(SOTU, [*seeds(), *seeds(steps=2000), *seeds(name="muon (2)")])
    assert len({row.name for row in table.rows}) == 3


def test_runs_on_different_hardware_are_never_averaged():
    table = build_table(SOTU, [*seeds(2), *seeds(2, first=2, seconds=3, hardware=GPU)])
    assert sorted((row.hardware, row.n) for row in table.rows) == [
        ("1 × NVIDIA H100", 2),
        ("Intel Xeon @ 2.80GHz, 2 of 2 cores", 2),
    ]
    assert [
        row.hardware for row in build_table(SOTU, [*seeds(), *seeds(hardware=GPU)], hardware="h100").rows
    ] == ["1 × NVIDIA H100"]
    assert any(
        "different hardware" in note for note in build_table(SOTU, [*seeds(), *seeds(hardware=GPU)]).notes
    )


@pytest.mark.parametrize(
    "changes", [{"validation_tokens": 100}, {"corpus": {**a_dict()["corpus"], "manifest_sha256": "d" * 64}}]
)
def test_losses_of_another_measurement_are_a_row_that_does_not_count(changes: dict[str, Any]):
    table = build_table(SOTU, [*seeds(4), *seeds(3, final=1.3, **changes)])
    assert [(row.n, row.counts) for row in table.rows] == [(4, True), (3, False)]
    assert "another corpus" in table.rows[1].why
    assert any("another corpus" in note for note in table.notes)


def test_a_run_made_for_another_target_is_judged_by_the_tracks():
    table = build_table(SOTU, [*seeds(), *seeds(final=1.58, target_val_loss=1.6)])
    other = by_name(table)["muon (2)"]
    assert not other.counts
    assert other.reached_n == 0
    assert other.distance == pytest.approx(0.03)
    assert any("made for the target 1.6" in note for note in table.notes)


def test_what_a_run_left_out_or_did_otherwise_is_noted_under_its_row():
    table = build_table(SOTU, seeds(skipped_steps=2, inexact="after step 3: hardware A then, B now"))
    assert "muon: 6 steps not finite, whose updates were left out" in table.notes
    assert any("3 runs taken up again elsewhere than begun, with other bits" in note for note in table.notes)
    assert not any("finite" in note or "bits" in note for note in build_table(SOTU, seeds()).notes)


def test_what_compiling_took_is_told_apart_from_the_seconds():
    clock = {**a_dict()["clock"], "compile_seconds": 23.4}
    compiled = {"software": {**a_dict()["software"], "compiled": True}, "clock": clock}
    table = build_table(SOTU, [*seeds(name="muon", **compiled), *seeds(name="adamw")])
    rows = by_name(table)
    assert (rows["muon"].compile_seconds_mean, rows["adamw"].compile_seconds_mean) == (
        pytest.approx(23.4),
        None,
    )
    assert rows["muon"].seconds_mean == clock["train_seconds"]
    told = [note for note in table.notes if "compil" in note]
    assert told == [
        "muon: compiled code; compiling and warming up took 23.4 s a run, which seconds leave out"
    ]


def test_runs_that_could_stop_at_the_target_show_their_crossing_and_nothing_else():
    table = build_table(SOTU, seeds(stop_at_target=True))
    (row,) = table.rows
    assert (row.n, row.seeds, row.counts, row.loss_mean, row.seconds_mean) == (0, 3, False, None, None)
    assert row.reached_n == 3
    assert any("could stop at the target" in note for note in table.notes)


def mixed(n: int = 3, first: int = 0, **of_the_mix: Any) -> list[Record]:
    return seeds(n, first=first, final=1.3, **on_a_mix(**of_the_mix))


def test_runs_on_a_mix_are_a_row_of_their_own_that_does_not_count_and_says_why():
    table = build_table(SOTU, [*seeds(), *mixed()])
    assert [(row.n, row.counts, row.rank) for row in table.rows] == [(3, True, 1), (3, False, None)]
    row = table.rows[1]
    assert row.loss_mean == pytest.approx(1.301)
    assert row.why == "trained on a mix of corpora (sotu 70 %, novels 30 %), and the track fixes its corpus"
    assert f"{row.name} does not count: {row.why}" in table.notes
    assert row.differs == f"data.mix = sotu:0.7 ({'c' * 16}), novels:0.3 ({'d' * 16})"
    assert table.rows[0].differs == "data.mix = {}"


def test_a_track_that_fixes_no_corpus_or_fixes_a_mix_counts_runs_on_a_mix():
    track = SimpleNamespace(
        name="sotu",
        target_val_loss=TARGET,
        scored_in="seconds",
        significance=SimpleNamespace(rule="t", n=3, alpha=0.05, margin=None, sigma=None),
    )
    for data, counts in (
        ({}, True),
        ({"tokenizer": "byte"}, True),
        ({"corpus": "sotu", "mix": {"sotu": 0.7, "novels": 0.3}}, True),
        ({"corpus": "sotu"}, False),
        ({"corpus": "sotu", "mix": {}}, False),
    ):
        track.fixed = {"data": data} if data else {}
        (row,) = build_table(TrackView.of(track), mixed()).rows
        assert row.counts is counts


def test_runs_on_one_mix_are_one_row_whatever_its_folders_are_called_and_on_another_are_not():
    other = [{**A_MIX[0], "share": 0.6}, {**A_MIX[1], "share": 0.4}]
    of_other_text = [A_MIX[0], {**A_MIX[1], "manifest_sha256": "e" * 64}]
    records = [
        *mixed(2),
        *mixed(1, first=2, mix=A_MIX[::-1], shares={"/data/novels": 3.0, "sotu": 7.0}),
        *mixed(1, mix=other),
        *mixed(1, mix=of_other_text),
        *seeds(1),
    ]
    assert sorted(row.n for row in build_table(SOTU, records).rows) == [1, 1, 1, 3]


def test_the_next_command_is_one_that_can_be_copied_whatever_a_preset_is_called():
    hostile = "a; rm -rf ~ \x1b[2J\n$(x)"
    line = next_command(build_table(SOTU, seeds()), [hostile, "muon"])
    assert line.isprintable()
    assert shlex.split(line)[4:7] == ["--optim", r"a; rm -rf ~ \x1b[2J\n$(x)", "--seeds"]


def test_the_next_command_asks_for_no_seed_of_a_row_that_cannot_count():
    assert next_command(build_table(SOTU, [*seeds(), *mixed(1)]), ["muon"]) == (
        "nanorun train --track sotu --optim muon --seeds 3 --set KEY=VALUE  # to beat it"
    )


def test_a_run_that_ended_early_is_named_and_not_averaged():
    early = a_record(seed=9, final=1.3, completed=False, declared_steps=1000, steps=999)
    table = build_table(SOTU, [*seeds(), early])
    (row,) = table.rows
    assert (row.n, row.seeds) == (3, 4)
    assert row.loss_mean == pytest.approx(1.541)
    assert any("before the declared last step" in note for note in table.notes)


def test_a_row_that_mixes_code_or_torch_says_so():
    other = {**a_dict()["software"], "torch": "2.10.0"}
    table = build_table(SOTU, [*seeds(2), *seeds(1, first=2, final=1.545, software=other)])
    assert "muon: averages runs of 2 versions of torch" in table.notes


def test_a_row_that_never_crossed_says_how_near_it_came():
    (row,) = build_table(SOTU, seeds(final=1.56)).rows
    assert row.distance == pytest.approx(0.01)
    assert "+0.0100" in printed(build_table(SOTU, seeds(final=1.56)))


def test_since_leaves_out_older_runs():
    table = build_table(SOTU, [*seeds(), *seeds(1, created="2026-12-02T00:00:00Z")], since="2026-12-01")
    assert (table.rows[0].n, table.filtered_out) == (1, 3)
    made = seeds(created="2026-11-24T12:30:00.5Z")
    for since, n in (("2026-11-24", 3), ("2026-11-24T12:30:00Z", 3), ("2026-11-24T12:31", 0)):
        assert sum(row.n for row in build_table(SOTU, made, since=since).rows) == n
    assert build_table(SOTU, made, since="2026-11-24T13:00:00+02:00").filtered_out == 0
    for wrong in ("yesterday", "2026-02-30", ""):
        with pytest.raises(UserError, match="wanted a day"):
            build_table(SOTU, [], since=wrong)


def test_other_tracks_are_passed_over():
    assert build_table(SOTU, seeds(track="shakespeare")).rows == ()


def test_the_comparison_says_by_how_much_and_how_sure():
    line = comparison_line(build_table(SOTU, [*seeds(name="adamw", seconds=58), *seeds(seconds=31)]))
    assert line is not None
    assert line.startswith(
        "muon reaches 1.55 in 31.4 s, adamw in 58.4 s: 1.86 times sooner (95 % interval 1.8"
    )
    assert "p < 0.0001, n = 3 and 3)" in line


def test_the_comparison_claims_no_difference_it_cannot_tell():
    noisy = [
        a_record(seed=seed, name="adamw", seconds=31 + 6 * seed, final=1.54 + seed / 1000)
        for seed in range(3)
    ]
    line = comparison_line(build_table(SOTU, [*noisy, *seeds(seconds=33)]))
    assert line is not None
    assert "no difference can be told" in line
    assert "sooner" not in line


def test_the_comparison_claims_no_sureness_of_single_runs():
    track = TrackView("sotu", TARGET, "seconds", Rule("margin", n=1, margin=0.001))
    line = comparison_line(build_table(track, [*seeds(1), *seeds(1, name="adamw", seconds=60)]))
    assert line is not None
    assert "too few runs to tell how sure" in line
    assert "interval" not in line


def test_the_comparison_claims_no_ratio_where_a_row_does_not_count():
    line = comparison_line(build_table(SOTU, [*seeds(), *seeds(2, name="adamw")]))
    assert line is not None
    assert "adamw does not count (2 seeds of the 3 that the rule asks for)" in line
    assert "times" not in line
    away = comparison_line(build_table(SOTU, [*seeds(), *seeds(name="adamw", final=1.56)]))
    assert away is not None
    assert "adamw came within 0.0100 of 1.55" in away


def test_the_comparison_never_crosses_machines():
    apart = comparison_line(build_table(SOTU, [*seeds(hardware=GPU, seconds=3), *seeds(name="adamw")]))
    assert apart is not None
    assert "different hardware" in apart
    assert "times" not in apart
    both = [*seeds(hardware=GPU, seconds=3), *seeds(name="adamw", seconds=62), *seeds(seconds=31)]
    together = comparison_line(build_table(SOTU, both))
    assert together is not None
    assert "muon (2) reaches 1.55 in 31.4 s, adamw in 62.4 s" in together
    assert together.endswith("on Intel Xeon @ 2.80GHz, 2 of 2 cores")


def test_the_comparison_of_a_track_in_steps_compares_steps():
    track = TrackView("sotu", TARGET, "steps", SOTU.rule)
    line = comparison_line(
        build_table(track, [*seeds(steps=1000), *seeds(name="adamw", steps=1500, hardware=GPU)])
    )
    assert line is not None
    assert "muon counts at 1.55 after 1,000 steps, adamw after 1,500: 1.50 times as many" in line


def test_one_preset_alone_is_compared_with_nothing():
    assert comparison_line(build_table(SOTU, [*seeds(), *seeds(steps=2000)])) is None
    assert comparison_line(build_table(SOTU, [])) is None


def test_the_json_has_the_promised_keys_and_null_for_no_number():
    table = build_table(SOTU, seeds(1), skipped=[Skipped(Path("records/sotu/x"), "name is missing")])
    content = json.loads(json.dumps(to_dict(table), allow_nan=False))
    assert content == json.loads(json.dumps(to_dict(table)))
    assert (content["track"], content["target_val_loss"]) == ("sotu", TARGET)
    assert set(content["rows"][0]) >= ISSUE_KEYS
    assert content["rows"][0]["seconds_std"] is None
    assert content["rows"][0]["rank"] is None
    assert content["comparison"] is None
    assert content["skipped"] == [{"path": "records/sotu/x", "why": "name is missing"}]
    assert to_dict(build_table(SOTU, []))["rows"] == []


def test_the_comparison_is_the_last_line_of_table_and_markdown():
    table = build_table(SOTU, [*seeds(), *seeds(name="adamw", seconds=58)], skipped=[Skipped(Path("x"), "y")])
    for shown in (printed(table, 300), to_markdown(table)):
        assert "times sooner" in shown.splitlines()[-1]


def test_the_next_command_adds_what_the_table_lacks():
    presets = ["adamw", "muon"]
    assert next_command(build_table(SOTU, seeds(1)), presets).startswith(
        "nanorun train --track sotu --optim muon --seed 1 --seeds 2  #"
    )
    stopped = seeds(1, stop_at_target=True)
    assert "--optim muon --seed 1 --seeds 3 " in next_command(build_table(SOTU, stopped), presets)
    assert next_command(build_table(SOTU, seeds()), presets) == (
        "nanorun train --track sotu --optim adamw --seeds 3"
    )
    both = build_table(SOTU, [*seeds(), *seeds(name="adamw", seconds=58)])
    assert "--optim muon --seeds 3 --set KEY=VALUE" in next_command(both, presets)


@pytest.mark.parametrize("width", [80, 120])
def test_every_line_of_the_terminal_table_fits(width: int):
    table = build_table(
        SOTU, [*seeds(), *seeds(name="adamw", seconds=1234), *seeds(2, name="adam", hardware=GPU)]
    )
    shown = printed(table, width)
    assert max(map(len, shown.splitlines())) <= width
    for text in (
        "muon",
        "adamw",
        "1.5410",
        "±0.0010",
        "step 800",
        "1,234",
        "2026-11-24",
        "NVIDIA H100",
        "n ≥ 3",
    ):
        assert text in shown


def test_hardware_that_all_rows_share_is_said_once():
    shown = printed(build_table(SOTU, [*seeds(), *seeds(name="adamw")]))
    assert shown.count("Intel Xeon") == 1


def test_skipped_records_are_named_under_the_table():
    skipped = [Skipped(Path(f"records/sotu/{index}"), "name is missing") for index in range(12)]
    for shown in (
        printed(build_table(SOTU, seeds(), skipped=skipped), 200),
        to_markdown(build_table(SOTU, [], skipped=skipped)),
    ):
        assert "skipped records/sotu/9: name is missing" in shown
        assert "skipped 2 more" in shown


def test_an_empty_table_says_the_next_command():
    for shown in (printed(build_table(SOTU, [])), to_markdown(build_table(SOTU, []))):
        assert "nanorun train" in shown.replace("\\", "")
    assert "None of the 3 records" in printed(build_table(SOTU, seeds(), hardware="tpu"))


HOSTILE = "[bold red]x[/] \x1b[2J\x1b]0;owned\x07 \u202egnp\n|<img src=x>|`*"


def hostile_table() -> Table:
    hardware = {**a_dict()["hardware"], "cpu_name": HOSTILE}
    records = seeds(name=HOSTILE, optimizer=HOSTILE, hardware=hardware)
    return build_table(SOTU, records, skipped=[Skipped(Path(f"records/{HOSTILE}"), HOSTILE)])


@pytest.mark.parametrize("width", [80, 300])
def test_markup_and_control_characters_reach_no_terminal(width: int):
    shown = printed(hostile_table(), width)
    assert all(char.isprintable() for char in shown.replace("\n", ""))
    assert "[bold" in shown
    assert "red]x[/]" in shown


def test_markdown_shows_hostile_text_as_text():
    lines = to_markdown(hostile_table()).splitlines()
    assert all(char.isprintable() for line in lines for char in line)
    (row,) = [line for line in lines if line.startswith("| 1 |")]
    assert row.replace("\\|", "").count("|") == 14
    assert "<img" not in row.replace("\\<", "")


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", " ="])
def test_csv_holds_no_formulas(start: str):
    text = to_csv(build_table(SOTU, seeds(name=f'{start}HYPERLINK("http://x")')))
    (row,) = csv.DictReader(io.StringIO(text))
    assert not row["name"].lstrip().startswith(("=", "+", "-", "@", "\t"))
    assert row["name"].endswith('HYPERLINK("http://x")')
    assert float(row["seconds_mean"]) == pytest.approx(31.4)
    below = csv.DictReader(io.StringIO(to_csv(build_table(SOTU, seeds(final=1.56)))))
    assert float(next(below)["margin"]) < 0


def test_a_terminal_that_knows_ascii_alone_gets_ascii():
    shown = printed(build_table(SOTU, seeds(name="müon", hardware=GPU)), 80, "ascii")
    assert "m?on" in shown
    assert "n >= 3" in shown
    assert "1 x NVIDIA H100" in shown


def test_long_texts_are_cut():
    assert len(clean("x" * 1000)) == 80
    assert max(map(len, printed(build_table(SOTU, seeds(name="x" * 5000)), 80).splitlines())) <= 80


def test_a_track_is_read_by_its_attributes():
    significance = SimpleNamespace(rule="margin", n=2, alpha=None, margin=0.004, sigma=None)
    track = SimpleNamespace(name="s", target_val_loss=3.28, scored_in="steps", significance=significance)
    assert TrackView.of(track) == TrackView("s", 3.28, "steps", Rule("margin", n=2, margin=0.004))


def test_a_thousand_records_make_one_table(tmp_path: Path):
    for index in range(1000):
        content = a_dict(
            name=f"preset{index % 20}", seed=index // 20, final=1.54 + index % 7 / 1000, points=101
        )
        place = tmp_path / "sotu" / content["id"]
        place.mkdir(parents=True)
        (place / "record.json").write_text(json.dumps(content), encoding="utf-8")
    records, skipped = read_records(tmp_path, "sotu")
    table = build_table(SOTU, records, skipped=skipped)
    assert (len(records), skipped) == (1000, [])
    assert [row.n for row in table.rows] == [50] * 20


def test_a_record_of_before_a_key_was_added_stands_in_one_row_with_todays():
    old, new = a_record(seed=0), a_record(seed=1)
    later = {"train": {"cycles": 1}, "average": {"kind": "none", "every_steps": 10}}
    today = dataclasses.replace(new, config=merged(new.config, later))
    other = dataclasses.replace(new, config=merged(new.config, later, {"average": {"kind": "ema"}}))
    assert [row.n for row in build_table(SOTU, [old, today]).rows] == [2]
    assert [row.n for row in build_table(SOTU, [old, other]).rows] == [1, 1]


def test_the_defaults_of_later_keys_are_the_configs_own():
    values = {"track": "t", "name": "n", "data": {"corpus": "sotu", "tokenizer": "byte"}, "optim": {}}
    # Unlike `flattened`, an identity holds a table that is empty.
    there = dict(report._flat(RunConfig.model_validate(values).model_dump()))
    assert {key: there[key] for key in LATER_KEYS} == LATER_KEYS
