"""Sweeps that never ran: views with made-up curves, the same ones every time."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from dashboards.evidence import DATASETS_OF_THE_PAPER, Evidence, Runs, Variant, official
from dashboards.view import DataFacts, SweepView, TrialEntry
from helix.protocol import profile
from helix.published import BACKBONES
from helix.spec import AugmentSpec, DataSpec, ModelSpec, TrainingSpec, TrialSpec
from orchestration.ledger import Status, TrialState

CREATED = 1_774_180_800.0  # 2026-03-22 12:00 UTC
TEST_CLIPS = 400

QUESTION = """Which backbone hears which sound? A sweep that was made up for a test.

Question.    Does the preferred input depend on the backbone?
Command.     python orchestration/sweep.py --grid esc50
Expectation. The paper's order; a raw-mel gap that holds over all five folds would be a surprise, for no such gap
             stands under the corrected test.
"""

CEILING = {
    ("mamba", "raw"): 0.54,
    ("mamba", "mel"): 0.525,
    ("helix", "raw"): 0.49,
    ("helix", "mel"): 0.505,
    ("attention", "raw"): 0.43,
    ("attention", "mel"): 0.45,
}
FACTS = DataFacts(
    name="esc50",
    classes=50,
    recordings=1200,
    expected=2000,
    chance=0.02,
    partial=True,
    seconds=6000.0,
    licence="CC BY-NC 3.0 (the ESC-10 part CC BY)",
    caveat="Its author warns that preprocessing differs between classes, which a model may learn instead of the sound.",
    manifest_sha256="9b" * 32,
    class_names=tuple(f"sound {label}" for label in range(50)),
)


def make_rows(name: str, ceiling: float, epochs: int, done: int) -> tuple[dict[str, Any], ...]:
    """Rows of a trial that climbs towards `ceiling`, with noise that depends on its name alone."""
    noise = random.Random(name)
    rows = []
    for epoch in range(1, done + 1):
        risen = 1 - math.exp(-4 * epoch / epochs)
        hits = [round(200 * max(0.0, ceiling * risen + noise.gauss(0, 0.012))) for _ in "ab"]
        loss = 0.6 + 3.3 * math.exp(-3 * epoch / epochs) + noise.gauss(0, 0.02)
        rows.append(
            {
                "epoch": epoch,
                "step": 50 * epoch,
                "lr": 3e-4,
                "train_loss": loss,
                "train_losses": [loss] * 50,
                "train_accuracy": ceiling * risen * 1.2,
                "test_accuracy": sum(hits) / TEST_CLIPS,
                "test_loss": loss + 0.4,
                "test_half_a": [hits[0], 200],
                "test_half_b": [hits[1], 200],
                "seconds": 30.0 + noise.random(),
                "time": CREATED - 31.0 * (done - epoch),
            }
        )
    return tuple(rows)


def make_confusion(name: str, accuracy: float, classes: int, clips: int) -> list[list[int]]:
    """[label, predicted, clips] of a test of that accuracy: a wrong clip is taken for one of the next three classes."""
    noise = random.Random(f"confusion {name}")
    counts: dict[tuple[int, int], int] = {}
    for clip in range(clips):
        label = clip % classes
        guess = label if noise.random() < accuracy else (label + noise.choice((1, 1, 2, 3))) % classes
        counts[label, guess] = counts.get((label, guess), 0) + 1
    return [[*pair, count] for pair, count in sorted(counts.items())]


def make_state(name: str, ceiling: float, epochs: int, status: Status = "done", done: int | None = None) -> TrialState:
    """What storage would know of a trial with that status; `done` epochs of it, where it is not finished."""
    finished = status == "done"
    rows = make_rows(name, ceiling, epochs, epochs if finished else done or 0)
    trial_id = f"{random.Random(name).getrandbits(64):016x}"
    result = None
    if finished:
        test = [row["test_accuracy"] for row in rows]
        best = max(range(len(test)), key=test.__getitem__)
        result = {
            "trial_id": trial_id,
            "parameters": 6_394_162,
            "tokens": 500,
            "classes": 50,
            "accuracy": {"best_test": test[best], "last": test[-1], "validation": test[best] - 0.0125},
            "best_epoch": {"best_test": best + 1, "validation": [best + 1]},
            "train_clips": 1600,
            "test_clips": TEST_CLIPS,
            "confusion": make_confusion(f"last of {name}", test[-1], 50, TEST_CLIPS),
            "selected_epoch": best + 1,
            "selected_confusion": make_confusion(name, test[best], 50, TEST_CLIPS),
            "weights_sha256": "ab" * 32,
            "train_seconds": sum(row["seconds"] for row in rows),
            "finished": CREATED,
            "device": "cpu",
            "versions": {"python": "3.11.7", "torch": "2.13.0"},
        }
    return TrialState(
        trial_id=trial_id,
        status=status,
        epochs_done=len(rows),
        step=50 * len(rows),
        rows=rows,
        attempts=({"attempt_id": "first", "started": CREATED - 4000.0},) if status != "missing" else (),
        result=result,
        error="DivergedError: the loss of step 350 is not finite" if status == "failed" else None,
    )


def make_view(
    *,
    folds: Sequence[int] = (1, 2, 3),
    seeds: Sequence[int] = (0,),
    epochs: int = 20,
    status: Callable[[str, int, int], tuple[Status, int]] = lambda variant, fold, seed: ("done", 0),
    profile_name: str = "paper",
    dataset: str = "esc50",
    facts: DataFacts | None = FACTS,
    question: str = QUESTION,
    variants: Sequence[tuple[str, str]] = tuple(CEILING),
    data: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    augment: Mapping[str, Any] | None = None,
) -> SweepView:
    """A sweep of backbones and frontends; `status(variant, fold, seed)` gives the state of each and its epochs.

    `data`, `model`, `training` and `augment`: what is asked for otherwise than by default.
    """
    entries = []
    for fold in folds:
        for seed in seeds:
            for backbone, frontend in variants:
                name = f"{backbone}-{frontend}"
                stage, done = status(name, fold, seed)
                lift = random.Random(f"fold {fold}").gauss(0, 0.03) + random.Random(f"{name}{fold}").gauss(0, 0.012)
                label = f"{name} fold {fold} seed {seed}"
                spec = TrialSpec(
                    data=DataSpec(dataset=dataset, fold=fold, **(data or {})),
                    model=ModelSpec(frontend=frontend, pattern=BACKBONES[backbone], **(model or {})),
                    training=TrainingSpec(epochs=epochs, **(training or {})),
                    augment=AugmentSpec(**(augment or {})),
                    seed=seed,
                )
                state = make_state(label, CEILING[backbone, frontend] + lift, epochs, stage, done)
                entries.append(
                    TrialEntry(
                        variant=name,
                        backbone=backbone,
                        spec=spec,
                        state=state,
                        parameters=6_394_162 if frontend == "raw" else 6_418_738,
                        tokens=500 if frontend == "raw" else 80,
                    )
                )
    return SweepView.build(
        grid=dataset,
        question=question,
        protocol=profile(profile_name),
        command=f"python orchestration/sweep.py --grid {dataset} --folds 1,2,3",
        created=CREATED,
        storage="file:///srv/helix",
        data=[facts] if facts is not None else [],
        trials=entries,
    )


@pytest.fixture(name="make_view")
def _make_view() -> Callable[..., SweepView]:
    return make_view


@pytest.fixture(name="make_state")
def _make_state() -> Callable[..., TrialState]:
    return make_state


def make_evidence(
    accuracies: Mapping[tuple[str, Variant], Mapping[Any, Any]] | None = None,
    *,
    runs: Mapping[tuple[str, Variant], Mapping[str, Any]] | None = None,
    **fields: Any,
) -> Evidence:
    """Evidence of a sweep that was made up: accuracies of cells (under both rules, or by rule) and fields of `Runs`."""
    cells = {}
    asked: list[tuple[str, Variant]] = [*(accuracies or {}), *(runs or {})]
    for dataset, variant in dict.fromkeys(asked):
        given = (accuracies or {}).get((dataset, variant), {})
        by_rule = given if all(isinstance(key, str) for key in given) else {"best_test": given, "last": given}
        more = (runs or {}).get((dataset, variant), {})
        cells[dataset, *variant] = Runs(
            **{"dataset": dataset, "frontend": variant[0], "backbone": variant[1], "accuracy": by_rule, **more}
        )
    return Evidence(
        **{
            "name": "a made-up sweep",
            "published": False,
            "select": "best_test",
            "cells": cells,
            "counts": {name: official(name) for name in DATASETS_OF_THE_PAPER},
            "tokens": {},
            **fields,
        }
    )


@pytest.fixture(name="make_evidence")
def _make_evidence() -> Callable[..., Evidence]:
    return make_evidence
