"""Several trials on one device, each in a process of its own: all at once beside one after the other.

What a small model leaves of a GPU others can have: while one process launches or augments, the work of another runs.
The steps are those of a fit (helix.training.resident), replayed as CUDA graphs where a fit would do that, on clips of
noise that lie on the device. Loading, evaluation and checkpoints are not in them.
"""

import math
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from helix.bench import Conditions, Outcome, Row, Table, require_positive
from helix.gpu.clock import synchronize
from helix.process import in_own_process
from helix.protocol import Protocol
from helix.registry import BENCHES, BLOCKS, FRONTENDS
from helix.spec import PRECISIONS, AugmentSpec, ModelSpec, TrainingSpec, TrialSpec
from helix.training.feasibility import SAMPLES_PER_TOKEN
from helix.training.graphs import CHECKED, Choice
from helix.training.resident import ResidentStep

#: ESC-50's.
CLASSES = 50

#: What a process waits for the others at most: it takes so long to start several and to compile in each.
PATIENCE_S = 600.0

#: Seconds between two looks at whether the others are there; short beside what is timed.
LOOK_S = 0.002

#: Steps before the first that is timed: the first compiles or is recorded, and replays are checked.
WARM_UP = 1 + CHECKED


@BENCHES.register("pack")
@dataclass(frozen=True, kw_only=True)
class PackBench:
    """`trials` processes that take `steps` steps each, on `device` (cpu, cuda), for each of `frontends`. The defaults
    are the paper's size on ESC-50: 32 clips of 5 s. `graphs`: auto, on or off, as helix.training.graphs has it."""

    trials: int = 5
    device: str = "cpu"
    steps: int = 50
    frontends: tuple[str, ...] = ("raw", "mel")
    pattern: tuple[str, ...] = ("mamba",) * 6
    tokens: int = 500
    width: int = 256
    batch: int = 32
    precision: str = "fp32"
    graphs: str = "auto"

    def __post_init__(self) -> None:
        require_positive(self)
        for name, given, known in (
            ("frontends", self.frontends, FRONTENDS.names()),
            ("pattern", self.pattern, BLOCKS.names()),
            ("precision", (self.precision,), PRECISIONS),
            ("graphs", (self.graphs,), get_args(Choice)),
            ("device", (self.device.partition(":")[0],), ("cpu", "cuda")),
        ):
            if unknown := set(given) - set(known):
                raise ValueError(f"bench 'pack': {name} has {sorted(unknown)[0]}; known: {', '.join(known)}")

    def run(self, how: Conditions) -> Outcome:
        if self.device != "cpu" and not torch.cuda.is_available():
            raise ValueError(f"bench 'pack': device is {self.device}, and torch finds no CUDA GPU here")
        rows = []
        for frontend in self.frontends:
            how.say(f"{self.trials} trials, {frontend}")
            turns_s, at_once_s = self._measured(self.spec(frontend), how)
            all_steps = self.trials * self.steps
            note = f"median of {len(turns_s)}"
            turn_s, once_s = statistics.median(turns_s), statistics.median(at_once_s)
            gain = statistics.median(turn / once for turn, once in zip(turns_s, at_once_s, strict=True))
            rows.append(Row(name=frontend, values=(all_steps / turn_s, all_steps / once_s, gain), note=note))
        device = self.device if self.device == "cpu" else torch.cuda.get_device_name(self.device)
        shape = f"B={self.batch}, L={self.tokens:,} raw, width {self.width}, {self.precision}, graphs {self.graphs}"
        title = f"{self.trials} trials of {'-'.join(self.pattern)} on one device ({device}), {shape}"
        columns = ("in turn, steps/s", "at once, steps/s", "gain")
        return Outcome(tables=(Table(title=title, columns=columns, rows=tuple(rows)),))

    def spec(self, frontend: str) -> TrialSpec:
        """What each of the trials is, but for its seed."""
        model = ModelSpec(frontend=frontend, pattern=self.pattern, width=self.width)
        training = TrainingSpec(batch_size=self.batch, precision=self.precision)  # type: ignore[arg-type]
        return TrialSpec(model=model, augment=AugmentSpec(), training=training, protocol=Protocol())

    def _measured(self, spec: TrialSpec, how: Conditions) -> tuple[list[float], list[float]]:
        """Of each round the seconds that all trials took one after the other, and at once."""
        with tempfile.TemporaryDirectory(prefix="helix-pack-") as folder, ThreadPoolExecutor(self.trials) as pool:
            where = {"device": self.device, "graphs": self.graphs, "samples": self.tokens * SAMPLES_PER_TOKEN}
            part = partial(in_own_process, trial, spec, where, self.steps, how.repeats, folder, self.trials)
            answers = [pool.submit(part, number, threads=how.threads) for number in range(self.trials)]
            errors = [error for answer in answers if (error := answer.exception()) is not None]
            if errors:  # the others fail because one of them did
                raise next((error for error in errors if not isinstance(error, OtherFailedError)), errors[0])
            rounds = list(zip(*(answer.result() for answer in answers), strict=True))
        turns_s = [math.fsum(alone_s for alone_s, _, _ in one) for one in rounds]
        at_once_s = [max(end for _, _, end in one) - min(begin for _, begin, _ in one) for one in rounds]
        return turns_s, at_once_s


class OtherFailedError(Exception):
    """Another process of the pack failed or never came; this one can measure nothing."""


def trial(
    spec: TrialSpec, where: dict[str, Any], steps: int, rounds: int, folder: str, count: int, number: int
) -> list[tuple[float, float, float]]:
    """What one process does: in each round it takes its steps when its turn comes, and again together with all others.

    Returns of each round the seconds of the steps in turn, and when those at once began and ended, by the clock that
    all processes of a machine share.
    """
    meeting = Meeting(Path(folder), count, number)
    try:
        step = ResidentStep(spec, classes=CLASSES, **where)

        def run(times: int) -> None:
            for _ in range(times):
                step()
            synchronize(step.device)

        run(WARM_UP)
        found = []
        for this in range(rounds):
            meeting.all_here(f"round {this}")
            meeting.my_turn(f"turn {this}")
            began = time.monotonic()
            run(steps)
            alone_s = time.monotonic() - began
            meeting.here(f"turn {this}")
            meeting.all_here(f"turns over {this}")
            began = time.monotonic()
            run(steps)
            found.append((alone_s, began, time.monotonic()))
        meeting.all_here("over")
        return found
    except BaseException:
        meeting.failed()
        raise


class Meeting:
    """Processes that wait for each other by files in a folder. Raises OtherFailedError where one does not come."""

    def __init__(self, folder: Path, count: int, number: int):
        self.folder, self.count, self.number = folder, count, number

    def here(self, what: str) -> None:
        (self.folder / f"{what} {self.number}").touch()

    def failed(self) -> None:
        (self.folder / "failed").touch()

    def all_here(self, what: str) -> None:
        """Say so, and wait until all of them have."""
        self.here(what)
        self._wait(what, range(self.count))

    def my_turn(self, what: str) -> None:
        """Wait until all with a smaller number have said so."""
        self._wait(what, range(self.number))

    def _wait(self, what: str, numbers: Sequence[int]) -> None:
        until = time.monotonic() + PATIENCE_S
        while not all((self.folder / f"{what} {number}").exists() for number in numbers):
            if os.path.lexists(self.folder / "failed"):
                raise OtherFailedError("another process of the pack failed")
            if time.monotonic() > until:
                raise OtherFailedError(f"not all of {self.count} processes were there within {PATIENCE_S:.0f} s")
            time.sleep(LOOK_S)
