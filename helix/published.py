"""The numbers of the paper (arXiv:2603.21316v1, Tables 1 to 5) and of its authors' README, as data with their source.

Accuracies are best test accuracies, as the paper reports them, in fractions. Per-fold and last-epoch accuracies stand
only in the README of the authors' repository at commit 65a9517; parameter counts follow from its model.py, not from
the paper, whose abstract says about 8.3 million for all of them.
"""

from dataclasses import dataclass
from typing import Literal

PAPER = "arXiv:2603.21316v1"
README = "the authors' README at commit 65a9517"

#: Table 1: tokens -> backbone -> "trains", "slow" (more than twice the time of pure Mamba) or "OOM", on a GPU of 48 GB.
FEASIBILITY: dict[int, dict[str, Literal["trains", "slow", "OOM"]]] = {
    500: {"mamba": "trains", "helix": "trains", "attention": "trains"},
    3_000: {"mamba": "trains", "helix": "trains", "attention": "slow"},
    30_000: {"mamba": "trains", "helix": "trains", "attention": "OOM"},
}
GPU_BYTES = 48 * 10**9

#: What a driver and torch report of a GPU that is sold as one of 48 GB is a little less: 44.4 GiB of an L40S.
GPU_BYTES_SEEN = int(0.95 * GPU_BYTES)

#: On what the README has its runs; the paper names an RTX 6000 Pro.
GPU = "NVIDIA L40S"

#: The words in the names of GPUs whose hours can be held against theirs: that of the README, and what the paper's name
#: may mean, the RTX 6000 of the Ada generation, which has the L40S's chip and 48 GB, or the RTX PRO 6000.
GPU_CLASS = (("L40S",), ("RTX", "6000", "ADA"), ("RTX", "PRO", "6000"))

#: How far from the published number an accuracy may be and still agree with it. Ours: the paper names none. Two points
#: are less than one standard deviation of ESC-50's folds; one binomial standard error is 0.3 points on Speech Commands
#: and about 1 on VoxPopuli, where the paper has one run of each variant.
TOLERANCE = {"esc50": 0.02, "speech_commands": 0.01, "concat_speech_commands": 0.015, "voxpopuli": 0.03}


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """How the paper lays out one of its Tables 2 to 5: rows are backbones, columns a frontend and what is printed.

    `rows` are (name, backbone), `columns` (name, frontend, "best_test" or "last").
    """

    number: int
    dataset: str
    caption: str
    rows: tuple[tuple[str, str], ...]
    columns: tuple[tuple[str, str, Literal["best_test", "last"]], ...]


_ROWS = (("Pure Mamba", "mamba"), ("HELIX", "helix"), ("Pure Attention", "attention"))
_INPUTS: tuple[tuple[str, str, Literal["best_test", "last"]], ...] = (
    ("Raw", "raw", "best_test"),
    ("Spectrogram", "mel", "best_test"),
)

#: Tables 2 to 5. Pure attention stands in the caption of Table 5 and not in a row of it: it could not run.
TABLES = (
    PaperTable(
        number=2,
        dataset="esc50",
        caption="ESC-50, 5-fold cross-validation, 100 epochs",
        rows=_ROWS,
        columns=_INPUTS,
    ),
    PaperTable(
        number=3,
        dataset="speech_commands",
        caption="Speech Commands v2, one split, epochs as far as the time allowed",
        rows=_ROWS,
        columns=_INPUTS,
    ),
    PaperTable(
        number=4,
        dataset="concat_speech_commands",
        caption="Concatenated Speech Commands, 10 clips, 1,000 tokens, stopped at 24 epochs",
        rows=(("HELIX Raw", "helix"), ("Pure Mamba Raw", "mamba")),
        columns=(("Best accuracy", "raw", "best_test"), ("Final accuracy", "raw", "last")),
    ),
    PaperTable(
        number=5,
        dataset="voxpopuli",
        caption="Speaker identification on VoxPopuli (English), 300 s, 30,000 tokens",
        rows=(("Pure Mamba Raw", "mamba"), ("HELIX Raw", "helix"), ("Pure Attention Raw", "attention")),
        columns=(("Best accuracy", "raw", "best_test"),),
    ),
)

#: What the paper's figures draw, by data set: bars of all variants, and curves over the epochs.
BARS_IN = {"esc50": "Figure 2", "speech_commands": "Figure 3 and the middle of Figure 1"}
CURVES_IN = {
    "esc50": "Figure 4",
    "speech_commands": "Figure 5",
    "concat_speech_commands": "Figure 6",
    "voxpopuli": "Figure 7",
}

#: What their train.py sets (lines 230 to 235) of what section 3.4 says, by the fields of helix/spec.py.
AUTHORS_TRAINING = {"lr": 3e-4, "lr_min": 1e-6, "weight_decay": 0.05, "clip_norm": 1.0}

#: The three points on the axis of attention (section 3.1): none, one layer at position 3, all six.
BACKBONES: dict[str, tuple[str, ...]] = {
    "mamba": ("mamba",) * 6,
    "helix": ("mamba", "mamba", "mamba", "attention", "mamba", "mamba"),
    "attention": ("attention",) * 6,
}

#: How many tokens, from the first, are averaged before the classifier (eq. 11); of other data sets all of them.
POOL_TOKENS = {"concat_speech_commands": 100}

#: Epochs of the moving average of those curves (caption of Figure 4).
SMOOTHING = 7


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published cell: data set, frontend ("raw", "mel") and backbone ("mamba", "helix", "attention").

    `accuracy` is None where the paper tells of a run that could not be made. `std` is the population standard deviation
    (ddof 0) over `folds`. `epochs` None: not stated. `last` is the accuracy after the last epoch (mean over folds).
    `rerun` is the best accuracy of a second run that the README lists; `hours` are those of all folds on one `GPU`.
    """

    dataset: str
    frontend: str
    backbone: str
    accuracy: float | None
    source: str
    std: float | None = None
    folds: int = 1
    epochs: int | None = None
    last: float | None = None
    per_fold: tuple[float, ...] | None = None
    parameters: int | None = None
    rerun: float | None = None
    hours: float | None = None
    note: str = ""


def published(dataset: str, frontend: str, backbone: str) -> Published | None:
    """What was published for one variant on one data set; None where there is nothing to compare with."""
    return _BY_CELL.get((dataset, frontend, backbone))


def _fractions(*percent: float) -> tuple[float, ...]:
    return tuple(round(value / 100, 6) for value in percent)


def _esc50(
    frontend: str,
    backbone: str,
    mean: float,
    std: float,
    last: float,
    folds: tuple[float, ...],
    parameters: int,
    hours: float,
) -> Published:
    accuracy, deviation, final = _fractions(mean, std, last)
    return Published(
        dataset="esc50",
        frontend=frontend,
        backbone=backbone,
        accuracy=accuracy,
        std=deviation,
        folds=len(folds),
        epochs=100,
        last=final,
        per_fold=_fractions(*folds),
        parameters=parameters,
        hours=hours,
        source="Table 2",
    )


def _single(
    dataset: str,
    frontend: str,
    backbone: str,
    accuracy: float | None,
    last: float | None,
    epochs: int | None,
    parameters: int,
    source: str,
    note: str = "",
    rerun: float | None = None,
    hours: float | None = None,
) -> Published:
    return Published(
        dataset=dataset,
        frontend=frontend,
        backbone=backbone,
        accuracy=None if accuracy is None else _fractions(accuracy)[0],
        last=None if last is None else _fractions(last)[0],
        epochs=epochs,
        parameters=parameters,
        source=source,
        note=note,
        rerun=None if rerun is None else _fractions(rerun)[0],
        hours=hours,
    )


_SECOND_RUN = "the README lists a second run: 81.83 best, 77.02 last"
_OOM = "could not run: out of memory on a GPU of 48 GB"

#: Every published cell, in the order of the paper's tables.
PUBLISHED: tuple[Published, ...] = (
    # frontend, backbone, mean, std, mean of the last epochs, best accuracy of folds 1 to 5, parameters, hours
    _esc50("raw", "mamba", 55.10, 3.33, 53.50, (52.25, 51.50, 56.50, 60.75, 54.50), 6_394_162, 4.2),
    _esc50("mel", "mamba", 53.75, 2.92, 52.75, (50.25, 52.50, 55.50, 58.50, 52.00), 6_418_738, 3.1),
    _esc50("raw", "helix", 50.20, 3.71, 49.55, (48.50, 44.00, 53.75, 54.00, 50.75), 6_393_657, 4.1),
    _esc50("mel", "helix", 51.85, 2.41, 49.90, (49.00, 52.00, 51.25, 56.25, 50.75), 6_418_233, 2.9),
    _esc50("raw", "attention", 44.60, 3.16, 43.20, (45.25, 40.50, 42.75, 50.00, 44.50), 6_391_132, 3.6),
    _esc50("mel", "attention", 46.10, 2.97, 44.65, (44.00, 42.50, 44.75, 49.50, 49.75), 6_415_708, 2.4),
    # data set, frontend, backbone, best, last, epochs, parameters, source
    _single("speech_commands", "raw", "mamba", 90.27, 54.54, 76, 6_390_307, "Table 3"),
    _single("speech_commands", "mel", "mamba", 92.36, 92.36, 86, 6_414_883, "Table 3"),
    _single("speech_commands", "raw", "helix", 92.94, 92.79, 81, 6_389_802, "Table 3", hours=12.8),
    _single("speech_commands", "mel", "helix", 92.44, 92.44, 94, 6_414_378, "Table 3"),
    _single("speech_commands", "raw", "attention", 82.43, 78.86, 100, 6_387_277, "Table 3", _SECOND_RUN, 81.83),
    _single("speech_commands", "mel", "attention", 91.27, 91.26, 100, 6_411_853, "Table 3"),
    _single("concat_speech_commands", "raw", "helix", 91.31, 90.44, 24, 6_389_802, "Table 4"),
    _single("concat_speech_commands", "raw", "mamba", 89.81, 89.36, 24, 6_390_307, "Table 4"),
    _single("voxpopuli", "raw", "mamba", 73.55, None, None, 6_718_753, "Table 5"),
    _single("voxpopuli", "raw", "helix", 85.07, None, None, 6_718_248, "Table 5"),
    _single("voxpopuli", "raw", "attention", None, None, None, 6_715_723, "Tables 1 and 5", _OOM),
)

_BY_CELL = {(cell.dataset, cell.frontend, cell.backbone): cell for cell in PUBLISHED}
