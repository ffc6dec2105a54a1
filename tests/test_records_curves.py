"""Loss curves of a table's rows: what is averaged, what the band is, and where they are drawn."""

import xml.etree.ElementTree as ET

import pytest
from records_samples import a_dict, a_record
from rich.console import Console

from nanorun.records import curves
from nanorun.records.curves import row_series, terminal_lines, to_svg
from nanorun.records.record import Record, read_records, write_record
from nanorun.records.report import TrackView, build_table
from nanorun.records.significance import Rule

SVG = "{http://www.w3.org/2000/svg}"
SOTU = TrackView("sotu", 1.5, "seconds", Rule("t", n=3, alpha=0.05))


def a_run(losses, *, seed=0, seconds=10.0, **changes):
    """A run of 1000 steps with these losses at equal distances, the last at the last step."""
    steps = [1000 * (index + 1) // len(losses) for index in range(len(losses))]
    curve = [
        {"step": step, "tokens": step * 4096, "train_seconds": seconds * step / 1000, "val_loss": loss}
        for step, loss in zip(steps, losses)
    ]
    return Record.from_dict(
        {
            **a_dict(seed=seed, **changes),
            "validation": curve,
            "reached": next(
                ({"step": p["step"], "seconds": p["train_seconds"]} for p in curve if p["val_loss"] <= 1.55),
                None,
            ),
            "final_val_loss": losses[-1],
        }
    )


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Records of two presets, three seeds each, on the track sotu; the folder above is the working one."""
    monkeypatch.chdir(tmp_path)
    for name, seconds in (("muon", 20.0), ("adamw", 40.0)):
        for seed in range(3):
            record = a_record(
                name=name, seed=seed, seconds=seconds + seed, final=1.45 + seed / 500, target_val_loss=1.5
            )
            write_record(tmp_path / "records", record, config_toml="", source_patch=None)
    return tmp_path / "records"


def table_of(root, **filters):
    records, skipped = read_records(root, "sotu")
    return build_table(SOTU, records, skipped=skipped, **filters)


def test_the_line_is_the_mean_over_seeds_and_the_band_their_range():
    runs = [a_run([3.0, 2.0], seed=0, seconds=10), a_run([5.0, 2.5], seed=1, seconds=20)]
    found = row_series("muon", runs, "seconds")
    assert list(found.ys) == [4.0, 2.25]
    assert list(found.low) == [3.0, 2.0]
    assert list(found.high) == [5.0, 2.5]
    assert list(found.xs) == [7.5, 15.0]
    assert list(row_series("muon", runs, "steps").xs) == [500, 1000]
    assert list(row_series("muon", runs, "tokens").xs) == [500 * 4096, 1000 * 4096]


def test_a_seed_that_ran_twice_counts_once():
    runs = [a_run([3.0], seed=0), a_run([5.0], seed=0), a_run([1.0], seed=1)]
    found = row_series("muon", runs, "steps")
    assert (list(found.ys), list(found.low), list(found.high)) == ([2.5], [1.0], [4.0])


def test_only_steps_that_every_run_has_a_reading_at_are_drawn():
    runs = [a_run([4.0, 3.0, 2.0, 1.0], seed=0), a_run([4.0, 2.0], seed=1)]
    assert list(row_series("muon", runs, "steps").xs) == [500, 1000]


def test_interrupted_runs_are_drawn_only_where_there_is_no_other():
    cut = a_run([4.0, 3.9], seed=1).to_dict()
    cut = Record.from_dict({**cut, "completed": False, "steps": 999, "validation": cut["validation"][:1]})
    whole = a_run([4.0, 2.0], seed=0)
    assert list(row_series("muon", [whole, cut], "steps").xs) == [500, 1000]
    assert list(row_series("muon", [cut], "steps").xs) == [500]


def test_runs_without_a_common_point_or_any_have_no_curve():
    assert row_series("muon", [], "steps") is None
    empty = Record.from_dict({**a_dict(), "validation": [], "reached": None})
    assert row_series("muon", [empty], "steps") is None


def test_the_picture_has_a_line_for_each_row_and_one_for_the_target(root):
    drawn = ET.fromstring(to_svg(table_of(root), root, None))
    assert [one.text for one in drawn.iter(f"{SVG}text")][-3:] == ["muon", "adamw", "target 1.5"]
    described = drawn.find(f"{SVG}desc").text
    assert described.startswith("validation loss, nats a token against training seconds.")
    assert "muon: 5.5 at 0, 1.452 at 21." in described


def test_the_picture_is_the_same_through_the_index(root, monkeypatch, nanorun):
    from nanorun.records import index

    plain = nanorun("report", "--track", "sotu", "--format", "svg")
    monkeypatch.setattr(index, "LEAST_RECORDS", 1)
    monkeypatch.setattr(index, "SETTLED_NS", -(10**18))
    for _ in range(2):
        assert nanorun("report", "--track", "sotu", "--format", "svg") == plain
    assert plain[0] == 0


def test_rows_of_several_machines_are_named_with_their_machine(root):
    gpu = {**a_dict()["hardware"], "device": "cuda", "device_name": "NVIDIA H100"}
    write_record(root, a_record(hardware=gpu, target_val_loss=1.5), config_toml="", source_patch=None)
    assert "muon (2), 1 × NVIDIA H100" in to_svg(table_of(root), root, None)
    assert ", Intel" not in to_svg(table_of(root, hardware="H100"), root, None)


def test_a_record_that_is_gone_by_now_is_left_out(root):
    table = table_of(root)
    for path in sorted(root.glob("sotu/*adamw*/record.json")):
        path.unlink()
    drawn = ET.fromstring(to_svg(table, root, None))
    assert [one.text for one in drawn.iter(f"{SVG}text")][-2:] == ["muon", "target 1.5"]


def test_more_rows_than_a_picture_holds_are_said_to_be_left_out(root, monkeypatch):
    monkeypatch.setattr(curves, "MOST_IN_PICTURE", 1)
    assert "without the last 1 of 2 rows" in to_svg(table_of(root), root, None)


def test_a_terminal_gets_small_curves_unless_very_many_files_would_be_read(root, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    console = Console(width=80, force_terminal=True)
    monkeypatch.setattr(Console, "encoding", property(lambda self: "utf-8"))
    lines = terminal_lines(table_of(root), root, None, console, asked=False)
    assert "validation loss, nats a token (dotted: 1.5) against training seconds" in lines[0]
    assert lines[1].split() == ["muon", "adamw"]
    monkeypatch.setattr(curves, "MOST_READ_UNASKED", 5)
    assert terminal_lines(table_of(root), root, None, console, asked=False) == []
    assert terminal_lines(table_of(root), root, None, console, asked=True) == lines
    monkeypatch.setattr(Console, "encoding", property(lambda self: "ascii"))
    assert terminal_lines(table_of(root), root, None, console, asked=True) == []


def test_report_draws_curves_where_asked_and_never_into_a_pipe_unasked(root, nanorun):
    assert "against" not in nanorun("report", "--track", "sotu")[1]
    code, out, _ = nanorun("report", "--track", "sotu", "--curves", "--x", "tokens")
    assert code == 0
    assert "against training tokens" in out
    assert "next: nanorun train" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--track", "shakespeare"], "there is nothing to draw: No records of track shakespeare yet"),
        (["--track", "sotu", "--hardware", "TPU"], "None of the 6 records of track sotu fits"),
        (["--x", "minutes"], "'minutes'"),
    ],
)
def test_a_picture_of_nothing_is_refused(words, said, root, nanorun):
    code, out, err = nanorun("report", "--format", "svg", *words)
    assert (code, out) == (2, "")
    assert said in err


def test_one_picture_holds_one_track(root, nanorun):
    other = a_record(track="shakespeare")
    write_record(root, other, config_toml="", source_patch=None)
    code, _, err = nanorun("report", "--format", "svg")
    assert code == 2
    assert "one SVG holds one track, and shakespeare, sotu have records: add --track NAME" in err
