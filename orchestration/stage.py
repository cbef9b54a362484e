"""Where faults are done to a sweep on Ray: machines of its own, a sweep that runs there, and what storage shows of it.

A heartbeat says the step it was put at, so a fault that follows one strikes at a known step. The first step after the
fault is heard of with the next heartbeat, up to BEAT_S later: the seconds are so much too many at most.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil

from helix.training.checkpoint import committed
from helix.training.trainer import trial_folder
from orchestration.fault import Row, Site
from orchestration.machines import ROOT, MachineError, Machines, Node, Program, until

#: What recovery may add to the time in which Ray starts a worker again.
MOST_ADDED_S = 10.0


class Stage:
    """One fault on one trial of the site. A context manager: it brings up the machines and starts the sweep."""

    def __init__(self, site: Site, fault: str, *, nodes: int = 1, env: dict[str, str] | None = None):
        self.site, self.bench, self.count, self.env = site, site.bench(fault), nodes, env or {}
        self.folder = trial_folder(self.bench.trial_id)
        self.checkpoints = f"{self.folder}/checkpoints"
        self.waits: list[float] = []
        self.lost: list[int] = []
        self.problems: list[str] = []
        self.from_step = 0

    def __enter__(self) -> "Stage":
        self.machines = Machines().__enter__()
        try:
            self.nodes = [self.machines.node() for _ in range(self.count)]
            self.sweep = self.start()
        except BaseException:
            self.machines.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.machines.__exit__()

    def start(self, machines: Machines | None = None) -> Program:
        """The sweep's command."""
        arguments = command(self.site, [self.bench.trial.variant.name], repr(self.bench.storage))
        return (machines or self.machines).run(arguments, **self.env)

    def beat(self) -> dict[str, Any]:
        """The newest heartbeat, {} before the first one."""
        return self.bench.storage.get_json(f"{self.folder}/heartbeat.json") or {}

    def attempt(self, attempt_id: str) -> dict[str, Any]:
        return self.bench.storage.get_json(f"{self.folder}/attempts/{attempt_id}.json") or {}

    def rows(self) -> list[dict[str, Any]]:
        """The rows of finished epochs that are stored."""
        return [self.bench.storage.get_json(key) for key in self.bench.storage.keys(f"{self.folder}/metrics")]

    def saved(self) -> int:
        """The step of the newest committed checkpoint, 0 where there is none."""
        found = committed(self.bench.storage, self.checkpoints)
        return int(found[-1].removeprefix("step-")) if found else 0

    def met(self) -> dict[str, Any]:
        """A heartbeat as it is put, once the attempt has made a checkpoint and a sixth of the trial is over."""
        first = self.beat()

        def look() -> dict[str, Any] | None:
            beat = self.beat()
            self._alive(self.sweep)
            fresh = beat != first
            first.update(beat)
            ready = beat.get("step", 0) >= self.bench.steps // 6 and self.saved() > self.from_step
            return beat if fresh and ready else None

        return until(look, "the trial makes a checkpoint")

    def strike(self, cause: Callable[[dict[str, Any]], float | None]) -> None:
        """Cause the fault at a heartbeat, and wait until the trial has gone on.

        `cause` may return the moment (monotonic seconds) from which to count, by default that before it was called.
        """
        beat, saved = self.met(), self.saved()
        at = time.monotonic()
        began = cause(beat) or at
        from_step, now = self.goes_on(beat)
        self.waits.append(now - began)
        self.lost.append(max(0, beat["step"] - from_step))
        if from_step < saved:
            self.problems.append(f"it went on from step {from_step}, though step {saved} was saved")
        self.from_step = from_step
        self.site.say(f"struck at step {beat['step']}; {self.waits[-1]:.1f} s to the next step, from {from_step}")

    def goes_on(self, beat: dict[str, Any]) -> tuple[int, float]:
        """The step that another attempt than that of `beat` began at, and when it had finished one of its own."""

        def look() -> tuple[int, float] | None:
            now = self.beat()
            if now["attempt_id"] == beat["attempt_id"]:
                self._alive(self.sweep)
                return None
            from_step = self.attempt(now["attempt_id"]).get("from_step")
            return (from_step, time.monotonic()) if from_step is not None and now["step"] > from_step else None

        return until(look, "the trial goes on")

    def worker(self, beat: dict[str, Any]) -> psutil.Process:
        """The process of the attempt of a heartbeat. It is one of these machines, or an error."""
        pid = self.attempt(beat["attempt_id"])["pid"]
        for node in self.nodes:
            for process in node.tree():
                if process.pid == pid:
                    return process
        raise MachineError(f"process {pid} is none of these machines")

    def node_of(self, process: psutil.Process) -> Node:
        return next(node for node in self.nodes if process in node.tree())

    def process(self, title: str) -> psutil.Process:
        """The process of the head that Ray calls so."""
        found = self.machines.head.find(title)
        if found is None:
            raise MachineError(f"the head runs no {title}")
        return found

    def bare(self, times: int) -> list[float]:
        """Seconds to the next step of a trainer that does nothing, whose worker is killed so often on this stage."""
        file = self.machines.folder / "bare-steps"
        program = self.machines.run(["-m", "orchestration.bare", str(file), str(self.machines.folder / "bare")])
        waits = []
        file.touch()

        def steps() -> list[list[str]]:
            lines = file.read_text().split("\n")[:-1]
            return [line.split() for line in lines]

        def others(pid: str, least: int) -> str | None:
            self._alive(program)
            seen = steps()
            return seen[-1][0] if seen and seen[-1][0] != pid and int(seen[-1][1]) >= least else None

        pid = until(lambda: others("", 40), "the bare trainer starts")
        for _ in range(times):
            at = time.monotonic()
            psutil.Process(int(pid)).kill()
            killed = pid
            pid = until(lambda killed=killed: others(killed, 1), "the bare trainer goes on")
            waits.append(time.monotonic() - at)
            until(lambda killed=killed: others(killed, 40), "the bare trainer trains")
        program.kill()
        return waits

    def finish(self) -> int:
        """Wait for the sweep's end. Returns its exit code."""
        status = until(self.sweep.process.poll, "the sweep ends")
        if status:
            self.problems.append(f"the sweep ended with {status}: {self.sweep.said[-500:]}")
        return status

    def row(self, *aside: str) -> Row:
        """The row of this fault, once the sweep is over. No fault from outside may be charged to the trial."""
        self.finish()
        records = [self.bench.storage.get_json(key) for key in self.bench.storage.keys(f"{self.folder}/attempts")]
        charged = [record["error"] for record in records if record.get("outcome") == "failed"]
        self.problems += [f"an attempt counts as the trial's own failure: {error[:200]}" for error in charged]
        row = self.bench.row(
            [],
            problem="; ".join(self.problems),
            aside="; ".join(aside),
            seconds=max(self.waits, default=None),
            steps_lost=sum(self.lost),
        )
        return replace(row, count=len(self.waits))

    def _alive(self, program: Program) -> None:
        if program.process.poll() is not None:
            raise MachineError(f"it ended with {program.process.returncode}: {program.said[-2000:]}")


def command(site: Site, variants: list[str], storage: str) -> list[str]:
    """The arguments of Python for a sweep over some variants of the site's grid, one worker at a time."""
    return [
        *(str(ROOT / "orchestration" / "sweep.py"), "--grid", site.grid, "--storage", storage),
        *("--folds", "1", "--variants", ",".join(variants), "--workers", "1"),
        *site.overrides,
    ]


def beside(ours: list[float], bare: list[float]) -> tuple[str, str]:
    """What recovery adds to Ray's own: (what to say of it, the problem if it is too much)."""
    added = statistics.median(ours) - statistics.median(bare)
    said = (
        f"medians of {len(ours)}: {statistics.median(ours):.1f} s, a bare TorchTrainer "
        f"{statistics.median(bare):.1f} s, so recovery adds {added:.1f} s"
    )
    return said, f"recovery adds {added:.1f} s" if added > MOST_ADDED_S else ""
