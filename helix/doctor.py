"""What works on this machine and what does not, found by trying it; and what to do about the rest.

    helix doctor
    python -m helix.doctor     # the same where Ray or MLflow cannot even be imported

A check is a function in a file under checks/, registered in CHECKS: Asked -> Checks. Exit code: 0 a sweep can run
here, 1 something that it needs does not work.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from helix.registry import CHECKS

Status = Literal["ok", "warn", "fail", "absent"]

COLOURS: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "red", "absent": "dim"}

SOMETHING_FAILED = 1

#: Columns of a table that goes to a file or a pipe.
PLAIN_WIDTH = 150


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at: what was found and, unless it is ok, what to do.

    `needed`: whether no sweep can run here while it fails.
    """

    name: str
    status: Status
    found: str
    advice: str = ""
    needed: bool = False


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the user wants to be looked at. `rehearse_ray` starts and stops a local Ray and says what it had."""

    storage: str
    rehearse_ray: Callable[[], str] | None = None


def examine(asked: Asked) -> list[Check]:
    """All checks, in the order of their files' names. A check that breaks is a finding and stops no other."""
    found: list[Check] = []
    for name in CHECKS.names():
        try:
            found += CHECKS[name](asked)
        except Exception as error:
            said = f"the check broke: {type(error).__name__}: {error}"
            advice = "this is a fault of the check; report it with this line and the other rows"
            found.append(Check(name=name, status="fail", found=said, advice=advice))
    return found


def exit_code(checks: Iterable[Check]) -> int:
    return SOMETHING_FAILED if any(check.needed and check.status == "fail" for check in checks) else 0


def table(checks: Iterable[Check]) -> Table:
    """The checks as a table that a terminal of any width can wrap."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column, share in (("check", 2), ("", None), ("found", 3), ("what to do", 4)):
        made.add_column(column, ratio=share, overflow="fold")
    for check in checks:
        colour = COLOURS[check.status]
        made.add_row(check.name, f"[{colour}]{check.status}[/]", _plain(check.found), _plain(check.advice))
    return made


def main(arguments: Sequence[str] | None = None, *, rehearse_ray: Callable[[], str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="helix doctor", description="What works here, and what to do about the rest.")
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    parser.add_argument(
        "--storage",
        default=os.environ.get("HELIX_STORAGE", "runs"),
        help="where results would go: must be writable (default: HELIX_STORAGE or ./runs)",
    )
    if rehearse_ray is not None:
        parser.add_argument("--ray", action="store_true", help="start a local Ray, run a task, stop it")
    given: Any = parser.parse_args(arguments)
    wants_ray = rehearse_ray is not None and given.ray
    checks = examine(Asked(storage=given.storage, rehearse_ray=rehearse_ray if wants_ray else None))
    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    if given.json:
        console.file.write(json.dumps([dataclasses.asdict(check) for check in checks], indent=2) + "\n")
        return exit_code(checks)
    console.print(table(checks))
    console.print(verdict(checks))
    return exit_code(checks)


def verdict(checks: Sequence[Check]) -> str:
    """The last line: whether a sweep can run here, and how many checks ended how."""
    counts = {status: sum(check.status == status for check in checks) for status in COLOURS}
    can = "a sweep cannot run here" if exit_code(checks) else "a sweep can run here"
    return f"{can}: " + ", ".join(f"{count} {status}" for status, count in counts.items() if count)


def _plain(text: str) -> str:
    """Text whose brackets rich leaves alone."""
    return text.replace("[", r"\[")


if __name__ == "__main__":
    sys.exit(main())
