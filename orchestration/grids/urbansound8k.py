"""Does the ranking of the six variants on environmental sound hold on four times the data?

Question.    Pure Mamba, HELIX and pure attention, on raw waveforms and on mel spectrograms, over the ten official folds
             of UrbanSound8K: is the order the one of ESC-50, where every class has only 32 clips to train on?
Command.     python orchestration/sweep.py --grid urbansound8k --source UrbanSound8K
Trials.      6 variants x 10 official folds x 1 seed = 60, the paper's size and 100 epochs.
Price.       About 150 to 210 GPU-hours on one L40S, scaled from the authors' ESC-50 runs by samples (about 9.8 times
             the clips at 0.8 of the length). The paper says less than 5 hours per variant, which that does not support.
Expectation. The paper lists this data set and publishes no accuracy for it, so there is no target. With ten folds a gap
             of two points can be resolved; a raw frontend that beats mel by more would be a surprise.
"""

from orchestration.grid import GRIDS, Grid

GRID = GRIDS.register("urbansound8k")(Grid(question=__doc__ or "", dataset="urbansound8k", folds=tuple(range(1, 11))))
