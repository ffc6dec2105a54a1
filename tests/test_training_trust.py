"""Code runs where the command line names it, or says --trust-code; no file that came from anybody is enough."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from hostile_samples import SETTINGS, copied, stopped_run

import nanorun as package
from nanorun.config import resolve
from nanorun.tables import read_toml, to_toml
from nanorun.tracks import load_track
from nanorun.training import trust

OPTIMIZER = """
import pathlib

import torch

pathlib.Path("ran").touch()


class Mine(torch.optim.SGD):
    skips_on_host = True
"""
CONFIGS = Path(package.__file__).parent.parent / "configs"


@pytest.fixture
def ran(tmp_path):
    """The file that the optimizer leaves when it is imported."""
    (tmp_path / "mine.py").write_text(OPTIMIZER)
    return tmp_path / "ran"


@pytest.fixture(scope="module")
def run_of_module(tmp_path_factory, shakespeare_folder):
    place = tmp_path_factory.mktemp("run")
    (place / "mine.py").write_text(OPTIMIZER)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return stopped_run(
            place, shakespeare_folder, optim="mine.py:Mine", settings=("optim.default.lr=0.01",)
        )


def preset_with(name, place):
    """Write a track whose preset takes an optimizer, as a clone of somebody's repository may hold it."""
    folder = place / "configs" / "shakespeare-sprint"
    shutil.copytree(CONFIGS / "shakespeare-sprint", folder)
    preset = {**read_toml(folder / "adamw.toml"), "optim": {"default": {"name": name, "lr": 0.01}}}
    (folder / "theirs.toml").write_text(to_toml(preset))
    return folder


def words(shakespeare_folder, *more):
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    return ("train", "--track", "shakespeare-sprint", "--data", shakespeare_folder, *sets, *more)


def test_a_preset_that_names_code_is_refused_with_the_file_and_its_hash(
    nanorun, ran, tmp_path, shakespeare_folder
):
    preset_with("mine.py:Mine", tmp_path)
    code, _, err = nanorun(*words(shakespeare_folder, "--optim", "theirs"))
    assert code == 2
    assert "preset 'theirs'" in err
    assert re.search(rf"mine\.py:Mine \({re.escape(str(tmp_path / 'mine.py'))}, sha256 [0-9a-f]{{12}}\)", err)
    assert "--trust-code" in err
    assert not ran.exists()
    assert not (tmp_path / "runs").exists()


def test_a_preset_that_names_code_runs_where_it_is_trusted_and_says_so(
    nanorun, ran, tmp_path, shakespeare_folder
):
    preset_with("mine.py:Mine", tmp_path)
    code, out, err = nanorun(*words(shakespeare_folder, "--optim", "theirs", "--trust-code"))
    assert code == 0, err
    assert "trusted, as asked: mine.py:Mine" in out
    assert ran.exists()


@pytest.mark.parametrize(
    "named",
    [("--optim", "mine.py:Mine"), ("--optim", "adamw", "--set", "optim.default.name=mine.py:Mine")],
)
def test_what_the_command_line_names_needs_no_more_trust(nanorun, ran, shakespeare_folder, named):
    code, _, err = nanorun(*words(shakespeare_folder, *named, "--set", "optim.default.lr=0.01"))
    assert code == 0, err
    assert ran.exists()


def test_naming_one_class_trusts_no_other(nanorun, ran, tmp_path, shakespeare_folder):
    folder = preset_with("mine.py:Mine", tmp_path)
    (folder / "adamw.toml").write_text((folder / "theirs.toml").read_text())
    (tmp_path / "harmless.py").write_text(
        OPTIMIZER.replace('"ran"', '"harmless"') + "\n\nROLES = ('matrix',)\nCLASS = Mine\n"
    )
    code, _, err = nanorun(
        *words(shakespeare_folder, "--optim", "harmless.py:Mine", "--set", "optim.matrix.lr=0.01")
    )
    assert code == 2, err
    assert "mine.py:Mine" in err
    assert not ran.exists()


def test_a_run_that_names_code_is_resumed_only_where_it_is_trusted(nanorun, run_of_module, ran, tmp_path):
    run = copied(run_of_module, tmp_path)
    code, _, err = nanorun("train", "--resume", run)
    assert code == 2
    assert f"the config of {run} takes an optimizer from outside nanorun" in err
    assert not ran.exists()
    code, _, err = nanorun("train", "--resume", run, "--trust-code")
    assert code == 0, err
    assert ran.exists()


def test_the_command_that_resumes_a_run_says_what_it_trusts(run_of_module):
    track = load_track("shakespeare-sprint")
    named = ("optim.default.name=mine.py:Mine", "optim.default.lr=0.01")
    assert trust.trust_flag(resolve(track, "adamw", named)) == " --trust-code"
    assert trust.trust_flag(resolve(track, "adamw", ())) == ""


@pytest.mark.parametrize("command", [("sample",), ("compare", "run"), ("verify",)])
def test_commands_that_read_a_run_import_nothing_of_it(nanorun, run_of_module, ran, tmp_path, command):
    run = copied(run_of_module, tmp_path)
    run.rename(tmp_path / "run")
    nanorun(*command, "run")
    assert not ran.exists()


def test_an_optimizer_of_torch_is_no_strangers_code(nanorun, tmp_path, shakespeare_folder):
    preset_with("torch.optim:SGD", tmp_path)
    code, _, err = nanorun(*words(shakespeare_folder, "--optim", "theirs"))
    assert code == 0, err


@pytest.mark.parametrize(
    "name",
    [
        "torch.optim.evil:X",
        "torch.optim :X",
        "torch.optim:X:Y",
        "./torch.optim:X",
        "torch.optim.py:X",
        "pickle:loads",
    ],
)
def test_a_name_that_only_looks_like_torchs_is_a_strangers(name):
    config = resolve(load_track("shakespeare-sprint"), "adamw", [f'optim.matrix={{name="{name}"}}'])
    assert trust.outside_names(config) == [name]


@pytest.mark.parametrize(
    "name", ["a\x1b[2J.py:X", "a\n.py:X", "../../etc/passwd:X", "no_such_package.x:Y", ":", ".:X"]
)
def test_what_would_run_is_told_on_one_line_without_running(name):
    config = resolve(load_track("shakespeare-sprint"), "adamw", [f"optim.matrix={{name={json.dumps(name)}}}"])
    with pytest.raises(ValueError, match="not found here") as refused:
        trust.check_trusted(config, named=(), trust_code=False, where="it")
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    "corpus", ["../x", "..", "/etc", "sotu/../..", "hub:../..", "hub:a/../../b", "hub:..", "a.b:c"]
)
def test_a_corpus_whose_name_is_a_path_is_refused_and_nothing_is_made(nanorun, tmp_path, corpus):
    before = sorted(tmp_path.parent.iterdir())
    shutil.copytree(CONFIGS / "text", tmp_path / "configs" / "mine")
    path = tmp_path / "configs/mine/track.toml"
    path.write_text(re.sub(r'corpus = ".*"', f'corpus = "{corpus}"', path.read_text()))
    code, _, err = nanorun("train", "--track", "mine", "--data", tmp_path / "data")
    assert code == 2
    assert corpus.removeprefix("hub:") in err
    assert sorted(tmp_path.parent.iterdir()) == before
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "data").exists()


def test_a_preset_with_a_name_of_control_codes_makes_a_harmless_folder_and_shows_escapes(
    nanorun, tmp_path, shakespeare_folder
):
    folder = preset_with("adamw", tmp_path)
    name = "a\x1b[2J\u202e\n[bold]" + "x" * 150
    (folder / "theirs.toml").rename(folder / f"{name}.toml")
    code, out, err = nanorun(*words(shakespeare_folder, "--optim", name, "--no-record"))
    assert code == 0, err
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"[A-Za-z0-9._-]+", run.name)
    assert len(run.name) < 120
    assert "\x1b" not in out
    assert "\u202e" not in out


@pytest.mark.parametrize("track", ["../../x", "..", "/etc", "a/b", "x\x1b[2J"])
def test_a_run_whose_config_names_a_track_by_a_path_is_refused(nanorun, run_of_module, tmp_path, track):
    run = copied(run_of_module, tmp_path)
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(
        re.sub(r"^track = .*", lambda _: f"track = {json.dumps(track)}", text, flags=re.M)
    )
    code, _, err = nanorun("train", "--resume", run, "--trust-code")
    assert code == 2
    assert "no track" in err
    assert "\x1b" not in err
