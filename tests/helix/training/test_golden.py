"""A change that should change no number shows here that it did not: the losses of a short run of each variant, and its
initial weights, are those in golden/<variant>.tsv, which name the version of the science that they are of.

The bound is 1e-5 relative for each loss. Over scan backends, instruction sets and BLAS code paths they were seen to
differ by 4e-7, so equal text cannot be asked for. `make golden` rewrites the files; see CONTRIBUTING.md.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from helix.data.dataset import Dataset
from helix.data.shards import Recordings, open_prepared, prepare
from helix.models.classifier import build_classifier
from helix.protocol import profile
from helix.registry import DATASETS
from helix.spec import (
    SCIENCE_VERSION,
    AugmentSpec,
    DataSpec,
    ModelSpec,
    TrainingSpec,
    TrialSpec,
    apply_overrides,
    derive_seed,
)
from helix.storage import FolderStorage
from helix.training.checkpoint import weights_sha256
from helix.training.trainer import Fit, fit
from orchestration.grid import PRESETS, VARIANTS, Variant

FOLDER = Path(__file__).parent / "golden"
BOUND = 1e-5
STEPS = 12  # four epochs of three

#: Written out, so that a default that changes is not taken for science that does.
TRAINING = TrainingSpec(epochs=4, batch_size=24, lr=1e-3, lr_min=1e-6, weight_decay=0.05, clip_norm=1.0)
AUGMENT = AugmentSpec(shift_s=0.5, gain_low=0.8, gain_high=1.2, noise=0.005, mixup_alpha=0.3)
TONES = {"seed": 0, "clips_per_class": 16, "fold_count": 4}

#: With other instructions torch draws numbers that differ in their last bit.
PINNED = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@dataclass(frozen=True, kw_only=True)
class Golden:
    """What a variant's file holds."""

    science_version: int
    initial_weights: str
    losses: tuple[float, ...]

    def text(self) -> str:
        head = (f"# science_version {self.science_version}", f"# initial_weights {self.initial_weights}", "step\tloss")
        return "\n".join((*head, *(f"{step}\t{loss:.9g}" for step, loss in enumerate(self.losses, start=1)), ""))


def read(path: Path) -> Golden:
    version, weights, columns, *rows = path.read_text(encoding="utf-8").splitlines()
    assert columns == "step\tloss"
    steps, losses = zip(*(row.split("\t") for row in rows), strict=True)
    assert [int(step) for step in steps] == list(range(1, STEPS + 1))
    return Golden(
        science_version=int(version.removeprefix("# science_version ")),
        initial_weights=weights.removeprefix("# initial_weights "),
        losses=tuple(float(loss) for loss in losses),
    )


def complaint(golden: Golden, found: Golden) -> str | None:
    """What is wrong, as a sentence that says what to do."""
    version = found.science_version
    if golden.science_version != version:
        return (
            f"these losses are of science version {golden.science_version}, and SCIENCE_VERSION is {version} now: "
            f"rewrite the golden files (make golden) and review their diff"
        )
    moved = None
    if PINNED and golden.initial_weights != found.initial_weights:
        moved = "the initial weights moved"
    for step, (was, now) in enumerate(zip(golden.losses, found.losses, strict=True), start=1):
        if not abs(now - was) <= BOUND * abs(was):
            moved = f"the loss of step {step} moved from {was:.9g} to {now:.9g}"
            break
    if moved is None:
        return None
    return (
        f"{moved}, while SCIENCE_VERSION stayed {version}. If trials were meant to compute something else, raise "
        f"SCIENCE_VERSION in helix/spec.py and rewrite the golden files (make golden); if not, this is a bug"
    )


def spec_of(variant: Variant) -> TrialSpec:
    spec = TrialSpec(
        data=DataSpec(dataset="tones", fold=1, options=TONES),
        model=ModelSpec(),
        augment=AUGMENT,
        training=TRAINING,
        protocol=profile("paper"),
        seed=0,
    )
    chosen = {"model.frontend": variant.frontend, "model.pattern": variant.pattern}
    return apply_overrides(spec, {**PRESETS["small"], **chosen})


def initial_weights(spec: TrialSpec) -> str:
    dataset: Dataset = DATASETS.make(spec.data.dataset, spec.data.options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(spec.seed, "initial weights"))
        return weights_sha256(build_classifier(spec.model, spec.protocol, classes=len(dataset.classes)))


def run(spec: TrialSpec, recordings: Recordings, folder: Path) -> Golden:
    result = fit(spec, recordings, Fit(storage=FolderStorage(folder)))
    losses = tuple(loss for row in result["rows"] for loss in row["train_losses"])
    return Golden(science_version=SCIENCE_VERSION, initial_weights=initial_weights(spec), losses=losses)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Recordings:
    storage = FolderStorage(tmp_path_factory.mktemp("golden"))
    return open_prepared(storage, prepare("tones", TONES, source=None, storage=storage).prefix)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_losses_and_initial_weights_are_the_golden_ones(variant, recordings, tmp_path, request):
    path = FOLDER / f"{variant.name}.tsv"
    found = run(spec_of(variant), recordings, tmp_path)
    problem = complaint(read(path), found) if path.exists() else f"{path} is missing: write it (make golden)"
    if problem and request.config.getoption("--rewrite-golden"):
        # What moved under an unchanged version is refused here too: that is what the files are for.
        if path.exists() and read(path).science_version == SCIENCE_VERSION:
            pytest.fail(problem)
        assert PINNED, "the golden files hold initial weights as processors with AVX2 draw them; rewrite them on one"
        FOLDER.mkdir(exist_ok=True)
        path.write_text(found.text(), encoding="utf-8")
        problem = complaint(read(path), found)
    assert problem is None, problem


def test_there_is_a_golden_file_for_each_variant_and_no_other():
    assert {path.name for path in FOLDER.iterdir()} == {f"{variant.name}.tsv" for variant in VARIANTS}


def test_a_learning_rate_off_by_a_thousandth_is_noticed_and_said_what_to_do_about(recordings, tmp_path):
    variant = next(variant for variant in VARIANTS if variant.name == "helix-mel")
    spec = spec_of(variant)
    spec = replace(spec, training=replace(spec.training, lr=spec.training.lr * 1.001))
    problem = complaint(read(FOLDER / f"{variant.name}.tsv"), run(spec, recordings, tmp_path))
    assert problem is not None
    assert "moved from" in problem
    assert "raise SCIENCE_VERSION in helix/spec.py and rewrite the golden files" in problem


@pytest.mark.skipif(not PINNED, reason="initial weights are pinned for processors with AVX2")
def test_other_initial_weights_are_noticed_even_where_losses_stay():
    golden = read(FOLDER / "mamba-raw.tsv")
    other = initial_weights(replace(spec_of(VARIANTS[0]), seed=1))
    assert "initial weights moved" in str(complaint(golden, replace(golden, initial_weights=other)))


def test_a_raised_version_asks_for_new_files():
    golden = read(FOLDER / "mamba-raw.tsv")
    problem = complaint(golden, replace(golden, science_version=golden.science_version + 1))
    assert "rewrite the golden files (make golden) and review their diff" in str(problem)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_never_passes(loss):
    golden = read(FOLDER / "mamba-raw.tsv")
    assert complaint(golden, replace(golden, losses=(*golden.losses[:-1], loss))) is not None
