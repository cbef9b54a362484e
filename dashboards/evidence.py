"""What can be held against the paper: the runs of each of its cells, from the published numbers or from a sweep."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dashboards.counts import Counts, counts_of, official
from dashboards.summary import PARAMETER_BAND, SELECTIONS, CellSummary, summarise
from dashboards.text import listing, plural
from dashboards.view import SweepView, TrialView
from helix.protocol import SWITCHES
from helix.published import GPU, GPU_BYTES, GPU_CLASS, PUBLISHED, Published, published
from helix.registry import DATASETS
from helix.statistics import Key

#: (frontend, backbone) in the words of helix/published.py
Variant = tuple[str, str]

MAMBA_RAW, MAMBA_MEL = ("raw", "mamba"), ("mel", "mamba")
HELIX_RAW, HELIX_MEL = ("raw", "helix"), ("mel", "helix")
ATTENTION_RAW, ATTENTION_MEL = ("raw", "attention"), ("mel", "attention")
SIX = (MAMBA_RAW, MAMBA_MEL, HELIX_RAW, HELIX_MEL, ATTENTION_RAW, ATTENTION_MEL)

#: Samples of a mel frame and its patches (section 3.1), rounded down as the authors' code does.
RAW_STRIDE, MEL_HOP, MEL_BINS, MEL_PATCH = 160, 512, 128, 16

#: The data sets of the paper, section 4.1.
DATASETS_OF_THE_PAPER = (
    "esc50",
    "urbansound8k",
    "speech_commands",
    "concat_speech_commands",
    "librispeech",
    "voxpopuli",
)


#: Where the paper states no epochs, section 3.4 trains 100. Of a data set for which it prints nothing the model is that
#: of ESC-50 but for the classes, which change its size by at most 6 %.
EPOCHS, SIZED, CLASSES_BAND = 100, "esc50", 0.06


#: What a run trained on that recorded nothing of it.
UNKNOWN = "an unknown device"

#: How PyTorch's error says what the GPU has that ran out of memory.
CAPACITY = re.compile(r"total capacity of ([0-9.]+) ([GM])iB")


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What one run ended or failed on, None and nothing where nobody recorded it.

    `devices`: names of GPUs, or "cpu"; several of a run that went on elsewhere. `device_bytes`: what the run could take
    of that GPU. `peak_bytes`: the most that it took.
    """

    devices: tuple[str, ...] = ()
    device_bytes: int | None = None
    peak_bytes: int | None = None

    @property
    def like_the_papers(self) -> bool:
        """Whether these are all one GPU of the kind that the paper's times are of."""
        alike = [
            name.startswith("NVIDIA") and any(set(name.upper().split()) >= set(words) for words in GPU_CLASS)
            for name in self.devices
        ]
        return bool(alike) and all(alike)

    @property
    def on_gpu(self) -> bool:
        """Whether it is known that all of it ran on GPUs."""
        return bool(self.devices) and not {"cpu", UNKNOWN} & set(self.devices)

    @property
    def on(self) -> str:
        return listing(list(self.devices)) or UNKNOWN

    @property
    def told(self) -> str:
        """ "NVIDIA L40S, 47.7 GB, peak 12.3 GB"."""
        size = f", {self.device_bytes / 1e9:.1f} GB" if self.device_bytes is not None else ""
        peak = f", peak {self.peak_bytes / 1e9:.1f} GB" if self.peak_bytes is not None else ""
        return self.on + size + peak


@dataclass(frozen=True, kw_only=True)
class Runs:
    """The runs of one cell. Accuracies are fractions by rule and (fold, seed); `curves` are test accuracies by epoch.

    `epochs` is what each run trained, None where that is not stated. `drop` is how far the last epoch ended below
    the best and `hours` the time of a run, both means. `only_claim`: nothing is known but the number that is claimed.
    `rerun`: the runs beside the one whose number it is, where that is among them. `ended` and `out_of_memory`: on what
    runs ended, and on what others had too little memory. `unlike`: in what the runs differ from the paper's;
    `other_size`: of the model, `other_course`: of the model, the epochs, the training or the recordings, so that
    printed numbers say nothing of them, `other_practice`: nor do they of these, which are as the profile fair has it.
    `less`: in what they are less than the paper's or trained otherwise, so that
    they speak of no sentence of it: runs that trained longer still do.
    """

    dataset: str
    frontend: str
    backbone: str
    accuracy: Mapping[str, Mapping[Key, float]] = field(default_factory=dict)
    curves: Mapping[Key, tuple[float, ...]] = field(default_factory=dict)
    epochs: int | None = None
    drop: float | None = None
    parameters: int | None = None
    tokens: int | None = None
    hours: float | None = None
    test_clips: int | None = None
    only_claim: bool = False
    rerun: Mapping[Key, float] = field(default_factory=dict)
    ended: tuple[Ran, ...] = ()
    out_of_memory: tuple[Ran, ...] = ()
    unlike: tuple[str, ...] = ()
    other_size: bool = False
    other_course: bool = False
    other_practice: bool = False
    less: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything that a claim may be judged by. `select` rules comparisons; reported values are always best test.

    `tokens`: of a clip, by data set and frontend, as the authors' code counts them. `published`: these are the paper's
    own numbers. `switches`: what trained them, by helix/protocol.py. `gpu`: on what those ran, by the authors' README.
    """

    name: str
    published: bool
    select: Literal["best_test", "last", "validation"]
    cells: Mapping[tuple[str, str, str], Runs]
    counts: Mapping[str, Counts]
    tokens: Mapping[tuple[str, str], int] = field(default_factory=dict)
    switches: Mapping[str, str] = field(default_factory=dict)
    gpu: str = ""

    def runs(self, dataset: str, variant: Variant) -> Runs | None:
        """The cell, None where nothing is known of it."""
        return self.cells.get((dataset, *variant))

    def of_dataset(self, dataset: str) -> list[Runs]:
        """Its cells that have an accuracy under the rule in force."""
        return [runs for runs in self.cells.values() if runs.dataset == dataset and runs.accuracy.get(self.select)]


def published_evidence() -> Evidence:
    """The paper's tables, the per-fold numbers of its authors' README and what the data sets say of themselves."""
    return Evidence(
        name="the published numbers",
        published=True,
        select="best_test",
        cells={(cell.dataset, cell.frontend, cell.backbone): _published(cell) for cell in PUBLISHED},
        counts={name: official(name) for name in DATASETS_OF_THE_PAPER},
        tokens={
            (name, frontend): tokens_of(name, frontend) for name in DATASETS_OF_THE_PAPER for frontend in ("raw", "mel")
        },
        switches={name: row["authors"] for name, row in SWITCHES.items()},
        gpu=GPU,
    )


def sweep_evidence(view: SweepView) -> Evidence:
    """What a sweep has finished so far. A cell of several runs of one (fold, seed) cannot be: the grid refuses it."""
    partial = frozenset(facts.name for facts in view.data if facts.partial)
    cells: dict[tuple[str, str, str], Runs] = {}
    for summary in summarise(view):
        cell = summary.cell
        cells.setdefault((cell.dataset, cell.frontend, cell.backbone), _swept(summary, cell.dataset in partial))
    return Evidence(
        name=f"the sweep {view.grid}",
        published=False,
        select=view.select,
        cells=cells,
        counts=counts_of(view),
        switches=dict(view.switches),
    )


def tokens_of(dataset: str, frontend: str) -> int:
    """Tokens of a clip as the authors' code counts them; 72 for ESC-50's mel, where the paper's formula gives 80."""
    member = DATASETS.make(dataset)
    if frontend == "raw":
        return member.clip_samples // RAW_STRIDE
    frames = 1 + member.clip_samples // MEL_HOP
    return MEL_BINS // MEL_PATCH * (frames // MEL_PATCH)


def _published(cell: Published) -> Runs:
    if cell.per_fold is not None:
        best = {(fold, 0): value for fold, value in enumerate(cell.per_fold, 1)}
    else:
        values = [value for value in (cell.accuracy, cell.rerun) if value is not None]
        best = {(1, seed): value for seed, value in enumerate(values)}
    counts = official(cell.dataset)
    theirs = (Ran(devices=(GPU,), device_bytes=GPU_BYTES),)
    per_fold = DATASETS.make(cell.dataset).expected_per_fold
    return Runs(
        dataset=cell.dataset,
        frontend=cell.frontend,
        backbone=cell.backbone,
        accuracy={"best_test": best} if best else {},
        epochs=cell.epochs,
        drop=None if cell.accuracy is None or cell.last is None else cell.accuracy - cell.last,
        parameters=cell.parameters,
        tokens=tokens_of(cell.dataset, cell.frontend),
        hours=None if cell.hours is None else cell.hours / cell.folds,
        test_clips=per_fold.get(1) if counts.folds == 1 else None,
        only_claim=cell.per_fold is None and cell.rerun is None,
        rerun={(1, 1): cell.rerun} if cell.rerun is not None else {},
        ended=theirs if cell.accuracy is not None else (),
        out_of_memory=theirs if cell.accuracy is None else (),
    )


def _swept(summary: CellSummary, partial: bool) -> Runs:
    cell = summary.cell
    results = [trial.state.result for trial in cell.trials if trial.state.result is not None]
    clips = [result["test_clips"] for result in results if result.get("test_clips")]
    comparison = summary.comparison
    target = comparison.published if comparison is not None else None
    # Of a data set without numbers in the paper, the same variant on another: only the classes differ.
    like = target or published(SIZED, cell.frontend, cell.backbone)
    ours, theirs = summary.parameters, like.parameters if like is not None else None
    band = PARAMETER_BAND if target is not None else CLASSES_BAND
    other_size = bool(ours and theirs and abs(ours / theirs - 1) > band)
    stated = target.epochs if target is not None else None
    less = [f"{plural(cell.epochs, 'epoch')} instead of {stated or EPOCHS}"] if cell.epochs < (stated or EPOCHS) else []
    less += ["a model of another size"] if other_size else []
    less += ["part of the recordings"] if partial else []
    less += [setting.phrase for setting in summary.settings if setting.speaks_of == "nothing"]
    best, last = (summary.accuracy[rule].mean for rule in ("best_test", "last"))
    return Runs(
        dataset=cell.dataset,
        frontend=cell.frontend,
        backbone=cell.backbone,
        accuracy={
            rule: {(one.fold, one.seed): one.accuracy[rule] for one in summary.samples if rule in one.accuracy}
            for rule in SELECTIONS
        },
        curves={
            (trial.fold, trial.seed): tuple(row["test_accuracy"] for row in trial.state.rows)
            for trial in cell.trials
            if trial.state.result is not None
            and all(math.isfinite(row.get("test_accuracy", math.nan)) for row in trial.state.rows)
        },
        epochs=cell.epochs,
        drop=None if best is None or last is None else best - last,
        parameters=summary.parameters,
        tokens=summary.tokens,
        hours=None if summary.train_seconds is None else summary.train_seconds / 3600,
        test_clips=round(math.fsum(clips) / len(clips)) if clips else None,
        ended=tuple(_ended(trial) for trial in cell.trials if trial.state.result is not None),
        out_of_memory=tuple(ran for trial in cell.trials if (ran := _out_of_memory(trial)) is not None),
        unlike=comparison.unlike if comparison is not None else tuple(one.phrase for one in summary.settings),
        other_size=other_size,
        other_course=bool(less) or stated not in (None, cell.epochs),
        other_practice=any(setting.speaks_of == "sentences" for setting in summary.settings),
        less=tuple(less),
    )


def _ended(trial: TrialView) -> Ran:
    """On what a finished trial trained. The peak is that of the attempts that fitted, where they came to record it."""
    state = trial.state

    def trained(attempt: Mapping[str, Any]) -> bool:
        # one that only tested what others had trained says nothing of a step, nor of hours
        last = state.step if attempt.get("outcome") == "done" else attempt.get("step", 0)
        return last > attempt.get("from_step", 0)

    attempts = [one for one in state.attempts if trained(one)]
    devices = [_device(one) for one in attempts] or [(state.result or {}).get("device") or UNKNOWN]
    sizes = [one["device_bytes"] for one in attempts if one.get("device_bytes") is not None]
    peaks = [one["peak_bytes"] for one in attempts if one.get("peak_bytes") is not None and one["outcome"] != "failed"]
    return Ran(
        devices=tuple(dict.fromkeys(devices)),
        device_bytes=max(sizes) if sizes and len(sizes) == len(attempts) else None,
        peak_bytes=max(peaks, default=None),
    )


def _out_of_memory(trial: TrialView) -> Ran | None:
    """On what a trial failed because memory ran out; None where it did not."""
    state = trial.state
    if state.status != "failed":
        return None
    last = state.attempts[-1] if state.attempts else {}
    error = state.error or ""
    if last.get("error_kind") != "OutOfMemory" and "outofmemory" not in error.lower().replace(" ", ""):
        return None
    size, said = last.get("device_bytes"), CAPACITY.search(error)
    if size is None and said:  # PyTorch says what the whole GPU has, whatever share of it the attempt held
        size = int(float(said[1]) * 2 ** (30 if said[2] == "G" else 20) * min(1.0, last.get("gpus") or 1.0))
    return Ran(devices=(_device(last),), device_bytes=size, peak_bytes=last.get("peak_bytes"))


def _device(attempt: Mapping[str, Any]) -> str:
    """The name of what an attempt ran on, with how much of it where that is not one whole GPU."""
    name = attempt.get("device_name") or attempt.get("device") or UNKNOWN
    gpus = attempt.get("gpus") or 0.0
    return f"{gpus:g} of {name}" if name not in ("cpu", UNKNOWN) and gpus not in (0.0, 1.0) else name
