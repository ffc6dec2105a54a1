"""The optimizers' benchmark runs for every name, and its figures are what their titles say."""

import json
from pathlib import Path

import pytest
import torch
from scripts_loader import script

from nanorun.optim.build import optimizer_names

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(scope="module")
def bench():
    with script("bench_optim") as module:
        # As small as a model can be, so that the test takes a second and not a minute.
        tiny = {"arch": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 8, "context_len": 8}
        module.SIZES["1M"] = (16, tiny)
        yield module


def test_every_optimizer_is_measured_and_the_file_holds_what_the_table_shows(bench, tmp_path, capsys):
    out = tmp_path / "out.json"
    threads = torch.get_num_threads()
    bench.main(["--seconds", "0", "--rounds", "1", "--threads", str(threads), "--json", str(out)])
    (document,) = json.loads(out.read_text())
    rows = {row["name"]: row for row in document["rows"]}
    assert sorted(rows) == bench.names()
    assert set(optimizer_names()) <= set(rows)
    printed = capsys.readouterr().out
    for name, row in rows.items():
        assert row["step_ms"] >= row["own_ms"] > 0
        assert row["reference_step_ms"] > 0
        assert name in printed
    assert rows["adamw"]["reference"] == "fused torch.optim.AdamW"
    assert rows["adamw"]["state_bytes_a_parameter"] == rows["adamw"]["reference_state_bytes_a_parameter"]
    assert rows["muon"]["reference"] == "per-matrix fp32 loop"
    assert rows["muon"]["state_bytes_a_parameter"] == rows["muon"]["reference_state_bytes_a_parameter"]
    assert rows["amos"]["state_bytes_a_parameter"] < rows["adamw"]["state_bytes_a_parameter"]


def test_a_round_of_an_optimizer_with_roots_is_a_whole_period(bench):
    row = bench.measure("shampoo", "1M", seconds=0.0, least_rounds=2)
    tables, _ = bench.optim_tables("shampoo")
    model = bench.make_model("1M")
    optimizers = bench.build_optimizers(model, tables)
    frequency = max(group.get("precondition_frequency", 1) for group in optimizers.groups())
    assert row["steps_a_round"] == frequency > 1
    assert row["reference"] == "nanorun's muon"
    assert row["rounds"] == 2


def test_figures_are_medians_over_the_means_of_rounds(bench):
    found = bench.compared("step", [1.0, 3.0, 5.0, 7.0, 2.0, 2.0], [2.0, 2.0, 2.0, 2.0, 8.0, 8.0], 2)
    assert found == {"step_ms": 2.0, "reference_step_ms": 2.0, "step_ratio": 1.0}


@pytest.mark.parametrize("name", ["muon", "normuon", "nadamw", "adam", "sgd"])
def test_reference_moves_the_parameters_that_ours_moves_by_the_same_options(bench, name):
    models = [bench.make_model("1M") for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    before = [parameter.detach().clone() for parameter in models[0].parameters()]
    mine, optimizers = bench.ours(name, models[0], bench.optim_tables(name)[0])
    theirs = bench.reference(name, models[1], optimizers)
    for model in models:
        bench.set_gradients(model)
    for contender in (mine, theirs):
        contender.step()
    for old, left, right in zip(before, models[0].parameters(), models[1].parameters(), strict=True):
        assert not torch.equal(old, left)
        assert not torch.equal(old, right)
    if name in ("adam", "sgd"):
        for left, right in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(left, right)
