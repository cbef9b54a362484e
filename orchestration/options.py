"""The options that commands share, and those of a sweep."""

import argparse
import os
from pathlib import Path

from helix.protocol import PROFILES
from helix.storage import Storage, open_storage
from orchestration.grid import GRIDS, PRESETS


def sweep_parser(prog: str = "sweep.py") -> argparse.ArgumentParser:
    """The options of a sweep."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Run a grid: train what is missing, track it, and compare. Running it again continues it.",
    )
    add_trial_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--verbose", action="store_true", help="show what Ray says as well")
    parser.add_argument("--workers", type=int, help="how many trials train at once (default: what the machines hold)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each worker (default: 1)")
    parser.add_argument(
        "--memory-gib",
        type=float,
        metavar="GIB",
        help="what one worker may hold; batches are cut to fit (default: this machine's share, or its GPU)",
    )
    parser.add_argument(
        "--gpus-per-trial",
        type=gpu_share,
        default=None,
        metavar="SHARE",
        help="the share of a GPU that a worker has, so that several run side by side on one (default: auto, what each "
        "trial needs of the smallest GPU on offer)",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        metavar="N",
        help="train each trial on N GPUs of one machine (on a CPU: in N processes of --threads each); every batch is "
        "shared among them and stays what it is (default: 1)",
    )
    parser.add_argument("--budget-usd", type=float, metavar="USD", help="stop once this run has cost so much")
    parser.add_argument("--deadline", metavar="TIME", help="stop at this time, UTC, e.g. 2026-12-01T08:00")
    parser.add_argument("--hours", type=float, help="stop after so many hours")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="what a trial trains on (default: cpu)"
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="take kernels that give the same bits again, which some of CUDA's do not; a CPU's always do",
    )
    return parser


def report_parser() -> argparse.ArgumentParser:
    """The options of a report on what is stored, each of which is one of a sweep too."""
    parser = argparse.ArgumentParser(
        prog="helix report",
        description="The report of what was asked of a grid last, as it stands now; nothing is trained. Options that "
        "say which trials (key=value, --profile, --preset, --folds, --seeds, --variants) ask for those of the grid's "
        "file instead.",
        allow_abbrev=False,  # what is short for one option here may be short for two of a sweep
    )
    add_trial_arguments(parser)
    parser.set_defaults(profile=None)  # to tell whether it was given
    return parser


def add_trial_arguments(parser: argparse.ArgumentParser) -> None:
    """Which trials of a grid are meant, the data that they are of, and what machines cost."""
    parser.add_argument("--grid", required=True, help=f"the question to ask; known: {', '.join(GRIDS.names())}")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. training.epochs=20 protocol.mel_pad=floor"
    )
    parser.add_argument(
        "--profile", default="paper", help=f"the setting of all protocol switches: {', '.join(PROFILES)}"
    )
    parser.add_argument("--preset", help=f"model size, in place of the grid's: {', '.join(PRESETS)}")
    parser.add_argument("--folds", type=numbers, metavar="1,2", help="these folds instead of the grid's")
    parser.add_argument("--seeds", type=numbers, metavar="0,1", help="these seeds instead of the grid's")
    parser.add_argument(
        "--variants", type=names, metavar="NAME,...", help="these variants only, e.g. mamba-raw,helix-raw"
    )
    add_data_arguments(parser)
    parser.add_argument(
        "--prices", type=Path, metavar="PATH", help="what machines cost an hour (default: cluster/prices.yaml)"
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command needs that touches a data set."""
    parser.add_argument(
        "--storage",
        help="the folder or s3://bucket/prefix that holds data, trials and reports (default: HELIX_STORAGE or ./runs)",
    )
    parser.add_argument("--source", type=Path, help="the folder of the data set's own files, to prepare it from")
    parser.add_argument("--allow-partial", action="store_true", help="accept a data set that is not complete")
    parser.add_argument(
        "--quarantine",
        type=int,
        default=0,
        metavar="N",
        help="leave out up to N files that cannot be used (default: 0)",
    )


def chosen_storage(options: argparse.Namespace) -> tuple[Storage, bool]:
    """The storage, and whether the user named it: with --storage, with HELIX_STORAGE, or else ./runs."""
    named = options.storage or os.environ.get("HELIX_STORAGE")
    return open_storage(named or "runs"), bool(named)


def numbers(text: str) -> list[int]:
    """Whole numbers from a list such as 1,2; argparse tells the user where it is none."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 1,2") from error


def gpu_share(text: str) -> float | None:
    """A number, or None for auto; argparse tells the user where it is neither."""
    try:
        return None if text == "auto" else float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a share of a GPU such as 0.5 nor auto") from error


def names(text: str) -> list[str]:
    """Names from a list with commas."""
    return text.split(",")
