"""Tables of metadata (CSV, TSV) read strictly: what cannot be read as meant is a problem with its line, not a guess."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Table:
    """The rows that can be read, as (line number, column -> text), and what is wrong with the others."""

    rows: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_table(path: Path, columns: Sequence[str], *, name: str, delimiter: str = ",", quoted: bool = True) -> Table:
    """The table in the file `path`, whose first line names its columns; `columns` have to be among them.

    `name` is what the problems call the file. A row with more or fewer fields than there are columns, a NUL byte, bytes
    that are no UTF-8 and an unclosed quote are problems. Without `quoted` a quotation mark is a letter like others.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        return Table(problems=[f"{name}: cannot be read: {error.strerror or error}"])
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        return Table(problems=[f"{name} line {line}: has bytes that are no UTF-8 ({data[error.start : error.end]!r})"])
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        return Table(problems=[f"{name} line {line}: has a NUL byte; the file is damaged"])
    lines = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=True,
    )
    rows: list[tuple[int, dict[str, str]]] = []
    problems: list[str] = []
    try:
        header = next(lines, [])
        absent = [column for column in columns if column not in header]
        if absent:
            return Table(problems=[f"{name}: has no column {', '.join(absent)}"])
        twice = sorted({column for column in header if header.count(column) > 1})
        if twice:
            return Table(problems=[f"{name}: has two columns {', '.join(twice)}"])
        for fields in lines:
            if len(fields) == len(header):
                rows.append((lines.line_num, dict(zip(header, fields, strict=True))))
            elif fields:
                problems.append(f"{name} line {lines.line_num}: has {len(fields)} fields; wanted {len(header)}")
    except csv.Error as error:
        problems.append(f"{name} line {lines.line_num}: {error}")
    return Table(rows=rows, problems=problems)
