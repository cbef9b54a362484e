"""A pack of trials on Ray: its driver inside Ray Tune, its Ray Train worker, and the attempts that the worker makes.

With several ranks the worker is a group of processes on one machine (helix/training/ranks.py). The first rank is the
worker: leases, attempts and all that is stored are its own. The others follow it from attempt to attempt.
"""

import contextlib
import json
import logging
import os
import re
import socket
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import psutil
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.tune.integration.ray_train import TuneReportCallback

from helix.data.shards import Recordings, open_prepared
from helix.determinism import ask_for_the_same_bits
from helix.process import forget_peak, peak_bytes
from helix.spec import TrialSpec, from_json, trial_id
from helix.storage import Storage, open_storage
from helix.training.checkpoint import committed
from helix.training.memory import compact_large_blocks
from helix.training.ranks import BACKENDS, RankLostError, Ranks
from helix.training.trainer import Fit, StoppedError, fit, trial_folder
from orchestration.connection import POLL_S, this_machine
from orchestration.lease import FIRST_STEP_S, LeaseLostError, Watch, acquire
from orchestration.ledger import ATTEMPT_KEY, attempts_at, heartbeat_of, is_done
from orchestration.lineage import code_like
from orchestration.meter import Meter
from orchestration.metrics import TrialMetrics
from orchestration.notices import Notices, sigterm_notice
from orchestration.records import ATTEMPT, checked
from orchestration.recovery import UNWRITABLE, Budget, Ended, decide, is_loss, kind, mean_between_losses_s, smaller
from orchestration.stop import asked

logger = logging.getLogger(__name__)

#: The most seconds between checkpoints.
SAVE_EVERY_S = 600.0

#: The part of its GPU's memory, or of its share of that, that a data set may take: little enough for the prediction of
#: a step to leave it out.
DEVICE_SHARE = 0.05

#: Seconds between two looks at trials that other sweeps work on.
HELD_S = 5.0

#: The exit code of a process that ended itself because its training hung.
HUNG = 75


def drive(config: dict[str, Any]) -> None:
    """What Ray Tune runs for one pack: it starts the pack's Ray Train worker and waits for it.

    A pack is read from the storage: Tune walks and copies what it is given again and again, for minutes where that is a
    thousand specs.

    Ray's own state lives in `scratch` and is not needed again: the worker continues from our checkpoints, and how often
    a trial is tried is decided by orchestration/recovery.py, so Ray's count only has to be out of the way: it charges a
    machine that went without notice like a failure, and starts anew as long as a trial of the pack has moved forward.
    The death of Train's controller ends this process too, with whatever it held, and Tune starts another one.
    """
    where = config["pack"]
    pack = read_pack(where)
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = POLL_S
    os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "1"
    storage = open_storage(where["storage"])
    while True:
        before = _progress(storage, pack["trial_ids"])
        try:
            _trainer(where, pack).fit()
            return
        except ray.train.TrainingFailedError as error:
            if _progress(storage, pack["trial_ids"]) == before:
                raise
            logger.warning("the pack's trainer ended (%s); its trials moved forward, so another one starts", error)


def _progress(storage: Storage, names: Sequence[str]) -> list[tuple[bool, int]]:
    """How far trials are: whether each is done, and its newest committed step."""
    return [(is_done(storage, name), _newest_step(storage, name)) for name in names]


def _trainer(where: dict[str, Any], pack: dict[str, Any]) -> TorchTrainer:
    """The Ray Train run of a pack, which its worker reads again from `where` it is."""
    # A rank that waits for another one is not lost before the watch over the steps has had its say.
    backend = TorchConfig(backend=BACKENDS["cuda" if pack["gpu"] else "cpu"], timeout_s=int(2 * FIRST_STEP_S))
    return TorchTrainer(
        run_pack,
        train_loop_config=where,
        torch_config=backend if pack["ranks"] > 1 else None,
        scaling_config=ray.train.ScalingConfig(
            num_workers=pack["ranks"],
            use_gpu=pack["gpu"],
            resources_per_worker=rank_resources(pack),
            placement_strategy="STRICT_PACK" if pack["ranks"] > 1 else "PACK",
        ),
        run_config=ray.train.RunConfig(
            name=f"pack-{uuid.uuid4().hex[:8]}",
            storage_path=pack["scratch"],
            callbacks=[TuneReportCallback()],
            failure_config=ray.train.FailureConfig(max_failures=8 * len(pack["specs"])),
        ),
    )


def read_pack(where: dict[str, Any]) -> dict[str, Any]:
    """The pack that `orchestration.sweep.train` put under `where["key"]`."""
    return open_storage(where["storage"]).get_json(where["key"])


def rank_resources(pack: dict[str, Any]) -> dict[str, float]:
    """What one rank of a worker asks Ray for."""
    return {"CPU": pack["threads"], **({"GPU": pack["gpus"]} if pack["gpu"] else {})}


def worker_resources(pack: dict[str, Any]) -> dict[str, float]:
    """What one worker asks Ray for, all its ranks together: one machine has to hold it."""
    return {name: pack["ranks"] * many for name, many in rank_resources(pack).items()}


def run_pack(where: dict[str, Any]) -> None:
    """What each rank of a Ray Train worker runs: the trials of a pack.

    `where`: the pack's storage, its key, and what stands in for `fit`.

    Errors of the storage itself leave this function, since nothing could be recorded; Ray Train then restarts the
    worker.
    """
    storage, config = open_storage(where["storage"]), read_pack(where)
    if config["deterministic"]:  # before anything starts CUDA
        ask_for_the_same_bits()
    torch.set_num_threads(config["threads"])

    def report(number: int, row: dict[str, Any]) -> None:
        ray.train.report({"trial": number, "epoch": row["epoch"], "test_accuracy": row["test_accuracy"]})

    if config["gpu"] and config["gpus"] < 1:  # beside others on one GPU: none takes what is another's
        torch.cuda.set_per_process_memory_fraction(config["gpus"])
    placements, labels = config["placements"], config["labels"]

    def metrics(number: int, spec: TrialSpec) -> TrialMetrics:
        if config["gpu"]:  # the peak of this trial, not of those before it
            torch.cuda.reset_peak_memory_stats()
        predicted = placements[number]["peak_bytes"]
        used = partial(memory_used, "cuda" if config["gpu"] else "cpu")
        return TrialMetrics(labels[number], batch_size=spec.training.batch_size, predicted_bytes=predicted, used=used)

    if any(placement["compact"] for placement in placements):
        compact_large_blocks()
    ranks = Ranks(ray.train.get_context().get_world_rank(), config["ranks"])
    device = "cuda" if config["gpu"] else "cpu"
    if config["gpu"] and ranks.count > 1:  # they see each other's GPUs
        device = str(get_device())
    # What several ranks ask together they have to ask at the same steps, so by one clock.
    clock = time.monotonic if ranks.count == 1 else lambda: ranks.now
    notices = Notices([partial(ray_notice, ranks), sigterm_notice()], clock=clock)
    specs = _specs(config["specs"])
    with ranks.together():
        recordings = open_prepared(storage, config["data"])
        if not ranks.first:
            how = Fit(storage=storage, device=device, save_now=notices, ranks=ranks)
            follow(specs, recordings, how, report=report, trainer=where["trainer"])
            return
        work_through(
            specs,
            recordings,
            storage,
            sweep_id=config["sweep_id"],
            device=device,
            parts=[(placement["micro_batch"], placement["recompute"]) for placement in placements],
            report=report,
            notices=notices,
            machine=this_machine(worker_resources(config)),
            driver_code=config.get("code"),
            trainer=where["trainer"],
            ranks=ranks,
            metrics=metrics,
        )


@dataclass(frozen=True, kw_only=True)
class RankOrder:
    """What the first rank tells the others to do next: an attempt at a trial in these parts, or nothing for now."""

    spec: TrialSpec | None = None
    micro_batch: int | None = None
    recompute: bool = False


def follow(
    specs: Sequence[TrialSpec],
    recordings: Recordings,
    how: Fit,
    *,
    report: Callable[[int, dict[str, Any]], None] = lambda _number, _row: None,
    trainer: Callable[..., Any] | None = None,
) -> None:
    """What every rank but the first runs: its part of each attempt, until there are no more.

    How an attempt ended is the first rank's to judge; it ends for the same reason on all of them. `how`: what of it no
    order says. Raises RankLostError.
    """
    while True:
        order: RankOrder | None = how.ranks.share(_nothing)
        if order is None:
            return
        if order.spec is None:
            continue
        parts = {"micro_batch": order.micro_batch, "recompute": order.recompute}
        place = {"placement": data_placement(recordings, how.device)}
        told = partial(report, specs.index(order.spec))
        try:
            (trainer or fit)(order.spec, recordings, replace(how, **parts, **place, on_epoch=told))
        except RankLostError:
            raise
        except Exception as error:
            logger.info("an attempt ended: %s", error)


def _nothing() -> None:
    """The order that ends a following."""


def _specs(values: Sequence[dict[str, Any]]) -> list[TrialSpec]:
    """`from_json` of each; checked once for those that differ in nothing but fold and seed."""
    checked: dict[str, TrialSpec] = {}
    specs = []
    for value in values:
        fold, seed = value["data"]["fold"], value["seed"]
        key = json.dumps({**value, "data": {**value["data"], "fold": 0}, "seed": 0}, sort_keys=True)
        if key not in checked:
            checked[key] = from_json(value)
        spec = checked[key]
        specs.append(replace(spec, data=replace(spec.data, fold=fold), seed=seed))
    return specs


def work_through(
    specs: Sequence[TrialSpec],
    recordings: Recordings,
    storage: Storage,
    *,
    sweep_id: str,
    device: str = "cpu",
    parts: Sequence[tuple[int | None, bool]] = (),
    report: Callable[[int, dict[str, Any]], None] = lambda _number, _row: None,
    notices: Callable[[], bool] = lambda: False,
    held_s: float = HELD_S,
    watch: Watch | None = None,
    machine: Mapping[str, Any] | None = None,
    driver_code: Mapping[str, Any] | None = None,
    trainer: Callable[..., Any] | None = None,
    ranks: Ranks | None = None,
    metrics: Callable[[int, TrialSpec], TrialMetrics] | None = None,
) -> None:
    """Run trials in turn until each is done or has failed, here or elsewhere; those that are done are passed over.

    One trial's failure is recorded with the trial and does not keep the next from running. A trial that another sweep
    works on is left to it, and looked at again until it is done or free. `parts`: of each trial the micro-batch, and
    whether its blocks are recomputed. `ranks`: this process as the first of those that train each trial together; the
    others `follow` it.
    """
    watch, ranks = watch or Watch(), ranks or Ranks()
    todo, waiting = deque(enumerate(specs)), 0
    while todo:
        number, spec = todo.popleft()
        outcome = run_trial(
            spec,
            recordings,
            storage,
            sweep_id=sweep_id,
            device=device,
            parts=parts[number] if parts else (None, False),
            on_epoch=partial(report, number),
            watch=watch,
            notices=notices,
            machine=machine,
            driver_code=driver_code,
            trainer=trainer,
            ranks=ranks,
            metrics=None if metrics is None else metrics(number, spec),
        )
        if outcome == "stopped":
            break
        if outcome != "held":
            waiting = 0
            continue
        todo.append((number, spec))
        waiting += 1
        if waiting >= len(todo):  # all that is left is in other hands
            waiting = 0
            ranks.share(RankOrder)  # that this one is still there
            time.sleep(held_s)
    ranks.share(_nothing)


def data_placement(recordings: Recordings, device: str) -> Literal["host", "device"]:
    """Where batches are gathered: on a GPU from the whole set held there, if that is a small part of its memory."""
    if torch.device(device).type != "cuda":
        return "host"
    size = sum(shard["bytes"] for shard in recordings.manifest["shards"])
    return "device" if size <= DEVICE_SHARE * device_facts(device)["device_bytes"] else "host"


def device_facts(device: str) -> dict[str, Any]:
    """The name of the GPU that this process trains on and the bytes of it that it may take; nothing of a CPU."""
    if torch.device(device).type != "cuda":
        return {}
    # By its number, or None for the current one: that function takes no "cuda" without a number.
    part = torch.cuda.get_per_process_memory_fraction(torch.device(device).index)
    properties = torch.cuda.get_device_properties(device)
    return {"device_name": properties.name, "device_bytes": int(part * properties.total_memory)}


def each(*listeners: Callable[[Any], None]) -> Callable[[Any], None]:
    """What tells all of these listeners, in turn."""

    def tell(said: Any) -> None:
        for listener in listeners:
            listener(said)

    return tell


def memory_used(device: str) -> int:
    """On a GPU the peak of what tensors took, on a CPU what the process holds, in bytes."""
    return torch.cuda.max_memory_allocated() if device != "cpu" else psutil.Process().memory_info().rss


def gpu_uuids(device: str) -> tuple[str, ...]:
    """The NVIDIA driver's name of the GPU that this process trains on; none where it trains on a CPU."""
    return (f"GPU-{torch.cuda.get_device_properties(device).uuid}",) if device != "cpu" else ()


def ray_notice(ranks: Ranks) -> Any:
    """What Ray knows of the end of this node, None while it knows of none."""
    ranks.agree()  # Ray makes the ranks wait for each other, also for one that failed and will not come
    return ray.train.get_preemption_info()


def run_trial(
    spec: TrialSpec,
    recordings: Recordings,
    storage: Storage,
    *,
    sweep_id: str,
    device: str = "cpu",
    parts: tuple[int | None, bool] = (None, False),
    on_epoch: Callable[[dict[str, Any]], None] = lambda _row: None,
    budget: Budget | None = None,
    watch: Watch | None = None,
    notices: Callable[[], bool] = lambda: False,
    machine: Mapping[str, Any] | None = None,
    driver_code: Mapping[str, Any] | None = None,
    trainer: Callable[..., Any] | None = None,
    ranks: Ranks | None = None,
    metrics: TrialMetrics | None = None,
) -> Literal["done", "failed", "held", "stopped"]:
    """Attempt a trial until its result is stored or its budget is spent.

    "held" where another process works on it, "stopped" where the sweep was asked to stop. `machine`: what the attempts
    record of what they run on, `driver_code` the facts of the code that sent the work. `trainer`: what stands in for
    `fit`. `ranks` as in `work_through`. Raises what `fit` raises where that says that this process is cut off, from Ray
    or (RankLostError: all of them start anew) from the other ranks; the trial is free for another one then.
    """
    ranks = ranks or Ranks()
    name = trial_id(spec, recordings.manifest_sha256)
    while not is_done(storage, name):
        if asked(storage, sweep_id) is not None:
            return "stopped"
        facts = {**(machine or {}), "ranks": ranks.count}
        kind_of_device = torch.device(device).type
        facts |= device_facts(device)
        attempt = Attempt(name, sweep_id=sweep_id, device=kind_of_device, machine=facts, driver_code=driver_code)
        lease = acquire(
            storage,
            name,
            attempt_id=attempt.id,
            sweep_id=sweep_id,
            watch=watch or Watch(),
            stalled=lambda seconds, attempt=attempt: attempt.hang(storage, seconds),
        )
        if lease is None:
            return "held"
        heartbeat = heartbeat_of(storage, name)  # before this attempt's first one
        with lease:
            _close_lost(storage, name, heartbeat)
            records = attempts_at(storage, name)
            own = [one for one in records if one["sweep_id"] == sweep_id and one["outcome"] != "stopped"]
            # A disk that takes no more ends the worker each time, and Ray's count of those the sweep, not the trial.
            judged = [_ended(record) for record in own if record.get("error_kind") != UNWRITABLE]
            decision = decide(judged, budget or Budget())
            if decision.action == "stop":
                _give_up(storage, name, own[-1], decision.reason)
                return "failed"
            most = ranks.largest_part(spec.training.batch_size)
            micro_batch, recompute = _parts(own, parts[0] or most, parts[1], shrink=decision.action == "shrink")
            attempt.begin(storage, lease=lease.number, micro_batch=micro_batch, recompute=recompute)
            meter = Meter(gpus=gpu_uuids(device))
            how = Fit(
                storage=storage,
                device=device,
                micro_batch=micro_batch,
                recompute=recompute,
                placement=data_placement(recordings, device),
                save_every_s=SAVE_EVERY_S,
                between_losses_s=mean_between_losses_s(records, now=time.time()),
                save_now=notices,
                stop_now=lambda lease=lease: lease.stop_asked,
                on_step=each(lease.moved, *([metrics.on_step] if metrics else [])),
                on_epoch=each(on_epoch, *([metrics.on_epoch] if metrics else [])),
                on_save=metrics.on_save if metrics else lambda _hold_s, _write_s: None,
                measured=meter.take,
                ranks=ranks,
            )
            order = RankOrder(spec=spec, micro_batch=micro_batch, recompute=recompute)
            try:
                ranks.share(lambda order=order: order)
                attempt.measure(device)
                with meter:
                    (trainer or fit)(spec, recordings, how)
            except LeaseLostError as error:
                attempt.end(storage, "lost", error, step=lease.step)
                return "held"
            except StoppedError as stopped:
                attempt.end(storage, "stopped", step=stopped.step)
                return "stopped"
            except Exception as error:  # whatever it is, it is recorded, and judged by decide() if it is this trial's
                if is_loss(error):
                    attempt.end(storage, "lost", error, step=lease.step)
                    raise
                attempt.end(storage, "failed", error, step=lease.step)
            else:
                attempt.end(storage, "done")
    return "done"


class Attempt:
    """The record of one process working on one trial."""

    def __init__(
        self,
        name: str,
        *,
        sweep_id: str,
        device: str,
        machine: Mapping[str, Any] | None = None,
        driver_code: Mapping[str, Any] | None = None,
    ):
        now = time.time()
        self.id, self.folder = f"{int(now * 1000):014d}-{uuid.uuid4().hex[:8]}", trial_folder(name)
        self.name = name
        self._peak: Callable[[], int] | None = None
        self.record: dict[str, Any] = {
            "attempt_id": self.id,
            "sweep_id": sweep_id,
            "started": now,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "device": device,
            "threads": torch.get_num_threads(),
            "code": code_like(driver_code),
            **(machine or {}),
        }

    def measure(self, device: str) -> None:
        """From here on the memory that this attempt takes is its own peak, which its end records."""
        if torch.device(device).type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._peak = partial(torch.cuda.max_memory_allocated, device)
            return
        with contextlib.suppress(OSError):  # a machine that does not tell it records none
            forget_peak()
            peak_bytes()
            self._peak = peak_bytes

    def begin(self, storage: Storage, *, lease: int, micro_batch: int, recompute: bool) -> None:
        """Record that the attempt starts, under which lease, from which step, and in what parts."""
        self.record |= {
            "lease": lease,
            "from_step": _newest_step(storage, self.name),
            "micro_batch": micro_batch,
            "recompute": recompute,
        }
        self._put(storage)

    def end(self, storage: Storage, outcome: str, error: Exception | None = None, *, step: int | None = None) -> None:
        """Record how the attempt ended; where its trial is not done, after which step and what is kept of its steps."""
        self.record |= {"ended": time.time(), "outcome": outcome}
        if self._peak is not None:
            self.record |= {"peak_bytes": self._peak()}
        if step is not None:
            self.record |= {"step": step, "kept_step": _newest_step(storage, self.name)}
        if error is not None:
            self.record |= {
                "error_kind": kind(error),
                "error": f"{type(error).__name__}: {error}",
                "traceback": "".join(traceback.format_exception(error))[-8000:],
            }
        self._put(storage)

    def hang(self, storage: Storage, seconds: float) -> None:
        """Record that no step was finished for so long, and end this process: Ray Train starts another one.

        Nothing gentler would do: what hangs in a driver or a collective cannot be interrupted.
        """
        self.record |= {
            "ended": time.time(),
            "outcome": "lost",
            "error": f"hung: no step was finished for {seconds:.0f} s, so its process was ended",
        }
        try:
            beat = heartbeat_of(storage, self.name)
            self.record |= {"step": beat.get("step", 0), "kept_step": _newest_step(storage, self.name)}
            self._put(storage)
        finally:
            os._exit(HUNG)

    def _put(self, storage: Storage) -> None:
        storage.put_json(f"{self.folder}/attempts/{self.id}.json", self.record)


def _close_lost(storage: Storage, name: str, heartbeat: Mapping[str, Any]) -> None:
    """Write down the end of attempts that ended without a word: their last heartbeat is the last that is known.

    Only who holds the lease may: every other attempt is over then.
    """
    for key in storage.keys(f"{trial_folder(name)}/attempts"):
        if not re.fullmatch(ATTEMPT_KEY, key):
            continue
        record = checked(key, storage.get_json(key), ATTEMPT)
        if "ended" not in record:
            said = heartbeat if heartbeat.get("attempt_id") == record["attempt_id"] else {}
            how = {"ended": said.get("time") or record["started"], "outcome": "lost"}
            kept = {"step": said.get("step", 0), "kept_step": _newest_step(storage, name)}
            storage.put_json(key, record | how | kept)


def _ended(record: dict[str, Any]) -> Ended:
    """How an attempt ended, for decide(); a lost one has no error."""
    error = record.get("error_kind") if record["outcome"] != "lost" else None
    return Ended(
        error=error,
        step=record["from_step"],
        smallest=smaller(record["micro_batch"], recompute=record["recompute"]) is None,
    )


def _parts(own: Sequence[dict[str, Any]], micro_batch: int, recompute: bool, *, shrink: bool) -> tuple[int, bool]:
    """In what parts to run the batch: as planned, or as the sweep's last attempt did, or smaller."""
    if own:
        micro_batch, recompute = own[-1]["micro_batch"], own[-1]["recompute"]
    return (smaller(micro_batch, recompute=recompute) or (1, True)) if shrink else (micro_batch, recompute)


def _give_up(storage: Storage, name: str, record: dict[str, Any], reason: str) -> None:
    """Record with the last attempt why the trial is not tried again in this sweep."""
    error = record.get("error", "its process was lost")
    record |= {"ended": record.get("ended", time.time()), "outcome": "failed", "error": f"{error} (stopped: {reason})"}
    storage.put_json(f"{trial_folder(name)}/attempts/{record['attempt_id']}.json", record)


def _newest_step(storage: Storage, name: str) -> int:
    """The optimiser step of the newest committed checkpoint, 0 where there is none."""
    folders = committed(storage, f"{trial_folder(name)}/checkpoints")
    return int(folders[-1].removeprefix("step-")) if folders else 0
