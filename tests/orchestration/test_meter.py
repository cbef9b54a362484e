"""What a machine does while it trains, summed up for each epoch."""

import time
from types import SimpleNamespace

import psutil
import pytest

from orchestration import meter
from orchestration.meter import Meter

HERE = {
    "cpu_utilization_percentage",
    "process_cpu_utilization_percentage",
    "system_memory_usage_megabytes",
    "system_memory_usage_percentage",
    "process_memory_usage_megabytes",
    "process_memory_peak_megabytes",
}


def test_a_core_that_works_is_seen_and_so_is_memory():
    with Meter(every_s=0.05) as running:
        until = time.thread_time() + 0.3
        while time.thread_time() < until:
            pass
        busy = running.take()
        running.take()
        time.sleep(0.3)
        idle = running.take()
    assert busy.keys() == idle.keys() == HERE
    assert busy["process_cpu_utilization_percentage"] > 2 * idle["process_cpu_utilization_percentage"]
    assert 0 < busy["process_memory_usage_megabytes"] <= busy["process_memory_peak_megabytes"]
    assert busy["process_memory_peak_megabytes"] == pytest.approx(psutil.Process().memory_info().rss / 1e6, rel=0.5)
    assert 0 <= busy["system_memory_usage_percentage"] <= 100


def test_memory_that_was_given_back_is_in_the_peak():
    with Meter(every_s=0.02) as running:
        before = running.take()["process_memory_peak_megabytes"]
        held = bytearray(300_000_000)
        held[::4096] = b"x" * len(held[::4096])
        time.sleep(0.3)
        del held
        time.sleep(0.3)
        said = running.take()
        after = running.take()["process_memory_peak_megabytes"]
    assert said["process_memory_peak_megabytes"] > before + 200
    assert said["process_memory_usage_megabytes"] < said["process_memory_peak_megabytes"]
    assert after < before + 200


def test_an_epoch_shorter_than_a_sample_has_one_anyway():
    with Meter(every_s=60.0) as running:
        assert running.take().keys() == HERE


class NVMLError(Exception):
    pass


def driver(**broken) -> SimpleNamespace:
    """A driver with two GPUs; the second one tells no power, as some do not."""

    def power(handle):
        if handle == "GPU-b":
            raise NVMLError
        return 150_000

    given = {
        "NVMLError": NVMLError,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=8e9, total=80e9),
        "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=75 if handle == "GPU-a" else 25),
        "nvmlDeviceGetPowerUsage": power,
    }
    return SimpleNamespace(**given | broken)


def test_gpus_are_told_under_the_names_of_mlflow(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(meter.importlib, "import_module", lambda name: {"pynvml": driver()}[name])
    with Meter(gpus=("GPU-a", "GPU-b"), every_s=60.0) as running:
        said = running.take()
    assert {name: said[name] for name in said if name.startswith("gpu_")} == {
        "gpu_0_memory_usage_megabytes": 8000.0,
        "gpu_0_memory_usage_percentage": 10.0,
        "gpu_0_utilization_percentage": 75.0,
        "gpu_0_power_usage_watts": 150.0,
        "gpu_1_memory_usage_megabytes": 8000.0,
        "gpu_1_memory_usage_percentage": 10.0,
        "gpu_1_utilization_percentage": 25.0,
    }


@pytest.mark.parametrize("fault", [ImportError, NVMLError])
def test_a_machine_without_the_driver_or_its_binding_says_nothing_of_gpus(
    fault: type[Exception], monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object):
        raise fault

    found = fail if fault is ImportError else lambda name: driver(nvmlInit=fail)
    monkeypatch.setattr(meter.importlib, "import_module", found)
    with Meter(gpus=("GPU-a",), every_s=60.0) as running:
        assert running.take().keys() == HERE
