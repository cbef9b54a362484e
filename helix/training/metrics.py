"""Accuracies and how an epoch is selected: best test epoch (the paper's rule), last, and by validation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Predictions on a set of clips. `label` and `predicted` have one entry per clip; `loss` is the mean over clips."""

    label: np.ndarray
    predicted: np.ndarray
    loss: float

    @property
    def accuracy(self) -> float:
        return float(np.mean(self.label == self.predicted))

    def hits(self, chosen: np.ndarray) -> list[int]:
        """[correct, total] among the clips where `chosen` is true."""
        return [int(np.sum((self.label == self.predicted) & chosen)), int(np.sum(chosen))]

    def confusion(self) -> list[list[int]]:
        """[label, predicted, count] for every pair that occurs, sorted."""
        pairs, counts = np.unique(np.stack([self.label, self.predicted], axis=1), axis=0, return_counts=True)
        return [[int(label), int(guess), int(count)] for (label, guess), count in zip(pairs, counts, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Test accuracy under the three rules, as fractions, with the epochs (from 1) at which they were taken."""

    best_test: float
    best_test_epoch: int
    last: float
    validation: float
    validation_epochs: tuple[int, ...]


def select(rows: Sequence[Mapping[str, Any]]) -> Selection:
    """The three accuracies of a finished or unfinished list of rows; ties go to the earlier epoch.

    With validation rows the epoch of best validation accuracy is taken. Without a validation set (the paper's
    protocol) the test set stands in for it without being reported on itself: the epoch chosen on one half of the test
    clips is scored on the other half, both ways, and the two scores are pooled.
    """
    if not rows:
        raise ValueError("no finished epoch, so there is no accuracy to select")
    test = [row["test_accuracy"] for row in rows]
    best = int(np.argmax(test))
    if "validation_accuracy" in rows[0]:
        chosen = int(np.argmax([row["validation_accuracy"] for row in rows]))
        validation, epochs = test[chosen], (rows[chosen]["epoch"],)
    else:
        best_on_a = int(np.argmax([row["test_half_a"][0] for row in rows]))
        best_on_b = int(np.argmax([row["test_half_b"][0] for row in rows]))
        scored = (rows[best_on_a]["test_half_b"], rows[best_on_b]["test_half_a"])
        validation = sum(hits for hits, _ in scored) / sum(total for _, total in scored)
        epochs = (rows[best_on_a]["epoch"], rows[best_on_b]["epoch"])
    return Selection(
        best_test=test[best],
        best_test_epoch=rows[best]["epoch"],
        last=test[-1],
        validation=validation,
        validation_epochs=epochs,
    )
