"""Jobs that `nanorun launch --slurm` prints, under a Slurm of their own on this machine: what becomes of them.

A cluster of two nodes is started in a temporary folder, both on this host, with a munge of its own, and ended again.
Tiny runs on CPUs are submitted and disturbed. What is asked of each: that it ends as it should, was queued again as
often as it should, and where it finished has the weights of a run that nobody disturbed.

    python scripts/try_slurm.py                 all cases
    python scripts/try_slurm.py --case warned   one of them, repeatable
    python scripts/try_slurm.py --require       fail where there is no Slurm, instead of skipping

Debian's packages: slurmctld slurmd slurm-client munge. As root, or as anybody where Slurm lets them.
"""

from __future__ import annotations

import argparse
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "squeue", "srun")
START_SECONDS = 30.0
CLEAR_SECONDS = 60.0
JOB_SECONDS = 240.0
"""The longest that a case may take; Slurm's warning comes up to a minute early or late."""
GRACE_SECONDS = 30
CONFIG = """\
ClusterName=nanorun
SlurmctldHost=localhost
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
KillWait=30
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={first} CPUs={cpus} State=UNKNOWN
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={second} CPUs={cpus} State=UNKNOWN
PartitionName=common Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime={grace} PreemptMode=REQUEUE
PartitionName=urgent Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF
"""
TINY = (
    "train.steps=400",
    "train.batch_tokens=2048",
    "validation.from_step=400",
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=32",
    "log.every_steps=1",
)


class NoSlurm(Exception):
    """There is no Slurm here, or it does not start; the text says why."""


class Failed(Exception):
    """A job did not become what it should."""


class Cluster:
    """A Slurm of two nodes on this host, whose files and jobs lie in `folder`."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        missing = [name for name in PROGRAMS if not shutil.which(name)]
        if missing:
            raise NoSlurm(f"{', '.join(missing)} not installed")
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        key = self._configure()
        files = [f"--{what}-file={folder}/munge.{what}" for what in ("pid", "log", "seed")]
        places = [f"--socket={folder}/munge.socket", f"--key-file={key}", *files]
        self._start(stack, "munged", "--foreground", "--force", *places)
        self._until(lambda: (folder / "munge.socket").exists(), "munged")
        self._start(stack, "slurmctld", "-D")
        for node in ("n1", "n2"):
            self._start(stack, "slurmd", "-D", "-N", node)
        stack.callback(self.clear)
        self._until(lambda: self.ask("sinfo", "-h", "-o", "%D %t") == "2 idle", "slurmctld and slurmd")

    def _configure(self) -> Path:
        """Write the configuration, and return the path of a new key for munge."""
        (self.folder / "state").mkdir()
        controller, first, second = _free_ports(3)
        text = CONFIG.format(
            folder=self.folder,
            user=getpass.getuser(),
            cpus=os.cpu_count(),
            grace=GRACE_SECONDS,
            controller=controller,
            first=first,
            second=second,
        )
        (self.folder / "slurm.conf").write_text(text)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        return key

    def _start(self, stack: ExitStack, *words: str) -> None:
        with open(self.folder / f"{words[0]}.out", "ab") as out:
            process = subprocess.Popen(
                words, stdout=out, stderr=out, env=self.environment, start_new_session=True
            )
        stack.callback(_end, process)

    def _until(self, true: Callable[[], bool], what: str) -> None:
        try:
            wait_until(true, START_SECONDS, what)
        except Failed as error:
            tails = [path.read_text(errors="replace")[-600:] for path in self.folder.glob("*.out")]
            raise NoSlurm(f"{error}: {' '.join(tails)}") from None

    def clear(self) -> None:
        """Cancel all jobs, and wait until nothing of them is left."""
        self.ask("scancel", "--user", getpass.getuser())
        wait_until(lambda: not self.ask("squeue", "-h"), CLEAR_SECONDS, "the end of all jobs")

    def ask(self, *words: str) -> str:
        """Return what a command of Slurm prints; "" where it fails."""
        done = subprocess.run(words, capture_output=True, text=True, env=self.environment, timeout=60)
        return done.stdout.strip()

    def submit(self, script: Path, *options: str) -> str:
        """Return the id of a job."""
        job = self.ask("sbatch", "--parsable", f"--output={script}.out", *options, str(script))
        if not job:
            raise Failed(f"sbatch refused {script}")
        return job

    def state(self, job: str) -> dict[str, str]:
        """Return what Slurm knows of a job, such as JobState, Restarts and ExitCode."""
        words = self.ask("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ended(self, job: str) -> dict[str, str]:
        """Return what Slurm knows of a job after it has ended for good."""
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_until(lambda: self.state(job).get("JobState") in final, JOB_SECONDS, f"the end of job {job}")
        return self.state(job)


class Work:
    """A folder with runs, and the jobs that train them."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        self.environment = {
            **cluster.environment,
            "OMP_NUM_THREADS": "1",
            "SLURM_CONF": cluster.environment["SLURM_CONF"],
        }

    def words(self, name: str, *more: str) -> list[str]:
        settings = [word for one in TINY for word in ("--set", one)]
        return ["--track", "shakespeare-sprint", "--run", name, "--device", "cpu", *settings, *more]

    def nanorun(self, *words: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "nanorun", *words],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=self.environment,
        )
        if done.returncode:
            raise Failed(f"nanorun {words[0]} ended with {done.returncode}: {done.stderr[-1000:]}")

    def script(self, name: str, *options: str, more: tuple[str, ...] = ()) -> Path:
        """Return the batch script of a run on CPUs."""
        path = self.folder / f"{name}.sh"
        shape = ["--gpus-per-node", "0", "--cpus", "1", "--out", str(path)]
        self.nanorun("launch", "--slurm", *shape, *options, "--", *self.words(name, *more))
        return path

    def rows(self, name: str) -> int:
        """Return how many lines the metrics of a run have."""
        try:
            return (self.folder / "runs" / name / "metrics.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0

    def under_way(self, name: str) -> None:
        """Wait until a run has come some steps far."""
        wait_until(lambda: self.rows(name) > 30, JOB_SECONDS, f"some steps of run {name}")

    def weights(self, name: str) -> str:
        return str(
            json.loads((self.folder / "runs" / name / "result.json").read_text())["final_weights_sha256"]
        )

    def expect(self, job: str, name: str, **wanted: str) -> None:
        """Raise Failed, with the job's output, unless it ended as wanted."""
        found = self.cluster.ended(job)
        wrong = {key: found.get(key) for key in wanted if found.get(key) != wanted[key]}
        if wrong:
            output = (self.folder / f"{name}.sh.out").read_text(errors="replace")[-3000:]
            raise Failed(f"wanted {wanted}, and found {wrong}; its output:\n{output}")


FINISHED = {"JobState": "COMPLETED", "ExitCode": "0:0"}
TWO_BY_TWO = ("--nodes", "2", "--ranks-per-node", "2")
QUIET = "two_nodes_quiet"


def on_two_nodes_quietly(work: Work) -> None:
    """The run of TWO_BY_TWO that nobody disturbs, once."""
    if not work.rows(QUIET):
        job = work.cluster.submit(work.script(QUIET, *TWO_BY_TWO))
        work.expect(job, QUIET, Restarts="0", **FINISHED)


def warned(work: Work) -> None:
    """A job that gets the signal Slurm warns with saves, is queued again and finishes."""
    job = work.cluster.submit(work.script("warned"))
    work.under_way("warned")
    work.cluster.ask("scancel", "--batch", "--signal=USR1", job)
    work.expect(job, "warned", Restarts="1", **FINISHED)


def time_limit(work: Work) -> None:
    """A job whose time is over before the run is, warned by Slurm itself."""
    script = work.script(
        "time_limit", "--time", "2", "--warn-seconds", "110", more=("--set", "train.batch_tokens=65536")
    )
    job = work.cluster.submit(script)
    wait_until(lambda: work.cluster.state(job).get("Restarts") == "1", JOB_SECONDS, "the warning")
    work.cluster.ask("scancel", job)
    work.cluster.ended(job)


def preempted(work: Work) -> None:
    """A job that makes room for an urgent one goes on after it."""
    on_two_nodes_quietly(work)
    job = work.cluster.submit(work.script("preempted", *TWO_BY_TWO))
    work.under_way("preempted")
    urgent = work.folder / "urgent.sh"
    urgent.write_text("#!/bin/bash\nsleep 2\n")
    work.cluster.submit(urgent, "--partition=urgent", "--nodes=2", "--exclusive")
    work.expect(job, "preempted", Restarts="1", **FINISHED)


def requeued(work: Work) -> None:
    """A job that an administrator queues again, which gives it no time to save, loses some steps and no bits."""
    job = work.cluster.submit(work.script("requeued", more=("--set", "checkpoint.every_steps=20")))
    work.under_way("requeued")
    work.cluster.ask("scontrol", "requeue", job)
    work.expect(job, "requeued", Restarts="1", **FINISHED)


def two_nodes(work: Work) -> None:
    """Two ranks on each of two nodes, warned once."""
    on_two_nodes_quietly(work)
    job = work.cluster.submit(work.script("two_nodes", *TWO_BY_TWO))
    work.under_way("two_nodes")
    work.cluster.ask("scancel", "--batch", "--signal=USR1", job)
    work.expect(job, "two_nodes", Restarts="1", **FINISHED)


def cancelled(work: Work) -> None:
    """A job that its user cancels stays cancelled; submitted again, it goes on with the run."""
    script = work.script("cancelled")
    job = work.cluster.submit(script)
    work.under_way("cancelled")
    work.cluster.ask("scancel", job)
    work.expect(job, "cancelled", JobState="CANCELLED", Restarts="0")
    work.expect(work.cluster.submit(script), "cancelled", Restarts="0", **FINISHED)


def failed(work: Work) -> None:
    """A run that fails is not queued again, by itself or under torchrun."""
    for name, ranks in (("failed", "1"), ("failed_ranks", "2")):
        script = work.script(
            name, "--ranks-per-node", ranks, more=("--set", "train.steps=5", "--require-target")
        )
        work.expect(work.cluster.submit(script), name, JobState="FAILED", ExitCode="1:0", Restarts="0")


CASES: dict[str, tuple[Callable[[Work], None], str]] = {
    "warned": (warned, "reference"),
    "preempted": (preempted, QUIET),
    "requeued": (requeued, "reference"),
    "cancelled": (cancelled, "reference"),
    "two_nodes": (two_nodes, QUIET),
    "failed": (failed, ""),
    "time_limit": (time_limit, ""),
}
"""Each with the run whose weights it has to end with; "" where it compares none."""


def main() -> int:
    """Return the exit code: 0 all went well, or there is no Slurm; 1 something did not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="only this one; repeatable")
    parser.add_argument("--require", action="store_true", help="fail where there is no Slurm")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the daemons are ended too
    with (
        tempfile.TemporaryDirectory(prefix="nanorun-slurm-", ignore_cleanup_errors=True) as name,
        ExitStack() as stack,
    ):
        folder = Path(name)
        try:
            work = Work(folder, Cluster(folder, stack))
        except NoSlurm as reason:
            print(f"skipped: {reason}")
            return 1 if asked.require else 0
        return _try(work, asked.case or list(CASES))


def _try(work: Work, cases: list[str]) -> int:
    work.nanorun("train", *work.words("reference"))
    n_failed = 0
    for case in cases:
        began, (run, reference) = time.monotonic(), CASES[case]
        try:
            run(work)
            if reference and work.weights(case) != work.weights(reference):
                raise Failed("it ended with other weights than a run that nobody disturbed")
            ending = "ok"
        except Failed as error:
            n_failed += 1
            ending = f"FAILED: {error}"
        work.cluster.clear()
        print(f"{case:<12} {time.monotonic() - began:5.1f} s  {ending}", flush=True)
    return 1 if n_failed else 0


def wait_until(true: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until something is true; raises Failed, with `what` was waited for, after `seconds`."""
    last = time.monotonic() + seconds
    while not true():
        if time.monotonic() > last:
            raise Failed(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_ports(n: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


if __name__ == "__main__":
    sys.exit(main())
