"""Tables: a row is read as it was meant, or named."""

import pytest

from helix.data.metadata import read_table


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
        (b"name,fold\na,1\nb\n", "meta/t.csv line 3: has 1 fields; wanted 2"),
        (b"name,fold\na,1,2\n", "meta/t.csv line 2: has 3 fields; wanted 2"),
        (b"name,fold\na,1\nb\xff,1\n", r"meta/t.csv line 3: has bytes that are no UTF-8 (b'\xff')"),
        (b"name,fold\na,1\n\0b,1\n", "meta/t.csv line 3: has a NUL byte; the file is damaged"),
        (b'name,fold\n"a,1\n', "meta/t.csv line 2: unexpected end of data"),
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
