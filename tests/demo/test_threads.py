"""The page's number of threads, on made-up machines."""

import os

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
