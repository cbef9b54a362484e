"""How texts are cut to a length."""

import pytest

from dashboards.text import shortened


@pytest.mark.parametrize(
    ("text", "most", "wanted"),
    [
        ("it fits", 7, "it fits"),
        ("it does not fit", 11, "it does\N{HORIZONTAL ELLIPSIS}"),
        ("it does not fit", 12, "it does not\N{HORIZONTAL ELLIPSIS}"),
        ("a word:/that/is/longer/than/half", 12, "a word:/tha\N{HORIZONTAL ELLIPSIS}"),
    ],
)
def test_what_is_too_long_is_cut_at_a_word_and_says_so(text: str, most: int, wanted: str):
    assert shortened(text, most) == wanted
    assert len(wanted) <= most
