"""What a source's files are: read again wherever there is doubt, and not read again where there is none."""

import hashlib
import os
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from helix.data import sources
from helix.data.sources import is_unchanged, read_content, read_contents


def write(path: Path, value: int, *, age_s: float = 100.0) -> Path:
    """A second of a constant at 8 kHz; files differ in no more than the samples' value."""
    soundfile.write(path, np.full(8_000, value, np.int16), 8_000, subtype="PCM_16")
    then = time.time() - age_s
    os.utime(path, (then, then))
    return path


def rested(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the files had been at rest for long: the time of a file's last change cannot be set back."""
    monkeypatch.setattr(sources, "RESTING_NS", -(10**9))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read from now on."""
    read: list[str] = []

    def reading(path: Path) -> sources.Content:
        read.append(path.name)
        return read_content(path)

    monkeypatch.setattr(sources, "read_content", reading)
    return read


def test_a_content_is_the_bytes_and_what_the_header_promises(tmp_path):
    path = write(tmp_path / "a.wav", 1)
    content = read_content(path)
    assert content.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert content.bytes == path.stat().st_size and content.seconds == 1.0


def test_what_cannot_be_read_has_no_content(tmp_path):
    (tmp_path / "page.wav").write_text("<html>")
    assert read_content(tmp_path / "gone.wav").sha256 is None
    assert read_content(tmp_path).sha256 is None
    assert read_content(tmp_path / "page.wav").seconds == 0.0


def test_many_files_are_read_and_reported(tmp_path):
    names = [write(tmp_path / f"{number:03d}.wav", number).name for number in range(100)]
    heard = []
    contents = read_contents(tmp_path, reversed(names), on_read=lambda *given: heard.append(given))
    assert list(contents) == names and len(heard) == 100
    assert all(contents[name] == read_content(tmp_path / name) for name in names)


def test_a_file_that_was_just_written_is_always_read_again(tmp_path, monkeypatch):
    """Its times of change are too young to tell: an old time of modification alone proves nothing."""
    path = write(tmp_path / "a.wav", 1)
    content = read_content(path)
    read = counted(monkeypatch)
    assert content.stamp is None and is_unchanged(path, content)
    assert read == ["a.wav"]


def test_a_change_is_seen_although_size_and_time_are_the_same(tmp_path, monkeypatch):
    rested(monkeypatch)
    path = write(tmp_path / "a.wav", 1)
    content, before = read_content(path), path.stat()
    assert is_unchanged(path, content)
    write(path, 2)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert not is_unchanged(path, content)
    path.unlink()
    assert not is_unchanged(path, content)


def test_what_was_remembered_is_not_read_again_unless_it_changed(tmp_path, monkeypatch):
    rested(monkeypatch)
    source = tmp_path / "source"
    source.mkdir()
    names = [write(source / f"{number}.wav", number).name for number in range(4)]
    first = read_contents(source, names, checksums=tmp_path / "checksums")
    read = counted(monkeypatch)
    assert read_contents(source, names, checksums=tmp_path / "checksums") == first and read == []
    write(source / "2.wav", 9)
    assert read_contents(source, names, checksums=tmp_path / "checksums")["2.wav"] != first["2.wav"]
    assert set(read) == {"2.wav"}


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"files": {"a.wav": 3}}', None])
def test_a_memory_that_is_damaged_remembers_nothing(tmp_path, monkeypatch, damage):
    rested(monkeypatch)
    (tmp_path / "source").mkdir()
    write(tmp_path / "source" / "a.wav", 1)
    wanted = read_contents(tmp_path / "source", ["a.wav"], checksums=tmp_path / "checksums")
    (memory,) = (tmp_path / "checksums").iterdir()
    memory.write_bytes(memory.read_bytes().replace(b'"a.wav":["', b'"a.wav":["0') if damage is None else damage)
    assert read_contents(tmp_path / "source", ["a.wav"], checksums=tmp_path / "checksums") == wanted


def test_a_memory_that_cannot_be_kept_is_no_trouble(tmp_path, monkeypatch):
    rested(monkeypatch)
    write(tmp_path / "a.wav", 1)
    (tmp_path / "file").write_text("in the way")
    assert read_contents(tmp_path, ["a.wav"], checksums=tmp_path / "file" / "checksums")["a.wav"].sha256
