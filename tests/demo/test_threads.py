"""The page's number of threads, on made-up machines, and the memory it keeps."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from spectralar.demo.threads import limit_threads, usable_cpus
from tests.helpers import tiny_transformer


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 16 cores whose cgroup is a folder."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    (tmp_path / "cpu").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("files", "environment", "expected"),
    [
        ({}, {}, 16),
        ({"cpu.max": "max 100000"}, {}, 16),
        ({"cpu.max": "200000 100000"}, {}, 2),
        ({"cpu.max": "250000 100000"}, {}, 3),
        ({"cpu.max": "20000 100000"}, {}, 1),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, {}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, {}, 16),
        ({}, {"CPU_CORES": "2"}, 2),
        ({"cpu.max": "800000 100000"}, {"CPU_CORES": "many"}, 8),
    ],
)
def test_quotas_count(machine, files, environment, expected):
    for name, text in files.items():
        (machine / name).write_text(text + "\n")
    assert usable_cpus(machine, environment) == expected


def test_torchs_threads_are_lowered_and_never_raised(monkeypatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.setattr("spectralar.demo.threads.usable_cpus", lambda: 1)
        limit_threads()
        assert torch.get_num_threads() == 1
        monkeypatch.setattr("spectralar.demo.threads.usable_cpus", lambda: 64)
        limit_threads()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_one_thread_for_small_models(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr("spectralar.demo.threads.usable_cpus", lambda: 64)
    small, wide = tiny_transformer(), tiny_transformer(hidden_size=512)
    try:
        for models, expected in (((small, wide), 3), ((small, small), 1)):
            torch.set_num_threads(3)
            limit_threads(*models)
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


FREES = """
import sys, time
import psutil
from spectralar.demo.threads import give_back_memory
def resident():
    return psutil.Process().memory_info().rss / 2**20
blocks = [bytearray(2000) for _ in range(100_000)]  # 190 MiB, and small enough to come from a pool
full = resident()
last = blocks[-1]  # lies behind all others, so that nothing goes back by itself
del blocks
kept = resident()
if sys.argv[1] == "with":
    give_back_memory(seconds=0.1)
    while resident() > full - 150:
        time.sleep(0.05)
print(round(full - kept), round(full - resident()))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a way of glibc")
def test_memory_that_is_free_goes_back():
    freed = {}
    for how in ("without", "with"):
        command = [sys.executable, "-c", FREES, how]
        freed[how] = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout.split()
    assert int(freed["without"][1]) < 20  # else there would be nothing to do
    assert int(freed["with"][1]) >= 150
