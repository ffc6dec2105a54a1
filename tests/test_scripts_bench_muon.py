"""The optimizer's share of a training step, as the script measures it."""

import math

import pytest
from scripts_loader import script


def test_a_share_is_the_optimizers_part_of_passes_and_update():
    with script("bench_muon") as bench:
        found = bench.share(32, 1, 256, seconds=0.0)
        names = list(bench.VARIANTS)
    assert found["rounds"] == bench.LEAST_ROUNDS
    for name in names:
        ms = found["ms"][name]
        assert math.isclose(found["share"][name], ms / (ms + found["ms"]["passes"]))


def test_a_shape_that_cannot_be_cut_into_rows_is_refused_by_name(monkeypatch, capsys):
    with script("bench_muon") as bench:
        for shape in ("192x3", "192x3x4000"):
            monkeypatch.setattr("sys.argv", ["bench_muon.py", "--share", "--shapes", shape])
            with pytest.raises(SystemExit, match="2"):
                bench.main()
            assert f"--shapes: '{shape}': wanted" in capsys.readouterr().err


def test_a_width_has_at_least_25_tokens_for_each_unit_in_whole_rows(monkeypatch):
    asked = []
    with script("bench_muon") as bench:
        monkeypatch.setattr(bench, "print_shares", asked.append)
        monkeypatch.setattr("sys.argv", ["bench_muon.py", "--share"])
        bench.main()
        (arguments,) = asked
        tokens = [bench.tokens_for(width) for width in arguments.widths]
    assert arguments.widths == [128, 192, 384, 768]
    assert all(
        25 * width <= n < 25 * width + 128 and n % 128 == 0 for width, n in zip(arguments.widths, tokens)
    )
