"""Machines of a cluster that go away: without a word, with a notice, in order, and the head with all on it."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from orchestration.fault import Row, Site, fault
from orchestration.machines import Machines, Node, until
from orchestration.stage import Stage

#: Seconds that a drained node is given, and how much later it really ends.
DEADLINE_S, LATER_S = 12, 2.0


@fault("node killed without notice", where="ray")
def killed(site: Site) -> Iterator[Row]:
    """Its replacement is started after it is gone; that it takes to join is part of the wait."""
    with Stage(site, "node killed without notice") as stage:
        joined: list[float] = []

        def kill(_beat: dict[str, Any]) -> None:
            began = time.monotonic()
            stage.nodes[0].kill()
            stage.nodes.append(stage.machines.node())
            joined.append(time.monotonic() - began)

        stage.strike(kill)
        yield stage.row(f"a replacement joined after {joined[0]:.1f} s")


@fault("node drained, dead at its deadline", where="ray")
def drained(site: Site) -> Iterator[Row]:
    with Stage(site, "node drained, dead at its deadline", nodes=2) as stage:
        said = noticed(stage, lambda doomed: drain(stage, doomed))
        yield stage.row(said)


@fault("SIGTERM of a node", where="ray")
def terminated(site: Site) -> Iterator[Row]:
    """Ray drains the node by itself and ends it; the worker has heard of it by then."""
    with Stage(site, "SIGTERM of a node", nodes=2) as stage:

        def terminate(doomed: Node) -> Callable[[], float]:
            doomed.terminate()

            def end() -> float:
                until(doomed.process.poll, "the node ends")
                return time.monotonic()

            return end

        yield stage.row(noticed(stage, terminate))


@fault("head killed, command run on a new cluster", where="ray")
def head(site: Site) -> Iterator[Row]:
    """With the head go its trial drivers and controllers; the sweep's own driver runs there too, as a Ray job does."""
    with Stage(site, "head killed, command run on a new cluster") as stage, Machines() as second:
        stage.nodes.append(second.node())

        def kill(_beat: dict[str, Any]) -> None:
            stage.machines.head.kill()
            stage.sweep.kill()
            stage.sweep = stage.start(second)

        stage.strike(kill)
        yield stage.row("the old node was left to end by itself")


def drain(stage: Stage, doomed: Node, *, seconds: int = DEADLINE_S) -> Callable[[], float]:
    """Drain a node with a deadline. Returns what kills it a little after that, and says when the deadline was."""
    deadline = time.monotonic() + seconds
    stage.machines.drain(doomed, seconds)

    def end() -> float:
        time.sleep(max(0.0, deadline + LATER_S - time.monotonic()))
        doomed.kill()
        return deadline

    return end


def noticed(stage: Stage, notify: Callable[[Node], Callable[[], float]]) -> str:
    """Strike with a notice. No step that was finished when it came may be trained again. Returns what was seen.

    `notify` gives the notice to a node, and returns what ends it: that returns the moment of its end.
    """
    said: list[str] = []

    def cause(beat: dict[str, Any]) -> float:
        doomed = stage.node_of(stage.worker(beat))
        end, began = notify(doomed), time.monotonic()
        saved = until(lambda: stage.saved() if stage.saved() >= beat["step"] else None, "a checkpoint on the notice")
        said.append(f"noticed at step {beat['step']}, saved at {saved} after {time.monotonic() - began:.1f} s")
        if not stage.machines.logged("a checkpoint is made at this step"):
            stage.problems.append("the worker heard of no notice")
        moment = end()
        last = stage.beat()
        if last["attempt_id"] == beat["attempt_id"]:
            said.append(f"trained on to {last['step']}")
        return moment

    stage.strike(cause)
    if stage.lost[-1]:
        stage.problems.append(f"{stage.lost[-1]} steps before the notice were trained again")
    return ", ".join([*said, f"went on from {stage.from_step}"])
