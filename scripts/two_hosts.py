"""Train on two hosts, which are two network namespaces of this machine, and cut the link between them.

A veth pair joins the two; each has a torchrun of its own, and both meet in the one that keeps the rendezvous. What has
to hold: two hosts of one rank each end with the bits of two ranks on one host. A link that is cut is noticed on both
sides within the stated time, by a message that names the other rank. Once the link is whole again the ranks start by
themselves from the newest checkpoint, and end with the same bits.

    python scripts/two_hosts.py --out records/benchmarks/two-hosts.json

It needs the right to make namespaces (root on Linux, and `ip` of iproute2). Where that is missing it says so and ends
with 0; with --require it ends with 1.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from figures import write_figures
from kill_runs import Case, a_place, differences, forget

CASE = Case("muon", "accumulation")
HANG_SECONDS = 8
SPARE_SECONDS = 6
"""What the beats, the reading and the ending may take beyond the stated time."""
LONGER = ("--set", "train.steps=2000")
"""Long enough to be cut in the middle."""
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29577
PATIENCE = 150.0
NAMED = re.compile(r"nanorun: failed: rank (\d) \([^)]*\).*")


def run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")


@contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Yield the names of two network namespaces that reach each other; raises OSError where none can be made."""
    names = [f"nanorun-{os.getpid()}-{side}" for side in "ab"]
    made: list[str] = []
    try:
        for name in names:
            run("ip", "netns", "add", name)
            made.append(name)
        run(
            "ip",
            "-n",
            names[0],
            "link",
            "add",
            "link0",
            "type",
            "veth",
            "peer",
            "name",
            "link0",
            "netns",
            names[1],
        )
        for name, address in zip(names, ADDRESSES):
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "link0")
            run("ip", "-n", name, "link", "set", "lo", "up")
            run("ip", "-n", name, "link", "set", "link0", "up")
        yield names
    finally:
        for name in made:  # the pair goes with them
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def start(names: Sequence[str], folder: str, log: Path, *extra: str) -> list[subprocess.Popen[bytes]]:
    """Return a torchrun of one rank on each host, for the run in runs/FOLDER; each writes a log of its own."""
    started = []
    for host, (name, address) in enumerate(zip(names, ADDRESSES)):
        words = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"]
        words += ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3", "--shutdown-timeout", "3"]
        words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:{PORT}", "--rdzv-id", folder]
        # A namespace shares the machine's name, so the side that keeps the rendezvous has to be told.
        words += ["--rdzv-conf", f"is_host={'false' if host else 'true'}", "--local-addr", address]
        words += ["-m", "nanorun", *CASE.words(folder), *extra]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "link0"}
        environment["NANORUN_HANG_SECONDS"] = str(HANG_SECONDS)
        with log.with_suffix(f".{host}").open("w") as output:
            started.append(subprocess.Popen(words, stdout=output, stderr=output, env=environment))
    return started


def finish(processes: Sequence[subprocess.Popen[bytes]], log: Path) -> None:
    """Wait for both torchruns; ends this program with what they wrote where one fails or hangs."""
    try:
        for process in processes:
            process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        pass
    codes = [process.poll() for process in processes]
    if codes != [0, 0]:
        end(processes)
        sys.exit("\n".join([f"the hosts ended with {codes}", *(text[-3000:] for text in texts(log))]))


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


def texts(log: Path) -> list[str]:
    return [log.with_suffix(f".{host}").read_text() for host in range(2)]


def wait_until(holds: Callable[[], bool], what: str, log: Path, seconds: float = PATIENCE) -> float:
    """Return after how many seconds `holds` did; ends this program where it does not."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() > began + seconds:
            raise TimeoutError(
                "\n".join([f"{what}: not within {seconds:.0f} s", *(t[-3000:] for t in texts(log))])
            )
        time.sleep(0.05)
    return time.monotonic() - began


def n_checkpoints(folder: str) -> int:
    """Return the step of a run's newest checkpoint, 0 where there is none."""
    return max((int(path.name[5:]) for path in Path("runs", folder, "checkpoints").glob("step-*")), default=0)


def cut_and_heal(names: Sequence[str], log: Path) -> dict[str, Any]:
    """Return what became of a run whose link was cut in its middle and mended once both sides had noticed."""
    processes = start(names, "cut", log, *LONGER)
    try:
        wait_until(lambda: n_checkpoints("cut") >= 100, "a run well under way", log)
        run("ip", "-n", names[0], "link", "set", "link0", "down")
        noticed = [0.0, 0.0]
        began = time.monotonic()
        for host in range(2):
            limit = HANG_SECONDS + SPARE_SECONDS
            wait_until(lambda host=host: bool(NAMED.search(texts(log)[host])), "the cut noticed", log, limit)
            noticed[host] = round(time.monotonic() - began, 2)
        said = [NAMED.search(text) for text in texts(log)]
        at = n_checkpoints("cut")
        run("ip", "-n", names[0], "link", "set", "link0", "up")
    except BaseException:
        end(processes)
        raise
    finish(processes, log)
    return {
        "noticed_seconds": noticed,
        "said": [found[0] for found in said if found],
        "named": [int(found[1]) for found in said if found],
        "cut_after_step": at,
    }


def local(folder: str, log: Path, *extra: str) -> None:
    """Train the run in runs/FOLDER on two ranks of this host."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with log.with_suffix(".0").open("w") as output:
        done = subprocess.run(
            [*words, "-m", "nanorun", *CASE.words(folder), *extra],
            stdout=output,
            stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    if done.returncode:
        sys.exit(log.with_suffix(".0").read_text()[-3000:])


def try_all(names: Sequence[str], log: Path) -> dict[str, Any]:
    """Return what differed, and how the cut was noticed."""
    local("local", log)
    finish(start(names, "apart", log), log)
    figures: dict[str, Any] = {"apart_differs": differences(Path("runs/local"), Path("runs/apart"))}
    print(f"two hosts and one: {', '.join(figures['apart_differs']) or 'same bits'}", flush=True)
    forget(Path("runs/local"))
    local("local", log, *LONGER)
    figures |= cut_and_heal(names, log)
    for host, (line, seconds) in enumerate(zip(figures["said"], figures["noticed_seconds"])):
        print(f"host {host} after {seconds:.1f} s of {HANG_SECONDS} stated: {line}")
    figures["healed_differs"] = differences(Path("runs/local"), Path("runs/cut"))
    print(
        f"cut after step {figures['cut_after_step']}, then healed: "
        f"{', '.join(figures['healed_differs']) or 'same bits'}",
        flush=True,
    )
    return figures


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--require", action="store_true", help="fail where namespaces are not allowed")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args(words)
    with a_place() as folder, ExitStack() as stack:
        try:
            names = stack.enter_context(two_hosts())
        except OSError as error:
            print(f"skipped: no network namespaces here ({error})")
            return 1 if arguments.require else 0
        figures = try_all(names, folder / "log")
    if arguments.out:
        write_figures(arguments.out, "two_hosts.py", words, n_ranks=2, hang_seconds=HANG_SECONDS, **figures)
    good = not figures["apart_differs"] and not figures["healed_differs"] and figures["named"] == [1, 0]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
