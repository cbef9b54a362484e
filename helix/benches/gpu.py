"""Everything that only a GPU can say: the scan, the step beside the authors' code, Table 1, and how near the limits.

    helix bench gpu authors=DIR source=ESC-50-master
    helix bench gpu sections=table1 memory_gib=44

A section ends after `section_s` seconds, that of Table 1 after `table_s`, what is left being rows that say so. It is
printed as it ends; one that fails is a row with its error, the others go on, and the exit code is 1. `device=cpu`
measures the same by the CPU's clocks, at sizes that a CPU can do; it says nothing about a GPU.
"""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from helix.bench import Conditions, Outcome, Row, Table, require_positive, without_frames
from helix.gpu import lengths, scans, steps
from helix.gpu.clock import known_objects_aside, release
from helix.gpu.roofline import roofline
from helix.gpu.section import Part, Stage, lost
from helix.models.agreement import compile_kernels
from helix.registry import BENCHES
from helix.spec import PRECISIONS
from helix.training.memory import GIB
from helix.training.resident import BACKBONES, pattern_of

logger = logging.getLogger(__name__)

SECTIONS = ("scan", "step", "table1", "roofline")


@BENCHES.register("gpu")
@dataclass(frozen=True, kw_only=True)
class GpuBench:
    """The defaults are the paper's sizes. `tokens` are the scan's lengths, with about `in_flight` tokens in a batch of
    at most `batch`; `table_tokens` those of Table 1, where micro-batches are tried up to `most_batch` (0: none) for
    `search_s` each, three times that at 30,000 tokens. `authors` is a clone of the authors' repository, `source` the
    folder of ESC-50; without it `clips` of noise stand in. `epochs` are timed end to end (0: none). `memory_gib`: as if
    the GPU had no more (0: all that it has)."""

    device: str = "cuda"
    sections: tuple[str, ...] = SECTIONS
    section_s: float = 420.0
    table_s: float = 1200.0
    precisions: tuple[str, ...] = PRECISIONS
    tokens: tuple[int, ...] = (100, 500, 3000, 30_000)
    in_flight: int = 16_000
    channels: int = 512
    state: int = 32
    error_channels: int = 64
    batch: int = 32
    samples: int = steps.CLIP_SAMPLES
    width: int = 256
    layers: int = 6
    frontends: tuple[str, ...] = ("raw", "mel")
    authors: str = ""
    source: str = ""
    clips: int = steps.ESC50_CLIPS
    epochs: int = 2
    scratch: str = ""
    backbones: tuple[str, ...] = BACKBONES
    table_tokens: tuple[int, ...] = (500, 3000, 30_000)
    table_precisions: tuple[str, ...] = ("fp32", "bf16")
    most_batch: int = 4096
    search_s: float = 20.0
    memory_gib: int = 0

    def __post_init__(self) -> None:
        require_positive(self, zero=("epochs", "most_batch", "memory_gib"))
        for option, known in (
            ("sections", SECTIONS),
            ("precisions", PRECISIONS),
            ("table_precisions", PRECISIONS),
            ("frontends", ("raw", "mel")),
            ("backbones", BACKBONES),
        ):
            unknown = [name for name in getattr(self, option) if name not in known]
            if unknown or not getattr(self, option):
                given = ", ".join(unknown) or "nothing"
                raise ValueError(f"bench 'gpu': {option} has {given}; known: {', '.join(known)}")
        for option in ("section_s", "table_s", "search_s"):
            if not getattr(self, option) > 0:
                raise ValueError(f"{option} is {getattr(self, option)}; wanted seconds above 0")
        steps.check_folders(self._step_sizes())

    def run(self, how: Conditions) -> Outcome:
        device = usable(self.device)
        if device.type == "cpu":
            compile_kernels()
        outcomes = [Outcome(tables=(_device_table(device, self.memory_gib),))]
        how.show(outcomes[0])
        with known_objects_aside(), limited(device, self.memory_gib):
            parts: list[Part] = []
            for name in (name for name in SECTIONS if name in self.sections):
                how.say(f"section {name}")
                parts.append(self._tried(name, device, how, parts))
                outcomes.append(_outcome(parts[-1]))
                how.show(outcomes[-1])
        return Outcome(
            tables=tuple(table for one in outcomes for table in one.tables),
            targets=tuple(target for one in outcomes for target in one.targets),
            failed=tuple(what for one in outcomes for what in one.failed),
        )

    def _tried(self, name: str, device: torch.device, how: Conditions, before: list[Part]) -> Part:
        """The section, or a row with what ended it: what the others found is not to be lost with it."""
        try:
            option = "table_s" if name == "table1" else "section_s"
            part = self._section(name, Stage.begin(device, how, getattr(self, option), option), before)
            release(device)
            return part
        except Exception as error:  # kernels and code of others may raise anything
            logger.exception("section %s ended with an error", name)
            part = lost(f"section {name}", without_frames(error))
        # After some errors a GPU answers nothing any more; then each section says so.
        with suppress(RuntimeError):
            release(device)
        return part

    def _section(self, name: str, stage: Stage, before: list[Part]) -> Part:
        sections: dict[str, Callable[[], Part]] = {
            "scan": lambda: scans.scans(stage, self._scan_shapes()),
            "step": lambda: steps.steps(stage, self._step_sizes()),
            "table1": lambda: lengths.table1(stage, self._table_shapes()),
            "roofline": lambda: roofline(stage, [load for part in before for load in part.loads]),
        }
        return sections[name]()

    def _scan_shapes(self) -> scans.Shapes:
        return scans.Shapes(
            tokens=self.tokens,
            batch=self.batch,
            in_flight=self.in_flight,
            channels=self.channels,
            state=self.state,
            error_channels=self.error_channels,
        )

    def _step_sizes(self) -> steps.Sizes:
        return steps.Sizes(
            batch=self.batch,
            samples=self.samples,
            width=self.width,
            layers=self.layers,
            precisions=self.precisions,
            frontends=self.frontends,
            authors=self.authors,
            source=self.source,
            clips=self.clips,
            epochs=self.epochs,
            scratch=self.scratch,
        )

    def _table_shapes(self) -> lengths.Shapes:
        return lengths.Shapes(
            backbones={name: pattern_of(name, self.layers) for name in self.backbones},
            tokens=self.table_tokens,
            precisions=self.table_precisions,
            width=self.width,
            most_batch=self.most_batch,
            search_s=self.search_s,
        )


def usable(name: str) -> torch.device:
    """The device of that name with its index, and from now on the current one: kernels of Triton are launched there.

    ValueError where torch has none such here."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"bench 'gpu': device is {name!r}; wanted cuda, cuda:0 and so on, or cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "bench 'gpu' needs a CUDA device, and torch finds none here (helix doctor says why); device=cpu runs it on "
            "the CPU, at sizes that you choose"
        )
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"bench 'gpu': device is {name!r}; torch finds {torch.cuda.device_count()} GPUs, from cuda:0"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


@contextmanager
def limited(device: torch.device, memory_gib: int) -> Iterator[None]:
    """The allocator of a GPU, named with its index, hands out no more than so much.

    ValueError for a CPU and for more than there is."""
    if not memory_gib:
        yield
        return
    if device.type != "cuda":
        raise ValueError("memory_gib limits what a GPU hands out; with device=cpu leave it out")
    whole = torch.cuda.get_device_properties(device).total_memory
    if memory_gib * GIB > whole:
        raise ValueError(f"memory_gib is {memory_gib}; this GPU has {whole / GIB:.1f}")
    torch.cuda.set_per_process_memory_fraction(memory_gib * GIB / whole, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _outcome(part: Part) -> Outcome:
    return Outcome(tables=part.tables, targets=part.targets, failed=part.failed)


def _device_table(device: torch.device, memory_gib: int) -> Table:
    if device.type == "cpu":
        return Table(
            title="device", columns=("GiB",), rows=(Row(name="CPU", values=(None,), note="says nothing of GPUs"),)
        )
    seen = torch.cuda.get_device_properties(device)
    note = f"sm_{seen.major}{seen.minor}, CUDA {torch.version.cuda}"
    if memory_gib:
        note += f", limited to {memory_gib} GiB"
    return Table(
        title="device", columns=("GiB",), rows=(Row(name=seen.name, values=(seen.total_memory / GIB,), note=note),)
    )
