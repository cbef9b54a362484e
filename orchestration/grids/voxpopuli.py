"""Who speaks in these 300 seconds? 30000 raw tokens, the paper's Table 5.

Question.    Pure Mamba, HELIX and pure attention on raw waveforms, over the 1313 speakers of VoxPopuli English: is HELIX
             better at this length, and can pure attention be trained at all, where the paper reports that memory ran out?
Command.     python orchestration/sweep.py --grid voxpopuli --source VOXPOPULI
Trials.      3 variants on raw audio x 1 split x 1 seed = 3, the paper's size and 100 epochs.
Price.       The paper says more than 40 (page 6) or more than 65 (page 8) GPU-hours a run on one L40S; 120 to 200 in all.
Expectation. The paper publishes a number for Mamba and for HELIX and "out of memory" for attention. That cell is the
             attention weights being kept: without them a step at this length fits in 4.4 GB. About one clip of a speaker is
             tested on, so gaps below two points mean nothing.
"""

from orchestration.grid import GRIDS, VARIANTS, Grid

GRID = GRIDS.register("voxpopuli")(
    Grid(
        question=__doc__ or "",
        dataset="voxpopuli",
        folds=(1,),
        variants=tuple(variant for variant in VARIANTS if variant.frontend == "raw"),
    )
)
