"""The paper's Table 1 on a device: what a step of each backbone takes at each length, and the most clips that fit.

Attention stands twice: as the authors' code has it, with a matrix of weights, and as ours, without. Beside each peak
is what helix.training.memory foretold; running out of memory is a figure, and fills the paper's cell "OOM".
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from helix.bench import NotRunError, Row, Table, Target, Timing, without_frames
from helix.gpu.clock import Peak, peak_of, race_on, release, synchronize
from helix.gpu.roofline import step_bytes
from helix.gpu.section import Load, Part, Stage, scan_named, why
from helix.models.classifier import cost
from helix.out_of_memory import is_out_of_memory
from helix.protocol import profile
from helix.published import FEASIBILITY
from helix.spec import AugmentSpec, ModelSpec, TrainingSpec, TrialSpec
from helix.training.feasibility import CLASSES, SAMPLES_PER_TOKEN
from helix.training.memory import GIB, Prediction, available_bytes, needed_bytes, predict
from helix.training.resident import ResidentStep

#: Steps of which the peak is taken: from the second on the state of the optimiser is there too.
STEPS = 2

#: Of the paper's cell "OOM", as ours has it.
TARGET_GIB, TARGET_CELL = 6.0, ("attention", 30_000, "sdpa", "bf16")

#: The largest micro-batch is found to one part in so many.
FINENESS = 16

#: From this length on a search may take so many times as long: one try, a GPU full of such clips, takes seconds, about
#: 12 in fp32 (estimated: the FLOPs of 20 clips of 30,000 tokens at half of an H100's data sheet).
LONG_TOKENS, LONG_SEARCH = 10_000, 3.0


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Backbones are patterns by name. `most_batch` bounds the search for the largest micro-batch, 0 leaves it out;
    one cell may take `search_s` of it, LONG_SEARCH times that from LONG_TOKENS on."""

    backbones: dict[str, tuple[str, ...]]
    tokens: tuple[int, ...]
    precisions: tuple[str, ...]
    width: int
    most_batch: int
    search_s: float


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One backbone at one length, by one attention and at one precision. `paper` is its word there, or ""."""

    backbone: str
    tokens: int
    attn_impl: str
    precision: str
    spec: TrialSpec

    @property
    def key(self) -> tuple[str, int, str, str]:
        return self.backbone, self.tokens, self.attn_impl, self.precision

    @property
    def name(self) -> str:
        path = {"weights": ", weights", "sdpa": ", SDPA"}[self.attn_impl] if self.has_attention else ""
        return f"{self.backbone}{path}, L={self.tokens:,}, {self.precision}"

    @property
    def has_attention(self) -> bool:
        return "attention" in self.spec.model.pattern

    @property
    def samples(self) -> int:
        return self.tokens * SAMPLES_PER_TOKEN

    @property
    def paper(self) -> str:
        """What the paper says of it, which is of the authors' attention."""
        ours_only = self.attn_impl == "sdpa" and self.has_attention
        return "" if ours_only else FEASIBILITY.get(self.tokens, {}).get(self.backbone, "")

    def of(self, batch: int) -> TrialSpec:
        return dataclasses.replace(self.spec, training=dataclasses.replace(self.spec.training, batch_size=batch))


@dataclass(frozen=True, kw_only=True)
class Largest:
    """The most clips that a search found to fit, 0 where one does not. `whole`: no bound ended it too early."""

    clips: int
    whole: bool


def table1(stage: Stage, shapes: Shapes) -> Part:
    """The section: every cell's memory and time with one clip, then the largest micro-batches."""
    cells = list(cells_of(shapes))
    predicted = {cell.key: _predicted(cell, 1) for cell in cells}
    peaks: dict[tuple, Peak | Exception] = {}
    times: dict[tuple, Timing | Exception] = {}
    for cell in cells:
        stage.how.say(f"memory and time of {cell.name}")
        peaks[cell.key], times[cell.key] = _measured(stage, cell, predicted[cell.key])
    # The longest first: they are what the paper's table is about, should the time not last for all.
    searched = cells[::-1] if shapes.most_batch else []
    largest = {cell.key: _largest(stage, shapes, cell) for cell in searched}
    rows = [_row(cell, peaks[cell.key], predicted[cell.key], times[cell.key], largest) for cell in cells]
    columns = ("GiB", "taken, GiB", "foretold, GiB", "off by, %", "ms per step", "largest micro-batch")
    title = f"Table 1 of the paper, one clip in a step, width {shapes.width}, {scan_named(stage.device)}"
    targets = _targets(stage, shapes, predicted, peaks)
    loads = [load for cell in cells for load in _loads(cell, predicted[cell.key], times[cell.key])]
    return Part(
        tables=(Table(title=title, columns=columns, rows=tuple(rows)),), targets=tuple(targets), loads=tuple(loads)
    )


def cells_of(shapes: Shapes) -> Iterator[Cell]:
    """By length, backbone, attention and precision; a pattern without attention has one path only."""
    for tokens in shapes.tokens:
        for backbone, pattern in shapes.backbones.items():
            for attn_impl in ("weights", "sdpa") if "attention" in pattern else ("sdpa",):
                for precision in shapes.precisions:
                    training = TrainingSpec(batch_size=1, precision=precision)  # type: ignore[arg-type]
                    spec = TrialSpec(
                        model=ModelSpec(pattern=pattern, width=shapes.width),
                        augment=AugmentSpec(),
                        training=training,
                        protocol=dataclasses.replace(profile("paper"), attn_impl=attn_impl),
                    )
                    yield Cell(backbone=backbone, tokens=tokens, attn_impl=attn_impl, precision=precision, spec=spec)


def largest(fits: Callable[[int], bool], most: int, *, first: int = 1, time_left: Callable[[], bool]) -> Largest:
    """The largest of 1 to `most` that fits, to a part in FINENESS: doubled from `first`, or halved, then bisected.

    What fits is taken to have no gaps. `time_left` is asked before each try.
    """
    good, bad = 0, most + 1
    size = max(1, min(first, most))
    while bad - good > max(1, good // FINENESS):
        if not time_left():
            return Largest(clips=good, whole=False)
        if fits(size):
            good = size
        else:
            bad = size
        if bad > most and good < most:
            size = min(most, 2 * good)
        elif good == 0:
            size = max(1, bad // 2)
        else:
            size = (good + bad) // 2
    return Largest(clips=good, whole=bad <= most)


def _predicted(cell: Cell, batch: int) -> Prediction:
    return predict(cell.of(batch), samples=cell.samples, classes=CLASSES, device_type="cuda", graphs="off")


def _step(stage: Stage, cell: Cell, batch: int) -> ResidentStep:
    return ResidentStep(cell.of(batch), samples=cell.samples, classes=CLASSES, device=stage.device)


def _steps(stage: Stage, cell: Cell, batch: int) -> None:
    step = _step(stage, cell, batch)
    for _ in range(STEPS):
        step()
    synchronize(stage.device)


def _try(stage: Stage, cell: Cell, clips: int) -> None:
    """One step with so many clips, after one with a single clip: from the second step on the state of the optimiser is
    there too. The clips are copies of that one, made where it lies."""
    step = _step(stage, cell, 1)
    step()
    one = step.batch
    step.batch = dataclasses.replace(
        one,
        wave_BT=one.wave_BT.repeat(clips, 1),
        label_B=one.label_B.repeat(clips),
        clip_B=torch.arange(clips).to(one.clip_B),
        samples_B=one.samples_B.repeat(clips),
    )
    step()
    synchronize(stage.device)


def _measured(stage: Stage, cell: Cell, predicted: Prediction) -> tuple[Peak | Exception, Timing | Exception]:
    """What one clip takes, and how long; where that is an error, of memory say, it is the figure."""
    try:
        stage.require_time()
        _require_room(stage, predicted)
        # Libraries take memory of their own at their first call, which is not the step's.
        _steps(stage, dataclasses.replace(cell, tokens=min(cell.tokens, 64)), 1)
        peak = peak_of(stage.device, lambda: _steps(stage, cell, 1))
        quietly = dataclasses.replace(stage.how, say=lambda _line: None)
        return peak, race_on(stage.device, {cell.name: _step(stage, cell, 1)}, quietly)[cell.name]
    except (NotRunError, RuntimeError, MemoryError, OSError) as error:
        found = without_frames(error)
        return found, found
    finally:
        release(stage.device)


def _require_room(stage: Stage, predicted: Prediction) -> None:
    """NotRunError where a CPU has too little memory: there the system would kill this process, not refuse."""
    if stage.device.type == "cpu":
        needed, available = needed_bytes(predicted, "cpu", compact=True), available_bytes()
        if needed > available:
            raise NotRunError(f"needs {needed / GIB:.1f} GiB, {available / GIB:.1f} GiB are free")


def _largest(stage: Stage, shapes: Shapes, cell: Cell) -> Largest | Exception:
    stage.how.say(f"largest micro-batch of {cell.name}")
    search_s = shapes.search_s * (LONG_SEARCH if cell.tokens >= LONG_TOKENS else 1)
    until = stage.clock() + min(search_s, stage.left_s)

    def fits(clips: int) -> bool:
        try:
            _require_room(stage, _predicted(cell, clips))
            _try(stage, cell, clips)
        except NotRunError:
            return False
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            release(stage.device)
        return True

    try:
        stage.require_time()
        first = min(shapes.most_batch, _guess(stage, cell))
        return largest(fits, shapes.most_batch, first=first, time_left=lambda: stage.clock() < until)
    except Exception as error:  # what a kernel raises at some size is what there is to know of it
        return without_frames(error)


def _guess(stage: Stage, cell: Cell) -> int:
    """How many clips the prediction would put there."""
    one, two = (_predicted(cell, clips).peak_bytes for clips in (1, 2))
    return max(1, 1 + int((_free_bytes(stage.device) - one) / max(1, two - one)))


def _free_bytes(device: torch.device) -> float:
    """What a step could have: of a GPU what is free, or of the share that this process may take what it has not."""
    if device.type == "cpu":
        return available_bytes()
    free, whole = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * whole
    return min(free, allowed - torch.cuda.memory_reserved(device))


def _row(
    cell: Cell,
    peak: Peak | Exception,
    predicted: Prediction,
    time: Timing | Exception,
    largest: dict[tuple, Largest | Exception],
) -> Row:
    foretold = predicted.peak_bytes / GIB
    found = largest.get(cell.key)
    notes = [f"paper: {cell.paper}"] if cell.paper else []
    measured, taken, off = None, None, None
    if isinstance(peak, Exception):
        notes.append(why(peak))
    else:
        measured = peak.tensor_bytes / GIB
        taken = None if peak.reserved_bytes is None else peak.reserved_bytes / GIB
        off = 100 * (foretold / measured - 1) if measured > 0 else None
    if isinstance(time, Exception) and not isinstance(peak, Exception):
        notes.append(why(time))
    if isinstance(found, Exception):
        notes.append(f"micro-batch: {why(found)}")
    elif found is not None and not found.whole:
        notes.append("micro-batch: at least; a bound ended the search")
    step_ms = 1e3 * time.wall_s if isinstance(time, Timing) else None
    clips = float(found.clips) if isinstance(found, Largest) else None
    return Row(name=cell.name, values=(measured, taken, foretold, off, step_ms, clips), note="; ".join(notes))


def _loads(cell: Cell, predicted: Prediction, time: Timing | Exception) -> list[Load]:
    if not isinstance(time, Timing):
        return []
    price = cost(cell.spec.model, cell.spec.protocol, classes=CLASSES, samples=cell.samples)
    return [
        Load(
            name=f"step of {cell.name}, B=1",
            seconds=time.cpu_s,
            flops=price.training_flops_per_clip,
            moved_bytes=step_bytes(predicted),
            unit=cell.precision,
        )
    ]


def _targets(
    stage: Stage,
    shapes: Shapes,
    predicted: dict[tuple, Prediction],
    peaks: dict[tuple, Peak | Exception],
) -> Sequence[Target]:
    on_gpu = stage.device.type == "cuda"
    peak = peaks.get(TARGET_CELL)
    holds = isinstance(peak, Peak) and peak.reserved_bytes is not None and shapes.width == 256
    taken = {key: found.reserved_bytes for key, found in peaks.items() if isinstance(found, Peak)}
    shares = [bytes_ / predicted[key].upper_bytes("cuda") for key, bytes_ in taken.items() if bytes_ is not None]
    return [
        Target(
            name="pure attention (SDPA) on 30,000 tokens, one clip, bf16: memory taken",
            wanted=TARGET_GIB,
            found=peak.reserved_bytes / GIB if holds and isinstance(peak, Peak) and peak.reserved_bytes else None,
            unit="GiB",
            at_most=True,
        ),
        Target(
            name="memory taken over what the prediction's bound allows, the worst cell",
            wanted=1.0,
            found=max(shares) if shares and on_gpu else None,
            unit="times",
            at_most=True,
        ),
    ]
