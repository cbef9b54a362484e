"""A trial in processes of its own that tell where they stand and can be killed at a wanted moment. Knows no Ray.

`Twins` starts one template process, which imports torch once; each attempt is a fork of it, so that a hundred attempts
do not wait for a hundred imports. An attempt is what a worker does, `fit` on a storage, and tells every step, every
warning and the moment it was given, on a pipe. Whoever listens kills it with a real SIGKILL, from outside.
"""

import json
import logging
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO, cast

import torch

from helix.data.shards import open_prepared
from helix.determinism import ask_for_the_same_bits
from helix.models.scan import kernels, scan_backend
from helix.spec import from_json, trial_id
from helix.storage import Storage, json_bytes, open_storage
from helix.training.checkpoint import committed
from helix.training.trainer import Fit, fit, trial_folder
from orchestration.notices import Notices, sigterm_notice
from orchestration.recovery import kind

#: What runs as the template.
TEMPLATE = (sys.executable, "-m", "orchestration.twin")

#: An attempt that says nothing for so long hangs.
SILENT_S = 600.0

#: Characters of a message that are told: a pipe takes so many in one piece, also from a process that is killed.
SAID = 2000

ANY_TIME = "at any time"
START = "while it starts"
EVALUATION = "during an evaluation"
WEIGHTS = "before a checkpoint's weights"
WRITING = "while a checkpoint is written"
OPTIMIZER = "between a checkpoint's weights and its optimiser"
MANIFEST = "before a checkpoint's manifest"
ROW = "between a checkpoint and its row"
LAST_STEP = "after the last step"
BEFORE_RESULT = "before the result is put"
AFTER_RESULT = "after the result was put"

#: The moments at which an attempt can be met; at those that are True it stands still until it is killed.
MOMENTS = {
    ANY_TIME: False,
    START: False,
    EVALUATION: True,
    WEIGHTS: True,
    WRITING: False,
    OPTIMIZER: True,
    MANIFEST: True,
    ROW: True,
    LAST_STEP: True,
    BEFORE_RESULT: True,
    AFTER_RESULT: True,
}

#: Which moments the put of a key is, by the last part of the key, before it.
OF_CHECKPOINT = {
    "model.safetensors": (WEIGHTS, WRITING),
    "optimizer.safetensors": (OPTIMIZER,),
    "manifest.json": (MANIFEST,),
}


@dataclass(frozen=True, kw_only=True)
class Moment:
    """The first time that `name` comes about once `step` optimiser steps are finished, and `delay_s` after it.

    Where it does not come about any more, the moment before the result is put stands in, so that a kill always lands.
    """

    name: str
    step: int = 0
    delay_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Order:
    """What an attempt runs: a spec on prepared data (`data`, a prefix in the storage `source`), kept in `storage`.

    Storages are addresses. `steps` is the last optimiser step of the trial.
    """

    spec: dict[str, Any]
    source: str
    data: str
    storage: str
    steps: int = 0
    device: str = "cpu"
    deterministic: bool = False
    threads: int = 1
    save_every_s: float = 300.0


@dataclass(kw_only=True)
class Attempt:
    """What was seen of one attempt. Times are monotonic seconds.

    `from_step`: the step that it went on from, None where it trained and evaluated nothing. `steps`: the steps that it
    finished, with their times. `status`: its exit code, or minus the signal that ended it. `met`: the moment at which
    it was met, and the steps finished by then.
    """

    began: float
    pid: int = 0
    from_step: int | None = None
    steps: list[tuple[int, float]] = field(default_factory=list)
    met: tuple[str, int] | None = None
    ended: float = 0.0
    status: int = 0
    scan: str = ""
    error: str | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL

    @property
    def step(self) -> int:
        """The last step that is known to be finished."""
        return max(self.from_step or 0, self.met[1] if self.met else 0, self.steps[-1][0] if self.steps else 0)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the attempt; one that has just ended is left in peace."""
        if not self.pid:  # it has not begun
            return
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return


class TwinError(Exception):
    """An attempt that ended in a way that nobody asked for."""


class Twins:
    """Starts attempts, one at a time. A context manager: the template and what it runs end with it."""

    def __init__(self, command: Sequence[str] = TEMPLATE, *, silent_s: float = SILENT_S):
        self.command, self.silent_s = list(command), silent_s

    def __enter__(self) -> "Twins":
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        # One thread in the template: only what is forked may start others.
        env = {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=env
        )
        self._events: queue.Queue[tuple[float, dict[str, Any]] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, name="helix-twin", daemon=True)
        self._reader.start()
        self._running: Attempt | None = None
        self._next()  # it is ready
        return self

    def __exit__(self, *_: object) -> None:
        if self._running is not None:
            self._running.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()

    def run(
        self,
        order: Order,
        *,
        kill_at: Moment | None = None,
        watch: Callable[[Attempt, dict[str, Any]], None] = lambda _attempt, _event: None,
    ) -> Attempt:
        """One attempt, to its end. `watch` is called with every event, while the attempt goes on."""
        attempt = self._running = Attempt(began=time.monotonic())
        assert self._process.stdin is not None
        wanted = None if kill_at is None else asdict(kill_at)
        self._process.stdin.write(json.dumps({**asdict(order), "moment": wanted}) + "\n")
        try:
            self._follow(attempt, kill_at, watch)
        except BaseException:  # whoever asked will clear up behind it
            attempt.kill()
            raise
        self._running = None
        return attempt

    def _follow(
        self, attempt: Attempt, kill_at: Moment | None, watch: Callable[[Attempt, dict[str, Any]], None]
    ) -> None:
        """Take down what the attempt tells until it has ended, and kill it when it is met."""
        while True:
            moment, event = self._next()
            if "pid" in event:
                attempt.pid, attempt.began = event["pid"], moment
            elif "from" in event:
                attempt.from_step, attempt.scan = event["from"], event["scan"]
            elif "step" in event:
                attempt.steps.append((event["step"], moment))
            elif "warning" in event:
                attempt.warnings.append(event["warning"])
            elif "error" in event:
                attempt.error = event["error"]
            elif "met" in event and kill_at is not None:
                attempt.met = event["met"], event["at"]
                time.sleep(kill_at.delay_s)
                attempt.kill()
            elif "ended" in event:
                attempt.ended, attempt.status = moment, event["ended"]
                return
            watch(attempt, event)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._events.put((time.monotonic(), json.loads(line)))
        self._events.put(None)

    def _next(self) -> tuple[float, dict[str, Any]]:
        try:
            event = self._events.get(timeout=self.silent_s)
        except queue.Empty:
            raise TwinError(f"the training process said nothing for {self.silent_s:.0f} s") from None
        if event is None:
            raise TwinError("the process that starts training processes ended; what it said is above")
        return event


class Observed:
    """A storage that tells of each put, before and after it."""

    def __init__(self, storage: Storage, tell: Callable[[str, str], None]):
        self._storage, self._tell = storage, tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def put(self, key: str, data: bytes) -> None:
        self._tell("before", key)
        self._storage.put(key, data)
        self._tell("after", key)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._tell("before", key)
        put = self._storage.put_if_absent(key, data)
        self._tell("after", key)
        return put

    def put_json(self, key: str, value: Any) -> None:
        self.put(key, json_bytes(value))


def moments_of(when: str, key: str) -> tuple[str, ...]:
    """The moments that the put of a key is, `when` "before" or "after" it."""
    folder, _, name = key.rpartition("/")
    if name == "result.json":
        return (BEFORE_RESULT if when == "before" else AFTER_RESULT,)
    if when == "before" and "/checkpoints/" in f"{folder}/":
        return OF_CHECKPOINT.get(name, ())
    if when == "before" and folder.endswith("/metrics"):
        return (ROW,)
    return ()


class Performance:
    """One attempt from inside: it runs `fit` and tells. `out` takes a line of JSON for each event."""

    def __init__(self, order: Order, moment: Moment | None, out: TextIO):
        self.order, self.moment, self.out = order, moment, out
        self.step, self.met, self.lock = -1, False, threading.Lock()
        self.storage = open_storage(order.storage)

    def tell(self, **event: Any) -> None:
        with self.lock:
            self.out.write(json.dumps(event) + "\n")
            self.out.flush()

    def at(self, *names: str) -> None:
        """Tell that these moments are here, if one of them is the wanted one, and stand still if it is one of those."""
        moment, step = self.moment, max(self.step, 0)
        if moment is None:
            return
        here = moment.name in names and step >= moment.step
        # Who was to be met earlier and was not, or is to be killed a little later, does not slip away to its end.
        last_chance = BEFORE_RESULT in names and moment.name != AFTER_RESULT
        if (here or last_chance) and not self.met:
            self.met = True
            self.tell(met=moment.name if here else BEFORE_RESULT, at=step)
            if here and MOMENTS[moment.name]:
                _stand_still()
        if last_chance:
            _stand_still()

    def run(self) -> None:
        order = self.order
        if order.deterministic:
            ask_for_the_same_bits()
        torch.set_num_threads(order.threads)
        logging.basicConfig(handlers=[_Telling(self)], level=logging.WARNING, force=True)
        self.at(START)
        source = open_storage(order.source)
        spec, recordings = from_json(order.spec), open_prepared(source, order.data)
        self.folder = trial_folder(trial_id(spec, recordings.manifest_sha256))
        seen = Observed(self.storage, lambda when, key: self.at(*moments_of(when, key)))
        how = Fit(
            storage=cast(Storage, seen),
            device=order.device,
            save_every_s=order.save_every_s,
            save_now=Notices([sigterm_notice()], ask_s=0.0),  # to ask for a signal costs nothing
            on_step=self.on_step,
        )
        fit(spec, recordings, how)

    def on_step(self, total_step: int) -> None:
        """A step, or a batch of the evaluation after it: those tell the step that was told before."""
        if self.step < 0:
            # A restored checkpoint that did not verify has lost its manifest, so the newest is the one restored.
            folders = committed(self.storage, f"{self.folder}/checkpoints")
            self.step = int(folders[-1].removeprefix("step-")) if folders else 0
            scan = scan_backend(torch.device(self.order.device), torch.float32)
            self.tell(**{"from": self.step, "scan": scan})
        if total_step == self.step:
            self.at(EVALUATION)
            return
        self.step = total_step
        self.tell(step=total_step)
        self.at(*((ANY_TIME, LAST_STEP) if total_step == self.order.steps else (ANY_TIME,)))


def _stand_still() -> None:
    """Wait to be killed; where whoever should do it is gone, the pipe that orders come by is at its end."""
    select.select([sys.stdin], [], [])
    os._exit(1)


class _Telling(logging.Handler):
    """Warnings as events."""

    def __init__(self, performance: Performance):
        super().__init__(logging.WARNING)
        self.performance = performance

    def emit(self, record: logging.LogRecord) -> None:
        self.performance.tell(warning=record.getMessage()[:SAID])


def perform(order: Order, moment: Moment | None, out: TextIO) -> int:
    """Run an attempt in this process. Returns its exit code."""
    performance = Performance(order, moment, out)
    try:
        performance.run()
    except Exception as error:  # whatever it is, the listener is told
        performance.tell(error=f"{kind(error)}: {error}"[:SAID])
        return 1
    return 0


def main() -> int:
    """The template: for each order on stdin a fork that runs it, and how it ended."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the listener hears it too, and ends its attempt
    kernels("numba")  # imported once for all; whichever scan is asked for, a fork imports that of a GPU

    def tell(**event: Any) -> None:
        out.write(json.dumps(event) + "\n")
        out.flush()

    tell(ready=True)
    for line in iter(sys.stdin.readline, ""):
        value = json.loads(line)
        moment = value.pop("moment")
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                tell(pid=os.getpid())
                status = perform(Order(**value), None if moment is None else Moment(**moment), out)
            finally:
                os._exit(status)  # what the template would do at its end is not the child's to do
        _, status = os.waitpid(pid, 0)
        tell(ended=os.waitstatus_to_exitcode(status))
    return 0


if __name__ == "__main__":
    sys.exit(main())
