"""Runs on a mix of corpora: what they train on, what their records say, and how they are taken up again."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from corpora_samples import BYTE, learnable, put_corpus
from rich.console import Console

from nanorun.config import resolve
from nanorun.data.mix import mixed_rows
from nanorun.errors import RunFailed, Stopped, UserError
from nanorun.records.agreement import SAME_BITS
from nanorun.records.record import read_record, read_records
from nanorun.records.report import TrackView, build_table
from nanorun.tables import read_toml
from nanorun.tracks import load_track
from nanorun.training import machine, setup
from nanorun.training import reproduce as reproduce_module
from nanorun.training.distributed import Ranks
from nanorun.training.reproduce import Request, reproduce
from nanorun.training.run import resume_run, train_seeds
from nanorun.training.setup import Options
from nanorun.training.step import Stepper
from nanorun.training.taking_up import Begun

QUIET = Console(quiet=True)
TINY = [
    *("train.steps=6", "train.batch_tokens=512", "validation.from_step=6", "log.every_steps=1"),
    *("model.n_layer=1", "model.n_head=2", "model.n_embd=32", "model.context_len=64"),
]
MIX = 'data.mix={text = 0.5, "./novels" = 0.5}'


@pytest.fixture(autouse=True)
def corpora(tmp_path, monkeypatch):
    """Three corpora in bytes, `text` as the track wants it, in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    validated = learnable(1, 1500)
    validated[::100] = 256  # the end of text, which stands for no byte
    put_corpus(Path("data/text"), "text", learnable(0, 5000), validated)
    put_corpus(Path("novels"), "novels", learnable(2, 4000), learnable(3, 1000))
    put_corpus(Path("poems"), "poems", learnable(4, 3000), learnable(5, 1000))


def train(*settings, console=QUIET, seed=0, track="text", **options):
    return train_seeds(track, "muon", [*TINY, *settings], seed, 1, options, console)[0]


def records():
    found, skipped = read_records(Path("records"))
    assert skipped == []
    return found


def folder_of(stopped):
    return Path(str(stopped.value).rpartition(" ")[2])


def test_a_record_of_a_mix_holds_its_corpora_and_does_not_count_on_a_track_that_fixes_another():
    out = io.StringIO()
    train(MIX, console=Console(file=out, width=300))
    train()
    by_mix = {bool(record.corpus.mix): record for record in records()}
    mixed, alone = by_mix[True], by_mix[False]
    assert {(one.name, one.share) for one in mixed.corpus.mix} == {("text", 0.5), ("novels", 0.5)}
    hashes = {one.name: one.manifest_sha256 for one in mixed.corpus.mix}
    assert hashes["text"] == mixed.corpus.manifest_sha256 == alone.corpus.manifest_sha256
    assert hashes["novels"] == json.loads(Path("novels/manifest.json").read_text())["sha256"]
    assert mixed.validation_tokens == alone.validation_tokens == 1499
    assert mixed.corpus.train_tokens == alone.corpus.train_tokens == 5000
    assert mixed.final_weights_sha256 != alone.final_weights_sha256
    assert mixed.initial_weights_sha256 == alone.initial_weights_sha256
    rows = build_table(TrackView.of(load_track("text")), records()).rows
    assert {row.why.partition(" (")[0] for row in rows} == {
        "trained on a mix of corpora",
        "1 seed of the 3 that the rule asks for",
    }
    said = out.getvalue()
    assert "a mix of novels 50 %, text 50 % in byte tokens (9,000 to train on), validated on text" in said
    assert "note: track text fixes its corpus, so a run on a mix does not count there" in said
    assert "mix" not in json.loads((Path("records/text") / alone.id / "record.json").read_text())["corpus"]


def test_a_step_trains_on_the_rows_of_the_mix_and_ranks_share_them(monkeypatch):
    config = resolve(load_track("text"), "muon", [*TINY, MIX])
    steppers = {}
    for ranks in (Ranks(), Ranks(0, 2, 0), Ranks(1, 2, 1)):
        # What is asked of the others is not what this is about.
        monkeypatch.setattr(Ranks, "wait", lambda self: None)
        monkeypatch.setattr(Ranks, "broadcast_text", lambda self, text: text or "runs")
        track, console = load_track("text"), Console(quiet=True)
        clock, device = setup.TrainingClock(), setup.torch.device("cpu")
        run = setup.set_up(config, track, Options(), console, clock, device, ranks, Begun())
        steppers[ranks.rank, ranks.n_ranks] = run.stepper
    mixed = steppers[0, 1].tokens
    for step in (0, 3, 20_000):
        whole = steppers[0, 1].batch(step, 0, 8)[0].numpy()
        wanted = mixed_rows(mixed, seed=0, first_row=8 * step, n_rows=8, context_len=64)[0]
        np.testing.assert_array_equal(whole, wanted)
        shares = [steppers[rank, 2].batch(step, 0, 4)[0].numpy() for rank in (0, 1)]
        np.testing.assert_array_equal(whole, np.concatenate(shares))


def test_a_run_on_a_mix_that_was_stopped_ends_with_the_bits_of_one_never_stopped(
    monkeypatch, tmp_path, stop_in_step
):
    whole = train(MIX)
    stop_in_step(3)
    with pytest.raises(Stopped) as stopped:
        train(MIX)
    # Folders of the mix are looked for where the run began.
    Path("elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resumed = resume_run(tmp_path / folder_of(stopped), QUIET)
    assert resumed["final_weights_sha256"] == whole["final_weights_sha256"]


@pytest.mark.parametrize("change", ["other text", "other share", "no longer there"])
def test_a_run_is_not_taken_up_again_on_another_mix(monkeypatch, change, stop_in_step):
    stop_in_step(3)
    with pytest.raises(Stopped) as stopped:
        train(MIX)
    folder = folder_of(stopped)
    if change == "other share":
        path = folder / "config.toml"
        path.write_text(path.read_text().replace('"./novels" = 0.5', '"./novels" = 0.6'))
        said = r"it belongs to a run with another config\.toml"
    elif change == "other text":
        put_corpus(Path("novels"), "novels", learnable(9, 4000), learnable(3, 1000))
        said = r"trained on another mix: what is here of novels has other content"
    else:
        shutil.rmtree("novels")
        said = r"'./novels' is neither a corpus \(.*\) nor a folder of prepared data"
    with pytest.raises(UserError, match=said):
        resume_run(folder, QUIET)


def test_an_embedded_corpus_of_the_mix_is_prepared_first_in_the_runs_tokenizer():
    out = io.StringIO()
    train("data.mix={text = 0.7, shakespeare = 0.3}", console=Console(file=out, width=300), record=False)
    assert "preparing the embedded corpus 'shakespeare' first" in out.getvalue()
    made = json.loads(Path("data/shakespeare-byte/manifest.json").read_text())
    assert made["tokenizer"]["name"] == "byte"


@pytest.mark.parametrize(
    ("mix", "data", "said"),
    [
        (
            "{shakespeare = 1}",
            "data/text",
            r"--data data/text is the folder of 'text' alone, .* 'shakespeare' too",
        ),
        ("{sotuu = 1}", "data", r"'sotuu' is neither a corpus .* nor a folder .*Did you mean 'sotu'"),
        ('{"./empty" = 1}', "data", r"empty: no prepared corpus here"),
        ('{"./novels" = 1, "novels" = 1}', "data", r"are the same corpus"),
        ('{"./tiny" = 1}', "data", r"tiny \(train\): 100 tokens are too few for a context of 64"),
        ('{"./chars" = 1}', "data", r"share one vocabulary, and './chars' holds 'chars' in 'char' tokens"),
    ],
)
def test_a_mix_that_cannot_be_read_is_refused_before_a_folder_is_made(mix, data, said):
    Path("empty").mkdir()
    put_corpus(Path("tiny"), "tiny", learnable(0, 100), learnable(0, 100))
    put_corpus(
        Path("chars"),
        "chars",
        learnable(0, 500, 2),
        learnable(0, 500, 2),
        tokenizer={**BYTE, "name": "char", "vocab_size": 256, "chars": "x" * 256},
    )
    with pytest.raises(UserError, match=said):
        train(f"data.mix={mix}", data=Path(data))
    assert not Path("runs").exists()


def test_a_corpus_that_the_mix_leaves_out_is_validated_on_all_the_same():
    out = io.StringIO()
    train('data.mix={"./novels" = 2, "./poems" = 1}', console=Console(file=out, width=300))
    (record,) = records()
    assert "a mix of novels 66.67 %, poems 33.33 % in byte tokens (7,000 to train on)" in out.getvalue()
    assert record.corpus.name == "text"
    assert record.validation_tokens == 1499
    assert sorted(one.share for one in record.corpus.mix) == [1 / 3, 2 / 3]


def test_one_corpus_by_its_name_is_the_runs_own_wherever_data_points():
    by_root = train("data.mix={text = 1}", record=False)
    by_folder = train("data.mix={text = 1}", record=False, data=Path("data/text"))
    assert by_root["final_weights_sha256"] == by_folder["final_weights_sha256"]


def a_track_that_fixes_a_mix():
    shutil.copytree(load_track("text").folder.resolve(), "configs/mixed")
    path = Path("configs/mixed/track.toml")
    path.write_text(path.read_text() + '\n[fixed.data.mix]\ntext = 0.5\n"./novels" = 0.5\n')


def test_a_track_that_fixes_a_mix_trains_on_it_and_refuses_another():
    a_track_that_fixes_a_mix()
    train(track="mixed")
    (record,) = records()
    assert {one.name for one in record.corpus.mix} == {"text", "novels"}
    (row,) = build_table(TrackView.of(load_track("mixed")), records()).rows
    assert row.why == "1 seed of the 3 that the rule asks for"
    for other in ('{text = 0.5, "./novels" = 0.5, "./poems" = 0.1}', "{text = 0.6}"):
        with pytest.raises(UserError, match=r"track 'mixed' fixes data\.mix"):
            train(f"data.mix={other}", track="mixed")


@pytest.fixture
def _a_clean_commit_and_a_quiet_machine(monkeypatch):
    clean = {"version": "0.1.0", "commit": "a" * 40, "dirty": False, "patch": None}
    monkeypatch.setattr(machine, "code_identity", lambda: (clean, None))
    monkeypatch.setattr(reproduce_module, "_load", lambda: 0.0)
    monkeypatch.setattr("nanorun.records.agreement.SAME_SECONDS", 1e6)


@pytest.mark.usefixtures("_a_clean_commit_and_a_quiet_machine")
def test_a_record_on_a_mix_is_reproduced_from_wherever_its_corpora_lie():
    folder = Path(train('data.mix={text = 7, "./novels" = 3}')["record"])
    shutil.move("novels", "data/somewhere")
    result = reproduce(Request(str(folder), by="Ada"), QUIET)
    assert result["verdict"] == "agrees"
    assert result["agreement"]["same_final_weights"]
    assert result["agreement"]["largest_difference"] < SAME_BITS
    run = next(Path(result["run"]).glob("records/*/*"))
    assert read_record(run.resolve()).corpus.mix == read_record(folder.resolve()).corpus.mix


@pytest.mark.usefixtures("_a_clean_commit_and_a_quiet_machine")
def test_a_checkout_of_the_records_commit_is_told_where_the_corpora_lie(tmp_path):
    folder = Path(train(MIX)["record"])
    plan = reproduce_module._planned(Request(str(folder), by="Ada"), QUIET)
    Path("private").mkdir()
    reproduce_module._words_of_a_new_run(plan, Path("private"), tmp_path)
    preset = read_toml(Path("private/configs/text/muon.toml"))
    assert preset["data"]["mix"] == {str(tmp_path / "data/text"): 0.5, str(tmp_path / "novels"): 0.5}
    assert preset["data"]["corpus"] == "text"


@pytest.mark.usefixtures("_a_clean_commit_and_a_quiet_machine")
def test_a_record_on_a_mix_that_is_not_here_is_not_run():
    folder = Path(train(MIX)["record"])
    put_corpus(Path("novels"), "novels", learnable(9, 4000), learnable(3, 1000))
    with pytest.raises(
        UserError, match=r"its part 'novels' \(manifest [0-9a-f]{12}\) is in no folder of data"
    ):
        reproduce(Request(str(folder), by="Ada"), QUIET)
    content = json.loads((folder / "record.json").read_text())
    del content["corpus"]["mix"]
    (folder / "record.json").write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=r"contradicts itself: its config names mix, and its corpus holds none"
    ):
        reproduce(Request(str(folder), by="Ada"), QUIET)


def test_the_command_line_takes_a_mix(nanorun):
    words = ["train", "--track", "text", *(word for one in TINY for word in ("--set", one)), "--json"]
    code, out, err = nanorun(*words, "--mix", "text:7,./novels:3")
    assert code == 0, err
    (record,) = records()
    assert {(one.name, one.share) for one in record.corpus.mix} == {("text", 0.7), ("novels", 0.3)}
    assert record.config["data"]["mix"] == {"text": 7.0, "./novels": 3.0}
    result = json.loads(out)
    assert result["bits_per_byte"] == record.bits_per_byte
    assert f"({record.bits_per_byte:.4f} bits a byte)" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mix", "sotu"], "--mix sotu: 'sotu' is no corpus with its share; wanted CORPUS:SHARE"),
        (["--mix", "sotu:0.7,"], "'' is no corpus with its share"),
        (["--mix", "sotu:much"], "'sotu:much' is no corpus with its share"),
        (["--mix", "sotu:0"], "'sotu:0' is no corpus with its share"),
        (["--mix", "sotu:-1"], "'sotu:-1' is no corpus with its share"),
        (["--mix", "sotu:nan"], "'sotu:nan' is no corpus with its share"),
        (["--mix", ":1"], "':1' is no corpus with its share"),
        (["--mix", "sotu:1,sotu:2"], "'sotu' is there twice"),
        (["--mix", ",".join(f"./{n}:1" for n in range(33))], "data.mix holds 33 corpora: wanted at most 32"),
        (["--set", "data.mix=3"], "data.mix = 3: wanted a table of its keys, such as data.mix.sotu"),
        (["--set", "data.mix.sotu=0"], "data.mix.sotu = 0: input should be greater than 0"),
        (["--set", "data.mix.sotu=true"], "data.mix.sotu = True"),
        (["--set", "data.mix.sotu=many"], "data.mix.sotu = 'many'"),
        (["--resume", "runs/none", "--mix", "sotu:1"], "--mix beside --resume"),
    ],
)
def test_a_mix_that_is_none_gets_a_sentence_and_exit_code_2(words, said, nanorun):
    code, _, err = nanorun("train", *words)
    assert code == 2
    assert said in err


def test_a_whole_mix_takes_the_place_of_a_presets_and_a_share_of_it_changes_one():
    shutil.copytree(load_track("text").folder.resolve(), "configs/preset")
    path = Path("configs/preset/muon.toml")
    path.write_text(path.read_text() + "\n[data.mix]\ntext = 0.5\nsotu = 0.5\n")
    track = load_track("preset")
    assert resolve(track, "muon").data.mix == {"text": 0.5, "sotu": 0.5}
    assert resolve(track, "muon", ["data.mix={sotu = 1}"]).data.mix == {"sotu": 1.0}
    assert resolve(track, "muon", ["data.mix.sotu=2"]).data.mix == {"text": 0.5, "sotu": 2.0}


def test_a_loss_in_bits_a_byte_stands_in_metrics_record_and_result():
    result = train("validation.every_steps=3", "validation.from_step=0")
    (record,) = records()
    # Of 1499 predicted tokens 14 are ends of text.
    in_bits = 1499 / 1485 / np.log(2)
    assert record.bits_per_byte == result["bits_per_byte"]
    assert record.bits_per_byte == pytest.approx(record.final_val_loss * in_bits, rel=1e-12)
    lines = (Path(result["run"]) / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "val_loss" in row]
    assert [row["step"] for row in rows] == [3, 6]
    assert [row["bits_per_byte"] for row in rows] == pytest.approx(
        [row["val_loss"] * in_bits for row in rows]
    )


def test_a_run_that_fails_on_a_mix_names_its_rows(monkeypatch):
    real = Stepper.backward
    monkeypatch.setattr(Stepper, "backward", lambda self, *pair: real(self, *pair) * float("nan"))
    with pytest.raises(RunFailed, match=r"training rows 0 to 7 of seed 0"):
        train(MIX)
