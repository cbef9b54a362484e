"""What the abstract, the introduction and the related work claim."""

from dashboards.claim import Claim, Untested
from dashboards.evidence import (
    ATTENTION_MEL,
    ATTENTION_RAW,
    DATASETS_OF_THE_PAPER,
    HELIX_MEL,
    HELIX_RAW,
    MAMBA_MEL,
    MAMBA_RAW,
)
from dashboards.rules.differences import All, Better, Flips
from dashboards.rules.printed import Matched, Prints, Size
from dashboards.rules.running import SameAsPaper, Trains

CLAIMS: tuple[Claim, ...] = (
    Claim(
        id="size",
        where="abstract; section 3.2; Table 1",
        says="All models, of six variants, have about 8.3 million parameters.",
        rule=Size(parameters=8_300_000, tolerance=0.05),
    ),
    Claim(
        id="matched",
        where="abstract; contribution 1; section 3.2",
        says="The models are matched in parameters.",
        # across frontends the patch embeddings differ by construction, by 0.4 %
        rule=Matched(band=0.01, within_frontend=False),
    ),
    Claim(
        id="six-data-sets",
        where="abstract",
        says="The findings are from six data sets: of each there is a result.",
        rule=Prints(datasets=DATASETS_OF_THE_PAPER),
    ),
    Claim(
        id="input-depends",
        where="abstract; contribution 1; section 5.1",
        says="Which input is better, raw or spectrogram, depends on the backbone: on ESC-50 some backbone is better on "
        "the one and some other on the other.",
        rule=Flips(dataset="esc50", frontends=("raw", "mel"), backbones=("mamba", "helix", "attention")),
    ),
    Claim(
        id="attention-hurts-short",
        where="abstract; contribution 2; section 5.1; Figure 2",
        says="Attention hurts on short, stationary audio: on ESC-50 pure Mamba is above both others with either input.",
        rule=All(
            (
                Better(dataset="esc50", first=MAMBA_RAW, second=HELIX_RAW),
                Better(dataset="esc50", first=MAMBA_MEL, second=HELIX_MEL),
                Better(dataset="esc50", first=MAMBA_RAW, second=ATTENTION_RAW),
                Better(dataset="esc50", first=MAMBA_MEL, second=ATTENTION_MEL),
            )
        ),
    ),
    Claim(
        id="attention-helps-speech",
        where="contribution 2",
        says="Attention helps on temporally structured speech.",
        rule=All(
            (
                Better(dataset="speech_commands", first=HELIX_RAW, second=MAMBA_RAW),
                Better(dataset="speech_commands", first=HELIX_MEL, second=MAMBA_MEL),
            )
        ),
    ),
    Claim(
        id="attention-out-of-memory",
        where="abstract",
        says="On 30,000 tokens pure attention fails with out-of-memory errors.",
        rule=Trains(backbone="attention", tokens=30_000, how="OOM", path="authors"),
    ),
    Claim(
        id="attention-cannot-run",
        where="contribution 3; sections 3.1, 5.3 and 6; Table 1; Figure 1",
        says="Pure attention cannot run on 30,000 tokens: six layers exceed a GPU memory of 48 GB.",
        rule=Trains(backbone="attention", tokens=30_000, how="OOM"),
    ),
    Claim(
        id="mamba-runs",
        where="contribution 3; Table 1",
        says="Pure Mamba can run on 30,000 tokens.",
        rule=Trains(backbone="mamba", tokens=30_000, how="trains"),
    ),
    Claim(
        id="helix-closes-11.5",
        where="abstract; contribution 3; section 5.3; Figure 1",
        says="On 5-minute speaker identification (VoxPopuli) HELIX is 11.5 points above pure Mamba, 85.07 against "
        "73.55.",
        rule=Better(dataset="voxpopuli", first=HELIX_RAW, second=MAMBA_RAW, by=0.115, tolerance=0.03),
    ),
    Claim(
        id="same-training",
        where="section 1; section 3.4",
        says="All variants are trained and evaluated in the same way.",
        rule=SameAsPaper(("augment_mel", "mixup_on")),
    ),
    Claim(
        id="ranking-shifts",
        where="section 1",
        says="The ranking shifts with task and length of the sequence: Mamba leads HELIX on ESC-50, HELIX leads it on "
        "Speech Commands and on VoxPopuli.",
        rule=All(
            (
                Better(dataset="esc50", first=MAMBA_RAW, second=HELIX_RAW),
                Better(dataset="speech_commands", first=HELIX_RAW, second=MAMBA_RAW),
                Better(dataset="voxpopuli", first=HELIX_RAW, second=MAMBA_RAW),
            )
        ),
    ),
    Claim(
        id="attention-raw-needs-mel",
        where="Figure 1",
        says="Pure attention strongly prefers spectrograms, on ESC-50 and on Speech Commands.",
        rule=All(
            (
                Better(dataset="esc50", first=ATTENTION_MEL, second=ATTENTION_RAW),
                Better(dataset="speech_commands", first=ATTENTION_MEL, second=ATTENTION_RAW),
            )
        ),
    ),
)

UNTESTED: tuple[Untested, ...] = (
    Untested(
        where="abstract",
        says="Conclusions from one setting often do not transfer to others.",
        why="says not how often; the differences that it rests on are claims of their own",
    ),
    Untested(where="section 1", says="Spectrograms throw phase away.", why="true by construction, of no run"),
    Untested(where="section 1", says="Mamba models sequences in linear time.", why="about the literature"),
    Untested(
        where="section 1",
        says="One attention layer is the smallest departure from a pure SSM that interacts globally.",
        why="a matter of definition",
    ),
    Untested(where="section 1", says="One configuration was expected to dominate.", why="what the authors expected"),
    Untested(
        where="section 2",
        says="Earlier work changed one design choice at a time; raw audio is viable; hybrids were proposed.",
        why="about other papers",
    ),
    Untested(
        where="section 2", says="HELIX anchors a comparison and is no new architecture.", why="a statement of intent"
    ),
)
