"""What a script is given by mistake is told in a line, with nanorun's exit code and no traceback."""

import re
import sys

import pytest
from scripts_loader import SCRIPTS, script

from nanorun.errors import RunFailed, UserError

TAKE_A_TRACK = {
    "bench_loader": [],
    "bench_recipes": ["--a", "muon", "--b", "adamw", "--keep", "kept"],
    "bench_report": [],
    "bench_start": [],
    "bench_step": [],
    "fair_table": [],
    "tune": ["--optim", "muon", "--out", "trials.json"],
}


def ended(main, capsys):
    """Return the exit code of a script and what it said of its end."""
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    assert not said.out
    return end.value.code, said.err


def test_these_are_all_scripts_that_take_a_track():
    option = re.compile(r'add_argument\(\s*"--track')
    assert set(TAKE_A_TRACK) == {
        path.stem for path in SCRIPTS.glob("*.py") if option.search(path.read_text())
    }


@pytest.mark.parametrize("name", list(TAKE_A_TRACK))
def test_an_unknown_track_is_told_with_the_known_ones_before_anything_runs(
    name, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    option = "--tracks" if name == "bench_start" else "--track"
    monkeypatch.setattr(sys, "argv", [f"{name}.py", option, "sotuu", *TAKE_A_TRACK[name]])
    with script(name) as module:
        code, said = ended(module.main, capsys)
    assert code == 2
    assert re.fullmatch(rf"{name}: no track 'sotuu'; there are .*sotu.*\. Did you mean 'sotu'\?\n", said)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "wanted"), [(UserError("no\x1b[2J such"), 2), (RunFailed("no\x1b[2J such"), 1)]
)
def test_a_mistake_and_a_failed_run_have_exit_codes_of_their_own(error, wanted, capsys):
    with script("mistakes") as mistakes:

        @mistakes.telling_mistakes("a_script")
        def main():
            raise error

        assert ended(main, capsys) == (wanted, "a_script: no\\x1b[2J such\n")
