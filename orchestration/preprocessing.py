"""Recordings -> shards as Ray tasks, and which prepared data a sweep reads."""

import contextlib
import hashlib
import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from helix.data.dataset import Dataset, PartFacts, listed_index, split_facts
from helix.data.shards import Prepared, Recordings, Watch, check_source, find, open_prepared, prepare
from helix.protocol import profile
from helix.registry import DATASETS
from helix.spec import DataSpec
from helix.storage import FolderStorage, Storage, json_bytes, sealed
from orchestration.connection import ClusterError, connect
from orchestration.grid import Trial


def prepare_with_ray(
    data: DataSpec,
    *,
    source: Path | None,
    storage: Storage,
    storage_named: bool,
    allow_partial: bool,
    quarantine: int = 0,
    shard_mib: float = 64,
    workers: int | None = None,
    watch: Watch = lambda _what, _done, _all, _done_bytes, _all_bytes: None,
) -> Prepared:
    """Prepare a data set, one Ray task per shard, `workers` at once (default: as many as the machines hold).

    What is prepared already and verifies is left alone. On a cluster the source has to be at the same path on every
    machine; SourceNotSharedError names one that does not see it.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; wanted 1 or more")

    def run(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        todo = list(items)
        if len(todo) < 2 or workers == 1:
            return map(function, todo)
        connect(storage_named=storage_named)
        return as_completed(function, todo, at_once=workers or len(todo))

    prepared = prepare(
        data.dataset,
        data.options,
        source=source,
        storage=storage,
        allow_partial=allow_partial,
        quarantine=quarantine,
        shard_mib=shard_mib,
        checksums=_checksums_folder(),
        run=run,
        watch=watch,
    )
    storage.delete_leftovers("data")  # also what a preparation left that was killed and given up for another
    return prepared


def as_completed(function: Callable[[Any], Any], todo: Sequence[Any], *, at_once: int) -> Iterator[Any]:
    """Map over Ray tasks, in the order in which they end. What a task raises is raised as itself, once.

    The others are then cancelled and waited for: a task whose error nobody has asked for is printed by Ray.
    """
    task = ray.remote(function)
    waiting = iter(todo)
    running = [task.remote(item) for item in itertools.islice(waiting, at_once)]
    try:
        while running:
            done, running = ray.wait(running, num_returns=1)
            running += [task.remote(item) for item in itertools.islice(waiting, len(done))]
            for reference in done:
                yield ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise ClusterError(
            f"a worker was lost for good ({error}); the same command goes on with what is done"
        ) from error
    finally:
        for reference in running:
            ray.cancel(reference)
        for reference in running:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(reference)


def prepared_data(
    data: DataSpec,
    *,
    source: Path | None,
    storage: Storage,
    storage_named: bool,
    allow_partial: bool,
    say: Callable[[str], None],
    quarantine: int = 0,
) -> Recordings:
    """The prepared recordings that a sweep of `data` reads: prepared now from `source`, or found in storage.

    A data set that is made on the fly needs no source. Raises ValueError where nothing is prepared and no source is
    given, where what is prepared is partial and that was not allowed, or where it is not clear which one is meant.
    """
    dataset: Dataset = DATASETS.make(data.dataset, data.options)
    refuse_needless(source, dataset, data.dataset)
    if source is not None or not dataset.needs_source:
        prepared = prepare_with_ray(
            data,
            source=source,
            storage=storage,
            storage_named=storage_named,
            allow_partial=allow_partial,
            quarantine=quarantine,
        )
    else:
        prepared = _found(data, dataset, storage, allow_partial=allow_partial)
    say(f"data: {summary(prepared)}, in {prepared.prefix}")
    return open_prepared(storage, prepared.prefix)


def summary(prepared: Prepared) -> str:
    """A prepared set in half a line."""
    manifest = prepared.manifest
    expected = manifest["expected_recordings"]
    part = f"{f', of {expected}' if expected else ''} (a partial set)" if manifest["partial"] else ""
    without = f" ({len(manifest['quarantined'])} in quarantine)" if manifest["quarantined"] else ""
    return (
        f"{manifest['dataset']}, {manifest['recordings']} recordings{part}{without}, "
        f"{manifest['seconds'] / 60:.1f} minutes, {len(manifest['classes'])} classes"
    )


def described(storage: Storage, prepared: Prepared) -> list[str]:
    """What a person wants to know of a prepared set, a line each."""
    manifest = prepared.manifest
    per_class = Counter({name: manifest["recordings_per_class"].get(name, 0) for name in manifest["classes"]})
    (most, highest), (least, lowest) = per_class.most_common(1)[0], min(per_class.items(), key=lambda item: item[1])
    stored = sum(shard["bytes"] for shard in manifest["shards"])
    expected, padded = manifest["expected_recordings"], manifest["padded_fraction"]
    lines = [
        f"recordings  {manifest['recordings']}" + (f" of {expected}" if expected else ""),
        f"seconds     {manifest['seconds']:.1f}, of which {padded:.2%} padding or silence at the end",
        f"per class   {lowest} recordings" + (f" ({least}) to {highest} ({most})" if lowest < highest else ""),
    ]
    if manifest["speakers_per_fold"]:
        speakers = ", ".join(
            f"{count}" if fold == "None" else f"{count} in fold {fold}"
            for fold, count in manifest["speakers_per_fold"].items()
        )
        lines.append(f"speakers    {speakers}")
    if manifest["missing"]:
        lines.append(f"missing     {len(manifest['missing'])} recordings, listed in the manifest")
    for name, bad in manifest["quarantined"].items():
        lines.append(f"quarantine  {name}: {bad['file']} {bad['reason']}")
    lines.append(f"shards      {len(manifest['shards'])}, {stored / 2**20:.1f} MiB")
    lines.append(f"where       {storage!r}, {prepared.prefix} (manifest {prepared.manifest_sha256[:12]})")
    return lines


#: Where the facts of prepared sets lie: facts/<folder of the set>/<data set>-<key of its options>.json. Not among the
#: prepared files, since they are of a data set's clips and a profile, and several data sets may share one set.
FACTS = "facts"


def clip_facts(storage: Storage, data: DataSpec, prepared: Prepared, *, profile_name: str = "paper") -> list[str]:
    """What each part holds under a profile, stored and as lines: one for each part, over all folds.

    A fold that cannot be split (a part of a data set) is told with its reason.
    """
    dataset: Dataset = DATASETS.make(data.dataset, data.options)
    index = open_prepared(storage, prepared.prefix).index
    protocol, classes = profile(profile_name), len(prepared.manifest["classes"])
    folds: dict[str, Any] = {}
    parts: dict[str, list[PartFacts]] = {}
    lines = []
    for fold in dataset.folds:
        try:
            found = split_facts(dataset, index, classes=classes, fold=fold, protocol=protocol)
        except ValueError as error:
            folds[str(fold)] = {"refused": str(error)}
            lines.append(f"fold {fold:<6} {error}")
            continue
        folds[str(fold)] = {name: asdict(facts) for name, facts in found.items()}
        for name, facts in found.items():
            parts.setdefault(name, []).append(facts)
    told = {"manifest_sha256": prepared.manifest_sha256, "dataset": data.dataset, "profile": profile_name}
    told |= {"options": DATASETS.resolve(data.dataset, data.options), "folds": folds}
    key = hashlib.sha256(json_bytes([told["options"], profile_name])).hexdigest()[:12]
    folder = prepared.prefix.rpartition("/")[2]
    storage.put_json(f"{FACTS}/{folder}/{data.dataset}-{key}.json", sealed(told))
    return [f"{name:<11} {_over(several)}" for name, several in parts.items() if several[0].recordings] + lines


def _over(several: Sequence[PartFacts]) -> str:
    """Facts of one part in every fold, in one line: what differs as lowest to highest."""
    if len(several) == 1:
        return str(several[0])
    clips, speakers, silence = (
        [getattr(facts, name) for facts in several] for name in ("clips", "speakers", "silence")
    )
    held = [count for facts in several for count in facts.clips_per_class if count]
    spoken = f", {_range(speakers)} speakers" if any(speakers) else ""
    return (
        f"{_range(clips)} clips in {len(several)} folds{spoken}, {_range(held or [0])} clips per class, "
        f"{min(silence):.1%}{f' to {max(silence):.1%}' if max(silence) > min(silence) else ''} silence"
    )


def _range(values: Sequence[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"


def check_listing(trials: Sequence[Trial], *, source: Path | None, allow_partial: bool) -> None:
    """Refuse what the metadata of a source shows already, before anything is decoded: no such fold, no full batch."""
    data = trials[0].spec.data
    dataset: Dataset = DATASETS.make(data.dataset, data.options)
    refuse_needless(source, dataset, data.dataset)
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
    refuse_needless(source, dataset, data.dataset)
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
        aside = FolderStorage(Path(folder))
        # A plan reads the index alone, which is in memory once it is opened.
        return open_prepared(aside, prepare(data.dataset, data.options, source=None, storage=aside).prefix)


def refuse_needless(source: Path | None, dataset: Dataset, name: str) -> None:
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


def _checksums_folder() -> Path:
    """Where this machine remembers what the files of sources are: it saves time and decides nothing."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "helix" / "checksums"
