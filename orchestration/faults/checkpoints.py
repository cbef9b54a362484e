"""Checkpoints damaged where they lie: the newest one in three ways, and all of them."""

from collections.abc import Callable, Iterator

from helix.training.checkpoint import committed
from helix.training.trainer import trial_folder
from orchestration.certify import finished
from orchestration.fault import Bench, Row, Site, fault
from orchestration.restart import restart
from orchestration.twin import ANY_TIME, Attempt, Moment


@fault("newest checkpoint with a flipped bit")
def flipped(site: Site) -> Iterator[Row]:
    yield _after_damage(site.bench("newest checkpoint with a flipped bit"), _flip)


@fault("newest checkpoint truncated")
def truncated(site: Site) -> Iterator[Row]:
    def truncate(bench: Bench, folder: str) -> None:
        key = f"{folder}/optimizer.safetensors"
        data = bench.storage.get(key)
        bench.storage.put(key, data[: len(data) // 2])

    yield _after_damage(site.bench("newest checkpoint truncated"), truncate)


@fault("newest checkpoint without its manifest")
def without_manifest(site: Site) -> Iterator[Row]:
    def lose(bench: Bench, folder: str) -> None:
        bench.storage.delete(f"{folder}/manifest.json")

    yield _after_damage(site.bench("newest checkpoint without its manifest"), lose)


@fault("every checkpoint damaged")
def none_valid(site: Site) -> Iterator[Row]:
    """The trial must refuse, name each of them, and train again once that is asked for by hand."""
    bench = site.bench("every checkpoint damaged")
    attempts, folders = _interrupted(bench)
    for folder in folders:
        _flip(bench, folder)
    refused = bench.twins.run(bench.order)
    said = refused.error or "nothing"
    named = all(part in said for part in ("CheckpointError", "helix restart", *(_name(folder) for folder in folders)))
    restart(bench.storage, bench.trial_id, say=site.say)
    attempts.append(finished(bench.twins.run(bench.order)))
    problem = "" if refused.status == 1 and named and not refused.steps else f"it did not refuse but said {said}"
    aside = f"after it refused with the list of {len(folders)} and `helix restart` was called"
    yield bench.row(attempts, problem=problem, aside=aside)


def _after_damage(bench: Bench, damage: Callable[[Bench, str], None]) -> Row:
    """Kill, damage the newest checkpoint, go on: that must be from the one before it."""
    attempts, (*_, older, newest) = _interrupted(bench)
    damage(bench, newest)
    attempts.append(finished(bench.twins.run(bench.order)))
    wanted, got = int(_name(older).removeprefix("step-")), attempts[-1].from_step
    return bench.row(attempts, problem="" if got == wanted else f"it went on from step {got}, not from {wanted}")


def _interrupted(bench: Bench) -> tuple[list[Attempt], list[str]]:
    """An attempt that was killed after two thirds of the trial, and the folders of the checkpoints that it left."""
    attempt = bench.twins.run(bench.order, kill_at=Moment(name=ANY_TIME, step=bench.steps * 2 // 3))
    prefix = f"{trial_folder(bench.trial_id)}/checkpoints"
    return [attempt], [f"{prefix}/{name}" for name in committed(bench.storage, prefix)]


def _flip(bench: Bench, folder: str) -> None:
    """Flip one bit in the middle of the weights."""
    data = bytearray(bench.storage.get(f"{folder}/model.safetensors"))
    data[len(data) // 2] ^= 1
    bench.storage.put(f"{folder}/model.safetensors", bytes(data))


def _name(folder: str) -> str:
    return folder.rpartition("/")[2]
