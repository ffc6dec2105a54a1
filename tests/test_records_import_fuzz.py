"""Whatever a file holds, reading it raises nothing, and every number it gives stands in the file."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from log_samples import real_logs

from nanorun.records.reading import read_logs

FAST, SLOW = 200, 10_000
NUMBERS = (
    "nan",
    "inf",
    "-1",
    "1e999",
    "9" * 1000,
    "3.2.1",
    "٣",
    "",
    "1_0",
    "0x10",
    "-0.0",
    "1e-5",
    "007",
    "+3.2",
)
LINES = (
    "step:0/300 val_loss:9.0 train_time:0ms step_avg:nanms",
    "step:300/300 val_loss:3.2 val_ema_loss:3.1 train_time:12.5s step_avg:1ms",
    "step:1/300 train_time:1ms step_avg:nanms",
    "s:0 tel:10.9",
    "s:9 trl:3.2 lr:1e-4 norm:1",
    "step 250: train loss 2.4, val loss 2.5",
    "iter 10: loss 3.0, time 12.3ms, mfu 1%",
    "max_iters = 250",
    "=" * 100,
    "import os",
    "peak memory allocated: 5 MiB reserved: 9 MiB",
    "GPU 0: [bold]X[/bold] (UUID: GPU-1)",
    "Running on device_name=\x1b[31mX with world_size=8",
)
NANOGPT = "".join(
    f"step {step}: train loss {9 - step / 100:.4f}, val loss {9.1 - step / 100:.4f}\n"
    f"iter {step}: loss {9 - step / 100:.4f}, time 22.10ms, mfu 3.10%\n"
    for step in range(0, 600, 50)
).encode()
LOSS_LINES = {
    "modded_nanogpt": re.compile(r"^step:([0-9]+)/[0-9]+ (?:.* )?val_loss:([^ \r\n]+)", re.MULTILINE),
    "llmc": re.compile(r"^s:([0-9]+) tel:([^ \r\n]+)", re.MULTILINE),
    "nanogpt": re.compile(r"^step ([0-9]+): train loss .*, val loss ([^ ,\r\n]+)", re.MULTILINE),
}
TIME = re.compile(r"train_time:([0-9.]+)(ms|s)\b")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "log.txt"


def check(place: Path, content: bytes) -> int:
    """Read `content` as a log; return how many runs it gave, all of them believable."""
    place.write_bytes(content)
    found = read_logs([place])
    assert found.runs or found.skipped
    utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    text = content.decode("utf-16" if utf16 else "utf-8-sig", "replace")
    for run in found.runs:
        said = {(step, number) for step, number in _numbers(LOSS_LINES[run.format].findall(text))}
        times = {
            float(n) / (1000 if unit == "ms" else 1) for n, unit in TIME.findall(text) if n.count(".") < 2
        }
        steps = [point.step for point in run.points]
        assert steps == sorted(set(steps))
        for point in run.points:
            assert (point.step, point.val_loss) in said
            assert math.isfinite(point.val_loss)
            assert point.train_seconds is None or point.train_seconds in times
        assert run.last_step >= steps[-1]
        assert run.total_steps is None or str(run.total_steps) in text
        assert run.machine.gpu is None or all(part in text for part in run.machine.gpu.split(" + "))
        assert run.source is None or run.source in text
    return len(found.runs)


def _numbers(pairs: list[tuple[str, str]]) -> list[tuple[int, float]]:
    found = []
    for step, loss in pairs:
        try:
            found.append((int(step[:20]), float(loss)))
        except ValueError:
            continue
    return found


def shortened(content: bytes) -> list[bytes]:
    """The lines of a real log without most of its training steps, so that ten thousand cases take a minute."""
    lines = content.splitlines(keepends=True)
    trained = [line for line in lines if line.startswith((b"step:", b"s:")) and b"val_loss" not in line]
    dropped = {line for index, line in enumerate(trained) if b"tel:" not in line and index % 40}
    return [line for line in lines if line not in dropped]


BASES = {
    "modded_nanogpt": [shortened(log) for name, log in real_logs().items() if not name.startswith("llmc")],
    "llmc": [shortened(real_logs()["llmc_val_only.log"])],
    "nanogpt": [NANOGPT.splitlines(keepends=True)],
}


def mutated(whole: list[bytes], random: random.Random, times: int) -> bytes:
    """A part of a real log with lines lost, repeated, swapped, cut and overwritten."""
    start = random.randrange(max(1, len(whole) - 60))
    lines = [*whole[:8], *whole[start : start + 60]]
    for _ in range(times):
        at = random.randrange(len(lines))
        line = lines[at]
        cut = random.randrange(len(line) + 1)
        kind = random.randrange(8)
        if kind == 0 and len(lines) > 1:
            del lines[at]
        elif kind == 1:
            lines.insert(random.randrange(len(lines)), line)
        elif kind == 2:
            other = random.randrange(len(lines))
            lines[at], lines[other] = lines[other], line
        elif kind == 3:
            lines[at] = line[:cut]
        elif kind == 4:
            lines[at] = line[:cut] + bytes([random.randrange(256)]) + line[cut + 1 :]
        elif kind == 5:
            numbers = list(re.finditer(rb"[0-9.]+", line))
            if numbers:
                found = random.choice(numbers)
                lines[at] = line[: found.start()] + random.choice(NUMBERS).encode() + line[found.end() :]
        elif kind == 6:
            lines.insert(at, random.choice(LINES).encode() + random.choice([b"\n", b"\r\n", b""]))
        else:
            lines[at] = line[:cut] + random.choice(LINES).encode() + line[cut:]
    return b"".join(lines)


PIECES = st.one_of(st.binary(max_size=80), st.sampled_from([line.encode() + b"\n" for line in LINES]))


def fuzz_bytes(place: Path, cases: int) -> None:
    @settings(max_examples=cases, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(PIECES, max_size=12))
    def any_bytes_are_read(pieces: list[bytes]) -> None:
        check(place, b"".join(pieces))

    any_bytes_are_read()


def fuzz_real_logs(place: Path, format: str, cases: int) -> int:
    runs = 0

    @settings(max_examples=cases, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, len(BASES[format]) - 1), st.integers(0, 2**32), st.integers(0, 12))
    def any_mutation_is_read(which: int, seed: int, times: int) -> None:
        nonlocal runs
        runs += check(place, mutated(BASES[format][which], random.Random(seed), times))

    any_mutation_is_read()
    return runs


def test_any_bytes_are_read_without_a_traceback_or_a_number_that_is_not_there(place):
    fuzz_bytes(place, FAST)


@pytest.mark.parametrize("format", sorted(BASES))
def test_any_mutation_of_a_real_log_is_read_without_a_number_that_is_not_there(place, format):
    assert fuzz_real_logs(place, format, FAST // 2) > FAST // 4


@pytest.mark.slow
def test_ten_thousand_files_of_any_bytes_are_read(place):
    fuzz_bytes(place, SLOW)


@pytest.mark.slow
@pytest.mark.parametrize("format", sorted(BASES))
def test_ten_thousand_mutations_of_real_logs_are_read(place, format):
    assert fuzz_real_logs(place, format, SLOW) > SLOW // 2
