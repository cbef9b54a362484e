"""Processes killed with SIGKILL, at random and on purpose: a certificate for each variant."""

from collections.abc import Iterator

from orchestration.certify import BIT_EXACT, certify
from orchestration.fault import Row, Site, fault


@fault("process killed")
def killed(site: Site) -> Iterator[Row]:
    """As many kills as the site asks for, dealt over its variants, each of which has moments of its own."""
    each, more = divmod(site.kills, len(site.trials))
    for number, trial in enumerate(site.trials):
        kills = each + (number < more)
        if not kills:
            continue
        certificate = certify(
            trial,
            site.recordings,
            site.storage,
            grid=site.grid,
            kills=kills,
            seed=site.seed + number,
            twins=site.twins,
            say=lambda line, label=trial.label: site.say(f"{label}: {line}"),
        )
        landed = certificate["kills"]
        waits = [kill["seconds_to_next_step"] for kill in landed if kill["seconds_to_next_step"] is not None]
        yield Row(
            fault="process killed",
            trial=trial.label,
            count=len(landed),
            steps_lost=certificate["steps_lost"],
            seconds_to_next_step=max(waits, default=None),
            verdict=certificate["verdict"],
            passed=certificate["verdict"] == BIT_EXACT and len(landed) == kills,
        )
