"""A record's run made again: bits, verdicts, what is refused, and code that runs only where it is trusted."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import nanorun
from nanorun.data.prepare import prepare
from nanorun.errors import RunFailed, Stopped, UserError
from nanorun.records.record import read_record, read_records
from nanorun.records.states import FOLDER, state_of
from nanorun.training import machine, recorded_code
from nanorun.training import reproduce as reproduce_module
from nanorun.training.reproduce import Request, reproduce
from nanorun.training.run import train_seeds
from nanorun.training.step import Stepper

QUIET = Console(quiet=True)
REAL_IDENTITY = machine.code_identity.__wrapped__
CLEAN = {"version": "0.1.0", "commit": "a" * 40, "dirty": False, "patch": None}
REPOSITORY = Path(nanorun.__file__).parent.parent
TRACK = """
summary = "Too little to learn anything, in no time."
kind = "open"
target_val_loss = 1.88
scored_in = "seconds"
significance = {rule = "t", n = 3, alpha = 0.05}

[fixed.data]
corpus = "shakespeare"
tokenizer = "char"
"""
FEW_TOKENS = ("validation.tokens=2000", "validation.every_steps=3", "validation.from_step=0")
OPTIMIZER = '''
import torch


class Sign(torch.optim.Optimizer):
    """The sign of the gradient."""

    skips_on_host = True

    def __init__(self, params, lr=0.001):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign(), alpha=group["lr"])
'''


@pytest.fixture(autouse=True)
def _a_clean_commit_and_a_quiet_machine_in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "code_identity", lambda: (CLEAN, None))
    monkeypatch.setattr(reproduce_module, "_load", lambda: 0.0)


@pytest.fixture
def make_record(shakespeare_folder, tiny_settings):
    """Return a function that trains a tiny run and returns its record's folder."""

    def make(*settings, optim="muon", seed=3, **options):
        settings = [*tiny_settings, *FEW_TOKENS, *settings]
        options = {"data": shakespeare_folder, **options}
        if not Path("configs/tiny").exists():
            shutil.copytree(REPOSITORY / "configs/shakespeare-sprint", "configs/tiny")
            Path("configs/tiny/track.toml").write_text(TRACK)
        (result,) = train_seeds("tiny", optim, settings, seed, 1, options, QUIET)
        return Path(result["record"])

    return make


@pytest.fixture
def again(shakespeare_folder):
    """Return a function that reproduces a record with some options, and returns the result and what was said."""

    def run(folder, **options):
        out = io.StringIO()
        options = {"data": shakespeare_folder, "by": "Ada", **options}
        # Seconds of so short a run are noise.
        return reproduce(Request(str(folder), **options), Console(file=out, width=300)), out.getvalue()

    return run


@pytest.fixture(autouse=True)
def _seconds_that_agree(monkeypatch):
    monkeypatch.setattr("nanorun.records.agreement.SAME_SECONDS", 1e6)


def edited(folder, **changes):
    """Change a record's content on disk."""
    path = folder / "record.json"
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(content[key], dict) else value
    path.write_text(json.dumps(content))
    return folder


def files_of(folder):
    return sorted(path.name for path in (folder / FOLDER).glob("*"))


def test_a_deterministic_run_is_made_again_as_one(make_record, again, monkeypatch):
    folder, seen, real = make_record(deterministic=True), [], Stepper.step

    def watching(self, *words, **options):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return real(self, *words, **options)

    monkeypatch.setattr(Stepper, "step", watching)
    _, said = again(folder)
    assert seen == [True] * 6
    assert "deterministic: " not in said
    (file,) = (folder / FOLDER).iterdir()
    assert json.loads(file.read_text())["software"]["deterministic"] is True


def test_a_run_made_again_here_ends_with_the_same_bits_and_is_written_beside_the_record(make_record, again):
    folder = make_record()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result, said = again(folder)
    assert result["verdict"] == "agrees"
    assert result["agreement"]["same_final_weights"]
    assert result["agreement"]["same_initial_weights"]
    assert result["agreement"]["largest_difference"] == 0
    assert result["agreement"]["points_compared"] == 2
    assert result["agreement"]["seconds_agree"] is True
    assert result["differences"] == []
    assert "nothing that a record holds differs between then and here" in said
    state = state_of(folder)
    assert state.name == "reproduced"
    (one,) = state.reproductions
    assert (one.by, one.seed, one.steps) == ("Ada", 3, 6)
    assert files_of(folder) == [Path(result["file"]).name]
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert len(read_records(Path("records"))[0]) == 1, "the reproduction's run is no record of the track"


def test_the_same_threads_are_used_and_given_back(make_record, again, monkeypatch):
    folder = make_record()
    threads = torch.get_num_threads()
    monkeypatch.setattr(os, "cpu_count", lambda: threads + 1)
    edited(folder, hardware={"n_threads": threads + 1, "n_cpus": threads + 1})
    result, _ = again(folder)
    assert state_of(folder).reproductions[0].hardware.n_threads == threads + 1
    assert torch.get_num_threads() == threads
    assert result["verdict"] == "agrees"


def test_a_record_that_claims_another_loss_is_contested(make_record, again):
    folder = make_record()
    record = read_record(folder)
    curve = [point._asdict() for point in record.validation]
    curve[-1]["val_loss"] -= 0.02
    edited(folder, validation=curve, final_val_loss=curve[-1]["val_loss"])
    with pytest.raises(RunFailed, match=r"was not reproduced; .* contested now") as failed:
        again(folder)
    assert failed.value.result["verdict"] == "disagrees"
    assert "are not theirs" in failed.value.result["agreement"]["reasons"][1]
    assert state_of(folder).name == "contested"


def test_a_record_that_claims_too_few_seconds_is_contested_only_on_a_quiet_machine(
    make_record, again, monkeypatch
):
    monkeypatch.setattr("nanorun.records.agreement.SAME_SECONDS", 1.25)
    folder = make_record()
    edited(folder, clock={"train_seconds": 0.001})
    monkeypatch.setattr(reproduce_module, "_load", lambda: 3.0)
    result, said = again(folder)
    assert result["agreement"]["seconds_agree"] is None
    assert "not quiet (load 3.0 before the run" in said
    monkeypatch.setattr(reproduce_module, "_load", lambda: 0.0)
    with pytest.raises(RunFailed):
        again(folder)
    assert "0.0 s recorded" in state_of(folder).describe()


def test_hostile_words_of_a_record_reach_a_terminal_that_knows_ascii_alone_as_escapes(
    make_record, shakespeare_folder
):
    folder = edited(make_record(), name="m\u00fc\x1b[2J", hardware={"cpu_name": "x\x1b[2J\u202e\u00d7"})
    edited(folder, config={"name": "m\u00fc\x1b[2J"})
    written = io.BytesIO()
    out = io.TextIOWrapper(written, encoding="ascii")
    reproduce(Request(str(folder), data=shakespeare_folder, by="M\u00fcller"), Console(file=out, width=300))
    out.flush()
    assert b"the hardware differs (x\\x1b[2J\\u202e\\xd7, " in written.getvalue()
    assert b"reproduced by M\\xfcller" in written.getvalue()
    assert b"\x1b" not in written.getvalue()


def test_another_seed_is_judged_by_the_spread_of_seeds(make_record, again):
    folder = make_record()
    make_record(seed=4)
    make_record(seed=5)
    result, said = again(folder, seed=6)
    found = result["agreement"]
    assert result["verdict"] == "agrees"
    assert not found["same_initial_weights"]
    assert "the spread of the row's 2 other seeds" in found["loss_test"]
    assert "seed: 3 then, 6 here" in said
    assert state_of(folder).reproductions[0].seed == 6


def test_a_dry_run_says_what_differs_and_leaves_nothing(make_record, again, monkeypatch):
    folder = make_record()
    edited(folder, software={"torch": "1.0.0\x1b[2J"}, target_val_loss=1.7)
    shutil.rmtree("runs")
    monkeypatch.setattr(machine, "code_identity", lambda: ({**CLEAN, "commit": "b" * 40}, None))
    result, said = again(folder, dry_run=True)
    assert "code: nanorun 0.1.0 at aaaaaaaa then, nanorun 0.1.0 at bbbbbbbb here" in said
    assert r"torch: 1.0.0\x1b[2J then" in said
    assert "target: 1.7 then, 1.88 in the track here" in said
    assert "\x1b" not in said
    assert (result["verdict"], result["file"], result["state"]) == (None, None, "claimed")
    assert files_of(folder) == []
    assert not Path("runs").exists()


def test_the_run_is_what_the_record_holds_whatever_the_track_says_now(make_record, again):
    folder = make_record()
    stricter = TRACK.replace("1.88", "0.5") + "\n[fixed.model]\nn_layer = 12\n"
    Path("configs/tiny/track.toml").write_text(stricter)
    result, said = again(folder)
    assert result["agreement"]["same_final_weights"]
    assert "model.n_layer: 1 then, fixed to 12 in the track here" in said
    shutil.rmtree("configs")
    edited(folder, track="mine", config={"track": "mine"})
    moved = shutil.move(folder, Path("records/mine") / folder.name)
    shutil.rmtree(Path(moved) / FOLDER)
    result, said = again(moved)
    assert result["agreement"]["same_final_weights"]
    assert "there is no track mine here" in said


def test_a_name_that_would_leave_the_folder_of_runs_is_made_into_one_that_does_not(
    make_record, again, tmp_path
):
    folder = make_record()
    name = "../../../escaped\x1b[2J/x"
    edited(folder, name=name, config={"name": name})
    result, said = again(folder)
    assert result["verdict"] == "agrees"
    (run,) = Path(result["run"]).glob("*/result.json")
    assert run.resolve().is_relative_to(tmp_path / "runs")
    assert not list(tmp_path.parent.glob("escaped*"))
    assert "\x1b" not in said


CONTRADICTIONS = {
    "seed": ({"seed": 9}, "its config has seed 3, and the record says 9"),
    "track": ({"config": {"track": "sotu"}}, "its config has track 'sotu'"),
    "steps": ({"declared_steps": 7, "completed": False}, "its config has steps 6, and the record says 7"),
    "key": ({"config": {"spam": 1}}, "there is no key 'spam'"),
    "target": ({"target_val_loss": 0.0}, "has the target 0, and a loss is above 0"),
    "optimizer": ({"config": {"optim": {"default": {"name": "nothing"}}}}, "unknown optimizer 'nothing'"),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_a_record_that_cannot_be_run_is_refused_in_a_sentence(make_record, again, what):
    changes, why = CONTRADICTIONS[what]
    folder = edited(make_record(), **changes)
    with pytest.raises(UserError) as refused:
        again(folder)
    assert why in str(refused.value)
    assert files_of(folder) == []
    assert not list(Path("runs").glob("*-reproduce-*"))


def a_plan(runs):
    """What of a plan its folder is made from."""
    return SimpleNamespace(
        request=Request("", runs=runs), record=SimpleNamespace(id="2026-11-24-muon-1a2b3c4d")
    )


@pytest.fixture
def _one_second(monkeypatch):
    now = datetime.datetime(2026, 11, 24, 12, 30)
    monkeypatch.setattr(
        reproduce_module, "datetime", SimpleNamespace(datetime=SimpleNamespace(now=lambda: now))
    )


@pytest.mark.usefixtures("_one_second")
def test_reproductions_begun_in_one_second_take_folders_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(reproduce_module._private_folder, [a_plan(tmp_path / "runs")] * 8))
    assert len(set(folders)) == 8
    assert sorted((tmp_path / "runs").iterdir()) == sorted(folders)


@pytest.mark.usefixtures("_one_second")
def test_a_rank_that_does_not_lead_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    reproduce_module._private_folder(a_plan(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_a_folder_of_runs_that_cannot_be_made_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match=r"cannot be made .* with --runs"):
        reproduce_module._private_folder(a_plan(tmp_path / "runs"))


def test_another_corpus_is_refused_with_what_differs_or_the_command_that_prepares_it(
    make_record, again, tmp_path
):
    folder = make_record()
    with pytest.raises(UserError, match="nanorun prepare-data shakespeare --tokenizer char --data "):
        again(folder, data=tmp_path / "none")
    with pytest.raises(UserError, match=r"nanorun prepare-data shakespeare --tokenizer char$"):
        again(folder, data=Path("data"))
    (tmp_path / "text.txt").write_text("abc def\n" * 2000)
    prepare("text", out=tmp_path / "text", inputs=[str(tmp_path / "text.txt")])
    with pytest.raises(
        UserError, match="corpus shakespeare there, text here; tokenizer char there, byte here"
    ):
        again(folder, data=tmp_path / "text")
    edited(folder, corpus={"manifest_sha256": "0" * 64})
    with pytest.raises(UserError, match="as many tokens, of another text"):
        again(folder)
    edited(folder, corpus={"name": "\x1b[2J../x"})
    with pytest.raises(UserError, match="cannot prepare"):
        again(folder, data=tmp_path / "none")
    assert files_of(folder) == []


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_run(make_record, again, monkeypatch):
    folder = make_record()
    monkeypatch.setattr(reproduce_module.os, "access", lambda *_: False)
    with pytest.raises(UserError, match="copy it to where you may write"):
        again(folder)
    assert not list(Path("runs").glob("*-reproduce-*"))


def test_ctrl_c_leaves_no_reproduction_and_says_how_to_go_on(make_record, again, monkeypatch, stop_in_step):
    folder = make_record()
    stop_in_step(2)
    with pytest.raises(
        Stopped, match=r"Nothing was written beside the record\. Go on with: nanorun repro"
    ) as stopped:
        again(folder)
    assert files_of(folder) == []
    assert state_of(folder).name == "claimed"
    words = str(stopped.value).rpartition("Go on with: ")[2].split()
    assert words[words.index("--by") + 1] == "Ada"
    private = Path(words[words.index("--resume") + 1])
    result, _ = again(folder, resume=private)
    assert result["agreement"]["same_final_weights"]
    assert result["agreement"]["seconds_agree"] is None
    assert len(files_of(folder)) == 1
    other = make_record(seed=8)
    with pytest.raises(UserError, match="is a run with seed = 3, and this one has 8"):
        again(other, resume=private)
    with pytest.raises(UserError, match="holds no run of a reproduction that was stopped"):
        again(other, resume=Path("records"))


def test_a_disk_that_refuses_after_the_run_keeps_the_run_and_writes_it_once_more(
    make_record, again, monkeypatch
):
    folder = make_record()
    real_fsync, real_compare = os.fsync, reproduce_module.compare_runs

    def refuse(_):
        raise OSError(28, "No space left on device")

    def comparing_as_the_disk_fills(*arguments, **options):
        monkeypatch.setattr(os, "fsync", refuse)
        return real_compare(*arguments, **options)

    monkeypatch.setattr(reproduce_module, "compare_runs", comparing_as_the_disk_fills)
    with pytest.raises(UserError, match=r"No space left on device.*write it once more with: nan") as refused:
        again(folder)
    assert files_of(folder) == []
    monkeypatch.setattr(reproduce_module, "compare_runs", real_compare)
    monkeypatch.setattr(os, "fsync", real_fsync)
    private = Path(str(refused.value).rpartition("--resume ")[2].split()[0])
    monkeypatch.setattr(Stepper, "step", None)
    result, _ = again(folder, resume=private)
    assert result["verdict"] == "agrees"


def test_a_run_that_fails_here_writes_nothing_and_names_the_way_to_object(make_record, again, monkeypatch):
    folder = make_record()
    monkeypatch.setattr("nanorun.training.train.validation_loss", lambda *_, **__: (float("nan"), 10))
    with pytest.raises(RunFailed, match=f"nanorun contest {folder.name} --reason TEXT"):
        again(folder)
    assert files_of(folder) == []


def with_patch(folder, text):
    (folder / "source.patch").write_text(text)
    return edited(folder, code={"dirty": True, "patch": "source.patch"})


PATCH = """diff --git a/nanorun/__init__.py b/nanorun/__init__.py
--- a/nanorun/__init__.py
+++ b/nanorun/__init__.py
@@ -1,3 +1,3 @@
 hidden \x1b[2K\u202e here
"""


def test_a_patch_is_shown_and_not_run_without_trust(make_record, shakespeare_folder):
    folder = with_patch(make_record(), PATCH)
    out = io.StringIO()
    with pytest.raises(UserError, match=r"a patch of nanorun's code.*with your rights.*add --trust-code"):
        reproduce(Request(str(folder), data=shakespeare_folder), Console(file=out, width=300))
    assert "+++ b/nanorun/__init__.py" in out.getvalue()
    assert r"hidden \x1b[2K\u202e here" in out.getvalue()
    assert "\x1b" not in out.getvalue()
    assert not list(Path("runs").glob("*-reproduce-*"))
    assert files_of(folder) == []


def test_a_long_patch_is_shown_so_far_and_the_rest_is_counted_and_placed(make_record, shakespeare_folder):
    folder = with_patch(make_record(), PATCH + "+x = 1\n" * 5000)
    out = io.StringIO()
    with pytest.raises(UserError, match="--trust-code"):
        reproduce(Request(str(folder), data=shakespeare_folder), Console(file=out, width=300))
    assert len(out.getvalue()) < 2 * recorded_code.SHOWN_CHARS
    assert f"characters more, not shown: read the whole in {folder.resolve()}/source.patch" in out.getvalue()


def test_shown_code_keeps_what_looks_like_an_emoji(make_record, shakespeare_folder):
    folder = with_patch(make_record(), PATCH + "+x = a[b:end:c]\n")
    out = io.StringIO()
    with pytest.raises(UserError, match="--trust-code"):
        reproduce(Request(str(folder), data=shakespeare_folder), Console(file=out, width=300))
    assert "+x = a[b:end:c]" in out.getvalue()


@pytest.mark.parametrize(
    "make", [lambda path: None, lambda path: os.mkfifo(path), lambda path: path.write_bytes(b"\xff")]
)
def test_a_patch_that_is_missing_or_no_text_is_refused(make_record, again, make):
    folder = edited(make_record(), code={"dirty": True, "patch": "source.patch"})
    make(folder / "source.patch")
    with pytest.raises(UserError, match=r"source\.patch"):
        again(folder, trust_code=True)


def test_a_patch_that_another_run_left_is_refused_with_both_hashes(make_record, again, monkeypatch):
    code = {**CLEAN, "dirty": True, "patch": "source.patch"}
    monkeypatch.setattr(machine, "code_identity", lambda: (code, PATCH))
    folder = make_record()
    digest = hashlib.sha256(PATCH.encode()).hexdigest()
    assert read_record(folder).code.patch_sha256 == digest
    assert again(folder)[0]["agreement"]["same_final_weights"]
    (folder / "source.patch").write_text(PATCH + "+x = 1\n")
    with pytest.raises(UserError, match=rf"source\.patch is not the patch .* the record says {digest[:12]}"):
        again(folder, trust_code=True)


def test_the_patch_that_is_here_too_needs_no_trust(make_record, again, monkeypatch):
    folder = with_patch(make_record(), "the same\n")
    here = {**CLEAN, "dirty": True, "patch": "source.patch"}
    monkeypatch.setattr(machine, "code_identity", lambda: (here, "the same\n"))
    result, _ = again(folder)
    assert result["agreement"]["same_final_weights"]
    monkeypatch.setattr(machine, "code_identity", lambda: (here, "another\n"))
    with pytest.raises(UserError, match="--trust-code"):
        again(folder)


@pytest.fixture
def outside_record(make_record):
    """A record of an optimizer from a file that is gone since, and that would leave a trace if it were run."""
    Path("mine.py").write_text(OPTIMIZER)
    folder = make_record("optim.default.lr=0.01", optim="mine.py:Sign")
    Path("mine.py").write_text("from pathlib import Path\nPath('was_run').touch()\n")
    return folder


@pytest.mark.parametrize("name", ["mine.py:Sign", "mine:Sign"])
def test_an_optimizer_from_outside_is_shown_and_not_imported_without_trust(
    outside_record, again, name, monkeypatch, shakespeare_folder
):
    monkeypatch.syspath_prepend(".")
    edited(outside_record, config={"optim": {"default": {"name": name, "lr": 0.01}}})
    out = io.StringIO()
    with pytest.raises(UserError, match=r"an optimizer from outside nanorun.*add --trust-code"):
        reproduce(Request(str(outside_record), data=shakespeare_folder), Console(file=out, width=300))
    assert f"takes an optimizer from outside nanorun: {name}" in out.getvalue()
    assert "+class Sign(torch.optim.Optimizer):" in out.getvalue()
    assert not Path("was_run").exists()
    assert not list(Path("runs").glob("*-reproduce-*"))
    # Nor where the record keeps silent about it.
    edited(outside_record, code={"outside": "", "dirty": False, "patch": None})
    with pytest.raises(UserError, match="add --trust-code"):
        again(outside_record)
    assert not Path("was_run").exists()


def test_trusted_code_needs_a_commit_that_is_at_hand(outside_record, again):
    with pytest.raises(UserError, match="neither nanorun nor this folder is a git clone that holds it"):
        again(outside_record, trust_code=True)
    edited(outside_record, code={"commit": None})
    with pytest.raises(UserError, match="does not say which commit it ran at"):
        again(outside_record, trust_code=True)
    edited(outside_record, code={"commit": "--upload-pack=touch was_run"})
    with pytest.raises(UserError, match="no full hash of git's"):
        again(outside_record, trust_code=True)
    assert not Path("was_run").exists()


def test_a_commit_outside_the_history_here_needs_trust(make_record, again):
    with pytest.raises(UserError, match="not in the history of the code here"):
        again(make_record(), at_commit=True)


@pytest.mark.parametrize("what", ["a patch", "a commit"])
def test_trust_in_a_record_from_an_unknown_commit_is_told_to_be_trust_in_all_of_it(
    make_record, shakespeare_folder, what
):
    folder = make_record()
    if what == "a patch":
        with_patch(folder, PATCH)
    request = Request(str(folder), data=shakespeare_folder, at_commit=what == "a commit")
    words = f"all code of commit {'a' * 40} runs"
    look = f"git diff HEAD...{'a' * 40}"
    with pytest.raises(UserError, match="--trust-code") as refused:
        reproduce(request, QUIET)
    assert words in str(refused.value)
    assert look in str(refused.value)
    out = io.StringIO()
    with pytest.raises(UserError, match="git clone that holds it"):
        reproduce(dataclasses.replace(request, trust_code=True), Console(file=out, width=300))
    assert words in out.getvalue()
    assert look in out.getvalue()


def git(folder, *words):
    who = ["-c", "user.name=Tester", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    surroundings = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    done = subprocess.run(
        ["git", *who, "-C", str(folder), *words], capture_output=True, text=True, check=True, env=surroundings
    )
    return done.stdout.strip()


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A git repository of this package and its configs, which is also where the test runs."""
    folder = tmp_path / "clone"
    without = shutil.ignore_patterns("__pycache__", "*.xz")
    for name in ("nanorun", "configs"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=without)
    git(tmp_path, "init", "-q", str(folder))
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "All")
    (folder / ".git/hooks/post-checkout").write_text("#!/bin/sh\ntouch hook_was_run\n")
    (folder / ".git/hooks/post-checkout").chmod(0o755)
    monkeypatch.chdir(folder)
    return folder


def new_file(path, text="x = 1\n", mode="100644"):
    lines = "".join(f"+{line}\n" for line in text.splitlines())
    return (
        f"diff --git a/{path} b/{path}\nnew file mode {mode}\n--- /dev/null\n+++ b/{path}\n"
        f"@@ -0,0 +1,{len(text.splitlines())} @@\n{lines}"
    )


BAD_PATCHES = {
    "out of the tree": (new_file("../evil.py"), "touches|does not apply"),
    "an absolute path": (new_file("/tmp/evil.py"), "touches|does not apply"),
    "another file": (new_file("sitecustomize.py"), "touches 'sitecustomize.py'"),
    "a name with tabs": (new_file('"evil\\tnanorun/x.py"').replace('a/"', '"a/'), "touches|does not apply"),
    "git's own": (new_file("nanorun/.git/hooks/pre-commit"), "does not apply|git's own"),
    "attributes": (
        new_file("nanorun/.gitattributes", "* binary\n"),
        "'nanorun/.gitattributes', .* git's own",
    ),
    "a cache of compiled code": (new_file("nanorun/__pycache__/x.py"), "compiled code or git's own"),
    "a library": (new_file("outside/fast.so"), "compiled code or git's own"),
    "a byte of zero": (new_file("outside/mine.py", "x = '\0'\n"), "does not show all the code"),
    "a link": (
        new_file("outside/mine.py", "/etc/hostname", "120000") + "\\ No newline at end of file\n",
        "symbolic link",
    ),
    "no patch": ("hello\n", "does not apply"),
    "another commit's": (PATCH, "does not apply"),
}


@pytest.mark.parametrize("what", BAD_PATCHES)
def test_a_patch_that_plays_tricks_is_refused_and_leaves_nothing(clone, what, tmp_path):
    patch, why = BAD_PATCHES[what]
    place = tmp_path / "place"
    with pytest.raises(UserError, match=why), recorded_code.worktree(clone, "HEAD", patch, place):
        pass
    assert not place.exists()
    assert not list(tmp_path.rglob("evil*"))
    assert git(clone, "worktree", "list").count("\n") == 0


def staged_patch(clone, *words):
    """Return what is staged as a patch, and take it back."""
    patch = git(clone, "diff", "--cached", *words, "HEAD") + "\n"
    git(clone, "reset", "-q", "--hard")
    return patch


def refused_patch(clone, patch, tmp_path):
    place = tmp_path / "place"
    with pytest.raises(UserError) as refused, recorded_code.worktree(clone, "HEAD", patch, place):
        pass
    assert not place.exists()
    return str(refused.value)


@pytest.mark.parametrize("name", ["nanorun/__pycache__/__init__.cpython-311.pyc", "nanorun/data.bin"])
def test_a_patch_of_bytes_is_refused(clone, name, tmp_path):
    (clone / name).parent.mkdir(exist_ok=True)
    (clone / name).write_bytes(b"\xa7\x0d\x0d\x0a\0\0")
    git(clone, "add", "-f", name)
    patch = staged_patch(clone, "--binary")
    assert "GIT binary patch" in patch
    assert "does not show all the code" in refused_patch(clone, patch, tmp_path)


def test_a_patch_that_brings_a_file_in_from_elsewhere_is_refused(clone, tmp_path):
    (clone / "notes.py").write_text("x = 1\n")
    git(clone, "add", "notes.py")
    git(clone, "commit", "-q", "-m", "Notes")
    git(clone, "mv", "notes.py", "nanorun/notes.py")
    patch = staged_patch(clone, "--find-renames")
    assert "holds 'rename from'" in refused_patch(clone, patch, tmp_path)


def test_a_run_after_a_rename_leaves_a_patch_that_can_be_run_again(clone, tmp_path, monkeypatch):
    monkeypatch.setattr(nanorun, "__file__", str(clone / "nanorun/__init__.py"))
    git(clone, "config", "diff.renames", "copies")
    git(clone, "mv", "nanorun/errors.py", "nanorun/mistakes.py")
    code, patch = REAL_IDENTITY()
    with recorded_code.worktree(clone, code["commit"], patch, tmp_path / "place") as tree:
        assert (tree / "nanorun/mistakes.py").exists()
        assert not (tree / "nanorun/errors.py").exists()


def test_a_checkout_leaves_other_worktrees_alone_that_are_away_for_a_moment(clone, tmp_path):
    git(clone, "worktree", "add", "--detach", str(tmp_path / "mine"), "HEAD")
    (tmp_path / "mine").rename(tmp_path / "away")
    with recorded_code.worktree(clone, "HEAD", None, tmp_path / "place"):
        pass
    (tmp_path / "away").rename(tmp_path / "mine")
    assert git(tmp_path / "mine", "rev-parse", "HEAD") == git(clone, "rev-parse", "HEAD")


def test_a_checkout_runs_no_hook_and_is_taken_away(clone, tmp_path):
    place = tmp_path / "place"
    with recorded_code.worktree(clone, "HEAD", new_file("outside/mine.py"), place) as tree:
        assert (tree / "outside/mine.py").read_text() == "x = 1\n"
        assert (tree / "nanorun/cli.py").exists()
        assert not list(tmp_path.rglob("hook_was_run"))
    assert not place.exists()
    assert git(clone, "worktree", "list").count("\n") == 0


def test_a_form_feed_in_an_optimizer_survives_the_patch(clone, tmp_path):
    from nanorun.training.setup import _as_new_file

    text = "a = 1\n\x0c\nb = '\x1c'\n"
    with recorded_code.worktree(clone, "HEAD", _as_new_file("mine.py", text), tmp_path / "place") as tree:
        assert (tree / "outside/mine.py").read_text() == text


@pytest.mark.slow
def test_trusted_code_runs_from_a_checkout_with_its_patch_and_its_optimizer(
    clone, make_record, again, monkeypatch, capfd
):
    init = clone / "nanorun/__init__.py"
    init.write_text(init.read_text().replace('"0.1.0"', '"0.1.0+theirs"'))
    patch = git(clone, "diff", "HEAD") + "\n"
    git(clone, "checkout", "-q", "--", "nanorun")
    code = {
        "version": "0.1.0+theirs",
        "commit": git(clone, "rev-parse", "HEAD"),
        "dirty": True,
        "patch": "source.patch",
    }
    Path("mine.py").write_text(OPTIMIZER)
    monkeypatch.setattr(machine, "code_identity", lambda: (code, patch))
    folder = make_record("optim.default.lr=0.01", optim="mine.py:Sign")
    monkeypatch.setattr(machine, "code_identity", lambda: (CLEAN, None))
    Path("mine.py").unlink()
    Path("told").write_text("kept")
    monkeypatch.setenv("NANORUN_EXIT_CODE", str(Path("told").resolve()))
    result, said = again(folder, trust_code=True)
    assert Path("told").read_text() == "kept"
    assert "+class Sign(torch.optim.Optimizer):" in said
    assert result["agreement"]["same_final_weights"]
    assert result["verdict"] == "agrees"
    assert result["differences"] == []
    (one,) = state_of(folder).reproductions
    assert one.code.version == "0.1.0+theirs"
    assert one.code.commit == code["commit"]
    assert one.code.outside == read_record(folder).code.outside != ""
    assert git(clone, "worktree", "list").count("\n") == 0
    assert not (Path(result["run"]) / "worktree").exists()
    assert len(read_records(Path("records"))[0]) == 1


@pytest.mark.slow
def test_a_checkout_that_is_stopped_is_taken_up_again(clone, make_record, again, monkeypatch):
    commit = git(clone, "rev-parse", "HEAD")
    monkeypatch.setattr(machine, "code_identity", lambda: ({**CLEAN, "commit": commit}, None))
    folder = make_record("train.steps=400")
    monkeypatch.setattr(machine, "code_identity", lambda: (CLEAN, None))

    def stop_when_it_trains():
        while not [
            path for path in Path("runs").glob("*-reproduce-*/*/metrics.jsonl") if path.stat().st_size
        ]:
            if done.wait(0.1):
                return
        os.kill(os.getpid(), signal.SIGINT)

    done = threading.Event()
    watcher = threading.Thread(target=stop_when_it_trains)
    watcher.start()
    try:
        with pytest.raises(Stopped, match="Go on with: nanorun reproduce") as stopped:
            again(folder, at_commit=True, trust_code=True)
    finally:
        done.set()
        watcher.join()
    assert files_of(folder) == []
    words = str(stopped.value).split()
    assert {"--at-commit", "--trust-code"} <= set(words)
    private = Path(words[words.index("--resume") + 1])
    result, _ = again(folder, at_commit=True, trust_code=True, resume=private)
    assert result["agreement"]["same_final_weights"]
    assert state_of(folder).reproductions[0].code.commit == commit


@pytest.fixture
def handled():
    """Return a function that handles a signal for the length of the test."""
    before = {}

    def handle(name, handler):
        number = signal.Signals[name]
        before[number] = signal.signal(number, handler)

    yield handle
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("sent", "arrives"),
    [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGUSR1", "SIGTERM"), ("SIGHUP", "SIGTERM")],
)
def test_a_signal_reaches_the_run_in_its_checkout_once(tmp_path, sent, arrives, handled):
    code = (
        "import signal, sys, time, pathlib\n"
        "seen = []\n"
        f"signal.signal(signal.{arrives}, lambda *_: seen.append(1))\n"
        "pathlib.Path('ready').touch()\n"
        "until = time.monotonic() + 10\n"
        "while not seen and time.monotonic() < until: time.sleep(0.01)\n"
        "time.sleep(0.1)\n"
        "sys.exit(74 + len(seen))\n"
    )

    def interrupt():
        while not (tmp_path / "ready").exists():
            pass
        os.kill(os.getpid(), signal.Signals[sent])

    handled(sent, lambda *_: None)
    sender = threading.Thread(target=interrupt)
    sender.start()
    before = signal.getsignal(signal.Signals[sent])
    assert reproduce_module._wait_for([sys.executable, "-c", code], tmp_path, dict(os.environ)) == 75
    sender.join()
    assert signal.getsignal(signal.Signals[sent]) is before


def test_a_closed_terminal_that_is_to_be_ignored_does_not_reach_the_run(tmp_path, handled):
    handled("SIGHUP", signal.SIG_IGN)
    code = "import os, signal, time\nos.kill(os.getppid(), signal.SIGHUP)\ntime.sleep(0.2)\n"
    assert reproduce_module._wait_for([sys.executable, "-c", code], tmp_path, dict(os.environ)) == 0


def test_the_command_line_prints_one_document_and_ends_in_a_sentence(
    make_record, shakespeare_folder, nanorun
):
    folder = make_record()
    call = partial(nanorun, "reproduce")
    data = ["--data", str(shakespeare_folder), "--by", "Ada"]
    code, out, err = call(folder.name, *data, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert (document["verdict"], document["state"]) == ("agrees", "reproduced")
    assert document["seconds_ratio"] > 0
    edited(folder, final_val_loss=1.0, validation=[])
    code, out, err = call(folder.name, *data, "--json")
    assert code == 1
    assert json.loads(out)["state"] == "contested"
    assert "was not reproduced" in err
    code, _, err = call("nothing", *data)
    assert code == 2
    assert "neither a record's folder" in err
    code, out, _ = call("--help")
    assert code == 0
    assert "Example: nanorun reproduce" in " ".join(out.split())
