"""The first losses of every track with an embedded corpus are those that are kept for this version of torch."""

import json
from pathlib import Path

import pytest
from scripts_loader import script

SCRIPT = Path(__file__).parent.parent / "scripts" / "golden.py"
SPRINT = "shakespeare-sprint"


@pytest.fixture(scope="module")
def golden():
    with script("golden") as module:
        yield module


@pytest.fixture(scope="module")
def kept(golden):
    path = golden.kept_file()
    if not path.exists():
        pytest.skip(f"no {path.name} in tests/golden: python scripts/golden.py --write makes it")
    return json.loads(path.read_text())


@pytest.mark.parametrize("preset", ["adamw", "muon"])
@pytest.mark.parametrize(
    "track", [SPRINT, *(pytest.param(name, marks=pytest.mark.slow) for name in ("sotu", "shakespeare"))]
)
def test_the_first_losses_are_those_that_are_kept(golden, kept, track, preset, shakespeare_folder, tmp_path):
    data = tmp_path if track == "sotu" else shakespeare_folder
    found = golden.first_losses(track, preset, data=data)
    assert golden.largest_move(found, kept[f"{track} {preset}"]) <= golden.TOLERANCE, found


@pytest.mark.parametrize("preset", ["adamw", "muon"])
def test_a_learning_rate_one_percent_off_is_noticed(golden, kept, preset, shakespeare_folder):
    lr = golden.resolve(golden.load_track(SPRINT), preset, []).optim["matrix"]["lr"]
    off = (f"optim.matrix.lr={lr * 1.01}",)
    found = golden.first_losses(SPRINT, preset, data=shakespeare_folder, settings=off)
    assert golden.largest_move(found, kept[f"{SPRINT} {preset}"]) > golden.TOLERANCE


def test_every_track_and_preset_is_kept_for_twenty_steps(golden, kept):
    assert set(kept) == {f"{track} {preset}" for track in golden.TRACKS for preset in golden.PRESETS}
    assert {len(losses) for losses in kept.values()} == {20}


def test_a_loss_that_is_missing_or_not_finite_has_moved(golden):
    assert golden.largest_move([1.0, 2.0], [1.0, 2.5]) == 0.5
    assert golden.largest_move([1.0, float("nan")], [1.0, 2.0]) == float("inf")
    assert golden.largest_move([1.0, float("inf")], [1.0, 2.0]) == float("inf")
    assert golden.largest_move([1.0], [1.0, 2.0]) == float("inf")
