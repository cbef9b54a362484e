"""Attempts of a trial, without Ray: what is recorded, what is tried again, and what is given up with its reason."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.exceptions
import ray.train
import torch

import helix.models.scan as scan
from helix.data.shards import Recordings
from helix.loopback import Fault, FaultProxy
from helix.models.scan_error import UnusableScanError
from helix.spec import from_json, to_json, trial_id
from helix.storage import Storage, open_storage
from orchestration import lease, stop, worker
from orchestration.certify import BIT_EXACT, compare
from orchestration.grid import expand, load_grid
from orchestration.ledger import read
from orchestration.money import machine_facts
from orchestration.pools import Pool
from orchestration.recovery import Budget
from orchestration.worker import run_trial, work_through
from tests.conftest import with_training

ROOT = Path(__file__).resolve().parents[2]


class Stumbles:
    """Stands before the real loop and raises what it is given, one error per attempt, before it lets it run."""

    def __init__(self, *errors: BaseException):
        self.errors, self.calls = list(errors), 0

    def __call__(self, spec, recordings, how):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.real(spec, recordings, how)

    real = staticmethod(worker.fit)


@pytest.fixture
def attempt(tiny_spec, tiny_data: Recordings, storage: Storage, monkeypatch):
    """Runs the tiny trial with a loop that stumbles; returns (done, state, calls)."""
    spec = replace(tiny_spec, training=replace(tiny_spec.training, epochs=1))
    name = trial_id(spec, tiny_data.manifest_sha256)

    def run(*errors: BaseException, sweep_id: str = "s1", budget: Budget | None = None):
        stumbles = Stumbles(*errors)
        monkeypatch.setattr(worker, "fit", stumbles)
        done = run_trial(spec, tiny_data, storage, sweep_id=sweep_id, budget=budget)
        return done, read(storage, name, now=1e12), stumbles.calls

    return run


def test_a_trial_that_works_is_attempted_once(attempt):
    done, state, calls = attempt()
    assert (done, state.status, calls) == ("done", "done", 1)
    assert [record["outcome"] for record in state.attempts] == ["done"]


def test_a_passing_trouble_is_tried_again_and_leaves_its_trace(attempt):
    done, state, calls = attempt(OSError("the disk went away"))
    assert (done, state.status, calls) == ("done", "done", 2)
    assert state.attempts[0]["error"] == "OSError: the disk went away"
    assert "Traceback" in state.attempts[0]["traceback"]


def test_a_mistake_in_the_spec_is_not_tried_again(attempt):
    done, state, calls = attempt(ValueError("no such fold"))
    assert (done, state.status, calls) == ("failed", "failed", 1)
    assert "no such fold" in state.error
    assert "would happen again" in state.error


def test_a_machine_that_cannot_scan_is_tried_once_and_said_to_lack_something_before_the_first_step(
    attempt, tiny_spec, tiny_data, storage, monkeypatch
):
    def ready() -> None:
        raise UnusableScanError("numba", "no C compiler", "apt-get install gcc")

    monkeypatch.setitem(scan.BACKENDS, "numba", replace(scan.BACKENDS["numba"], ready=ready))
    monkeypatch.delenv("HELIX_SCAN", raising=False)
    scan._make_ready.cache_clear()
    done, state, calls = attempt()
    assert (done, state.status, calls) == ("failed", "failed", 1)
    assert "no C compiler; apt-get install gcc (stopped: UnusableScanError would happen again)" in state.error
    assert state.attempts[0]["step"] == 0
    # Attention scans nothing, and lacks nothing.
    bare = replace(with_training(tiny_spec, epochs=1), model=replace(tiny_spec.model, pattern=("attention",) * 2))
    assert run_trial(bare, tiny_data, storage, sweep_id="s1") == "done"


def test_failures_have_a_budget(attempt):
    errors = [RuntimeError(f"trouble {number}") for number in range(5)]
    done, state, calls = attempt(*errors, budget=Budget(failures=2))
    assert (done, state.status, calls) == ("failed", "failed", 3)
    assert "3 failures; 2 are allowed" in state.error


@pytest.mark.parametrize(
    "error",
    [
        ray.exceptions.ActorUnavailableError("the controller's machine does not answer", None),
        ray.exceptions.ActorDiedError(),
        ray.exceptions.RaySystemError("the head is gone"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_worker_that_is_cut_off_from_ray_leaves_and_the_trial_has_not_failed(attempt, error):
    """A worker whose controller or head is gone hears it when it reports or asks for notices."""
    for _ in range(2):
        with pytest.raises(type(error)):
            attempt(error, budget=Budget(failures=0))
    done, state, calls = attempt(budget=Budget(failures=0))
    assert (done, state.status, calls) == ("done", "done", 1)
    assert [record["outcome"] for record in state.attempts] == ["lost", "lost", "done"]
    assert type(error).__name__ in state.attempts[0]["error"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS], ids=errno.errorcode.get)
def test_a_disk_that_takes_no_more_ends_the_worker_however_often_and_the_trial_has_not_failed(attempt, number):
    often = Budget().losses_in_place + 2
    for _ in range(often):
        with pytest.raises(OSError, match="storage/x"):
            attempt(OSError(number, os.strerror(number), "storage/x"), budget=Budget(failures=0))
    done, state, calls = attempt(budget=Budget(failures=0))
    assert (done, state.status, calls) == ("done", "done", 1)
    assert [record["outcome"] for record in state.attempts] == [*["lost"] * often, "done"]
    assert os.strerror(number) in state.attempts[0]["error"]


def test_a_file_that_is_not_there_is_a_failure_of_the_trial(attempt):
    done, state, _ = attempt(FileNotFoundError(errno.ENOENT, "no such file"), budget=Budget(failures=0))
    assert (done, state.status) == ("failed", "failed")


def test_a_new_sweep_tries_a_failed_trial_again(attempt):
    assert attempt(ValueError("once"), sweep_id="s1")[0] == "failed"
    done, state, _ = attempt(sweep_id="s2")
    assert (done, state.status) == ("done", "done")


def test_a_done_trial_is_not_attempted(attempt):
    attempt()
    done, state, calls = attempt(RuntimeError("must not be reached"), sweep_id="s2")
    assert (done, calls, len(state.attempts)) == ("done", 0, 1)


def test_a_trial_whose_process_dies_in_place_again_and_again_is_stopped(attempt):
    for _ in range(3):
        with pytest.raises(SystemExit):  # not an Exception: the attempt ends without a word, as a killed process does
            attempt(SystemExit(9), budget=Budget(losses_in_place=3))
    done, state, calls = attempt(budget=Budget(losses_in_place=3))
    assert (done, state.status, calls) == ("failed", "failed", 0)
    assert "lost 3 times in a row at step 0" in state.error


def test_an_attempt_under_way_shows_as_running_until_it_falls_silent(attempt, storage):
    with pytest.raises(SystemExit):
        attempt(SystemExit(9))
    name = storage.children("trials")[0]
    record = read(storage, name, now=0.0).attempts[0]
    assert read(storage, name, now=record["started"] + 10).status == "running"
    assert read(storage, name, now=record["started"] + 1000).status == "partial"


def test_an_attempt_that_ended_without_a_word_is_closed_by_the_next_one(attempt):
    with pytest.raises(SystemExit):
        attempt(SystemExit(9))
    done, state, _ = attempt(sweep_id="s2")
    assert done == "done"
    assert [record["outcome"] for record in state.attempts] == ["lost", "done"]
    assert state.attempts[0]["started"] <= state.attempts[0]["ended"] <= state.attempts[1]["started"]


def test_memory_that_runs_out_is_answered_with_smaller_parts_of_the_same_batch(attempt):
    errors = [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("can't allocate memory: 9 bytes"),
    ]
    done, state, calls = attempt(*errors, budget=Budget(failures=0))
    assert (done, state.status, calls) == ("done", "done", 4)
    assert [record["micro_batch"] for record in state.attempts] == [24, 12, 6, 3]
    assert [record.get("error_kind") for record in state.attempts] == ["OutOfMemory"] * 3 + [None]
    assert state.result["micro_batch"] == 3


def test_an_attempt_records_the_most_memory_that_it_took(attempt):
    _, state, _ = attempt(MemoryError())
    peaks = [record["peak_bytes"] for record in state.attempts]
    assert len(peaks) == 2 and all(10e6 < peak < 100e9 for peak in peaks)


def test_where_no_smaller_part_is_left_the_trial_is_stopped(attempt):
    done, state, calls = attempt(*[MemoryError() for _ in range(9)])
    assert (done, calls) == ("failed", 7)  # 24, 12, 6, 3, 2, 1, and 1 with every block recomputed
    assert [record["recompute"] for record in state.attempts] == [False] * 6 + [True]
    assert "one clip at a time and every block recomputed" in state.error


def test_a_new_process_of_the_same_sweep_goes_on_in_the_parts_that_fitted(attempt):
    with pytest.raises(SystemExit):
        attempt(MemoryError(), SystemExit(9))
    _, state, _ = attempt()
    assert [record["micro_batch"] for record in state.attempts] == [24, 12, 12]


def test_a_trial_that_another_living_process_holds_is_left_to_it(attempt, storage, tiny_data, tiny_spec):
    spec = replace(tiny_spec, training=replace(tiny_spec.training, epochs=1))
    name = trial_id(spec, tiny_data.manifest_sha256)
    elsewhere = {"attempt_id": "a", "sweep_id": "other", "host": "elsewhere", "pid": 1, "born": 0.0}
    storage.put_json(f"trials/{name}/leases/000001.json", elsewhere)
    assert attempt()[0] == "held"
    assert read(storage, name, now=1e12).attempts == ()


HUNG = """
import functools, sys, time
from pathlib import Path
from orchestration import lease, worker
from helix.data.shards import open_prepared
from helix.spec import from_json
from helix.storage import FolderStorage, Storage
import json
lease.Lease = functools.partial(lease.Lease, first_s=0.5)
worker.fit = lambda *_: time.sleep(60)
spec, data, prefix, storage = sys.argv[1:]
recordings = open_prepared(FolderStorage(Path(data)), prefix)
worker.run_trial(from_json(json.loads(spec)), recordings, FolderStorage(Path(storage)), sweep_id="s")
"""


def test_a_process_that_hangs_ends_itself_and_says_so(tiny_spec, tiny_data, storage):
    spec = json.dumps(to_json(replace(tiny_spec, training=replace(tiny_spec.training, epochs=1))))
    data = tiny_data._storage
    arguments = [spec, str(data.root), tiny_data.prepared.prefix, str(storage.root)]
    ended = subprocess.run([sys.executable, "-c", HUNG, *arguments], cwd=ROOT, timeout=120, check=False)
    assert ended.returncode == worker.HUNG
    state = read(storage, storage.children("trials")[0], now=1e12)
    assert state.attempts[0]["outcome"] == "lost" and "hung: no step was finished for" in state.attempts[0]["error"]


DRIVER = """
import functools, json, socket, sys, time
from pathlib import Path
from helix.data.shards import open_prepared
from helix.spec import from_json
from helix.storage import FolderStorage, Storage
from orchestration import lease
from orchestration.worker import work_through
specs, data, prefix, storage, sweep, host, ahead_s = sys.argv[1:]
lease.Lease = functools.partial(lease.Lease, beat_s=0.2)
socket.gethostname = lambda: host
time.time = lambda now=time.time: now() + float(ahead_s)
recordings = open_prepared(FolderStorage(Path(data)), prefix)
print("ready", flush=True)
sys.stdin.readline()
watch, trials = lease.Watch(expiry_s=5), map(from_json, json.loads(specs))
work_through(trials, recordings, FolderStorage(Path(storage)), sweep_id=sweep, held_s=0.1, watch=watch)
"""


def drivers(
    specs, tiny_data: Recordings, storage: Storage, hosts: Sequence[str], ahead_s: Sequence[float]
) -> list[subprocess.Popen]:
    """Processes that work through the same trials, all of them started at one moment.

    Each takes itself to be on the machine `hosts` says, whose clock is `ahead_s` fast.
    """
    arguments = [json.dumps([to_json(spec) for spec in specs]), str(tiny_data._storage.root)]
    arguments += [tiny_data.prepared.prefix, str(storage.root)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DRIVER, *arguments, f"sweep-{number}", host, str(ahead)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number, (host, ahead) in enumerate(zip(hosts, ahead_s, strict=True))
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return processes


@pytest.mark.parametrize(
    ("other", "ahead_s", "killed"),
    [("here", 0.0, False), ("here", 3600.0, True), ("there", 3600.0, False), ("there", -3600.0, True)],
)
def test_two_sweeps_at_once_share_the_trials_and_train_none_twice(
    other, ahead_s, killed, tiny_spec, tiny_data, storage
):
    """On one machine or on two, whose clocks may be an hour apart."""
    specs = [replace(tiny_spec, seed=seed) for seed in range(4)]
    processes = drivers(specs, tiny_data, storage, ["here", other], [0.0, ahead_s])
    try:
        if killed:
            time.sleep(1.0)
            processes[0].kill()
        for process in processes[killed:]:
            assert process.wait(timeout=120) == 0
    finally:
        for process in processes:
            process.kill()
    names = [trial_id(spec, tiny_data.manifest_sha256) for spec in specs]
    states = [read(storage, name, now=1e12) for name in names]
    assert [state.status for state in states] == ["done"] * 4
    ended = [[attempt["outcome"] for attempt in state.attempts] for state in states]
    assert all(outcomes.count("done") == 1 for outcomes in ended)
    if not killed:
        assert ended == [["done"]] * 4
        assert len({attempt["sweep_id"] for state in states for attempt in state.attempts}) == 2, "both had work"


def test_the_order_of_attempts_is_that_of_their_leases_whatever_clocks_say(attempt, monkeypatch):
    """Each attempt is made by a machine whose clock is an hour behind that of the one before."""
    clock = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(worker, "time", SimpleNamespace(time=lambda: float(next(clock)), sleep=time.sleep))
    done, state, calls = attempt(*[MemoryError() for _ in range(3)])
    assert (done, calls) == ("done", 4)
    assert [record["micro_batch"] for record in state.attempts] == [24, 12, 6, 3]
    assert [record["lease"] for record in state.attempts] == [1, 2, 3, 4]
    assert state.attempts[0]["started"] > state.attempts[3]["started"]


def test_a_small_set_lives_on_the_gpu_and_a_large_one_does_not(tiny_data, monkeypatch):
    size = sum(shard["bytes"] for shard in tiny_data.manifest["shards"])
    assert worker.data_placement(tiny_data, "cpu") == "host"
    for times, share, wanted in ((30, 1.0, "device"), (10, 1.0, "host"), (30, 0.25, "host"), (100, 0.25, "device")):
        gpu = SimpleNamespace(total_memory=times * size, name="NVIDIA L40S")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, gpu=gpu: gpu)
        # What torch does with the device before it asks the driver is torch's own here.
        monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch._C, "_cuda_getMemoryFraction", lambda _, share=share: share, raising=False)
        assert worker.data_placement(tiny_data, "cuda") == wanted
        facts = {"device_name": "NVIDIA L40S", "device_bytes": int(share * times * size)}
        assert worker.device_facts("cuda") == facts
    assert worker.device_facts("cpu") == {}


class Trainer:
    """Stands for Ray's: each `fit` ends with the next of `errors`, after a checkpoint of the trial if it moves."""

    def __init__(self, storage: Storage, name: str, *errors: Exception, moves: bool):
        self.storage, self.name, self.errors, self.moves, self.fits = storage, name, list(errors), moves, 0

    def fit(self) -> None:
        self.fits += 1
        if self.moves:
            key = f"trials/{self.name}/checkpoints/step-{10 * self.fits:08d}/manifest.json"
            self.storage.put_json(key, {})
        if self.errors:
            raise self.errors.pop(0)


@pytest.mark.parametrize("moves", [True, False])
def test_ray_s_count_of_lost_machines_starts_anew_while_a_trial_moves_forward(moves, storage, monkeypatch):
    spent = [ray.train.TrainingFailedError("8 workers were lost") for _ in range(2)]
    trainer = Trainer(storage, "0123456789abcdef", *spent, moves=moves)
    monkeypatch.setattr(worker, "_trainer", lambda _where, _pack: trainer)
    for name in ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"):
        monkeypatch.setenv(name, "1")  # set by drive, put back here
    storage.put_json("pack.json", {"trial_ids": ["0123456789abcdef"]})
    pack = {"storage": repr(storage), "key": "pack.json"}
    if moves:
        worker.drive({"pack": pack})
        assert trainer.fits == 3
    else:
        with pytest.raises(ray.train.TrainingFailedError):
            worker.drive({"pack": pack})
        assert trainer.fits == 1


#: How long the storage fails, and how long in each way (a minute, 5 s each, was tried by hand: it takes longer). It
#: goes on, for so many times as long at most, until a request has met each way: a client that was refused waits.
OUTAGE_S, EACH_S, LATEST = 10.0, 1.0, 4


@pytest.mark.service
def test_storage_that_fails_in_every_way_for_a_while_of_training_costs_nothing(
    s3_address: str, fault_proxy: FaultProxy, tiny_spec, tiny_data: Recordings, storage: Storage
):
    """Every request is refused, cut or answered with half a body; the one attempt trains on and ends as undisturbed."""
    spec = with_training(tiny_spec, epochs=60)
    assert run_trial(spec, tiny_data, storage, sweep_id="s1") == "done"
    name, bucket = trial_id(spec, tiny_data.manifest_sha256), open_storage(s3_address)
    kinds = ("status", "reset", "lost_reset", "truncate", "lost")
    steps: list[float] = []
    seen = dict.fromkeys(kinds, 0)
    outage: list[float] = []

    def fail() -> None:
        outage.append(time.monotonic())
        while time.monotonic() < outage[0] + OUTAGE_S * (1 if all(seen.values()) else LATEST):
            kind = min(kinds, key=lambda one: seen[one])
            fault_proxy.clear()
            fault = fault_proxy.add(Fault(kind=kind, bytes=10))
            time.sleep(EACH_S)
            seen[kind] += fault.seen
        fault_proxy.clear()
        outage.append(time.monotonic())

    failing = threading.Thread(target=fail)

    def count() -> bool:
        steps.append(time.monotonic())
        return False

    def on_epoch(row: dict) -> None:
        if not outage and not failing.is_alive():
            failing.start()

    outcome = run_trial(spec, tiny_data, bucket, sweep_id="s1", notices=count, on_epoch=on_epoch)
    failing.join()
    assert outcome == "done"
    assert compare(storage, bucket, name)["verdict"] == BIT_EXACT
    assert sum(outage[0] < step < outage[1] for step in steps) > 20, "training did not go on"
    assert all(seen.values()), seen
    assert len(read(bucket, name, now=time.time()).attempts) == 1


def test_the_specs_of_a_pack_are_those_that_were_put_into_it():
    trials = expand(load_grid("demo"), folds=[1, 2], seeds=[0, 3])
    values = [json.loads(json.dumps(to_json(trial.spec))) for trial in trials]
    assert worker._specs(values) == [from_json(value) for value in values] == [trial.spec for trial in trials]


def test_a_sweep_that_is_asked_to_stop_saves_its_trial_and_begins_no_other(tiny_spec, tiny_data, storage, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.01)
    monkeypatch.setattr(lease.Lease.__init__, "__kwdefaults__", lease.Lease.__init__.__kwdefaults__ | {"beat_s": 0.01})
    spec = replace(tiny_spec, training=replace(tiny_spec.training, epochs=400))
    stopping = threading.Timer(1.0, lambda: stop.ask(storage, "s1", "the time is over"))
    stopping.start()
    work_through([spec, replace(spec, seed=1)], tiny_data, storage, sweep_id="s1")
    stopping.join()
    (name,) = storage.children("trials")
    state = read(storage, name, now=1e12)
    (record,) = state.attempts
    assert (state.status, record["outcome"]) == ("partial", "stopped")
    assert 0 < record["step"] == record["kept_step"] < 1200
    assert run_trial(spec, tiny_data, storage, sweep_id="s1") == "stopped"  # and nothing more is begun for it
    assert len(read(storage, name, now=1e12).attempts) == 1


def test_a_lost_attempt_is_closed_with_what_was_kept_of_its_steps(attempt, storage):
    with pytest.raises(SystemExit):
        attempt(SystemExit(9))
    (name,) = storage.children("trials")
    (record,) = read(storage, name, now=1e12).attempts
    beat = {"attempt_id": record["attempt_id"], "step": 7, "time": record["started"] + 5, "beat": 3}
    storage.put_json(f"trials/{name}/heartbeat.json", beat)
    assert attempt()[0] == "done"
    lost = read(storage, name, now=1e12).attempts[0]
    assert (lost["outcome"], lost["step"], lost["kept_step"]) == ("lost", 7, 0)
    assert lost["ended"] == record["started"] + 5


#: Two ranks, forked: the first works through two trials, the other follows. "what" happens on the second one.
GROUP = """
import functools, json, os, sys, time
from datetime import timedelta
from pathlib import Path
import torch
from torch import distributed
from helix.data.shards import open_prepared
from helix.spec import from_json
from helix.storage import FolderStorage
from helix.training import trainer
from helix.training.ranks import RankLostError, Ranks
from helix.training.trainer import Fit
from orchestration import lease, worker

specs, data, prefix, storage, meeting, what = sys.argv[1:]
torch.set_num_threads(1)
child = os.fork()
rank = 0 if child else 1
distributed.init_process_group(
    "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=100)
)
steps, real_step = [], trainer.train_step

def step(*arguments, **options):
    steps.append(arguments[-1])
    if rank == 1 and what == "memory" and options["micro_batch"] > 4:
        raise MemoryError("no room")
    if rank == 1 and len(steps) == 5 and what == "die":
        os._exit(9)
    if rank == 1 and len(steps) == 5 and what == "hang":
        time.sleep(100)
    if rank == 0 and len(steps) == 5 and what == "taken over":
        raise lease.LeaseLostError("0123456789abcdef", 7)
    return real_step(*arguments, **options)

trainer.train_step = step
if what == "hang":
    lease.Lease = functools.partial(lease.Lease, stall_s=3.0)
    lease.STALL_STEPS = 1
recordings, storage = open_prepared(FolderStorage(Path(data)), prefix), FolderStorage(Path(storage))
specs, ranks, reported = [from_json(spec) for spec in json.loads(specs)], Ranks(rank, 2), []
report = lambda number, row: reported.append((number, row["epoch"]))
try:
    with ranks.together():
        if rank == 0:
            worker.work_through(specs, recordings, storage, sweep_id="s", report=report, ranks=ranks, held_s=0.1)
        else:
            worker.follow(specs, recordings, Fit(storage=storage, ranks=ranks), report=report)
    said = "done"
except RankLostError:
    said = "lost"
Path(f"{meeting}-{rank}").write_text(json.dumps([said, reported]))
os._exit(0)
"""


@pytest.fixture
def group(tiny_spec, tiny_data: Recordings, storage: Storage, tmp_path: Path):
    """Runs two trials on two ranks while `what` happens; returns what each rank said, states, and the exit code."""
    specs = [with_training(replace(tiny_spec, seed=seed), epochs=2) for seed in (0, 1)]

    def run(what: str):
        meeting = tmp_path / f"meeting-{what.replace(' ', '-')}"
        arguments = [json.dumps([to_json(spec) for spec in specs]), str(tiny_data._storage.root)]
        arguments += [tiny_data.prepared.prefix, str(storage.root), str(meeting), what]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-c", GROUP, *arguments]
        ended = subprocess.run(command, cwd=ROOT, env=environment, timeout=120, check=False)
        said = [Path(f"{meeting}-{rank}") for rank in (0, 1)]
        names = [trial_id(spec, tiny_data.manifest_sha256) for spec in specs]
        states = [read(storage, name, now=1e12) for name in names]
        return [json.loads(path.read_text()) for path in said if path.exists()], states, ended.returncode

    return run


def test_ranks_go_from_attempt_to_attempt_together_and_the_first_one_alone_records(group):
    """The second rank has room for a micro-batch of four: both go on in smaller parts, and then with the next trial."""
    said, states, _ = group("memory")
    everything = [[0, 1], [0, 2], [1, 1], [1, 2]]
    assert said == [["done", everything], ["done", everything]]
    assert [state.status for state in states] == ["done", "done"]
    for state in states:
        assert [attempt["micro_batch"] for attempt in state.attempts] == [12, 6, 3]
        assert [attempt["outcome"] for attempt in state.attempts] == ["failed", "failed", "done"]
        assert {attempt["error_kind"] for attempt in state.attempts[:2]} == {"OutOfMemory"}
        assert "on rank 1" in state.attempts[0]["traceback"]
        assert {attempt["ranks"] for attempt in state.attempts} == {2} and state.result["ranks"] == 2


def test_a_rank_that_dies_is_a_loss_and_no_failure(group):
    said, states, _ = group("die")
    assert [one[0] for one in said] == ["lost"]
    (attempt,) = states[0].attempts
    assert (attempt["outcome"], attempt["step"]) == ("lost", 4) and "RankLostError" in attempt["error"]
    said, states, _ = group("nothing")
    assert [state.status for state in states] == ["done", "done"]


def test_a_rank_that_hangs_is_found_by_the_watch_over_the_steps(group):
    _, states, code = group("hang")
    assert code == worker.HUNG
    assert states[0].attempts[0]["outcome"] == "lost" and "hung: no step" in states[0].attempts[0]["error"]


def test_a_trial_that_is_taken_over_is_left_by_all_ranks(group):
    said, states, _ = group("taken over")
    assert [one[0] for one in said] == ["done", "done"]
    assert states[0].attempts[0]["outcome"] == "lost"
    assert [state.status for state in states] == ["done", "done"], "it came free again"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_trial_on_several_gpus_asks_one_machine_for_all_of_them_and_pays_for_all(ranks):
    pack = {"threads": 3, "gpu": True, "gpus": 1.0, "ranks": ranks}
    assert worker.rank_resources(pack) == {"CPU": 3, "GPU": 1.0}
    need = worker.worker_resources(pack)
    machine = {"CPU": 48.0, "GPU": 4.0}
    assert Pool(name="g5.12xlarge", resources=machine).workers(need) == 4 // ranks
    facts = machine_facts(held=need, resources=machine, environment={})
    assert (facts["gpus"], facts["share"]) == (ranks, ranks / 4)
