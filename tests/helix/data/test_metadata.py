"""Tables: a row is read as it was meant, or named."""

import gzip

import pytest

from helix.data.metadata import read_lines, read_table


def table(tmp_path, data: bytes, **how):
    path = tmp_path / "t.csv"
    path.write_bytes(data)
    return read_table(path, ["name", "fold"], name="meta/t.csv", **how)


def test_rows_come_with_their_line(tmp_path):
    found = table(tmp_path, b'\xef\xbb\xbfname,other,fold\r\na,"x, y",1\r\n\r\nb,,2\r\n')
    assert found.problems == []
    assert found.rows == [
        (2, {"name": "a", "other": "x, y", "fold": "1"}),
        (4, {"name": "b", "other": "", "fold": "2"}),
    ]


def test_a_separator_of_lines_in_unicode_separates_no_rows(tmp_path):
    assert table(tmp_path, "name,fold\na\u2028b\x0bc,1\n".encode()).rows == [
        (2, {"name": "a\u2028b\x0bc", "fold": "1"})
    ]


def test_tabs_and_quotes_that_mean_nothing(tmp_path):
    assert table(tmp_path, b'name\tfold\na"b\t1\n', delimiter="\t", quoted=False).rows[0][1]["name"] == 'a"b'


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "meta/t.csv: has no column name, fold"),
        (b"name,folds\na,1\n", "meta/t.csv: has no column fold"),
        (b"name,fold,name\na,1,b\n", "meta/t.csv: has two columns name"),
        (b"name,fold\na,1\nb\n", "meta/t.csv line 3: has 1 field; wanted 2"),
        (b"name,fold\na,1,2\n", "meta/t.csv line 2: has 3 fields; wanted 2"),
        (b"name,fold\na,1\nb\xff,1\n", r"meta/t.csv line 3: has bytes that are no UTF-8 (b'\xff')"),
        (b"name,fold\na,1\n\0b,1\n", "meta/t.csv line 3: has a NUL byte; the file is damaged"),
        (
            b'name,fold\n"a,1\n',
            "meta/t.csv line 2: unexpected end of data (a quote is not closed, or it is closed too early)",
        ),
        (b"\xff,fold\na,1\n", r"meta/t.csv line 1: has bytes that are no UTF-8 (b'\xff')"),
    ],
)
def test_what_cannot_be_read_as_meant_is_named_with_its_line(tmp_path, data, said):
    assert table(tmp_path, data).problems == [said]


def test_a_bad_row_does_not_hide_the_good_ones(tmp_path):
    found = table(tmp_path, b"name,fold\na,1\nb\nc,3\n")
    assert [row["name"] for _, row in found.rows] == ["a", "c"] and len(found.problems) == 1


def test_a_table_that_is_not_there_is_named(tmp_path):
    found = read_table(tmp_path / "gone.csv", ["name"], name="meta/gone.csv")
    assert found.problems == ["meta/gone.csv: cannot be read: No such file or directory"]


def test_an_unclosed_quote_swallows_no_other_row(tmp_path):
    found = table(tmp_path, b'name,fold\na,1\n"b,2\nc,3\n"d"e,4\nf,5\n')
    assert [(line, row["name"]) for line, row in found.rows] == [(2, "a"), (4, "c"), (6, "f")]
    assert [problem.partition(":")[0] for problem in found.problems] == ["meta/t.csv line 3", "meta/t.csv line 5"]


def test_every_damaged_line_is_named_and_not_the_first_alone(tmp_path):
    found = table(tmp_path, b"name,fold\n\xffa,1\nb,2\n\xfe\xfe,3\nc\0,4\nd,5,6\n")
    assert [problem.partition(":")[0] for problem in found.problems] == [
        f"meta/t.csv line {line}" for line in (2, 4, 5, 6)
    ]
    assert [row["name"] for _, row in found.rows] == ["b"]


def test_a_folder_in_the_place_of_a_table_is_named(tmp_path):
    assert read_table(tmp_path, ["name"], name="t.csv").problems == ["t.csv: cannot be read: Is a directory"]


def test_a_packed_table_is_unpacked_and_one_that_is_cut_off_is_named(tmp_path):
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(b"name,fold\na,1\n"))
    assert read_table(path, ["name"], name="t").rows == [(2, {"name": "a", "fold": "1"})]
    path.write_bytes(path.read_bytes()[:-9])
    (problem,) = read_table(path, ["name"], name="t").problems
    assert problem.startswith("t: cannot be read to its end: ")
    path.write_bytes(b"name,fold\n")
    assert "cannot be read to its end" in read_table(path, ["name"], name="t").problems[0]


def test_lines_come_with_their_numbers_and_without_their_ends(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("a\u2028b\r\n\r\n".encode() + b"\xff\nc")
    found = read_lines(path, name="list.txt")
    assert found.lines == [(1, "a\u2028b"), (2, ""), (4, "c")]
    assert found.problems == [r"list.txt line 3: has bytes that are no UTF-8 (b'\xff')"]
