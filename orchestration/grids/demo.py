"""Can a model tell the order of three tones, or only which tones there are?

Question.    The classes of `tones` come in pairs that differ in nothing but temporal order. Which of the six
             parameter-matched variants tells the two of a pair apart?
Command.     python orchestration/sweep.py --grid demo
Trials.      6 variants x 2 folds x 1 seed = 12, small preset.
Price.       About 5 minutes on two CPU cores; no GPU, no download.
Expectation. Pure attention has no notion of position, so it sees a bag of tokens and cannot pass the accuracy of
             guessing between the two of a pair (50 %). Mamba and HELIX can. A pure attention model well above 50 %
             would be a surprise, and so would a Mamba that stays below it.
"""

from orchestration.grid import GRIDS, Grid

GRID = GRIDS.register("demo")(
    Grid(
        question=__doc__ or "",
        dataset="tones",
        folds=(1, 2),
        preset="small",
        overrides={"training.epochs": 8, "training.batch_size": 16, "training.lr": 0.006},
    )
)
