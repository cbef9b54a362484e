"""A grid is a written question: variants x folds x seeds of one data set. Expanding one needs neither ray nor torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from helix.protocol import profile
from helix.published import BACKBONES
from helix.registry import GRIDS
from helix.spec import TrialSpec, apply_overrides

__all__ = ["BACKBONES", "GRIDS", "PRESETS", "VARIANTS", "Grid", "Trial", "Variant", "expand", "load_grid"]

#: Sizes of one family. `paper` is the paper's; `small` is for laptops, its width and state chosen so that attention can
#: be matched within 0.01 % under every profile.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": {"model.width": 64, "model.options.mamba.d_state": 6},
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A frontend and a pattern of blocks; `backbone` is what people call the pattern."""

    frontend: str
    backbone: str
    pattern: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.backbone}-{self.frontend}"


#: The paper's six variants.
VARIANTS = tuple(
    Variant(frontend=frontend, backbone=backbone, pattern=pattern)
    for backbone, pattern in BACKBONES.items()
    for frontend in ("raw", "mel")
)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One question. `question` is the docstring of the grid's file; `overrides` are set before the user's own."""

    question: str
    dataset: str
    folds: tuple[int, ...]
    variants: tuple[Variant, ...] = VARIANTS
    seeds: tuple[int, ...] = (0,)
    preset: str = "paper"
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial of a grid: which variant, and the spec that says everything else."""

    variant: Variant
    spec: TrialSpec

    @property
    def label(self) -> str:
        """How people tell trials of one grid apart."""
        return f"{self.variant.name} fold {self.spec.data.fold} seed {self.spec.seed}"


def load_grid(name: str) -> Grid:
    """The grid of that name; ValueError names the known ones."""
    return GRIDS[name]


def expand(
    grid: Grid,
    *,
    profile_name: str = "paper",
    overrides: Sequence[str] = (),
    preset: str | None = None,
    folds: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    variants: Sequence[str] | None = None,
) -> list[Trial]:
    """Every trial of the grid in a fixed order: by fold, then seed, then variant.

    `overrides` are key=value and win over the grid's and the preset's. `folds`, `seeds` and `variants` (by name)
    replace the grid's own. What does not exist is a ValueError that names what does.
    """
    preset = preset or grid.preset
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    for item in overrides:
        key = item.partition("=")[0]
        if key in SET_BY_THE_GRID:
            raise ValueError(f"{key} is set by the grid for each trial; use {SET_BY_THE_GRID[key]}")
    chosen = _choose(grid.variants, variants)
    base = TrialSpec(protocol=profile(profile_name))
    base = apply_overrides(base, {**PRESETS[preset], **grid.overrides})
    base = apply_overrides(base, overrides)
    # The strict way in once for each variant; folds and seeds, of which there may be thousands, are put in beside it.
    specs = {}
    for variant in chosen:
        model = {"model.frontend": variant.frontend, "model.pattern": variant.pattern}
        specs[variant.name] = apply_overrides(base, {"data.dataset": grid.dataset, **model})
    return [
        Trial(variant=variant, spec=replace(spec, data=replace(spec.data, fold=fold), seed=seed))
        for fold in _distinct(folds or grid.folds, "fold")
        for seed in _distinct(seeds or grid.seeds, "seed")
        for variant in chosen
        for spec in [specs[variant.name]]
    ]


#: Keys that tell the trials of a grid apart, and what sets them instead of an override.
SET_BY_THE_GRID = {
    "data.dataset": "another grid",
    "data.fold": "--folds",
    "seed": "--seeds",
    "model.frontend": "--variants or another grid",
    "model.pattern": "--variants or another grid",
}


def _choose(variants: tuple[Variant, ...], names: Sequence[str] | None) -> tuple[Variant, ...]:
    if not names:
        return variants
    by_name = {variant.name: variant for variant in variants}
    for name in names:
        if name not in by_name:
            raise ValueError(f"unknown variant {name!r}; this grid has {', '.join(by_name)}")
    return tuple(by_name[name] for name in _distinct(names, "variant"))


def _distinct(values: Sequence[Any], what: str) -> tuple[Any, ...]:
    if len(set(values)) != len(values):
        raise ValueError(f"each {what} may be named once; given {', '.join(map(str, values))}")
    return tuple(values)
