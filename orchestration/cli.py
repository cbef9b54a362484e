"""The console script `helix`: everything under one name."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from helix import bench, doctor
from helix.data.dataset import Dataset, DatasetError
from helix.data.download import DownloadError, fetch_all
from helix.data.shards import CorruptShardError
from helix.registry import DATASETS
from helix.spec import TrialSpec, apply_overrides
from orchestration import sweep
from orchestration.connection import ClusterError, rehearse
from orchestration.preprocessing import described, prepare_with_ray, refuse_needless, summary
from orchestration.progress import ProgressDisplay
from orchestration.verification import verify_storage


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
        ("verify", "read back everything that is stored and list what is damaged"),
        ("doctor", "what works on this machine, found by trying it, and what to do about the rest"),
        ("bench", "time and weigh a part beside implementations by others"),
    ):
        commands.add_parser(name, help=about, add_help=False)
    chosen, rest = parser.parse_known_args(arguments[:1])[0].command, arguments[1:]
    if chosen == "prepare":
        return prepare(rest)
    if chosen == "verify":
        return verify(rest)
    if chosen == "bench":
        return bench.main(rest)
    if chosen == "doctor":
        return doctor.main(rest, rehearse_ray=rehearse)
    return sweep.main(rest, train_missing=chosen == "sweep")


def prepare(arguments: Sequence[str]) -> int:
    """`helix prepare esc50 --source DIR`."""
    parser = argparse.ArgumentParser(
        prog="helix prepare",
        description="Decode a data set into shards. Killed and run again it goes on; done, it verifies and repairs.",
    )
    parser.add_argument("dataset", help=f"known: {', '.join(DATASETS.names())}")
    parser.add_argument(
        "options", nargs="*", metavar="key=value", help="options of the data set, e.g. clips_per_class=20"
    )
    sweep.add_data_arguments(parser)
    parser.add_argument("--shard-mib", type=float, default=64, metavar="MIB", help="size of a shard (default: 64)")
    parser.add_argument("--workers", type=int, metavar="N", help="tasks at once (default: what the machines hold)")
    parser.add_argument(
        "--download",
        action="store_true",
        help="fetch the official files into --source (default: ./downloads), verify and unpack them, and prepare those",
    )
    given = parser.parse_intermixed_args(arguments)
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True, markup=False)
    try:
        base = apply_overrides(TrialSpec(), {"data.dataset": given.dataset})
        data = apply_overrides(base, [f"data.options.{option}" for option in given.options]).data
        dataset: Dataset = DATASETS.make(data.dataset, data.options)
        storage, storage_named = sweep.chosen_storage(given)
        storage.check_writable()
        with ProgressDisplay(console) as progress:
            source = given.source
            if given.download:
                source = download(data.dataset, dataset, source or Path("downloads"), console, progress)
            refuse_needless(source, dataset, data.dataset)
            prepared = prepare_with_ray(
                data,
                source=source,
                storage=storage,
                storage_named=storage_named,
                allow_partial=given.allow_partial,
                quarantine=given.quarantine,
                shard_mib=given.shard_mib,
                workers=given.workers,
                watch=progress.watch,
            )
    except DatasetError as error:  # all of it: who mends a source wants to see every file at once
        print("\n  ".join([f"refused: {error.subject}", *error.problems]), file=sys.stderr)  # noqa: T201
        return sweep.REFUSED
    except (ValueError, OSError, ClusterError, CorruptShardError, DownloadError) as error:
        return sweep.refuse(error)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on where this one stopped")
        return sweep.INTERRUPTED
    console.print(f"prepared: {summary(prepared)}")
    for line in described(storage, prepared):
        console.print(f"  {line}")
    return 0


def download(name: str, dataset: Dataset, folder: Path, console: Console, progress: ProgressDisplay) -> Path:
    """Fetch the official files of a data set into `folder`; the source that they make. The licence is shown first."""
    downloads = dataset.downloads
    if not downloads:
        raise ValueError(
            f"{name} cannot be downloaded by this command; get it at {dataset.url} and name its folder with --source"
        )
    console.print(f"{name}: {dataset.licence} ({dataset.url})")
    for item in downloads:
        console.print(f"  {item.url}")
    return fetch_all(name, downloads, folder.resolve(), on_bytes=progress.on_bytes)


def verify(arguments: Sequence[str]) -> int:
    """`helix verify`: exit code 0 where everything is as it was written, 1 where something is damaged."""
    parser = argparse.ArgumentParser(
        prog="helix verify", description="Read back everything that is stored and list what is damaged."
    )
    parser.add_argument("dataset", nargs="?", help="only this data set (default: all data, trials and checkpoints)")
    parser.add_argument("--storage", help="where everything is kept (default: HELIX_STORAGE, or ./runs)")
    given = parser.parse_args(arguments)
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True, markup=False)
    try:
        if given.dataset is not None and given.dataset not in DATASETS.names():
            raise ValueError(f"unknown data set {given.dataset!r}; known: {', '.join(DATASETS.names())}")
        storage, _ = sweep.chosen_storage(given)
        found = verify_storage(storage, given.dataset)
    except (ValueError, OSError) as error:
        return sweep.refuse(error)
    for line in found.sound:
        console.print(f"whole    {line}")
    for line in found.unfinished:
        console.print(f"open     {line}")
    for line in found.damaged:
        console.print(f"damaged  {line}")
    if not found.sound and not found.unfinished and not found.damaged:
        console.print(f"nothing is stored in {storage!r}")
    if found.damaged:
        console.print(
            "what to do: helix prepare DATASET --source DIR mends data; a sweep passes over a damaged checkpoint and "
            "takes an older one; a trial whose spec or result is damaged has to be deleted and run again"
        )
    return 1 if found.damaged else 0
