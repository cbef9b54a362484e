"""In what the trials of a cell are not as the paper's, and what of the paper they can then speak of."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dashboards.view import CellView, SweepView
from helix.protocol import SWITCHES
from helix.published import BACKBONES, POOL_TOKENS
from helix.registry import BLOCKS, DATASETS, FRONTENDS, Registry
from helix.spec import PAPER_SHIFT_S, AugmentSpec, ModelSpec, TrainingSpec

#: What helix/spec.py calls the numbers of section 3.4, in words. Its defaults are those of the paper.
SETTING_WORDS = {
    "batch_size": "batch size",
    "lr": "learning rate",
    "lr_min": "final learning rate",
    "weight_decay": "weight decay",
    "clip_norm": "gradient norm clipped at",
    "precision": "precision",
    "shift_s": "shift of at most",
    "gain_low": "smallest gain",
    "gain_high": "largest gain",
    "noise": "noise",
    "mixup_alpha": "mixup alpha",
}

#: What is said and takes nothing away: section 3.4 trains in FP16 "where memory requires" and names no run, and the
#: authors' results do not record it, so that products of fewer bits are what theirs may have had. Who is in which part
#: of a set of speakers is as theirs in no run of ours: nothing fixes the order of the files that their seed shuffles.
#: What to do about a loss that is not finite is no matter of runs whose losses are.
COMPARABLE = ("precision", "split_seed", "divergence")

#: The switches that concern one frontend, block or kind of data set alone.
OF_FRONTEND = {"raw_norm": "raw", "mel_pad": "mel", "mel_order": "mel", "mel_norm": "mel", "augment_mel": "mel"}
OF_BLOCK = {"decay": "mamba", "ffn_match": "attention", "pos": "attention"}
OF_SPEAKERS = ("stitch", "speaker_split")

#: The switch whose choices give the same numbers, but for rounding.
SAME_NUMBERS = "attn_impl"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One thing that is not as the paper's, as a phrase, and what runs with it can still speak of.

    "all": what the paper prints and says. "sentences": its sentences on what is better, and no printed number: that is
    what good practice (the profile fair) has otherwise, under which a sentence holds or does not. "nothing": neither.
    """

    phrase: str
    speaks_of: Literal["all", "sentences", "nothing"] = "nothing"


def other_settings(cell: CellView, switches: Mapping[str, str]) -> tuple[Setting, ...]:
    """In what a cell's recordings, model, training and augmentation differ from the paper's and its authors'.

    `switches`: those of helix/protocol.py that are in force. The epochs and the size of the model are left out: of
    these the paper has other numbers for each data set. What either of the paper and its authors' code has is theirs.
    """
    named = _other_data(cell) | _other_model(cell) | _other_training(cell)
    found = [Setting(phrase=said, speaks_of="all" if name in COMPARABLE else "nothing") for name, said in named.items()]
    return (*found, *_other_switches(cell, switches))


def unlike_authors(view: SweepView) -> list[str]:
    """The switches that train differently from the authors' code, which made the published numbers."""
    return [
        name
        for name, row in SWITCHES.items()
        if not row["reporting"] and name in view.switches and view.switches[name] != row["authors"]
    ]


def _other_data(cell: CellView) -> dict[str, str]:
    """The options of the data set that are not its defaults."""
    if cell.dataset not in DATASETS.names():
        return {}
    return _unlike(*_options(DATASETS, cell.dataset, cell.options))


def _other_model(cell: CellView) -> dict[str, str]:
    """The order of the layers, what is pooled, and the options of the frontend and the blocks."""
    model = cell.model
    if model is None:
        return {}
    theirs = _pooled(ModelSpec(pool_tokens=POOL_TOKENS.get(cell.dataset)), cell.tokens)
    ours = _pooled(model, cell.tokens)
    found = {} if ours == theirs else {"pool": f"{ours} pooled instead of {theirs}"}
    if cell.pattern != BACKBONES.get(cell.backbone, cell.pattern):
        found["pattern"] = f"other layers than the paper's {cell.backbone}"
    for name, members in (dict.fromkeys(model.pattern, BLOCKS) | {model.frontend: FRONTENDS}).items():
        if name in members.names():
            unlike = _unlike(*_options(members, name, model.options.get(name, {})))
            found |= {f"{name}.{option}": f"{name} {phrase}" for option, phrase in unlike.items()}
    return found


def _other_training(cell: CellView) -> dict[str, str]:
    """What section 3.4 has otherwise. A shift that the authors' code or the paper has is theirs."""
    shifts = {None, PAPER_SHIFT_S}
    if cell.dataset in DATASETS.names():
        shifts.add(float(DATASETS.make(cell.dataset).authors_shift_s))
    found = {}
    for given, paper in ((cell.training, TrainingSpec()), (cell.augment, AugmentSpec())):
        for name, theirs in vars(paper).items():
            ours = getattr(given, name, theirs)
            if name == "epochs" or ours == theirs or (name == "shift_s" and ours in shifts):
                continue
            theirs = PAPER_SHIFT_S if name == "shift_s" else theirs
            found[name] = _instead(SETTING_WORDS[name], ours, theirs)
    return found


def _other_switches(cell: CellView, switches: Mapping[str, str]) -> list[Setting]:
    """The switches that concern the cell and stand neither as in the paper nor as in its authors' code."""
    speakers = cell.dataset in DATASETS.names() and not DATASETS.make(cell.dataset).clip_per_recording
    found = []
    for name, row in SWITCHES.items():
        ours = switches.get(name, row["paper"])
        if row["reporting"] or name == SAME_NUMBERS or ours in (row["paper"], row["authors"]):
            continue
        elsewhere = (
            OF_FRONTEND.get(name, cell.frontend) != cell.frontend
            or (name in OF_BLOCK and OF_BLOCK[name] not in cell.pattern)
            or (name in OF_SPEAKERS and not speakers)
        )
        if elsewhere:
            continue
        speaks_of = "all" if name in COMPARABLE else "sentences" if ours == row["fair"] else "nothing"
        found.append(Setting(phrase=_instead(name, ours, row["authors"]), speaks_of=speaks_of))
    return found


def _options(members: Registry[Any], name: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """All options of a member, and its defaults. A member of a user's own may want options, or have lost one since."""
    try:
        theirs = members.resolve(name)
    except (TypeError, ValueError):
        return {}, {}  # without defaults it is none of the paper's
    try:
        return members.resolve(name, given), theirs
    except ValueError:
        return {**theirs, **given}, theirs


def _unlike(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: _instead(name, value, theirs[name]) if name in theirs else f"{name} {_setting(value)}"
        for name, value in ours.items()
        if name not in theirs or value != theirs[name]
    }


def _instead(what: str, ours: Any, theirs: Any) -> str:
    return f"{what} {_setting(ours)} instead of {_setting(theirs)}"


def _pooled(model: ModelSpec, tokens: int | None) -> str:
    some = model.pool_tokens is not None and (tokens is None or model.pool_tokens < tokens)
    return f"the {model.pool} {model.pool_tokens} tokens" if some else "all tokens"


def _setting(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)
