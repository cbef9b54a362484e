"""What the results (section 5) claim, with Tables 2 to 5 and Figures 1 to 7."""

from dashboards.claim import Claim, Untested
from dashboards.evidence import ATTENTION_MEL, ATTENTION_RAW, HELIX_MEL, HELIX_RAW, MAMBA_MEL, MAMBA_RAW, SIX
from dashboards.rules.courses import Collapses, Converged, PullsAway, StillRising
from dashboards.rules.differences import All, Better, Depends, Grows, Level
from dashboards.rules.printed import Reported, Tokens
from dashboards.rules.running import Epochs, FewerEpochs
from helix.published import PUBLISHED, TOLERANCE, Published


def _reported(cell: Published) -> list[Claim]:
    """The accuracy of one cell; in Table 4 also that of the last epoch. `cell.last` of other tables is the README's."""
    claims = []
    name = f"{cell.dataset}-{cell.backbone}-{cell.frontend}"
    for last, accuracy in ((False, cell.accuracy), (True, cell.last if cell.source == "Table 4" else None)):
        if accuracy is None:
            continue
        spread = f" ± {100 * cell.std:.2f}" if cell.std is not None else ""
        claims.append(
            Claim(
                id=f"{name}-last" if last else name,
                where=cell.source,
                says=f"{cell.backbone} {cell.frontend} on {cell.dataset}: {'final' if last else 'best'} accuracy "
                f"{100 * accuracy:.2f}{spread} %.",
                rule=Reported(
                    dataset=cell.dataset,
                    variant=(cell.frontend, cell.backbone),
                    accuracy=accuracy,
                    tolerance=TOLERANCE[cell.dataset],
                    std=cell.std,
                    per_fold=cell.per_fold,
                    last=last,
                ),
            )
        )
    return claims


_SPEECH = tuple(("speech_commands", variant) for variant in SIX)
_ENDED_EARLY = tuple(("speech_commands", variant) for variant in (MAMBA_RAW, MAMBA_MEL, HELIX_RAW, HELIX_MEL))
_CONCAT = (("concat_speech_commands", HELIX_RAW), ("concat_speech_commands", MAMBA_RAW))

CLAIMS: tuple[Claim, ...] = (
    *(claim for cell in PUBLISHED for claim in _reported(cell)),
    Claim(
        id="converged",
        where="section 5",
        says="Runs that were ended early had converged, or nearly.",
        rule=Converged(of=(*_ENDED_EARLY, *_CONCAT), within=0.01),
    ),
    Claim(
        id="table-3-ended-early",
        where="Table 3",
        says="The runs were terminated before 100 epochs.",
        rule=Epochs(of=_SPEECH, before=100),
    ),
    Claim(
        id="helix-raw-leads-speech",
        where="Figure 3",
        says="HELIX raw leads on Speech Commands, above all five others.",
        rule=All(
            tuple(
                Better(dataset="speech_commands", first=HELIX_RAW, second=other) for other in SIX if other != HELIX_RAW
            )
        ),
    ),
    Claim(
        id="helix-fewer-epochs",
        where="Figure 3",
        says="HELIX raw leads on Speech Commands despite fewer epochs than those that it leads.",
        rule=FewerEpochs(
            dataset="speech_commands", first=HELIX_RAW, others=tuple(one for one in SIX if one != HELIX_RAW)
        ),
    ),
    Claim(
        id="mamba-prefers-raw",
        where="section 5.1",
        says="On ESC-50 pure Mamba prefers raw waveforms, 55.10 against 53.75.",
        rule=Better(dataset="esc50", first=MAMBA_RAW, second=MAMBA_MEL, by=0.0135),
    ),
    Claim(
        id="attention-prefers-mel",
        where="section 5.1",
        says="On ESC-50 pure attention prefers spectrograms, 46.10 against 44.60.",
        rule=Better(dataset="esc50", first=ATTENTION_MEL, second=ATTENTION_RAW, by=0.015),
    ),
    Claim(
        id="preference-flips",
        where="section 5.1; Figure 2",
        says="The preferred input flips between backbones: Mamba is better on raw, attention on spectrograms.",
        rule=All(
            (
                Better(dataset="esc50", first=MAMBA_RAW, second=MAMBA_MEL),
                Better(dataset="esc50", first=ATTENTION_MEL, second=ATTENTION_RAW),
            )
        ),
    ),
    Claim(
        id="no-small-effect",
        where="section 5.1",
        says="That the preferred input depends on the backbone is no small effect: by raw over spectrogram pure Mamba "
        "gains 2.85 points more than pure attention, +1.35 against -1.50.",
        rule=Depends(dataset="esc50", frontends=("raw", "mel"), backbones=("mamba", "attention"), by=0.0285),
    ),
    Claim(
        id="best-raw-beats-best-mel",
        where="section 5.1",
        says="The best raw model (Mamba) beats every spectrogram model on ESC-50.",
        rule=All(
            tuple(
                Better(dataset="esc50", first=MAMBA_RAW, second=other)
                for other in (MAMBA_MEL, HELIX_MEL, ATTENTION_MEL)
            )
        ),
    ),
    Claim(
        id="mamba-5-above-helix",
        where="section 5.1",
        says="On ESC-50 pure Mamba outperforms HELIX by 5 points.",
        rule=Better(dataset="esc50", first=MAMBA_RAW, second=HELIX_RAW, by=0.05),
    ),
    Claim(
        id="mamba-10-above-attention",
        where="section 5.1",
        says="On ESC-50 pure Mamba outperforms pure attention by over 10 points.",
        rule=Better(dataset="esc50", first=MAMBA_RAW, second=ATTENTION_RAW, at_least=0.10),
    ),
    Claim(
        id="mamba-surpasses-mel",
        where="Figure 4",
        says="On fold 1 of ESC-50 pure Mamba raw ends above all spectrogram variants (7-epoch average).",
        rule=All(
            tuple(
                PullsAway(dataset="esc50", first=MAMBA_RAW, second=other, after=90, fold=1, widens=False)
                for other in (MAMBA_MEL, HELIX_MEL, ATTENTION_MEL)
            )
        ),
    ),
    Claim(
        id="raw-learns-slower",
        where="Figure 4",
        says="On fold 1 of ESC-50 raw models learn slower than spectrogram models: behind in the first 20 epochs.",
        rule=All(
            tuple(
                PullsAway(dataset="esc50", first=mel, second=raw, after=0, until=20, fold=1, widens=False)
                for mel, raw in ((MAMBA_MEL, MAMBA_RAW), (HELIX_MEL, HELIX_RAW), (ATTENTION_MEL, ATTENTION_RAW))
            )
        ),
    ),
    Claim(
        id="mamba-prefers-mel-speech",
        where="Figure 1",
        says="On Speech Commands pure Mamba does not prefer raw: its spectrogram model is better.",
        rule=Better(dataset="speech_commands", first=MAMBA_MEL, second=MAMBA_RAW),
    ),
    Claim(
        id="helix-2.7-above-mamba",
        where="section 5.1",
        says="On Speech Commands HELIX raw overtakes pure Mamba raw by 2.7 points.",
        rule=Better(dataset="speech_commands", first=HELIX_RAW, second=MAMBA_RAW, by=0.027),
    ),
    Claim(
        id="attention-raw-10-behind",
        where="section 5.1",
        says="Pure attention raw collapses on Speech Commands, nearly 10 points behind.",
        rule=Better(dataset="speech_commands", first=HELIX_RAW, second=ATTENTION_RAW, by=0.10),
    ),
    Claim(
        id="speech-mel-tokens",
        where="section 5.1",
        says="A spectrogram of Speech Commands is about 10 tokens.",
        rule=Tokens(dataset="speech_commands", frontend="mel", tokens=10, tolerance=0.1),
    ),
    Claim(
        id="attention-recovers-mel",
        where="section 5.1",
        says="On the spectrograms of Speech Commands pure attention recovers.",
        rule=Better(dataset="speech_commands", first=ATTENTION_MEL, second=ATTENTION_RAW),
    ),
    Claim(
        id="mamba-raw-destabilizes",
        where="Figure 5",
        says="On Speech Commands pure Mamba raw destabilizes after epoch 30 and never recovers.",
        rule=Collapses(dataset="speech_commands", variant=MAMBA_RAW, by=0.10, after=30),
    ),
    Claim(
        id="helix-raw-climbs",
        where="Figure 5",
        says="HELIX raw climbs steadily: it ends near its best.",
        rule=Converged(of=(("speech_commands", HELIX_RAW),), within=0.005),
    ),
    Claim(
        id="attention-raw-plateaus",
        where="Figure 5",
        says="Pure attention raw plateaus at about 82 %: it ends within a point of its best.",
        rule=Converged(of=(("speech_commands", ATTENTION_RAW),), within=0.01),
    ),
    Claim(
        id="mel-stabilizes",
        where="Figure 5",
        says="Spectrograms stabilize all architectures: none ends far below its best.",
        rule=Converged(
            of=tuple(("speech_commands", one) for one in (MAMBA_MEL, HELIX_MEL, ATTENTION_MEL)), within=0.005
        ),
    ),
    Claim(
        id="mel-gap-1",
        where="Figure 5",
        says="On spectrograms the gap between variants shrinks to about 1 point.",
        rule=All(
            (
                Level(dataset="speech_commands", first=MAMBA_MEL, second=HELIX_MEL, within=0.015),
                Level(dataset="speech_commands", first=MAMBA_MEL, second=ATTENTION_MEL, within=0.015),
                Level(dataset="speech_commands", first=HELIX_MEL, second=ATTENTION_MEL, within=0.015),
            )
        ),
    ),
    Claim(
        id="concat-1.5",
        where="section 5.2",
        says="On Concat Speech Commands HELIX leads pure Mamba by 1.5 points after 24 epochs.",
        rule=Better(dataset="concat_speech_commands", first=HELIX_RAW, second=MAMBA_RAW, by=0.015),
    ),
    Claim(
        id="concat-still-rising",
        where="section 5.2; Figure 6",
        says="Both runs were still improving when they ended.",
        rule=StillRising(of=_CONCAT),
    ),
    Claim(
        id="concat-separates",
        where="section 5.2; Figure 6",
        says="HELIX separates from pure Mamba after epoch 15 and its lead widens steadily.",
        rule=PullsAway(dataset="concat_speech_commands", first=HELIX_RAW, second=MAMBA_RAW, after=15),
    ),
    Claim(
        id="voxpopuli-early",
        where="Figure 7; section 6",
        says="On VoxPopuli HELIX pulls ahead early and the gap widens steadily.",
        rule=PullsAway(dataset="voxpopuli", first=HELIX_RAW, second=MAMBA_RAW, after=10),
    ),
    Claim(
        id="voxpopuli-mamba-plateau",
        where="Figure 7",
        says="Pure Mamba plateaus near 73 %: it ends within a point of its best.",
        rule=Converged(of=(("voxpopuli", MAMBA_RAW),), within=0.01),
    ),
    Claim(
        id="voxpopuli-mel-tokens",
        where="section 5.3",
        says="A spectrogram of 300 s is about 3,750 tokens.",
        rule=Tokens(dataset="voxpopuli", frontend="mel", tokens=3_750, tolerance=0.1),
    ),
    Claim(
        id="largest-gap",
        where="Figure 7; Figure 1",
        says="The lead of HELIX over pure Mamba is largest on 30,000 tokens.",
        rule=All(
            tuple(
                Grows(datasets=(shorter, "voxpopuli"), first=HELIX_RAW, second=MAMBA_RAW)
                for shorter in ("speech_commands", "esc50", "concat_speech_commands")
            )
        ),
    ),
    Claim(
        id="from-0-to-11.5",
        where="Figure 1",
        says="From 3,000 to 30,000 tokens the lead of HELIX grows from 0 to 11.5 points.",
        rule=All(
            (
                Level(dataset="librispeech", first=HELIX_RAW, second=MAMBA_RAW, within=0.01),
                Better(dataset="voxpopuli", first=HELIX_RAW, second=MAMBA_RAW, by=0.115, tolerance=0.03),
            )
        ),
    ),
    Claim(
        id="mel-loses-speakers",
        where="section 5.3",
        says="Spectrograms discard what tells speakers apart: HELIX on raw beats every spectrogram model on VoxPopuli.",
        rule=All(
            tuple(
                Better(dataset="voxpopuli", first=HELIX_RAW, second=other)
                for other in (HELIX_MEL, MAMBA_MEL, ATTENTION_MEL)
            )
        ),
    ),
    Claim(
        id="no-other-axis-reaches-85",
        where="section 5.3",
        says="No other combination of input and backbone reaches 85 % on VoxPopuli.",
        rule=All(
            tuple(Better(dataset="voxpopuli", first=HELIX_RAW, second=other) for other in SIX if other != HELIX_RAW)
        ),
    ),
)

UNTESTED: tuple[Untested, ...] = (
    Untested(
        where="Table 3",
        says="The ranking is consistent with trends in validation curves across partial runs.",
        why="those curves are not published, and no validation set was used",
    ),
    Untested(
        where="section 5",
        says="Runs marked with a dagger were ended early.",
        why="no dagger stands in the text; the epochs are claims of their own",
    ),
    Untested(
        where="section 5.1",
        says="There is nothing for attention to attend to that recurrence does not capture; one block less does harm.",
        why="an explanation; would need runs with five Mamba blocks and a look inside models",
    ),
    Untested(
        where="section 5.1",
        says="Words differ in the order of phonemes, which one attention layer helps to align.",
        why="an explanation; shuffling the phonemes of a clip would test it",
    ),
    Untested(
        where="section 5.1",
        says="Six layers of attention on raw tokens lack a bias for what is local.",
        why="an explanation; runs with positions (protocol.pos) would test it, for the models here have none",
    ),
    Untested(
        where="section 5.2",
        says="The direction on Concat Speech Commands agrees with that on VoxPopuli; it is suggestive, not conclusive.",
        why="the paper's own caution; both directions are claims of their own",
    ),
    Untested(
        where="section 5.3",
        says="The attention layer provides a global summary that helps the last layers.",
        why="an explanation; would need a look inside trained models",
    ),
    Untested(
        where="section 5.3",
        says="Pure attention on spectrograms could run on 300 s.",
        why="true by the length alone (4,688 tokens); a run of that cell would show what it reaches",
    ),
)
