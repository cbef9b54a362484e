"""Every comparison of a data set: paired, tested in all ways, one family; and a table that tells only what is known."""

import csv
import io
from collections.abc import Callable
from dataclasses import replace
from statistics import stdev

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from dashboards.claim import asked
from dashboards.comparisons import (
    Contrast,
    difference,
    every_contrast,
    interaction,
    measure,
    measure_family,
    p_shown,
    statistics_table,
)
from dashboards.counts import counts_of
from dashboards.evidence import (
    ATTENTION_MEL,
    ATTENTION_RAW,
    HELIX_MEL,
    HELIX_RAW,
    MAMBA_MEL,
    MAMBA_RAW,
    SIX,
    Evidence,
    published_evidence,
    sweep_evidence,
)
from dashboards.tables import FORMATS, Cell, Figure, Table, shown
from dashboards.text import GAP, MINUS, number, percent
from dashboards.verdicts import CLAIMS, comparisons_table, ledger
from dashboards.view import SweepView, TrialEntry
from helix.protocol import profile
from helix.spec import DataSpec, ModelSpec, TrainingSpec, TrialSpec
from helix.statistics import power
from orchestration.ledger import TrialState

MakeView = Callable[..., SweepView]
MakeEvidence = Callable[..., Evidence]

GAPS = (0.05, 0.07, 0.04, 0.06, 0.08)


def folds(*values: float) -> dict[tuple[int, int], float]:
    return {(fold, 0): value for fold, value in enumerate(values, 1)}


@pytest.fixture(name="two")
def _two(make_evidence: MakeEvidence) -> Evidence:
    """Mamba raw ahead of HELIX raw on all five folds of ESC-50."""
    base = (0.50, 0.52, 0.48, 0.55, 0.51)
    return make_evidence(
        {
            ("esc50", MAMBA_RAW): folds(*(one + gap for one, gap in zip(base, GAPS, strict=True))),
            ("esc50", HELIX_RAW): folds(*base),
        }
    )


def test_six_cells_allow_nine_differences_and_three_interactions():
    asked = every_contrast("esc50", SIX)
    assert [len(one.terms) for one in asked] == [2] * 9 + [4] * 3
    assert len({one.canonical for one in asked}) == 12, "no question is asked twice"


def test_cells_that_are_not_there_are_compared_with_nothing():
    assert every_contrast("esc50", [MAMBA_RAW]) == []
    assert every_contrast("esc50", []) == []
    assert every_contrast("esc50", [MAMBA_RAW, HELIX_MEL]) == []
    assert len(every_contrast("esc50", [MAMBA_RAW, MAMBA_MEL, HELIX_RAW])) == 2


def test_a_comparison_and_its_mirror_are_one_question():
    there, back = difference("esc50", MAMBA_RAW, HELIX_RAW), difference("esc50", HELIX_RAW, MAMBA_RAW)
    assert there != back and there.canonical == back.canonical
    one = interaction("esc50", ("raw", "mel"), ("mamba", "attention"))
    assert one.canonical == interaction("esc50", ("mel", "raw"), ("mamba", "attention")).canonical
    assert one.name == f"mamba raw {MINUS} mamba mel {MINUS} attention raw + attention mel"


@pytest.mark.parametrize(
    ("terms", "mean", "plain", "corrected"),
    [
        (difference("esc50", MAMBA_RAW, MAMBA_MEL), 1.35, 0.103, 0.233),
        (difference("esc50", MAMBA_RAW, HELIX_RAW), 4.90, 0.006, 0.025),
        (difference("esc50", MAMBA_MEL, ATTENTION_MEL), 7.65, 0.008, 0.030),
        (difference("esc50", HELIX_RAW, ATTENTION_RAW), 5.60, 0.018, 0.062),
        (interaction("esc50", ("raw", "mel"), ("mamba", "attention")), 2.85, 0.091, 0.214),
    ],
)
def test_the_published_folds_are_measured_with_the_ratio_of_their_data_set(
    terms: Contrast, mean: float, plain: float, corrected: float
):
    found = measure(terms, published_evidence())
    assert found is not None and found.paired.p is not None and found.corrected.p is not None
    assert found.ratio == pytest.approx(400 / 1600)
    assert round(100 * found.mean, 2) == mean
    assert (round(found.paired.p, 3), round(found.corrected.p, 3)) == (plain, corrected)


def test_holm_is_taken_over_different_questions_alone():
    evidence = published_evidence()
    asked = every_contrast("esc50", SIX)
    mirrored = [Contrast(one.dataset, tuple((variant, -weight) for variant, weight in one.terms)) for one in asked]
    found = measure_family([*asked, *mirrored], evidence)
    wanted = np.asarray(multipletests([found[one].corrected.p for one in asked], method="holm")[1]).tolist()
    assert [found[one].p_holm for one in asked] == pytest.approx(wanted)
    assert [found[one].p_holm for one in mirrored] == pytest.approx(wanted)
    assert {one.family for one in found.values()} == {12}


def test_what_would_settle_it_is_told_of_the_p_that_decides():
    found = measure_family(every_contrast("esc50", SIX), published_evidence())
    settled = [one for one in found.values() if one.p_holm is not None and one.p_holm < 0.05]
    between = [one for one in found.values() if one.corrected.p and one.corrected.p < 0.05 and one not in settled]
    assert settled and between, "the published folds have both"
    assert {one.outlook.said for one in settled} == {"nothing: it is settled"}
    level = 0.05 / (len(found) - len(settled))
    for one in between:
        assert not one.outlook.settled and one.outlook.folds == 5 and one.outlook.seeds is not None
        std = one.corrected.std
        assert std is not None
        reached = [
            power(one.mean, std / seeds**0.5, 5, ratio=0.25, alpha=level)
            for seeds in (one.outlook.seeds, one.outlook.seeds - 1)
        ]
        assert reached[0] >= 0.8 > reached[1]


def test_the_comparisons_and_the_claims_have_one_p_of_one_question():
    evidence = published_evidence()
    table = comparisons_table(evidence, "esc50")
    holms = dict(zip(cells_of(table, "comparison"), cells_of(table, "p: Holm"), strict=True))
    assert len(holms) == 14, "the 12 that its cells allow, and two more that claims ask for"
    questions = [*every_contrast("esc50", SIX), *asked(CLAIMS, "esc50")]
    judged = [entry.judgement.measured for entry in ledger(evidence)]
    there = [one for one in judged if one is not None and one.contrast.dataset == "esc50" and one.p_holm is not None]
    assert len(there) > 5
    for one in there:
        (same,) = {other.name for other in questions if other.canonical == one.contrast.canonical} & set(holms)
        assert holms[same] == Figure(one.p_holm, p_shown(one.p_holm))
        assert one.family == 14


def test_a_data_set_has_the_folds_that_its_options_give_it(make_view: MakeView):
    view = make_view(dataset="tones", facts=None, folds=(1, 2, 3, 4), variants=[("mamba", "raw"), ("helix", "raw")])
    eight = replace(view, cells=tuple(replace(cell, options={"fold_count": 8}) for cell in view.cells))
    asked = difference("tones", MAMBA_RAW, HELIX_RAW)
    found, usual = measure(asked, sweep_evidence(eight)), measure(asked, sweep_evidence(view))
    assert found is not None and usual is not None
    assert sweep_evidence(eight).counts["tones"].folds == 8
    assert found.outlook.folds == 8
    assert usual.outlook.folds != 8


def test_the_options_of_a_data_set_reach_its_cells():
    spec = TrialSpec(
        data=DataSpec(dataset="tones", fold=1, options={"fold_count": 8}),
        model=ModelSpec(frontend="raw", pattern=("mamba",)),
        training=TrainingSpec(epochs=1),
        seed=0,
    )
    state = TrialState(trial_id="a", status="missing")
    view = SweepView.build(
        grid="tones",
        question="",
        protocol=profile("paper"),
        command="",
        created=0.0,
        storage="",
        data=[],
        trials=[TrialEntry(variant="mamba-raw", backbone="mamba", spec=spec, state=state)],
    )
    assert view.cells[0].options == {"fold_count": 8}
    assert counts_of(view)["tones"].folds == 8


def test_the_interval_of_a_family_is_wider_than_that_of_one():
    found = measure_family(every_contrast("esc50", SIX), published_evidence())
    for one in found.values():
        assert one.low is not None and one.high is not None
        assert one.corrected.low is not None and one.corrected.high is not None
        assert one.low < one.corrected.low < one.mean < one.corrected.high < one.high


def test_a_family_of_two_data_sets_is_refused():
    asked = [difference(name, HELIX_RAW, MAMBA_RAW) for name in ("voxpopuli", "speech_commands")]
    with pytest.raises(ValueError, match="a family is of one data set"):
        measure_family(asked, published_evidence())


def test_one_run_each_is_set_against_the_noise_of_the_test_clips():
    found = measure(difference("speech_commands", HELIX_RAW, MAMBA_RAW), published_evidence())
    assert found is not None and found.clip_errors is not None
    assert (found.paired.p, found.corrected.low, found.effect.d_z) == (None, None, None)
    assert found.clip_errors == pytest.approx(7.16, abs=0.01)
    back = measure(difference("speech_commands", MAMBA_RAW, HELIX_RAW), published_evidence())
    assert back is not None and back.clip_errors == pytest.approx(-found.clip_errors)


def test_a_data_set_whose_test_clips_are_not_known_has_no_such_noise():
    found = measure(difference("voxpopuli", HELIX_RAW, MAMBA_RAW), published_evidence())
    assert found is not None and found.clip_errors is None


def test_no_shared_fold_is_no_comparison(make_evidence: MakeEvidence):
    evidence = make_evidence({("esc50", MAMBA_RAW): {(1, 0): 0.5}, ("esc50", HELIX_RAW): {(2, 0): 0.4}})
    assert measure(difference("esc50", MAMBA_RAW, HELIX_RAW), evidence) is None
    table = statistics_table(evidence, "esc50")
    assert table.rows == ()
    assert table.notes == ("No two cells share a finished fold and seed.",)


def test_the_rule_in_force_chooses_the_accuracy(make_evidence: MakeEvidence):
    cells = {
        ("esc50", MAMBA_RAW): {"best_test": folds(0.5, 0.6), "last": folds(0.3, 0.3)},
        ("esc50", HELIX_RAW): {"best_test": folds(0.4, 0.4), "last": folds(0.4, 0.5)},
    }
    asked = difference("esc50", MAMBA_RAW, HELIX_RAW)
    means = [measure(asked, make_evidence(cells, select=rule)) for rule in ("best_test", "last", "validation")]
    assert means[0] is not None and means[0].mean == pytest.approx(0.15)
    assert means[1] is not None and means[1].mean == pytest.approx(-0.15)
    assert means[2] is None


def cells_of(table: Table, heading: str) -> list[Cell]:
    names = [f"{column.group}: {column.heading}".removeprefix(": ") for column in table.columns]
    return [row[names.index(heading)] for row in table.rows]


def test_the_table_has_what_was_measured(two: Evidence):
    table = statistics_table(two, "esc50")
    assert cells_of(table, "comparison") == [f"mamba raw {MINUS} helix raw"]
    (gap,) = cells_of(table, "difference")
    assert isinstance(gap, Figure) and gap.value == pytest.approx(6.0) and gap.shown == "+6.00"
    assert [shown(one) for one in cells_of(table, "n") + cells_of(table, "effect: ahead in")] == ["5 folds", "100 %"]
    (row,) = csv.DictReader(io.StringIO(FORMATS["csv"](table)))
    assert (row["effect: ahead in, %"], float(row["difference, points"])) == ("100.0", pytest.approx(6.0))
    assert row["95 % interval, paired t: low, points"] and row["std, points"]
    said = " ".join(table.notes)
    assert "Nadeau and Bengio" in said and "its smallest p is 0.0625" in said


def test_notes_explain_the_columns_that_are_there_and_no_others(two: Evidence):
    whole, short = (statistics_table(two, "esc50", short=short) for short in (False, True))
    explained = {"std": "std: ", "g": " g: ", "bootstrap": "Bootstrap: "}
    assert all(words in whole.notes[0] for words in explained.values())
    assert not any(words in short.notes[0] for words in explained.values())
    assert "d_z: mean over" in short.notes[0] and "Holm: adjusted" in short.notes[0]
    assert {column.group for column in short.columns} == {"", "95 % interval, corrected", "p", "effect"}


def test_the_spread_is_that_of_the_effect_beside_it_and_in_points(make_evidence: MakeEvidence):
    cells = {("esc50", MAMBA_RAW): folds(*GAPS), ("esc50", HELIX_RAW): folds(0, 0, 0, 0, 0)}
    table = statistics_table(make_evidence(cells), "esc50")
    (mean,), (std,), (effect,) = (cells_of(table, name) for name in ("difference", "std", "effect: d_z"))
    assert isinstance(mean, Figure) and isinstance(std, Figure) and isinstance(effect, Figure)
    assert mean.value is not None and std.value is not None
    assert (std.value, std.shown) == (pytest.approx(100 * stdev(GAPS)), "1.58")
    assert effect.value == pytest.approx(mean.value / std.value)
    assert f"divided by n {MINUS} 1" in table.notes[0]


def test_one_fold_gives_a_difference_and_no_column_that_would_be_empty(make_view: MakeView):
    view = make_view(folds=(1,))
    table = statistics_table(sweep_evidence(view), "esc50")
    assert len(table.rows) == 12
    assert [column.heading for column in table.columns] == ["comparison", "n", "difference", "what would settle it"]
    assert "Holm" not in " ".join(table.notes) and "smallest p" not in " ".join(table.notes)
    assert "No test: one value shows no spread." in table.notes


def test_seeds_of_one_fold_are_units_that_say_nothing_of_other_clips(make_view: MakeView):
    table = statistics_table(sweep_evidence(make_view(folds=(1,), seeds=(0, 1, 2))), "esc50")
    assert {shown(one) for one in cells_of(table, "n")} == {"3 seeds"}
    assert not {"corrected", "Holm"} & {column.heading for column in table.columns}, "nothing was"
    assert not any("the same, corrected" in column.group for column in table.columns)
    assert GAP not in map(shown, cells_of(table, "p: paired t"))
    assert any(note.startswith("Not corrected: seeds of one fold show no spread") for note in table.notes)
    split = make_view(dataset="speech_commands", folds=(1,), seeds=(0, 1, 2), facts=None)
    whole = statistics_table(sweep_evidence(split), "speech_commands")
    assert {"corrected", "Holm"} <= {column.heading for column in whole.columns}, "a single split is all there is"


def test_a_comparison_on_one_fold_has_no_corrected_p_beside_those_that_have(make_view: MakeView):
    def status(variant: str, fold: int, seed: int):
        return ("done" if variant != "helix-raw" or fold == 1 else "missing"), 0

    table = statistics_table(sweep_evidence(make_view(folds=(1, 2, 3), seeds=(0, 1), status=status)), "esc50")
    corrected = dict(zip(cells_of(table, "comparison"), map(shown, cells_of(table, "p: corrected")), strict=True))
    assert corrected[f"mamba raw {MINUS} helix raw"] == GAP != corrected[f"mamba raw {MINUS} attention raw"]
    holm = dict(zip(cells_of(table, "comparison"), map(shown, cells_of(table, "p: Holm")), strict=True))
    assert {name for name, p in holm.items() if p == GAP} == {name for name, p in corrected.items() if p == GAP}
    assert any("nothing is said of other test clips" in note for note in table.notes)


def test_a_half_finished_sweep_is_compared_over_what_both_have(make_view: MakeView):
    def status(variant: str, fold: int, seed: int):
        return ("failed", 3) if variant == "helix-raw" and fold == 2 else ("done", 0) if fold < 3 else ("running", 5)

    table = statistics_table(sweep_evidence(make_view(folds=(1, 2, 3), status=status)), "esc50")
    counts = dict(zip(cells_of(table, "comparison"), map(shown, cells_of(table, "n")), strict=True))
    assert counts[f"mamba raw {MINUS} helix raw"] == "1 seed"
    assert counts[f"mamba raw {MINUS} attention raw"] == "2 folds"
    assert any("left out" in note for note in table.notes)


def test_equal_accuracies_divide_by_no_spread(make_evidence: MakeEvidence):
    same = folds(0.5, 0.5, 0.5)
    evidence = make_evidence({("esc50", MAMBA_RAW): same, ("esc50", HELIX_RAW): same})
    table = statistics_table(evidence, "esc50")
    assert [shown(one) for one in cells_of(table, "difference")] == ["0.00"]
    assert any("all 3 values are the same" in note for note in table.notes)


def test_nothing_finished_is_an_empty_table(make_view: MakeView):
    table = statistics_table(sweep_evidence(make_view(status=lambda *_: ("missing", 0))), "esc50")
    assert table.rows == ()
    assert all(write(table) for write in FORMATS.values())


def test_a_data_set_called_script_names_its_file_harmlessly(make_view: MakeView):
    view = make_view(dataset="<script>/../x", facts=None)
    table = statistics_table(sweep_evidence(view), "<script>/../x")
    assert table.name == "statistics--script-----x"
    assert "<script>" not in FORMATS["tex"](table) and "<script>" not in FORMATS["md"](table)


def test_what_is_rounded_to_nothing_has_no_sign():
    assert [number(value, ".2f") for value in (-0.001, 0.001, -0.0, -0.01)] == ["0.00", "0.00", "0.00", f"{MINUS}0.01"]
    assert (percent(-0.23, 1), percent(-0.00001)) == (f"{MINUS}23.0", "0.00")


def test_negative_effects_have_the_sign_of_the_other_numbers():
    table = statistics_table(published_evidence(), "esc50")
    signed = [shown(one) for heading in ("difference", "effect: d_z", "effect: g") for one in cells_of(table, heading)]
    assert not any(word.startswith("-") for word in signed) and GAP not in signed
