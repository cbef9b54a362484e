"""Does one attention layer help to label the first of ten spoken words? The paper's Table 4.

Question.    Ten recordings of Speech Commands one after the other, 1000 raw tokens, the label of the first: is
             HELIX better than pure Mamba? As in the paper the first 100 tokens are pooled, which are the labelled word
             itself, so this asks what ten seconds of context do to it, and not for memory. What asks for memory are the
             arms model.pool_tokens=null (all tokens) and model.pool=last (those of the last word).
Command.     python orchestration/sweep.py --grid concat_speech_commands --source speech_commands_v0.02
             (add model.pool=last, or data.options.position=9, for the arms)
Trials.      3 variants on raw audio x 1 official split x 1 seed = 3, the paper's size and its 24 epochs.
Price.       The authors report 24 minutes per epoch on one L40S: about 10 GPU-hours a trial, 30 in all.
Expectation. The paper, best of 24 epochs: HELIX 91.3, Mamba 89.8 %; attention was not run. A gap that stays with
             model.pool=last would be the finding that the paper claims; pure attention has no positions and should not
             know which word is the first, whatever is pooled but the first 100 tokens.
"""

from helix.published import POOL_TOKENS
from orchestration.grid import GRIDS, VARIANTS, Grid

GRID = GRIDS.register("concat_speech_commands")(
    Grid(
        question=__doc__ or "",
        dataset="concat_speech_commands",
        folds=(1,),
        variants=tuple(variant for variant in VARIANTS if variant.frontend == "raw"),
        overrides={"training.epochs": 24, "model.pool_tokens": POOL_TOKENS["concat_speech_commands"]},
    )
)
