"""The section of steps: ours is the trainer's, theirs is what a clone holds, and only like is judged against like."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helix.bench import Conditions, Timing
from helix.data.shards import prepare
from helix.gpu import steps as module
from helix.gpu.section import Stage
from helix.gpu.steps import (
    END_TO_END,
    LOOP,
    MODEL,
    NO_GRAPH,
    STOOD_IN,
    Epoch,
    Sizes,
    paper_minutes,
    spec_of,
    steps,
    write_noise,
)
from helix.storage import FolderStorage
from helix.training import graphs
from helix.training.trainer import Fit
from tests.helix.test_training_peers import clone  # noqa: F401  (a fixture)

SIZES = Sizes(
    batch=2,
    samples=1600,
    width=16,
    layers=1,
    precisions=("fp32", "bf16"),
    frontends=("raw",),
    authors="",
    source="",
    clips=10,
    epochs=1,
    scratch="",
)


def stage(seconds: float = 60) -> Stage:
    return Stage.begin(torch.device("cpu"), Conditions(repeats=1), seconds)


def test_without_the_authors_code_ours_is_timed_and_theirs_says_how_to_get_it(tmp_path: Path):
    part = steps(stage(), replace(SIZES, scratch=str(tmp_path)))
    alone, epochs = part.tables
    rows = {row.name: row for row in alone.rows}
    assert rows["helix, fp32"].values[2] == 1 and rows["helix, bf16"].values[0]
    assert "scan by numba" in alone.title and "scan by numba" in epochs.title
    assert "10 clips of noise laid out as ESC-50 at 44,100 Hz;" in epochs.title
    for name, table in ((MODEL, alone), (LOOP, alone), (END_TO_END, epochs)):
        (row,) = [row for row in table.rows if row.name == name]
        assert set(row.values) == {None} and "not run: git clone" in row.note
    seconds = {row.name: row.values[0] for row in epochs.rows}
    assert seconds["helix, fp32"] and seconds["helix, bf16"]
    assert {target.verdict for target in part.targets} == {"not measured"}
    assert [load.unit for load in part.loads] == ["fp32", "bf16"]
    assert list(tmp_path.iterdir()) == [], "what was written is gone"


def test_theirs_is_timed_beside_ours_and_not_judged_where_their_layer_is_missing(
    clone: Path,  # noqa: F811
    tmp_path: Path,
):
    sizes = replace(SIZES, authors=str(clone), precisions=("fp32",))
    part = steps(stage(), sizes)
    rows = {row.name: row for table in part.tables for row in table.rows}
    for name in (MODEL, LOOP, END_TO_END):
        assert rows[name].values[0] and STOOD_IN in rows[name].note
    assert rows[END_TO_END].values[1], "their training alone has a time too"
    assert STOOD_IN not in rows["helix, fp32"].note
    assert {target.verdict for target in part.targets} == {"not measured"}


def test_targets_are_judged_at_the_papers_size_against_their_own_layer(clone: Path):  # noqa: F811
    paper = replace(SIZES, batch=32, samples=80_000, width=256, layers=6, precisions=("fp32",))
    code = replace(module.load_authors_code(str(clone)), own_mamba=True)
    times = {MODEL: 0.3, LOOP: 0.4, "helix, fp32": 0.2}
    found = {name: Timing(cpu_s=s, wall_s=s, runs=3) for name, s in times.items()}
    (target,) = module._alone_targets(paper, found, code)
    assert target.found == pytest.approx(1.5) and target.verdict == "met"
    (target,) = module._alone_targets(SIZES, found, code)[:1]
    assert target.verdict == "not measured"


def test_the_papers_schedule_is_extrapolated_by_steps_and_test_clips():
    five_folds = Epoch(seconds=1.0, train_s=0.8, steps=50, tested=400, start_s=3.0)
    assert paper_minutes(five_folds) == pytest.approx((500 * 1.0 + 15) / 60)
    # Three folds train on half as many clips, and test as many.
    assert paper_minutes(replace(five_folds, seconds=0.6, train_s=0.4, steps=25)) == paper_minutes(five_folds)


def test_an_epoch_is_parted_where_its_last_step_was_done(monkeypatch: pytest.MonkeyPatch):
    now = iter(range(100, 200))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(now))
    parts = module._Parts(torch.device("cpu"))
    for total in (1, 2, 2, 2, 3, 4, 4, 4, 5, 6, 6):  # two steps and some evaluated batches in each epoch
        parts.on_step(total)
    assert parts.trained_at == {4: 100, 6: 101}


def test_a_row_that_is_told_late_is_measured_by_its_own_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Rows wait for their checkpoints, which may take as long as the next epoch."""

    def late(_spec: object, _recordings: object, how: Fit) -> dict[str, Any]:
        now, rows = 0.0, []
        for epoch in range(1, 4):
            for step in (2 * epoch - 1, 2 * epoch):
                now += 1
                clock[0] = now
                how.on_step(step)
            clock[0] = now = now + 0.5
            how.on_step(2 * epoch)
            rows.append({"step": 2 * epoch, "seconds": 2.5, "time": now})
        for row in rows:
            how.on_epoch(row)
        return {"rows": rows, "test_clips": 2}

    source = write_noise(tmp_path / "noise", 10)
    files = module._files(stage(), replace(SIZES, source=str(source)), tmp_path / "files")
    clock = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(module, "fit", late)
    epoch = module.our_epoch(stage(), spec_of(SIZES, "raw", "fp32"), files.recordings, tmp_path / "trial")
    assert (epoch.seconds, epoch.train_s) == (2.5, 2.0)


def test_our_epoch_leaves_out_the_first_and_counts_its_steps(tmp_path: Path):
    source, storage = write_noise(tmp_path / "noise", 10), FolderStorage(tmp_path / "storage")
    files = module._files(stage(), replace(SIZES, source=str(source)), tmp_path / "files")
    assert len(files.recordings) == 10
    epoch = module.our_epoch(stage(), spec_of(SIZES, "raw", "fp32"), files.recordings, tmp_path / "trial")
    assert epoch.steps == 4, "eight clips of four folds, two in a batch"
    assert 0 < epoch.train_s < epoch.seconds < 30 and epoch.start_s >= 0
    assert epoch.tested == 2 and files.hz == 44_100
    prepared = prepare("esc50", source=source, storage=storage, allow_partial=True)
    assert sorted(set(files.recordings.index.fold.tolist())) == [1, 2, 3, 4, 5]
    assert prepared.manifest["classes"]


def test_what_fails_is_a_row_and_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: object) -> Epoch:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "our_epoch", fails)
    part = steps(stage(), replace(SIZES, precisions=("fp32",)))
    (row,) = [row for row in part.tables[-1].rows if row.name == "helix, fp32"]
    assert row.note == "out of memory" and set(row.values) == {None}


def test_files_that_cannot_be_written_cost_no_figure_of_the_steps(monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> module.Files:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_files", full)
    part = steps(stage(), replace(SIZES, precisions=("fp32",)))
    alone, epochs = part.tables
    assert alone.rows[0].values[0] and "No space left" in epochs.rows[0].note
    assert part.failed == ("section step: epochs",) and len(part.loads) == 1


def test_once_the_time_is_spent_what_is_left_says_so():
    part = steps(stage(1e-9), replace(SIZES, epochs=0))
    assert all("were spent" in row.note or "not run" in row.note for row in part.tables[0].rows)


def test_where_a_step_is_replayed_as_a_graph_the_step_without_stands_beside(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(graphs.CAPTURES, "cpu", lambda device, run, recorded: run)
    part = steps(stage(), replace(SIZES, precisions=("fp32",), epochs=0))
    timed = [row.name for row in part.tables[0].rows if row.values[0]]
    assert timed == ["helix, fp32", "helix, fp32, no graph"]
    assert [row.name for row in part.tables[0].rows if NO_GRAPH in row.note] == []


def test_a_graph_that_was_given_up_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch):
    def cannot(device: torch.device, run: object, recorded: object) -> None:
        raise RuntimeError("no capture")

    monkeypatch.setitem(graphs.CAPTURES, "cpu", cannot)
    part = steps(stage(), replace(SIZES, precisions=("fp32",), epochs=0))
    assert [row.name for row in part.tables[0].rows if NO_GRAPH in row.note] == ["helix, fp32"]


def test_clips_that_need_no_resampling_are_said_to_need_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "OFFICIAL_HZ", 16_000)
    source = write_noise(tmp_path / "noise", 10)
    part = steps(stage(), replace(SIZES, source=str(source), precisions=("fp32",)))
    assert "10 clips of ESC-50 at 16,000 Hz, so nothing is resampled" in part.tables[-1].title
