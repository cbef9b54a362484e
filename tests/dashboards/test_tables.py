"""A table says the same in HTML, CSV, Markdown and LaTeX, and no text of it is ever markup there."""

import csv
import io
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dashboards.evidence import published_evidence
from dashboards.report import report_tables
from dashboards.tables import (
    FORMATS,
    Column,
    Figure,
    Table,
    as_csv,
    as_html,
    as_latex,
    as_markdown,
    without_gaps,
    write_tables,
)
from dashboards.text import GAP, MINUS
from dashboards.verdicts import evidence_tables, ledger
from dashboards.view import SweepView

MakeView = Callable[..., SweepView]

EVIL = "<script>alert('x')</script> & \"50 %\" $x_1^2$ #1 ~ {a} \\end{table} | `b` *c* [d](e)"


def make_table(text: str = "plain", caption: str = "A table") -> Table:
    return Table(
        name="made-up",
        caption=caption,
        columns=(
            Column(heading="cell"),
            Column(heading="low", number=True, group="interval"),
            Column(heading="high", number=True, group="interval"),
            Column(heading="why"),
        ),
        rows=(
            (text, Figure(0.1234567, "+0.12"), Figure(None), text),
            ("b", Figure(-1, f"{MINUS}1.00"), Figure(2), "c"),
        ),
        notes=(text,),
    )


class Tags(HTMLParser):
    def __init__(self, source: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(str(source))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


def test_html_shows_text_as_text():
    made, plain = Tags(as_html(make_table(EVIL, EVIL))), Tags(as_html(make_table()))
    assert [tag for tag, _ in made.tags] == [tag for tag, _ in plain.tags]
    assert made.words.count(EVIL) == 4, "two cells, the caption and the note"


def test_html_has_a_caption_and_headings_with_their_scope():
    tags = Tags(as_html(make_table(), "dense")).tags
    assert ("table", {"class": "dense"}) in tags
    assert [attributes["scope"] for tag, attributes in tags if tag == "th"] == ["colgroup"] + ["col"] * 4 + ["row"] * 2
    assert ("th", {"colspan": "2", "scope": "colgroup"}) in tags
    assert "caption" in dict(tags)


def test_csv_has_values_in_full_and_gaps_empty():
    rows = list(csv.reader(io.StringIO(as_csv(make_table()))))
    assert rows[0] == ["cell", "interval: low", "interval: high", "why"]
    assert rows[1] == ["plain", "0.1234567", "", "plain"]
    assert rows[2] == ["b", "-1", "2", "c"]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@sum", "\tx"])
def test_a_spreadsheet_runs_nothing(text: str):
    assert list(csv.reader(io.StringIO(as_csv(make_table(text)), newline="")))[1][0] == f"'{text}"


@pytest.mark.parametrize("text", ["\rx", "a\rb", "a\r\nb"])
def test_a_return_ends_no_row_of_a_csv(text: str):
    rows = list(csv.reader(io.StringIO(as_csv(make_table(text)), newline="")))
    assert [len(row) for row in rows] == [4, 4, 4]
    assert rows[1][0].lstrip("'") == text.replace("\r\n", "\n").replace("\r", "\n")


def test_csv_keeps_quotes_commas_and_lines_in_their_cell():
    text = 'a "b", c\nd'
    assert list(csv.reader(io.StringIO(as_csv(make_table(text)), newline="")))[1][0] == text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_number_is_a_gap_with_a_name_and_never_nan(value: float):
    table = Table(name="t", caption="", columns=(Column(heading="x", number=True),), rows=((Figure(value),),))
    assert as_csv(table) == "x\nnot finite\n"
    assert all("not finite" in write(table) for write in (*FORMATS.values(), as_html))


def test_a_gap_that_has_a_name_has_it_in_every_format():
    rows = ((Figure(None, "OOM"),), (Figure(None),), (Figure(None, "=1"),))
    table = Table(name="t", caption="", columns=(Column(heading="x", number=True),), rows=rows)
    assert as_csv(table) == 'x\nOOM\n""\n\'=1\n'
    assert all("OOM" in write(table) for write in (*FORMATS.values(), as_html))


def test_every_line_of_a_markdown_table_has_the_same_columns():
    lines = [line for line in as_markdown(make_table(EVIL, EVIL)).splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {5}
    assert lines[1] == "|---|---:|---:|---|"
    assert not re.search(r"<\w", as_markdown(make_table(EVIL, EVIL)))


def test_latex_escapes_all_that_it_would_run():
    source = as_latex(make_table(EVIL, EVIL))
    assert source.count(r"\begin{table}") == source.count(r"\end{table}") == 1
    body = source.split(r"\midrule")[1].split(r"\bottomrule")[0]
    assert not re.search(r"(?<!\\)[#%$_]", body.replace("$-$", ""))
    assert r"\textbackslash{}end\{table\}" in body
    assert all(line.count(" & ") == 3 for line in body.strip().splitlines() if line.endswith(r"\\"))
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", source):
        depth += 1 if brace == "{" else -1
        assert depth >= 0
    assert depth == 0


def test_a_letter_with_an_index_is_set_as_one():
    table = replace(make_table("a_b"), columns=(*make_table().columns[:3], Column(heading="d_z")), notes=("d_z: x",))
    assert '<th scope="col">d<sub>z</sub></th>' in as_html(table) and ">d<sub>z</sub>: x</p>" in as_html(table)
    assert "$d_z$" in as_latex(table) and r"a\_b" in as_latex(table), "what stands in a cell is somebody's name"
    assert "d_z" in as_csv(table)


def test_latex_is_in_the_style_of_booktabs():
    source = as_latex(make_table())
    assert r"\begin{tabular}{lrrl}" in source
    assert r"\multicolumn{2}{c}{interval}" in source and r"\cmidrule(lr){2-3}" in source
    assert "$-$1.00" in source, "the minus sign is not in every font"
    assert [source.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
    (spec,) = re.findall(
        r"begin{tabular}{(.*)}",
        as_latex(Table(name="t", caption="", columns=(Column(heading="x"),), rows=(("long " * 20,),))),
    )
    assert re.fullmatch(r">{\\raggedright\\arraybackslash}p{0\.9\d\\linewidth}", spec)


def test_a_table_longer_than_a_page_may_break():
    table = make_table()
    source = as_latex(Table(**{**vars(table), "rows": table.rows * 40}))
    assert r"\begin{longtable}{lrrl}" in source and "{table}" not in source
    assert source.index(r"\caption{") < source.index(r"\endhead") < source.index(r"\end{longtable}")


def test_a_row_that_begins_with_a_bracket_is_no_length_of_the_line_before_it():
    assert r"{}{[}b{]} & " in as_latex(make_table("[b]"))


def test_a_table_without_rows_is_a_table():
    empty = Table(name="t", caption="c", columns=(Column(heading="a"), Column(heading="b", number=True)), rows=())
    assert as_csv(empty) == "a,b\n"
    assert r"\end{tabular}" in as_latex(empty)
    assert "<tbody>" in as_html(empty)
    assert as_markdown(empty).endswith("|---|---:|\n")


def test_columns_that_nothing_fills_are_left_out_and_words_stay():
    table = without_gaps(make_table(""))
    assert [column.heading for column in table.columns] == ["cell", "low", "high", "why"], "one row fills `high`"
    lone = Table(**{**vars(make_table("")), "rows": make_table("").rows[:1]})
    assert [column.heading for column in without_gaps(lone).columns] == ["cell", "low", "why"]
    assert without_gaps(lone).rows == (("", Figure(0.1234567, "+0.12"), ""),)


def test_every_table_is_a_file_in_every_format_and_nothing_lies_beside_them(tmp_path: Path):
    folder = tmp_path / "reports" / "made"
    first = write_tables([make_table("old")], folder)
    again = write_tables([make_table("new \udcff")], folder)
    assert first == again
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"made-up.{ending}" for ending in FORMATS)
    written = {path.suffix: path.read_text(encoding="utf-8") for path in again}
    assert "new ?" in written[".csv"] and "new ?" in written[".md"] and r"new \texttt{U+DCFF}" in written[".tex"]


@pytest.mark.parametrize("name", ["../x", "A", "", ".x", "a b"])
def test_a_name_that_is_no_file_name_is_refused(name: str):
    with pytest.raises(ValueError, match="a table is called"):
        Table(name=name, caption="", columns=(), rows=())


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="2 columns and a row of 1"):
        Table(name="t", caption="", columns=(Column(heading="a"), Column(heading="b")), rows=(("x",),))


def test_a_gap_is_a_dash_where_people_read():
    assert f'<td class="number">{GAP}</td>' in as_html(make_table())
    assert f"| {GAP} |" in as_markdown(make_table())
    assert r" & \textendash{} & " in as_latex(make_table())


#: What pages are called in the first line of a table -> how they are made.
PAGES = {
    "an A4 page with the margins of article": "",
    "a landscape A4 page with margins of at most 25 mm": "\\usepackage[margin=25mm,landscape]{geometry}\n",
}


def compiled(sources: Iterable[str], folder: Path) -> str:
    """What pdflatex said of these tables, each on a page of its own such as it names, with the packages that it names.

    The documents are called page-0.pdf and so on.
    """
    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex here (Debian: apt-get install texlive-latex-base texlive-latex-recommended)")
    by_page: dict[str, list[str]] = {}
    for one in sources:
        by_page.setdefault(PAGES[one.partition("\n")[0].partition("; laid out for ")[2]], []).append(one)
    every = ""
    for number, (geometry, tables) in enumerate(by_page.items()):
        packages = sorted({name for one in tables for name in re.findall(r"usepackage{(.*?)}", one)[0].split(", ")})
        body = "\n\\clearpage\n".join(tables)
        page = f"\\documentclass[a4paper]{{article}}\n{geometry}\\usepackage{{{','.join(packages)}}}\n"
        page += f"\\begin{{document}}\n{body}\n\\end{{document}}\n"
        (folder / f"page-{number}.tex").write_text(page, encoding="utf-8")
        command = ["pdflatex", "-no-shell-escape", "-interaction=nonstopmode", "-halt-on-error", f"page-{number}.tex"]
        for _ in range(2):  # longtable learns its widths from the first
            done = subprocess.run(command, cwd=folder, capture_output=True, timeout=120, check=False)
        said = done.stdout.decode(errors="replace")
        assert done.returncode == 0, said[-2000:]
        every += said
    return every


def too_high(said: str) -> list[str]:
    """What is said of tables that no page holds, and of pages that more stands on than they hold."""
    return re.findall(r"Float too large[^\n]*|Overfull \\vbox \([^\n]*", said)


def too_wide(said: str) -> list[float]:
    """By how many points lines stand out of the page."""
    return [float(points) for points in re.findall(r"Overfull \\hbox \(([\d.]+)pt too wide\)", said)]


WORDS = [
    "50 % of a_b & c #1 $2 ~x ^y \\z {u} [v]",
    f"naïve façade Łódź 中文 😀 µ → ± ≤ {GAP} —",
    "--grid <script>",
    "\x07\x00",
    "?`!`",
]


def test_latex_compiles_whatever_stands_in_a_table(tmp_path: Path):
    tables = [make_table(word, word) for word in [*WORDS, EVIL]]
    tables += [replace(make_table(word), rows=make_table(word).rows * 40, notes=(word,)) for word in WORDS]
    compiled(map(as_latex, tables), tmp_path)
    assert "\\texttt{U+4E2D}" in as_latex(make_table("中"))
    assert "-{}-grid" in as_latex(make_table("--grid")), "two hyphens are no dash"


def test_every_table_of_a_report_and_of_the_published_numbers_compiles_and_fits_a_page(
    make_view: MakeView, tmp_path: Path
):
    evidence = published_evidence()
    tables = [*report_tables(make_view(folds=(1, 2, 3, 4, 5))), *evidence_tables(evidence, ledger(evidence))]
    odd = make_view(folds=(1, 2), dataset="<script> 50% a_b & #1 ^~\\ {x} ±é中", facts=None)
    said = compiled(map(as_latex, [*tables, *report_tables(odd)]), tmp_path)
    assert max(too_wide(said), default=0.0) < 40, "points of a landscape page of 700"
    assert too_high(said) == []
    assert sum(page.stat().st_size for page in tmp_path.glob("page-*.pdf")) > 50_000
