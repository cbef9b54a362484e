"""What the analysis and the conclusion (section 6) claim."""

from dashboards.claim import Claim, Untested
from dashboards.evidence import ATTENTION_MEL, ATTENTION_RAW, HELIX_MEL, HELIX_RAW, MAMBA_MEL, MAMBA_RAW
from dashboards.rules.differences import All, Better, Depends, Grows, Level

CLAIMS: tuple[Claim, ...] = (
    Claim(
        id="axes-interact",
        where="section 6",
        says="Input, backbone and amount of attention are not independent choices: what an input gains changes with "
        "the backbone, on ESC-50 and on Speech Commands.",
        rule=All(
            (
                Depends(dataset="esc50", frontends=("raw", "mel"), backbones=("mamba", "attention")),
                Depends(dataset="speech_commands", frontends=("raw", "mel"), backbones=("helix", "attention")),
            )
        ),
    ),
    Claim(
        id="near-zero-short",
        where="section 6",
        says="The advantage of HELIX over pure Mamba is near zero on short stationary audio: within 1 "
        "point on ESC-50 (where section 5.1 has it 5 points behind).",
        rule=Level(dataset="esc50", first=HELIX_RAW, second=MAMBA_RAW, within=0.01),
    ),
    Claim(
        id="moderate-speech",
        where="section 6",
        says="The advantage of HELIX over pure Mamba is moderate on temporally structured speech.",
        rule=Better(dataset="speech_commands", first=HELIX_RAW, second=MAMBA_RAW),
    ),
    Claim(
        id="grows-with-length",
        where="section 6; section 4.1",
        says="The advantage of HELIX over pure Mamba grows with the number of tokens: 100, 500, 1,000, 30,000.",
        rule=Grows(
            datasets=("speech_commands", "esc50", "concat_speech_commands", "voxpopuli"),
            first=HELIX_RAW,
            second=MAMBA_RAW,
        ),
    ),
    Claim(
        id="net-cost-short",
        where="section 6",
        says="On short sequences, ESC-50 and LibriSpeech at 30 s, the attention layer is a net cost.",
        rule=All(
            (
                Better(dataset="esc50", first=MAMBA_RAW, second=HELIX_RAW),
                Better(dataset="librispeech", first=MAMBA_RAW, second=HELIX_RAW),
            )
        ),
    ),
    Claim(
        id="short-favours-recurrence",
        where="section 6",
        says="Short stationary audio favours recurrence, on ESC-50 as on UrbanSound8K.",
        rule=All(
            tuple(
                Better(dataset=dataset, first=first, second=second)
                for dataset in ("esc50", "urbansound8k")
                for first, second in (
                    (MAMBA_RAW, HELIX_RAW),
                    (MAMBA_RAW, ATTENTION_RAW),
                    (MAMBA_MEL, HELIX_MEL),
                    (MAMBA_MEL, ATTENTION_MEL),
                )
            )
        ),
    ),
    Claim(
        id="speech-favours-some-attention",
        where="section 6",
        says="Moderately structured speech benefits from a small amount of attention, above none and above all.",
        rule=All(
            (
                Better(dataset="speech_commands", first=HELIX_RAW, second=MAMBA_RAW),
                Better(dataset="speech_commands", first=HELIX_RAW, second=ATTENTION_RAW),
            )
        ),
    ),
    Claim(
        id="hybrids-win-long",
        where="section 6",
        says="On the longest clips hybrids outperform both extremes by a substantial margin.",
        rule=All(
            (
                Better(dataset="voxpopuli", first=HELIX_RAW, second=MAMBA_RAW),
                Better(dataset="voxpopuli", first=HELIX_RAW, second=ATTENTION_RAW),
            )
        ),
    ),
    Claim(
        id="clear-and-consistent",
        where="section 6",
        says="With three points on the axis of attention the effects are clear and consistent: on ESC-50 each point of "
        "the axis differs from the next.",
        rule=All(
            (
                Better(dataset="esc50", first=MAMBA_RAW, second=HELIX_RAW),
                Better(dataset="esc50", first=HELIX_RAW, second=ATTENTION_RAW),
                Better(dataset="esc50", first=MAMBA_MEL, second=HELIX_MEL),
                Better(dataset="esc50", first=HELIX_MEL, second=ATTENTION_MEL),
            )
        ),
    ),
)

UNTESTED: tuple[Untested, ...] = (
    Untested(
        where="section 6",
        says="Information decays in recurrence over 30,000 steps; attention at mid-stack synchronises it.",
        why="a hypothesis, as the paper says; needs retention by token or other positions of the layer",
    ),
    Untested(
        where="section 6",
        says="The widening gap makes the advantage structural and no artifact of optimization.",
        why="an inference; the gap is a claim of its own, and several seeds would speak to it",
    ),
    Untested(
        where="section 6",
        says="Let recurrence handle most of the sequence and spend a little attention where information is spread.",
        why="advice",
    ),
    Untested(
        where="section 6",
        says="Raw helps where fine detail matters; spectrograms where stability and length matter more.",
        why="names no task on which it could fail",
    ),
    Untested(
        where="section 6",
        says="Conclusions from short sequences did not hold at longer scales, in the wider literature neither.",
        why="the first half is tested by the rankings, the second is about other papers",
    ),
    Untested(
        where="section 6", says="Only classification and one placement were evaluated.", why="a limit, not a claim"
    ),
)
