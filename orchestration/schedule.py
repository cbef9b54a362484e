"""Re-runs of a grid, for a timer: what changed since the last finished run is said, and only that is run.

    python orchestration/schedule.py --grid esc50 [the options of sweep.py]

A grid in which nothing changed starts no Ray and costs nothing. Two of these at once are safe: they share the trials by
their leases. A re-run that finished leaves reports/<grid>-changes-<date>.json and .md: which cells moved, and whether
that is beyond noise. Exit codes are those of sweep.py.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file, from any directory, whether the package is installed or not
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]

import shlex
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from helix.data.shards import CorruptShardError
from orchestration import sweep
from orchestration.changes import as_json, as_markdown, compare, described, last_key, moved
from orchestration.connection import ClusterError
from orchestration.options import sweep_parser

DONE = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = sweep_parser("schedule.py").parse_intermixed_args(arguments)
    if options.dry_run:
        return sweep.main(arguments)
    console = sweep.console()
    command = ["python", "orchestration/schedule.py", *arguments]
    try:
        planned = sweep.plan_sweep(options, command=command, console=console)
        assert planned is not None
        storage, manifest = planned.storage, planned.recordings.manifest_sha256
        last = storage.get_json(last_key(options.grid))
        changes = compare(planned.plan, planned.snapshot.states(), last, storage, manifest)
    except (ValueError, OSError, ClusterError, CorruptShardError) as error:
        return sweep.refuse(error)
    since = time.strftime(" (%Y-%m-%d %H:%M UTC)", time.gmtime(last["finished"])) if last else ""
    console.print(f"{options.grid}, since the last finished run{since}:", markup=False)
    for line in changes.said or ("nothing changed",):
        console.print(f"  {line}", markup=False)
    record = described(planned.plan, finished=time.time(), command=shlex.join(command))
    if not changes.missing:
        console.print(f"all {len(planned.plan)} trials are done; nothing is run")
        if last is None or changes.said:
            _finished(planned, record, last, changes.said, console)
        return DONE
    code = sweep.main(arguments)
    if code == DONE:
        _finished(planned, record | {"finished": time.time()}, last, changes.said, console)
    return code


def _finished(
    planned: sweep.Sweep,
    record: dict[str, Any],
    last: dict[str, Any] | None,
    said: Sequence[str],
    console: Console,
) -> None:
    """Put the difference report, where there is a run to differ from, and what the next run compares with."""
    view, storage, now = planned.snapshot(), planned.storage, time.time()
    if last is not None:
        cells = moved(view, last, storage, now=now)
        key = f"reports/{view.grid}-changes-{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now))}"
        how = {"select": view.select, "command": record["command"]}
        storage.put_json(f"{key}.json", as_json(view.grid, said, cells, **how, now=now))
        text = as_markdown(view.grid, said, cells, **how)
        storage.put(f"{key}.md", text.encode())
        console.print(f"\nwhat moved: {key}.md in {storage!r}\n{text}", markup=False)
    storage.put_json(last_key(view.grid), record)


if __name__ == "__main__":
    sys.exit(main())
