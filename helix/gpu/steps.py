"""A training step on ESC-50's shape: the product's beside the authors' code on the same device, alone and end to end.

Alone: the batch lies on the device, and ours augments and mixes it, which their model is spared. End to end: their
loop with their loader and evaluation beside ours, `fit` with all that it does (augmentation, evaluation, rows,
checkpoints), from the same WAV files. Their model always has the paper's size.

Legend: B batch, T samples.
"""

import csv
import dataclasses
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from helix.bench import NotRunError, Row, Table, Target, Timing, without_frames
from helix.data.dataset import official_root
from helix.data.datasets.esc50 import CLASSES, COLUMNS, TABLE
from helix.data.shards import Recordings, open_prepared, prepare
from helix.gpu.clock import race_on, release, synchronize
from helix.gpu.roofline import step_bytes
from helix.gpu.section import COLUMNS as TIME_COLUMNS
from helix.gpu.section import Load, Part, Stage, device_row, lost, scan_named, wall_ratio, why
from helix.models.classifier import cost
from helix.peers import MissingPeerError
from helix.protocol import profile
from helix.spec import DataSpec, ModelSpec, TrainingSpec, TrialSpec
from helix.storage import FolderStorage
from helix.training.graphs import Choice
from helix.training.memory import predict
from helix.training.resident import ResidentStep
from helix.training.trainer import Fit, fit
from helix.training_peers import AuthorsCode, bare_step, clone_at, load_authors_code

logger = logging.getLogger(__name__)

BACKBONE = "mamba"
CLIP_SAMPLES, MODEL_HZ, OFFICIAL_HZ = 80_000, 16_000, 44_100
#: Steps of their loop in one call, so that what it does once an epoch weighs little.
LOOP_STEPS = 5

MODEL = "authors: their model alone, nothing waits"
LOOP = "authors: their loop, batches on the device"
END_TO_END = "authors: their loop, loader and evaluation"

#: Beside figures that are not of their model.
STOOD_IN = "mamba-ssm cannot be imported: a Mamba layer of ours stands in for theirs, so no target is judged"

#: Beside steps of ours that were to be replayed as a graph and were not.
NO_GRAPH = "its graph was given up (a warning says why), so without one"

#: ESC-50's clips, and the schedule of the paper: five folds of a hundred epochs, each of so many steps and test clips.
ESC50_CLIPS, PAPER_FOLDS, PAPER_EPOCHS, PAPER_STEPS, PAPER_TESTED = 2000, 5, 100, 50, 400
END_TO_END_TARGET, ALONE_TARGET, PAPER_TARGET_MINUTES = 10.0, 1.3, 10.0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The paper's, unless a test says otherwise. `authors` and `source` are folders or "", `scratch` where files go;
    without a source as many clips of noise as `clips` are written there. `epochs` are timed after one that is not."""

    batch: int
    samples: int
    width: int
    layers: int
    precisions: tuple[str, ...]
    frontends: tuple[str, ...]
    authors: str
    source: str
    clips: int
    epochs: int
    scratch: str

    @property
    def is_papers(self) -> bool:
        return (self.batch, self.samples, self.width, self.layers) == (32, CLIP_SAMPLES, 256, 6)


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What one epoch took on the wall, of it what its steps took, the rest being the evaluation of `tested` clips; and
    what came before the first and after the last."""

    seconds: float
    train_s: float
    steps: int
    tested: int
    start_s: float = 0.0


def steps(stage: Stage, sizes: Sizes) -> Part:
    """The section: batches on the device for each frontend, then epochs from files of the first of them."""
    missing = ""
    try:
        code = load_authors_code(sizes.authors)
        said = "" if code.own_mamba else STOOD_IN
    except MissingPeerError as error:
        code, said, missing = None, "", f"not run: {str(error).splitlines()[0]}"
    tables, targets, loads = [], [], []
    for frontend in sizes.frontends:
        stage.how.say(f"steps of pure Mamba on {frontend}, B={sizes.batch}")
        found, notes = _alone(stage, sizes, frontend, code)
        notes |= dict.fromkeys((MODEL, LOOP), said)
        tables.append(_alone_table(stage, sizes, frontend, found, notes, missing))
        loads += _loads(sizes, frontend, found)
        if frontend == "raw":
            targets += _alone_targets(sizes, found, code)
    failed: tuple[str, ...] = ()
    if sizes.epochs:
        try:
            with tempfile.TemporaryDirectory(prefix="helix-bench-", dir=sizes.scratch or None) as folder:
                files = _files(stage, sizes, Path(folder))
                for frontend in sizes.frontends:
                    epochs = _end_to_end(stage, sizes, frontend, code, files)
                    tables.append(_epoch_table(stage, sizes, frontend, epochs, files, said, missing))
                    if frontend == "raw":
                        targets += _epoch_targets(sizes, epochs, code)
        except Exception as error:  # of files, say: the steps above have their figures all the same
            logger.exception("the epochs ended with an error")
            ended = lost("section step: epochs", without_frames(error))
            tables, failed = [*tables, *ended.tables], ended.failed
    return Part(tables=tuple(tables), targets=tuple(targets), loads=tuple(loads), failed=failed)


def check_folders(sizes: Sizes) -> None:
    """ValueError where a folder is named that is not what it should be, before minutes are spent on anything."""
    if sizes.authors:
        try:
            clone_at(sizes.authors)
        except MissingPeerError as error:
            raise ValueError(f"authors: {error}") from error
    if sizes.source:
        official_root(Path(sizes.source).expanduser(), TABLE, "esc50")
    if sizes.scratch and not Path(sizes.scratch).is_dir():
        raise ValueError(f"scratch is {sizes.scratch!r}; wanted a folder that is there")


def spec_of(sizes: Sizes, frontend: str, precision: str) -> TrialSpec:
    """Pure Mamba on ESC-50 as the authors' code has it: their profile."""
    training = TrainingSpec(batch_size=sizes.batch, epochs=1 + sizes.epochs, precision=precision)  # type: ignore[arg-type]
    return TrialSpec(
        data=DataSpec(dataset="esc50"),
        model=ModelSpec(frontend=frontend, pattern=(BACKBONE,) * sizes.layers, width=sizes.width),
        training=training,
        protocol=profile("authors"),
    )


def ours(precision: str) -> str:
    return f"helix, {precision}"


def _alone(
    stage: Stage, sizes: Sizes, frontend: str, code: AuthorsCode | None
) -> tuple[dict[str, Timing | Exception], dict[str, str]]:
    """The times, and what is to be said beside some."""
    contestants: dict[str, Callable[[], object]] = {}
    try:
        stage.require_time()
        own = [_resident(stage, sizes, frontend, precision) for precision in sizes.precisions]
        contestants |= {ours(precision): step for precision, step in zip(sizes.precisions, own, strict=True)}
        for precision, step in zip(sizes.precisions, own, strict=True):
            if step.replay is not None:
                contestants[f"{ours(precision)}, no graph"] = _resident(stage, sizes, frontend, precision, graphs="off")
        if code is not None:
            with torch.no_grad():
                features = own[0].model.features(own[0].batch.wave_BT)
            batch = (features[:, None] if features.ndim == 2 else features), own[0].batch.label_B
            for name in (MODEL, LOOP):
                model = code.classifier(frontend, (), classes=len(CLASSES), device=stage.device).train()
                optimizer = code.optimizer(model)
                if name == MODEL:
                    contestants[name] = bare_step(model, optimizer, *batch)
                else:
                    contestants[name] = partial(code.epoch, model, [batch] * LOOP_STEPS, optimizer, stage.device)
    except (NotRunError, RuntimeError, MemoryError) as error:
        return {ours(precision): without_frames(error) for precision in sizes.precisions}, {}
    found = race_on(stage.device, contestants, stage.how)
    if isinstance(looped := found.get(LOOP), Timing):
        each = {name: getattr(looped, name) / LOOP_STEPS for name in ("cpu_s", "wall_s")}
        found[LOOP] = dataclasses.replace(looped, **each)
    notes = {
        ours(precision): NO_GRAPH
        for precision, step in zip(sizes.precisions, own, strict=True)
        if step.replay is not None and not step.replay.replays
    }
    return found, notes


def _resident(stage: Stage, sizes: Sizes, frontend: str, precision: str, graphs: Choice = "auto") -> ResidentStep:
    spec = spec_of(sizes, frontend, precision)
    return ResidentStep(spec, samples=sizes.samples, classes=len(CLASSES), device=stage.device, graphs=graphs)


def _alone_table(
    stage: Stage,
    sizes: Sizes,
    frontend: str,
    found: Mapping[str, Timing | Exception],
    notes: Mapping[str, str],
    missing: str,
) -> Table:
    first = found[ours(sizes.precisions[0])]
    columns = (*TIME_COLUMNS, "ms per clip")
    rows = [device_row(name, result, first, each_s=1e-3 * sizes.batch) for name, result in found.items()]
    rows = [_saying(row, notes.get(row.name, "")) for row in rows]
    rows += [Row(name=name, values=(None,) * len(columns), note=missing) for name in (MODEL, LOOP) if missing]
    shape = f"B={sizes.batch}, {sizes.samples:,} samples, on the device"
    title = f"one training step of pure Mamba on {frontend}, {shape}, ours with the {scan_named(stage.device)}"
    return Table(title=title, columns=columns, rows=tuple(rows))


def _saying(row: Row, said: str) -> Row:
    return dataclasses.replace(row, note="; ".join(filter(None, (row.note, said))))


def _loads(sizes: Sizes, frontend: str, found: Mapping[str, Timing | Exception]) -> list[Load]:
    loads = []
    for precision in sizes.precisions:
        result, spec = found[ours(precision)], spec_of(sizes, frontend, precision)
        if isinstance(result, Timing):
            price = cost(spec.model, spec.protocol, classes=len(CLASSES), samples=sizes.samples)
            loads.append(
                Load(
                    name=f"step of pure Mamba on {frontend}, B={sizes.batch}, {precision}",
                    seconds=result.cpu_s,
                    flops=sizes.batch * price.training_flops_per_clip,
                    moved_bytes=step_bytes(
                        predict(spec, samples=sizes.samples, classes=len(CLASSES), device_type="cuda")
                    ),
                    unit=precision,
                )
            )
    return loads


def _alone_targets(sizes: Sizes, found: Mapping[str, Timing | Exception], code: AuthorsCode | None) -> list[Target]:
    """A layer of ours in the place of theirs says nothing of their pace."""
    counts = sizes.is_papers and code is not None and code.own_mamba
    return [
        Target(
            name=f"step of raw pure Mamba on the device: authors' model alone / {ours(precision)}",
            wanted=ALONE_TARGET,
            found=wall_ratio(found.get(MODEL), found.get(ours(precision))) if counts else None,
            unit="times",
        )
        for precision in sizes.precisions
    ]


# End to end


@dataclass(frozen=True, kw_only=True)
class Files:
    """The WAV files and their rate, the same prepared, and the folder that they lie in."""

    folder: Path
    source: Path
    recordings: Recordings
    hz: int


def _files(stage: Stage, sizes: Sizes, folder: Path) -> Files:
    if sizes.source:
        source = Path(sizes.source).expanduser()
    else:
        stage.how.say(f"writing {sizes.clips:,} clips of noise")
        source = write_noise(folder / "ESC-50-noise", sizes.clips)
    stage.how.say("preparing them")
    storage = FolderStorage(folder / "storage")
    prepared = prepare("esc50", source=source, storage=storage, allow_partial=True)
    recordings = open_prepared(storage, prepared.prefix)
    one = next((official_root(source, TABLE, "esc50") / "audio").glob("*.wav"))
    return Files(folder=folder, source=source, recordings=recordings, hz=soundfile.info(one).samplerate)


def _end_to_end(
    stage: Stage, sizes: Sizes, frontend: str, code: AuthorsCode | None, files: Files
) -> dict[str, Epoch | Exception]:
    """An epoch of each; ours at every precision."""
    contestants: dict[str, Callable[[], Epoch]] = {}
    for precision in sizes.precisions:
        spec, place = spec_of(sizes, frontend, precision), files.folder / f"{frontend}-{precision}"
        contestants[ours(precision)] = partial(our_epoch, stage, spec, files.recordings, place)
    if code is not None:
        contestants[END_TO_END] = partial(their_epoch, stage, sizes, frontend, code, files.source)
    found: dict[str, Epoch | Exception] = {}
    for name, function in contestants.items():
        stage.how.say(f"epochs on {frontend}: {name}")
        try:
            stage.require_time()
            found[name] = function()
        except Exception as error:  # code of others; and what does not fit is a finding
            found[name] = without_frames(error)
        release(stage.device)
    return found


def our_epoch(stage: Stage, spec: TrialSpec, recordings: Recordings, folder: Path) -> Epoch:
    """Epochs of `fit` after the first, evaluation and rows with them. Beginning and end are `start_s`."""
    seconds: list[float] = []
    evaluated_s: list[float] = []
    parts = _Parts(stage.device)

    def on_epoch(row: dict[str, Any]) -> None:
        seconds.append(row["seconds"])
        # A row is told when its checkpoint is written, which may be while the steps of the next epoch run.
        if row["step"] in parts.trained_at:
            evaluated_s.append(row["time"] - parts.trained_at[row["step"]])

    placement = "device" if stage.device.type == "cuda" else "host"
    how = Fit(
        storage=FolderStorage(folder),
        device=str(stage.device),
        placement=placement,
        on_step=parts.on_step,
        on_epoch=on_epoch,
        clock=time.perf_counter,
    )
    began = time.perf_counter()
    result = fit(spec, recordings, how)
    whole_s = time.perf_counter() - began
    taken = statistics.mean(seconds[1:])
    return Epoch(
        seconds=taken,
        train_s=taken - statistics.mean(evaluated_s),
        steps=result["rows"][0]["step"],
        tested=result["test_clips"],
        start_s=max(0.0, whole_s - len(seconds) * taken),
    )


class _Parts:
    """Tells the steps of an epoch from its evaluation, from the second epoch on. `fit` says the number of steps after
    each step, and the same number again after each batch that it evaluates."""

    def __init__(self, device: torch.device):
        self.device, self.last, self.per_epoch = device, 0, 0
        self.trained_at: dict[int, float] = {}  # by the number of steps until then

    def on_step(self, total: int) -> None:
        if total == self.last:
            self.per_epoch = self.per_epoch or total
        elif self.per_epoch and total % self.per_epoch == 0:
            synchronize(self.device)  # what was launched is a step's still
            self.trained_at[total] = time.perf_counter()
        self.last = total


def their_epoch(stage: Stage, sizes: Sizes, frontend: str, code: AuthorsCode, source: Path) -> Epoch:
    """Epochs of their loop and their evaluation after the first."""
    train, test = code.loaders(source, fold=1, batch=sizes.batch, frontend=frontend)
    model = code.classifier(frontend, (), classes=len(CLASSES), device=stage.device)
    optimizer = code.optimizer(model)
    marks = []
    for _ in range(1 + sizes.epochs):
        began = time.perf_counter()
        code.epoch(model, train, optimizer, stage.device)
        synchronize(stage.device)
        middle = time.perf_counter()
        code.evaluation(model, test, stage.device)
        synchronize(stage.device)
        marks.append((middle - began, time.perf_counter() - began))
    train_s, seconds = (sum(mark[i] for mark in marks[1:]) / sizes.epochs for i in (0, 1))
    return Epoch(
        seconds=seconds,
        train_s=train_s,
        steps=len(train),  # type: ignore[arg-type]
        tested=len(test.dataset),  # type: ignore[attr-defined]
        start_s=max(0.0, marks[0][1] - seconds),
    )


def write_noise(root: Path, clips: int) -> Path:
    """A folder laid out as ESC-50 with so many recordings of noise, 5 s at 44.1 kHz, the same number in every fold."""
    (root / "audio").mkdir(parents=True)
    (root / TABLE).parent.mkdir(parents=True)
    base_T = (3000 * np.random.default_rng(0).standard_normal(5 * OFFICIAL_HZ)).astype(np.int16)
    with (root / TABLE).open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for number in range(clips):
            fold, label = 1 + number % 5, number // 5 % len(CLASSES)
            name = f"{fold}-{number}-A-{label}.wav"
            soundfile.write(root / "audio" / name, np.roll(base_T, number), OFFICIAL_HZ, subtype="PCM_16")
            table.writerow((name, fold, label, CLASSES[label], number))
    return root


def _epoch_table(
    stage: Stage,
    sizes: Sizes,
    frontend: str,
    found: Mapping[str, Epoch | Exception],
    files: Files,
    said: str,
    missing: str,
) -> Table:
    columns = ("s per epoch", "s of them training", "ms per step, all of it", "s to start and end", "times ours")
    first = found[ours(sizes.precisions[0])]
    rows = []
    for name, epoch in found.items():
        if isinstance(epoch, Exception):
            rows.append(Row(name=name, values=(None,) * len(columns), note=why(epoch)))
            continue
        ratio = epoch.seconds / first.seconds if isinstance(first, Epoch) else None
        values = (epoch.seconds, epoch.train_s, 1e3 * epoch.seconds / epoch.steps, epoch.start_s, ratio)
        row = Row(name=name, values=values, note=f"mean of {sizes.epochs}")
        rows.append(_saying(row, said) if name == END_TO_END else row)
    if missing:
        rows.append(Row(name=END_TO_END, values=(None,) * len(columns), note=missing))
    of = "of ESC-50" if sizes.source else "of noise laid out as ESC-50"
    rate = f"{files.hz:,} Hz" + (", so nothing is resampled" if files.hz == MODEL_HZ else "")
    clips = f"{len(files.recordings):,} clips {of} at {rate}"
    title = (
        f"an epoch of pure Mamba on {frontend} with its evaluation, {clips}; ours with the {scan_named(stage.device)}"
    )
    return Table(title=title, columns=columns, rows=tuple(rows))


def _epoch_targets(sizes: Sizes, found: Mapping[str, Epoch | Exception], code: AuthorsCode | None) -> list[Target]:
    theirs, targets = found.get(END_TO_END), []
    counts = sizes.is_papers and code is not None and code.own_mamba
    for precision in sizes.precisions:
        epoch = found[ours(precision)]
        ratio = theirs.seconds / epoch.seconds if isinstance(theirs, Epoch) and isinstance(epoch, Epoch) else None
        targets.append(
            Target(
                name=f"epoch of raw pure Mamba, end to end: authors / {ours(precision)}",
                wanted=END_TO_END_TARGET,
                found=ratio if counts else None,
                unit="times",
            )
        )
        targets.append(
            Target(
                name=f"five folds x 100 epochs of raw pure Mamba, {ours(precision)}, extrapolated from these epochs",
                wanted=PAPER_TARGET_MINUTES,
                found=paper_minutes(epoch) if sizes.is_papers and isinstance(epoch, Epoch) else None,
                unit="minutes",
                at_most=True,
            )
        )
    return targets


def paper_minutes(epoch: Epoch) -> float:
    """Of the paper's schedule, from an epoch that may have fewer folds: those train on fewer and test as many."""
    train_s = epoch.train_s * PAPER_STEPS / epoch.steps
    evaluated_s = (epoch.seconds - epoch.train_s) * PAPER_TESTED / epoch.tested
    return PAPER_FOLDS * (PAPER_EPOCHS * (train_s + evaluated_s) + epoch.start_s) / 60
