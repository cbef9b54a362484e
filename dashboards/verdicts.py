"""The claim ledger: every sentence of the paper with its verdict on some evidence, and the tables that show it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dashboards.claim import VERDICTS, Claim, Entry, Untested, Verdict, asked, judge
from dashboards.claims import analysis, method, opening, results, setup
from dashboards.comparisons import p_shown, statistics_table
from dashboards.evidence import DATASETS_OF_THE_PAPER, Evidence
from dashboards.tables import Column, Figure, Table
from dashboards.text import plural, points

_PARTS = (opening, method, setup, results, analysis)

#: Every sentence of the paper that can be tested, in the paper's order.
CLAIMS: tuple[Claim, ...] = tuple(claim for part in _PARTS for claim in part.CLAIMS)

#: The others, with what stands in the way.
UNTESTED: tuple[Untested, ...] = tuple(one for part in _PARTS for one in part.UNTESTED)


@dataclass(frozen=True, kw_only=True)
class ClaimsSection:
    """What a page shows of the ledger: a table for each verdict, and those that stay folded."""

    headline: str
    groups: tuple[Table, ...]
    without_data: Table
    untested: Table


def ledger(evidence: Evidence) -> tuple[Entry, ...]:
    """All claims of the paper with their verdicts, in the paper's order."""
    return judge(CLAIMS, evidence)


def concerns(evidence: Evidence) -> bool:
    """Whether the paper says anything of these data sets."""
    return any(runs.dataset in DATASETS_OF_THE_PAPER for runs in evidence.cells.values())


def tally(entries: Sequence[Entry]) -> dict[Verdict, int]:
    """How many claims have each verdict."""
    counted = Counter(entry.judgement.verdict for entry in entries)
    return {verdict: counted[verdict] for verdict in VERDICTS}


def tallied(entries: Sequence[Entry]) -> str:
    """ "118 claims: 38 supported, 22 contradicted, 28 underpowered, 30 without data"."""
    said = ", ".join(
        f"{count} {'without data' if verdict == 'no data' else verdict}" for verdict, count in tally(entries).items()
    )
    return f"{plural(len(entries), 'claim')}: {said}"


def claims_table(entries: Sequence[Entry], evidence: Evidence) -> Table:
    """One row a claim, with the numbers behind its verdict; the difference and both p stand apart."""
    return Table(
        name="claims",
        caption=f"What the paper claims, judged by {evidence.name}. {tallied(entries)}",
        columns=(
            Column(heading="claim"),
            Column(heading="where"),
            Column(heading="verdict"),
            Column(heading="what the paper says"),
            Column(heading="the numbers"),
            Column(heading="difference", number=True, unit="points"),
            Column(heading="p", number=True),
            Column(heading="Holm", number=True),
        ),
        rows=tuple(_row(entry) for entry in entries),
        notes=(
            "supported: the numbers show it; contradicted: they exclude it; underpowered: they could do neither. "
            "Differences, in points, by the corrected t test with Holm's adjustment over all comparisons of that data "
            "set, the family of its table of comparisons; one run each shows none.",
        ),
    )


def untested_table() -> Table:
    """The sentences that no run can test."""
    return Table(
        name="untested",
        caption="Sentences of the paper that this ledger does not test, and why",
        columns=(Column(heading="what the paper says"), Column(heading="where"), Column(heading="why not")),
        rows=tuple((one.says, one.where, one.why) for one in UNTESTED),
    )


def claims_section(entries: Sequence[Entry], evidence: Evidence) -> ClaimsSection:
    """The ledger as a page shows it: what is contradicted first, what has no data folded."""
    order: tuple[Verdict, ...] = ("contradicted", "supported", "underpowered")
    tables = {verdict: _short(entries, verdict) for verdict in VERDICTS}
    return ClaimsSection(
        headline=f"Each sentence of the paper that can be tested, judged by {evidence.name}. {tallied(entries)}.",
        groups=tuple(tables[verdict] for verdict in order if tables[verdict].rows),
        without_data=tables["no data"],
        untested=untested_table(),
    )


def comparisons_table(evidence: Evidence, dataset: str, *, short: bool = False) -> Table:
    """All comparisons of a data set and those that claims ask for, if the paper speaks of this evidence."""
    also = asked(CLAIMS, dataset) if concerns(evidence) else []
    return statistics_table(evidence, dataset, also=also, short=short)


def evidence_tables(evidence: Evidence, entries: Sequence[Entry]) -> tuple[Table, ...]:
    """What is written beside a page: the ledger, where the paper speaks of these data, and all comparisons."""
    datasets = list(dict.fromkeys(runs.dataset for runs in evidence.cells.values()))
    made = [comparisons_table(evidence, dataset) for dataset in datasets]
    found = [claims_table(entries, evidence), untested_table()] if entries else []
    return (*found, *(table for table in made if table.rows))


def _short(entries: Sequence[Entry], verdict: Verdict) -> Table:
    chosen = [entry for entry in entries if entry.judgement.verdict == verdict]
    return Table(
        name=f"claims-{verdict.replace(' ', '-')}",
        caption=f"{plural(len(chosen), 'claim')} {'without data' if verdict == 'no data' else verdict}",
        columns=(Column(heading="what the paper says"), Column(heading="where"), Column(heading="the numbers")),
        rows=tuple((entry.claim.says, entry.claim.where, _numbers(entry)) for entry in chosen),
    )


def _row(entry: Entry) -> tuple[str | Figure, ...]:
    claim, found = entry.claim, entry.judgement.measured
    return (
        claim.id,
        claim.where,
        entry.judgement.verdict,
        claim.says,
        _numbers(entry),
        Figure(100 * found.mean, points(found.mean)) if found else Figure(None),
        *(Figure(p, p_shown(p)) for p in ((found.corrected.p, found.p_holm) if found else (None, None))),
    )


def _numbers(entry: Entry) -> str:
    unlike = f" [these runs: {'; '.join(entry.unlike)}]" if entry.unlike else ""
    return entry.judgement.because + unlike
