"""Tables and lists of metadata read strictly: what cannot be read as meant is a problem with its line, not a guess.

One row is one line. A quoted field that goes over several lines is refused: no set has one, and an unclosed quote would
swallow the rows after it.
"""

import csv
import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Lines:
    """The lines that can be read, as (number, text) from 1 on, and what is wrong with the others."""

    lines: list[tuple[int, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Table:
    """The rows that can be read, as (line number, column -> text), and what is wrong with the others."""

    rows: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_lines(path: Path, *, name: str) -> Lines:
    """The lines of the text file `path`, without their ends; one called .gz is unpacked.

    `name` is what the problems call the file. Bytes that are no UTF-8 and a NUL byte are problems of their line, a file
    that cannot be read to its end is one problem and no lines.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        return Lines(problems=[f"{name}: cannot be read to its end: {error}"])
    except OSError as error:
        return Lines(problems=[f"{name}: cannot be read: {error.strerror or error}"])
    lines: list[tuple[int, str]] = []
    problems: list[str] = []
    # Of bytes, splitlines knows the ends of lines alone; of text it would also part at separators within a field.
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            problems.append(f"{name} line {number}: has bytes that are no UTF-8 ({line[error.start : error.end]!r})")
            continue
        if "\0" in text:
            problems.append(f"{name} line {number}: has a NUL byte; the file is damaged")
        else:
            lines.append((number, text))
    return Lines(lines=lines, problems=problems)


def read_table(path: Path, columns: Sequence[str], *, name: str, delimiter: str = ",", quoted: bool = True) -> Table:
    """The table in the file `path`, whose first line names its columns; `columns` have to be among them.

    A row with more or fewer fields than there are columns and an unclosed quote are problems, beside those of
    `read_lines`. Without `quoted` a quotation mark is a letter like others.
    """
    found = read_lines(path, name=name)
    problems = list(found.problems)
    if not found.lines and problems:
        return Table(problems=problems)
    parsed: list[tuple[int, list[str]]] = []
    for number, line in found.lines:
        try:
            fields = next(
                csv.reader(
                    [line],
                    delimiter=delimiter,
                    quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
                    strict=True,
                ),
                [],
            )
        except csv.Error as error:
            problems.append(f"{name} line {number}: {error} (a quote is not closed, or it is closed too early)")
            continue
        if fields or number == 1:
            parsed.append((number, fields))
    if not parsed or parsed[0][0] != 1:
        return Table(problems=problems or [f"{name}: has no column {', '.join(columns)}"])
    header = parsed[0][1]
    absent = [column for column in columns if column not in header]
    if absent:
        return Table(problems=[f"{name}: has no column {', '.join(absent)}", *problems])
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        return Table(problems=[f"{name}: has two columns {', '.join(twice)}", *problems])
    rows: list[tuple[int, dict[str, str]]] = []
    for number, fields in parsed[1:]:
        if len(fields) == len(header):
            rows.append((number, dict(zip(header, fields, strict=True))))
        else:
            count = f"{len(fields)} field{'' if len(fields) == 1 else 's'}"
            problems.append(f"{name} line {number}: has {count}; wanted {len(header)}")
    return Table(rows=rows, problems=problems)
