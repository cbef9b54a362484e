"""Certificates: a trial is run undisturbed, its twin is killed again and again, and the two are compared hash by hash.

    <storage>/certificates/<id>.json            what was done and found, put last
    <storage>/certificates/<id>/undisturbed/    the two runs, while they are made, and afterwards if they differ
    <storage>/certificates/<id>/twin/

What it shows is about one trial on one backend, device and set of versions; all of that is in the certificate.
"""

import hashlib
import math
import platform
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from safetensors.torch import load

from dashboards.certificates import BIT_EXACT
from helix.data.shards import Recordings
from helix.models.scan import drifts, scan_backend, wanted_backend
from helix.spec import SCIENCE_VERSION, resolve, to_json, trial_id
from helix.storage import Storage, json_bytes, open_storage
from helix.training.checkpoint import BEST_FILE, FILES, committed
from helix.training.trainer import row_key, trial_folder, versions
from orchestration.grid import Trial
from orchestration.ledger import CERTIFICATES
from orchestration.lineage import checkout
from orchestration.twin import (
    AFTER_RESULT,
    ANY_TIME,
    BEFORE_RESULT,
    EVALUATION,
    LAST_STEP,
    MANIFEST,
    OPTIMIZER,
    ROW,
    START,
    WEIGHTS,
    WRITING,
    Attempt,
    Moment,
    Order,
    Twins,
)

#: The verdict of a twin whose hashes are not those of the undisturbed run.
DRIFT = "drift"

#: What a run says of its clock and of the processes it took: no part of what it found.
CLOCK = ("seconds", "time", "system", "train_seconds", "finished", "environments", "rows", "sha256")

#: Moments that are met on purpose, and AFTER_RESULT once at most: the twin is finished then.
ON_PURPOSE = (WRITING, EVALUATION, BEFORE_RESULT, LAST_STEP, MANIFEST, ROW, START, OPTIMIZER, WEIGHTS)

#: Kills that a certificate may ask for.
MOST_KILLS = 1000

#: Checkpoints that the twin makes between two kills, so that each costs a part of what lies between.
PER_KILL = 3


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast the undisturbed run was: to its first step, for a step, and for all of it, in seconds."""

    start_s: float
    step_s: float
    whole_s: float

    @classmethod
    def of(cls, attempt: Attempt) -> "Pace":
        (_, first), (_, last) = attempt.steps[0], attempt.steps[-1]
        return cls(
            start_s=first - attempt.began,
            step_s=(last - first) / max(1, len(attempt.steps) - 1),
            whole_s=attempt.ended - attempt.began,
        )


def certify(
    trial: Trial,
    recordings: Recordings,
    storage: Storage,
    *,
    grid: str,
    kills: int,
    seed: int,
    twins: Twins,
    device: str = "cpu",
    threads: int = 1,
    say: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """Run the trial and its twin in processes of their own, kill the twin, compare, and put the certificate.

    `recordings` are those of `storage`. On CUDA both take kernels that give the same bits again, unless HELIX_SCAN
    names a scan that has none: then the certificate shows its drift. Raises ValueError as `check_wanted` does,
    RuntimeError where a run ends with an error of its own.
    """
    check_wanted(kills=kills, device=device, threads=threads)
    name = trial_id(trial.spec, recordings.manifest_sha256)
    certificate_id = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:6]}"
    scratch = f"{CERTIFICATES}/{certificate_id}"
    one, twin = (open_storage(f"{storage!r}/{scratch}/{part}") for part in ("undisturbed", "twin"))
    order = Order(
        spec=to_json(trial.spec),
        source=repr(storage),
        data=recordings.prepared.prefix,
        storage=repr(one),
        device=device,
        deterministic=device == "cuda" and not drifts(wanted_backend()),
        threads=threads,
    )
    try:
        whole = finished(twins.run(order))
        steps, pace = whole.steps[-1][0], Pace.of(whole)
        say(f"undisturbed: {steps} steps in {pace.whole_s:.1f} s on {whole.scan}")
        most_s = (pace.whole_s - pace.start_s) / (PER_KILL * kills)
        order = replace(order, storage=repr(twin), steps=steps, save_every_s=most_s)
        attempts, restarts = disturb(twins, order, moments(kills, seed, steps, pace), twin, name, say=say)
        compared = compare(one, twin, name)
    except BaseException:
        storage.delete_folder(scratch)
        raise
    landed = [attempt for attempt in attempts if attempt.killed]
    # The very first start on a machine compiles kernels, which the undisturbed run must not be charged with.
    fastest_s = min([pace.start_s, *starts_s(attempts)])
    undisturbed_s = pace.whole_s - pace.start_s + fastest_s
    twin_s = sum(attempt.ended - attempt.began for attempt in attempts)
    verdict = compared["verdict"]
    gaps = missing_steps(attempts, steps)
    if gaps:
        verdict = "incomplete steps"
        compared["rows"]["problems"].append(f"no attempt finished the steps {', '.join(map(str, gaps))}")
    if restarts:
        verdict = "started again at step 0"
    elif not landed:
        verdict = "nothing shown: no kill landed"
    certificate = {
        "certificate_id": certificate_id,
        "grid": grid,
        "trial": trial.label,
        "trial_id": name,
        "spec": to_json(resolve(trial.spec)),
        "data_manifest_sha256": recordings.manifest_sha256,
        "science_version": SCIENCE_VERSION,
        "scan": whole.scan,
        "device": device,
        "device_name": _device_name(device),
        "deterministic": order.deterministic,
        "threads": threads,
        "versions": installed(),
        "commit": commit(),
        "made": time.time(),
        "seed": seed,
        "steps": steps,
        "kills_asked": kills,
        "kills": described(attempts),
        "steps_lost": sum(lost_steps(attempts)),
        "undisturbed_seconds": undisturbed_s,
        "twin_seconds": twin_s,
        "seconds_lost": max(0.0, twin_s - undisturbed_s),
        "save_every_s": most_s,
        "restarts_at_step_0": restarts,
        **compared,
        "verdict": verdict,
    }
    storage.put_json(f"{scratch}.json", certificate)
    if verdict == BIT_EXACT:
        storage.delete_folder(scratch)
    return certificate


def check_wanted(*, kills: int, device: str, threads: int) -> None:
    """ValueError where no certificate can come of this; nothing was prepared for it then."""
    if not 1 <= kills <= MOST_KILLS:
        raise ValueError(
            f"--kills is {kills}; wanted 1 to {MOST_KILLS}: a certificate is about what was survived, and after each "
            "kill a process starts anew, which takes seconds"
        )
    if threads < 1:
        raise ValueError(f"--threads is {threads}; wanted 1 or more CPU threads for each of the two runs")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device is cuda, but torch finds no CUDA device on this machine; leave it out to certify on the CPU"
        )
    scan_backend(torch.device(device), torch.float32)


def moments(kills: int, seed: int, steps: int, pace: Pace) -> list[Moment]:
    """When to kill, in the order of training: half of them uniformly in time, half on purpose, at places drawn too."""
    draw = random.Random(f"kills {seed}")
    on_purpose: list[str] = draw.sample(ON_PURPOSE, len(ON_PURPOSE))
    chosen = [on_purpose[number % len(on_purpose)] for number in range((kills + 1) // 2)]
    if kills > 2:
        chosen[draw.randrange(len(chosen))] = AFTER_RESULT
    names = [*chosen, *[ANY_TIME] * (kills // 2)]
    at_the_end = (LAST_STEP, BEFORE_RESULT, AFTER_RESULT)
    drawn = []
    for name in names:
        # The moment within a step, a start or a write of a file is drawn as well; a file takes less than a step.
        within_s = {ANY_TIME: pace.step_s, START: pace.start_s, WRITING: min(pace.step_s, 0.02)}.get(name, 0.0)
        step = steps if name in at_the_end else draw.randrange(steps)
        drawn.append(Moment(name=name, step=step, delay_s=draw.uniform(0, within_s)))
    order = {name: number for number, name in enumerate(at_the_end, start=1)}
    return [
        replace(moment, step=0) if moment.name == START else moment
        for moment in sorted(drawn, key=lambda moment: (moment.step, order.get(moment.name, 0)))
    ]


def disturb(
    twins: Twins,
    order: Order,
    kill_at: Sequence[Moment],
    storage: Storage,
    trial_id: str,
    *,
    say: Callable[[str], None] = lambda _line: None,
) -> tuple[list[Attempt], int]:
    """Attempts at the order, one per kill, until it is finished; how many began at step 0 beside a checkpoint."""
    attempts: list[Attempt] = []
    restarts = 0
    for moment in (*kill_at, None):
        before = committed(storage, f"{trial_folder(trial_id)}/checkpoints")
        if moment is not None and moment.name == START:
            # The first start of all compiles; later ones are what there is to hit.
            moment = replace(moment, delay_s=min([moment.delay_s, *starts_s(attempts)]))
        attempt = twins.run(order, kill_at=moment)
        attempts.append(attempt)
        restarts += bool(before) and attempt.from_step == 0
        if not attempt.killed:
            finished(attempt)
            break
        if attempt.met is not None:
            name, step = attempt.met
            say(f"kill {len(attempts)} of {len(kill_at)}: {name}, {step} steps finished")
    return attempts, restarts


def finished(attempt: Attempt) -> Attempt:
    """The attempt, where it came to its end. Raises RuntimeError."""
    if attempt.status:
        raise RuntimeError(f"the training process ended with {attempt.status}: {attempt.error or 'it said nothing'}")
    return attempt


def starts_s(attempts: Sequence[Attempt]) -> list[float]:
    """How long each attempt that finished a step took to its first one, in seconds."""
    return [attempt.steps[0][1] - attempt.began for attempt in attempts if attempt.steps]


def lost_steps(attempts: Sequence[Attempt]) -> list[int]:
    """For each attempt how many of the steps that it finished were trained again."""
    lost = []
    for at, attempt in enumerate(attempts):
        starts = [later.from_step for later in attempts[at + 1 :] if later.from_step is not None]
        lost.append(sum(step > starts[0] for step, _ in attempt.steps) if starts else 0)
    return lost


def missing_steps(attempts: Sequence[Attempt], steps: int) -> list[int]:
    """The steps, of 1 to `steps`, that no attempt finished."""
    trained = {step for attempt in attempts for step, _ in attempt.steps}
    return [step for step in range(1, steps + 1) if step not in trained]


def seconds_to_next_step(attempts: Sequence[Attempt]) -> list[float | None]:
    """For each attempt the time from its end to the next step that any later one finished, None where none did."""
    return [
        next((later.steps[0][1] - attempt.ended for later in attempts[at + 1 :] if later.steps), None)
        for at, attempt in enumerate(attempts)
    ]


def described(attempts: Sequence[Attempt]) -> list[dict[str, Any]]:
    """The kills that landed, as the certificate has them."""
    found = zip(attempts, lost_steps(attempts), seconds_to_next_step(attempts), strict=True)
    return [
        {
            "moment": attempt.met[0],
            "step": attempt.step,
            "from_step": attempt.from_step,
            "steps_lost": lost,
            "seconds_to_next_step": seconds,
        }
        for attempt, lost, seconds in found
        if attempt.killed and attempt.met is not None
    ]


def compare(one: Storage, other: Storage, trial_id: str) -> dict[str, Any]:
    """What two runs of a trial left, hash by hash: {"verdict", "hashes", "rows", "largest_difference"}.

    `largest_difference` is relative: for tensors the largest difference over the largest value of each, for numbers of
    rows over the larger of the two.
    """
    hashes = {
        what: {"undisturbed": _sha256(first), "twin": _sha256(second), "equal": first == second}
        for (what, first), (_, second) in zip(_kept(one, trial_id), _kept(other, trial_id), strict=True)
    }
    rows, twin_rows = _rows(one, trial_id), _rows(other, trial_id)
    problems = _row_problems(twin_rows, rows, sorted(other.keys(f"{trial_folder(trial_id)}/metrics")), trial_id)
    for row, twin_row in zip(rows, twin_rows, strict=False):
        first, second = json_bytes(_science(row)), json_bytes(_science(twin_row))
        hashes[f"row {row['epoch']}"] = {
            "undisturbed": _sha256(first),
            "twin": _sha256(second),
            "equal": first == second,
        }
    exact = all(pair["equal"] for pair in hashes.values())
    return {
        "verdict": "incomplete rows" if problems else BIT_EXACT if exact else DRIFT,
        "hashes": hashes,
        "rows": {"count": len(twin_rows), "problems": problems},
        "largest_difference": None
        if exact
        else {
            "weights": _largest_difference(one, other, trial_id),
            "rows": max(
                (
                    _relative(a, b)
                    for row, twin_row in zip(rows, twin_rows, strict=False)
                    for a, b in _numbers(_science(row), _science(twin_row))
                ),
                default=0.0,
            ),
        },
    }


def installed() -> dict[str, str]:
    """The software that took part."""
    return {**versions(), "numba": metadata.version("numba"), "machine": f"{platform.system()} {platform.machine()}"}


def commit() -> str | None:
    """The git commit of this code, with "+" where files were changed since; None outside a checkout."""
    known = checkout()
    return None if known is None else f"{known.commit[:12]}{'+' if known.dirty else ''}"


def certificate_table(certificate: Mapping[str, Any]) -> Table:
    """A certificate for the terminal: its kills, and the verdict below."""
    table = Table(
        title=Text(
            f"{certificate['trial']} of {certificate['grid']}: {certificate['steps']} steps, scan "
            f"{certificate['scan']} on {certificate['device_name']}, torch {certificate['versions']['torch']}"
        ),
        caption=Text(verdict_line(certificate)),
        title_style="bold",
        title_justify="left",
        caption_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("kill", justify="right")
    table.add_column("moment", no_wrap=True)
    for heading in ("from step", "killed at", "steps lost", "s to next step"):
        table.add_column(heading, justify="right")
    for number, kill in enumerate(certificate["kills"], start=1):
        seconds, from_step = kill["seconds_to_next_step"], kill["from_step"]
        table.add_row(
            str(number),
            kill["moment"],
            "-" if from_step is None else str(from_step),
            str(kill["step"]),
            str(kill["steps_lost"]),
            "-" if seconds is None else f"{seconds:.1f}",
        )
    return table


def verdict_line(certificate: Mapping[str, Any]) -> str:
    """What was found, in a sentence or two."""
    hashes = certificate["hashes"]
    unequal = [name for name, pair in hashes.items() if not pair["equal"]]
    said = (
        f"{certificate['verdict']}: {len(certificate['kills'])} of {certificate['kills_asked']} kills landed, "
        f"{len(hashes) - len(unequal)} of {len(hashes)} hashes are equal, {certificate['steps_lost']} steps were "
        f"trained again, {certificate['seconds_lost']:.1f} s were lost, "
        f"{certificate['restarts_at_step_0']} restarts at step 0"
    )
    if unequal:
        said += f"; unequal: {', '.join(unequal)}"
    if certificate["largest_difference"]:
        parts = certificate["largest_difference"].items()
        said += f"; largest relative difference {', '.join(f'{value:.2g} in {what}' for what, value in parts)}"
    return "; ".join([said, *certificate["rows"]["problems"]])


def _kept(storage: Storage, trial_id: str) -> Iterator[tuple[str, bytes]]:
    """The files of a finished trial that must be the same bytes however it was run."""
    folder = trial_folder(trial_id)
    newest = committed(storage, f"{folder}/checkpoints")[-1]
    for what, name in zip(("weights", "optimizer"), FILES, strict=True):
        yield what, storage.get(f"{folder}/checkpoints/{newest}/{name}")
    yield "best weights", storage.get(f"{folder}/best/{BEST_FILE}")
    yield "result", json_bytes(_science(storage.get_json(f"{folder}/result.json")))


def _science(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if key not in CLOCK}


def _rows(storage: Storage, trial_id: str) -> list[dict[str, Any]]:
    """The rows as they are stored, one file each, by name."""
    return [storage.get_json(key) for key in storage.keys(f"{trial_folder(trial_id)}/metrics")]


def _row_problems(
    rows: Sequence[Mapping[str, Any]], wanted: Sequence[Mapping[str, Any]], keys: Sequence[str], trial_id: str
) -> list[str]:
    """What is wrong with the epochs and steps of rows: gaps, duplicates, a row under another's name."""
    problems = []
    if keys != [row_key(trial_id, row["epoch"]) for row in wanted]:
        problems.append(f"{len(keys)} rows are stored, {len(wanted)} epochs were trained")
    epochs = [row["epoch"] for row in rows]
    if epochs != list(range(1, len(wanted) + 1)):
        problems.append(f"the rows are of epochs {epochs}")
    step = 0
    for row in rows:
        if row["step"] != step + len(row["train_losses"]):
            problems.append(f"the row of epoch {row['epoch']} ends at step {row['step']}, {step} was the one before")
        step = row["step"]
    return problems


def _largest_difference(one: Storage, other: Storage, trial_id: str) -> float:
    pair = [
        load(next(data for what, data in _kept(storage, trial_id) if what == "weights")) for storage in (one, other)
    ]
    return max(
        (
            ((first - second).abs().max() / first.abs().max().clamp_min(torch.finfo(torch.float64).tiny)).item()
            for first, second in ((pair[0][name].double(), pair[1][name].double()) for name in pair[0])
            if first.numel()
        ),
        default=0.0,
    )


def _numbers(first: Any, second: Any) -> Iterator[tuple[float, float]]:
    """The numbers that stand at the same place in two JSON values."""
    if isinstance(first, dict):
        for key in first.keys() & second.keys():
            yield from _numbers(first[key], second[key])
    elif isinstance(first, list):
        for a, b in zip(first, second, strict=False):
            yield from _numbers(a, b)
    elif isinstance(first, int | float) and isinstance(second, int | float):
        yield float(first), float(second)


def _relative(first: float, second: float) -> float:
    largest = max(abs(first), abs(second))
    return abs(first - second) / largest if largest > 0 and math.isfinite(largest) else 0.0


def _device_name(device: str) -> str:
    return f"{device} ({platform.machine() if device == 'cpu' else torch.cuda.get_device_name()})"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
