"""Step-level checkpoints: files first, their checksums in a manifest put last, so one is whole or is not there.

    <prefix>/step-00000070/model.safetensors
    <prefix>/step-00000070/optimizer.safetensors
    <prefix>/step-00000070/manifest.json       their sha256 and size, where the trial stands, and a sha256 of itself

Where the trial stands is in the manifest because a step may be saved twice, before and after its epoch is evaluated:
the tensors are the same bytes then, and one atomic put moves from the one state to the other. Tensors are safetensors
and the rest is JSON: nothing read here can run code.

The weights of the best epoch so far lie under <trial>/best/, in the same way. `Saver` writes behind the training.
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from helix.storage import CorruptObjectError, Storage, is_sealed, sealed

logger = logging.getLogger(__name__)

FILES = ("model.safetensors", "optimizer.safetensors")
BEST_FILE = FILES[0]

#: Committed checkpoints that a trial keeps: the newest, and one to fall back on.
KEEP = 2


class CheckpointError(Exception):
    """Checkpoints exist and none of them can be trusted; starting anew must be asked for by hand."""

    def __init__(self, prefix: str, problems: list[str]):
        super().__init__(prefix, problems)
        self.prefix, self.problems = prefix, problems

    def __str__(self) -> str:
        listed = "; ".join(self.problems)
        return (
            f"no checkpoint under {self.prefix} can be trusted: {listed}. Training does not silently start again at "
            f"step 0: mend the storage, or give these up with `helix restart {PurePosixPath(self.prefix).parent.name}`"
        )


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a trial stands. `epoch` and `step` count what is finished; `step` is within the epoch that is under way.

    `losses` and `hits` belong to the epoch under way, `seconds` is the time spent on it; a `step` at the end of an
    epoch waits for its evaluation. `rows` are those of finished epochs whose files are put after this checkpoint, so
    that they may be missing. `skipped` are the optimiser steps (from 1) that a rollback left out; their losses are
    None. `best` is the epoch (from 1) and the accuracy of the best weights so far. `environments` are the versions and
    backends that took part.
    """

    epoch: int
    step: int
    losses: tuple[float | None, ...] = ()
    hits: float = 0.0
    seconds: float = 0.0
    skipped: tuple[int, ...] = ()
    rows: tuple[dict[str, Any], ...] = ()
    best: tuple[int, float] | None = None
    environments: tuple[str, ...] = ()


def save_checkpoint(
    storage: Storage,
    prefix: str,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    total_step: int,
    identity: Mapping[str, Any],
    keep: int = KEEP,
) -> None:
    """Write the state at `total_step` (optimiser steps since the start), then drop all but the newest `keep`.

    `identity` (trial_id, spec, versions) is kept in the manifest; a checkpoint of another trial is never loaded.
    """
    _write(storage, prefix, _State.of(model, optimizer, progress, total_step), identity=identity, keep=keep)


@dataclass(frozen=True, eq=False, kw_only=True)
class _State:
    """All state at a step, in memory of its own: training may go on."""

    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    progress: Progress
    total_step: int

    @classmethod
    def of(cls, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, total_step: int) -> "_State":
        if not all(loss is None or math.isfinite(loss) for loss in progress.losses):
            raise ValueError("a checkpoint with a loss that is not finite would be useless")
        return cls(
            model=_copied(model.state_dict()),
            optimizer=_copied(_optimizer_state(model, optimizer)),
            progress=progress,
            total_step=total_step,
        )


def _write(storage: Storage, prefix: str, state: _State, *, identity: Mapping[str, Any], keep: int) -> None:
    folder = f"{prefix}/step-{state.total_step:08d}"
    files = _put_files(storage, folder, dict(zip(FILES, (state.model, state.optimizer), strict=True)))
    body = {
        "identity": dict(identity),
        "total_step": state.total_step,
        "progress": asdict(state.progress),
        "files": files,
    }
    _commit(storage, folder, body)
    prune(storage, prefix, keep=keep)


def _put_files(storage: Storage, folder: str, files: Mapping[str, dict[str, torch.Tensor]]) -> dict[str, Any]:
    """What the manifest says of the files once they are put."""
    said = {}
    for name, tensors in files.items():
        data = save(tensors)
        storage.put(f"{folder}/{name}", data)
        said[name] = {"bytes": len(data), "sha256": _sha256(data)}
    return said


def _commit(storage: Storage, folder: str, body: dict[str, Any]) -> None:
    storage.put_json(f"{folder}/manifest.json", sealed(body))


#: When the first checkpoint is due: it measures what one costs.
FIRST_S = 30.0

#: A storage that fails is tried again with every checkpoint that is due, for so long; then the trial stops.
PATIENCE_S = 1800.0


class Saver:
    """Writes checkpoints behind the training, one at a time.

    `save` copies the state and returns; a thread writes it. A storage that fails for a while costs no step: what was
    to be saved is told, and the next checkpoint tries again with a newer state. `hold_s` and `write_s` are how long the
    last one held up the training and how long it took to write; `written` counts them.
    """

    def __init__(
        self,
        storage: Storage,
        folder: str,
        *,
        identity: Mapping[str, Any],
        keep: int = KEEP,
        patience_s: float = PATIENCE_S,
    ):
        self.storage, self.folder, self.identity, self.keep = storage, folder, identity, keep
        self.patience_s = patience_s
        self.failing_since: float | None = None
        self.hold_s = self.write_s = 0.0
        self.written = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="helix-checkpoint")
        self._writing: Future[None] | None = None
        self._best: tuple[dict[str, Any], dict[str, torch.Tensor]] | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is still being written."""
        return self._writing is not None and not self._writing.done()

    def best(self, model: nn.Module, **said: Any) -> None:
        """Take the weights as the best so far; they are written with the next checkpoint, `said` in their manifest."""
        self._best = said, _copied(model.state_dict())

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        *,
        total_step: int,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Hand over the state, once the one before is written. `then` runs in the thread when this one is committed."""
        began = time.monotonic()
        self.wait()
        state, best = _State.of(model, optimizer, progress, total_step), self._best
        self._writing = self._thread.submit(self._work, state, best, then)
        self.hold_s = time.monotonic() - began

    def wait(self, *, final: bool = False) -> None:
        """Until nothing is being written. Raises what the writing raised, unless the storage may yet recover."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except OSError as error:
            now = time.monotonic()
            self.failing_since = self.failing_since or now
            if final or now - self.failing_since > self.patience_s:
                raise
            logger.warning("%s: a checkpoint could not be written (%s); the next one tries again", self.folder, error)
        else:
            self.failing_since = None

    def close(self) -> None:
        """Wait for the thread, whatever became of its work."""
        self._thread.shutdown(wait=True)

    def _work(self, state: _State, best: tuple[dict[str, Any], dict[str, torch.Tensor]] | None, then: Any) -> None:
        began = time.monotonic()
        if best is not None:
            said, weights = best
            files = _put_files(self.storage, f"{self.folder}/best", {BEST_FILE: weights})
            _commit(self.storage, f"{self.folder}/best", {"identity": dict(self.identity), **said, "files": files})
            if self._best is best:
                self._best = None
        _write(self.storage, f"{self.folder}/checkpoints", state, identity=self.identity, keep=self.keep)
        self.write_s = time.monotonic() - began
        self.written += 1
        then()


def save_interval_s(*, hold_s: float, write_s: float, between_losses_s: float, most_s: float) -> float:
    """Seconds between checkpoints: what is lost with a machine against what saving costs, at most `most_s`.

    sqrt(2 C M) with C the cost of a checkpoint and M the mean time between losses (Young 1974, doi
    10.1145/361147.361115; Daly 2006, doi 10.1016/j.future.2004.11.016). C is the time that training stood still; the
    interval is long enough for that to stay below 1 % of it and for the writing behind it below a tenth. Before the
    first one was written (`write_s` 0) nothing is known, and FIRST_S stands in.
    """
    if write_s == 0:
        return min(most_s, FIRST_S)
    return min(most_s, max(math.sqrt(2 * hold_s * between_losses_s), 100 * hold_s, 10 * write_s))


def best_manifest(storage: Storage, folder: str) -> dict[str, Any] | None:
    """What the manifest of a trial's best weights says: epoch, metric, value, confusion; None where there is none.

    Raises ValueError where it is damaged.
    """
    if not storage.exists(f"{folder}/best/manifest.json"):
        return None
    return _checked_body(storage, f"{folder}/best")


def load_best(storage: Storage, folder: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The best weights of a trial and what their manifest says; None where there are none.

    Raises ValueError where they are damaged.
    """
    body = best_manifest(storage, folder)
    if body is None:
        return None
    return _checked_tensors(storage, f"{folder}/best", BEST_FILE, body["files"]), body


def load_checkpoint(
    storage: Storage,
    prefix: str,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    trial_id: str,
) -> Progress | None:
    """Restore the newest checkpoint that verifies into `model` and `optimizer`; None where none was ever committed.

    Raises CheckpointError where checkpoints were committed and none of them verifies. Once one does, the damaged ones
    after it lose their manifest: training will pass their steps again, and they must not take a place among those kept.
    """
    problems: dict[str, str] = {}
    for folder in reversed(committed(storage, prefix)):
        try:
            weights, state, progress = _verified(storage, f"{prefix}/{folder}", trial_id)
        except ValueError as error:
            problems[folder] = str(error)
            logger.warning("checkpoint %s/%s is not used: %s", prefix, folder, error)
            continue
        model.load_state_dict(weights)
        _load_optimizer(model, optimizer, state)
        for damaged in problems:
            storage.delete(f"{prefix}/{damaged}/manifest.json")
        return progress
    if problems:
        raise CheckpointError(prefix, [f"{folder}: {problem}" for folder, problem in problems.items()])
    return None


def damage(storage: Storage, folder: str, trial_id: str) -> str | None:
    """Why the committed checkpoint in `folder` would not be loaded, None where it would."""
    try:
        _verified(storage, folder, trial_id)
    except ValueError as error:
        return str(error)
    return None


def committed(storage: Storage, prefix: str) -> list[str]:
    """The folders under `prefix` that hold a manifest, oldest first."""
    return [name for name in storage.children(prefix) if storage.exists(f"{prefix}/{name}/manifest.json")]


def prune(storage: Storage, prefix: str, *, keep: int) -> None:
    """Delete all but the newest `keep` committed checkpoints, and uncommitted leftovers older than those kept."""
    kept = committed(storage, prefix)[-keep:]
    for folder in storage.children(prefix):
        if kept and folder < kept[0]:
            # The manifest goes first: a checkpoint that is half deleted is one that does not exist.
            storage.delete(f"{prefix}/{folder}/manifest.json")
            storage.delete_folder(f"{prefix}/{folder}")


def model_bytes(model: nn.Module) -> bytes:
    """The weights as one safetensors file; equal weights give equal bytes."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()})


def replica(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], ...]:
    """All state of a training but its position, in memory of its own, for `become` in another process."""
    return _copied(model.state_dict()), _copied(_optimizer_state(model, optimizer))


def become(model: nn.Module, optimizer: torch.optim.Optimizer, state: tuple[dict[str, torch.Tensor], ...]) -> None:
    """Take on what `replica` gave."""
    weights, moments = state
    model.load_state_dict(weights)
    _load_optimizer(model, optimizer, moments)


def weights_sha256(model: nn.Module) -> str:
    """The sha256 of the weights: two models with the same one are bit-identical."""
    return _sha256(model_bytes(model))


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill the optimiser's state by parameter name. Rates are not state: they follow from the position."""
    state: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, what = key.rpartition("/")
        state.setdefault(name, {})[what] = tensor
    for name, parameter in model.named_parameters():
        if name in state:
            optimizer.state[parameter] = {what: tensor.to(parameter.device) for what, tensor in state[name].items()}


def _verified(
    storage: Storage, folder: str, trial_id: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Progress]:
    """Weights, optimiser state and progress of a checkpoint as its manifest has them; ValueError says what is wrong."""
    body = _checked_body(storage, folder)
    try:
        owner = body["identity"]["trial_id"]
        progress = _progress(body["progress"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"its manifest cannot be read ({error!r})") from error
    if owner != trial_id:
        raise ValueError(f"it belongs to trial {owner}, not to {trial_id}")
    weights, state = (_checked_tensors(storage, folder, name, body["files"]) for name in FILES)
    return weights, state, progress


def _progress(value: Mapping[str, Any]) -> Progress:
    """The progress that JSON made lists of."""
    fields: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
    return Progress(**fields)


def _checked_body(storage: Storage, folder: str) -> dict[str, Any]:
    """What the manifest of `folder` says, where it is what was written."""
    try:
        manifest = storage.get_json(f"{folder}/manifest.json")
    except (ValueError, CorruptObjectError) as error:
        raise ValueError(f"its manifest cannot be read ({error})") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"its manifest cannot be read (it is no JSON object but {type(manifest).__name__})")
    if manifest.keys() == {"body", "sha256"}:  # as they were put before 2026-11-23; such trials still go on
        body = manifest["body"]
        manifest = {**body, "sha256": manifest["sha256"]} if isinstance(body, dict) else {}
    if not is_sealed(manifest):
        raise ValueError("its manifest does not match its own checksum")
    return manifest


def _checked_tensors(storage: Storage, folder: str, name: str, files: Any) -> dict[str, torch.Tensor]:
    try:
        size, sha256 = files[name]["bytes"], files[name]["sha256"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"its manifest cannot be read ({error!r})") from error
    try:
        data = storage.get(f"{folder}/{name}")
    except FileNotFoundError as error:
        raise ValueError(f"{name} is missing") from error
    except CorruptObjectError as error:  # a bucket knows by itself
        raise ValueError(f"{name} is damaged ({error.reason})") from error
    if len(data) != size or _sha256(data) != sha256:
        raise ValueError(f"{name} does not match its checksum ({len(data)} bytes, {size} written)")
    try:
        return load(data)
    except SafetensorError as error:
        raise ValueError(f"{name} is not a safetensors file ({error})") from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
