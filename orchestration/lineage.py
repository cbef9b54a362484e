"""Which code runs here: its git commit, whether it was changed since, a hash of its files, and of the pinned versions.

A worker records this with each attempt. In a Ray job or an image there is no .git; whoever starts it may then say the
commit in HELIX_COMMIT. Nobody saying it is "unknown" and no guess: the hash of the files tells two codes apart anyway.
"""

import functools
import hashlib
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: The folder that holds the packages, whose files are what runs.
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("helix", "orchestration", "dashboards")
CONSTRAINTS = ROOT / "constraints.txt"

#: A commit as 7 to 64 hex digits, with "+" where files were changed since.
COMMIT_VARIABLE = "HELIX_COMMIT"

UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Checkout:
    """A git commit, and whether tracked files differ from it."""

    commit: str
    dirty: bool


def checkout(root: Path = ROOT) -> Checkout | None:
    """The git checkout whose tracked files lie in `root`; None where this code is in none."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    # A package that is installed inside somebody else's checkout is not part of it.
    tracked, head = git("ls-files", "--error-unmatch", f"{PACKAGES[0]}/__init__.py"), git("rev-parse", "HEAD")
    if not tracked or not head:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no")
    return None if changed is None else Checkout(commit=head, dirty=bool(changed))


def told(text: str | None) -> Checkout | None:
    """What HELIX_COMMIT says; None where it says nothing or no commit."""
    found = re.fullmatch(r"([0-9a-f]{7,64})(\+?)", (text or "").strip())
    return None if found is None else Checkout(commit=found[1], dirty=bool(found[2]))


def source_sha256(root: Path = ROOT) -> str:
    """The sha256 over names and bytes of the Python files of the packages in `root`."""
    digest = hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        digest.update(
            f"{path.relative_to(root).as_posix()}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
        )
    return digest.hexdigest()


def constraints_sha256(root: Path = ROOT) -> str | None:
    """The sha256 of constraints.txt; None where it did not travel with the code."""
    path = root / CONSTRAINTS.name
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


@functools.cache
def code_facts() -> dict[str, Any]:
    """What an attempt records of the code that runs it: as it was when this process first asked."""
    known = checkout() or told(os.environ.get(COMMIT_VARIABLE))
    return {
        "commit": known.commit if known else UNKNOWN,
        "dirty": known.dirty if known else UNKNOWN,
        "source_sha256": source_sha256(),
        "constraints_sha256": constraints_sha256() or UNKNOWN,
    }
