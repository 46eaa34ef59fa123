"""Cores, compute threads, and the C library's allocator."""

import ctypes
import os

import cv2
import pytest
import torch

from mit_semseg.engine import cpu
from mit_semseg.engine.cpu import cpu_count, keep_freed_memory, set_threads


@pytest.fixture
def threads():
    """Puts the thread counts of this process back."""
    before = torch.get_num_threads(), cv2.getNumThreads()
    yield
    torch.set_num_threads(before[0])
    cv2.setNumThreads(before[1])


@pytest.mark.parametrize(("count", "expected"), [(3, 3), (1, 1), (0, 1), (-2, 1)])
def test_threads(threads, count, expected):
    cv2.setNumThreads(4)
    set_threads(count)
    assert torch.get_num_threads() == expected
    assert cv2.getNumThreads() <= 1  # whatever this build calls "in the caller's thread"


def test_cpu_count_respects_affinity(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert cpu_count() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cpu_count() == 64
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cpu_count() == 1


def test_local_ranks_follow_torchrun(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert cpu.local_ranks() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cpu.local_ranks() == 4


def test_a_c_library_without_mallopt_is_left_alone(monkeypatch):
    asked = []

    class OtherLibrary:
        def __init__(self, name):
            asked.append(name)

    monkeypatch.setattr(ctypes, "CDLL", OtherLibrary)
    keep_freed_memory()
    assert asked == [None]
