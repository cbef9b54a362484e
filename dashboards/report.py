"""The static report of a sweep: one HTML file that opens without a network, in light, dark and on paper."""

import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dashboards import text
from dashboards.certificates import certified
from dashboards.charts import bars, colours, glyph
from dashboards.comparisons import statistics_table
from dashboards.curves import Panel, panels
from dashboards.evidence import sweep_evidence
from dashboards.findings import Finding, comparison_note, find, parse_question, shared_unlike, sweep_cautions
from dashboards.summary import (
    SELECTIONS,
    CellSummary,
    attempts,
    changed_switches,
    lost_seconds,
    progress,
    sampling_word,
    summarise,
)
from dashboards.tables import Table, as_html
from dashboards.verdicts import claims_section, concerns, evidence_tables, ledger
from dashboards.view import CellView, DataFacts, SweepView, TrialView
from helix.protocol import SWITCHES
from helix.published import PAPER, README

TEMPLATE = "report.html.j2"


@dataclass(frozen=True, kw_only=True)
class Section:
    """Everything the report says of one data set."""

    dataset: str
    facts: DataFacts | None
    summaries: tuple[CellSummary, ...]
    finding: Finding
    bars: Markup
    panels: tuple[Panel, ...]
    columns: int
    comparison_note: str
    shared_unlike: tuple[str, ...]
    has_published: bool


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One line of the table of trials."""

    cell: CellView
    trial: TrialView
    accuracy: dict[str, float]
    best_epoch: int | None
    attempts: int
    lost_seconds: float | None
    train_seconds: float | None
    weights_sha256: str


def write_report(view: SweepView, path: Path) -> None:
    """Write the report to `path` in one step: a reader sees the old file or the new one, never half of it."""
    put(path, render_report(view))


def report_tables(view: SweepView) -> tuple[Table, ...]:
    """The tables that stand beside the report as CSV, Markdown and LaTeX."""
    evidence = sweep_evidence(view)
    return evidence_tables(evidence, ledger(evidence) if concerns(evidence) else ())


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
    return environment


def render_report(view: SweepView) -> str:
    """The whole page as text. Everything that comes from the view is escaped."""
    evidence = sweep_evidence(view)
    summaries = summarise(view)
    kinds = list(dict.fromkeys(block for cell in view.cells for block in cell.pattern))
    return (
        page_environment()
        .get_template(TEMPLATE)
        .render(
            view=view,
            claims=claims_section(ledger(evidence), evidence) if concerns(evidence) else None,
            statistics={
                dataset: statistics_table(evidence, dataset) for dataset in {cell.dataset for cell in view.cells}
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
            glyph=lambda pattern: glyph(pattern, kinds),
            kinds=kinds,
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
    return Section(
        dataset=dataset,
        facts=facts,
        summaries=summaries,
        finding=find(view, dataset, summaries),
        bars=bars(summaries, view.select, chance, palette),
        panels=drawn,
        columns=backbones if 2 <= backbones <= 4 else 3,
        comparison_note=comparison_note(view, summaries),
        shared_unlike=shared_unlike(summaries),
        has_published=any(summary.comparison is not None for summary in summaries),
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
        lost_seconds=lost_seconds(trial),
        train_seconds=result.get("train_seconds") or sum(row["seconds"] for row in trial.state.rows) or None,
        weights_sha256=result.get("weights_sha256") or "",
    )


def _versions(view: SweepView) -> list[tuple[str, str]]:
    """Each piece of software or machine behind the results; where trials differ, every value with its count."""
    seen: dict[str, Counter[str]] = {}
    for _, trial in view.trials():
        result: dict[str, Any] = trial.state.result or {}
        for name, value in {**(result.get("versions") or {}), "device": result.get("device")}.items():
            if value is not None:
                seen.setdefault(name, Counter())[str(value)] += 1
    rows = []
    for name, values in seen.items():
        several = len(values) > 1
        said = [f"{value} ({text.plural(n, 'trial')})" if several else value for value, n in values.most_common()]
        rows.append((name, ", ".join(said)))
    return [*rows, ("jinja2 (this report)", metadata.version("jinja2"))]
