"""What is run in a process of its own comes back, and its memory is its own."""

import os
from pathlib import Path

import pytest
import torch

from helix.process import forget_peak, held_bytes, in_own_process, peak_bytes

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are measured on Linux only")


def hold(mib: int) -> tuple[float, float]:
    """What a process holds after it let go of so much, and at its peak."""
    large = bytearray(50 * 2**20)
    del large
    forget_peak()
    before = held_bytes()
    kept = bytearray(b"x") * (mib * 2**20)
    del kept
    return (peak_bytes() - before) / 2**20, before / 2**20


def die() -> None:
    os._exit(9)


@linux
def test_a_peak_is_that_of_its_own_process_from_when_it_is_asked_for():
    peak, _ = in_own_process(hold, 20, threads=1)
    assert 19 <= peak <= 24


def test_a_process_that_is_killed_is_an_error_that_says_so():
    with pytest.raises(RuntimeError, match="memory"):
        in_own_process(die, threads=1)


def test_another_process_has_the_threads_that_it_is_given():
    assert in_own_process(torch.get_num_threads, threads=2) == 2


def refuse(what: str) -> None:
    raise ValueError(f"no {what}")


def test_what_it_raises_is_raised_here():
    with pytest.raises(ValueError, match="no tokens"):
        in_own_process(refuse, "tokens", threads=1)
