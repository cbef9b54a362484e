"""The report as a file: whole, self-contained, escaped, honest about gaps, small and quick."""

import io
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from rich.console import Console

from dashboards.charts import block_marks, colours, glyph, ticks
from dashboards.confusion import SHADES
from dashboards.curves import Curve, common_mean, thin
from dashboards.report import render_report, report_tables, write_report
from dashboards.summary import SELECTIONS
from dashboards.tables import FORMATS, Figure, as_csv, as_latex, as_markdown, shown, write_tables
from dashboards.terminal import summary_table
from dashboards.text import GAP
from dashboards.view import SweepView
from helix.protocol import SWITCHES

MakeView = Callable[..., SweepView]
EVIL = "<script>alert('x')</script>"


class Page(HTMLParser):
    """Tags, attributes and text of a page, with the text of scripts and styles kept apart."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.code: list[str] = []
        self._open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag in ("script", "style"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._open.pop()

    def handle_data(self, data: str) -> None:
        (self.code if self._open else self.words).append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def page(view: SweepView) -> Page:
    return Page(render_report(view))


@pytest.fixture(name="half")
def _half(make_view: MakeView) -> SweepView:
    def status(variant: str, fold: int, seed: int) -> tuple[str, int]:
        if variant == "attention-raw":
            return ("failed", 7) if fold == 1 else ("missing", 0)
        return ("done", 0) if fold == 1 or variant == "mamba-raw" else ("running", 3)

    return make_view(folds=(1, 2), status=status)


@pytest.mark.parametrize("epochs", [1, 20])
def test_the_report_needs_no_network(make_view: MakeView, epochs: int):
    source = render_report(make_view(epochs=epochs))
    assert "http://" not in source
    assert "https://" not in source
    assert "@import" not in source
    assert set(re.findall(r"url\(([^)]*)\)", source)) == {"#hatch"}
    loads = [value for _, name, value in Page(source).attributes if name in ("src", "href", "srcset", "data", "action")]
    assert all(value.startswith(("data:", "#")) for value in loads)


def test_a_data_set_called_script_does_nothing(make_view: MakeView, half: SweepView):
    evil = replace(half.data[0], name=EVIL, licence=EVIL, caveat=EVIL, notes=(EVIL,), class_names=(EVIL,) * 50)
    cells = tuple(replace(cell, dataset=EVIL, variant=f"{cell.variant} {EVIL}", backbone=EVIL) for cell in half.cells)
    view = replace(half, grid=EVIL, question=EVIL, command=EVIL, storage=EVIL, data=(evil,), cells=cells)
    made, plain = page(view), page(half)
    assert made.tags.count("script") == plain.tags.count("script") == 1
    assert not any("alert" in code for code in made.code)
    assert made.text.count("alert") > 10
    assert not [name for _, name, _ in made.attributes if name.startswith("on")]


def test_a_class_or_a_variant_called_script_does_nothing_in_any_new_section(half: SweepView):
    cells = tuple(
        replace(cell, variant=EVIL, backbone=EVIL if cell.backbone == "helix" else cell.backbone) for cell in half.cells
    )
    evil = replace(half.data[0], class_names=(EVIL,) * 50)
    source = render_report(replace(half, cells=cells, data=(evil,)), files=EVIL)
    made = Page(source)
    assert made.tags.count("script") == 1
    assert "Table 2." in made.text, "the data set is the paper's, so that every section is drawn"
    assert f"{EVIL}, {EVIL}" in made.text, "a confusion"
    assert EVIL not in source


def test_the_page_links_to_the_tables_that_are_written_beside_it(half: SweepView, tmp_path: Path):
    write_report(half, tmp_path / "esc50.html", files="esc50")
    written = {path.relative_to(tmp_path).as_posix() for path in write_tables(report_tables(half), tmp_path / "esc50")}
    found = Page((tmp_path / "esc50.html").read_text()).attributes
    links = {unquote(value) for tag, name, value in found if (tag, name) == ("a", "href")}
    assert links <= written
    for name in ("accuracy-esc50", "paper-table-1", "paper-table-2", "work", "trials", "claims", "classes-esc50"):
        assert {f"esc50/{name}.{ending}" for ending in ("csv", "md", "tex")} <= links


def test_without_files_beside_it_a_page_links_to_none(half: SweepView):
    assert "a" not in page(half).tags


@pytest.mark.parametrize("dataset", ["speech_commands", "concat_speech_commands", "voxpopuli", "librispeech", "tones"])
@pytest.mark.parametrize("status", ["done", "missing", "failed", "running"])
def test_every_data_set_has_a_report_in_every_state(make_view: MakeView, dataset: str, status: str):
    view = make_view(dataset=dataset, facts=None, folds=(1,), epochs=8, status=lambda *_: (status, 2))
    made = page(view)
    assert ("The paper's tables, ours beside them" in made.text) == (dataset != "tones")
    assert "nan" not in re.findall(r"[a-z]+", made.text.lower())
    assert all(as_latex(table) and as_markdown(table) and as_csv(table) for table in report_tables(view))


def test_every_heading_of_a_table_says_what_it_heads(half: SweepView):
    made = page(half)
    cells = made.tags.count("th")
    scoped = [value for tag, name, value in made.attributes if (tag, name) == ("th", "scope")]
    assert cells == len(scoped)
    assert set(scoped) == {"row", "col", "colgroup"}


def test_the_table_has_our_number_and_the_papers_side_by_side(make_view: MakeView):
    view = make_view(folds=(1, 2, 3, 4, 5), variants=[("mamba", "raw"), ("attention", "mel")])
    text = page(view).text
    assert "55.10 ± 3.33" in text
    assert "46.10 ± 2.97" in text
    assert "Table 2" in text
    assert "5 of 5" in text


def test_a_data_set_outside_the_paper_has_no_published_target(make_view: MakeView):
    text = page(make_view(dataset="tones", facts=None)).text
    assert "No published target" in text
    assert "ours minus" not in text


def test_a_run_that_the_paper_could_not_make_is_shown_as_that(make_view: MakeView):
    view = make_view(
        dataset="voxpopuli", facts=None, variants=[("helix", "raw"), ("attention", "raw"), ("mamba", "mel")]
    )
    text = page(view).text
    assert "out of memory" in text
    assert "85.07" in text
    assert "no published target" in text


def test_a_half_finished_sweep_shows_gaps_and_no_zeros(half: SweepView):
    text = page(half).text
    assert "1 of 2" in text
    assert "0 of 2" in text
    assert " ± \N{EN DASH}" in text, "one fold has no spread"
    assert "nan" not in text.lower().split()


def test_a_failure_is_listed_with_its_error_and_its_traceback(half: SweepView):
    cell = half.cells[4]
    told = ({"attempt_id": "a", "started": 0.0, "traceback": "line 1 <module>"},)
    trial = replace(cell.trials[0], state=replace(cell.trials[0].state, attempts=told))
    cells = [replace(cell, trials=(trial, *cell.trials[1:])) if one is cell else one for one in half.cells]
    text = page(replace(half, cells=tuple(cells))).text
    assert "Failed trials" in text
    assert "DivergedError: the loss of step 350 is not finite" in text
    assert "line 1 <module>" in text


@pytest.mark.parametrize("status", ["missing", "running", "failed", "partial"])
def test_a_sweep_without_a_result_is_a_report_too(make_view: MakeView, status: str):
    made = page(make_view(status=lambda *_: (status, 0)))
    assert "no result" in made.text
    assert "No epoch has finished yet" in made.text


def test_a_sweep_without_trials_or_data_is_a_report_too(make_view: MakeView):
    view = replace(make_view(folds=(), facts=None), switches={}, question="")
    assert "nothing to report" in page(view).text


def test_every_trial_every_switch_and_every_fact_is_there(make_view: MakeView):
    view = make_view()
    text = page(view).text
    assert all(trial.trial_id in text for _, trial in view.trials())
    assert all(name in text for name in SWITCHES)
    for fact in ("1,200 of 2,000", "CC BY-NC 3.0", "warns that preprocessing differs", "9b9b9b", view.command):
        assert fact in text


def test_a_switch_off_the_profile_is_marked(make_view: MakeView):
    view = make_view(profile_name="fair")
    assert 'class="changed"' not in render_report(view)
    changed = render_report(replace(view, switches={**view.switches, "mel_pad": "floor"}))
    assert changed.count('class="changed"') == 1
    assert "fair has ceil" in changed


def test_software_that_differs_between_trials_is_shown_with_counts(make_view: MakeView):
    view = make_view(folds=(1,), variants=[("mamba", "raw"), ("mamba", "mel")])
    trial = view.cells[0].trials[0]
    assert trial.state.result is not None
    older = replace(trial.state, result={**trial.state.result, "versions": {"torch": "2.11.0"}})
    cell = replace(view.cells[0], trials=(replace(trial, state=older),))
    text = page(replace(view, cells=(cell, view.cells[1]))).text
    assert "2.11.0 (1 trial), 2.13.0 (1 trial)" in text


def test_a_trial_that_several_ranks_trained_says_so_and_names_its_code(make_view: MakeView):
    view = make_view(folds=(1,))
    first = view.cells[0].trials[0]
    assert first.state.result is not None
    code = {"commit": "c0ffee1" * 5, "dirty": True}
    state = replace(first.state, result=first.state.result | {"ranks": 2}, attempts=({"started": 1.0, "code": code},))
    cells = (replace(view.cells[0], trials=(replace(first, state=state),)), *view.cells[1:])
    table = next(table for table in report_tables(replace(view, cells=cells)) if table.name == "trials")
    at = [column.heading for column in table.columns].index("ranks")
    assert [row[at].shown for row in table.rows if isinstance(row[at], Figure)][:2] == ["2", GAP]
    said = page(replace(view, cells=cells)).text
    assert f"commit {code['commit'][:12]} with changes" in " ".join(said.split())


def test_a_cell_whose_trials_all_failed_is_not_waited_for(make_view: MakeView):
    view = make_view(status=lambda name, fold, seed: ("failed", 0) if name == "helix-raw" else ("done", 0))
    said = page(view).text
    assert "3 trials failed" in said
    assert "No result from helix-raw: every trial of it failed." in said
    assert "no result yet" not in said.lower()


def test_colours_and_marks_are_those_of_the_names_whatever_else_a_sweep_has(make_view: MakeView):
    whole, two = make_view(), make_view(variants=[("attention", "raw"), ("mamba", "raw")])
    assert colours(whole.cells) == {"mamba": "k0", "helix": "k1", "attention": "k2"}
    assert colours(two.cells) == {"mamba": "k0", "attention": "k2"}
    strange = tuple(replace(cell, backbone=f"mine {at}") for at, cell in enumerate(whole.cells))
    assert not set(colours(strange).values()) & {"k0", "k1", "k2"}
    marks = block_marks([("attention", "mamba", "other"), ("mamba",)])
    assert marks == {"mamba": "b0", "attention": "b1", "other": "b2"}
    assert 'class="block b1"' in glyph(("attention",), block_marks([("attention",)]))
    assert render_report(two).count('class="block b1"') == 6 + 6 + 1, "a row of the table, a panel, the legend"


def test_every_chart_says_in_words_what_it_shows(make_view: MakeView):
    labels = [value for tag, name, value in page(make_view()).attributes if (tag, name) == ("svg", "aria-label")]
    assert any(label.startswith("Accuracy in percent per variant. mamba-raw 5") for label in labels)
    assert sum(label.startswith("Learning curves of ") for label in labels) == 6


def test_the_same_view_gives_the_same_bytes(make_view: MakeView):
    assert render_report(make_view()) == render_report(make_view())


def test_the_file_is_replaced_whole_and_nothing_is_left_beside_it(make_view: MakeView, tmp_path: Path):
    path = tmp_path / "reports" / "esc50.html"
    write_report(make_view(status=lambda *_: ("missing", 0)), path)
    write_report(make_view(), path)
    assert "has the highest mean accuracy" in path.read_text()
    assert [entry.name for entry in path.parent.iterdir()] == ["esc50.html"]


def test_a_report_that_cannot_be_made_leaves_the_old_one(make_view: MakeView, tmp_path: Path):
    path = tmp_path / "esc50.html"
    write_report(make_view(), path)
    before = path.read_bytes()
    with pytest.raises(KeyError):
        write_report(replace(make_view(), select="best"), path)  # pyright: ignore[reportArgumentType]
    assert path.read_bytes() == before


def test_text_that_no_encoding_holds_does_not_stop_a_report(half: SweepView, tmp_path: Path):
    write_report(replace(half, command="python \udcff"), tmp_path / "r.html")
    assert (tmp_path / "r.html").stat().st_size > 10_000


def test_a_report_of_two_hundred_trials_of_a_hundred_epochs_is_small(make_view: MakeView, tmp_path: Path):
    view = make_view(folds=tuple(range(1, 6)), seeds=tuple(range(7)), epochs=100)
    assert len(view.trials()) == 210
    write_report(view, tmp_path / "big.html", files="big")
    write_tables(report_tables(view), tmp_path / "big")
    assert (tmp_path / "big.html").stat().st_size < 10_000_000


def test_a_long_curve_keeps_its_dips():
    values = [0.5] * 5000
    values[1234], values[4321] = 0.1, 0.9
    thinned = thin(Curve(epochs=tuple(range(1, 5001)), values=tuple(values)))
    assert len(thinned.epochs) <= 165
    assert {0.1, 0.9} <= set(thinned.values)
    assert (thinned.epochs[0], thinned.epochs[-1]) == (1, 5000)


def test_the_mean_curve_ends_where_the_slowest_fold_is():
    long = Curve(epochs=(1, 2, 3), values=(0.25, 0.5, 0.75))
    short = Curve(epochs=(1, 2), values=(0.75, 0.25))
    waiting = Curve(epochs=(), values=())
    assert common_mean([long, short, waiting]) == Curve(epochs=(1, 2), values=(0.5, 0.375))


@pytest.mark.parametrize("high", [0.0, 0.0213, 0.51, 1.0, 3.9, 100])
def test_an_axis_reaches_its_highest_value_in_a_few_round_steps(high: float):
    marks = ticks(high, 4)
    assert marks[0] == 0
    assert marks[-1] >= high
    assert 2 <= len(marks) <= 8


def luminance(colour: str) -> float:
    channels = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_and_curves_stand_out_from_the_page(make_view: MakeView, scheme: int):
    style = next(code for code in page(make_view()).code if "--paper" in code)
    named = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", re.findall(r":root \{(.*?)\}", style, re.DOTALL)[scheme]))
    for ground in ("paper", "card"):
        for name in ("ink", "soft", "warn", "bad", *(f"k{index}" for index in range(8))):
            light, dark = sorted((luminance(named[name]), luminance(named[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{name} on {ground}"


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_stands_out_from_every_shade_of_a_heat_table(make_view: MakeView, scheme: int):
    style = next(code for code in page(make_view()).code if "--paper" in code)
    named = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", re.findall(r":root \{(.*?)\}", style, re.DOTALL)[scheme]))
    shares = re.findall(r"\.h(\d) \{ background: color-mix\(in srgb, var\(--k0\) (\d+)%, var\(--paper\)\)", style)
    assert [int(shade) for shade, _ in shares] == list(range(1, SHADES + 1))
    for _, share in shares:
        weights = (int(share) / 100, 1 - int(share) / 100)
        parts = [[int(named[name][at : at + 2], 16) for at in (1, 3, 5)] for name in ("k0", "paper")]
        mixed = "#" + "".join(
            f"{round(weights[0] * one + weights[1] * other):02x}" for one, other in zip(*parts, strict=True)
        )
        light, dark = sorted((luminance(named["ink"]), luminance(mixed)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, f"a shade of {share} %"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_accuracies_that_are_not_finite_are_gaps_with_a_name_everywhere(make_view: MakeView, bad: float):
    view = make_view(folds=(1, 2))
    first = view.cells[0]
    trials = [
        replace(
            one,
            state=replace(one.state, result={**(one.state.result or {}), "accuracy": dict.fromkeys(SELECTIONS, bad)}),
        )
        for one in first.trials
    ]
    view = replace(view, cells=(replace(first, trials=tuple(trials)), *view.cells[1:]))
    page, tables = render_report(view), report_tables(view)
    words = re.sub(r"<script>.*?</script>|<style>.*?</style>", "", page, flags=re.DOTALL)
    assert not re.search(r"\b(nan|inf|infinity)\b", words, re.IGNORECASE)
    assert "2 of mamba-raw" in words and '<td class="number selected">not finite</td>' in words
    for table in tables:
        for write in FORMATS.values():
            assert not re.search(r"\b(nan|inf)\b", write(table)), table.name
    (accuracy,) = [table for table in tables if table.name == "accuracy-esc50"]
    assert shown(accuracy.rows[0][3]) == "not finite"
    out = io.StringIO()
    Console(width=120, file=out).print(summary_table(view))
    told = out.getvalue()
    assert "not finite" in told and "nan" not in told
