"""Jobs for clusters: what the printed scripts hold, that nothing in them runs unasked, and what they do when run."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.run import parse_args

from nanorun import cli
from nanorun.launch import quoted

SPRINT = ("--track", "shakespeare-sprint")
HOSTILE = [
    "a b",
    "it's",
    '"; touch owned; "',
    "$(touch owned)",
    "`touch owned`",
    "one\ntouch owned",
    "\x1b[2J\x07",
    "\udcff\udc80",
    "{{ 7 * 7 }} {% x %}",
    "\\",
    "\\x41\\'",
    "~ * ? [a] {a,b} !1 #",
    "é ☃ 𝄞",
    "-n",
    "",
    "\u2028\ufeff",
]
REPOSITORY = Path(cli.__file__).parent.parent


def by_bash(script: str) -> list[bytes]:
    """Return the words that a line of shell leaves in an array `words`."""
    done = subprocess.run(
        ["bash"],
        input=f"{script}\nprintf '%s\\0' \"${{words[@]}}\"".encode(),
        capture_output=True,
        check=True,
    )
    return done.stdout.split(b"\0")[:-1]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=20))
def test_bash_reads_back_any_words(words):
    line = " ".join(map(quoted, [*words, *HOSTILE]))
    assert line.isprintable()
    assert by_bash(f"words=({line})") == [os.fsencode(word) for word in [*words, *HOSTILE]]


def test_a_word_without_control_codes_is_quoted_as_shlex_does():
    assert shlex.split(quoted("it's $(so)")) == ["it's $(so)"]


@pytest.fixture
def launch(nanorun):
    """Return a function from words of `nanorun launch` to what it prints, which has to be sound shell."""

    def printed(*words):
        code, out, err = nanorun("launch", *words)
        assert code == 0, err
        return out

    return printed


def slurm(launch, *options, words=SPRINT):
    script = launch("--slurm", *options, "--", *words)
    subprocess.run(["bash", "-n"], input=script.encode(), check=True)
    return script


def sky(launch, *options, words=SPRINT):
    task = yaml.safe_load(launch("--sky", "--bucket", "s3://mine/runs", *options, "--", *words))
    for key in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[key].encode(), check=True)
    return task


def words_of(script: str) -> list[bytes]:
    line = next(line.strip() for line in script.splitlines() if line.strip().startswith("train=("))
    return by_bash(line.replace("train=(", "words=(", 1))


@pytest.mark.parametrize("word", HOSTILE)
def test_hostile_words_reach_train_as_they_are_and_run_nothing(word, launch, tmp_path):
    words = (*SPRINT, "--wandb=off", f"--data={word}", "--run", "mine")
    wanted = [os.fsencode(one) for one in ("nanorun", "train", *words)]
    assert words_of(slurm(launch, "--gpus-per-node", "0", words=words)) == wanted
    assert words_of(sky(launch, "--gpus-per-node", "0", words=words)["run"])[: len(wanted)] == wanted
    assert not (tmp_path / "owned").exists()


def test_a_hostile_folder_is_gone_to_and_nothing_else(launch, tmp_path, monkeypatch):
    folder = tmp_path / "$(touch owned)\n'x"
    folder.mkdir()
    monkeypatch.setattr(Path, "cwd", lambda: folder)
    script = slurm(launch)
    line = next(line for line in script.splitlines() if line.startswith("cd -- "))
    gone = subprocess.run(["bash", "-c", f"{line}\npwd"], capture_output=True, text=True, check=True).stdout
    assert gone == f"{folder}\n"
    assert not list(tmp_path.rglob("owned"))


@pytest.mark.parametrize(
    "option", ["--partition", "--account", "--time", "--accelerator", "--infra", "--bucket"]
)
@pytest.mark.parametrize("value", ["a b", "a\n#SBATCH --wrap=x", "$(x)", 'a"b', "", "a\x07"])
def test_a_directive_that_is_no_plain_word_is_refused(option, value, nanorun):
    kind = "--slurm" if option in ("--partition", "--account", "--time") else "--sky"
    rest = [] if kind == "--slurm" or option == "--bucket" else ["--bucket", "s3://mine"]
    rest += [] if kind == "--slurm" or option == "--accelerator" else ["--accelerator", "H100"]
    code, out, err = nanorun("launch", kind, option, value, *rest, "--", *SPRINT)
    assert (code, out) == (2, "")
    assert option in err
    assert "\x07" not in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--track", "sotuu"], "Did you mean 'sotu'?"),
        ([*SPRINT, "--optim", "muonn"], "Did you mean 'muon'?"),
        ([*SPRINT, "--set", "train.stepz=3"], "train.steps"),
        ([*SPRINT, "--set", "optim.default.lrr=3"], "lrr"),
        ([*SPRINT, "--set", "optim.default.name=adamx"], "adamx"),
        ([*SPRINT, "--stepz", "3"], "--stepz"),
        ([*SPRINT, "--seed", "-1"], "--seed"),
        ([*SPRINT, "--run", "../up"], "--run"),
        ([*SPRINT, "--resume", "runs/x"], "--resume"),
        (["train", *SPRINT], "train"),
    ],
)
def test_what_train_would_refuse_is_refused_before_anything_is_queued(words, said, nanorun):
    code, out, err = nanorun("launch", "--slurm", "--", *words)
    assert (code, out) == (2, "")
    assert said in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--slurm"),
        (["--slurm", "--sky"], "--slurm"),
        (["--slurm", "--bucket", "s3://x"], "--bucket beside --slurm"),
        (["--slurm", "--on-demand"], "--spot/--on-demand beside --slurm"),
        (["--sky", "--time", "1:00"], "--time beside --sky"),
        (["--sky"], "--bucket"),
        (["--sky", "--bucket", "s3://x"], "--accelerator is missing"),
        (["--slurm", "--time", "2"], "the warning comes 120 s before its end"),
        (["--slurm", "--time", "soon"], "--time soon"),
        (["--slurm", "--sbatch", "signal=USR2"], "--sbatch signal=USR2"),
        (["--slurm", "--sbatch", "mem=1G\n#SBATCH --x"], "--mem"),
        (["--slurm", "--before", "a\nb"], "--before"),
    ],
)
def test_options_that_make_no_job_are_refused_with_the_mend(words, said, nanorun):
    code, out, err = nanorun("launch", *words, "--", *SPRINT)
    assert (code, out) == (2, "")
    assert said in err


def test_a_run_gets_one_name_that_every_requeue_has(launch):
    script = slurm(launch)
    name = words_of(script)[-1].decode()
    assert name.startswith("shakespeare-sprint-muon-s0-")
    assert f"#SBATCH --job-name={name}\n" in script
    assert f"run=runs/{name}\n" in script
    assert words_of(slurm(launch, words=(*SPRINT, "--run", "mine")))[-2:] == [b"--run", b"mine"]


def test_several_nodes_meet_on_the_first_one(launch):
    script = slurm(launch, "--nodes", "3", "--gpus-per-node", "8", "--cpus", "6", "--max-restarts", "2")
    for wanted in (
        "#SBATCH --nodes=3\n#SBATCH --ntasks-per-node=1\n#SBATCH --cpus-per-task=48\n#SBATCH --gpus-per-node=8\n",
        "--nproc-per-node=8 --max-restarts=2",
        "--nnodes=3 --rdzv-backend=c10d",
        "is_host=$((SLURM_NODEID == 0))",
        "export OMP_NUM_THREADS=6",
    ):
        assert wanted in script
    task = sky(launch, "--nodes", "3", "--gpus-per-node", "8", "--accelerator", "H100")
    assert (task["num_nodes"], task["resources"]["accelerators"]) == (3, "H100:8")
    assert "is_host=$((SKYPILOT_NODE_RANK == 0))" in task["run"]


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_torchrun_takes_none_of_the_options_of_train_for_its_own(nodes, launch):
    # Before --, it has an option that --run could be short for.
    script = slurm(launch, "--nodes", nodes, "--gpus-per-node", "4", words=(*SPRINT, "--run", "mine"))
    makes = ("python=", "train=", "torchrun", "command=")
    lines = [line for line in script.splitlines() if line.startswith(makes)]
    _, module, launcher, *words = by_bash("\n".join([*lines, 'words=("${command[@]}")']))
    assert (module, launcher) == (b"-m", b"torch.distributed.run")
    parsed = parse_args([word.decode() for word in words])
    assert (parsed.module, parsed.training_script, parsed.nproc_per_node) == (True, "nanorun", "4")
    assert parsed.training_script_args == ["train", *SPRINT, "--run", "mine"]
    assert (parsed.standalone, parsed.nnodes) == ((True, "1:1") if nodes == "1" else (False, "2"))


def test_one_process_needs_no_torchrun(launch):
    assert "torchrun" not in slurm(launch).split("on_node=")[1]
    assert "torch.distributed.run" not in sky(launch, "--accelerator", "L4")["run"]
    assert "--standalone" in slurm(launch, "--gpus-per-node", "4")


def test_data_that_a_run_cannot_make_by_itself_are_named(launch):
    assert "first: nanorun prepare-data fineweb10B" in slurm(launch, words=("--track", "fineweb-small"))
    assert "prepare-data" not in slurm(launch)
    assert "prepare-data" not in slurm(launch, words=("--track", "fineweb-small", "--data", "/data/fineweb"))
    task = sky(launch, "--accelerator", "H100", words=("--track", "fineweb-small"))
    assert "\nnanorun prepare-data fineweb10B" in task["setup"]


def test_a_task_keeps_its_runs_in_the_bucket_and_recovers_what_was_stopped(launch):
    task = sky(launch, "--accelerator", "H100", "--infra", "aws/us-east-1")
    place, mount = next(iter(task["file_mounts"].items()))
    assert mount == {"source": "s3://mine/runs", "mode": "MOUNT_CACHED"}
    assert words_of(task["run"])[-4:] == [
        b"--runs",
        f"{place}/runs".encode(),
        b"--records",
        f"{place}/records".encode(),
    ]
    assert task["resources"]["use_spot"] is True
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75]}
    assert sky(launch, "--accelerator", "H100", "--on-demand")["resources"]["use_spot"] is False


def test_skypilot_itself_takes_the_task(launch, tmp_path):
    sky_task = pytest.importorskip("sky.task", reason="skypilot is not installed")
    path = tmp_path / "task.yaml"
    path.write_text(
        launch("--sky", "--bucket", "s3://mine/runs", "--nodes", "2", "--accelerator", "H100", "--", *SPRINT)
    )
    assert sky_task.Task.from_yaml(str(path)).num_nodes == 2


def test_the_script_goes_to_a_file(launch, tmp_path):
    assert launch("--slurm", "--out", "job.sh", "--", *SPRINT) == ""
    assert (tmp_path / "job.sh").read_text().startswith("#!/bin/bash\n")


STAND_INS = {
    # srun runs the task here, as one node would.
    "srun": 'while [ "$1" != bash ]; do shift; done\nexec "$@"',
    "scontrol": 'echo "$@" >> scontrol.log',
    "squeue": 'echo "${STATE:-RUNNING}"',
}
STEP = "mkdir -p runs/mine/checkpoints/step-00000001"


@pytest.fixture
def job(launch, tmp_path):
    """Return a function that runs a batch script over programs that stand in for Slurm's and for the run.

    It returns the exit code, and what was asked of scontrol.
    """
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def run(body, *, send=None, state="RUNNING"):
        script = slurm(launch, "--gpus-per-node", "0", words=(*SPRINT, "--run", "mine"))
        run_in_its_place = tmp_path / "run.sh"
        run_in_its_place.write_text(body)
        python = next(line for line in script.splitlines() if line.startswith("python="))
        script = (
            script.replace(python, "python=bash")
            .replace("train=(nanorun", "train=(run.sh")
            .replace('"$python" -m', '"$python"')
        )
        environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
        environment |= {"SLURM_JOB_ID": "7", "STATE": state}
        process = subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=environment)
        if send is not None:
            wait_for(tmp_path / "starting")
            process.send_signal(send)
        code = process.wait(60)
        log = tmp_path / "scontrol.log"
        return code, log.read_text() if log.exists() else ""

    return run


def wait_for(path):
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"no {path}")


def ends_with(code, first=""):
    return f'{first}\nprintf {code} > "$NANORUN_EXIT_CODE"\nexit {code}\n'


def test_a_finished_run_is_not_queued_again(job):
    assert job(STEP) == (0, "")


def test_a_stopped_run_is_queued_again(job):
    assert job(ends_with(75, STEP)) == (75, "requeue 7\n")


def test_a_stopped_run_is_known_by_its_ranks_where_torchrun_ends_with_1(job):
    assert job(ends_with(75, STEP).replace("exit 75", "exit 1")) == (75, "requeue 7\n")


def test_a_run_that_finished_under_a_torchrun_that_ended_badly_is_finished(job):
    assert job(f"{STEP}\ntouch runs/mine/result.json\nexit 1") == (0, "")


@pytest.mark.parametrize("code", [1, 2])
def test_a_run_that_failed_or_was_a_mistake_is_not_queued_again(code, job):
    assert job(ends_with(code, STEP)) == (code, "")


@pytest.mark.parametrize(("step", "asked"), [(STEP, "requeue 7\n"), ("", "")])
def test_a_run_that_died_is_queued_again_while_it_gets_further(step, asked, job):
    assert job(f"{step}\nkill -9 $$") == (137, asked)


def test_a_run_that_came_no_further_is_not_queued_again(job):
    assert job(ends_with(75)) == (75, "")


def test_a_cancelled_job_stays_cancelled(job):
    assert job(ends_with(75, STEP), state="COMPLETING") == (75, "")


LISTENS_LATE = """
import os, pathlib, signal, sys, time
def stop(*_):
    os.makedirs("runs/mine/checkpoints/step-00000001")
    pathlib.Path(os.environ["NANORUN_EXIT_CODE"]).write_text("75")
    sys.exit(75)
pathlib.Path("starting").touch()
time.sleep(1.5)
signal.signal(signal.SIGUSR1, stop)
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_warning_reaches_a_run_that_was_not_listening_yet(number, job):
    body = f"exec {sys.executable} -c {shlex.quote(LISTENS_LATE)}"
    assert job(body, send=number) == (75, "requeue 7\n")


def test_a_run_writes_its_exit_code_where_the_job_said(nanorun, tmp_path, monkeypatch):
    told = tmp_path / "told"
    monkeypatch.setenv("NANORUN_EXIT_CODE", str(told))
    assert nanorun("train", "--track", "none-such")[0] == 2
    assert not told.exists()
    told.touch()
    assert nanorun("train", "--track", "none-such")[0] == 2
    assert told.read_text() == "2"
    told.write_text("130")
    assert nanorun("train", "--track", "none-such")[0] == 2
    assert told.read_text() == "2"


@pytest.mark.slow
def test_a_real_slurm_queues_a_warned_job_again_and_it_ends_with_the_same_bits():
    words = [sys.executable, "scripts/try_slurm.py", "--case", "warned"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY, timeout=280)
    if done.stdout.startswith("skipped: "):
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
