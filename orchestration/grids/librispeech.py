"""Who reads these 30 seconds? Speaker identification at 3000 raw tokens, where the paper sees no advantage.

Question.    Pure Mamba, HELIX and pure attention, on raw waveforms and on mel spectrograms, over the 251 readers of
             train-clean-100: does an attention layer change anything at this length, and do the gaps survive where no
             chapter stands on both sides (--profile fair)?
Command.     python orchestration/sweep.py --grid librispeech --source LibriSpeech
             (data.options.subset=train-clean-360 asks it of 921 readers, the number that the paper states)
Trials.      6 variants x 1 split x 3 seeds = 18, the paper's size and 100 epochs.
Price.       Not reported by the authors. Scaled from their ESC-50 runs by seconds of audio (9700 clips of 30 s an
             epoch), about 30 GPU-hours a trial on one L40S, 540 in all.
Expectation. The paper: advantage 0, without a number. Under the profile paper chapters leak and all variants should be
             near 100 %; a gap between variants that appears only under fair would be worth a second look.
"""

from orchestration.grid import GRIDS, Grid

GRID = GRIDS.register("librispeech")(Grid(question=__doc__ or "", dataset="librispeech", folds=(1,), seeds=(0, 1, 2)))
