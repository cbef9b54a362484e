"""A pack of trials on Ray: its driver inside Ray Tune, its Ray Train worker, and the attempts that the worker makes."""

import os
import socket
import time
import traceback
import uuid
from collections.abc import Callable
from typing import Any

import ray.train
import torch
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from helix.data.shards import Recordings, open_prepared
from helix.spec import TrialSpec, from_json, trial_id
from helix.storage import Storage, open_storage
from helix.training.checkpoint import committed
from helix.training.memory import compact_large_blocks
from helix.training.trainer import Fit, fit, trial_folder
from orchestration.connection import POLL_S
from orchestration.ledger import is_done
from orchestration.recovery import Budget, Ended, decide, kind

#: A heartbeat this often is enough for people to see steps pass, and little enough for object storage.
HEARTBEAT_S = 2.0

SAVE_EVERY_S = 120.0


def drive(config: dict[str, Any]) -> None:
    """What Ray Tune runs for one pack: it starts the pack's Ray Train worker and waits for it.

    Ray's own state lives in `scratch` and is not needed again: the worker continues from our checkpoints, and how often
    a trial is tried is decided by orchestration/recovery.py, so Ray's count only has to be out of the way.
    """
    pack = config["pack"]
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = POLL_S
    TorchTrainer(
        run_pack,
        train_loop_config=pack,
        scaling_config=ray.train.ScalingConfig(
            num_workers=1, use_gpu=pack["gpu"], resources_per_worker=worker_resources(pack)
        ),
        run_config=ray.train.RunConfig(
            name=f"pack-{uuid.uuid4().hex[:8]}",
            storage_path=pack["scratch"],
            callbacks=[TuneReportCallback()],
            failure_config=ray.train.FailureConfig(max_failures=8 * len(pack["specs"])),
        ),
    ).fit()


def worker_resources(pack: dict[str, Any]) -> dict[str, float]:
    """What one worker asks Ray for."""
    return {"CPU": pack["threads"], **({"GPU": 1} if pack["gpu"] else {})}


def run_pack(config: dict[str, Any]) -> None:
    """What a Ray Train worker runs: the trials of `config["specs"]` in turn, those that are done passed over.

    One trial's failure is recorded with the trial and does not keep the next from running. Errors of the storage
    itself leave this function, since nothing could be recorded; Ray Train then restarts the worker.
    """
    storage = open_storage(config["storage"])
    torch.set_num_threads(config["threads"])
    device = "cuda" if config["gpu"] else "cpu"
    recordings = open_prepared(storage, config["data"])
    for number, (value, placement) in enumerate(zip(config["specs"], config["placements"], strict=True)):
        spec = from_json(value)

        def report(row: dict[str, Any], number: int = number) -> None:
            ray.train.report({"trial": number, "epoch": row["epoch"], "test_accuracy": row["test_accuracy"]})

        if placement["compact"]:
            compact_large_blocks()
        run_trial(
            spec,
            recordings,
            storage,
            sweep_id=config["sweep_id"],
            device=device,
            micro_batch=placement["micro_batch"],
            recompute=placement["recompute"],
            on_epoch=report,
        )


def run_trial(
    spec: TrialSpec,
    recordings: Recordings,
    storage: Storage,
    *,
    sweep_id: str,
    device: str = "cpu",
    micro_batch: int | None = None,
    recompute: bool = False,
    on_epoch: Callable[[dict[str, Any]], None] = lambda _row: None,
    budget: Budget | None = None,
) -> bool:
    """Attempt a trial until it is done or its budget is spent; True when its result is stored."""
    name = trial_id(spec, recordings.manifest_sha256)
    _close_lost(storage, name)
    while not is_done(storage, name):
        history = _history(storage, name, sweep_id)
        decision = decide(history, budget or Budget())
        if decision.action == "stop":
            _give_up(storage, name, sweep_id, decision.reason)
            return False
        attempt = Attempt(storage, name, sweep_id=sweep_id, device=device)
        how = Fit(
            storage=storage,
            device=device,
            micro_batch=micro_batch,
            recompute=recompute,
            save_every_s=SAVE_EVERY_S,
            on_step=attempt.beat,
            on_epoch=on_epoch,
        )
        try:
            fit(spec, recordings, how)
        except Exception as error:  # whatever it is, it is this trial's: recorded, judged by decide(), never swallowed
            attempt.end("failed", error)
        else:
            attempt.end("done")
    return True


class Attempt:
    """The record of one process working on one trial, and its heartbeat."""

    def __init__(self, storage: Storage, name: str, *, sweep_id: str, device: str):
        now = time.time()
        self.storage, self.folder, self.beaten = storage, trial_folder(name), 0.0
        self.record: dict[str, Any] = {
            "attempt_id": f"{int(now * 1000):014d}-{uuid.uuid4().hex[:8]}",
            "sweep_id": sweep_id,
            "started": now,
            "from_step": _newest_step(storage, name),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "device": device,
            "threads": torch.get_num_threads(),
        }
        self._put()

    def beat(self, total_step: int) -> None:
        """Say that `total_step` is finished, at most every HEARTBEAT_S."""
        now = time.time()
        if now - self.beaten >= HEARTBEAT_S:
            self.beaten = now
            heartbeat = {"attempt_id": self.record["attempt_id"], "step": total_step, "time": now}
            self.storage.put_json(f"{self.folder}/heartbeat.json", heartbeat)

    def end(self, outcome: str, error: Exception | None = None) -> None:
        """Record how the attempt ended."""
        self.record |= {"ended": time.time(), "outcome": outcome}
        if error is not None:
            self.record |= {
                "error_kind": kind(error),
                "error": f"{type(error).__name__}: {error}",
                "traceback": "".join(traceback.format_exception(error))[-8000:],
            }
        self._put()

    def _put(self) -> None:
        self.storage.put_json(f"{self.folder}/attempts/{self.record['attempt_id']}.json", self.record)


def _attempts(storage: Storage, name: str, sweep_id: str) -> list[dict[str, Any]]:
    """The attempts of one sweep at one trial, oldest first."""
    keys = storage.keys(f"{trial_folder(name)}/attempts")
    records = [storage.get_json(key) for key in keys]
    return [record for record in records if record["sweep_id"] == sweep_id]


def _close_lost(storage: Storage, name: str) -> None:
    """Write down the end of attempts that ended without a word: their last heartbeat is the last that is known."""
    heartbeat = storage.get_json(f"{trial_folder(name)}/heartbeat.json") or {}
    for key in storage.keys(f"{trial_folder(name)}/attempts"):
        record = storage.get_json(key)
        if "ended" not in record:
            heard = heartbeat.get("time") if heartbeat.get("attempt_id") == record["attempt_id"] else None
            storage.put_json(key, record | {"ended": heard or record["started"], "outcome": "lost"})


def _history(storage: Storage, name: str, sweep_id: str) -> list[Ended]:
    """How the earlier attempts of this sweep ended; a lost one has no error."""
    return [
        Ended(error=record.get("error_kind"), step=record["from_step"]) for record in _attempts(storage, name, sweep_id)
    ]


def _give_up(storage: Storage, name: str, sweep_id: str, reason: str) -> None:
    """Record with the last attempt why the trial is not tried again in this sweep."""
    record = _attempts(storage, name, sweep_id)[-1]
    error = record.get("error", "its process was lost")
    record |= {"ended": record.get("ended", time.time()), "outcome": "failed", "error": f"{error} (stopped: {reason})"}
    storage.put_json(f"{trial_folder(name)}/attempts/{record['attempt_id']}.json", record)


def _newest_step(storage: Storage, name: str) -> int:
    """The optimiser step of the newest committed checkpoint, 0 where there is none."""
    folders = committed(storage, f"{trial_folder(name)}/checkpoints")
    return int(folders[-1].removeprefix("step-")) if folders else 0
