"""The ranks' benchmark deals out the whole, and its figures fall with the ranks."""

import json
from pathlib import Path

import pytest
from scripts_loader import script

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(scope="module")
def bench():
    with script("bench_ranks") as module:
        tiny = {"arch": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "context_len": 8}
        module.SIZES["1M"] = (16, tiny)
        yield module


def test_state_and_arithmetic_of_all_ranks_are_those_of_one_and_the_largest_part_falls(
    bench, tmp_path, capsys
):
    out = tmp_path / "out.json"
    bench.main(["--size", "1M", "--ranks", "1", "2", "4", "--json", str(out)])
    printed = capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert {(row["name"], row["n_ranks"]) for row in rows} == {
        (n, r) for n in bench.SHARED for r in (1, 2, 4)
    }
    for name in bench.SHARED:
        assert name in printed
        alone, two, four = (row for row in rows if row["name"] == name)
        for key in ("state_bytes", "tensors"):
            assert sum(alone[key]) == sum(two[key]) == sum(four[key]) > 0
        for key in ("state_bytes", "flops_a_step", "cost_share"):
            assert max(alone[key]) > max(two[key]) > max(four[key]) > 0
        assert sum(four["cost_share"]) == pytest.approx(1.0)
