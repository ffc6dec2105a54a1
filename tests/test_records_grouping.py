from __future__ import annotations

import dataclasses

import pytest
from log_samples import CODE, a_log

from nanorun.records.grouping import group_logged_runs
from nanorun.records.importers import llmc, modded_nanogpt
from nanorun.records.logs import LoggedRun

H100 = "Running on device_name=NVIDIA H100 with world_size=8\n"


def a_run(last: float = 3.27, *, header: str = H100, code: str = CODE, seconds: float = 30.0) -> LoggedRun:
    text = a_log((10.8, 4.5, last), header=header, code=code, seconds=seconds)
    (run,) = modded_nanogpt.read(text.splitlines(keepends=True), "log.txt")
    return run


def test_runs_of_one_configuration_are_averaged():
    (group,) = group_logged_runs([a_run(3.27, seconds=30.0), a_run(3.29, seconds=32.0)])
    assert group.mean_loss == pytest.approx(3.28)
    assert group.std_loss == pytest.approx(0.02 / 2**0.5)
    assert group.seconds_mean == 31.0
    assert group.label == f"200 steps, 8 × NVIDIA H100, code {a_run().source_sha256[:8]}"


@pytest.mark.parametrize(
    "other",
    [
        a_run(header=H100.replace("=8", "=4")),
        a_run(header=H100.replace("H100", "H200")),
        a_run(header=""),
        a_run(code=CODE + "# changed\n"),
        dataclasses.replace(a_run(), total_steps=300),
    ],
)
def test_runs_that_differ_in_steps_hardware_or_code_are_never_averaged(other):
    assert len(group_logged_runs([a_run(), other])) == 2


def test_incomplete_runs_are_kept_and_left_out_of_means():
    short = dataclasses.replace(a_run(3.5), points=a_run(3.5).points[:-1])
    (group,) = group_logged_runs([a_run(3.27), short])
    assert (len(group.runs), group.left_out, group.mean_loss) == (2, 1, 3.27)
    (none,) = group_logged_runs([short])
    assert (none.mean_loss, none.std_loss, none.seconds_mean) == (None, None, None)


def test_seconds_that_some_runs_do_not_say_have_no_mean():
    quiet = dataclasses.replace(a_run(), points=tuple(p._replace(train_seconds=None) for p in a_run().points))
    assert group_logged_runs([a_run(), quiet])[0].seconds_mean is None


def test_what_a_log_does_not_say_is_said_to_be_unknown():
    (run,) = llmc.read(["s:0 tel:10.9\n", "s:250 tel:6.0\n"], "main.log")
    (shorter,) = llmc.read(["s:0 tel:10.9\n", "s:200 tel:6.5\n"], "main.log")
    first, _ = group_logged_runs([run, shorter])
    assert first.label == "250 (not declared) steps, hardware not said, code not in the log"


def test_an_implied_world_size_is_named_as_such():
    listed = a_run(header="GPU 0: NVIDIA L4 (UUID: GPU-1)\n")
    assert group_logged_runs([listed])[0].hardware == "1 × NVIDIA L4 (implied)"
