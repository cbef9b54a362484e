"""The section of scans: every backend of a device has a row or a reason, and slices stay slices."""

from dataclasses import replace

import pytest
import torch

from helix.bench import Conditions, Timing
from helix.gpu import scans as module
from helix.gpu.scans import KERNEL, Shapes, backends_on, channels_first, on_device, scans
from helix.gpu.section import Stage
from helix.models.agreement import scan_inputs

CPU = torch.device("cpu")
SHAPES = Shapes(tokens=(6, 12), batch=2, in_flight=12, channels=4, state=3, error_channels=2)


def stage(seconds: float = 60) -> Stage:
    return Stage.begin(CPU, Conditions(repeats=1), seconds)


def test_every_length_has_times_memory_and_errors():
    part = scans(stage(), SHAPES)
    titles = [table.title for table in part.tables]
    assert titles[:2] == ["scan, forward, B=2, L=6, E=4, N=3", "scan, forward+backward, B=2, L=6, E=4, N=3"]
    assert "B=1, L=12" in titles[2] and len(titles) == 6
    names = {row.name for row in part.tables[0].rows}
    assert names == set(backends_on(CPU)[0]) and "reference" in names
    errors = {row.name: row.values for row in part.tables[-1].rows}
    assert all(value is not None and value < 5e-6 for values in errors.values() for value in values)
    assert {load.unit for load in part.loads} == {"fp32"}


def test_the_batch_shrinks_with_the_length():
    shapes = replace(SHAPES, batch=32, in_flight=16_000)
    assert [shapes.batch_at(tokens) for tokens in (100, 500, 3000, 30_000)] == [32, 32, 5, 1]


def test_a_backend_that_cannot_be_imported_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch):
    def none(device, dtype, *, backend):
        if backend != "reference":
            raise ValueError("no")
        return backend

    monkeypatch.setattr(module, "scan_backend", none)
    found, missing = backends_on(torch.device("cuda"))
    assert found == ["reference"]
    assert "mamba_ssm" in {row.name for row in missing}
    assert all("helix doctor" in row.note for row in missing)


def test_once_the_time_is_spent_what_is_left_says_so():
    part = scans(stage(1e-9), SHAPES)
    assert all("were spent" in row.note for row in part.tables[0].rows)
    assert part.loads == ()
    assert {target.verdict for target in part.targets} == {"not measured"}


def test_slices_arrive_as_slices_with_the_same_numbers():
    inputs = scan_inputs(2, 5, 4, 3)
    for given, there in zip(inputs, on_device(inputs, CPU), strict=True):
        assert torch.equal(given, there) and given.stride() == there.stride() and there.is_leaf


def test_the_kernel_alone_is_given_the_tokens_side_by_side():
    u, dt, _, B, C, _, z, _ = channels_first(scan_inputs(2, 5, 4, 3))
    assert u.shape == dt.shape == z.shape == (2, 4, 5) and B.shape == C.shape == (2, 3, 5)
    assert all(x.is_contiguous() for x in (u, dt, z, B, C))


def test_the_target_is_held_against_the_faster_layout_on_a_gpu_at_the_papers_shape():
    shapes = replace(SHAPES, channels=512, state=32)
    on_gpu = replace(stage(), device=torch.device("cuda"))
    times = {"triton": 2.0, "mamba_ssm": 5.0, KERNEL: 3.0}
    found = {name: Timing(cpu_s=s, wall_s=s, runs=3) for name, s in times.items()}
    assert module._target(on_gpu, shapes, 500, found).found == 1.5
    assert module._target(on_gpu, SHAPES, 500, found).found is None
    assert module._target(stage(), shapes, 500, found).found is None
    assert module._target(on_gpu, shapes, 500, {"triton": found["triton"]}).verdict == "not measured"
