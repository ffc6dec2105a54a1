"""No flipped bit, cut, missing or exchanged file of a checkpoint is loaded, by the script that counts them."""

import json
from pathlib import Path

import pytest
from scripts_loader import script

SCRIPT = Path(__file__).parent.parent / "scripts" / "flip_bits.py"


@pytest.fixture(scope="module")
def flips():
    with script("flip_bits") as module:
        yield module


def test_every_kind_of_damage_is_refused_by_name_where_other_formats_load_it_silently(
    flips, tmp_path, capsys
):
    out = tmp_path / "out.json"
    flips.main(["--flips", "50", "--out", str(out)])
    document = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == document
    assert len(document["checkpoint"]) == 5
    assert all(count == {"refused by name": 10} for count in document["checkpoint"].values())
    assert sum(sum(count.values()) for count in document["other damage"].values()) == 50 + 5 + 5 + 5 + 1 + 1
    kinds = {kind for count in document["other damage"].values() for kind in count}
    assert kinds == {"refused by name"}, document["other damage"]
    assert document["safetensors"]["loaded silently"] > 40
    assert document["torch.save"]["loaded silently"] > 30


def test_a_loader_that_compares_nothing_would_be_found_out(flips, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(flips.checkpoint, "_verified", lambda path, run: flips.checkpoint.FILES)
    flips.main(["--flips", "20", "--out", str(tmp_path / "out.json")])
    counts = json.loads((tmp_path / "out.json").read_text())["checkpoint"]
    assert counts["model.safetensors"].get("loaded silently", 0) > 2
