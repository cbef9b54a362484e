"""The paper's Table 1 (computational feasibility): which backbone trains on how many tokens, and in how much memory.

The paper calls pure attention at 30,000 tokens out of memory on a GPU of 48 GB. Its authors' code asks for the weights
of attention, so that a matrix of tokens x tokens is kept for every head; the same outputs can be had without. Both
stand side by side here, predicted from shapes and, where that is asked for, measured, a process for each cell.
"""

import ctypes
import dataclasses
import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from helix.models.scan import chosen_for_a_cpu
from helix.process import forget_peak, held_bytes, in_own_process, peak_bytes
from helix.protocol import profile
from helix.published import FEASIBILITY
from helix.spec import AugmentSpec, ModelSpec, TrainingSpec, TrialSpec
from helix.training.memory import (
    Device,
    Prediction,
    Rehearsal,
    available_bytes,
    compact_large_blocks,
    gib,
    needed_bytes,
    predict,
)
from helix.training.precision import require

#: The lengths of Table 1 in tokens of a raw waveform, 160 samples each: 5 s, 30 s and 300 s.
TOKENS = (500, 3_000, 30_000)
SAMPLES_PER_TOKEN = 160

#: VoxPopuli's speakers, which the paper's clips of 30,000 tokens are told apart by.
CLASSES = 1_313


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Of one process: what its steps took at their peak, what it held before the model, and the seconds of a step.

    `peak_bytes` and `process_bytes` add up to the peak of the process.
    """

    peak_bytes: int
    process_bytes: int
    step_seconds: float


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One backbone on one length by one path. `predicted` is of a CPU, as what is measured is, and `on_gpu` of a GPU.

    `why_not` says why a cell that was to be measured was not.
    """

    backbone: str
    tokens: int
    attn_impl: str
    recompute: bool
    spec: TrialSpec
    predicted: Prediction
    on_gpu: Prediction
    paper: str
    measured: Measurement | None = None
    why_not: str | None = None

    @property
    def samples(self) -> int:
        return self.tokens * SAMPLES_PER_TOKEN

    def needed_bytes(self, device_type: Device) -> int:
        """What surely is enough: with the error bound, and the process itself."""
        return needed_bytes(self.on_gpu if device_type == "cuda" else self.predicted, device_type, compact=True)

    def verdict(self, limit_bytes: int) -> Literal["fits", "tight", "no"]:
        """Whether it fits into a GPU of that size: "tight" where only the error bound says that it might not."""
        if self.needed_bytes("cuda") <= limit_bytes:
            return "fits"
        return "tight" if self.on_gpu.peak_bytes <= limit_bytes else "no"

    @property
    def is_papers(self) -> bool:
        """Whether this is what the paper measured: the authors' attention, nothing recomputed."""
        ours_only = self.attn_impl == "sdpa" and "attention" in self.spec.model.pattern
        return not self.recompute and not ours_only

    def as_json(self, limit_bytes: int) -> dict[str, Any]:
        value = {name: getattr(self, name) for name in ("backbone", "tokens", "attn_impl", "recompute")}
        value["paper"] = self.paper if self.is_papers else None
        value["verdict"] = self.verdict(limit_bytes)
        value["batch_size"] = self.spec.training.batch_size
        value["precision"] = self.spec.training.precision
        for name in ("predicted", "on_gpu"):
            found: Prediction = getattr(self, name)
            value[name] = {**dataclasses.asdict(found), "peak_bytes": found.peak_bytes}
        value["measured"] = None if self.measured is None else dataclasses.asdict(self.measured)
        return {**value, "why_not_measured": self.why_not}


def table(
    backbones: Mapping[str, Sequence[str]],
    *,
    tokens: Sequence[int] = TOKENS,
    batch: int = 1,
    precision: str = "fp32",
    width: int = 256,
    recomputing: Sequence[bool] = (False, True),
) -> list[Cell]:
    """Every cell: length x backbone x (ours, the authors' path) x (keeping, recomputing), predicted.

    `backbones` are patterns of blocks by name. A pattern without attention has one path only.
    """
    cells = []
    for length in tokens:
        for backbone, pattern in backbones.items():
            for attn_impl in ("sdpa", "weights") if "attention" in pattern else ("sdpa",):
                spec = TrialSpec(
                    model=ModelSpec(pattern=tuple(pattern), width=width),
                    augment=AugmentSpec(),
                    training=TrainingSpec(batch_size=batch, precision=precision),  # type: ignore[arg-type]
                    protocol=dataclasses.replace(profile("paper"), attn_impl=attn_impl),
                )
                for recompute in recomputing:
                    step = {"samples": length * SAMPLES_PER_TOKEN, "classes": CLASSES, "recompute": recompute}
                    with chosen_for_a_cpu():
                        predicted = predict(spec, **step)
                    cells.append(
                        Cell(
                            backbone=backbone,
                            tokens=length,
                            attn_impl=attn_impl,
                            recompute=recompute,
                            spec=spec,
                            predicted=predicted,
                            # A graph makes a step quicker, and no step feasible.
                            on_gpu=predict(spec, **step, device_type="cuda", graphs="off"),
                            paper=FEASIBILITY.get(length, {}).get(backbone, ""),
                        )
                    )
    return cells


def measured(cell: Cell, *, steps: int = 2) -> Cell:
    """The cell with what its step took on this machine's CPU, or with why it was not run here."""
    try:
        require(cell.spec.training.precision, "cpu")
    except ValueError as error:
        return dataclasses.replace(cell, why_not=str(error).partition(";")[0])
    available = available_bytes()
    needed = cell.needed_bytes("cpu")
    if needed > available:
        return dataclasses.replace(cell, why_not=f"needs {gib(needed)}; this machine has {gib(available)} free")
    try:
        with chosen_for_a_cpu():
            found = measure(cell.spec, samples=cell.samples, classes=CLASSES, recompute=cell.recompute, steps=steps)
    except MeasurementError as error:
        return dataclasses.replace(cell, why_not=str(error))
    return dataclasses.replace(cell, measured=found)


class MeasurementError(Exception):
    """A process that was to measure a step ended without an answer."""

    def __init__(self, reason: str):
        super().__init__(reason)


def measure(
    spec: TrialSpec,
    *,
    samples: int,
    classes: int,
    micro_batch: int | None = None,
    recompute: bool = False,
    compact: bool = True,
    steps: int = 2,
    threads: int | None = None,
) -> Measurement:
    """Run `steps` steps in a fresh process on the CPU; what they took, and the seconds of the last of them.

    `compact` as in helix.training.memory.Placement: what is measured is then what the step needs and not what the heap
    makes of it.

    Raises MeasurementError where that process fails or is killed.
    """
    how = {"samples": samples, "classes": classes, "recompute": recompute}
    try:
        return in_own_process(
            _steps, spec, how, micro_batch, compact, steps, threads=threads or torch.get_num_threads()
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise MeasurementError(str(error)) from error


def _steps(spec: TrialSpec, how: dict[str, Any], micro_batch: int | None, compact: bool, steps: int) -> Measurement:
    """What the fresh process does: take a small step to have everything loaded, then look at what the real ones add."""
    if compact:
        compact_large_blocks()
    small = dataclasses.replace(
        spec,
        model=dataclasses.replace(spec.model, width=32, pool_tokens=None),
        training=dataclasses.replace(spec.training, batch_size=1),
    )
    Rehearsal(small, **{**how, "samples": min(how["samples"], 16_000)}).step()
    gc.collect()
    _give_back()
    before = held_bytes()
    forget_peak()
    rehearsal = Rehearsal(spec, **how, micro_batch=micro_batch)
    began = time.perf_counter()
    for _ in range(steps):
        began = time.perf_counter()
        rehearsal.step()
    seconds = time.perf_counter() - began
    return Measurement(peak_bytes=peak_bytes() - before, process_bytes=before, step_seconds=seconds)


def _give_back() -> None:
    """Hand freed memory back to the system, so that what follows is not served from it. Only glibc can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
