"""The start's benchmark tells every figure, of runs that it stops after their first step."""

import json

import pytest
from scripts_loader import script


@pytest.mark.slow
def test_every_start_is_told_with_what_the_runs_clock_says_of_it(tmp_path, capsys):
    out = tmp_path / "out.json"
    with script("bench_start") as bench:
        bench.main(["--tracks", "shakespeare-sprint", "--repeats", "1", "--out", str(out)])
    told = capsys.readouterr().out
    found = json.loads(out.read_text())
    for parts in found["first_step"]["shakespeare-sprint"].values():
        assert 0 < parts["setup_seconds"] + parts["warm_up_seconds"] < parts["seconds"]
        assert f"first step after {parts['seconds']:.2f} s" in told
    assert set(found["imports"]) == set(bench.PACKAGES)
    assert "bench_start.py --tracks shakespeare-sprint" in found["command"]
