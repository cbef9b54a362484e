"""Which backbone recognises single spoken words best? The paper's Table 3.

Question.    Pure Mamba, HELIX and pure attention, on raw waveforms and on mel spectrograms, trained from scratch on the
             official split of Speech Commands v2: does HELIX lead on raw audio, at equal epochs?
Command.     python orchestration/sweep.py --grid speech_commands --source speech_commands_v0.02
Trials.      6 variants x 1 official split x 3 seeds = 18, the paper's size and 100 epochs. The split is one, so only
             seeds tell noise from difference.
Price.       About 16 GPU-hours a trial on one L40S (12.8 hours bought the authors 81 epochs), 290 in all.
Expectation. The paper, at 76 to 100 epochs each: HELIX raw 92.9, HELIX mel 92.4, Mamba mel 92.4, attention mel 91.3,
             Mamba raw 90.3 (and 54.5 at its last epoch), attention raw 82.4 %. A raw Mamba that does not fall apart
             would say that its number was an accident of one run.
"""

from orchestration.grid import GRIDS, Grid

GRID = GRIDS.register("speech_commands")(
    Grid(question=__doc__ or "", dataset="speech_commands", folds=(1,), seeds=(0, 1, 2))
)
