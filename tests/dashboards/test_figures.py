"""The paper's figures from our runs: where the marks stand, what the lines average, what is not drawn."""

import re
from collections.abc import Callable
from xml.etree import ElementTree

import pytest

from dashboards.charts import colours
from dashboards.curves import Curve, smooth
from dashboards.evidence import sweep_evidence
from dashboards.figures import interaction_gaps, scaling, smoothed_curves
from dashboards.summary import summarise
from dashboards.view import SweepView

MakeView = Callable[..., SweepView]


def gaps(view: SweepView):
    return interaction_gaps(sweep_evidence(view), view.cells, colours(view.cells))


def gains(view: SweepView):
    return scaling(sweep_evidence(view), view.cells)


def curves(view: SweepView):
    return smoothed_curves(view.cells[0].dataset, summarise(view), 0.02, colours(view.cells))


def test_the_moving_average_is_that_of_seven_epochs():
    values = Curve(epochs=tuple(range(1, 11)), values=(0.0, 1.0, 0.0, 0.0, 7.0, 0.0, 0.0, 0.0, 0.0, 7.0))
    smoothed = smooth(values, 7)
    assert smoothed.epochs == values.epochs
    assert smoothed.values[4] == pytest.approx(8 / 7)
    assert smoothed.values[0] == pytest.approx(1 / 4), "fewer at the ends"
    assert smoothed.values[-1] == pytest.approx(7 / 4)
    assert smooth(Curve(epochs=(), values=()), 7) == Curve(epochs=(), values=())


def test_a_gap_to_the_right_of_zero_is_a_gain_of_raw(make_view: MakeView):
    made = gaps(make_view(folds=(1, 2, 3, 4, 5)))
    root = ElementTree.fromstring(str(made.svgs[0]))
    zero = next(float(one.get("x1", 0)) for one in root if one.get("class") == "axis")
    means = [one for one in root if (one.get("class") or "").startswith("dot mean")]
    assert len(means) == 3
    for mark in means:
        title = mark.find("title")
        assert title is not None
        said = re.search(r": ([+\N{MINUS SIGN}])", title.text or "")
        assert said is not None
        assert (float(mark.get("cx", 0)) > zero) == (said[1] == "+")
    assert len([one for one in root if one.get("class") == "paper-mark"]) == 3


def test_every_fold_has_its_dot(make_view: MakeView):
    made = str(gaps(make_view(folds=(1, 2, 3, 4))).svgs[0])
    assert made.count('class="dot k') == 3 * 4


def test_one_fold_has_a_gap_and_no_whisker(make_view: MakeView):
    made = str(gaps(make_view(folds=(1,))).svgs[0])
    assert 'class="dot mean' in made
    assert "whisker" not in made


def test_the_gain_over_length_shows_ours_filled_and_the_papers_hollow(make_view: MakeView):
    made = str(gains(make_view(folds=(1, 2, 3))).svgs[0])
    assert made.count("hollow-mark") == 4, "every data set of which the paper prints HELIX and Pure Mamba on raw"
    assert made.count('class="dot mean') == 1
    assert "voxpopuli +11.52 at 30,000" in made
    assert "at 500" in made


@pytest.mark.parametrize("variants", [[("mamba", "raw")], [("mamba", "mel"), ("helix", "mel")]])
def test_what_cannot_be_drawn_says_why(make_view: MakeView, variants: list[tuple[str, str]]):
    view = make_view(variants=variants)
    assert gaps(view).svgs == ()
    assert gains(view).svgs == ()
    assert "finished" in gaps(view).caption
    assert "finished" in gains(view).caption


def test_smoothed_curves_lie_over_the_raw_ones_in_a_panel_for_each_input(make_view: MakeView):
    made = curves(make_view(folds=(2, 3), epochs=30))
    assert made.after == "Figure 4"
    assert len(made.svgs) == 2
    for picture in made.svgs:
        order = re.findall(r'class="line (raw|mean) ', str(picture))
        assert order == ["raw"] * 3 + ["mean"] * 3
        assert str(picture).count('class="best ') == 3
        assert "fold 2, seed 0" in str(picture)


def test_a_variant_that_has_not_begun_that_fold_is_named(make_view: MakeView):
    made = curves(
        make_view(
            folds=(1, 2),
            status=lambda variant, fold, _: ("missing", 0) if (variant, fold) == ("helix-raw", 1) else ("done", 0),
        )
    )
    assert "Not begun on this fold: helix-raw" in made.caption
    assert "fold 1" in made.caption


@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_sweep_that_has_hardly_begun_divides_by_nothing(make_view: MakeView, done: int):
    view = make_view(folds=(1,), status=lambda *_: ("running", done))
    assert len(curves(view).svgs) == (2 if done else 0)
    assert gaps(view).svgs == ()


def test_every_picture_says_its_numbers_to_those_who_cannot_see_it(make_view: MakeView):
    view = make_view(folds=(1, 2))
    for made in (gaps(view), gains(view), curves(view)):
        for picture in made.svgs:
            root = ElementTree.fromstring(str(picture))
            assert root.get("role") == "img"
            assert len(re.findall(r"\d+\.\d", root.get("aria-label") or "")) >= 1
