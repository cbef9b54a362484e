"""The paper by its own numbers: its claims and comparisons judged by what is published, as a page and as tables."""

from pathlib import Path

from dashboards.evidence import published_evidence
from dashboards.report import page_environment, put
from dashboards.tables import write_tables
from dashboards.verdicts import claims_section, comparisons_table, evidence_tables, ledger
from helix.published import PAPER, README

TEMPLATE = "published.html.j2"


def render_published(*, files: str | None = None) -> str:
    """The page as text. `files`: the folder beside it that has its tables in full, to which it then links."""
    evidence = published_evidence()
    entries = ledger(evidence)
    datasets = dict.fromkeys(runs.dataset for runs in evidence.cells.values())
    short = [comparisons_table(evidence, dataset, short=True) for dataset in datasets]
    return (
        page_environment()
        .get_template(TEMPLATE)
        .render(
            claims=claims_section(entries, evidence),
            statistics=[table for table in short if table.rows],
            files=files,
            paper=PAPER,
            readme=README,
        )
    )


def write_published(folder: Path) -> tuple[Path, ...]:
    """published.html in `folder`, and every table as CSV, Markdown and LaTeX in published/ beside it."""
    evidence = published_evidence()
    page, tables = folder / "published.html", folder / "published"
    put(page, render_published(files=tables.name))
    return page, *write_tables(evidence_tables(evidence, ledger(evidence)), tables)
