"""Which backbone and which frontend classify environmental sound best? The paper's Table 2.

Question.    Pure Mamba, HELIX (one attention layer) and pure attention, on raw waveforms and on mel spectrograms,
             trained from scratch on ESC-50: is one better, and does the preferred input depend on the backbone?
Command.     python orchestration/sweep.py --grid esc50 --source ESC-50-master
Trials.      6 variants x 5 official folds x 1 seed = 30, the paper's size and 100 epochs.
Price.       The authors report 20.3 GPU-hours for these 30 runs on one L40S.
Expectation. The paper: Mamba raw 55.1, Mamba mel 53.8, HELIX raw 50.2, HELIX mel 51.9, attention raw 44.6, attention
             mel 46.1 % (best test epoch, mean of five folds). Under the corrected test over five folds the gap of
             Mamba over attention holds and the raw-mel gaps do not; a raw-mel gap that holds would be a surprise.
"""

from orchestration.grid import GRIDS, Grid

GRID = GRIDS.register("esc50")(Grid(question=__doc__ or "", dataset="esc50", folds=(1, 2, 3, 4, 5)))
