"""Whole training steps (augmentation, forward, loss, backward, clipping, AdamW): time, growth, peak memory.

The model is ours in every row; what differs is the scan or the attention inside it, with the same weights and the same
clips. Legend: B batch, T samples, L tokens, E channels.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
from torch import Tensor

from helix.bench import (
    TIMING_COLUMNS,
    Conditions,
    NotRunError,
    Outcome,
    Row,
    Table,
    Target,
    Timing,
    brief,
    process_clocks,
    race,
    ratio_of,
    require_positive,
    timing_row,
)
from helix.models.agreement import compile_kernels
from helix.models.blocks import mamba
from helix.peers import MissingPeerError, load_mambapy
from helix.process import forget_peak, in_own_process, peak_bytes
from helix.protocol import Protocol
from helix.registry import BENCHES
from helix.spec import ModelSpec, TrainingSpec, TrialSpec
from helix.training.memory import compact_large_blocks
from helix.training.resident import BACKBONES, ResidentStep, noise, pattern_of

SAMPLES_PER_TOKEN = 160
CLASSES = 50

#: Whether blocks run again in the backward instead of keeping what is inside them, where the classifier can.
RECOMPUTE = (False, True)

#: Tokens of the step before the one that is weighed: it compiles, and makes the state of the optimiser.
WARM_UP_TOKENS = 16

#: Tensors of (B, L, E, N) that mambapy's scan keeps for its backward, and those that one backward needs beside them.
MAMBAPY_KEEPS, MAMBAPY_NEEDS = 3, 8

SCAN_TARGET = 20.0
GROWTH_TARGET = 12.0
#: Peak memory of the process in GB (10^9 bytes) at 30,000 tokens, without and with recomputation.
MEMORY_TOKENS = 30_000
MEMORY_TARGETS_GB = {"attention": (4.5, 2.2), "helix": (6.5, 2.2), "mamba": (6.5, 2.2)}


@BENCHES.register("step")
@dataclass(frozen=True, kw_only=True)
class StepBench:
    """Steps of `batch` clips of `tokens` for the comparisons, of one clip for growth and memory. The defaults are the
    paper's size. Memory is taken for `backbones` at `memory_tokens`, where that is not 0, by `memory_threads`
    (0: one for each core): at 30,000 tokens attention takes minutes, and its memory hardly depends on threads."""

    batch: int = 8
    tokens: int = 500
    width: int = 256
    layers: int = 6
    growth: tuple[int, ...] = (3000, 30_000)
    memory_tokens: int = 30_000
    memory_threads: int = 0
    backbones: tuple[str, ...] = BACKBONES

    def __post_init__(self) -> None:
        require_positive(self, zero=("memory_tokens", "memory_threads"))
        unknown = set(self.backbones) - set(BACKBONES)
        if unknown:
            raise ValueError(f"bench 'step': backbones has {', '.join(unknown)}; known: {', '.join(BACKBONES)}")

    def run(self, how: Conditions) -> Outcome:
        compile_kernels()
        scans = self._race_scans(how)
        attentions = self._race_attentions(how)
        growth = self._race_lengths(how) if self.growth else {}
        memory = self._weigh(how) if self.memory_tokens else {}
        shape = f"B={self.batch}, L={self.tokens:,}, width {self.width}, {self.layers} layers"
        tables = [
            self._times(f"one training step of pure Mamba, {shape}", scans, "helix scan"),
            self._times(f"one training step of pure attention, {shape}", attentions, "SDPA"),
        ]
        if growth:
            tables.append(self._growth_table(growth))
        if memory:
            tables.append(self._memory_table(memory))
        return Outcome(tables=tuple(tables), targets=tuple(self._targets(scans, growth, memory)))

    def _step(
        self, backbone: str, *, batch: int, tokens: int, protocol: Protocol, recompute: bool = False
    ) -> ResidentStep:
        pattern = pattern_of(backbone, self.layers)
        return step_of(pattern, self.width, batch, tokens, protocol, recompute=recompute)

    def _race_scans(self, how: Conditions) -> dict[str, Timing | Exception]:
        step = self._step("mamba", batch=self.batch, tokens=self.tokens, protocol=Protocol())
        contestants: dict[str, Callable[[], object]] = {"helix scan": step}
        refused: dict[str, Exception] = {}
        try:
            scan = load_mambapy()
            self._require_memory_for_mambapy()
            peer = self._step("mamba", batch=self.batch, tokens=self.tokens, protocol=Protocol())
            contestants["mambapy pscan"] = lambda: swapped(scan, peer)
        except MissingPeerError as error:
            refused["mambapy pscan"] = NotRunError(f"not here: {error}")
        except NotRunError as error:
            refused["mambapy pscan"] = error
        how.say(f"steps of pure Mamba, B={self.batch}, L={self.tokens}")
        return race(contestants, how, clocks=process_clocks) | refused

    def _race_attentions(self, how: Conditions) -> dict[str, Timing | Exception]:
        how.say(f"steps of pure attention, B={self.batch}, L={self.tokens}")
        return race(
            {
                name: self._step("attention", batch=self.batch, tokens=self.tokens, protocol=protocol)
                for name, protocol in (("SDPA", Protocol(attn_impl="sdpa")), ("weights", Protocol(attn_impl="weights")))
            },
            how,
            clocks=process_clocks,
        )

    def _race_lengths(self, how: Conditions) -> dict[str, Timing | Exception]:
        how.say("steps of one clip of pure Mamba")
        contestants = {
            _length_name(tokens, recompute): self._step(
                "mamba", batch=1, tokens=tokens, protocol=Protocol(), recompute=recompute
            )
            for recompute in RECOMPUTE
            for tokens in self.growth
        }
        # A ratio of one long run to a median of many short ones would be at the mercy of the moment.
        patient = dataclasses.replace(how, repeats=min(3, how.repeats), patience_s=300.0, budget_s=600.0)
        return race(contestants, patient, clocks=process_clocks)

    def _weigh(self, how: Conditions) -> dict[tuple[str, bool], float | Exception]:
        found: dict[tuple[str, bool], float | Exception] = {}
        for backbone in self.backbones:
            for recompute in RECOMPUTE:
                how.say(f"memory of {backbone}, L={self.memory_tokens}{', recomputed' if recompute else ''}")
                shape = (pattern_of(backbone, self.layers), self.width, self.memory_tokens, recompute)
                threads = self.memory_threads or psutil.cpu_count() or 1
                try:
                    found[backbone, recompute] = in_own_process(peak_gb, *shape, threads=threads)
                except (OSError, RuntimeError, ValueError) as error:
                    found[backbone, recompute] = error
        return found

    def _require_memory_for_mambapy(self) -> None:
        """NotRunError where the step would not fit: the system would kill this process, not refuse."""
        block = mamba.BiMamba()
        element_bytes = 4 * self.batch * self.tokens * block.expand * self.width * block.d_state
        needed = element_bytes * (2 * self.layers * MAMBAPY_KEEPS + MAMBAPY_NEEDS)
        available = psutil.virtual_memory().available
        if needed > available:
            raise NotRunError(f"needs about {needed / 1e9:.0f} GB, {available / 1e9:.0f} GB are free")

    def _times(self, title: str, results: Mapping[str, Timing | Exception], ours: str) -> Table:
        each_s = 1e-6 * self.batch * self.tokens
        rows = tuple(timing_row(name, result, results[ours], each_s=each_s) for name, result in results.items())
        return Table(title=title, columns=(*TIMING_COLUMNS, "us per token"), rows=rows)

    def _growth_table(self, growth: Mapping[str, Timing | Exception]) -> Table:
        rows = []
        for recompute in RECOMPUTE:
            shortest = growth[_length_name(min(self.growth), recompute)]
            for tokens in self.growth:
                name = _length_name(tokens, recompute)
                result = growth[name]
                if isinstance(result, Exception) or isinstance(shortest, Exception):
                    note = brief(result) if isinstance(result, Exception) else ""
                    rows.append(Row(name=name, values=(None,) * 3, note=note))
                else:
                    values = (result.cpu_s, result.wall_s, result.cpu_s / shortest.cpu_s)
                    note = f"median of {result.runs}" if result.runs > 1 else "one run"
                    rows.append(Row(name=name, values=values, note=note))
        columns = ("CPU s", "wall s", "times the shortest")
        return Table(title="one training step of pure Mamba, B=1", columns=columns, rows=tuple(rows))

    def _memory_table(self, memory: Mapping[tuple[str, bool], float | Exception]) -> Table:
        rows = tuple(
            Row(
                name=f"{backbone}{', recomputed' if recompute else ''}",
                values=(None,) if isinstance(peak, Exception) else (peak,),
                note=brief(peak) if isinstance(peak, Exception) else "",
            )
            for (backbone, recompute), peak in memory.items()
        )
        title = f"peak memory of the process in one training step, B=1, L={self.memory_tokens:,}, fp32"
        return Table(title=title, columns=("GB",), rows=rows)

    def _targets(self, scans: Mapping, growth: Mapping, memory: Mapping) -> list[Target]:
        paper = (self.width, self.layers) == (256, 6)
        ratio = ratio_of(scans, "mambapy pscan", "helix scan")
        found = ratio if paper and (self.batch, self.tokens) == (8, 500) else None
        name = "step of pure Mamba, B=8, L=500: mambapy pscan / helix scan"
        targets = [Target(name=name, wanted=SCAN_TARGET, found=found, unit="times")]
        long, short = (_length_name(tokens, False) for tokens in (30_000, 3000))
        found = ratio_of(growth, long, short) if paper else None
        name = "growth of a step of pure Mamba, t(30,000) / t(3,000)"
        targets.append(Target(name=name, wanted=GROWTH_TARGET, found=found, unit="times", at_most=True))
        for backbone, limits in MEMORY_TARGETS_GB.items():
            for recompute, wanted in zip((False, True), limits, strict=True):
                peak = memory.get((backbone, recompute)) if paper and self.memory_tokens == MEMORY_TOKENS else None
                name = f"peak memory, L={MEMORY_TOKENS:,}, {backbone}{', recomputed' if recompute else ''}"
                found = peak if isinstance(peak, float) else None
                targets.append(Target(name=name, wanted=wanted, found=found, unit="GB", at_most=True))
        return targets


def step_of(
    pattern: tuple[str, ...], width: int, batch: int, tokens: int, protocol: Protocol, *, recompute: bool
) -> ResidentStep:
    """The trainer's step of such a model on noise of so many tokens."""
    spec = TrialSpec(
        model=ModelSpec(pattern=pattern, width=width), training=TrainingSpec(batch_size=batch), protocol=protocol
    )
    return ResidentStep(spec, samples=tokens * SAMPLES_PER_TOKEN, classes=CLASSES, recompute=recompute)


def swapped(scan: Callable[..., Tensor], step: Callable[[], Tensor]) -> Tensor:
    """One step with another scan inside our Mamba."""
    with another_scan(scan):
        return step()


@contextmanager
def another_scan(scan: Callable[..., Tensor]) -> Iterator[None]:
    """Every Mamba layer scans with `scan`, in this whole process, until the end of the block."""
    ours = mamba.selective_scan
    mamba.selective_scan = scan  # type: ignore[assignment]
    try:
        yield
    finally:
        mamba.selective_scan = ours


def peak_gb(pattern: tuple[str, ...], width: int, tokens: int, recompute: bool) -> float:
    """GB (10^9 bytes) that a process holds at the peak of one step of one clip; to be run in one of its own.

    Freed blocks go back to the system at once, as in a worker whose memory is short.
    """
    compact_large_blocks()
    step = step_of(pattern, width, 1, WARM_UP_TOKENS, Protocol(), recompute=recompute)
    step()
    step.batch = noise(1, tokens * SAMPLES_PER_TOKEN, classes=CLASSES)
    forget_peak()
    step()
    return peak_bytes() / 1e9


def _length_name(tokens: int, recompute: bool) -> str:
    return f"L={tokens:,}{', recomputed' if recompute else ''}"
