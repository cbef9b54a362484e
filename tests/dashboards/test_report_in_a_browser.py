"""The report in headless Chromium: it draws, it answers, it asks nobody for anything."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dashboards.paper import write_published
from dashboards.report import write_report
from dashboards.view import SweepView

pytestmark = pytest.mark.browser

MakeView = Callable[..., SweepView]


@pytest.fixture(name="open_report")
def _open_report(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens the report of a view; at the end nothing may have been complained of or fetched."""
    trouble: list[str] = []
    pages = []

    def open_report(view: SweepView, **context: Any) -> Any:
        path = tmp_path / "report.html"
        write_report(view, path)
        page = browser.new_page(viewport={"width": 1180, "height": 900}, **context)
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda request: trouble.append(request.url) if "report.html" not in request.url else None)
        page.on("dialog", lambda dialog: trouble.append(dialog.message))
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield open_report
    for page in pages:
        page.close()
    assert [one for one in trouble if not one.startswith("data:")] == []


def test_the_charts_are_drawn_and_have_a_size(open_report: Callable[..., Any], make_view: MakeView):
    page = open_report(make_view())
    charts = page.locator("svg.chart")
    assert charts.count() == 1 + 6 + 2 + 2, "bars, panels, smoothed curves of both inputs, both sides of Figure 1"
    boxes = [chart.bounding_box() for chart in charts.all()]
    assert all(box["width"] > 200 and box["height"] > 100 for box in boxes)
    assert page.locator("rect.bar").count() >= 6
    assert page.locator(".panel polyline.mean").count() == 12
    widths = page.evaluate("[...document.querySelectorAll('rect.bar')].map(bar => bar.getBoundingClientRect().width)")
    assert min(widths) > 0


def test_pointing_at_one_panel_reads_the_same_epoch_in_all(open_report: Callable[..., Any], make_view: MakeView):
    page = open_report(make_view(epochs=20))
    last = page.locator(".readout").all_text_contents()
    page.locator(".panel").nth(2).hover(position={"x": 150, "y": 120})
    read = page.locator(".readout").all_text_contents()
    assert all(text.startswith("epoch 20:") for text in last)
    assert len({text.split(":")[0] for text in read}) == 1
    assert read[0] != last[0]
    page.mouse.move(0, 0)
    assert page.locator(".readout").all_text_contents() == last


def test_the_curves_can_be_read_with_the_keyboard(open_report: Callable[..., Any], make_view: MakeView):
    page = open_report(make_view(epochs=20))
    page.locator(".panel").first.focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator(".readout").first.text_content().startswith("epoch 19:")


def test_dark_mode_is_dark_and_paper_is_white(open_report: Callable[..., Any], make_view: MakeView):
    page = open_report(make_view(), color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) == "rgb(20, 23, 26)"
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate(ground) == "rgb(255, 255, 255)"


def test_on_paper_nothing_is_folded_away_or_cut_off(open_report: Callable[..., Any], make_view: MakeView):
    view = make_view()
    page = open_report(view)
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 703, "height": 1000})
    trial = page.get_by_text(view.cells[0].trials[0].trial_id)
    assert trial.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 703


@pytest.mark.parametrize("width", [390, 1180])
def test_the_page_itself_never_scrolls_sideways(open_report: Callable[..., Any], make_view: MakeView, width: int):
    page = open_report(make_view())
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_no_table_is_cut_off_on_a_screen_of_1180(open_report: Callable[..., Any], make_view: MakeView):
    page = open_report(make_view(folds=(1, 2, 3, 4, 5)))
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    cut = "[...document.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth).length"
    assert page.evaluate(cut) == 0
    assert page.locator("svg.chart").first.bounding_box()["width"] > 1000


def test_no_table_of_the_published_numbers_is_cut_off_on_a_screen_of_1280(browser: Any, tmp_path: Path):
    page_path, *_ = write_published(tmp_path)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(page_path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    cut = "[...document.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth).length"
    assert page.locator(".scroll").count() > 5
    assert page.evaluate(cut) == 0
    page.close()


def test_a_chart_on_a_telephone_keeps_letters_that_can_be_read(open_report: Callable[..., Any], make_view: MakeView):
    page = open_report(make_view())
    page.set_viewport_size({"width": 390, "height": 900})
    heights = page.evaluate(
        "[...document.querySelectorAll('svg.chart text')].map(t => t.getBoundingClientRect().height)"
    )
    assert min(height for height in heights if height) >= 10
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("width", [390, 900])
def test_captions_end_where_the_screen_does(open_report: Callable[..., Any], make_view: MakeView, width: int):
    page = open_report(make_view(folds=(1, 2, 3, 4, 5)))
    page.set_viewport_size({"width": width, "height": 900})
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    ends = page.evaluate(
        "[...document.querySelectorAll('caption')].map(one => {const r = document.createRange(); "
        "r.selectNodeContents(one); return r.getBoundingClientRect().right})"
    )
    assert len(ends) > 5
    assert max(ends) <= width


@pytest.mark.parametrize("width", [1280, 1440])
def test_the_comparisons_of_an_unfinished_sweep_fit_a_desktop(
    open_report: Callable[..., Any], make_view: MakeView, width: int
):
    page = open_report(
        make_view(folds=(1, 2, 3, 4, 5), status=lambda _, fold, __: ("done" if fold < 3 else "missing", 0))
    )
    page.set_viewport_size({"width": width, "height": 900})
    cut = "[...document.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth).length"
    assert page.evaluate(cut) == 0


def test_a_data_set_called_script_does_nothing_in_a_browser(open_report: Callable[..., Any], make_view: MakeView):
    page = open_report(make_view(dataset="<script>alert(1)</script><img src=x onerror=alert(2)>", facts=None))
    assert page.locator("script").count() == 1
    assert page.locator("img").count() == 0


@pytest.mark.parametrize("status", ["missing", "failed", "running"])
def test_unfinished_sweeps_open_without_an_error(open_report: Callable[..., Any], make_view: MakeView, status: str):
    page = open_report(make_view(status=lambda variant, fold, seed: (status, 1 if fold == 1 else 0)))
    assert page.locator("h1").is_visible()
