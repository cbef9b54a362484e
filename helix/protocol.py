"""The switches where the paper, its authors' code and good practice differ, with the three profiles that set them all.

Source of each row: the paper (arXiv:2603.21316, "says") and the authors' repository at commit 65a9517 ("does").
A switch is one field of `Protocol`; what it may be set to is its type, and what each profile sets is its metadata.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

PROFILES = ("authors", "paper", "fair")


def switch(*, authors: str, paper: str, fair: str, says: str, does: str, reporting: bool = False) -> Any:
    """One switch. `reporting` marks those that change how results are summarised and not how a trial is trained."""
    row = {"authors": authors, "paper": paper, "fair": fair, "says": says, "does": does, "reporting": reporting}
    return dataclasses.field(default=paper, metadata=row)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Every switch of one trial. `profile` names where the values came from; single switches may differ from it."""

    profile: Literal["authors", "paper", "fair"] = "paper"

    ffn_match: Literal["code", "eq10"] = switch(
        authors="code", paper="eq10", fair="code",
        says="FFN width floor((P_mamba - P_mha - P_norms) / (2d + 1)), eq. 10: 1544 at d = 256",
        does="subtracts the second bias (d) too: 1543, the closer match",
    )  # fmt: skip
    attn_impl: Literal["weights", "sdpa"] = switch(
        authors="weights", paper="sdpa", fair="sdpa",
        says="multi-head attention",
        does="asks for the attention weights, so the L x L matrix is kept in memory; outputs agree to rounding",
    )  # fmt: skip
    pos: Literal["none", "sinusoidal", "rope"] = switch(
        authors="none", paper="none", fair="none",
        says="nothing on positions",
        does="adds none, so a stack of attention alone does not see the order of tokens",
    )  # fmt: skip
    pad_mask: Literal["none", "clip"] = switch(
        authors="none", paper="none", fair="clip",
        says="clips are padded to one length",
        does="reads and averages the silence that completes a clip like any other token",
    )  # fmt: skip
    decay: Literal["all", "mamba_groups"] = switch(
        authors="all", paper="all", fair="mamba_groups",
        says="AdamW with weight decay 0.05",
        does="decays every parameter, also A_log, D, norms and biases, which Mamba's authors exempt",
    )  # fmt: skip
    schedule_unit: Literal["epoch", "step"] = switch(
        authors="epoch", paper="epoch", fair="epoch",
        says="cosine annealing to 1e-6",
        does="steps the schedule once per epoch",
    )  # fmt: skip
    mel_pad: Literal["floor", "ceil"] = switch(
        authors="floor", paper="ceil", fair="ceil",
        says="ceil(F / 16) patches along time",
        does="drops the frames that do not fill a patch: 13 of 157 for a 5 s clip",
    )  # fmt: skip
    mel_order: Literal["freq_major", "time_major"] = switch(
        authors="freq_major", paper="freq_major", fair="freq_major",
        says="nothing on the order of the patches",
        does="one mel band over all time, then the next band",
    )  # fmt: skip
    mel_norm: Literal["clip", "none"] = switch(
        authors="clip", paper="clip", fair="clip",
        says="128-bin log-mel",
        does="subtracts each clip's mean and divides by its standard deviation",
    )  # fmt: skip
    raw_norm: Literal["none", "rms"] = switch(
        authors="none", paper="none", fair="none",
        says="nothing",
        does="leaves the waveform as it is, while the mel input is normalised",
    )  # fmt: skip
    shift: Literal["dataset", "paper"] = switch(
        authors="dataset", paper="paper", fair="paper",
        says="random circular shift of +/- 0.5 s everywhere",
        does="0.5 s on ESC-50, 0.4 s, 0.1 s, 1.0 s or none elsewhere",
    )  # fmt: skip
    augment_mel: Literal["none", "waveform"] = switch(
        authors="none", paper="waveform", fair="waveform",
        says="shift, gain and noise for all variants",
        does="no shift, gain or noise for any mel variant",
    )  # fmt: skip
    mixup_on: Literal["features", "waveform"] = switch(
        authors="features", paper="waveform", fair="waveform",
        says="mixup, listed with the augmentations of the audio",
        does="mixes what the patch embedding receives: waveforms for raw, normalised spectrograms for mel",
    )  # fmt: skip
    concat_shift: Literal["whole", "per_clip"] = switch(
        authors="whole", paper="per_clip", fair="per_clip",
        says="circular shift of the audio, and a label that belongs to one of the concatenated clips",
        does="shifts the whole concatenation, so that up to a tenth of the pooled tokens comes from another clip",
    )  # fmt: skip
    stitch: Literal["reshuffle", "disjoint"] = switch(
        authors="reshuffle", paper="reshuffle", fair="disjoint",
        says="utterances of one speaker stitched to the length of a clip",
        does="shuffles anew for every clip, so clips of one speaker overlap",
    )  # fmt: skip
    speaker_split: Literal["utterance", "session"] = switch(
        authors="utterance", paper="utterance", fair="session",
        says="80/20 split per speaker",
        does="splits utterances, so one session (chapter) stands on both sides",
    )  # fmt: skip
    divergence: Literal["stop", "rollback"] = switch(
        authors="stop", paper="stop", fair="stop",
        says="nothing on losses that are not finite",
        does="does not look for them and trains on",
    )  # fmt: skip
    validation: Literal["test_halves", "held_out"] = switch(
        authors="test_halves", paper="test_halves", fair="held_out",
        says="no validation set; the best test epoch is reported",
        does="the same, and leaves the official validation list of Speech Commands unused",
    )  # fmt: skip
    select: Literal["best_test", "last", "validation"] = switch(
        authors="best_test", paper="best_test", fair="validation", reporting=True,
        says="best test accuracy",
        does="best test accuracy over all epochs",
    )  # fmt: skip
    std: Literal["population", "sample"] = switch(
        authors="population", paper="population", fair="sample", reporting=True,
        says="mean +/- std over the folds",
        does="divides by n and not by n - 1",
    )  # fmt: skip


#: switch name -> what it may be set to, what each profile sets, what the paper says and what the authors' code does
SWITCHES: dict[str, dict[str, Any]] = {
    field.name: {**field.metadata, "choices": get_args(get_type_hints(Protocol)[field.name])}
    for field in dataclasses.fields(Protocol)
    if field.name != "profile"
}


def profile(name: str) -> Protocol:
    """Every switch as the profile `name` sets it."""
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}; known: {', '.join(PROFILES)}")
    return Protocol(profile=name, **{key: row[name] for key, row in SWITCHES.items()})  # pyright: ignore
