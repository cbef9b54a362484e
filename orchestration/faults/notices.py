"""A notice that the machine goes away: SIGTERM, and SIGKILL once a checkpoint was made."""

from collections.abc import Iterator
from signal import SIGTERM
from typing import Any

from helix.training.checkpoint import committed
from helix.training.trainer import trial_folder
from orchestration.certify import finished
from orchestration.fault import Row, Site, fault
from orchestration.twin import Attempt

#: Nothing but the notice makes a checkpoint within an epoch.
NEVER_S = 3600.0


@fault("SIGTERM as notice, then SIGKILL")
def noticed(site: Site) -> Iterator[Row]:
    """No step that was finished when the notice came may be trained again."""
    bench = site.bench("SIGTERM as notice, then SIGKILL", most_s=NEVER_S)
    prefix = f"{trial_folder(bench.trial_id)}/checkpoints"
    told: list[int] = []

    def watch(attempt: Attempt, event: dict[str, Any]) -> None:
        if "step" not in event:
            return
        if not told and event["step"] > bench.steps // 2:
            told.append(event["step"])
            attempt.kill(SIGTERM)
        elif told and committed(bench.storage, prefix)[-1:] >= [f"step-{told[0]:08d}"]:
            attempt.kill()

    first = bench.twins.run(bench.order, watch=watch)
    second = finished(bench.twins.run(bench.order))
    kept = second.from_step or 0
    lost = max(0, told[0] - kept) if told else 0
    problem = "" if first.killed and lost == 0 else f"{lost} steps before the notice were trained again"
    aside = f"noticed at step {told[0]}, saved at {kept}, killed at {first.step}" if told else ""
    yield bench.row([first, second], problem=problem, aside=aside, steps_lost=lost)
