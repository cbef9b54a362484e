"""Who speaks in these 300 seconds? 30000 raw tokens, the paper's Table 5.

Question.    Pure Mamba, HELIX and pure attention over the 1313 speakers of VoxPopuli English: is HELIX better at this
             length, can pure attention be trained at all, where the paper reports that memory ran out, and does a mel
             spectrogram discard what tells speakers apart, which the paper says and never ran?
Command.     python orchestration/sweep.py --grid voxpopuli --source VOXPOPULI
Trials.      6 variants x 1 split x 1 seed = 6, the paper's size and 100 epochs.
Price.       The paper says more than 40 (section 4.2) or more than 65 (section 6) GPU-hours a raw run on its GPU; 200
             to 300 GPU-hours in all.
Expectation. The paper: HELIX raw 85.1, Mamba raw 73.6 %, attention out of memory. That cell is the attention weights
             being kept: without them a step at this length fits in 4.4 GB. About one clip of a speaker is tested on, so
             a gap below two points means nothing.
"""

from orchestration.grid import GRIDS, Grid

GRID = GRIDS.register("voxpopuli")(Grid(question=__doc__ or "", dataset="voxpopuli", folds=(1,)))
