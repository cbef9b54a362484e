"""What a sweep looks like at one moment, as plain frozen data: what the report and the terminal views are drawn from.

Accuracies are fractions, times are Unix seconds. Whoever runs the sweep makes one `TrialEntry` per trial and calls
`SweepView.build`; everything shown is computed from the result by dashboards/summary.py.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from helix.protocol import SWITCHES, Protocol
from helix.spec import AugmentSpec, ModelSpec, TrainingSpec, TrialSpec
from orchestration.ledger import TrialState


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """One data set as prepared. `chance` is the accuracy of guessing; `expected` is the official count, if known.

    `partial`: a subset was asked for. `caveat`: what its own authors warn of. `notes`: one plain sentence each on what
    preparation counted (quarantined files, uneven folds), shown as they are. `class_names`: by label, where known.
    """

    name: str
    classes: int
    recordings: int
    chance: float
    expected: int | None = None
    partial: bool = False
    seconds: float = 0.0
    licence: str = ""
    caveat: str = ""
    manifest_sha256: str = ""
    notes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """The predicted peak of a training step of one raw clip at the paper's width: a cell of its Table 1, or beside it.

    `attn_impl` "weights" is the authors' attention, "sdpa" the same outputs without a matrix of weights. `verdict` on a
    GPU of 48 GB: "fits", "tight" (only the error bound says that it might not) or "no".
    """

    backbone: str
    tokens: int
    attn_impl: str
    predicted_bytes: int
    verdict: Literal["fits", "tight", "no"]


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What attempts cost (orchestration/money.py says by which rules), in hours of work and US dollars.

    `usd` is of those hours that have a price; `unpriced_hours` are the others and `unpriced` what they ran on. The lost
    ones are among them all: work that had to be done again.
    """

    hours: float = 0.0
    gpu_hours: float = 0.0
    usd: float = 0.0
    lost_hours: float = 0.0
    lost_usd: float = 0.0
    unpriced_hours: float = 0.0
    unpriced: tuple[str, ...] = ()

    @property
    def known_usd(self) -> float | None:
        """`usd`, and None where there were hours and none of them has a price: what they cost nobody knows."""
        return None if self.hours and self.unpriced_hours >= self.hours else self.usd

    @property
    def known_lost_usd(self) -> float | None:
        """`lost_usd`, by the same rule."""
        return None if self.known_usd is None else self.lost_usd

    def __add__(self, other: "Spent") -> "Spent":
        names = ("hours", "gpu_hours", "usd", "lost_hours", "lost_usd", "unpriced_hours")
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return Spent(**sums, unpriced=tuple(dict.fromkeys((*self.unpriced, *other.unpriced))))


@dataclass(frozen=True, kw_only=True)
class TrialView:
    """One trial: a fold and a seed of a cell, and what storage knows of it."""

    fold: int
    seed: int
    state: TrialState
    spent: Spent = Spent()

    @property
    def trial_id(self) -> str:
        return self.state.trial_id


@dataclass(frozen=True, kw_only=True)
class CellView:
    """The trials of one data set and one variant, with `epochs` asked of each.

    `variant` is a name to show ("mamba-raw"); `frontend` and `backbone` are the words of helix/published.py; `options`
    are those of the data set. `model`, `training` and `augment` are what its trials were asked for, None where nobody
    knows.
    `parameters` and `tokens` (per clip) are None until they are known.
    """

    dataset: str
    variant: str
    frontend: str
    backbone: str
    pattern: tuple[str, ...]
    epochs: int
    parameters: int | None = None
    tokens: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    model: ModelSpec | None = None
    training: TrainingSpec | None = None
    augment: AugmentSpec | None = None
    trials: tuple[TrialView, ...] = ()

    @property
    def spent(self) -> Spent:
        return sum((trial.spent for trial in self.trials), Spent())


@dataclass(frozen=True, kw_only=True)
class TrialEntry:
    """One trial as the sweep planned it and as storage knows it now: what `SweepView.build` groups into cells.

    `variant` names its cell among those of one data set, so trials that differ only in fold and seed share it.
    """

    variant: str
    backbone: str
    spec: TrialSpec
    state: TrialState
    parameters: int | None = None
    tokens: int | None = None
    spent: Spent = Spent()


@dataclass(frozen=True, kw_only=True)
class SweepView:
    """One sweep of one grid at one moment. `question` is the docstring of the grid; its first line becomes the title.

    `switches` holds every protocol switch in force; `select` and `std` are the two that rule the summary.
    `certificates` are all in the storage, as orchestration/certify.py put them. `waiting` says what trials that could
    run are waiting for, empty where nothing is known to hold them up. `memory` is the paper's Table 1 as it is
    predicted, where that was asked for. `gaps`: what could not be learnt of the sweep, a plain sentence each. `damage`:
    what is damaged where it is stored and was left out, key and reason, a line each.
    """

    grid: str
    question: str
    profile: str
    command: str
    created: float
    storage: str
    select: Literal["best_test", "last", "validation"]
    std: Literal["population", "sample"]
    switches: dict[str, str] = field(default_factory=dict)
    data: tuple[DataFacts, ...] = ()
    cells: tuple[CellView, ...] = ()
    certificates: tuple[dict[str, Any], ...] = ()
    waiting: str = ""
    memory: tuple[StepMemory, ...] = ()
    gaps: tuple[str, ...] = ()
    damage: tuple[str, ...] = ()

    @classmethod
    def build(
        cls,
        *,
        grid: str,
        question: str,
        protocol: Protocol,
        command: str,
        created: float,
        storage: str,
        data: Iterable[DataFacts],
        trials: Iterable[TrialEntry],
        certificates: Iterable[dict[str, Any]] = (),
        waiting: str = "",
    ) -> "SweepView":
        """The view of a flat list of trials, grouped into cells in the order in which the variants first appear."""
        groups: dict[tuple[str, str], list[TrialEntry]] = {}
        for entry in trials:
            groups.setdefault((entry.spec.data.dataset, entry.variant), []).append(entry)
        return cls(
            grid=grid,
            question=question,
            profile=protocol.profile,
            command=command,
            created=created,
            storage=storage,
            select=protocol.select,
            std=protocol.std,
            switches={name: getattr(protocol, name) for name in SWITCHES},
            data=tuple(data),
            cells=tuple(_cell(entries) for entries in groups.values()),
            certificates=tuple(certificates),
            waiting=waiting,
        )

    @property
    def spent(self) -> Spent:
        return sum((cell.spent for cell in self.cells), Spent())

    def facts(self, dataset: str) -> DataFacts | None:
        """What is known of a data set; None before it was prepared."""
        return next((facts for facts in self.data if facts.name == dataset), None)

    def trials(self) -> list[tuple[CellView, TrialView]]:
        """Every trial with its cell, in order."""
        return [(cell, trial) for cell in self.cells for trial in cell.trials]


def _cell(entries: list[TrialEntry]) -> CellView:
    first = entries[0]
    trials = [
        TrialView(fold=entry.spec.data.fold, seed=entry.spec.seed, state=entry.state, spent=entry.spent)
        for entry in entries
    ]
    return CellView(
        dataset=first.spec.data.dataset,
        variant=first.variant,
        frontend=first.spec.model.frontend,
        backbone=first.backbone,
        pattern=tuple(first.spec.model.pattern),
        epochs=first.spec.training.epochs,
        parameters=next((entry.parameters for entry in entries if entry.parameters is not None), None),
        tokens=next((entry.tokens for entry in entries if entry.tokens is not None), None),
        options=dict(first.spec.data.options),
        model=first.spec.model,
        training=first.spec.training,
        augment=first.spec.augment,
        trials=tuple(sorted(trials, key=lambda trial: (trial.seed, trial.fold))),
    )
