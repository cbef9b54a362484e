"""What an error says in one line, for a log, a note or a row of a table."""


def first_line(error: BaseException) -> str:
    """The first line of its text that is not blank; the name of its type where there is none."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


def in_one_line(error: BaseException) -> str:
    """Its type and its first line."""
    said, kind = first_line(error), type(error).__name__
    return said if said == kind else f"{kind}: {said}"
