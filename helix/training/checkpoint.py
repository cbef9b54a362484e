"""Step-level checkpoints: files first, their checksums in a manifest put last, so one is whole or is not there.

    <prefix>/step-00000070/model.safetensors
    <prefix>/step-00000070/optimizer.safetensors
    <prefix>/step-00000070/manifest.json       their sha256 and size, where the trial stands, and a sha256 of itself

Where the trial stands is in the manifest because a step may be saved twice, before and after its epoch is evaluated:
the tensors are the same bytes then, and one atomic put moves from the one state to the other. Tensors are safetensors
and the rest is JSON: nothing read here can run code.
"""

import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from helix.storage import Storage, json_bytes

logger = logging.getLogger(__name__)

FILES = ("model.safetensors", "optimizer.safetensors")


class CheckpointError(Exception):
    """Checkpoints exist and none of them can be trusted; starting anew must be asked for by hand."""

    def __init__(self, prefix: str, problems: list[str]):
        super().__init__(prefix, problems)
        self.prefix, self.problems = prefix, problems

    def __str__(self) -> str:
        listed = "; ".join(self.problems)
        return (
            f"no checkpoint under {self.prefix} can be trusted: {listed}. Training does not silently start again at "
            f"step 0: mend the storage, or delete that folder to restart this trial"
        )


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a trial stands. `epoch` and `step` count what is finished; `step` is within the epoch that is under way.

    `losses` and `hits` belong to the epoch under way; `row` is the last finished epoch's row, kept here because the
    row file is put after the checkpoint and may be missing. `seconds` is the time spent on the epoch under way.
    """

    epoch: int
    step: int
    losses: tuple[float, ...] = ()
    hits: float = 0.0
    seconds: float = 0.0
    row: dict[str, Any] | None = None


def save_checkpoint(
    storage: Storage,
    prefix: str,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    total_step: int,
    identity: Mapping[str, Any],
    keep: int = 2,
) -> None:
    """Write the state at `total_step` (optimiser steps since the start), then drop all but the newest `keep`.

    `identity` (trial_id, versions) is kept in the manifest; a checkpoint of another trial is never loaded.
    """
    if not all(math.isfinite(loss) for loss in progress.losses):
        raise ValueError("a checkpoint with a loss that is not finite would be useless")
    folder = f"{prefix}/step-{total_step:08d}"
    contents = dict(zip(FILES, (model_bytes(model), _optimizer_bytes(model, optimizer)), strict=True))
    for name, data in contents.items():
        storage.put(f"{folder}/{name}", data)
    files = {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in contents.items()}
    body = {"identity": dict(identity), "total_step": total_step, "progress": asdict(progress), "files": files}
    storage.put_json(f"{folder}/manifest.json", {"body": body, "sha256": _sha256(json_bytes(body))})
    prune(storage, prefix, keep=keep)


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


def weights_sha256(model: nn.Module) -> str:
    """The sha256 of the weights: two models with the same one are bit-identical."""
    return _sha256(model_bytes(model))


def _optimizer_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> bytes:
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return save(tensors)


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
    try:
        manifest = storage.get_json(f"{folder}/manifest.json")
        body = manifest["body"]
        whole = _sha256(json_bytes(body)) == manifest["sha256"]
        owner = body["identity"]["trial_id"]
        wanted = {name: (body["files"][name]["bytes"], body["files"][name]["sha256"]) for name in FILES}
        progress = Progress(**{**body["progress"], "losses": tuple(body["progress"]["losses"])})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its manifest cannot be read ({error!r})") from error
    if not whole:
        raise ValueError("its manifest does not match its own checksum")
    if owner != trial_id:
        raise ValueError(f"it belongs to trial {owner}, not to {trial_id}")
    tensors = []
    for name, (size, sha256) in wanted.items():
        try:
            data = storage.get(f"{folder}/{name}")
        except FileNotFoundError as error:
            raise ValueError(f"{name} is missing") from error
        if len(data) != size or _sha256(data) != sha256:
            raise ValueError(f"{name} does not match its checksum ({len(data)} bytes, {size} written)")
        try:
            tensors.append(load(data))
        except SafetensorError as error:
            raise ValueError(f"{name} is not a safetensors file ({error})") from error
    return tensors[0], tensors[1], progress


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
