"""How numbers, durations and gaps are written wherever people read them: one voice for the report and the terminal."""

import math
import re
from datetime import UTC, datetime

from dashboards.view import Spent

#: What stands where there is nothing to say: no result yet, no spread of a single fold, no published number.
GAP = "\N{EN DASH}"

#: What stands for nan and infinity, which are no measurement.
NOT_FINITE = "not finite"

MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"

#: The control characters, C0 without tab and newline, DEL and C1.
CONTROL = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f]")

SELECTION_WORDS = {
    "best_test": "best test epoch",
    "last": "last epoch",
    "validation": "epoch chosen by validation",
}

STD_WORDS = {
    "population": "population standard deviation (divided by n)",
    "sample": f"sample standard deviation (divided by n {MINUS} 1)",
}


def number(value: float | None, form: str) -> str:
    """A number as `form` writes it, a gap, or that it is not finite."""
    if value is None or not math.isfinite(value):
        return GAP if value is None else NOT_FINITE
    said = format(value, form)
    if not said.startswith("-"):
        return said
    # what is rounded to 0 has no sign
    return said.replace("-", MINUS, 1) if any(digit in said for digit in "123456789") else said[1:]


def percent(fraction: float | None, digits: int = 2) -> str:
    """0.551 -> "55.10"; the unit stands in the heading."""
    return number(None if fraction is None else 100 * fraction, f".{digits}f")


def points(difference: float | None, digits: int = 2) -> str:
    """A difference of two fractions in percentage points with its sign: 0.0135 -> "+1.35"."""
    if difference is None or not math.isfinite(difference):
        return number(difference, "")
    value = round(100 * difference, digits)
    sign = "+" if value > 0 else MINUS if value < 0 else ""
    return f"{sign}{abs(value):.{digits}f}"


def mean_std(mean: float | None, std: float | None) -> str:
    """ "55.10 ± 3.33"; a single fold has no spread: "55.10 ± –"."""
    return GAP if mean is None else f"{percent(mean)} ± {percent(std)}"


def count(value: float | None) -> str:
    """6394162 -> "6,394,162"."""
    return number(value, ",.0f")


def millions(value: int | None) -> str:
    """6394162 -> "6.394 M"; small models are written out."""
    if value is None or value < 1_000_000:
        return count(value)
    return f"{value / 1e6:.3f} M"


def plural(number: int, word: str, many: str = "") -> str:
    """(1, "fold") -> "1 fold"; (2, "fold") -> "2 folds"."""
    return f"{number:,} {word if number == 1 else many or word + 's'}"


def listing(words: list[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def shortened(text: str, most: int) -> str:
    """A text of at most `most` characters: cut after a word, where one ends in its second half, and marked as cut."""
    if len(text) <= most:
        return text
    head = text[: most - 1]
    at = most - 1 if text[most - 1].isspace() else head.rfind(" ")
    return f"{(head[:at] if at > most // 2 else head).rstrip()}\N{HORIZONTAL ELLIPSIS}"


def printable(text: str) -> str:
    """A text that was read from a storage, as a terminal may get it: without what would command it, as escapes do."""
    return CONTROL.sub("", text)


def slug(name: str) -> str:
    """A name as part of the name of a file: small letters, digits, "-" and "_"."""
    return "".join(char if char.isascii() and (char.isalnum() or char in "-_") else "-" for char in name.lower())


def duration(seconds: float | None) -> str:
    """Two units at most: "8 s", "3 min 05 s", "2 h 40 min", "3 d 04 h"."""
    if seconds is None or not math.isfinite(seconds):
        return number(seconds, "")
    if 0 < seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(max(seconds, 0))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(whole / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(whole / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def cost_line(spent: Spent) -> str:
    """ "3.20 GPU-hours, $1.28, of which $0.10 for lost work; 0.50 h have no price (unknown instance type)"."""
    work = f"{spent.gpu_hours:.2f} GPU-hours" if spent.gpu_hours else f"{spent.hours:.2f} worker-hours"
    lost = f"{spent.lost_hours:.2f} h of it lost" if spent.lost_hours >= 0.005 else ""
    if spent.unpriced_hours >= spent.hours:
        said = [work, lost, f"not priced ({'; '.join(spent.unpriced)})"]
        return ", ".join(filter(None, said))
    dollars = f"${spent.usd:,.2f}" + (f", of which ${spent.lost_usd:,.2f} for lost work" if spent.lost_usd else "")
    rest = f"; {spent.unpriced_hours:.2f} h have no price ({'; '.join(spent.unpriced)})" if spent.unpriced_hours else ""
    return f"{work}, {dollars}{rest}"


def moment(unix_seconds: float) -> str:
    """Unix seconds as a time in UTC: the reader may be anywhere."""
    return datetime.fromtimestamp(unix_seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
