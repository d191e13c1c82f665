"""Pages are asked for once, counted by the kernel."""

import platform
import subprocess
import sys

import pytest

# 64 MB are 16,384 pages of 4 kB.
SCRIPT = """
import resource
import torch
from speechbrain_ram.utils import keep_freed_memory

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(16, 1024, 1024)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults(30)
assert keep_freed_memory()
faults(60)  # small blocks settle between the large ones
print(given_back, faults(30))
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc can be told"
)
def test_freed_memory_is_not_asked_for_again():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=True,
    )
    given_back, kept = map(int, done.stdout.split())
    assert given_back > 100  # the reason; huge pages make it smaller
    assert kept < given_back / 100


def test_another_c_library_is_left_alone(monkeypatch):
    from speechbrain_ram import utils as memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", None)
    assert memory.keep_freed_memory() is False
