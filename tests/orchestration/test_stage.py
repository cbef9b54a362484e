"""Faults done to a sweep on machines of its own: a worker that is killed and a node that is drained change nothing."""

import io
import os
import sys
from typing import Any

import psutil
import pytest
from rich.console import Console

from helix.storage import FolderStorage
from orchestration import chaos
from orchestration.faults.ray_nodes import drain, noticed
from orchestration.machines import MachineError, Program, until
from orchestration.stage import MOST_ADDED_S, Stage, beside, command
from orchestration.twin import Twins


@pytest.mark.ray
@pytest.mark.skipif(
    "HELIX_CHAOS_ON_RAY" not in os.environ, reason="takes three minutes; HELIX_CHAOS_ON_RAY=1 or make chaos runs it"
)
def test_a_killed_worker_and_a_drained_node_leave_the_trial_as_it_would_have_been(tmp_path):
    """The two commonest faults, on one cluster; `make chaos` causes each of them all."""
    storage, console = FolderStorage(tmp_path), Console(file=io.StringIO())
    with Twins() as twins:
        how: dict[str, Any] = {"kills": 1, "seed": 0, "short": True, "twins": twins, "console": console}
        site = chaos.prepared_site(storage, "ray", **how)
        with Stage(site, "killed, then drained", nodes=2) as stage:
            stage.strike(lambda beat: stage.worker(beat).kill())
            noticed(stage, lambda doomed: drain(stage, doomed, seconds=9))
            machines = stage.machines
            everything = [process for program in machines.programs for process in program.tree()]
            row = stage.row()
    assert row.passed, row.verdict
    assert row.verdict == "bit-exact"
    assert (row.count, stage.lost[1]) == (2, 0)
    assert everything and not [process for process in everything if process.is_running()]
    assert not machines.folder.exists()


def test_a_program_is_killed_with_all_that_it_started(tmp_path):
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).wait()"
    program = Program([sys.executable, "-c", child], {}, tmp_path / "log")
    tree = until(lambda: program.tree() if len(program.tree()) == 2 else None, "both processes")
    program.kill()
    assert not [process for process in tree if psutil.pid_exists(process.pid)]
    assert program.tree() == []
    program.kill()  # once more is nothing


def test_what_does_not_come_is_an_error_that_names_it():
    with pytest.raises(MachineError, match="a miracle: waited 0 s in vain"):
        until(lambda: None, "a miracle", limit_s=0.05)


def test_what_recovery_adds_is_a_difference_of_medians():
    said, problem = beside([9.0, 30.0, 8.0], [5.0, 4.0, 50.0])
    assert "9.0 s" in said and "5.0 s" in said and "adds 4.0 s" in said
    assert problem == ""
    assert beside([MOST_ADDED_S + 2], [1.0])[1] == f"recovery adds {MOST_ADDED_S + 1:.1f} s"


def test_the_sweep_of_a_stage_trains_the_trial_of_its_undisturbed_run(tmp_path):
    """The command and the site are put together apart; what they name must be one trial."""
    with Twins() as twins:
        how: dict[str, Any] = {"kills": 1, "seed": 0, "short": True, "twins": twins, "console": Console()}
        site = chaos.prepared_site(FolderStorage(tmp_path), "ray", **how)
    arguments = command(site, ["helix-mel"], "file:///somewhere")
    assert arguments[1:] == [
        *("--grid", "demo", "--storage", "file:///somewhere", "--folds", "1", "--variants", "helix-mel"),
        *("--workers", "1", *chaos.SHORT_ON_RAY),
    ]
    assert [trial.variant.name for trial in site.trials] == list(chaos.RAY_VARIANTS)
    assert site.overrides == chaos.SHORT_ON_RAY
