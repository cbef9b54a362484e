"""Attempts in processes of their own: each moment can be met, and what a kill at it leaves is what it says."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from helix.spec import to_json, trial_id
from helix.storage import Storage
from helix.training.checkpoint import committed
from orchestration import twin
from orchestration.twin import MOMENTS, Moment, Order, TwinError, Twins

ROOT = Path(__file__).resolve().parents[2]
STEPS = 9  # three epochs of three


@pytest.fixture(scope="module")
def twins() -> Iterator[Twins]:
    with Twins() as started:
        yield started


@pytest.fixture
def order(tiny_spec, tiny_data, storage) -> Order:
    return Order(
        spec=to_json(tiny_spec),
        source=repr(tiny_data._storage),
        data=tiny_data.prepared.prefix,
        storage=repr(storage),
        steps=STEPS,
        save_every_s=0.0,
    )


def left(storage: Storage) -> dict[str, set[str]]:
    """What lies in the storage of the one trial: its checkpoints by step, and the names of the rest."""
    (name,) = storage.children("trials")
    folder = f"trials/{name}"
    found = {
        step: set(storage.children(f"{folder}/checkpoints/{step}"))
        for step in storage.children(f"{folder}/checkpoints")
    }
    return {**found, "rows": set(storage.children(f"{folder}/metrics")), "trial": set(storage.children(folder))}


@pytest.mark.parametrize("backend", ["triton", "mamba_ssm"])
def test_the_template_starts_also_where_a_scan_of_a_gpu_is_asked_for(backend, order, monkeypatch):
    """It trains nothing itself; the attempt is told that this scan is none of a CPU."""
    monkeypatch.setenv("HELIX_SCAN", backend)
    with Twins() as started:
        attempt = started.run(order)
    assert attempt.error is not None and f"{backend!r} cannot scan" in attempt.error


@pytest.mark.parametrize("name", MOMENTS)
def test_every_moment_can_be_met_and_is_ended_by_a_real_kill(name, order, twins, storage):
    step = {twin.START: 0, twin.EVALUATION: 3, twin.ROW: 3}.get(name, STEPS if name == twin.LAST_STEP else 2)
    attempt = twins.run(order, kill_at=Moment(name=name, step=step))
    assert attempt.killed
    assert attempt.met is not None and attempt.met[0] == name
    assert attempt.met[1] >= step
    assert [number for number, _ in attempt.steps] == list(range(1, len(attempt.steps) + 1))
    assert attempt.error is None


def test_what_a_kill_before_a_manifest_leaves_is_no_checkpoint(order, twins, storage, tiny_spec, tiny_data):
    twins.run(order, kill_at=Moment(name=twin.MANIFEST))
    assert left(storage)["step-00000001"] == {"model.safetensors", "optimizer.safetensors"}
    assert committed(storage, f"trials/{trial_id(tiny_spec, tiny_data.manifest_sha256)}/checkpoints") == []
    assert twins.run(replace(order, steps=STEPS)).from_step == 0


def test_what_a_kill_between_checkpoint_and_row_leaves_has_no_row(order, twins, storage):
    attempt = twins.run(order, kill_at=Moment(name=twin.ROW))
    assert left(storage)["rows"] == set()
    assert attempt.step >= 3
    twins.run(order, kill_at=Moment(name=twin.LAST_STEP, step=STEPS))
    assert "epoch-0001.json" in left(storage)["rows"]


def test_a_result_is_there_after_it_was_put_and_not_before(order, twins, storage):
    twins.run(order, kill_at=Moment(name=twin.BEFORE_RESULT))
    assert "result.json" not in left(storage)["trial"]
    twins.run(order, kill_at=Moment(name=twin.AFTER_RESULT))
    assert "result.json" in left(storage)["trial"]
    last = twins.run(order)
    assert (last.status, last.from_step, last.steps) == (0, None, [])


def test_an_attempt_goes_on_from_the_checkpoint_of_the_one_before(order, twins):
    first = twins.run(order, kill_at=Moment(name=twin.ANY_TIME, step=6))
    second = twins.run(order)
    assert 0 < second.from_step <= first.step
    assert [number for number, _ in second.steps] == list(range(second.from_step + 1, STEPS + 1))
    assert second.status == 0


def test_an_attempt_that_raises_says_what(order, twins):
    attempt = twins.run(replace(order, data="data/none"))
    assert attempt.status == 1
    assert attempt.error is not None and "data/none" in attempt.error


def test_a_template_that_ends_is_told_apart_from_an_attempt_that_does():
    with pytest.raises(TwinError, match="ended"), Twins([sys.executable, "-c", "raise SystemExit(3)"]):
        pass


def test_a_template_that_says_nothing_is_not_waited_for_for_ever():
    silent = Twins([sys.executable, "-c", "import time; time.sleep(60)"], silent_s=0.5)
    with pytest.raises(TwinError, match="said nothing"), silent:
        pass


ALONE = """
import json, sys
from orchestration.twin import Moment, Order, Twins

def tell(attempt, event):
    if "pid" in event:
        print(event["pid"], flush=True)
    if "step" in event:
        print("step", flush=True)

with Twins() as twins:
    twins.run(Order(**json.loads(sys.argv[1])), kill_at=Moment(name="during an evaluation", delay_s=60.0), watch=tell)
"""


def test_nobody_is_left_behind_by_a_listener_that_is_killed(order):
    arguments = [sys.executable, "-c", ALONE, json.dumps(asdict(order))]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) as listener:
        assert listener.stdout is not None
        attempt = psutil.Process(int(listener.stdout.readline()))
        assert [listener.stdout.readline() for _ in range(3)] == ["step\n"] * 3
        time.sleep(0.5)  # it stands still in its evaluation by then
        listener.kill()
    _, alive = psutil.wait_procs([attempt], timeout=20)
    assert alive == []


def test_an_attempt_whose_listener_gives_up_is_killed(order):
    def give_up(attempt, event):
        if "step" in event:
            pids.append(attempt.pid)
            raise KeyboardInterrupt

    pids: list[int] = []
    with pytest.raises(KeyboardInterrupt), Twins() as interrupted:
        interrupted.run(order, watch=give_up)
    assert pids and not psutil.pid_exists(pids[0])
