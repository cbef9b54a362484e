"""What is asked for: one trial as frozen dataclasses, resolved to plain JSON and hashed to its trial_id.

Where a trial runs (device, threads, number of workers, checkpoint interval) is not science and stands nowhere here.
"""

import copy
import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from helix.protocol import SWITCHES, Protocol
from helix.registry import BLOCKS, DATASETS, FRONTENDS
from helix.storage import json_bytes

#: Raised by hand when the code changes what a trial computes while its spec stays the same: every trial_id changes.
SCIENCE_VERSION = 1

#: What `training.precision` may be.
Precision = Literal["fp32", "tf32", "bf16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)

#: The paper's section 3.4; what `protocol.shift = paper` stands for.
PAPER_SHIFT_S = 0.5


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Which recordings: the data set, the fold that is held out as the test set, and the data set's own options."""

    dataset: str = "tones"
    fold: int = 1
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A frontend and a pattern of blocks. `options` sets fields of members by name, e.g. {"mamba": {"d_state": 16}}.

    Every block is sized to the parameter count of the block `reference` at this width (the paper's section 3.2).
    `pool_tokens` is K of eq. 11: the mean is taken over the first K tokens (the last K where `pool` is "last"), or over
    all where it is None.
    """

    frontend: str = "raw"
    pattern: tuple[str, ...] = ("mamba",) * 6
    width: int = 256
    reference: str = "mamba"
    pool_tokens: int | None = None
    pool: Literal["first", "last"] = "first"
    options: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(len(self.pattern) > 0, "model.pattern", self.pattern, "at least one block")
        _require(self.width > 0, "model.width", self.width, "a positive number")
        _require(self.pool_tokens is None or self.pool_tokens > 0, "model.pool_tokens", self.pool_tokens, "positive")


@dataclass(frozen=True, kw_only=True)
class AugmentSpec:
    """Augmentation of the training clips (section 3.4). `shift_s` None: what the switch `protocol.shift` says."""

    shift_s: float | None = None
    gain_low: float = 0.8
    gain_high: float = 1.2
    noise: float = 0.005
    mixup_alpha: float = 0.3

    def __post_init__(self) -> None:
        _require_finite(self, "augment")
        _require(self.shift_s is None or self.shift_s >= 0, "augment.shift_s", self.shift_s, "seconds, 0 or more")
        _require(0 < self.gain_low <= self.gain_high, "augment.gain_low", self.gain_low, "0 < gain_low <= gain_high")
        _require(self.noise >= 0, "augment.noise", self.noise, "a standard deviation, 0 or more")
        _require(self.mixup_alpha >= 0, "augment.mixup_alpha", self.mixup_alpha, "0 (no mixup) or more")


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """Optimisation (section 3.4): AdamW, cosine annealing from `lr` to `lr_min` over `epochs`, gradient clipping.

    `precision` is that of the matrix products: "fp32", "tf32" (float32 with factors of 10 bits, which CUDA GPUs alone
    do) or "bf16" (autocast). Weights, states of scans and the optimiser are float32 in all of them.
    """

    epochs: int = 100
    batch_size: int = 32
    lr: float = 3e-4
    lr_min: float = 1e-6
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        _require_finite(self, "training")
        _require(self.epochs > 0, "training.epochs", self.epochs, "1 or more")
        _require(self.batch_size > 0, "training.batch_size", self.batch_size, "1 or more")
        _require(0 <= self.lr_min <= self.lr, "training.lr", self.lr, "0 <= lr_min <= lr")
        _require(self.weight_decay >= 0, "training.weight_decay", self.weight_decay, "0 or more")
        _require(self.clip_norm > 0, "training.clip_norm", self.clip_norm, "a positive norm")


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """One trial: data set x variant x fold x seed, under one protocol."""

    data: DataSpec = field(default_factory=DataSpec)
    model: ModelSpec = field(default_factory=ModelSpec)
    augment: AugmentSpec = field(default_factory=AugmentSpec)
    training: TrainingSpec = field(default_factory=TrainingSpec)
    protocol: Protocol = field(default_factory=Protocol)
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.seed >= 0, "seed", self.seed, "0 or more")


def apply_overrides(spec: TrialSpec, overrides: Sequence[str] | Mapping[str, Any]) -> TrialSpec:
    """`spec` with single values replaced, given as ["training.epochs=3"] or as {"training.epochs": 3}.

    Strict: an unknown key or a value of the wrong type is a ValueError that names the key and what it may be.
    """
    items: list[str | tuple[str, Any]]
    items = list(overrides.items()) if isinstance(overrides, Mapping) else list(overrides)
    config = OmegaConf.structured(spec)
    OmegaConf.set_readonly(config, False)
    for item in items:
        if isinstance(item, str):
            key, equals, _ = item.partition("=")
            if not equals or not key:
                raise ValueError(f"{item!r} is not an override; wanted key=value, as in training.epochs=3")
        else:
            key = item[0]
        try:
            addition = OmegaConf.create()
            if isinstance(item, str):
                addition = OmegaConf.from_dotlist([item])
                _require_single_value(key, OmegaConf.to_container(addition))
            else:
                OmegaConf.update(addition, key, item[1], force_add=True)
            config = OmegaConf.merge(config, addition)
        except (OmegaConfBaseException, YAMLError, TypeError) as error:
            raise ValueError(f"override {key!r}: {str(error).splitlines()[0]}; {_known_keys(spec, key)}") from error
        if config.protocol.profile != spec.protocol.profile:
            raise ValueError("protocol.profile cannot be overridden alone; choose a profile with --profile")
    OmegaConf.set_readonly(config, None)
    return OmegaConf.to_object(config)  # type: ignore[return-value]


def from_json(value: Mapping[str, Any]) -> TrialSpec:
    """The spec that `to_json` wrote."""
    config = OmegaConf.structured(TrialSpec)
    OmegaConf.set_readonly(config, False)
    try:
        merged = OmegaConf.merge(config, OmegaConf.create(dict(value)))
    except OmegaConfBaseException as error:
        raise ValueError(f"this is not a trial spec: {str(error).splitlines()[0]}") from error
    OmegaConf.set_readonly(merged, None)
    return OmegaConf.to_object(merged)  # type: ignore[return-value]


def to_json(spec: TrialSpec) -> dict[str, Any]:
    """The spec as plain JSON values."""
    value = dataclasses.asdict(spec)
    value["model"]["pattern"] = list(spec.model.pattern)
    return value


def resolve(spec: TrialSpec) -> TrialSpec:
    """`spec` with every default that a member of a registry brings written out, so that nothing is left implicit.

    Options are kept for the members that this trial uses (its blocks, the reference block, its frontend, its data
    set); options of members that exist and are not used here drop out, since one grid sets them for all its variants.
    """
    # Nothing below looks at fold or seed, and trials of one grid differ in little else.
    if type(spec.data.fold) is not int or type(spec.seed) is not int:
        return _resolve(spec)
    alike = dataclasses.replace(spec, data=dataclasses.replace(spec.data, fold=0), seed=0)
    key = repr(alike)
    if key not in _RESOLVED:
        if len(_RESOLVED) >= RESOLVED_KEPT:
            _RESOLVED.clear()
        _RESOLVED[key] = _resolve(alike)
    resolved = copy.deepcopy(_RESOLVED[key])
    return dataclasses.replace(resolved, data=dataclasses.replace(resolved.data, fold=spec.data.fold), seed=spec.seed)


#: How many resolved specs are remembered, and by the `repr` of the spec (which tells 1 from 1.0) those that are.
RESOLVED_KEPT = 256
_RESOLVED: dict[str, TrialSpec] = {}


def _resolve(spec: TrialSpec) -> TrialSpec:
    """The slow twin of `resolve`: for one spec, with nothing remembered."""
    dataset = DATASETS.make(spec.data.dataset, spec.data.options)
    used = dict.fromkeys((*spec.model.pattern, spec.model.reference), BLOCKS) | {spec.model.frontend: FRONTENDS}
    for name in spec.model.options:
        registry = next((registry for registry in (BLOCKS, FRONTENDS) if name in registry.names()), None)
        if registry is None:
            known = ", ".join((*BLOCKS.names(), *FRONTENDS.names()))
            raise ValueError(f"model.options names {name!r}, which is no block and no frontend; known: {known}")
        registry.make(name, spec.model.options[name])
    options = {name: registry.resolve(name, spec.model.options.get(name)) for name, registry in sorted(used.items())}
    shift_s = spec.augment.shift_s
    if shift_s is None:
        shift_s = dataset.authors_shift_s if spec.protocol.shift == "dataset" else PAPER_SHIFT_S
    resolved = dataclasses.replace(
        spec,
        data=dataclasses.replace(spec.data, options=DATASETS.resolve(spec.data.dataset, spec.data.options)),
        model=dataclasses.replace(spec.model, options=options),
        augment=dataclasses.replace(spec.augment, shift_s=float(shift_s)),
    )
    # Through the schema, so that a 1 that was given for a 1.0 does not make another trial of it.
    return from_json(to_json(resolved))


def identity(spec: TrialSpec, manifest_sha256: str) -> dict[str, Any]:
    """What a trial_id is the hash of: the resolved spec without what only concerns reporting, the data, the science."""
    value = to_json(resolve(spec))
    del value["protocol"]["profile"]
    for name, row in SWITCHES.items():
        if row["reporting"]:
            del value["protocol"][name]
    return {"spec": value, "data_manifest": manifest_sha256, "science_version": SCIENCE_VERSION}


def trial_id(spec: TrialSpec, manifest_sha256: str) -> str:
    """The name of a trial: the first 16 hex digits of the sha256 of its identity."""
    return hashlib.sha256(json_bytes(identity(spec, manifest_sha256))).hexdigest()[:16]


def derive_seed(seed: int, *path: str | int) -> int:
    """A 63-bit seed for one purpose at one position: a pure function, so that nothing random has to be saved."""
    text = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def _known_keys(spec: TrialSpec, key: str) -> str:
    """The keys at the deepest part of `key` that exists, for an error message."""
    node: Any = spec
    path: list[str] = []
    for part in key.split("."):
        child = getattr(node, part, None) if dataclasses.is_dataclass(node) else None
        if not dataclasses.is_dataclass(child):
            break
        node, path = child, [*path, part]
    names = ", ".join(field.name for field in dataclasses.fields(node))
    return f"{'.'.join(path) or 'a trial'} has {names}"


def _require_single_value(key: str, value: Any) -> None:
    """Refuse what would set a whole part at once, or in another spelling than key.key=value: it could go unnoticed."""
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, str) and "${" in value:  # OmegaConf would fill in what the environment holds
        raise ValueError(f"override {key!r}: ${{...}} is not filled in here; write the value itself")
    if value == "???":  # OmegaConf reads it as "not given" and would leave the key as it is
        raise ValueError(f"override {key!r}: '???' is not a value")
    if isinstance(value, dict) or "[" in key:
        raise ValueError(f"override {key!r} is not of the form key=value with one value, as in training.epochs=3")


def _require_finite(part: Any, name: str) -> None:
    for item in dataclasses.fields(part):
        value = getattr(part, item.name)
        _require(
            not isinstance(value, float) or abs(value) != math.inf, f"{name}.{item.name}", value, "a finite number"
        )


def _require(holds: bool, key: str, given: Any, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{key} is {given!r}; wanted {wanted}")
