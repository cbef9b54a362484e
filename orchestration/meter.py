"""What a worker's machine does while it trains: cores, memory, GPU, sampled by a thread, one summary for each epoch.

The names are those under which MLflow shows system metrics, without the "system/" before them. Memory is in megabytes
(10^6 bytes), as MLflow has it. A machine says what it can: without an NVIDIA driver there is nothing of a GPU.
"""

import contextlib
import importlib
import logging
import math
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import psutil

logger = logging.getLogger(__name__)

#: Seconds between two samples: a step of a small model takes less, an epoch mostly more.
EVERY_S = 2.0

MEGABYTE = 1e6

#: What is told as its largest value and not as its mean.
PEAKS = ("process_memory_peak_megabytes",)


class Meter:
    """Samples this machine and this process in a thread; `take` gives what it saw since it was last asked.

    `gpus`: the UUIDs of the NVIDIA GPUs to watch, which are numbered in this order: a worker's first one is 0 whatever
    the machine calls it.
    """

    def __init__(self, *, gpus: Sequence[str] = (), every_s: float = EVERY_S):
        self.every_s = every_s
        self._process = psutil.Process()
        self._gpus = _Gpus(gpus) if gpus else None
        self._seen: dict[str, list[float]] = defaultdict(list)
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._live, name="helix-meter", daemon=True)

    def __enter__(self) -> "Meter":
        # The first call of each only starts their clocks.
        psutil.cpu_percent()
        self._process.cpu_percent()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def take(self) -> dict[str, float]:
        """The mean of each value since the last call (the largest, of those in PEAKS); one sample at least."""
        # The use of cores is taken from one sample to the next, and means nothing over a moment.
        if not self._seen:
            self._sample()
        with self._lock:
            seen, self._seen = self._seen, defaultdict(list)
        return {
            name: round(max(values) if name in PEAKS else math.fsum(values) / len(values), 3)
            for name, values in sorted(seen.items())
        }

    def _live(self) -> None:
        while not self._stop.wait(self.every_s):
            self._sample()

    def _sample(self) -> None:
        values = {}
        # A sample that cannot be had is missing; the training does not suffer for it.
        with contextlib.suppress(psutil.Error, OSError):
            memory, own = psutil.virtual_memory(), self._process.memory_info().rss
            values |= {
                "cpu_utilization_percentage": psutil.cpu_percent(),
                "process_cpu_utilization_percentage": self._process.cpu_percent(),
                "system_memory_usage_megabytes": memory.used / MEGABYTE,
                "system_memory_usage_percentage": memory.used / memory.total * 100,
                "process_memory_usage_megabytes": own / MEGABYTE,
                "process_memory_peak_megabytes": own / MEGABYTE,
            }
        if self._gpus is not None:
            values |= dict(self._gpus.sample())
        with self._lock:
            for name, value in values.items():
                self._seen[name].append(value)


class _Gpus:
    """The NVIDIA driver's word on some GPUs; nothing at all where it or its Python binding is missing."""

    def __init__(self, uuids: Sequence[str]):
        self._handles: dict[int, Any] = {}
        try:
            self._nvml = importlib.import_module("pynvml")
            self._nvml.nvmlInit()
            self._handles = {n: self._nvml.nvmlDeviceGetHandleByUUID(uuid) for n, uuid in enumerate(uuids)}
        except Exception as error:  # NVMLError is a class of a module that may not be there
            logger.info("no system metrics of GPUs: %s", error)

    def sample(self) -> Iterator[tuple[str, float]]:
        for index, handle in self._handles.items():
            with contextlib.suppress(self._nvml.NVMLError):
                memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
                yield f"gpu_{index}_memory_usage_megabytes", memory.used / MEGABYTE
                yield f"gpu_{index}_memory_usage_percentage", memory.used / memory.total * 100
            with contextlib.suppress(self._nvml.NVMLError):
                yield f"gpu_{index}_utilization_percentage", self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu
            with contextlib.suppress(self._nvml.NVMLError):
                yield f"gpu_{index}_power_usage_watts", self._nvml.nvmlDeviceGetPowerUsage(handle) / 1000
