"""The wheel works outside the clone: tracks, presets and corpora are inside it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_trains_outside_the_clone(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    wheel = next((tmp_path / "dist").glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    packed = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*")}
    assert {"nanorun/configs/sotu/track.toml", "nanorun/configs/sotu/muon.toml"} <= packed
    assert {f"nanorun/records/page/page.{kind}" for kind in ("html.j2", "css", "js")} <= packed
    assert {"nanorun/data/corpora/sotu.xz", "nanorun/data/corpora/shakespeare.xz"} <= packed
    assert "nanorun/kernels.c" in packed
    (tmp_path / "work").mkdir()
    words = "train --track shakespeare-sprint --set train.steps=2 --set validation.from_step=2 --set model.n_layer=1"
    done = subprocess.run(
        [sys.executable, "-m", "nanorun", *words.split()],
        cwd=tmp_path / "work",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "work/records/shakespeare-sprint").iterdir())
