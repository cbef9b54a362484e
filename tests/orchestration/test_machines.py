"""Machines that come and go: the demo grid on Ray's autoscaler, from none to two and back, one drained on the way."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from helix.data.shards import open_prepared, prepare
from helix.spec import to_json, trial_id
from helix.storage import FolderStorage
from helix.training.checkpoint import committed
from orchestration.certify import BIT_EXACT, compare, finished
from orchestration.grid import expand, load_grid
from orchestration.machines import ROOT, Autoscaled, Grown, until
from orchestration.twin import Order, Twins

#: Two trials of the demo grid that outlive a machine's notice by far.
VARIANTS = ("mamba-mel", "helix-mel")
OVERRIDES = ("data.options.clips_per_class=60", "training.epochs=6", "training.batch_size=4")

#: Workers train on CPU, but only machines with a GPU have one to give, so that these are what a sweep makes start.
GPU_SPOT = {
    "resources": {"CPU": 1, "GPU": 1},
    "labels": {"helix/market": "spot", "helix/instance-type": "g6.xlarge"},
    "max_workers": 2,
}
IDLE_S = 5.0

#: Seconds between two looks at the machines: walking through all processes costs what the trials need.
LOOK_S = 0.3

#: Seconds that the notice leaves, and how much later the machine really ends.
DEADLINE_S, LATER_S = 5, 2.0


def attempts(storage: FolderStorage, name: str) -> list[dict[str, Any]]:
    """The attempts at a trial, oldest first."""
    return [storage.get_json(key) for key in storage.keys(f"trials/{name}/attempts")]


def saved(storage: FolderStorage, name: str) -> int:
    """The step of a trial's newest checkpoint, 0 before the first one."""
    found = committed(storage, f"trials/{name}/checkpoints")
    return int(found[-1].removeprefix("step-")) if found else 0


def machine_of(machines: Autoscaled, pid: int) -> Grown:
    """The machine that a process is part of."""
    (found,) = [one for one in machines.grown().values() if pid in {process.pid for process in one.tree()}]
    return found


@pytest.mark.ray
def test_the_demo_grid_grows_to_two_machines_outlives_a_drained_one_and_ends_with_none(tmp_path: Path):
    asked = expand(load_grid("demo"), folds=[1], variants=VARIANTS, overrides=OVERRIDES)
    whole, storage = FolderStorage(tmp_path / "undisturbed"), FolderStorage(tmp_path / "storage")
    data = asked[0].spec.data
    recordings = open_prepared(storage, prepare(data.dataset, data.options, source=None, storage=storage).prefix)
    names = [trial_id(trial.spec, recordings.manifest_sha256) for trial in asked]
    place = {"source": repr(storage), "data": recordings.prepared.prefix, "storage": repr(whole)}
    orders = [Order(spec=to_json(trial.spec), **place) for trial in asked]
    command = [str(ROOT / "orchestration" / "sweep.py"), "--grid", "demo", "--folds", "1", "--storage", repr(storage)]
    command += ["--variants", ",".join(VARIANTS), *OVERRIDES]

    with (
        Twins() as twins,
        ThreadPoolExecutor(1) as aside,
        Autoscaled({"gpu_spot": GPU_SPOT}, idle_s=IDLE_S) as machines,
    ):
        undisturbed = aside.submit(lambda: [finished(twins.run(order)) for order in orders])
        counts, drained = [len(machines.grown())], set()
        sweep = machines.run(command)

        def counted(met: bool) -> bool | None:
            """`met`, after a look at how many machines there are that are to stay."""
            time.sleep(LOOK_S)
            if (count := len(machines.grown().keys() - drained)) != counts[-1]:
                counts.append(count)
            return met or None

        def beats() -> list[dict[str, Any]]:
            assert sweep.process.poll() is None, sweep.said
            return [storage.get_json(f"trials/{name}/heartbeat.json") or {} for name in names]

        until(lambda: counted(all(beat.get("step", 0) >= 8 for beat in beats())), "both trials train")
        assert "waiting for a machine: 0 of 2 nodes started" in sweep.said
        told = beats()[0]
        (attempt,) = attempts(storage, names[0])
        doomed, deadline = machine_of(machines, attempt["pid"]), time.monotonic() + DEADLINE_S
        drained.add(doomed.node_id)  # the autoscaler replaces it from here on, while it still trains
        machines.drain(doomed, DEADLINE_S)
        until(
            lambda: counted(saved(storage, names[0]) >= told["step"]), "a checkpoint on the notice", limit_s=DEADLINE_S
        )
        time.sleep(max(0.0, deadline + LATER_S - time.monotonic()))
        assert beats()[0]["attempt_id"] == told["attempt_id"]  # it has trained on, where it will end
        doomed.kill()

        until(lambda: counted(sweep.process.poll() is not None), "the sweep ends")
        assert sweep.process.returncode == 0, sweep.said
        until(lambda: counted(not machines.grown()), "the machines end")
        undisturbed.result(timeout=120)
        everything = [process for program in machines.programs for process in program.tree()]

    assert (counts[0], max(counts), counts[-1]) == (0, 2, 0), counts
    for name in names:
        assert compare(whole, storage, name)["verdict"] == BIT_EXACT
    first, second = attempts(storage, names[0])
    assert (first["outcome"], second["outcome"]) == ("lost", "done")
    assert second["from_step"] == first["kept_step"] >= told["step"]  # nothing from before the notice is trained again
    assert [one["outcome"] for one in attempts(storage, names[1])] == ["done"]
    assert {(one["market"], one["instance_type"]) for one in (first, second)} == {("spot", "g6.xlarge")}
    assert everything and not [process for process in everything if process.is_running()]
    assert not machines.folder.exists()
