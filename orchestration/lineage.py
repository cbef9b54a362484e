"""Which code runs here: its git commit, whether it was changed since, a hash of its files, and of the pinned versions.

A worker records this with each attempt. Where its code came through Ray or in an image there is no .git: then it is the
commit that HELIX_COMMIT says, or that of the driver if the two have the same files. Nobody knowing it is "unknown" and
no guess: the hash of the files tells two codes apart anyway.
"""

import functools
import hashlib
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dashboards
import helix
import orchestration

#: The packages whose files are what runs. Ray may have unpacked each into a folder of its own.
PACKAGES = {module.__name__: Path(str(module.__file__)).parent for module in (dashboards, helix, orchestration)}
#: The folder that holds all of them in a checkout and in a job.
ROOT = Path(__file__).resolve().parents[1]
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
    tracked, head = git("ls-files", "--error-unmatch", "orchestration/__init__.py"), git("rev-parse", "HEAD")
    if not tracked or not head:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no")
    return None if changed is None else Checkout(commit=head, dirty=bool(changed))


def told(text: str | None) -> Checkout | None:
    """What HELIX_COMMIT says; None where it says nothing or no commit."""
    found = re.fullmatch(r"([0-9a-f]{7,64})(\+?)", (text or "").strip())
    return None if found is None else Checkout(commit=found[1], dirty=bool(found[2]))


def source_sha256(packages: Mapping[str, Path] = PACKAGES) -> str:
    """The sha256 over names and bytes of the Python files of some packages, wherever they lie."""
    digest = hashlib.sha256()
    for package, folder in sorted(packages.items()):
        for path in sorted(folder.rglob("*.py")):
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{package}/{path.relative_to(folder).as_posix()}\0{sha256}\n".encode())
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


def code_like(driver: Mapping[str, Any] | None) -> dict[str, Any]:
    """What an attempt records; `driver` has the facts of the process that sent the work: equal files, equal commit."""
    facts = code_facts()
    if driver is None or driver["source_sha256"] != facts["source_sha256"]:
        return facts
    return {key: driver[key] if value == UNKNOWN else value for key, value in facts.items()}
