"""The table of all optimizers: whose records it takes, and what it says of them."""

import json
import sys

import pytest
from scripts_loader import script

from nanorun.config import resolve
from nanorun.records.record import Record, write_record
from nanorun.tracks import load_track

HASH = "0" * 64


@pytest.fixture
def table(tmp_path, monkeypatch, capsys):
    """Return a function that prints the table of the records written so far, as rows of cells."""

    def rows(*words):
        monkeypatch.setattr(sys, "argv", ["fair_table.py", "--records", str(tmp_path), *words])
        with script("fair_table") as module:
            module.main()
        lines = capsys.readouterr().out.splitlines()[2:]
        return {cells[0]: cells for cells in ([c.strip() for c in line.split("|")[1:-1]] for line in lines)}

    return rows


def write(folder, optim, seed, *settings, losses, number):
    from records_samples import a_dict

    config = resolve(load_track("sotu"), optim, list(settings), seed=seed).model_dump()
    steps = config["train"]["steps"]
    content = {**a_dict(name=optim, seed=seed), "config": json.loads(json.dumps(config))}
    points = [
        {"step": step, "tokens": step, "train_seconds": step / 4, "val_loss": loss}
        for step, loss in zip((steps - 20, steps), losses)
    ]
    first = next((p for p in points if p["val_loss"] <= 1.5), None)
    content |= {
        "id": f"2026-01-01-{optim.replace('_', '-')}-{number:08x}",
        "target_val_loss": 1.5,
        "steps": steps,
        "declared_steps": steps,
        "completed": True,
        "validation": points,
        "final_val_loss": losses[-1],
        "reached": first and {"step": first["step"], "seconds": first["train_seconds"]},
        "n_parameters": 1000,
        "optimizer_state_bytes": 8000,
    }
    content["clock"] = {**content["clock"], "train_seconds": steps / 4}
    write_record(folder, Record.from_dict(content), config_toml="", source_patch=None)


def test_it_takes_the_presets_of_today_and_says_who_misses_by_how_much(table, tmp_path):
    for seed in range(3):
        write(tmp_path, "muon", seed, losses=(1.51, 1.40 + 0.001 * seed), number=seed)
        write(tmp_path, "adamw", seed, losses=(1.7, 1.6 + 0.001 * seed), number=10 + seed)
        write(tmp_path, "muon", seed, "optim.matrix.lr=0.5", losses=(9.0, 9.0), number=20 + seed)
        write(tmp_path, "adamw", seed, "average.kind=ema", losses=(1.0, 1.0), number=30 + seed)
    bench = [
        {"size": "1M", "rows": [{"name": "muon", "step_ms": 12.34}]},
        {"size": "124M", "rows": [{"name": "muon", "step_ms": 999.0}]},
    ]
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    rows = table("--bench", str(tmp_path / "bench.json"))
    assert list(rows) == ["`muon`", "`adamw`"]
    steps = resolve(load_track("sotu"), "muon").train.steps
    assert rows["`muon`"][1:4] == ["3", str(steps), f"{steps / 4:.1f} ±0.0"]
    assert rows["`muon`"][4] == f"step {steps}, {steps / 4:.1f} s"
    assert rows["`muon`"][5:8] == ["1.4010 ±0.0010", "< 0.0001", "yes"]
    assert rows["`muon`"][8:10] == ["12.3", "8.0"]
    assert rows["`adamw`"][4] == "misses by 0.1000"
    assert rows["`adamw`"][7] == "no"


def test_it_says_so_where_no_record_is_of_today(table, tmp_path, capsys):
    write(tmp_path, "muon", 0, "optim.matrix.lr=0.5", losses=(9.0, 9.0), number=1)
    with pytest.raises(SystemExit, match="2"):
        table()
    assert "no record of a preset as it stands now" in capsys.readouterr().err
