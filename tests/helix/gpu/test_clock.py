"""Clocks of a device: a stream's time adds up from events, what is short is called often, no memory is an answer."""

import time

import pytest
import torch

from helix.bench import Conditions, Timing
from helix.gpu import clock
from helix.gpu.clock import CudaClock, peak_of, race_on

CPU = torch.device("cpu")


class Event:
    """An event of a stream whose time a test sets, in milliseconds."""

    now_ms = 0.0

    def __init__(self, *, enable_timing: bool):
        assert enable_timing

    def record(self, stream: object) -> None:
        self.at_ms = Event.now_ms

    def synchronize(self) -> None: ...

    def elapsed_time(self, later: "Event") -> float:
        return later.at_ms - self.at_ms


def test_the_time_of_a_stream_is_the_sum_between_its_events(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "a stream")
    Event.now_ms = 7.0
    read = CudaClock(torch.device("cuda"))
    stamps = []
    for Event.now_ms in (7.0, 10.0, 10.0, 250.0):
        stamps.append(read())
    assert [stream_s for stream_s, _ in stamps] == pytest.approx([0, 0.003, 0.003, 0.243])
    walls = [wall_s for _, wall_s in stamps]
    assert walls == sorted(walls)


@pytest.mark.gpu
def test_on_a_gpu_the_stream_waits_for_the_work():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    a = torch.randn(4096, 4096, device="cuda")
    found = race_on(torch.device("cuda"), {"one": lambda: a @ a, "four": lambda: a @ a @ a @ a @ a}, Conditions())
    one, four = found["one"], found["four"]
    assert isinstance(one, Timing) and isinstance(four, Timing)
    assert 3 < four.cpu_s / one.cpu_s < 5


def test_what_is_short_is_called_often_and_its_time_is_that_of_one_call():
    calls = []

    def nap() -> None:
        calls.append(1)
        time.sleep(0.002)

    (found,) = race_on(CPU, {"nap": nap}, Conditions(repeats=2)).values()
    assert isinstance(found, Timing)
    assert 0.002 <= found.wall_s < 0.01
    assert len(calls) >= clock.WARM_UP + 1 + 3 * 2


def test_one_that_does_not_fit_is_an_answer_and_stops_no_other():
    def too_much() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 41 GiB")

    found = race_on(CPU, {"too much": too_much, "little": lambda: None}, Conditions(repeats=1))
    assert list(found) == ["too much", "little"]
    error = found["too much"]
    assert isinstance(error, torch.OutOfMemoryError)
    assert error.__traceback__ is None, "its frames would hold the memory"
    assert isinstance(found["little"], Timing)


def test_the_peak_is_that_above_what_was_held():
    held = torch.ones(10 * 2**20)  # 40 MiB that are not counted

    def needs_eighty_mib() -> None:
        torch.ones(20 * 2**20).sum()

    needs_eighty_mib()
    peak = peak_of(CPU, needs_eighty_mib)
    assert 70 * 2**20 < peak.tensor_bytes < 110 * 2**20
    assert peak.reserved_bytes is None
    assert len(held)


def test_on_a_gpu_the_peak_is_that_of_tensors_and_of_what_the_allocator_took(monkeypatch: pytest.MonkeyPatch):
    held = {"allocated": 100, "reserved": 1000}
    peak = dict(held)

    def needs_memory() -> None:
        peak.update(allocated=held["allocated"] + 40, reserved=held["reserved"] + 64)

    asked = []
    for name, function in {
        "memory_allocated": lambda device: held["allocated"],
        "memory_reserved": lambda device: held["reserved"],
        "max_memory_allocated": lambda device: peak["allocated"],
        "max_memory_reserved": lambda device: peak["reserved"],
        "reset_peak_memory_stats": lambda device: peak.update(held),
        "synchronize": lambda device: asked.append("synchronize"),
        "empty_cache": lambda: asked.append("empty_cache"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    assert peak_of(torch.device("cuda"), needs_memory) == clock.Peak(tensor_bytes=40, reserved_bytes=64)
    assert asked == ["empty_cache", "synchronize", "synchronize"]
