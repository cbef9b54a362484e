"""The paper's Table 1 (computational feasibility): which backbone trains on how many tokens, and in how much memory.

The paper calls pure attention at 30,000 tokens out of memory on a GPU of 48 GB. Its authors' code asks for the weights
of attention, so that a matrix of tokens x tokens is kept for every head; the same outputs can be had without. Both
stand side by side here, predicted from shapes and, where that is asked for, measured, a process for each cell.
"""

import ctypes
import dataclasses
import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from helix.protocol import profile
from helix.spec import AugmentSpec, ModelSpec, TrainingSpec, TrialSpec, from_json, to_json
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

#: The lengths of Table 1 in tokens of a raw waveform, 160 samples each: 5 s, 30 s and 300 s.
TOKENS = (500, 3_000, 30_000)
SAMPLES_PER_TOKEN = 160

#: What the paper found on its GPU, by tokens and backbone ("trains", "slow" or "OOM").
PAPER_TABLE_1 = {
    500: {"mamba": "trains", "helix": "trains", "attention": "trains"},
    3_000: {"mamba": "trains", "helix": "trains", "attention": "slow"},
    30_000: {"mamba": "trains", "helix": "trains", "attention": "OOM"},
}
PAPER_GPU_BYTES = 48 * 10**9

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
    """One backbone on one length by one path. `why_not` says why a cell that was to be measured was not."""

    backbone: str
    tokens: int
    attn_impl: str
    recompute: bool
    spec: TrialSpec
    predicted: Prediction
    paper: str
    measured: Measurement | None = None
    why_not: str | None = None

    @property
    def samples(self) -> int:
        return self.tokens * SAMPLES_PER_TOKEN

    def needed_bytes(self, device_type: Device) -> int:
        """What surely is enough: with the error bound, and the process itself."""
        return needed_bytes(self.predicted, device_type, compact=True)

    def verdict(self, limit_bytes: int) -> Literal["fits", "tight", "no"]:
        """Whether it fits into a GPU of that size: "tight" where only the error bound says that it might not."""
        if self.needed_bytes("cuda") <= limit_bytes:
            return "fits"
        return "tight" if self.predicted.peak_bytes <= limit_bytes else "no"

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
        value["predicted"] = {**dataclasses.asdict(self.predicted), "peak_bytes": self.predicted.peak_bytes}
        value["measured"] = None if self.measured is None else dataclasses.asdict(self.measured)
        return {**value, "why_not_measured": self.why_not}


def table(
    backbones: Mapping[str, Sequence[str]],
    *,
    tokens: Sequence[int] = TOKENS,
    batch: int = 1,
    precision: str = "fp32",
    width: int = 256,
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
                for recompute in (False, True):
                    predicted = predict(spec, samples=length * SAMPLES_PER_TOKEN, classes=CLASSES, recompute=recompute)
                    cells.append(
                        Cell(
                            backbone=backbone,
                            tokens=length,
                            attn_impl=attn_impl,
                            recompute=recompute,
                            spec=spec,
                            predicted=predicted,
                            paper=PAPER_TABLE_1.get(length, {}).get(backbone, ""),
                        )
                    )
    return cells


def measured(cell: Cell, *, steps: int = 2) -> Cell:
    """The cell with what its step took on this machine's CPU, or with why it was not run here."""
    available = available_bytes()
    needed = cell.needed_bytes("cpu")
    if needed > available:
        return dataclasses.replace(cell, why_not=f"needs {gib(needed)}; this machine has {gib(available)} free")
    try:
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
    order = {"spec": to_json(spec), "samples": samples, "classes": classes, "micro_batch": micro_batch}
    order |= {"recompute": recompute, "compact": compact, "steps": steps, "threads": threads or torch.get_num_threads()}
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    process = subprocess.run(
        [sys.executable, "-m", "helix.training.feasibility"],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise MeasurementError(f"the process that measured ended with {process.returncode}: {last}")
    return Measurement(**json.loads(process.stdout.splitlines()[-1]))


def run_order(order: Mapping[str, Any]) -> Measurement:
    """What the fresh process does: take a small step to have everything loaded, then look at what the real ones add."""
    torch.set_num_threads(order["threads"])
    if order["compact"]:
        compact_large_blocks()
    spec = from_json(order["spec"])
    options = {"classes": order["classes"], "recompute": order["recompute"], "micro_batch": order["micro_batch"]}
    small = dataclasses.replace(
        spec,
        model=dataclasses.replace(spec.model, width=32, pool_tokens=None),
        training=dataclasses.replace(spec.training, batch_size=1),
    )
    Rehearsal(small, samples=min(order["samples"], 16_000), **{**options, "micro_batch": None}).step()
    gc.collect()
    _give_back()
    before = psutil.Process().memory_info().rss
    _reset_peak()
    rehearsal = Rehearsal(spec, samples=order["samples"], **options)
    began = time.perf_counter()
    for _ in range(order["steps"]):
        began = time.perf_counter()
        rehearsal.step()
    seconds = time.perf_counter() - began
    return Measurement(peak_bytes=_peak() - before, process_bytes=before, step_seconds=seconds)


def _give_back() -> None:
    """Hand freed memory back to the system, so that what follows is not served from it. Only glibc can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_peak() -> None:
    """Let the peak begin at what is held now; where the system refuses, the small step has left it near there."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak() -> int:
    """The most memory that this process has held since the reset."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    json.dump(dataclasses.asdict(run_order(json.load(sys.stdin))), sys.stdout)
