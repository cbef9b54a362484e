"""A table as a value, written as HTML, CSV, Markdown and LaTeX (booktabs), each with the escaping that it needs."""

import contextlib
import csv
import hashlib
import io
import math
import re
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from dashboards.text import GAP, NOT_FINITE
from helix.storage import CorruptObjectError, Storage, file_sha256


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column. Neighbours with the same `group` stand under one heading; `number` sets them to the right.

    `unit`: of its values, which the CSV names in its heading, for it has the values alone.
    """

    heading: str
    number: bool = False
    group: str = ""
    unit: str = ""


@dataclass(frozen=True)
class Figure:
    """A number in a table: how it is shown, and its value, which the CSV has in full.

    None is a gap; what is shown in its place is its name, which the CSV has too. So is a value that is not finite.
    """

    value: float | int | None
    shown: str = GAP


Cell = str | Figure

#: Text of more letters than this wraps in LaTeX.
LATEX_WRAPS = 24


@dataclass(frozen=True)
class Page:
    """A page that tables are laid out for: its text is so many points high; letters in a line of a caption, a note."""

    name: str
    height: float
    caption: int
    note: int


PORTRAIT = Page("an A4 page with the margins of article", 598, 68, 82)
LANDSCAPE = Page("a landscape A4 page with margins of at most 25 mm", 455, 135, 160)

#: (letters in a line, page, size of letters, points from line to line), the best first.
LATEX_LINES = (
    (68, PORTRAIT, "", 12.0),
    (82, PORTRAIT, r"\footnotesize\setlength{\tabcolsep}{3pt}", 9.5),
    (92, PORTRAIT, r"\scriptsize\setlength{\tabcolsep}{3pt}", 8.0),
    (140, LANDSCAPE, r"\footnotesize\setlength{\tabcolsep}{3pt}", 9.5),
    (160, LANDSCAPE, r"\scriptsize\setlength{\tabcolsep}{3pt}", 8.0),
)

#: The file beside the tables of a report that says which they are: name -> sha256.
TABLES_KEPT = "tables.json"

#: A letter with an index, as statistics are named: d_z.
INDEXED = re.compile(r"\b([a-z])(?:_|\\_)([a-z])\b")

#: From line to line of a caption and of a note, and the rules and gaps of a table in LaTeX, in points.
CAPTION_LINE, NOTE_LINE, RULES = 12.0, 9.5, 40.0

#: So much of a page a table may fill by the estimate of its height and yet not break: letters differ in width.
FILLED = 0.9


@dataclass(frozen=True, kw_only=True)
class Table:
    """`name` becomes the name of its files. The first column names its row. `notes` are sentences under the table."""

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.name!r} has {len(self.columns)} columns and a row of {len(row)}: {row}")
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", self.name):
            raise ValueError(f"a table is called {self.name!r}; wanted small letters, digits, '-' and '_'")


def without_gaps(table: Table) -> Table:
    """The same without the columns of numbers in which no row has one."""
    kept = [
        index
        for index, column in enumerate(table.columns)
        if not column.number
        or any(cell.value is not None for row in table.rows if isinstance(cell := row[index], Figure))
    ]
    return replace(
        table,
        columns=tuple(table.columns[index] for index in kept),
        rows=tuple(tuple(row[index] for index in kept) for row in table.rows),
    )


def shown(cell: Cell) -> str:
    """What a person reads in a cell."""
    if isinstance(cell, str):
        return cell
    return cell.shown if cell.value is None or math.isfinite(cell.value) else NOT_FINITE


def as_html(table: Table, classes: str = "") -> Markup:
    """A <table> with caption and scoped headings; everything in it is escaped."""
    head = "".join(
        Markup('<th scope="col"{}>{}</th>').format(_class("number" if column.number else ""), _indexed(column.heading))
        for column in table.columns
    )
    groups = ""
    if any(column.group for column in table.columns):
        spans = "".join(
            Markup('<th colspan="{}" scope="colgroup">{}</th>').format(width, name)
            if name
            else Markup('<td colspan="{}"></td>').format(width)
            for name, width in _groups(table.columns)
        )
        groups = f'<tr class="group">{spans}</tr>'
    rows = []
    for row in table.rows:
        cells = [
            Markup("<td{}>{}</td>").format(_class("number" if column.number else ""), shown(cell))
            if index
            else Markup('<th scope="row">{}</th>').format(shown(cell))
            for index, (column, cell) in enumerate(zip(table.columns, row, strict=True))
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    caption = Markup("<caption>{}</caption>").format(table.caption)
    notes = "".join(Markup('<p class="note">{}</p>').format(_indexed(note)) for note in table.notes)
    body = "\n".join(rows)
    return Markup(
        f'<div class="scroll"><table{_class(classes)}>{caption}<thead>{groups}<tr>{head}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>{notes}"
    )


def as_csv(table: Table) -> str:
    """One line of headings, then values in full; a gap is empty or has its name, as OOM.

    Text that a spreadsheet would run is quoted with '.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    units = [f", {column.unit}" if column.unit else "" for column in table.columns]
    writer.writerow([_csv_text(heading + unit) for heading, unit in zip(_flat_headings(table), units, strict=True)])
    for row in table.rows:
        writer.writerow([_csv_value(cell) for cell in row])
    return out.getvalue()


def as_markdown(table: Table) -> str:
    """A pipe table with its caption above and its notes below."""
    lines = [f"**{_markdown(table.caption)}**", ""]
    lines.append(f"| {' | '.join(map(_markdown, _flat_headings(table)))} |")
    lines.append(f"|{'|'.join('---:' if column.number else '---' for column in table.columns)}|")
    lines += [f"| {' | '.join(_markdown(shown(cell)) for cell in row)} |" for row in table.rows]
    for note in table.notes:
        lines += ["", _markdown(note)]
    return "\n".join(lines) + "\n"


def as_latex(table: Table) -> str:
    """A table in the style of booktabs, which may break over pages where one may be too short; long text wraps.

    It needs no encoding and no package but those it names, and is laid out for the page that its first line names.
    """
    laid = _layout(table)
    spec, size = laid.spec, laid.size
    titles = [f"\\caption{{{_latex(table.caption)}}}", f"\\label{{tab:{table.name}}}"]
    many = laid.height > FILLED * laid.page.height
    packages = ["booktabs", *(["array"] if "p{" in spec else []), *(["longtable"] if many else [])]
    needs = f"% needs \\usepackage{{{', '.join(packages)}}}"
    lines = [f"{needs}; laid out for {laid.page.name}"]
    if many:
        lines += [f"{{{size}", f"\\begin{{longtable}}{{{spec}}}", *titles, r"\\"]
    else:
        lines += ["\\begin{table}", "\\centering", *titles, *filter(None, [size]), f"\\begin{{tabular}}{{{spec}}}"]
    lines.append("\\toprule")
    if any(column.group for column in table.columns):
        cells, rules, at = [], [], 1
        for name, span in _groups(table.columns):
            cells.append(f"\\multicolumn{{{span}}}{{c}}{{{_latex(name)}}}")
            if name:
                rules.append(f"\\cmidrule(lr){{{at}-{at + span - 1}}}")
            at += span
        lines += [" & ".join(cells) + r" \\", "".join(rules)]
    lines.append(" & ".join(_latex_indexed(column.heading) for column in table.columns) + r" \\")
    lines += ["\\midrule", "\\endhead"] if many else ["\\midrule"]
    # A row that begins with a bracket would be taken for the argument of the \\ before it.
    lines += ["{}" + " & ".join(_latex(shown(cell)) for cell in row) + r" \\" for row in table.rows]
    notes = [f"\\par{{\\footnotesize {_latex_indexed(note)}\\par}}" for note in table.notes]
    lines += ["\\bottomrule", *(["\\end{longtable}}", *notes] if many else ["\\end{tabular}", *notes, "\\end{table}"])]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """The columns of a tabular, the size of its letters, the page that is wide enough, and its height in points."""

    spec: str
    size: str
    page: Page
    height: float


def _layout(table: Table) -> _Layout:
    """How a table is set. Its height is an estimate by letters of average width."""

    def widest(index: int) -> int:
        return max(map(len, [table.columns[index].heading, *(shown(row[index]) for row in table.rows)]))

    wraps = {index for index, column in enumerate(table.columns) if not column.number and widest(index) > LATEX_WRAPS}
    narrow = sum(widest(index) + 2 for index in range(len(table.columns)) if index not in wraps)
    wanted = narrow + (LATEX_WRAPS + 2) * len(wraps)
    letters, page, size, line = next((one for one in LATEX_LINES if wanted <= one[0]), LATEX_LINES[-1])
    share = max((letters - narrow) / letters / max(len(wraps), 1) - 0.03, 0.1)
    spec = "".join(
        f">{{\\raggedright\\arraybackslash}}p{{{share:.2f}\\linewidth}}"
        if index in wraps
        else "r"
        if column.number
        else "l"
        for index, column in enumerate(table.columns)
    )

    def high(texts: Sequence[str]) -> int:
        """The lines of a row."""
        return max(_lines(text, share * letters) if index in wraps else 1 for index, text in enumerate(texts))

    rows = [[column.heading for column in table.columns], *([shown(cell) for cell in row] for row in table.rows)]
    lines = sum(map(high, rows)) + any(column.group for column in table.columns)
    height = RULES + line * lines + CAPTION_LINE * _lines(table.caption, page.caption)
    height += NOTE_LINE * sum(_lines(note, page.note) for note in table.notes)
    return _Layout(spec=spec, size=size, page=page, height=height)


def _lines(text: str, letters: float) -> int:
    """The lines of a text in a column of so many letters."""
    return max(len(textwrap.wrap(text, max(int(letters), 1))), 1)


#: Ending of a file -> how a table is written in it.
FORMATS = {"csv": as_csv, "md": as_markdown, "tex": as_latex}


def write_tables(tables: Sequence[Table], folder: Path) -> tuple[Path, ...]:
    """Every table in every format; the files, each replaced in one step by its name and that of its format."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for table in tables:
        for ending, write in FORMATS.items():
            path = folder / f"{table.name}.{ending}"
            aside = path.with_name(f".{path.name}.new")
            aside.write_text(write(table), encoding="utf-8", errors="replace", newline="\n")
            aside.replace(path)
            written.append(path)
    return tuple(written)


def drop_stale(storage: Storage, folder: str, tables: Sequence[Path]) -> None:
    """Remove the tables under `folder` that an earlier report put there and that are no part of this one.

    Which they are is kept beside them, with their checksums: what somebody else put there, or changed, stays.
    """
    key, now = f"{folder}/{TABLES_KEPT}", {path.name: file_sha256(path) for path in tables}
    before: Any = {}
    with contextlib.suppress(CorruptObjectError):  # then nobody knows which were ours, and all of them stay
        before = storage.get_json(key)
    for name, sha256 in before.items() if isinstance(before, dict) else ():
        place = f"{folder}/{name}"
        if name in now or Path(name).suffix.removeprefix(".") not in FORMATS or "/" in name or "\\" in name:
            continue
        with contextlib.suppress(FileNotFoundError):
            if hashlib.sha256(storage.get(place)).hexdigest() == sha256:
                storage.delete(place)
    storage.put_json(key, now)


def _class(names: str) -> Markup:
    return Markup(' class="{}"').format(names) if names else Markup("")


def _indexed(text: str) -> Markup:
    return Markup(INDEXED.sub(r"\1<sub>\2</sub>", str(escape(text))))


def _groups(columns: Sequence[Column]) -> list[tuple[str, int]]:
    return [(name, len(list(found))) for name, found in groupby(columns, key=lambda column: column.group)]


def _flat_headings(table: Table) -> list[str]:
    return [f"{column.group}: {column.heading}" if column.group else column.heading for column in table.columns]


def _csv_value(cell: Cell) -> str:
    if isinstance(cell, str):
        return _csv_text(cell)
    if cell.value is None or not math.isfinite(cell.value):
        return "" if shown(cell) == GAP else _csv_text(shown(cell))
    return repr(cell.value)


def _csv_text(text: str) -> str:
    # A lone return is not quoted by the writer and ends the line for the reader.
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return f"'{lines}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else lines


def _markdown(text: str) -> str:
    flat = " ".join(text.split())
    return str(escape(re.sub(r"([\\`*_{}\[\]|~])", r"\\\1", flat))).replace("&#39;", "'").replace("&#34;", '"')


_LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",  # \textquotedbl needs another encoding of fonts
    "[": "{[}",
    "]": "{]}",
    "\N{MINUS SIGN}": "$-$",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{ALMOST EQUAL TO}": r"$\approx$",
    "\N{TILDE OPERATOR}": r"$\sim$",
    "\N{GREATER-THAN OR EQUAL TO}": r"$\geq$",
    "\N{LESS-THAN OR EQUAL TO}": r"$\leq$",
    "\N{EN DASH}": r"\textendash{}",
    "\N{EM DASH}": r"\textemdash{}",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{LEFT DOUBLE QUOTATION MARK}": "``",
    "\N{RIGHT DOUBLE QUOTATION MARK}": "''",
    "\N{HORIZONTAL ELLIPSIS}": r"\ldots{}",
    "\N{MIDDLE DOT}": r"$\cdot$",
    "\N{MICRO SIGN}": r"$\mu$",
    "\N{GREEK SMALL LETTER MU}": r"$\mu$",
    "\N{RIGHTWARDS ARROW}": r"$\rightarrow$",
    "\N{NOT EQUAL TO}": r"$\neq$",
    "\N{DEGREE SIGN}": r"$^{\circ}$",
    "\N{LATIN SMALL LETTER SHARP S}": r"\ss{}",
}


#: Accents, by the mark that Unicode puts behind the letter.
_ACCENTS = {
    "\N{COMBINING GRAVE ACCENT}": "`",
    "\N{COMBINING ACUTE ACCENT}": "'",
    "\N{COMBINING CIRCUMFLEX ACCENT}": "^",
    "\N{COMBINING TILDE}": "~",
    "\N{COMBINING DIAERESIS}": '"',
    "\N{COMBINING MACRON}": "=",
    "\N{COMBINING DOT ABOVE}": ".",
    "\N{COMBINING CARON}": "v",
    "\N{COMBINING BREVE}": "u",
    "\N{COMBINING DOUBLE ACUTE ACCENT}": "H",
    "\N{COMBINING CEDILLA}": "c",
}


def _latex(text: str) -> str:
    flat = " ".join(text.split())
    return re.sub("-(?=-)", "-{}", "".join(map(_latex_letter, flat)))


def _latex_letter(letter: str) -> str:
    """A letter so that every LaTeX sets it; one that no encoding of its fonts has is told by its number."""
    if letter in _LATEX:
        return _LATEX[letter]
    if " " <= letter <= "\N{TILDE}":
        return letter
    base, mark = (*unicodedata.normalize("NFD", letter), "", "")[:2]
    if base.isascii() and base.isalpha() and mark in _ACCENTS:
        return f"\\{_ACCENTS[mark]}{{{base}}}"
    return rf"\texttt{{U+{ord(letter):04X}}}"


def _latex_indexed(text: str) -> str:
    return INDEXED.sub(r"$\1_\2$", _latex(text))
