"""The console script `helix`: sweep, report, prepare, doctor and bench under one name."""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from helix import bench, doctor
from helix.data.shards import CorruptShardError
from helix.registry import DATASETS
from helix.spec import TrialSpec, apply_overrides
from orchestration import sweep
from orchestration.connection import ClusterError, rehearse
from orchestration.preprocessing import prepared_data


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit codes are those of orchestration/sweep.py."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="helix", description="Which audio model is better, and is the difference real?"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (
        ("sweep", "train what a grid lacks, track it, and compare (the same as orchestration/sweep.py)"),
        ("report", "write the report of a grid from what is stored now, without training"),
        ("prepare", "decode a data set into shards"),
        ("doctor", "what works on this machine, found by trying it, and what to do about the rest"),
        ("bench", "time and weigh a part beside implementations by others"),
    ):
        commands.add_parser(name, help=about, add_help=False)
    chosen, rest = parser.parse_known_args(arguments[:1])[0].command, arguments[1:]
    if chosen == "prepare":
        return prepare(rest)
    if chosen == "bench":
        return bench.main(rest)
    if chosen == "doctor":
        return doctor.main(rest, rehearse_ray=rehearse)
    return sweep.main(rest, train_missing=chosen == "sweep")


def prepare(arguments: Sequence[str]) -> int:
    """`helix prepare esc50 --source DIR`."""
    parser = argparse.ArgumentParser(prog="helix prepare", description="Decode a data set into shards.")
    parser.add_argument("dataset", help=f"known: {', '.join(DATASETS.names())}")
    parser.add_argument(
        "options", nargs="*", metavar="key=value", help="options of the data set, e.g. clips_per_class=20"
    )
    sweep.add_data_arguments(parser)
    given = parser.parse_intermixed_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    try:
        base = apply_overrides(TrialSpec(), {"data.dataset": given.dataset})
        spec = apply_overrides(base, [f"data.options.{option}" for option in given.options])
        storage, storage_named = sweep.chosen_storage(given)
        storage.check_writable()
        prepared_data(
            spec.data,
            source=given.source,
            storage=storage,
            storage_named=storage_named,
            allow_partial=given.allow_partial,
            say=console.print,
        )
    except (ValueError, OSError, ClusterError, CorruptShardError) as error:
        return sweep.refuse(error)
    return 0
