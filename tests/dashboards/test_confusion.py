"""What is taken for what: every clip is counted once, whatever is shown of it."""

import csv
import io
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from dashboards.confusion import (
    MATRIX_CLASSES,
    TOP,
    confusion_csv,
    confusion_tables,
    confusions,
    per_class,
    pooled_confusion,
)
from dashboards.tables import Figure, as_csv
from dashboards.view import SweepView

MakeView = Callable[..., SweepView]


def counted(view: SweepView, *results: list[list[int]]) -> SweepView:
    """The view with these counts in the trials of its first cell."""
    cell = view.cells[0]
    trials = tuple(
        replace(
            trial,
            state=replace(trial.state, result={**(trial.state.result or {}), "selected_confusion": counts}),
        )
        for trial, counts in zip(cell.trials, results, strict=True)
    )
    return replace(view, cells=(replace(cell, trials=trials), *view.cells[1:]))


def small(view: SweepView, classes: int) -> SweepView:
    return replace(view, data=(replace(view.data[0], classes=classes, class_names=()),))


@pytest.fixture(name="one_cell")
def _one_cell(make_view: MakeView) -> SweepView:
    view = small(make_view(folds=(1, 2), variants=[("mamba", "raw")]), 3)
    return counted(view, [[0, 0, 3], [0, 2, 1], [1, 1, 4]], [[0, 0, 2], [0, 2, 2], [2, 1, 1]])


def test_the_counts_of_all_folds_are_added(one_cell: SweepView):
    (found,) = confusions(one_cell, "esc50")
    assert found.counts == {(0, 0): 5, (0, 2): 3, (1, 1): 4, (2, 1): 1}
    assert found.clips == {0: 8, 1: 4, 2: 1}
    assert found.share(0, 2) == 3 / 8
    assert found.share(2, 2) == 0.0


def test_a_class_that_was_never_tested_has_a_gap_and_no_zero(make_view: MakeView):
    view = counted(small(make_view(folds=(1,), variants=[("mamba", "raw")]), 3), [[0, 0, 3], [1, 1, 2]])
    made = per_class(view, "esc50")
    assert made is not None
    assert [cells[0][0] for _, cells in made.accuracy.rows] == ["100", "100", "\N{EN DASH}"]
    assert made.confusions is None, "nothing was confused"


def test_few_classes_have_a_whole_matrix_and_many_have_none(make_view: MakeView):
    view = make_view(folds=(1,), variants=[("mamba", "raw")])
    assert view.data[0].classes > MATRIX_CLASSES
    many = per_class(view, "esc50")
    assert many is not None
    assert many.matrices == ()
    assert many.confusions is not None
    assert len(many.confusions.rows) == TOP
    few = per_class(counted(small(view, 3), [[0, 0, 3], [0, 2, 1], [1, 1, 4]]), "esc50")
    assert few is not None
    ((name, matrix),) = few.matrices
    assert name == "mamba-raw"
    assert [words for words, _ in matrix.rows[0][1]] == ["3", "\N{MIDDLE DOT}", "1"]


def test_the_largest_confusions_come_first(make_view: MakeView):
    view = make_view(folds=(1,))
    total: Counter[tuple[int, int]] = Counter()
    for cell in view.cells:
        for trial in cell.trials:
            for label, guess, clips in (trial.state.result or {})["selected_confusion"]:
                if label != guess:
                    total[label, guess] += clips
    made = per_class(view, "esc50")
    assert made is not None
    assert made.confusions is not None
    shown = [name for name, _ in made.confusions.rows]
    most = [clips for _, clips in total.most_common(TOP)]
    pairs = [[int(word.removeprefix("sound ")) for word in row.split(", ")] for row in shown]
    assert [total[label, guess] for label, guess in pairs] == most


@pytest.mark.parametrize("classes", [3, 50])
def test_the_files_hold_every_clip(make_view: MakeView, classes: int):
    view = make_view(folds=(1, 2), variants=[("mamba", "raw")])
    if classes == 3:
        view = counted(small(view, 3), [[0, 0, 3], [0, 2, 1], [1, 1, 4]], [[0, 0, 2], [0, 2, 2], [2, 1, 1]])
    (found,) = confusions(view, "esc50")
    per_class_table, table = confusion_tables(view, "esc50")
    index = 2 if classes > MATRIX_CLASSES else slice(1, None)
    cells = [cell for row in table.rows for cell in ([row[index]] if isinstance(index, int) else row[index])]
    assert sum(int(cell.value or 0) for cell in cells if isinstance(cell, Figure)) == sum(found.counts.values())
    assert len(per_class_table.rows) == classes
    assert as_csv(table).count("\n") == len(table.rows) + 1


def test_classes_are_called_by_name_where_the_names_are_known(make_view: MakeView):
    view = make_view(folds=(1,))
    named, numbered = per_class(view, "esc50"), per_class(small(view, 50), "esc50")
    assert named is not None
    assert numbered is not None
    assert named.accuracy.rows[7][0] == "sound 7"
    assert numbered.accuracy.rows[7][0] == "class 7"


def test_without_a_finished_trial_there_is_nothing_to_show(make_view: MakeView):
    view = make_view(status=lambda *_: ("running", 3))
    assert per_class(view, "esc50") is None
    assert confusion_tables(view, "esc50") == ()


def test_results_of_earlier_versions_are_pooled_by_their_last_epoch():
    old, new = {"confusion": [[0, 0, 1]]}, {"confusion": [[0, 1, 1]], "selected_confusion": [[0, 0, 9]]}
    triples, of = pooled_confusion([old, new])
    assert triples == [[0, 0, 1], [0, 1, 1]]
    assert of == "2 trials, the last epoch of each"


def test_a_class_name_is_no_formula_and_no_new_line_in_the_file_of_mlflow():
    names = ["=1+1", "@a,b", "-c", "d\re", "f"]
    text = confusion_csv([[0, 0, 3], [3, 1, 2], [4, 4, 0]], names)
    head, *rows = csv.reader(io.StringIO(text, newline=""))
    assert head == ["is / taken for", "'=1+1", "'@a,b", "'-c", "d\ne", "f"]
    assert [row[0] for row in rows] == head[1:]
    assert [[int(clips) for clips in row[1:]] for row in rows] == [
        [3, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 2, 0, 0, 0],
        [0, 0, 0, 0, 0],
    ]
