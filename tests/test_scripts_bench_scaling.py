"""The scaling benchmark measures a point in processes of its own, and its law finds what made the figures."""

import json
import re
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import pytest
import torch
from scripts_loader import script

from nanorun.model import GPT
from nanorun.optim.build import build_optimizers


@pytest.fixture(scope="module")
def bench():
    with script("bench_scaling") as module:
        yield module


@pytest.fixture(scope="module")
def law():
    with script("scaling_law") as module:
        yield module


COSTS = {
    "layer_passes": 2e-3,
    "matmul_flops": 1e-11,
    "attention_flops": 2e-11,
    "stream_bytes": 5e-9,
    "logits_bytes": 3e-9,
    "gradient_bytes": 4e-10,
    "tensors": 1e-5,
    "update_bytes": 1e-10,
    "newton_schulz_flops": 1.25e-11,
}


@pytest.fixture(scope="module")
def made_up(bench, law):
    """A sweep whose seconds follow COSTS, and whose memory is 300 MiB and 16 bytes a parameter and more."""
    rows = []
    for point in bench.POINTS.values():
        size = bench.SIZES[point.size]
        config = bench._config(point, size, size.batch_tokens)
        with torch.device("meta"):
            model = GPT(config.model, size.vocab_size)
        amounts = bench.amounts(
            SimpleNamespace(
                config=config,
                model=model,
                optimizers=build_optimizers(model, config.optim_by_role),
                rows_of_rank=config.rows_per_step,
                micro_batch_rows=max(1, 2048 // point.context_len),
            )
        )
        seconds = {term: COSTS[term] * amounts[term] for term in COSTS}
        update = sum(seconds[term.amount] for term in law.UPDATE)
        # 16 bytes a parameter, and 20 for each token, layer and channel of a micro-batch.
        peak = 300 + (16 * model.n_parameters() + 5 * amounts["micro_stream_bytes"]) / 2**20
        step = sum(seconds.values())
        own = {"peak_mib": peak, "before_mib": 300, "state_bytes": 8 * model.n_parameters()}
        rows.append(
            {
                **point._asdict(),
                "name": point.name,
                "n_parameters": model.n_parameters(),
                "batch_tokens": size.batch_tokens,
                "step_seconds": step,
                "update_seconds": update,
                "tokens_per_second": size.batch_tokens / step,
                "amounts": amounts,
                "ranks": [own] * point.n_ranks,
            }
        )
    hardware, software = {"n_cpus": 2, "device": "cpu", "device_name": "made up"}, {"torch": "0"}
    return {"hardware": hardware, "software": software, "command": "python made_up.py", "rows": rows}


def test_the_law_finds_the_costs_that_made_the_figures(law, made_up):
    laws = law.fit_all(made_up)
    for part in (laws.passes, laws.update):
        found = {term.amount: cost for term, cost in zip(part.terms, part.costs)}
        assert found == pytest.approx({amount: COSTS[amount] for amount in found}, rel=1e-3)
    beside = dict(zip([term.amount for term in law.MEMORY], laws.beside_states.costs))
    assert beside == pytest.approx(
        {"process": 300, "micro_stream_bytes": 5 / 2**20, "micro_logits_bytes": 0}, rel=1e-3
    )
    held_out = [row for row in law.alone(made_up) if row["name"] in law.HELD_OUT]
    assert len(held_out) == len(law.HELD_OUT)
    seconds = [row["step_seconds"] for row in held_out]
    close = law.agreement([laws.seconds(row) for row in held_out], seconds)
    assert close.largest < 1e-6
    assert close.r_squared == pytest.approx(1)
    assert law.agreement([2 * one for one in seconds], seconds).largest == pytest.approx(1)


def test_no_cost_of_a_law_is_below_nothing(law):
    amounts = [{"tensors": n, "update_bytes": n * n, "newton_schulz_flops": 1} for n in (1, 2, 3)]
    fitted = law.fit(law.UPDATE, amounts, [4.0, 3.0, 2.0])
    assert min(fitted.costs) == 0
    assert max(fitted.costs) > 0


def test_the_documents_section_is_replaced_and_both_charts_are_drawn_beside_it(law, made_up, tmp_path):
    page = tmp_path / "performance.md"
    page.write_text(f"before\n{law.BEGIN}\nold\n{law.END}\nafter\n")
    law.write_docs(made_up, page)
    text = page.read_text()
    assert text.startswith(f"before\n{law.BEGIN}\n")
    assert text.endswith(f"{law.END}\nafter\n")
    assert "\nold\n" not in text
    assert "| 350M-256-adamw (held out) | 353.5M |" in text
    assert re.search(r"matrix products, 6 FLOP a weight and token \| 100 GFLOP/s", text)
    for chart in ("scaling.svg", "scaling-context.svg"):
        assert f"({chart})" in text
        root = ET.fromstring((tmp_path / chart).read_text())
        lines = [
            one for one in root.iter("{http://www.w3.org/2000/svg}path") if "line" in one.get("class", "")
        ]
        assert len(lines) == 8  # two measured, two of the law, and the legend's samples
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="wanted one line"):
        law.write_docs(made_up, page)


def test_a_ring_costs_what_its_bytes_and_hops_do():
    with script("scaling_on_paper") as paper:
        case = paper.Case("tiny", {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_len": 64}, 4096)
        assert paper.sum_seconds(1e9, 1) == 0
        sent = 2 * 7 / 8 * 1e9 / paper.LINK
        assert paper.sum_seconds(1e9, 8) == pytest.approx(sent + paper.START + 14 * paper.HOP)
        counted = paper.count(case, 4)
        assert sum(counted.buckets) == 4 * counted.n_parameters
        assert sum(counted.owned) == sum(paper.count(case, 1).owned) == 2 * 12 * 32 * 32
        one, four = paper.predict(case, 1), paper.predict(case, 4)
        assert four.passes == pytest.approx(one.passes / 4)
        assert one.sum == one.broadcast == 0 < four.broadcast
        assert four.step > one.step / 4


@pytest.mark.slow
def test_points_are_measured_apart_kept_and_not_measured_again(bench, tmp_path, monkeypatch, capsys):
    out = tmp_path / "scaling.json"
    words = ["--json", str(out), "--seconds", "0.01", "--points", "1M-64-adamw"]
    bench.main(words)
    (row,) = json.loads(out.read_text())["rows"]
    assert row["steps"] >= 1
    assert row["step_seconds"] > row["update_seconds"] > 0
    assert row["ranks"][0]["peak_mib"] > row["ranks"][0]["before_mib"] > 0
    assert row["amounts"]["matmul_flops"] > 0
    assert "points are missing" in capsys.readouterr().out
    monkeypatch.setattr(bench, "measure_apart", lambda *_: pytest.fail("measured again"))
    bench.main(words)
    assert json.loads(out.read_text())["rows"] == [row]


@pytest.mark.slow
def test_two_ranks_tell_what_travels_and_what_each_holds(bench):
    row = bench.measure_apart(bench.POINTS["1M-256-muon-x2"], 0.01)
    one, other = row["ranks"]
    assert min(one["state_bytes"], other["state_bytes"]) > 0
    # Half of the sum leaves each rank and half comes back; the tied embedding is AdamW's, on both.
    assert row["sum_bytes"] == 4 * row["n_parameters"]
    muon = row["n_parameters"] - 256 * 192
    assert one["state_bytes"] + other["state_bytes"] == pytest.approx(4 * muon + 2 * 8 * 256 * 192, rel=1e-3)
    assert row["broadcast_bytes"] == 4 * muon / 2
    assert row["sum_seconds"] > 0 < row["broadcast_seconds"]
