"""Recordings -> shards as Ray tasks, and which prepared data a sweep reads."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray

from helix.data.dataset import Dataset, listed_index
from helix.data.shards import Prepared, Recordings, check_source, find, open_prepared, prepare
from helix.registry import DATASETS
from helix.spec import DataSpec
from helix.storage import Storage
from orchestration.connection import connect
from orchestration.grid import Trial


def prepare_with_ray(
    data: DataSpec, *, source: Path | None, storage: Storage, storage_named: bool, allow_partial: bool
) -> Prepared:
    """Prepare a data set, one Ray task per shard. What is prepared already and verifies is left alone."""

    def run(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        todo = list(items)
        if len(todo) < 2:
            return map(function, todo)
        connect(storage_named=storage_named)
        task = ray.remote(function)
        return iter(ray.get([task.remote(item) for item in todo]))

    return prepare(data.dataset, data.options, source=source, storage=storage, allow_partial=allow_partial, run=run)


def prepared_data(
    data: DataSpec,
    *,
    source: Path | None,
    storage: Storage,
    storage_named: bool,
    allow_partial: bool,
    say: Callable[[str], None],
) -> Recordings:
    """The prepared recordings that a sweep of `data` reads: prepared now from `source`, or found in storage.

    A data set that is made on the fly needs no source. Raises ValueError where nothing is prepared and no source is
    given, where what is prepared is partial and that was not allowed, or where it is not clear which one is meant.
    """
    dataset: Dataset = DATASETS.make(data.dataset, data.options)
    _refuse_needless(source, dataset, data.dataset)
    if source is not None or not dataset.needs_source:
        prepared = prepare_with_ray(
            data, source=source, storage=storage, storage_named=storage_named, allow_partial=allow_partial
        )
    else:
        prepared = _found(data, dataset, storage, allow_partial=allow_partial)
    manifest = prepared.manifest
    expected = manifest["expected_recordings"]
    part = f"{f', of {expected}' if expected else ''} (a partial set)" if manifest["partial"] else ""
    say(
        f"data: {data.dataset}, {manifest['recordings']} recordings{part}, {manifest['seconds'] / 60:.1f} minutes, "
        f"{len(manifest['classes'])} classes, in {prepared.prefix}"
    )
    return open_prepared(storage, prepared.prefix)


def check_listing(trials: Sequence[Trial], *, source: Path | None, allow_partial: bool) -> None:
    """Refuse what the metadata of a source shows already, before anything is decoded: no such fold, no full batch."""
    data = trials[0].spec.data
    dataset: Dataset = DATASETS.make(data.dataset, data.options)
    _refuse_needless(source, dataset, data.dataset)
    if source is None and dataset.needs_source:
        return
    listing = check_source(data.dataset, data.options, source=source, allow_partial=allow_partial)
    index = listed_index(listing.recordings)
    for trial in trials:
        size = trial.spec.training.batch_size
        rows = dataset.split(index, fold=trial.spec.data.fold, protocol=trial.spec.protocol)
        if dataset.clip_per_recording and len(rows.train) < size:
            raise ValueError(
                f"{trial.label}: {len(rows.train)} training clips do not fill one batch of {size}; lower "
                "training.batch_size"
            )


def rehearsed_data(data: DataSpec, *, source: Path | None, storage: Storage, allow_partial: bool) -> Recordings | None:
    """The same recordings without writing to `storage`, for a plan; None where only a preparation could tell.

    Raises what `prepared_data` would raise, as far as that can be known without decoding.
    """
    dataset: Dataset = DATASETS.make(data.dataset, data.options)
    _refuse_needless(source, dataset, data.dataset)
    if source is not None:
        check_source(data.dataset, data.options, source=source, allow_partial=allow_partial)
    if dataset.needs_source:
        found = find(storage, data.dataset, data.options)
        return (
            open_prepared(storage, _found(data, dataset, storage, allow_partial=allow_partial).prefix)
            if found
            else None
        )
    with tempfile.TemporaryDirectory(prefix="helix-plan-") as folder:
        aside = Storage(Path(folder))
        # A plan reads the index alone, which is in memory once it is opened.
        return open_prepared(aside, prepare(data.dataset, data.options, source=None, storage=aside).prefix)


def _refuse_needless(source: Path | None, dataset: Dataset, name: str) -> None:
    if source is not None and not dataset.needs_source:
        raise ValueError(f"{name} is made on the fly and takes no --source; leave it out")


def _found(data: DataSpec, dataset: Dataset, storage: Storage, *, allow_partial: bool) -> Prepared:
    """The one set in storage that may be used: the complete one, or with `allow_partial` the only one."""
    found = find(storage, data.dataset, data.options)
    complete = [prepared for prepared in found if not prepared.manifest["partial"]]
    usable = complete or (found if allow_partial else [])
    if not found:
        raise ValueError(
            f"{data.dataset} is not prepared in {storage!r}; name the folder of its files with --source "
            f"(they come from {dataset.url})"
        )
    if not usable:
        counts = ", ".join(
            f"{p.manifest['recordings']} of {p.manifest['expected_recordings'] or 'an unknown number of'}"
            for p in found
        )
        raise ValueError(f"only a part of {data.dataset} is prepared ({counts} recordings); --allow-partial accepts it")
    if len(usable) > 1:
        listed = ", ".join(f"{p.prefix} ({p.manifest['recordings']} recordings)" for p in usable)
        raise ValueError(
            f"{data.dataset} is prepared several times: {listed}; name the one that is meant with --source"
        )
    return usable[0]
