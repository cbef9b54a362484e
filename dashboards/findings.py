"""What a sweep found, in plain sentences computed from its summary, and what a reader should be warned of.

A sentence says no more than its numbers: differences are taken on shared folds, and few folds are called few.
"""

import inspect
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from dashboards.summary import (
    CellSummary,
    Ranking,
    changed_switches,
    fold_mean,
    paired,
    progress,
    rank,
    sampling_word,
)
from dashboards.text import NOT_FINITE, SELECTION_WORDS, listing, percent, plural, points
from dashboards.unlike import unlike_authors
from dashboards.view import SweepView
from helix.statistics import Key, smallest_p, units

#: Up to this many units (folds, or seeds of one) an exact sign-flip test cannot reach p = 0.05, whatever they are.
FEW_PAIRS = 5


@dataclass(frozen=True, kw_only=True)
class Question:
    """The docstring of a grid: its first line, free paragraphs, and the parts it labels ("Price.", "Expectation.")."""

    title: str
    paragraphs: tuple[str, ...]
    parts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one data set shows: one sentence to read first, and those that it must not be read without."""

    headline: str
    details: tuple[str, ...]


def parse_question(text: str, grid: str) -> Question:
    """Split a grid's docstring. A line that opens with one word and a full stop ("Price. ...") begins a part."""
    title, _, rest = inspect.cleandoc(text).partition("\n")
    paragraphs: list[str] = []
    parts: list[tuple[str, str]] = []
    for block in re.split(r"\n\s*\n", rest.strip()):
        pieces: list[tuple[str, list[str]]] = []
        for line in block.splitlines():
            label = re.match(r"([A-Z][a-z]+)\.\s+(\S.*)", line)
            if label:
                pieces.append((label[1], [label[2].strip()]))
            elif pieces:
                pieces[-1][1].append(line.strip())
            else:
                pieces.append(("", [line.strip()]))
        parts += [(label, " ".join(words)) for label, words in pieces if label]
        paragraphs += [" ".join(words) for label, words in pieces if not label]
    return Question(title=title.strip() or grid, paragraphs=tuple(paragraphs), parts=tuple(parts))


def find(view: SweepView, dataset: str, summaries: Sequence[CellSummary]) -> Finding:
    """What the cells of one data set show."""
    ranking = rank(summaries, view.select)
    word = sampling_word(view)
    if not ranking.order:
        return Finding(headline=_nothing_yet(dataset, summaries), details=())
    best, mean = ranking.order[0]
    rule = SELECTION_WORDS[view.select]
    if len(ranking.order) == 1:
        n = best.accuracy[view.select].counted
        headline = f"On {dataset}, {best.cell.variant} reaches {percent(mean, 1)} % ({rule}, {n})."
        details = ["No other variant has a result to set beside it."] if len(summaries) > 1 else []
        return Finding(headline=headline, details=(*details, *_cautions(view, dataset, summaries)))
    second, second_mean = ranking.order[1]
    over = f"over the {_counted(ranking.shared, word)} that all have finished" if ranking.shared else "so far"
    if points(mean - second_mean, 1) == points(0.0, 1):
        headline = (
            f"On {dataset}, {best.cell.variant} and {second.cell.variant} are level at {percent(mean, 1)} % "
            f"({rule}, {over})."
        )
    else:
        headline = (
            f"On {dataset}, {best.cell.variant} has the highest mean accuracy, {percent(mean, 1)} %, "
            f"{points(mean - second_mean, 1).lstrip('+')} points above {second.cell.variant} ({rule}, {over})."
        )
    details = [f"Order: {_order(ranking)}."] if len(ranking.order) > 2 else []
    details += _evidence(view, ranking, word)
    details += _frontends(view, summaries, word)
    return Finding(headline=headline, details=(*details, *_cautions(view, dataset, summaries)))


def sweep_cautions(view: SweepView) -> tuple[str, ...]:
    """What concerns the whole sweep: how far it is, what failed, how far its protocol is from the authors' code."""
    state = progress(view)
    said = []
    if not state.finished and state.asked:
        running = state.statuses.get("running", 0)
        said.append(
            f"The sweep is not finished: {state.statuses.get('done', 0)} of {plural(state.asked, 'trial')} done"
            + (f", {running} running." if running else ".")
        )
    failed = state.statuses.get("failed", 0)
    if failed:
        said.append(f"{plural(failed, 'trial')} failed; the errors are listed below.")
    changed = changed_switches(view)
    if changed:
        names = listing(list(changed))
        said.append(f"The protocol differs from the profile {view.profile} in {names}.")
    said += [f"Damaged where it is stored, and not counted: {line}." for line in view.damage]
    return (*said, *view.gaps)


def comparison_note(view: SweepView, summaries: Sequence[CellSummary]) -> str:
    """One sentence on what the published numbers can and cannot be held against here; empty where there are none."""
    compared = [summary for summary in summaries if summary.comparison is not None]
    if not compared:
        return ""
    unlike = list(shared_unlike(summaries))
    differing = len(unlike_authors(view))
    if differing:
        unlike.append(f"{plural(differing, 'protocol switch', 'protocol switches')} other than the authors' code")
    if unlike:
        return f"Not like for like: these runs have {listing(unlike)}."
    if any(summary.comparison.unlike for summary in compared if summary.comparison is not None):
        return "What each run does not share with the paper's stands under its number."
    return "As far as we can tell these runs are like the paper's."


def shared_unlike(summaries: Sequence[CellSummary]) -> tuple[str, ...]:
    """In what all compared cells differ from the published runs; said once, not in every row."""
    phrases = [summary.comparison.unlike for summary in summaries if summary.comparison is not None]
    return tuple(phrase for phrase in phrases[0] if all(phrase in other for other in phrases)) if phrases else ()


def _nothing_yet(dataset: str, summaries: Sequence[CellSummary]) -> str:
    asked = sum(summary.asked for summary in summaries)
    statuses = {name: sum(summary.statuses.get(name, 0) for summary in summaries) for name in ("running", "failed")}
    if not asked:
        return f"On {dataset}, no trial was asked for."
    if statuses["failed"] == asked:
        return f"On {dataset}, there is no result: {'the only trial' if asked == 1 else f'all {asked} trials'} failed."
    running = f"; {plural(statuses['running'], 'is', 'are')} running" if statuses["running"] else ""
    return f"On {dataset}, there is no result yet: none of {plural(asked, 'trial')} is finished{running}."


def _order(ranking: Ranking) -> str:
    return ", ".join(f"{summary.cell.variant} {percent(mean, 1)}" for summary, mean in ranking.order)


def _counted(pairs: Collection[Key], word: str) -> str:
    """How many units these (fold, seed) are: "5 folds", "3 seeds", "2 folds with 10 runs"."""
    folds = len({fold for fold, _ in pairs})
    if len(pairs) == 1:
        return plural(1, "fold" if word == "trial" else word)
    if folds == 1:
        return plural(len(pairs), "seed")
    return plural(folds, "fold") + (f" with {len(pairs)} runs of each" if folds < len(pairs) else "")


def _evidence(view: SweepView, ranking: Ranking, word: str) -> list[str]:
    """How much the gap between the first two is worth: wins by unit, and what so few units could ever show."""
    first, second = ranking.order[0][0], ranking.order[1][0]
    differences = paired(first, second, view.select)
    if not ranking.shared:
        return [f"The finished {word}s differ between variants, so this order compares different test sets."]
    sample = units(differences)
    n = len(sample.values)
    one, many = _counted(list(differences)[:1], word), plural(n, sample.unit)
    ahead = sum(difference > 0 for difference in sample.values)
    behind = sum(difference < 0 for difference in sample.values)
    said = (
        f"{first.cell.variant} is ahead of {second.cell.variant} in {ahead} of {one if n == 1 else many}"
        + (f" and behind in {behind}" if behind else "")
        + (", the seeds of each averaged" if len(differences) > n else "")
        + "."
    )
    if n == 1:
        word = one.removeprefix("1 ")
        return [f"One {word} shows no spread: nothing can be said of how sure any of these differences is."]
    if n <= FEW_PAIRS:
        floor = f"{smallest_p(n):.2g}"
        return [
            said,
            f"With {many} no exact sign or rank test can reach p < 0.05 (at best {floor}): "
            "read the order as a direction.",
        ]
    return [said]


def _frontends(view: SweepView, summaries: Sequence[CellSummary], word: str) -> list[str]:
    """Raw minus mel for each backbone that finished both on a shared fold: the paper's question."""
    cells = {(summary.cell.backbone, summary.cell.frontend): summary for summary in summaries}
    said = []
    for backbone in dict.fromkeys(summary.cell.backbone for summary in summaries):
        raw, mel = cells.get((backbone, "raw")), cells.get((backbone, "mel"))
        differences = paired(raw, mel, view.select) if raw is not None and mel is not None else {}
        if differences:
            said.append((f"{backbone} {points(fold_mean(differences), 1)}", _counted(differences, word)))
    if not said:
        return []
    counts = {n for _, n in said}
    if len(counts) == 1:
        return [f"Raw minus mel, in points over {counts.pop()}: {', '.join(text for text, _ in said)}."]
    return [f"Raw minus mel, in points: {', '.join(f'{text} ({n})' for text, n in said)}."]


def _cautions(view: SweepView, dataset: str, summaries: Sequence[CellSummary]) -> list[str]:
    facts = view.facts(dataset)
    said = []
    without = [one for one in summaries if not one.accuracy[view.select].n and not one.selected.not_finite]
    failed = [one.cell.variant for one in without if one.statuses.get("failed", 0) == one.asked]
    waiting = [one.cell.variant for one in without if one.cell.variant not in failed]
    if waiting:
        said.append(f"No result yet from {listing(waiting)}.")
    if failed:
        said.append(f"No result from {listing(failed)}: every trial of it failed.")
    broken = {summary.cell.variant: summary.selected.not_finite for summary in summaries if summary.selected.not_finite}
    if broken:
        names = listing([f"{n} of {variant}" for variant, n in broken.items()])
        said.append(f"Trials whose accuracy is {NOT_FINITE}, and which are in no mean: {names}.")
    guessing = [summary.cell.variant for summary in summaries if summary.at_chance]
    if guessing and facts is not None:
        verb = "is" if len(guessing) == 1 else "are"
        said.append(
            f"{listing(guessing)} {verb} not above guessing ({percent(facts.chance, 1)} %) by two standard errors."
        )
    if facts is not None and facts.partial:
        said.append("Only part of the data set was used, so absolute accuracies stand for this subset alone.")
    optimism = [summary.optimism.mean for summary in summaries if summary.optimism.mean is not None]
    if view.select == "best_test" and optimism:
        mean = points(sum(optimism) / len(optimism), 1)
        said.append(
            f"The best epoch is chosen on the test set, as in the paper: {mean} points on average over validation."
        )
    return said
