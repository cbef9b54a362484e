"""The static report of a sweep: one HTML file that opens without a network, in light, dark and on paper."""

import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dashboards import text
from dashboards.beside import Sheet, feasibility_table, paper_tables, sheets
from dashboards.certificates import certified
from dashboards.charts import bars, block_marks, colours, glyph
from dashboards.confusion import PerClass, confusion_tables, per_class
from dashboards.curves import Panel, panels
from dashboards.evidence import Evidence, sweep_evidence
from dashboards.figures import Drawing, interaction_gaps, scaling, smoothed_curves
from dashboards.findings import Finding, comparison_note, find, parse_question, shared_unlike, sweep_cautions
from dashboards.summary import (
    SELECTIONS,
    CellSummary,
    Statistic,
    attempts,
    averaged_over,
    changed_switches,
    overhead_seconds,
    progress,
    sampling_word,
    summarise,
)
from dashboards.tables import Column, Figure, Table, as_html
from dashboards.verdicts import claims_section, comparisons_table, concerns, evidence_tables, ledger
from dashboards.view import CellView, DataFacts, SweepView, TrialView
from dashboards.work import work_table
from helix.protocol import SWITCHES
from helix.published import BARS_IN, CURVES_IN, PAPER, README

TEMPLATE = "report.html.j2"


@dataclass(frozen=True, kw_only=True)
class Section:
    """Everything the report says of one data set."""

    dataset: str
    facts: DataFacts | None
    summaries: tuple[CellSummary, ...]
    finding: Finding
    bars: Markup
    bars_after: str
    epochs_said: str
    panels: tuple[Panel, ...]
    smoothed: Drawing
    classes: PerClass | None
    class_files: tuple[str, ...]
    accuracy_file: str
    columns: int
    unit: str
    over: str
    comparison_note: str
    shared_unlike: tuple[str, ...]
    has_published: bool


@dataclass(frozen=True, kw_only=True)
class Beside:
    """The paper's tables and its Figure 1 with this sweep in them. `undrawn`: its figures of other data."""

    sheets: tuple[Sheet, ...]
    memory: Table
    drawings: tuple[Drawing, ...]
    undrawn: str

    @property
    def absent(self) -> tuple[Sheet, ...]:
        return tuple(sheet for sheet in self.sheets if not sheet.asked)


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One line of the table of trials."""

    cell: CellView
    trial: TrialView
    accuracy: dict[str, float]
    best_epoch: int | None
    attempts: int
    ranks: int | None
    overhead_seconds: float | None
    train_seconds: float | None
    weights_sha256: str


def write_report(view: SweepView, path: Path, *, files: str | None = None) -> None:
    """Write the report to `path` in one step: a reader sees the old file or the new one, never half of it.

    `files`: the folder beside it that has its tables, to which it then links.
    """
    put(path, render_report(view, files=files))


def report_tables(view: SweepView) -> tuple[Table, ...]:
    """The tables that stand beside the report as CSV, Markdown and LaTeX."""
    evidence = sweep_evidence(view)
    summaries = summarise(view)
    datasets = tuple(dict.fromkeys(cell.dataset for cell in view.cells))
    return (
        *(_accuracy_table(view, dataset, summaries) for dataset in datasets),
        *(paper_tables(view, summaries) if concerns(evidence) else ()),
        *evidence_tables(evidence, ledger(evidence) if concerns(evidence) else ()),
        *(table for dataset in datasets for table in confusion_tables(view, dataset)),
        *((work_table(view), _trials_table(view)) if view.cells else ()),
    )


def put(path: Path, page: str) -> None:
    """Put a page at `path` in one step, its folder made where it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        aside.write_bytes(page.encode(errors="replace"))
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def page_environment() -> Environment:
    """What the templates of this folder are drawn with: everything escaped, nothing undefined."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for word in ("percent", "points", "mean_std", "count", "millions", "plural", "duration", "moment", "cost_line"):
        environment.filters[word] = getattr(text, word)
    environment.filters["as_html"] = as_html
    environment.filters["listing"] = lambda numbers, word: (
        f"{word}{'s' if len(numbers) > 1 else ''} {text.listing(numbers)}"
    )
    return environment


def render_report(view: SweepView, *, files: str | None = None) -> str:
    """The whole page as text. Everything that comes from the view is escaped. `files` as in `write_report`."""
    evidence = sweep_evidence(view)
    summaries = summarise(view)
    marks = block_marks(cell.pattern for cell in view.cells)
    return (
        page_environment()
        .get_template(TEMPLATE)
        .render(
            view=view,
            files=files,
            beside=_beside(view, evidence, summaries) if concerns(evidence) else None,
            work=work_table(view),
            claims=claims_section(ledger(evidence), evidence) if concerns(evidence) else None,
            statistics={
                dataset: comparisons_table(evidence, dataset, short=True)
                for dataset in {cell.dataset for cell in view.cells}
            },
            question=parse_question(view.question, view.grid),
            progress=progress(view),
            sections=[
                _section(view, dataset, summaries) for dataset in dict.fromkeys(cell.dataset for cell in view.cells)
            ],
            cautions=sweep_cautions(view),
            failures=[(cell, trial) for cell, trial in view.trials() if trial.state.status == "failed"],
            trials=[_trial_row(cell, trial) for cell, trial in view.trials()],
            switches=SWITCHES,
            changed=changed_switches(view),
            versions=_versions(view),
            selections=SELECTIONS,
            selection_words=text.SELECTION_WORDS,
            std_words=text.STD_WORDS,
            word=sampling_word(view),
            glyph=lambda pattern: glyph(pattern, marks),
            kinds=list(marks),
            gap=text.GAP,
            paper=PAPER,
            readme=README,
            attempts=attempts,
            certified=certified(view),
        )
    )


def _section(view: SweepView, dataset: str, every: Sequence[CellSummary]) -> Section:
    summaries = tuple(summary for summary in every if summary.cell.dataset == dataset)
    facts = view.facts(dataset)
    chance = facts.chance if facts is not None else None
    palette = colours(view.cells)
    drawn = tuple(panels(summaries, chance, palette))
    backbones = len({panel.cell.backbone for panel in drawn})
    unit, over = averaged_over(view, dataset)
    return Section(
        dataset=dataset,
        facts=facts,
        summaries=summaries,
        finding=find(view, dataset, summaries),
        bars=bars(summaries, view.select, chance, palette),
        bars_after=BARS_IN.get(dataset, ""),
        epochs_said=_epochs_said(summaries),
        panels=drawn,
        smoothed=smoothed_curves(dataset, summaries, chance, palette),
        classes=per_class(view, dataset),
        class_files=tuple(table.name for table in confusion_tables(view, dataset)),
        accuracy_file=_accuracy_name(dataset),
        columns=backbones if 2 <= backbones <= 4 else 3,
        unit=unit,
        over=over,
        comparison_note=comparison_note(view, summaries),
        shared_unlike=shared_unlike(summaries),
        has_published=any(summary.comparison is not None for summary in summaries),
    )


def _beside(view: SweepView, evidence: Evidence, summaries: Sequence[CellSummary]) -> Beside:
    palette = colours(view.cells)
    here = {summary.cell.dataset for summary in summaries}
    drawn_after = [(figure, dataset) for named in (BARS_IN, CURVES_IN) for dataset, figure in named.items()]
    missing = [(figure, dataset) for figure, dataset in drawn_after if dataset not in here]
    return Beside(
        sheets=sheets(summaries, view.std),
        memory=feasibility_table(view),
        drawings=(interaction_gaps(evidence, view.cells, palette), scaling(evidence, view.cells)),
        undrawn=", ".join(f"{figure} ({dataset})" for figure, dataset in sorted(missing)),
    )


def _epochs_said(summaries: Sequence[CellSummary]) -> str:
    """How long the runs behind the bars were: the paper writes it over them."""
    by_epochs: dict[int, list[str]] = {}
    for summary in summaries:
        if summary.samples:
            by_epochs.setdefault(summary.cell.epochs, []).append(summary.cell.variant)
    if len(by_epochs) == 1:
        return f"Every bar is of runs of {text.plural(next(iter(by_epochs)), 'epoch')}."
    said = [f"{text.listing(names)} {text.plural(epochs, 'epoch')}" for epochs, names in by_epochs.items()]
    return f"Bars are of runs of: {'; '.join(said)}." if said else "No run is finished yet."


def _accuracy_name(dataset: str) -> str:
    return f"accuracy-{text.slug(dataset)}"


def _accuracy_table(view: SweepView, dataset: str, summaries: Sequence[CellSummary]) -> Table:
    """The first table of a data set in full: mean and std under each rule of selection."""

    def percents(one: Statistic) -> list[Figure]:
        """Its mean and its spread."""
        return [
            Figure(None if value is None else 100 * value, words)
            for value, words in ((one.mean, one.percent), (one.std, text.percent(one.std)))
        ]

    return Table(
        name=_accuracy_name(dataset),
        caption=f"Test accuracy on {dataset} in %, by the rule that chooses the epoch; {text.STD_WORDS[view.std]} "
        f"over {averaged_over(view, dataset)[1]}",
        columns=(
            Column(heading="variant"),
            Column(heading="done", number=True),
            Column(heading="asked", number=True),
            *(
                Column(heading=what, number=True, group=text.SELECTION_WORDS[rule], unit="%")
                for rule in SELECTIONS
                for what in ("mean", "std")
            ),
            Column(heading="optimism, points", number=True),
            Column(heading="parameters", number=True),
            Column(heading="tokens", number=True),
            Column(heading="minutes a trial", number=True),
        ),
        rows=tuple(
            (
                row.cell.variant,
                Figure(row.done, str(row.done)),
                Figure(row.asked, str(row.asked)),
                *(figure for rule in SELECTIONS for figure in percents(row.accuracy[rule])),
                Figure(None if row.optimism.mean is None else 100 * row.optimism.mean, text.points(row.optimism.mean)),
                Figure(row.parameters, text.count(row.parameters)),
                Figure(row.tokens, text.count(row.tokens)),
                Figure(
                    None if row.train_seconds is None else row.train_seconds / 60,
                    text.GAP if row.train_seconds is None else f"{row.train_seconds / 60:.1f}",
                ),
            )
            for row in summaries
            if row.cell.dataset == dataset
        ),
    )


def _trials_table(view: SweepView) -> Table:
    """Every trial in one line."""
    rows = [_trial_row(cell, trial) for cell, trial in view.trials()]
    return Table(
        name="trials",
        caption=f"All trials of {view.grid}, accuracies in %",
        columns=(
            *(Column(heading=heading) for heading in ("trial", "data set", "variant")),
            *(Column(heading=heading, number=True) for heading in ("fold", "seed")),
            Column(heading="status"),
            *(Column(heading=heading, number=True) for heading in ("epochs", "asked")),
            *(Column(heading=heading, number=True, unit="%") for heading in SELECTIONS),
            *(Column(heading=heading, number=True) for heading in ("trained, s", "ranks", "attempts", "restarting, s")),
            Column(heading="weights sha256"),
        ),
        rows=tuple(
            (
                row.trial.trial_id,
                row.cell.dataset,
                row.cell.variant,
                Figure(row.trial.fold, str(row.trial.fold)),
                Figure(row.trial.seed, str(row.trial.seed)),
                row.trial.state.status,
                Figure(row.trial.state.epochs_done, str(row.trial.state.epochs_done)),
                Figure(row.cell.epochs, str(row.cell.epochs)),
                *(
                    Figure(None if one is None else 100 * one, text.percent(one))
                    for one in (row.accuracy.get(rule) for rule in SELECTIONS)
                ),
                Figure(row.train_seconds, text.number(row.train_seconds, ".1f")),
                Figure(row.ranks, text.count(row.ranks)),
                Figure(row.attempts, str(row.attempts)),
                Figure(
                    row.overhead_seconds, text.GAP if row.overhead_seconds is None else f"{row.overhead_seconds:.1f}"
                ),
                row.weights_sha256[:12],
            )
            for row in rows
        ),
        notes=(
            "Restarting: the time of all attempts less that of the training itself, that is starting again and steps "
            "trained twice.",
        ),
    )


def _trial_row(cell: CellView, trial: TrialView) -> TrialRow:
    result = trial.state.result or {}
    given = result.get("accuracy") or {}
    return TrialRow(
        cell=cell,
        trial=trial,
        accuracy={rule: given[rule] for rule in SELECTIONS if given.get(rule) is not None},
        best_epoch=(result.get("best_epoch") or {}).get("best_test"),
        attempts=attempts(trial),
        ranks=result.get("ranks") or next((one["ranks"] for one in trial.state.attempts[::-1] if "ranks" in one), None),
        overhead_seconds=overhead_seconds(trial),
        train_seconds=result.get("train_seconds") or sum(row["seconds"] for row in trial.state.rows) or None,
        weights_sha256=result.get("weights_sha256") or "",
    )


def _versions(view: SweepView) -> list[tuple[str, str]]:
    """Each piece of software or machine behind the results; where trials differ, every value with its count."""
    seen: dict[str, Counter[str]] = {}
    for _, trial in view.trials():
        result: dict[str, Any] = trial.state.result or {}
        codes = dict.fromkeys(_code(attempt["code"]) for attempt in trial.state.attempts if attempt.get("code"))
        facts = {
            "code": ", then ".join(codes) or None,
            **(result.get("versions") or {}),
            "device": result.get("device"),
        }
        for name, value in facts.items():
            if value is not None:
                seen.setdefault(name, Counter())[str(value)] += 1
    rows = []
    for name, values in seen.items():
        several = len(values) > 1
        said = [f"{value} ({text.plural(n, 'trial')})" if several else value for value, n in values.most_common()]
        rows.append((name, ", ".join(said)))
    return [*rows, ("jinja2 (this report)", metadata.version("jinja2"))]


def _code(code: Mapping[str, Any]) -> str:
    """The code that an attempt ran, by what it recorded of it (orchestration/lineage.py)."""
    changed = " with changes" if str(code.get("dirty")).lower() == "true" else ""
    if str(code.get("commit") or "unknown") != "unknown":
        return f"commit {str(code['commit'])[:12]}{changed}"
    return f"sources with sha256 {str(code.get('source_sha256', 'unknown'))[:12]}"
