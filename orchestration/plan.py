"""From a grid to a plan: each trial's id, size and price, whether they may be compared, how they stand. No ray."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dashboards.evidence import DATASETS_OF_THE_PAPER
from dashboards.view import DataFacts, StepMemory, SweepView
from helix.data.dataset import Dataset, split_facts
from helix.data.shards import Recordings
from helix.models.classifier import Cost, cost
from helix.published import GPU_BYTES
from helix.registry import DATASETS
from helix.spec import resolve, trial_id
from helix.storage import Storage
from helix.training import feasibility
from helix.training.memory import Device, Placement, choose
from helix.training.precision import require
from orchestration.asked import Asked, AskedTrial
from orchestration.grid import BACKBONES, Grid, Trial
from orchestration.ledger import Records, TrialState, read_all, read_certificates
from orchestration.money import Prices

#: Within one frontend, parameter counts may differ by this share of the larger one (the paper's section 3.2).
BAND = 0.001


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One trial with its identity on the prepared data and what it costs."""

    trial: Trial
    trial_id: str
    cost: Cost
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.trial.spec.training.epochs

    @property
    def work(self) -> float:
        """Training FLOPs over all steps."""
        return float(self.cost.training_flops_per_clip) * self.steps * self.trial.spec.training.batch_size


def check_trials(trials: Sequence[Trial]) -> None:
    """Refuse what could not be built or would not be a fair comparison; needs no data, so it comes before any work."""
    counts: dict[str, tuple[str, int]] = {}
    for trial in trials:
        data = trial.spec.data
        folds = DATASETS.make(data.dataset, data.options).folds
        if data.fold not in folds:
            raise ValueError(f"{data.dataset} has no fold {data.fold}; it has {', '.join(map(str, folds))}")
        resolve(trial.spec)
        if trial.variant.name not in counts:
            counts[trial.variant.name] = (trial.spec.model.frontend, price(trial).parameters)
    check_band(counts)


def make_plan(trials: Sequence[Trial], recordings: Recordings) -> list[Planned]:
    """The plan of these trials on prepared data. Raises ValueError where a fold or a full batch is not there."""
    counted: dict[str, int] = {}
    priced: dict[str, Cost] = {}
    return [_plan(trial, recordings, counted, priced) for trial in trials]


def price(trial: Trial, *, classes: int | None = None) -> Cost:
    """What the model of a trial costs for a clip of its data set; `classes` None: as many as the complete set has."""
    spec = trial.spec
    dataset: Dataset = DATASETS.make(spec.data.dataset, spec.data.options)
    classes = dataset.class_count if classes is None else classes
    return cost(spec.model, spec.protocol, classes=classes, samples=dataset.clip_samples)


def place(trial: Trial, *, limit_bytes: int | None, device: Device, ranks: int = 1) -> Placement:
    """How a rank's part of a step of the trial fits into what a rank has; None is no limit.

    ValueError says what would fit.
    """
    spec = resolve(trial.spec)
    dataset: Dataset = DATASETS.make(spec.data.dataset, spec.data.options)
    size = {"samples": dataset.clip_samples, "classes": dataset.class_count}
    try:
        require(spec.training.precision, device)
        return choose(spec, **size, limit_bytes=limit_bytes, device_type=device, ranks=ranks)
    except ValueError as error:
        raise ValueError(f"{trial.label}: {error}") from error


def check_band(counts: dict[str, tuple[str, int]]) -> None:
    """Refuse variants of one frontend whose sizes leave the band. `counts`: variant -> (frontend, parameters)."""
    by_frontend: dict[str, dict[str, int]] = {}
    for name, (frontend, parameters) in counts.items():
        by_frontend.setdefault(frontend, {})[name] = parameters
    for frontend, members in by_frontend.items():
        spread = (max(members.values()) - min(members.values())) / max(members.values())
        if spread > BAND:
            listed = ", ".join(f"{name} {count:,}" for name, count in members.items())
            raise ValueError(
                f"this comparison would not be fair: parameter counts on the {frontend} frontend differ by "
                f"{spread:.2%} and {BAND:.1%} is allowed ({listed}); change model.width or a block's options so that "
                "the blocks can be matched"
            )


def pack(plan: Sequence[Planned], *, workers: int) -> list[list[Planned]]:
    """Deal trials over at most `workers` packs of about equal work, the longest first.

    A worker takes 20 to 35 s to start, so the trials of a pack share one and run in turn.
    """
    packs: list[list[Planned]] = [[] for _ in range(min(workers, len(plan)))]
    loads = [0.0] * len(packs)
    for entry in sorted(plan, key=lambda entry: -entry.work):
        lightest = loads.index(min(loads))
        packs[lightest].append(entry)
        loads[lightest] += entry.work
    return packs


class Snapshot:
    """How the trials of a plan stand: called, it reads storage and returns a view. Nothing is read twice in vain."""

    def __init__(
        self,
        *,
        grid_name: str,
        grid: Grid,
        plan: Sequence[Planned],
        recordings: Recordings,
        storage: Storage,
        command: str,
        prices: Prices | None = None,
    ):
        self.grid_name, self.grid, self.plan, self.storage, self.command = grid_name, grid, plan, storage, command
        self.prices = prices or Prices()
        #: What trials that could run wait for; whoever runs the sweep may say so here.
        self.waiting: Callable[[], str] = lambda: ""
        self.facts = data_facts(recordings, [entry.trial for entry in plan])
        self._known: dict[str, TrialState] = {}

    @property
    def asked(self) -> Asked:
        """The plan as it is kept for those who look from afar."""
        return Asked(
            grid=self.grid_name,
            question=self.grid.question,
            command=self.command,
            data=(self.facts,),
            trials=tuple(
                AskedTrial(
                    trial_id=entry.trial_id,
                    variant=entry.trial.variant.name,
                    backbone=entry.trial.variant.backbone,
                    spec=entry.trial.spec,
                    parameters=entry.cost.parameters,
                    tokens=entry.cost.tokens,
                )
                for entry in self.plan
            ),
            prices=self.prices,
        )

    def states(self, *, tolerant: bool = False) -> dict[str, TrialState]:
        """What storage knows of each trial of the plan, by its id.

        `tolerant`: of a trial with a damaged record the rest; else CorruptRecordError, so that nobody trains on it.
        """
        names, known = [entry.trial_id for entry in self.plan], self._known
        unknown = [name for name in names if name not in known or known[name].status != "done" or known[name].damage]
        how = {"now": time.time(), "known": known, "tolerant": tolerant}
        states = read_all(self.storage, unknown, **how) if unknown else {}
        # Several threads look at once: each takes what it read itself, and leaves the newest for the next look.
        self._known = known = self._known | states
        return {name: known[name] for name in names}

    def __call__(self) -> SweepView:
        records = Records(self.storage, tolerant=True)
        return self.asked.view(
            self.states(tolerant=True),
            storage=repr(self.storage),
            now=time.time(),
            certificates=read_certificates(records),
            waiting=self.waiting(),
            damage=records.damage,
        )


def with_memory(view: SweepView) -> SweepView:
    """The view with the paper's Table 1 as it is predicted for the backbones of the sweep; some seconds of work.

    A sweep of a data set that the paper does not speak of has no use for it and is left as it is.
    """
    if not {cell.dataset for cell in view.cells} & set(DATASETS_OF_THE_PAPER):
        return view
    asked = {cell.backbone for cell in view.cells}
    patterns = {name: pattern for name, pattern in BACKBONES.items() if name in asked}
    memory = tuple(
        StepMemory(
            backbone=cell.backbone,
            tokens=cell.tokens,
            attn_impl=cell.attn_impl,
            predicted_bytes=cell.on_gpu.peak_bytes,
            verdict=cell.verdict(GPU_BYTES),
        )
        for cell in feasibility.table(patterns, recomputing=(False,))
    )
    return replace(view, memory=memory)


def data_facts(recordings: Recordings, trials: Sequence[Trial] = ()) -> DataFacts:
    """What the report says of a prepared data set, and of the clips that the folds of these trials make of it."""
    manifest = recordings.manifest
    # Guessing means naming the most frequent class, of the clips that are tested where it is known which they are.
    per_class = np.array(list(manifest["recordings_per_class"].values()))
    tested = np.zeros(len(manifest["classes"]), np.int64)
    notes = [f"{manifest['padded_fraction']:.1%} of the samples are padding or silence at the end of a recording"]
    if manifest["missing"]:
        notes.append(f"{len(manifest['missing'])} recordings are missing")
    if manifest["quarantined"]:
        notes.append(f"{len(manifest['quarantined'])} recordings were left out because their files cannot be used")
    notes += manifest.get("notes", ())
    for fold, spec in sorted({trial.spec.data.fold: trial.spec for trial in trials}.items()):
        dataset: Dataset = DATASETS.make(spec.data.dataset, spec.data.options)
        classes = len(recordings.classes)
        parts = split_facts(dataset, recordings.index, classes=classes, fold=fold, protocol=spec.protocol)
        notes += [f"fold {fold}, {name}: {facts}" for name, facts in parts.items() if facts.recordings]
        tested += np.array(parts["test"].clips_per_class)
    if trials:
        per_class = tested
    return DataFacts(
        name=trials[0].spec.data.dataset if trials else manifest["dataset"],
        classes=len(manifest["classes"]),
        recordings=manifest["recordings"],
        chance=float(per_class.max() / per_class.sum()),
        expected=manifest["expected_recordings"],
        partial=manifest["partial"],
        seconds=manifest["seconds"],
        licence=manifest["licence"],
        caveat=manifest["caveat"] or "",
        manifest_sha256=recordings.manifest_sha256,
        notes=tuple(notes),
        class_names=tuple(map(str, manifest["classes"])),
    )


def _plan(trial: Trial, recordings: Recordings, counted: dict[str, int], priced: dict[str, Cost]) -> Planned:
    """`counted` remembers the training clips of what several trials share, and `priced` their models."""
    spec = trial.spec
    model = repr((spec.model, spec.protocol, spec.data.options))
    if model not in priced:
        priced[model] = price(trial, classes=len(recordings.classes))
    dataset: Dataset = DATASETS.make(spec.data.dataset, spec.data.options)
    shared = repr((spec.data, spec.protocol))
    if shared not in counted:
        rows = dataset.split(recordings.index, fold=spec.data.fold, protocol=spec.protocol).train
        clips = dataset.clips(recordings.index, rows, protocol=spec.protocol, seed=spec.seed, epoch=0)
        counted[shared] = len(clips)
    steps_per_epoch = counted[shared] // spec.training.batch_size
    if steps_per_epoch == 0:
        raise ValueError(
            f"{trial.label}: {counted[shared]} training clips do not fill one batch of {spec.training.batch_size}; "
            "lower training.batch_size"
        )
    return Planned(
        trial=trial,
        trial_id=trial_id(spec, recordings.manifest_sha256),
        cost=priced[model],
        steps_per_epoch=steps_per_epoch,
    )
