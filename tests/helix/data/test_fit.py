"""Every data set trains: its clips reach the loop, and the switches that concern them change what is learned."""

from dataclasses import replace

import pytest

from helix.protocol import Protocol, profile
from helix.spec import DataSpec, ModelSpec, TrainingSpec, TrialSpec
from helix.storage import FolderStorage
from helix.training.trainer import Fit, fit


def spec_of(small, protocol: Protocol) -> TrialSpec:
    """One attention block of width 8 for one epoch."""
    return TrialSpec(
        data=DataSpec(dataset=small.name, fold=small.dataset.folds[0], options=small.options),
        model=ModelSpec(
            frontend="mel",
            pattern=("attention",),
            width=8,
            options={"mamba": {"d_state": 4}, "attention": {"heads": 2}},
        ),
        training=TrainingSpec(epochs=1, batch_size=4, lr=1e-3),
        protocol=protocol,
    )


def trained(small, recordings, folder, **switches: str) -> str:
    protocol = replace(profile("fair"), validation="test_halves", **switches)  # pyright: ignore
    return fit(spec_of(small, protocol), recordings, Fit(storage=FolderStorage(folder)))["weights_sha256"]


#: Of whose clips each switch is about.
CONCERNED = {
    "concat_speech_commands": {"concat_shift": ("whole", "per_clip")},
    "librispeech": {"stitch": ("reshuffle", "disjoint"), "speaker_split": ("utterance", "session")},
    "voxpopuli": {"stitch": ("reshuffle", "disjoint"), "speaker_split": ("utterance", "session")},
}


@pytest.mark.parametrize("name", ["paper", "fair"])
def test_a_small_model_trains_on_it(small, small_recordings, storage, name):
    spec = spec_of(small, profile(name))
    result = fit(spec, small_recordings, Fit(storage=storage))
    split = small.dataset.split(small_recordings.index, fold=spec.data.fold, protocol=spec.protocol)
    assert result["classes"] == len(small_recordings.classes)
    clips = {
        part: len(small.dataset.clips(small_recordings.index, rows, protocol=spec.protocol, seed=0, epoch=epoch))
        for part, rows, epoch in (("train", split.train, 0), ("test", split.test, None))
    }
    assert (result["train_clips"], result["test_clips"]) == (clips["train"], clips["test"])
    assert 0 <= result["accuracy"]["last"] <= 1


def test_a_switch_that_concerns_its_clips_changes_what_is_learned(small, small_recordings, tmp_path):
    if small.name not in CONCERNED:
        pytest.skip(f"no switch is about the clips of {small.name} alone")
    for switch, values in CONCERNED[small.name].items():
        weights = {value: trained(small, small_recordings, tmp_path / value, **{switch: value}) for value in values}
        assert len(set(weights.values())) == len(values), f"however protocol.{switch} is set, the same is learned"
