"""An error is said in one line, also where it has no words of its own."""

import pytest

from helix.errors import first_line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("CUDA error: misaligned address\nSearch for it ..."), "CUDA error: misaligned address"),
        (ValueError("\n  the second  \n"), "the second"),
        (RuntimeError(""), "RuntimeError"),
        (MemoryError(), "MemoryError"),
        (AssertionError(" \n"), "AssertionError"),
    ],
    ids=repr,
)
def test_an_error_is_said_in_one_line(error: Exception, said: str):
    assert first_line(error) == said
