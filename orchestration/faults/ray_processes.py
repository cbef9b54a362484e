"""Processes of a sweep on Ray that are killed: its worker, its drivers, the controller between them."""

from collections.abc import Iterator
from typing import Any

from orchestration.fault import Row, Site, fault
from orchestration.stage import Stage, beside

#: How often a worker is killed, beside one that does nothing.
TIMES = 3


@fault("worker killed, beside a bare trainer's", where="ray")
def worker(site: Site) -> Iterator[Row]:
    """What Ray takes to start a worker again is measured on the same machines, and taken off."""
    with Stage(site, "worker killed, beside a bare trainer's") as stage:
        for _ in range(TIMES):
            stage.strike(lambda beat: stage.worker(beat).kill())
        stage.finish()
        said, problem = beside(stage.waits, stage.bare(TIMES))
        stage.problems += filter(None, [problem])
        yield stage.row(said)


@fault("trial driver killed", where="ray")
def trial_driver(site: Site) -> Iterator[Row]:
    with Stage(site, "trial driver killed") as stage:
        stage.strike(lambda _beat: stage.process("ray::ImplicitFunc").kill())
        yield stage.row()


@fault("Train controller killed", where="ray")
def controller(site: Site) -> Iterator[Row]:
    with Stage(site, "Train controller killed") as stage:
        stage.strike(lambda _beat: stage.process("ray::TrainController").kill())
        yield stage.row()


@fault("sweep driver killed, command run again", where="ray")
def sweep_driver(site: Site) -> Iterator[Row]:
    with Stage(site, "sweep driver killed, command run again") as stage:

        def again(_beat: dict[str, Any]) -> None:
            stage.sweep.kill()
            stage.sweep = stage.start()

        stage.strike(again)
        yield stage.row()
