"""Time and memory on a device: events of a CUDA stream and the allocator's peak; on a CPU the process's own clocks.

A sample of something short is many calls of it, since reading a clock of a GPU makes it wait.
"""

import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from helix.bench import Conditions, Timing, process_clocks, race, without_frames
from helix.process import forget_peak, held_bytes, peak_bytes

#: A sample is so many calls that it lasts this long, where one call does not.
SAMPLE_S = 0.01
MOST_CALLS = 100

#: Calls before anything is timed: the first compiles kernels, and the state of an optimiser is there after it.
WARM_UP = 2


class CudaClock:
    """Seconds that passed in the current stream, and on the wall; both between two calls, which wait for the device."""

    def __init__(self, device: torch.device):
        self.device, self.stream_s = device, 0.0
        self.last = self._mark()

    def __call__(self) -> tuple[float, float]:
        now = self._mark()
        # The sum of differences: events are far enough apart in a long run to lose the digits of a short one.
        self.stream_s += self.last.elapsed_time(now) / 1e3
        self.last = now
        return self.stream_s, time.perf_counter()

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        event.synchronize()
        return event


def clocks_of(device: torch.device) -> Callable[[], tuple[float, float]]:
    """(seconds on the device, seconds on the wall); of a CPU the CPU seconds of the process."""
    return CudaClock(device) if device.type == "cuda" else process_clocks


def race_on(
    device: torch.device, contestants: Mapping[str, Callable[[], object]], how: Conditions
) -> dict[str, Timing | Exception]:
    """`helix.bench.race` by the clocks of the device, of what was warmed up and fits into its memory.

    `Timing.cpu_s` is then the device's time; `runs` counts samples. An error, of memory too, is a result.
    """
    clocks = clocks_of(device)
    calls: dict[str, int] = {}
    failed: dict[str, Timing | Exception] = {}
    for name, function in contestants.items():
        how.say(name)
        try:
            for _ in range(WARM_UP):
                function()
            before_s = clocks()[1]
            function()
            once_s = clocks()[1] - before_s
            calls[name] = min(MOST_CALLS, math.ceil(SAMPLE_S / max(once_s, 1e-9)))
        except Exception as error:  # as in race
            failed[name] = without_frames(error)
            release(device)
    found = race(
        {name: _several(contestants[name], count) for name, count in calls.items()},
        # The warm-up is done, and its lines were said.
        dataclasses.replace(how, say=lambda _line: None),
        clocks=clocks,
    )
    each = {name: _each(found[name], count) for name, count in calls.items()}
    return {name: failed[name] if name in failed else each[name] for name in contestants}


@dataclass(frozen=True, kw_only=True)
class Peak:
    """What a function needed beyond what was held before it: tensors, and where the allocator says so what it took."""

    tensor_bytes: int
    reserved_bytes: int | None


def peak_of(device: torch.device, function: Callable[[], object]) -> Peak:
    """Raises what the function raises, torch.OutOfMemoryError too, and OSError where a CPU's system tells no peak."""
    release(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return Peak(
            tensor_bytes=torch.cuda.max_memory_allocated(device) - before[0],
            reserved_bytes=torch.cuda.max_memory_reserved(device) - before[1],
        )
    held = held_bytes()
    forget_peak()
    function()
    return Peak(tensor_bytes=peak_bytes() - held, reserved_bytes=None)


@contextlib.contextmanager
def known_objects_aside() -> Iterator[None]:
    """What is there now is not looked at by the collections to come, of which there is one before every sample."""
    gc.collect()
    frozen = gc.get_freeze_count() > 0  # by whoever runs this; that stays so
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _several(function: Callable[[], object], count: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(count):
            function()

    return run


def _each(found: Timing | Exception, count: int) -> Timing | Exception:
    if isinstance(found, Exception):
        return found
    return dataclasses.replace(found, cpu_s=found.cpu_s / count, wall_s=found.wall_s / count)
