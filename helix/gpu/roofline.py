"""How near measured work comes to what the device could do at best, by two limits that are measured in the same run.

Williams et al. 2009, doi 10.1145/1498765.1498785: work cannot be quicker than its operations at the speed of the
device's arithmetic, nor than its bytes at the speed of its memory. The first is that of a large matrix product at each
precision, the second that of a copy. FLOPs are helix.models.classifier.cost's; bytes are those that no
implementation which keeps the same tensors can avoid, so a share says at least how far there is to go.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helix.bench import NotRunError, Row, Table, Timing, without_frames
from helix.gpu.clock import race_on
from helix.gpu.section import Load, Part, Stage, why
from helix.training.memory import Prediction

#: The side of the matrices and the bytes of the copy, by the type of device: large enough to hide the launches.
SIDE = {"cuda": 8192, "cpu": 512}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**25}

COPY = "copy"


@dataclass(frozen=True, kw_only=True)
class Datasheet:
    """What the vendor promises: GB/s of memory and dense TFLOP/s, fp32 outside of the matrix units."""

    memory_gb_s: float
    fp32: float
    tf32: float
    bf16: float


#: By words of the name that CUDA gives the device, the longest that stand there. NVIDIA's data sheets of the H100
#: (SXM5, PCIe, NVL), H200 (SXM), L40S and A100, 2020 to 2024; figures there "with sparsity" are halved.
DATASHEETS = {
    "H100 PCIe": Datasheet(memory_gb_s=2000, fp32=51, tf32=378, bf16=756),
    "H100 NVL": Datasheet(memory_gb_s=3900, fp32=60, tf32=417.5, bf16=835.5),
    "H100": Datasheet(memory_gb_s=3350, fp32=67, tf32=494.5, bf16=989.5),
    "H200": Datasheet(memory_gb_s=4800, fp32=67, tf32=494.5, bf16=989.5),
    "L40S": Datasheet(memory_gb_s=864, fp32=91.6, tf32=183, bf16=362),
    "A100-SXM4-40GB": Datasheet(memory_gb_s=1555, fp32=19.5, tf32=156, bf16=312),
    "A100-PCIE-40GB": Datasheet(memory_gb_s=1555, fp32=19.5, tf32=156, bf16=312),
    "A100 80GB PCIe": Datasheet(memory_gb_s=1935, fp32=19.5, tf32=156, bf16=312),
    "A100": Datasheet(memory_gb_s=2039, fp32=19.5, tf32=156, bf16=312),
}


def datasheet(name: str) -> Datasheet | None:
    """That of the GPU which CUDA calls so, where it is known."""
    # Whole words: a GH200 has an H200's letters and other figures.
    found = [part for part in DATASHEETS if re.search(rf"\b{part}\b", name)]
    return DATASHEETS[max(found, key=len)] if found else None


def step_bytes(predicted: Prediction) -> float:
    """Bytes that a step surely moves: what it keeps for the backward is written and read; weights are read in the
    forward, the backward and by the optimiser, and written; gradients written, and read to be clipped and taken; the
    state of the optimiser is read and written."""
    return 2 * predicted.activations + 4 * predicted.parameters + 3 * predicted.parameters + 2 * predicted.optimizer


def scan_bytes(batch: int, tokens: int, channels: int, state: int, *, backward: bool, element_bytes: int = 4) -> float:
    """Bytes that a scan surely moves: u, dt, z, B and C are read and y is written; a backward reads the same and the
    gradient of y again, and writes the gradients of what was read."""
    wide, narrow = batch * tokens * channels, batch * tokens * state
    forward = 4 * wide + 2 * narrow
    return element_bytes * (forward + (7 * wide + 4 * narrow if backward else 0))


def limits(stage: Stage) -> dict[str, Timing | Exception]:
    """The time of a copy, and of a matrix product at each precision that the device has."""
    names = (COPY, "fp32", *(["tf32"] if stage.device.type == "cuda" else []), "bf16")
    contestants: dict[str, Callable[[], object]] = {}
    failed: dict[str, Timing | Exception] = {}
    for name in names:
        try:
            stage.require_time()
            contestants[name] = _at_full_speed(name, stage.device)
        except (NotRunError, RuntimeError, MemoryError) as error:
            failed[name] = without_frames(error)
    found = race_on(stage.device, contestants, stage.how) | failed
    return {name: found[name] for name in names}


def _at_full_speed(name: str, device: torch.device) -> Callable[[], object]:
    """A copy, or a product at that precision, of tensors that lie there."""
    if name == COPY:
        source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16 if name == "bf16" else None) for _ in range(2))
    if name == "bf16":
        return lambda: a @ b
    return lambda: _product(a, b, {"fp32": "ieee", "tf32": "tf32"}[name])


def _product(a: Tensor, b: Tensor, precision: str) -> Tensor:
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = precision
    try:
        return a @ b
    finally:
        setting.fp32_precision = before


def roofline(stage: Stage, loads: Sequence[Load]) -> Part:
    """The limits beside the data sheet, and every load beside the limits."""
    stage.how.say("limits of the device")
    found = limits(stage)
    speeds = _speeds(stage.device, found)
    sheet = datasheet(torch.cuda.get_device_name(stage.device)) if stage.device.type == "cuda" else None
    rows = [_load_row(load, speeds) for load in sorted(loads, key=lambda load: load.name)]
    tables = [_limits_table(found, speeds, sheet)]
    if rows:
        columns = ("ms", "TFLOP/s", "GB/s", "% of the limit")
        tables.append(Table(title="achieved over the limit", columns=columns, rows=tuple(rows)))
    return Part(tables=tuple(tables))


def _speeds(device: torch.device, found: Mapping[str, Timing | Exception]) -> dict[str, float]:
    """Bytes a second of COPY, operations a second of the rest, of those that have a time."""
    work = dict.fromkeys(found, 2.0 * SIDE[device.type] ** 3) | {COPY: 2.0 * COPY_BYTES[device.type]}
    return {name: work[name] / timing.cpu_s for name, timing in found.items() if isinstance(timing, Timing)}


def _limits_table(
    found: Mapping[str, Timing | Exception], speeds: Mapping[str, float], sheet: Datasheet | None
) -> Table:
    rows = []
    for name, result in found.items():
        promised = None if sheet is None else sheet.memory_gb_s if name == COPY else getattr(sheet, name)
        speed = speeds.get(name)
        measured = None if speed is None else speed / (1e9 if name == COPY else 1e12)
        note = why(result) if isinstance(result, Exception) else "" if sheet else "no data sheet here"
        shown = "copy, GB/s" if name == COPY else f"matrix product in {name}, TFLOP/s"
        rows.append(Row(name=shown, values=(measured, promised), note=note))
    title = "what the device can do, measured in this run"
    return Table(title=title, columns=("measured", "data sheet"), rows=tuple(rows))


def _load_row(load: Load, speeds: Mapping[str, float]) -> Row:
    columns = (1e3 * load.seconds, load.flops / load.seconds / 1e12, load.moved_bytes / load.seconds / 1e9)
    if COPY not in speeds or load.unit not in speeds:
        return Row(name=load.name, values=(*columns, None), note=f"the limit of {load.unit} was not measured")
    bounds = {"its memory": load.moved_bytes / speeds[COPY], f"its {load.unit}": load.flops / speeds[load.unit]}
    bound = max(bounds, key=lambda name: bounds[name])
    return Row(name=load.name, values=(*columns, 100 * bounds[bound] / load.seconds), note=f"limited by {bound}")
