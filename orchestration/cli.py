"""The console script `helix`: sweep, report, prepare, certify and restart under one name."""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from helix.data.shards import CorruptShardError
from helix.protocol import PROFILES
from helix.registry import DATASETS
from helix.spec import TrialSpec, apply_overrides
from orchestration import sweep
from orchestration.certify import BIT_EXACT, certificate_table, certify
from orchestration.connection import ClusterError
from orchestration.grid import GRIDS, PRESETS, expand, load_grid
from orchestration.ledger import CERTIFICATES
from orchestration.plan import check_trials, make_plan
from orchestration.preprocessing import prepared_data
from orchestration.restart import restart
from orchestration.twin import TwinError, Twins


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
        ("certify", "kill a trial again and again, and show what that changes in it"),
        ("restart", "give up the checkpoints of a trial, so that it is trained from step 0"),
    ):
        commands.add_parser(name, help=about, add_help=False)
    chosen, rest = parser.parse_known_args(arguments[:1])[0].command, arguments[1:]
    if chosen in COMMANDS:
        return COMMANDS[chosen](rest)
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


def certify_grid(arguments: Sequence[str]) -> int:
    """`helix certify --grid demo --kills 12 --seed 0`. Returns 0 where the twin ended bit-exact, 1 where not."""
    parser = argparse.ArgumentParser(
        prog="helix certify",
        description="Train one trial of a grid undisturbed and a twin that is killed again and again, and compare.",
    )
    parser.add_argument("--grid", required=True, help=f"known: {', '.join(GRIDS.names())}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for a sweep, e.g. training.epochs=4")
    parser.add_argument("--kills", type=int, default=12, help="how often the twin is killed (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="what draws the moments of the kills (default: 0)")
    parser.add_argument("--variant", help="which variant of the grid (default: its first)")
    parser.add_argument("--fold", type=int, help="which fold (default: the grid's first)")
    parser.add_argument("--profile", default="paper", help=f"known: {', '.join(PROFILES)}")
    parser.add_argument("--preset", help=f"model size, in place of the grid's: {', '.join(PRESETS)}")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process (default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what to train on (default: cpu)")
    sweep.add_data_arguments(parser)
    given = parser.parse_intermixed_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    try:
        trial = expand(
            load_grid(given.grid),
            profile_name=given.profile,
            overrides=given.overrides,
            preset=given.preset,
            folds=None if given.fold is None else [given.fold],
            variants=None if given.variant is None else [given.variant],
        )[0]
        check_trials([trial])
        storage, storage_named = sweep.chosen_storage(given)
        storage.check_writable()
        recordings = prepared_data(
            trial.spec.data,
            source=given.source,
            storage=storage,
            storage_named=storage_named,
            allow_partial=given.allow_partial,
            say=console.print,
        )
        make_plan([trial], recordings)
        with Twins() as twins:
            certificate = certify(
                trial,
                recordings,
                storage,
                grid=given.grid,
                kills=given.kills,
                seed=given.seed,
                twins=twins,
                device=given.device,
                threads=given.threads,
                say=lambda line: console.print(line, markup=False),
            )
    except (ValueError, OSError, RuntimeError, TwinError, ClusterError, CorruptShardError) as error:
        return sweep.refuse(error)
    except KeyboardInterrupt:
        return sweep.INTERRUPTED
    console.print(certificate_table(certificate))
    place = f"{CERTIFICATES}/{certificate['certificate_id']}"
    console.print(f"certificate: {place}.json in {storage!r}", markup=False)
    if certificate["verdict"] == BIT_EXACT:
        return 0
    console.print(f"what the two runs left is in {place}/", markup=False)
    return sweep.SOME_FAILED


def restart_trial(arguments: Sequence[str]) -> int:
    """`helix restart TRIAL_ID`."""
    parser = argparse.ArgumentParser(
        prog="helix restart",
        description="Move the checkpoints and rows of a trial aside, so that the next sweep trains it from step 0.",
    )
    parser.add_argument("trial_id", help="as the report and `trials/` in the storage name it")
    parser.add_argument("--storage", help="the folder that holds the trial (default: HELIX_STORAGE, or ./runs)")
    given = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    try:
        storage, _ = sweep.chosen_storage(given)
        restart(storage, given.trial_id, say=lambda line: console.print(line, markup=False))
    except (ValueError, OSError) as error:
        return sweep.refuse(error)
    return 0


#: The commands that are no form of a sweep.
COMMANDS = {"prepare": prepare, "certify": certify_grid, "restart": restart_trial}
