"""The command line as a person meets it: the flow, the forms, signals, and what bad input gets."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from records_samples import a_dict

from nanorun import cli

TINY = ["train.steps=4", "train.batch_tokens=512", "validation.from_step=4"]
TINY += ["model.n_layer=1", "model.n_head=2", "model.n_embd=32"]
SPRINT = ["train", "--track", "shakespeare-sprint", *(word for one in TINY for word in ("--set", one))]
REPOSITORY = Path(cli.__file__).parent.parent
COMMANDS = (
    *("prepare-data", "train", "report", "import", "verify", "compare", "power", "score"),
    *("reproduce", "contest", "optimizers", "sample", "launch", "doctor"),
)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_shows_an_example(command, nanorun):
    code, out, _ = nanorun(command, "--help")
    assert code == 0
    assert f"Example: nanorun {command}" in " ".join(out.split())


def test_the_help_of_train_names_every_track(nanorun):
    _, out, _ = nanorun("train", "--help")
    named = "".join(out.split())
    shipped = [
        path.parent.name for path in (Path(cli.__file__).parent.parent / "configs").glob("*/track.toml")
    ]
    assert len(shipped) >= 6
    assert all(name in named for name in shipped)


def test_each_command_names_the_next_one(nanorun):
    code, out, _ = nanorun("prepare-data", "shakespeare")
    assert code == 0
    assert "next: nanorun train --track shakespeare-sprint" in out
    code, out, _ = nanorun(*SPRINT)
    assert code == 0
    assert "next: nanorun report --track shakespeare-sprint" in out
    code, out, _ = nanorun("report", "--track", "shakespeare-sprint")
    assert code == 0
    assert "muon" in out
    assert "1 seed of the 3" in " ".join(out.split())


def test_training_prepares_an_embedded_corpus_first_and_says_so(nanorun):
    code, out, _ = nanorun(*SPRINT)
    assert code == 0
    assert "preparing the embedded corpus 'shakespeare' first" in out
    assert list(Path("data/shakespeare").glob("*train*.bin"))


def test_preparing_twice_does_nothing_the_second_time(nanorun):
    first = json.loads(nanorun("prepare-data", "shakespeare", "--out", "shards", "--json")[1])
    second = json.loads(nanorun("prepare-data", "shakespeare", "--out", "shards", "--json")[1])
    assert (first["wrote"], second["wrote"]) == (True, False)
    assert list(Path("shards").glob("*train*.bin"))
    assert list(Path("shards").glob("*val*.bin"))


def test_report_json_has_the_keys_that_other_programs_read(nanorun):
    nanorun(*SPRINT)
    document = json.loads(nanorun("report", "--track", "shakespeare-sprint", "--json")[1])
    assert {"track", "target_val_loss", "rows"} <= set(document)
    keys = "rank name optimizer n seconds_mean seconds_std steps_mean tokens_mean loss_mean p_value counts hardware"
    assert set(keys.split()) <= set(document["rows"][0])


def test_a_corrupt_record_is_named_and_the_table_still_printed(nanorun):
    nanorun(*SPRINT)
    broken = Path("records/shakespeare-sprint/2026-01-01-muon-00000000")
    broken.mkdir()
    (broken / "record.json").write_text('{"format_version": 1')
    code, out, _ = nanorun("report", "--track", "shakespeare-sprint", "--format", "markdown")
    assert code == 0
    assert "| muon |" in out
    assert "2026-01-01-muon-00000000" in out


def test_a_corrupt_record_is_named_where_its_track_has_no_other_and_beside_a_csv(nanorun):
    broken = Path("records/shakespeare-sprint/2026-01-01-muon-00000000")
    broken.mkdir(parents=True)
    (broken / "record.json").write_text('{"format_version": 1')
    assert broken.name in nanorun("report", "--format", "markdown")[1]
    code, out, err = nanorun("report", "--format", "csv")
    assert code == 0
    assert broken.name in err
    assert broken.name not in out


def test_records_of_a_track_that_is_not_here_are_named(nanorun):
    broken = Path("records/mine/2026-01-01-muon-00000000")
    broken.mkdir(parents=True)
    (broken / "record.json").write_text("{}")
    code, _, err = nanorun("report")
    assert code == 0
    assert "records/mine holds records of a track that is not here" in err


def test_a_run_that_missed_a_required_target_still_prints_its_document(nanorun):
    code, out, err = nanorun(*SPRINT, "--require-target", "--json")
    assert code == 1
    assert "above the required 1.88" in err
    assert json.loads(out)["reached"] is None


def test_the_next_command_of_a_run_says_where_its_records_lie(nanorun):
    _, out, _ = nanorun(*SPRINT, "--records", "mine")
    command = re.search(r"next: nanorun (.*)", out)[1]
    code, out, _ = nanorun(*command.split())
    assert code == 0
    assert "muon" in out
    assert "--records mine" in out


def test_tokens_that_no_track_takes_are_told_to_need_a_track(nanorun):
    Path("mine.txt").write_text("some text\n" * 1000)
    _, out, _ = nanorun("prepare-data", "text", "--input", "mine.txt", "--tokenizer", "char")
    assert "next: a track of your own" in out
    _, out, _ = nanorun("prepare-data", "text", "--input", "mine.txt")
    assert "next: nanorun train --track text\n" in out


def test_a_track_without_a_preset_says_what_it_lacks(nanorun):
    Path("configs/bare").mkdir(parents=True)
    shipped = Path(cli.__file__).parent.parent / "configs/shakespeare-sprint/track.toml"
    Path("configs/bare/track.toml").write_text(shipped.read_text())
    code, _, err = nanorun("train", "--track", "bare")
    assert code == 2
    assert "track 'bare' has no preset" in err
    assert nanorun("report", "--track", "bare")[0] == 0


def test_ctrl_c_outside_training_is_one_sentence_and_130(nanorun, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("nanorun.data.show.carry_out", interrupted)
    code, _, err = nanorun("prepare-data", "shakespeare")
    assert code == 130
    assert "stopped by Ctrl-C" in err


def test_a_sample_is_a_function_of_its_seed(nanorun):
    nanorun(*SPRINT, "--no-record")
    run = next(Path("runs").iterdir())
    texts = [
        nanorun("sample", run, "--prompt", "KING:", "--tokens", 20, "--seed", seed)[1] for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("KING:")
    for words in (
        ["--temperature", "inf"],
        ["--temperature", "nan"],
        ["--prompt", "\udcff"],
        ["--seed", 2**63],
    ):
        code, _, err = nanorun("sample", run, *words)
        assert code == 2
        assert words[0] in err
    assert nanorun("sample", run, "--temperature", "1e-45", "--tokens", 3)[0] == 0
    assert len(texts[0]) == len("KING:") + 20 + 1


def test_doctor_gives_every_finding_that_is_wrong_its_mend(nanorun):
    findings = json.loads(nanorun("doctor", "--json")[1])["findings"]
    assert {"device", "precision", "compile", "gpt2 vocabulary", "wandb", "free disk"} <= {
        f["topic"] for f in findings
    }
    assert all(finding["ok"] or finding["mend"] for finding in findings)


def shard(path, change):
    words = np.fromfile(path, dtype=np.uint8)
    change(words)
    words.tofile(path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def version_2(path):
    shard(path, lambda content: content.__setitem__(4, 2))


def beyond_the_vocabulary(path):
    shard(path, lambda content: content.__setitem__(slice(1024, 1026), 255))


def flipped(path):
    shard(path, lambda content: content.__setitem__(1024, content[1024] ^ 1))


@pytest.mark.parametrize("damage", [cut, version_2, beyond_the_vocabulary, flipped])
def test_a_damaged_shard_is_refused_by_its_name(damage, nanorun):
    nanorun("prepare-data", "shakespeare")
    path = next(Path("data/shakespeare").glob("*train*.bin"))
    damage(path)
    code, _, err = nanorun(*SPRINT)
    assert code == 2
    assert path.name in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prepare-data", "shakespear"], "Did you mean 'shakespeare'"),
        (["prepare-data", "--tokenizer", "bite"], "Did you mean 'byte'"),
        (["prepare-data", "text"], "--input"),
        (["prepare-data", "text", "--input", "nowhere.txt"], "nowhere.txt"),
        (["prepare-data", "text", "--input", "empty.txt"], "empty"),
        (["prepare-data", "text", "--input", "latin.txt"], "byte 3"),
        (["report", "--track", "sotoo"], "no track 'sotoo'"),
        (["report", "--since", "yesterday"], "--since"),
        (["sample", "runs/none"], "no such run"),
        ([*SPRINT, "--set", "optim.matrix.lrr=1"], "Did you mean 'lr'"),
        ([*SPRINT, "--set", "optim.matrix.name=muom"], "Did you mean 'muon'"),
        ([*SPRINT, "--set", "steps"], "wanted key=value"),
        ([*SPRINT, "--set", "model.context_len=600000", "--set", "train.batch_tokens=600000"], "too few"),
        ([*SPRINT, "--device", "tpu"], "wanted auto, cpu, cuda"),
        (
            ["train", "--track", "fineweb-small"],
            "make it with: nanorun prepare-data fineweb10B --tokenizer gpt2",
        ),
        ([*SPRINT, "--set", "optim.matrixx.lr=1"], "Did you mean 'matrix'"),
        ([*SPRINT, "--set", "train.schedule=cosin"], "Did you mean 'cosine'"),
        ([*SPRINT, "--set", "train=3"], "wanted a table of its keys, such as train.steps"),
        ([*SPRINT, "--set", "model.n_head=5"], "n_embd = 32 is not a multiple of n_head = 5"),
        ([*SPRINT, "--set", "model.n_embd=100000000"], "make model.n_embd or model.n_layer smaller"),
        ([*SPRINT, "--seed", str(2**31 - 1), "--seeds", "2"], "seed = 2147483648"),
        ([*SPRINT, "--runs", "empty.txt"], "choose another folder with --runs"),
        (["train", "--resume", "runs/none", "--set", "train.steps=3"], "--set beside --resume"),
        (["train", "--resume", "runs/none", "--seed", "3"], "--seed beside --resume"),
        (["trian"], "No such command 'trian'"),
        (["train", "--optm", "muon"], "--optim"),
        (["report", "--out", "empty.txt/report.md"], "choose another --out"),
        (["report", "--out", "."], "is a folder, and no name of a file; choose another --out"),
    ],
)
def test_bad_input_gets_a_sentence_and_exit_code_2(words, said, nanorun):
    Path("empty.txt").write_text("")
    Path("latin.txt").write_bytes("abcé".encode("latin-1"))
    code, _, err = nanorun(*words)
    assert code == 2
    assert said in err


def in_latin_1(*words):
    """Run the command line with an output that is not UTF-8; returns (exit code, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, "-m", "nanorun", *words],
        capture_output=True,
        encoding="latin-1",
        env={**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONPATH": str(REPOSITORY)},
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def test_an_output_that_cannot_take_a_page_ends_in_a_sentence_and_a_file_can():
    content = a_dict(name="\u0141")
    path = Path("records/sotu", content["id"], "record.json")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))
    words = ("report", "--track", "sotu", "--format", "html")
    code, _, err = in_latin_1(*words)
    assert code == 2
    assert "nanorun: error: the output takes latin-1 alone, and U+" in err
    assert "PYTHONIOENCODING=utf-8, or name a file with --out FILE" in err
    code, _, err = in_latin_1(*words, "--out", "page.html")
    assert code == 0, err
    assert "\u0141" in Path("page.html").read_text(encoding="utf-8")


def test_an_objection_signed_with_a_letter_that_the_output_lacks_is_written_and_shown_as_an_escape():
    content = a_dict()
    folder = Path("records/sotu", content["id"])
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(content))
    code, out, err = in_latin_1("contest", str(folder), "--reason", "seen before", "--by", "\u0141ukasz")
    assert code == 0, err
    assert r"\u0141ukasz" in out
    assert len(list((folder / "reproductions").iterdir())) == 1


def test_a_name_that_is_not_utf_8_ends_in_a_sentence(nanorun, monkeypatch):
    def refuse():
        "\udcff".encode()

    monkeypatch.setattr(cli, "app", refuse)
    code, _, err = nanorun("report")
    assert code == 2
    assert "holds U+DCFF, a byte that is not UTF-8" in err


def test_a_full_disk_leaves_nothing_half_written(nanorun, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    nanorun("prepare-data", "shakespeare")
    monkeypatch.setattr(os, "fsync", full)
    code, _, err = nanorun(*SPRINT)
    assert code == 2
    assert "No space left" in err
    assert not [
        path for path in Path("runs").rglob("*") if "partial" in path.name or path.name.startswith("step-")
    ]
    assert not list(Path().glob("records/*/*"))
    assert nanorun("prepare-data", "sotu")[0] == 2
    assert not list(Path("data").glob("sotu/*"))


def test_ctrl_c_saves_a_checkpoint_and_says_how_to_resume(tmp_path):
    words = [sys.executable, "-m", "nanorun", *SPRINT, "--no-record"]
    words += ["--compile", "off", "--set", "train.steps=100000", "--set", "log.every_steps=1"]
    words += ["--set", "validation.every_steps=0"]
    run = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not any(p.stat().st_size > 200 for p in Path().glob("runs/*/metrics.jsonl")):
            assert time.monotonic() < deadline
            assert run.poll() is None
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 75, err
    folder = Path(re.search(r"nanorun train --resume (\S+)", err)[1])
    assert list(folder.glob("checkpoints/step-*/model.safetensors"))


def test_a_pipe_that_nobody_reads_any_more_ends_no_run(capfd):
    reader, writer = os.pipe()
    os.close(reader)
    console = cli._console(False)
    with os.fdopen(writer, "w") as file:
        console.file = file
        console.print("stopping after this step")
        console.print("and on")


def test_the_exit_code_of_the_rank_that_ends_last_is_told_whole(tmp_path, monkeypatch):
    told = tmp_path / "told"
    told.write_text("")
    monkeypatch.setenv("NANORUN_EXIT_CODE", str(told))
    for code in (75, 1):
        cli._tell_code(code)
        assert told.read_text() == str(code)


@pytest.mark.parametrize("words", [["--input", "a.txt", "b.txt", "c.txt"], ["a.txt", "b.txt", "c.txt"]])
def test_files_that_a_shell_made_of_a_glob_are_all_read(nanorun, words):
    for name in ("a", "b", "c"):
        Path(f"{name}.txt").write_text(f"document {name} " * 9)
    code, out, err = nanorun("prepare-data", "text", *words, "--dry-run", "--json")
    assert code == 0, err
    assert [file["name"] for file in json.loads(out)["files"]] == ["a.txt", "b.txt", "c.txt"]


def test_a_path_beside_what_reads_none_is_refused(nanorun):
    for words in (["sotu", "a.txt"], ["text", "a.txt", "--check", "data"]):
        code, _, err = nanorun("prepare-data", *words)
        assert code == 2
        assert "a.txt" in err
        assert "leave it out" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_first_step_ends_in_a_sentence_and_exit_code_75(nanorun, monkeypatch, number):
    monkeypatch.setattr("nanorun.training.train.set_up", lambda *words: signal.raise_signal(number))
    code, _, err = nanorun(*SPRINT)
    assert code == 75
    assert f"nanorun: stopped by {number.name} before the first step: nothing is lost" in err
    assert signal.getsignal(number) == signal.SIG_DFL
    assert not list(Path().glob("runs/*"))


def test_a_signal_that_a_job_has_ignored_until_a_run_listens_stays_ignored(nanorun, monkeypatch):
    def seeds(*words, **options):
        signal.raise_signal(signal.SIGTERM)
        return [{"trained": True}]

    monkeypatch.setattr("nanorun.training.run.train_seeds", seeds)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert nanorun(*SPRINT)[0] == 0
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_exit_code_told_before_a_run_began_is_not_taken_for_its_own(nanorun, monkeypatch, tmp_path):
    told = tmp_path / "told"
    told.write_text("1")
    monkeypatch.setenv("NANORUN_EXIT_CODE", str(told))
    # What a run that is killed would leave.
    seen = []
    monkeypatch.setattr(
        "nanorun.training.run.train_seeds",
        lambda *words, **options: [{"told": seen.append(told.read_text())}],
    )
    assert nanorun(*SPRINT)[0] == 0
    assert seen == [""]
    told.write_text("1")
    monkeypatch.setenv("LOCAL_RANK", "1")  # may be late, and another rank have failed
    assert nanorun(*SPRINT)[0] == 0
    assert told.read_text() == "1"
