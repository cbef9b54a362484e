"""The code that ran, as its attempts record it: from git, from who started it, and never guessed."""

import shutil
import subprocess
from pathlib import Path

import pytest

from orchestration import lineage
from orchestration.lineage import (
    PACKAGES,
    UNKNOWN,
    checkout,
    code_facts,
    code_like,
    constraints_sha256,
    source_sha256,
    told,
)


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A folder with the packages, one file each, and pinned versions."""
    for package in PACKAGES:
        (tmp_path / "house" / package).mkdir(parents=True)
        (tmp_path / "house" / package / "__init__.py").write_text(f'"""{package}."""\n')
    (tmp_path / "house" / "constraints.txt").write_text("numpy==2.4.6\n")
    return tmp_path / "house"


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    return subprocess.run(
        ["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def committed(house: Path) -> Path:
    git(house, "init", "-q")
    git(house, "add", "-A")
    git(house, "commit", "-qm", "first")
    return house


def test_a_checkout_is_its_commit_and_clean_until_a_tracked_file_changes(committed: Path):
    found = checkout(committed)
    assert found is not None
    assert (found.commit, found.dirty) == (git(committed, "rev-parse", "HEAD"), False)
    (committed / "notes.txt").write_text("of no consequence")
    assert checkout(committed) == found
    (committed / "helix" / "__init__.py").write_text('"""changed"""\n')
    changed = checkout(committed)
    assert changed is not None and changed.dirty and changed.commit == found.commit


def test_code_that_lies_inside_a_checkout_of_something_else_has_no_commit(committed: Path):
    inner = committed / "lib" / "python"
    shutil.copytree(committed / "orchestration", inner / "orchestration")
    assert checkout(inner) is None


def test_no_checkout_is_no_commit(house: Path):
    assert checkout(house) is None


def packages(folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in PACKAGES}


def test_the_hash_follows_every_byte_and_name_of_the_code_and_nothing_else(house: Path, tmp_path: Path):
    before = source_sha256(packages(house))
    shutil.copytree(house, tmp_path / "elsewhere")
    shutil.move(tmp_path / "elsewhere" / "dashboards", tmp_path / "unpacked")
    apart = packages(tmp_path / "elsewhere") | {"dashboards": tmp_path / "unpacked"}
    (tmp_path / "elsewhere" / "README.md").write_text("words")
    (tmp_path / "elsewhere" / "helix" / "__pycache__").mkdir()
    (tmp_path / "elsewhere" / "helix" / "__pycache__" / "x.pyc").write_bytes(b"x")
    assert source_sha256(apart) == before
    (house / "helix" / "__init__.py").rename(house / "helix" / "other.py")
    renamed = source_sha256(packages(house))
    (house / "helix" / "other.py").write_text("1\n")
    assert len({before, renamed, source_sha256(packages(house))}) == 3


def test_the_pinned_versions_have_a_hash_or_are_not_there(house: Path):
    before = constraints_sha256(house)
    (house / "constraints.txt").write_text("numpy==2.4.7\n")
    assert before != constraints_sha256(house) is not None
    (house / "constraints.txt").unlink()
    assert constraints_sha256(house) is None


@pytest.mark.parametrize("text", [None, "", "main", "v1.0", "abc", "0123456++", "$(id)"])
def test_what_is_no_commit_is_not_taken_for_one(text: str | None):
    assert told(text) is None


def test_a_job_without_a_checkout_says_what_it_was_told_or_that_it_does_not_know(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lineage, "checkout", lambda: None)
    monkeypatch.setenv("HELIX_COMMIT", "0123456789abcdef+")
    code_facts.cache_clear()
    said = code_facts()
    assert (said["commit"], said["dirty"]) == ("0123456789abcdef", True)
    monkeypatch.delenv("HELIX_COMMIT")
    code_facts.cache_clear()
    unknown = code_facts()
    assert (unknown["commit"], unknown["dirty"]) == (UNKNOWN, UNKNOWN)
    assert unknown["source_sha256"] == said["source_sha256"] == source_sha256()
    code_facts.cache_clear()


def test_a_worker_without_a_checkout_has_the_commit_of_a_driver_with_the_same_files(monkeypatch: pytest.MonkeyPatch):
    driver = {"commit": "a" * 40, "dirty": False, "source_sha256": source_sha256(), "constraints_sha256": "c" * 64}
    here = code_facts()
    assert code_like(None) == here
    bare = here | {"commit": UNKNOWN, "dirty": UNKNOWN, "constraints_sha256": UNKNOWN}
    monkeypatch.setattr(lineage, "code_facts", lambda: bare)
    assert code_like(driver) == driver
    assert code_like(driver | {"source_sha256": "0" * 64}) == bare
    known = bare | {"commit": "b" * 40, "dirty": True}
    monkeypatch.setattr(lineage, "code_facts", lambda: known)
    assert code_like(driver) == driver | {"commit": "b" * 40, "dirty": True}
