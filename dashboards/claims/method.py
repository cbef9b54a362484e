"""What the methodology (section 3) claims."""

from dashboards.claim import Claim, Untested
from dashboards.rules.printed import Matched, Prints, Shortens, Tokens
from dashboards.rules.running import SameAsPaper

CLAIMS: tuple[Claim, ...] = (
    Claim(
        id="tokens-esc50-raw",
        where="section 3.1",
        says="A clip of 5 s is 500 raw tokens.",
        rule=Tokens(dataset="esc50", frontend="raw", tokens=500),
    ),
    Claim(
        id="tokens-voxpopuli-raw",
        where="section 3.1",
        says="A clip of 5 minutes is 30,000 raw tokens.",
        rule=Tokens(dataset="voxpopuli", frontend="raw", tokens=30_000),
    ),
    Claim(
        id="tokens-esc50-mel",
        where="section 3.1",
        says="A clip of 5 s is about 80 tokens of its spectrogram.",
        rule=Tokens(dataset="esc50", frontend="mel", tokens=80, tolerance=0.05),
    ),
    Claim(
        id="mel-pad",
        where="section 3.1, eq. 2",
        says="Patches along time are rounded up.",
        rule=SameAsPaper(("mel_pad",)),
    ),
    Claim(
        id="mel-shorter",
        where="section 3.1",
        says="The spectrogram path gives over 6 times fewer tokens.",
        rule=Shortens(dataset="esc50", times=6),
    ),
    Claim(
        id="ffn-width",
        where="section 3.2, eq. 10",
        says="The width of the feed-forward layer follows from eq. 10.",
        rule=SameAsPaper(("ffn_match",)),
    ),
    Claim(
        id="layers-matched",
        where="section 3.2",
        says="Every layer, of either type, has nearly the same number of parameters.",
        rule=Matched(band=0.001, within_frontend=True),
    ),
    Claim(
        id="augmentation",
        where="section 3.4",
        says="Shift by up to 0.5 s, gain, noise and mixup are applied to the audio of all variants.",
        rule=SameAsPaper(("shift", "augment_mel", "mixup_on")),
    ),
    Claim(
        id="optimiser",
        where="section 3.4",
        says="AdamW with weight decay 0.05, cosine annealing to 1e-6.",
        rule=SameAsPaper(("decay", "schedule_unit"), numbers=("weight_decay", "lr_min")),
    ),
    Claim(
        id="selection",
        where="section 3.4; section 5",
        says="What is reported is the best test accuracy over the epochs, over folds with mean and std.",
        rule=SameAsPaper(("select", "std")),
    ),
    Claim(
        id="folds-reported",
        where="section 3.4",
        says="ESC-50 and UrbanSound8K are reported as mean ± std over their folds.",
        rule=Prints(datasets=("esc50", "urbansound8k"), folds=True),
    ),
    Claim(
        id="single-splits-reported",
        where="section 3.4",
        says="Of each data set with a single split the best test accuracy is reported.",
        rule=Prints(datasets=("speech_commands", "concat_speech_commands", "librispeech", "voxpopuli")),
    ),
)

UNTESTED: tuple[Untested, ...] = (
    Untested(
        where="section 3.1",
        says="The raw path preserves phase and makes the backbone learn its own decomposition.",
        why="would need a look inside trained models",
    ),
    Untested(
        where="section 3.1",
        says="The frontend changes how expensive attention is and how much structure the backbone sees.",
        why="a reading; the numbers of tokens are claims of their own",
    ),
    Untested(
        where="section 3.1",
        says="Bidirectional blocks are necessary for classification.",
        why="no run with causal blocks is in the paper, and section 3.3 calls the same layers causal",
    ),
    Untested(
        where="section 3.1",
        says="Three Mamba layers build local features, attention interacts, two layers refine.",
        why="would need a look inside trained models",
    ),
    Untested(
        where="section 3.1",
        says="Attention placed earlier or later would do worse than at position 3.",
        why="no other position was run; a grid over positions would test it",
    ),
    Untested(
        where="section 3.2",
        says="A gap of 10 % is architectural, not a matter of capacity.",
        why="an inference from the match of parameters, which is a claim of its own; training noise is a third cause",
    ),
    Untested(
        where="section 3.3",
        says="Pooling the first 100 tokens makes Concat Speech Commands a test of retention.",
        why="those 100 tokens are the labelled clip itself, so nothing is retained; pooling the last 100 would test it",
    ),
    Untested(
        where="section 3.3",
        says="The model processes the sequence causally; a backbone that lets early information decay will fail.",
        why="the blocks of section 3.1 are bidirectional, so the sentence is about another model",
    ),
    Untested(
        where="section 3.4",
        says="Clipping is necessary: SSM variants diverge without it now and then.",
        why="no run without clipping is in the paper; two sweeps that differ in it would test it",
    ),
    Untested(
        where="section 3.4",
        says="Mixup mattered most on small data sets.",
        why="no run without mixup is in the paper; a grid with and without it would test it",
    ),
    Untested(
        where="section 3.4",
        says="Batch 32, learning rate 3e-4, FP16 where memory requires it.",
        why="batch and precision of the long runs are not recorded anywhere",
    ),
)
