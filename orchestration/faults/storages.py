"""A storage that fails for a while under a running trial: it must go on training, and lose nothing."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from helix.training.trainer import trial_folder
from orchestration.certify import finished
from orchestration.fault import Bench, Row, Site, fault
from orchestration.twin import Attempt

#: What the trainer says of a checkpoint that it could not write.
FAILED = "could not be written"

DISK_MIB = 64


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
    """The trial's folder is a small file system of its own, and something else fills it to the last byte."""
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
        with ballast.open("wb", buffering=0) as file:
            free = shutil.disk_usage(root).free
            while free:
                try:
                    free -= file.write(bytes(min(free, 2**20)))
                except OSError:  # it is full now
                    break

    try:
        yield _while_failing(bench, fill, ballast.unlink)
    finally:
        subprocess.run(["umount", "--lazy", str(root)], check=True)


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
