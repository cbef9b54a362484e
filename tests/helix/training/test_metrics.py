"""Three ways to take an accuracy from the same epochs: by the best test epoch, the last one, and by validation."""

from typing import Any

import numpy as np
import pytest

from helix.training.metrics import Evaluation, Selection, select


def by_halves(*epochs: tuple[int, int], of: int = 10) -> list[dict[str, Any]]:
    """Rows with (hits on half a, hits on half b), each half of `of` clips."""
    return [
        {
            "epoch": number,
            "test_accuracy": (hits_a + hits_b) / (2 * of),
            "test_half_a": [hits_a, of],
            "test_half_b": [hits_b, of],
        }
        for number, (hits_a, hits_b) in enumerate(epochs, start=1)
    ]


def by_validation(*epochs: tuple[float, float]) -> list[dict[str, Any]]:
    """Rows with (test accuracy, validation accuracy); the halves are made to say something else."""
    return [
        row | {"test_accuracy": test, "validation_accuracy": validation}
        for row, (test, validation) in zip(by_halves(*[(0, 0)] * len(epochs)), epochs, strict=True)
    ]


@pytest.mark.parametrize(
    ("rows", "best", "last"),
    [
        (by_halves((3, 2)), (0.25, 1), 0.25),
        (by_halves((1, 1), (4, 4), (2, 2)), (0.4, 2), 0.2),
        (by_halves((1, 1), (2, 2), (4, 4)), (0.4, 3), 0.4),
        (by_halves((4, 4), (5, 3), (3, 5)), (0.4, 1), 0.4),
        (by_halves((0, 0), (0, 0)), (0.0, 1), 0.0),
        (by_validation((0.5, 0.1), (0.2, 0.9)), (0.5, 1), 0.2),
    ],
    ids=["one epoch", "in the middle", "the last", "a tie goes to the first", "never right", "validation has no say"],
)
def test_the_best_and_the_last_test_epoch(rows: list[dict[str, Any]], best: tuple[float, int], last: float):
    chosen = select(rows)
    assert (chosen.best_test, chosen.best_test_epoch) == best
    assert chosen.last == last


@pytest.mark.parametrize(
    ("rows", "accuracy", "epoch"),
    [
        (by_validation((0.3, 0.2)), 0.3, 1),
        (by_validation((0.9, 0.1), (0.2, 0.8), (0.5, 0.7)), 0.2, 2),
        (by_validation((0.9, 0.1), (0.2, 0.8), (0.5, 0.8)), 0.2, 2),
        (by_validation((0.1, 0.3), (0.2, 0.2), (0.5, 0.8)), 0.5, 3),
    ],
    ids=["one epoch", "not the best test epoch", "a tie goes to the first", "the last"],
)
def test_the_validation_set_chooses_and_the_test_set_is_reported(
    rows: list[dict[str, Any]], accuracy: float, epoch: int
):
    chosen = select(rows)
    assert (chosen.validation, chosen.validation_epochs) == (accuracy, (epoch,))


@pytest.mark.parametrize(
    ("epochs", "hits", "chosen_on_a_and_b"),
    [
        ([(3, 2)], 3 + 2, (1, 1)),
        # Half a is best at epoch 1, where b has 1; half b is best at epoch 2, where a has 2.
        ([(9, 1), (2, 8)], 1 + 2, (1, 2)),
        # Half a ties at epochs 2 and 3: the earlier one, where b has 4.
        ([(1, 0), (7, 4), (7, 9)], 4 + 7, (2, 3)),
        # Both agree.
        ([(1, 1), (6, 7), (5, 5)], 7 + 6, (2, 2)),
    ],
    ids=["one epoch", "the halves disagree", "a tie goes to the first", "the halves agree"],
)
def test_without_a_validation_set_each_half_is_scored_where_the_other_chose(
    epochs: list[tuple[int, int]], hits: int, chosen_on_a_and_b: tuple[int, int]
):
    chosen = select(by_halves(*epochs))
    assert chosen.validation == hits / 20
    assert chosen.validation_epochs == chosen_on_a_and_b


def test_halves_of_unlike_size_are_pooled_clip_by_clip():
    rows = [
        {"epoch": 1, "test_accuracy": 6 / 13, "test_half_a": [4, 10], "test_half_b": [2, 3]},
        {"epoch": 2, "test_accuracy": 6 / 13, "test_half_a": [5, 10], "test_half_b": [1, 3]},
    ]
    # a is best at epoch 2, where b has 1 of 3; b is best at epoch 1, where a has 4 of 10.
    assert select(rows).validation == (1 + 4) / 13


def test_choosing_on_the_test_set_itself_flatters_and_choosing_on_the_other_half_does_not():
    """Guessing among ten classes for 200 epochs: the best epoch looks better than chance, the halves do not."""
    random = np.random.default_rng(0)
    gains = []
    for _ in range(200):
        hits = random.binomial(100, 0.1, size=(200, 2))
        chosen = select(by_halves(*[(int(a), int(b)) for a, b in hits], of=100))
        gains.append((chosen.best_test - 0.1, chosen.validation - 0.1))
    optimism, honest = np.mean(gains, axis=0)
    assert optimism > 0.04
    assert abs(honest) < 0.005


def test_the_whole_selection_of_one_trial():
    assert select(by_halves((5, 5), (6, 8), (7, 4))) == Selection(
        best_test=0.7, best_test_epoch=2, last=0.55, validation=(4 + 6) / 20, validation_epochs=(3, 2)
    )


def test_where_no_epoch_is_finished_there_is_no_accuracy():
    with pytest.raises(ValueError, match="no finished epoch, so there is no accuracy to select"):
        select([])


EVALUATION = Evaluation(label=np.array([0, 0, 1, 2, 2, 2]), predicted=np.array([0, 1, 1, 2, 0, 2]), loss=1.5)


def test_accuracy_is_the_share_of_clips_that_are_right():
    assert EVALUATION.accuracy == 4 / 6


def test_hits_are_counted_among_the_chosen():
    chosen = np.array([True, True, False, False, True, True])
    assert EVALUATION.hits(chosen) == [2, 4]
    assert EVALUATION.hits(~chosen) == [2, 2]
    assert EVALUATION.hits(np.zeros(6, dtype=bool)) == [0, 0]


def test_the_confusion_counts_every_pair_that_occurs():
    assert EVALUATION.confusion() == [[0, 0, 1], [0, 1, 1], [1, 1, 1], [2, 0, 1], [2, 2, 2]]
    assert sum(count for _, _, count in EVALUATION.confusion()) == 6
    assert all(type(value) is int for row in EVALUATION.confusion() for value in row)
