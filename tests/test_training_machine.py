"""What a run asks of the C library and of Python's collector while it trains."""

import gc
import platform
import subprocess
import sys

import pytest

from nanorun.training.machine import nothing_old_collected

FREES_AND_TAKES = """
import resource, torch
from nanorun.training.machine import keep_memory
if {keeps}:
    keep_memory()
for turn in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        held = [torch.ones(9_000_000) for _ in range(2)]
        del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keeps):
    code = FREES_AND_TAKES.format(keeps=keeps)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


def glibc():
    """Return the version of glibc as numbers; (0,) where another C library is."""
    name, version = platform.libc_ver()
    return tuple(map(int, version.split("."))) if name == "glibc" else (0,)


@pytest.mark.skipif(glibc() < (2, 35), reason="no glibc, or one that keeps no pieces as large as these")
def test_memory_that_a_step_freed_is_there_for_the_next():
    # Two tensors of 34 MiB, ten times: without it, each page is fetched anew each time.
    assert faults(keeps=False) > 10 * faults(keeps=True)


def test_what_was_there_before_is_left_out_of_collections_inside_and_only_there():
    before = gc.get_freeze_count()
    with nothing_old_collected():
        assert gc.get_freeze_count() > before + 1000
    assert gc.get_freeze_count() == before
