"""The roofline: the nearer limit counts, bytes are those of the tensors, data sheets are found by a GPU's name."""

import pytest
import torch

from helix.bench import Conditions
from helix.gpu import roofline as module
from helix.gpu.roofline import COPY, DATASHEETS, datasheet, limits, roofline, scan_bytes, step_bytes
from helix.gpu.section import Load, Stage
from helix.models.agreement import scan_inputs
from helix.models.scan import selective_scan
from helix.training.memory import Prediction

CPU = torch.device("cpu")


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setitem(module.SIDE, "cpu", 64)
    monkeypatch.setitem(module.COPY_BYTES, "cpu", 2**20)
    return Stage.begin(CPU, Conditions(repeats=2), 60)


def load(**changed) -> Load:
    return Load(**({"name": "a", "seconds": 1.0, "flops": 1.0, "moved_bytes": 1.0, "unit": "fp32"} | changed))


def test_work_is_held_against_the_limit_that_it_meets_first():
    speeds = {COPY: 100.0, "fp32": 1000.0, "bf16": 8000.0}
    bytes_first = module._load_row(load(seconds=4.0, flops=1000.0, moved_bytes=200.0), speeds)
    assert bytes_first.values[-1] == 50 and bytes_first.note == "limited by its memory"
    flops_first = module._load_row(load(seconds=4.0, flops=8000.0, moved_bytes=50.0, unit="bf16"), speeds)
    assert flops_first.values[-1] == 25 and flops_first.note == "limited by its bf16"
    unknown = module._load_row(load(unit="tf32"), speeds)
    assert unknown.values[-1] is None and "tf32 was not measured" in unknown.note


def test_a_scan_moves_each_of_its_tensors_once():
    inputs = scan_inputs(2, 9, 6, 4)
    u, dt, _, B, C, _, z, _ = inputs
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = selective_scan(*leaves[:-1], dt_bias_E=leaves[-1])
    given = sum(x.nbytes for x in (u, dt, z, B, C))
    assert scan_bytes(2, 9, 6, 4, backward=False) == given + y.nbytes
    # The backward reads what the forward read and dy, and writes as many gradients.
    assert scan_bytes(2, 9, 6, 4, backward=True) == given + y.nbytes + given + y.nbytes + given


def test_a_step_moves_its_weights_seven_times_with_their_gradients_and_what_it_keeps_twice():
    kept = {"parameters": 10, "gradients": 10, "optimizer": 20, "activations": 100, "transient": 1000}
    assert step_bytes(Prediction(**kept)) == 200 + 70 + 40


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GH200 144G HBM3e", None),
    ],
)
def test_a_data_sheet_is_found_by_the_name_that_cuda_gives(name: str, known: str | None):
    assert datasheet(name) == (DATASHEETS[known] if known else None)


def test_the_limits_are_measured_and_every_load_stands_below_them(stage: Stage):
    assert set(limits(stage)) == {COPY, "fp32", "bf16"}
    part = roofline(stage, [load(name="b"), load(name="a")])
    measured, achieved = part.tables
    assert all(row.values[0] and row.values[0] > 0 for row in measured.rows)
    assert [row.name for row in achieved.rows] == ["a", "b"]
    assert len(roofline(stage, []).tables) == 1, "without loads the limits alone"


def test_a_limit_whose_tensors_do_not_fit_is_a_row_and_stops_no_other(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(module.COPY_BYTES, "cpu", 2**62)
    part = roofline(stage, [load()])
    rows = {row.name: row for row in part.tables[0].rows}
    assert rows["copy, GB/s"].note == "out of memory"
    assert rows["matrix product in fp32, TFLOP/s"].values[0]
    assert part.tables[1].rows[0].values[-1] is None


def test_the_precision_of_products_is_what_it_was(stage: Stage):
    before = torch.backends.cuda.matmul.fp32_precision
    a = torch.ones(2, 2)
    module._product(a, a, "tf32")
    assert torch.backends.cuda.matmul.fp32_precision == before
