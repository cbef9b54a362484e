"""A storage that fails for a while under a running trial: it must go on training, and lose nothing."""

import importlib.util
import itertools
import math
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from helix.loopback import Fault, FaultProxy, Kind, s3_on_loopback
from helix.storage import open_storage
from helix.training.checkpoint import committed
from helix.training.trainer import trial_folder
from orchestration.certify import finished
from orchestration.fault import Bench, Row, Site, fault
from orchestration.grid import Trial
from orchestration.twin import Attempt, Twins

#: What the trainer says of a checkpoint that it could not write.
FAILED = "could not be written"

DISK_MIB = 64

#: The kinds of wrong answers that take turns, and how long each does so.
WRONG: tuple[Kind, ...] = ("status", "reset", "lost_reset", "truncate", "lost")
EACH_S = 2.0

#: An outage lasts so many times as long where some kind has met no request yet; and a trial that is to outlast it.
LATEST = 1.5
LONGER = 2.0


@fault("storage away for a while")
def away(site: Site) -> Iterator[Row]:
    """The trial's folder is renamed and a file put in its place: every put fails, as on a share that went away."""
    bench = site.bench("storage away for a while")
    root = _folder(bench)
    if root is None:
        yield bench.skipped("the storage is no folder")
        return
    folder = root / trial_folder(bench.trial_id)
    aside = folder.with_name(f"{folder.name}-away")

    def leave() -> None:
        folder.rename(aside)
        folder.write_bytes(b"")

    def come_back() -> None:
        folder.unlink()
        aside.rename(folder)

    yield _while_failing(bench, leave, come_back)


@fault("disk full during a save")
def full(site: Site) -> Iterator[Row]:
    """The trial's folder is a small file system of its own, which something else fills."""
    bench = site.bench("disk full during a save")
    root = _folder(bench)
    if root is None:
        yield bench.skipped("the storage is no folder")
        return
    root.mkdir(parents=True)
    try:
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(root)]
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        yield bench.skipped(f"it takes the right to mount a small file system ({said})")
        return
    ballast = root / "ballast"

    def fill() -> None:
        # Room for a half of the next checkpoint, so that a write stops in the middle of it.
        prefix = f"{trial_folder(bench.trial_id)}/checkpoints"
        newest = committed(bench.storage, prefix)[-1:]
        room = sum(bench.storage.size(key) or 0 for name in newest for key in bench.storage.keys(f"{prefix}/{name}"))
        with ballast.open("wb", buffering=0) as file:
            free = max(0, shutil.disk_usage(root).free - room // 2)
            while free > 0:
                try:
                    free -= file.write(bytes(min(free, 2**20)))
                except OSError:  # it is full now
                    break

    try:
        yield _while_failing(bench, fill, ballast.unlink)
    finally:
        subprocess.run(["umount", "--lazy", str(root)], check=True)


@fault("storage answers 500, resets, truncated")
def wrong_answers(site: Site) -> Iterator[Row]:
    """For `outage_s` every request to a bucket is refused, reset, or answered with a part of what it should be."""
    name = "storage answers 500, resets, truncated"
    short = site.bench(name)
    if _folder(short) is None:
        yield short.skipped("the storage is no folder")
        return
    if importlib.util.find_spec("moto") is None:
        yield short.skipped("it takes an S3 server: pip install -c constraints.txt 'moto[server]'")
        return
    bench = site.bench(name, _lasting(short, LONGER * site.outage_s))
    with (
        tempfile.TemporaryDirectory(prefix="helix-chaos-s3-") as folder,
        s3_on_loopback(Path(folder)) as address,
        FaultProxy(os.environ["AWS_ENDPOINT_URL_S3"]) as proxy,
    ):
        os.environ["AWS_ENDPOINT_URL_S3"] = proxy.address
        with Twins() as twins:  # processes of their own, whose environment leads to the proxy
            order = replace(bench.order, storage=address)
            bench = replace(bench, order=order, storage=open_storage(address), twins=twins)
            yield _through_outage(bench, proxy, site.outage_s)


def _lasting(bench: Bench, seconds: float) -> Trial:
    """The trial of the bench with so many epochs that it lasts this long."""
    training = bench.trial.spec.training
    epochs = math.ceil(training.epochs * seconds / (bench.pace.whole_s - bench.pace.start_s))
    return replace(bench.trial, spec=replace(bench.trial.spec, training=replace(training, epochs=epochs)))


def _through_outage(bench: Bench, proxy: FaultProxy, outage_s: float) -> Row:
    """One attempt; from a tenth of it on the storage answers wrongly for `outage_s`."""
    seen = dict.fromkeys(WRONG, 0)
    span: list[float] = []

    def fail() -> None:
        span.append(time.monotonic())
        while time.monotonic() < span[0] + outage_s * (1.0 if all(seen.values()) else LATEST):
            kind = min(WRONG, key=lambda one: seen[one])
            proxy.clear()
            caused = proxy.add(Fault(kind=kind, bytes=10))
            time.sleep(EACH_S)
            seen[kind] += caused.seen
        proxy.clear()
        span.append(time.monotonic())

    failing = threading.Thread(target=fail)

    def watch(_attempt: Attempt, event: dict[str, Any]) -> None:
        if event.get("step", 0) >= bench.steps // 10 and not failing.ident:
            failing.start()

    attempt = bench.twins.run(bench.order, watch=watch)
    failing.join()
    times = [moment for _, moment in attempt.steps if span[0] <= moment <= span[1]]
    problems = [f"no request met {kind}" for kind, count in seen.items() if not count]
    if len(times) < outage_s:  # one a second is far below what such a trial makes
        problems.append("training did not go on")
    if attempt.ended < span[1]:
        problems.append("the trial ended before the storage was back")
    return bench.row(
        [finished(attempt)],
        problem="; ".join(problems),
        aside=f"{outage_s:.0f} s, {sum(seen.values())} requests failed, {len(times)} steps were trained meanwhile",
        seconds=max((later - sooner for sooner, later in itertools.pairwise(times)), default=None),
    )


def _while_failing(bench: Bench, fail: Callable[[], None], mend: Callable[[], None]) -> Row:
    """One attempt; the storage fails from a third of it on, until a checkpoint could not be written."""
    stage, next_step = ["whole"], []

    def watch(attempt: Attempt, event: dict[str, Any]) -> None:
        step = event.get("step")
        if stage == ["whole"] and step is not None and step >= bench.steps // 3:
            fail()
            stage[:] = ["failing"]
        elif step is not None and stage == ["failing"] and not next_step:
            next_step.append(attempt.steps[-1][1] - attempt.steps[-2][1])
        if stage == ["failing"] and FAILED in event.get("warning", ""):
            mend()
            stage[:] = ["mended"]

    attempt = bench.twins.run(bench.order, watch=watch)
    if stage == ["failing"]:
        mend()
    problem = "" if stage == ["mended"] else "no checkpoint failed to be written"
    seconds = next_step[0] if next_step else None
    return bench.row([finished(attempt)], problem=problem, aside="training went on", seconds=seconds)


def _folder(bench: Bench) -> Path | None:
    """The folder of a storage on this machine."""
    scheme, _, rest = bench.order.storage.partition("://")
    return Path(unquote(rest)) if scheme == "file" else None
