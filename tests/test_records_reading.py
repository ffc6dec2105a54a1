from __future__ import annotations

import os
import random
import time
import tracemalloc

import pytest
from log_samples import a_log, expected_rows, unpack_logs, val_line

from nanorun.errors import UserError
from nanorun.records import reading
from nanorun.records.importers import _runs
from nanorun.records.logs import LoggedPoint, LoggedRun
from nanorun.records.reading import read_logs


def whys(found) -> dict[str, str]:
    return {os.path.basename(one.file): one.why for one in found.skipped}


def names(found) -> list[str]:
    return [os.path.basename(run.file) for run in found.runs]


def test_a_folder_of_the_real_logs_gives_every_run_once_and_skips_none(tmp_path):
    found = read_logs([unpack_logs(tmp_path / "logs")])
    assert sorted((os.path.basename(run.file), run.run) for run in found.runs) == sorted(
        (row["file"], int(row["run"])) for row in expected_rows()
    )
    assert (found.skipped, found.n_files) == ((), 14)
    assert all(len(run.file_sha256) == 64 for run in found.runs)


def test_folders_are_walked_in_order_and_other_endings_are_named_last(tmp_path):
    for place, name in enumerate(
        ["b/deep/x.out", "a.txt", "b/c.log", "c", "z.stdout", ".git/d.txt", "b/e.py", "b/f.log.2"]
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(a_log(seconds=10 + place))
    found = read_logs([tmp_path])
    assert names(found) == ["a.txt", "c.log", "x.out", "f.log.2", "c", "z.stdout"]
    assert whys(found) == {"e.py": "its ending is not a log's; name the file itself to have it read"}


def test_a_named_file_is_tried_whatever_its_ending(tmp_path):
    (tmp_path / "log.py").write_text(a_log())
    (tmp_path / "notes.md").write_text("nothing\n")
    found = read_logs([tmp_path / "log.py", tmp_path / "notes.md"])
    assert names(found) == ["log.py"]
    assert whys(found) == {"notes.md": "holds no reading of a format we know"}


def test_a_path_that_is_not_there_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        read_logs([tmp_path / "absent"])


def test_what_is_no_log_is_named_with_why_and_never_waited_for(tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"step:1/1 \0\0\1")
    (tmp_path / "empty.log").write_bytes(b"")
    (tmp_path / "trained.out").write_text("step:1/3 train_time:1ms step_avg:nanms\n")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    assert whys(read_logs([tmp_path])) == {
        "binary.txt": "is no text",
        "dangling.txt": "cannot be read: No such file or directory",
        "empty.log": "is empty",
        "pipe": "is no regular file",
        "trained.out": "holds training steps and no validation that can be read",
    }


def test_a_folder_that_cannot_be_looked_into_hides_no_other(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "log.txt").write_text(a_log())
    listdir = os.listdir

    def refusing(path):
        if os.path.basename(path) == "closed":
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refusing)
    found = read_logs([tmp_path])
    assert names(found) == ["log.txt"]
    assert whys(found) == {"closed": "the folder cannot be read: Permission denied"}


def test_links_that_lead_out_of_a_folder_are_not_followed_unless_named(tmp_path):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (outside / "log.txt").write_text(a_log())
    (inside / "link.txt").symlink_to(outside / "log.txt")
    (inside / "folder").symlink_to(outside)
    (inside / "loop").symlink_to(inside)
    found = read_logs([inside])
    assert names(found) == []
    assert "leads out of the folder" in whys(found)["link.txt"]
    assert names(read_logs([inside / "link.txt"])) == ["link.txt"]
    assert names(read_logs([inside / "folder"])) == ["log.txt"]


def test_a_file_reached_by_two_paths_is_read_once_and_without_a_word(tmp_path):
    (tmp_path / "log.txt").write_text(a_log())
    found = read_logs([tmp_path / "log.txt", tmp_path, tmp_path / "." / "log.txt"])
    assert names(found) == ["log.txt"]
    assert found.skipped == ()


def test_the_same_run_under_two_names_counts_once_and_the_copy_is_named(tmp_path):
    (tmp_path / "a.txt").write_text(a_log())
    (tmp_path / "b.txt").write_text(a_log())
    (tmp_path / "c.txt").write_text(a_log(seconds=31.0))
    found = read_logs([tmp_path])
    assert names(found) == ["a.txt", "c.txt"]
    assert whys(found) == {"b.txt": f"holds a copy of {tmp_path / 'a.txt'}"}
    assert found.n_files == 3


def test_of_two_copies_the_one_that_says_more_is_kept(tmp_path):
    bare = a_log().split("=\n")[-1]
    (tmp_path / "a.txt").write_text(bare)
    (tmp_path / "b.txt").write_text(a_log())
    (tmp_path / "c.txt").write_text(bare.splitlines(keepends=True)[-1])
    found = read_logs([tmp_path])
    assert names(found) == ["b.txt"]
    assert whys(found) == {
        "a.txt": f"holds a copy of {tmp_path / 'b.txt'}",
        "c.txt": f"holds 1 of the validations of {tmp_path / 'b.txt'}",
    }


def test_copies_within_one_file_are_named_by_their_place(tmp_path):
    data = a_log().split("=\n")[-1]
    (tmp_path / "a.txt").write_text(data + data)
    found = read_logs([tmp_path])
    assert [(run.run, run.final_val_loss) for run in found.runs] == [(0, 3.27)]
    assert whys(found) == {"a.txt": f"run 1 holds a copy of {tmp_path / 'a.txt'}"}


def test_a_few_equal_losses_without_a_clock_are_no_proof_of_a_copy(tmp_path):
    (tmp_path / "a.log").write_text("s:0 tel:10.97\n")
    (tmp_path / "b.log").write_text("s:0 tel:10.97\ns:0 trl:10.9\n")
    (tmp_path / "c.log").write_text("s:0 tel:10.97\n")
    found = read_logs([tmp_path])
    assert names(found) == ["a.log", "b.log"]
    assert list(whys(found)) == ["c.log"]


def test_a_run_is_a_copy_where_a_kept_one_holds_all_of_it_and_nowhere_else():
    generator = random.Random(0)
    for _ in range(200):
        runs = []
        for place in range(12):
            points = [LoggedPoint(step, float(step), generator.choice([3.0, 4.0])) for step in range(3)]
            points = [point for point in points if generator.random() < 0.7]
            runs.append(_run(place, [*points, LoggedPoint(3, 3.0, 3.2)]))
        kept, skipped = reading._without_copies(runs)
        assert len(kept) + len(skipped) == len(runs)
        holding = [set(run.points) for run in kept]
        assert not any(
            one < other or (one == other and one is not other) for one in holding for other in holding
        )
        assert all(any(set(run.points) <= one for one in holding) for run in runs)


def test_thousands_of_runs_with_one_end_are_told_apart_without_a_wait():
    end = LoggedPoint(1, 1.0, 3.2)
    runs = [_run(place, [LoggedPoint(0, 0.0, 10 + place / 1e5), end]) for place in range(10_000)]
    start = time.process_time()
    kept, skipped = reading._without_copies(runs)
    assert time.process_time() - start < 5  # comparing each with each takes half a minute
    assert (len(kept), skipped) == (10_000, [])


def _run(place: int, points: list[LoggedPoint]) -> LoggedRun:
    return LoggedRun("a.txt", place, "modded_nanogpt", tuple(points), points[-1].step)


def test_logs_of_one_script_share_its_text(tmp_path):
    (tmp_path / "a.txt").write_text(a_log())
    (tmp_path / "b.txt").write_text(a_log(seconds=31.0))
    first, second = read_logs([tmp_path]).runs
    assert first.source is second.source


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_log_that_a_windows_shell_wrote_is_read(tmp_path, encoding):
    (tmp_path / "log.txt").write_bytes(a_log().replace("\n", "\r\n").encode(encoding))
    (run,) = read_logs([tmp_path]).runs
    assert (run.final_val_loss, run.complete) == (3.27, True)


def test_memory_stays_bounded_whatever_a_file_holds(tmp_path):
    path = tmp_path / "giant.txt"
    with open(path, "w") as file:
        file.write(val_line(0, 9.0) + "x" * 20_000_000 + "\n")
        file.write("noise of no meaning\n" * 150_000)
        file.write(val_line(300, 3.2))
    tracemalloc.start()
    (run,) = read_logs([path]).runs
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert run.final_val_loss == 3.2
    assert peak < 10_000_000


def test_a_line_longer_than_any_reading_is_passed_over_whole(tmp_path):
    path = tmp_path / "long.txt"
    long = "x" * (reading.LONGEST_LINE - 1)
    path.write_text(f"{val_line(0, 9.0)}{long}x{val_line(300, 1.5)}{val_line(300, 3.2)}")
    (run,) = read_logs([path]).runs
    assert [point.val_loss for point in run.points] == [9.0, 3.2]


def test_a_file_without_a_reading_for_too_long_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_PREAMBLE_CHARS", 1000)
    (tmp_path / "late.txt").write_text("noise\n" * 1000 + val_line(300, 3.2))
    assert "in its first 1,000 characters" in whys(read_logs([tmp_path]))["late.txt"]


def test_more_readings_than_any_log_has_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(_runs, "MAX_READINGS", 10)
    (tmp_path / "many.txt").write_text("".join(val_line(step, 3.2, f"{step}s") for step in range(11)))
    (tmp_path / "good.txt").write_text(a_log())
    found = read_logs([tmp_path])
    assert names(found) == ["good.txt"]
    assert "more than 10 validation readings" in whys(found)["many.txt"]


def test_a_file_of_another_format_than_its_first_line_is_read_as_what_it_holds(tmp_path):
    (tmp_path / "log.txt").write_text("iter 0: loss 4.2, time 22.1ms, mfu 1%\n" + a_log())
    (run,) = read_logs([tmp_path]).runs
    assert (run.format, run.final_val_loss) == ("modded_nanogpt", 3.27)
