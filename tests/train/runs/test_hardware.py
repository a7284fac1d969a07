"""What memory costs a CPU that trains."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from train.runs.hardware import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)  # 40 MB, freed at once: 9,800 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*(faults() for _ in range(30)))  # aligned blocks fit again after the first few
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_used_again():
    counts = {}
    for name in ("keep", "do not"):
        output = subprocess.run([sys.executable, "-c", PROGRAM, name], capture_output=True, text=True, check=True)
        counts[name] = [int(n) for n in output.stdout.split()]
    assert min(counts["do not"]) > 1000  # what it is for
    assert counts["keep"][0] > 1000 and max(counts["keep"][10:]) < 100
