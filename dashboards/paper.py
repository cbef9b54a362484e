"""The paper by its own numbers: its claims and comparisons judged by what is published, as a page and as tables."""

from pathlib import Path

from dashboards.evidence import published_evidence
from dashboards.report import page_environment, put
from dashboards.tables import write_tables
from dashboards.verdicts import claims_section, evidence_tables, ledger
from helix.published import PAPER, README

TEMPLATE = "published.html.j2"


def render_published() -> str:
    """The page as text."""
    evidence = published_evidence()
    entries = ledger(evidence)
    return (
        page_environment()
        .get_template(TEMPLATE)
        .render(
            claims=claims_section(entries, evidence),
            statistics=[one for one in evidence_tables(evidence, entries) if one.name.startswith("statistics-")],
            paper=PAPER,
            readme=README,
        )
    )


def write_published(folder: Path) -> tuple[Path, ...]:
    """published.html in `folder`, and every table as CSV, Markdown and LaTeX in published/ beside it."""
    evidence = published_evidence()
    page = folder / "published.html"
    put(page, render_published())
    return page, *write_tables(evidence_tables(evidence, ledger(evidence)), folder / "published")
