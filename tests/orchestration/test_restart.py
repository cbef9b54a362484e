"""A restart is asked for by hand, takes nothing away for good, and never from under a living process."""

import subprocess
import sys
import threading
from dataclasses import replace

import psutil
import pytest

from helix.spec import trial_id
from helix.storage import Storage
from helix.training.checkpoint import CheckpointError
from helix.training.trainer import Fit, fit
from orchestration import cli
from orchestration.lease import this_process
from orchestration.restart import restart


class Killed(BaseException):
    """The end of a process, as far as a loop in this process can meet it."""


@pytest.fixture
def damaged(tiny_spec, tiny_data, storage) -> str:
    """A trial whose checkpoints are all damaged."""

    def on_step(step: int) -> None:
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        fit(tiny_spec, tiny_data, Fit(storage=storage, on_step=on_step, save_now=lambda: True))
    name = trial_id(tiny_spec, tiny_data.manifest_sha256)
    for key in list(storage.keys(f"trials/{name}/checkpoints")):
        if key.endswith("model.safetensors"):
            storage.put(key, b"nothing")
    return name


def test_the_refusal_names_the_command_and_the_command_lets_it_train(damaged, tiny_spec, tiny_data, storage, capsys):
    with pytest.raises(CheckpointError, match=f"helix restart {damaged}"):
        fit(tiny_spec, tiny_data, Fit(storage=storage))
    before = {key: storage.get(key) for key in storage.keys(f"trials/{damaged}/checkpoints")}
    assert cli.main(["restart", damaged, "--storage", str(storage.root)]) == 0
    # and the row of the first epoch, its best weights and their manifest
    assert f"moving {len(before) + 3} files" in capsys.readouterr().out
    (aside,) = storage.children(f"trials/{damaged}/aside")
    moved = {key: storage.get(key.replace(damaged, f"{damaged}/aside/{aside}", 1)) for key in before}
    assert moved == before
    assert not list(storage.keys(f"trials/{damaged}/checkpoints"))
    steps: list[int] = []
    assert fit(tiny_spec, tiny_data, Fit(storage=storage, on_step=steps.append))["rows"][-1]["step"] == 9
    assert steps[0] == 1


def test_a_finished_trial_is_not_restarted(tiny_spec, tiny_data, storage):
    spec = replace(tiny_spec, training=replace(tiny_spec.training, epochs=1))
    fit(spec, tiny_data, Fit(storage=storage))
    with pytest.raises(ValueError, match="is done"):
        restart(storage, trial_id(spec, tiny_data.manifest_sha256), say=print)


def test_a_trial_that_is_not_there_is_said_so(storage, capsys):
    assert cli.main(["restart", "0123456789abcdef", "--storage", str(storage.root)]) == 2
    assert "there is no trial 0123456789abcdef" in capsys.readouterr().err


def hold(storage: Storage, name: str, **holder) -> None:
    storage.put_json(f"trials/{name}/leases/000001.json", {"attempt_id": "a", "sweep_id": "s", **holder})


def test_a_trial_that_a_process_of_this_machine_trains_is_not_restarted(damaged, storage):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        hold(
            storage, damaged, **this_process() | {"pid": process.pid, "born": psutil.Process(process.pid).create_time()}
        )
        with pytest.raises(ValueError, match="a living process works on trial"):
            restart(storage, damaged, say=print, expiry_s=0.2, look_s=0.05)
        process.communicate(b"\n")
    restart(storage, damaged, say=print, expiry_s=0.2, look_s=0.05)


def test_another_machine_is_watched_until_its_heart_beats_or_is_silent_for_long(damaged, storage):
    hold(storage, damaged, host="elsewhere", pid=1, born=0.0)
    stop, beats = threading.Event(), iter(range(10**9))

    def live() -> None:
        while not stop.wait(0.02):
            storage.put_json(f"trials/{damaged}/heartbeat.json", {"attempt_id": "a", "beat": next(beats)})

    thread = threading.Thread(target=live)
    thread.start()
    said: list[str] = []
    try:
        with pytest.raises(ValueError, match="a living process works on trial"):
            restart(storage, damaged, say=said.append, expiry_s=5.0, look_s=0.1)
    finally:
        stop.set()
        thread.join()
    assert any("looking for up to 5 s" in line for line in said)
    assert storage.children(f"trials/{damaged}/checkpoints")
    restart(storage, damaged, say=print, expiry_s=0.3, look_s=0.05)
    assert storage.children(f"trials/{damaged}/checkpoints") == []
