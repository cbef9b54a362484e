"""Prints what pyproject.toml asks for, a line each: the dependencies, then those of the extras that are named."""

import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def requirements(extras: Sequence[str], pyproject: Path = PYPROJECT) -> list[str]:
    """Raises ValueError for an extra that is not there."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    known = project["optional-dependencies"]
    for extra in extras:
        if extra not in known:
            raise ValueError(f"unknown extra {extra!r}; known: {', '.join(sorted(known))}")
    return [*project["dependencies"], *(line for extra in extras for line in known[extra])]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))  # noqa: T201
