"""What sections share: a clock that ends them, and rows that say what happened in a few words."""

import pytest
import torch

from helix.bench import Conditions, NotRunError, Timing
from helix.gpu.section import BUDGET_S, COLUMNS, Stage, device_row, wall_ratio, why

CPU = torch.device("cpu")


def test_a_section_has_time_until_it_has_none():
    now = 100.0
    stage = Stage(device=CPU, how=Conditions(), seconds=7, clock=lambda: now, until=107.0)
    stage.require_time()
    assert stage.left_s == 7
    now = 107.5
    assert stage.left_s == 0
    with pytest.raises(NotRunError, match="the 7 s of this section were spent"):
        stage.require_time()


def test_no_contestant_takes_a_section_for_itself():
    assert Stage.begin(CPU, Conditions(budget_s=30), 60).how.budget_s == BUDGET_S
    assert Stage.begin(CPU, Conditions(budget_s=1), 60).how.budget_s == 1


def test_running_out_of_memory_is_said_in_three_words_and_anything_else_as_it_is():
    assert why(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 13.41 GiB")) == "out of memory"
    assert why(MemoryError()) == "out of memory"
    assert why(NotRunError("no clone")) == "not run: no clone"
    assert why(RuntimeError("no kernel image\nis available")) == "RuntimeError: no kernel image"


def test_a_row_compares_times_on_the_wall():
    ours, theirs = Timing(cpu_s=0.1, wall_s=0.2, runs=3), Timing(cpu_s=0.5, wall_s=0.8, runs=1)
    row = device_row("theirs", theirs, ours, each_s=0.1)
    assert dict(zip((*COLUMNS, "each"), row.values, strict=True)) == {
        "device ms": 500,
        "wall ms": 800,
        "times ours": 4,
        "each": 8,
    }
    assert row.note == "one run"
    assert device_row("theirs", theirs, None, each_s=1).values[2] is None
    assert wall_ratio(theirs, ours) == 4 and wall_ratio(theirs, MemoryError()) is None
