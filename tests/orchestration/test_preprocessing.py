"""Preparation as a user runs it: over Ray, killed and run again, what is wrong told, what is stored verified."""

import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import ray
import soundfile
from rich.console import Console

from helix.data.dataset import Download
from helix.data.datasets import esc50
from helix.data.shards import find, prepare
from helix.spec import DataSpec
from helix.storage import TEMPORARY, FolderStorage, Storage, open_storage
from orchestration import cli, preprocessing
from orchestration.preprocessing import as_completed, described, prepare_with_ray, prepared_data
from orchestration.progress import LINE_EVERY_S, ProgressDisplay

ROOT = Path(__file__).parents[2]
TONES = DataSpec(dataset="tones", options={"clips_per_class": 24})
COMMAND = "import sys; from orchestration.cli import main; sys.exit(main())"


def contents(root: Path) -> dict[str, bytes]:
    storage = open_storage(str(root))
    return {key: storage.get(key) for key in storage.keys("data")}


@pytest.fixture(autouse=True)
def _at_home(tmp_path, monkeypatch):
    """Commands run in a folder of their own and remember checksums there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("HELIX_STORAGE", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def layout(tmp_path, monkeypatch) -> Path:
    """A complete ESC-50 of one very short clip for each class and fold."""
    monkeypatch.setattr(esc50, "PER_CLASS_AND_FOLD", 1)
    folder = tmp_path / "ESC-50-master"
    (folder / "meta").mkdir(parents=True)
    (folder / "audio").mkdir()
    lines = [",".join(esc50.COLUMNS)]
    for fold in range(1, 6):
        for label, category in enumerate(esc50.CLASSES):
            name = f"{fold}-{fold}{label:02d}-A-{label}.wav"
            lines.append(f"{name},{fold},{label},{category},{fold}{label:02d}")
            soundfile.write(folder / "audio" / name, np.full(16, 1 + label, np.int16), 16_000, subtype="PCM_16")
    (folder / "meta" / "esc50.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def started() -> Iterator[None]:
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The tones as they are prepared without Ray."""
    root = tmp_path_factory.mktemp("whole")
    prepare("tones", TONES.options, source=None, storage=open_storage(str(root)), shard_mib=0.5)
    return contents(root)


@pytest.mark.ray
@pytest.mark.parametrize("workers", [None, 1, 2])
def test_ray_prepares_the_same_bytes_whatever_the_number_of_workers(tmp_path, whole, started, workers):
    seen = []
    prepare_with_ray(
        TONES,
        source=None,
        storage=open_storage(str(tmp_path / "runs")),
        storage_named=True,
        allow_partial=False,
        shard_mib=0.5,
        workers=workers,
        watch=lambda *given: seen.append(given),
    )
    assert contents(tmp_path / "runs") == whole
    assert seen[-1][:3] == ("decoding", 144, 144) and [done for _, done, *_ in seen] == sorted(
        done for _, done, *_ in seen
    )


def _fails(item: int) -> int:
    if item == 3:
        raise OSError(28, "cannot write x to the storage y: No space left on device")
    return item


@pytest.mark.ray
def test_what_a_task_raises_is_raised_as_itself(started):
    preprocessing.connect(storage_named=True)
    assert sorted(as_completed(_fails, [0, 1, 2], at_once=2)) == [0, 1, 2]
    with pytest.raises(OSError, match="cannot write x to the storage y") as caught:
        list(as_completed(_fails, range(6), at_once=2))
    assert type(caught.value) is OSError and caught.value.errno == 28


ALL_FAIL = """
import gc, ray, time
from orchestration.preprocessing import as_completed

def fail(number):
    if number:
        raise OSError(28, f"no space for {number}")

def go():
    for _ in as_completed(fail, range(12), at_once=12):
        time.sleep(4)  # until all have failed

ray.init(num_cpus=4, include_dashboard=False)
try:
    go()
except OSError as error:
    print("refused:", error)
gc.collect()  # Ray tells of an error when nobody can ask for it any more
time.sleep(2)
ray.shutdown()
"""


@pytest.mark.ray
def test_tasks_that_all_fail_are_told_once_and_without_a_traceback():
    done = subprocess.run([sys.executable, "-c", ALL_FAIL], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.count("refused:") == 1 and "no space for" in done.stdout
    assert "Traceback" not in done.stderr + done.stdout and "Unhandled" not in done.stderr


@pytest.mark.ray
def test_the_command_killed_with_its_workers_and_run_again_ends_the_same(tmp_path, whole):
    """SIGKILL to the whole process group once some of the shards are there."""
    command = [sys.executable, "-c", COMMAND, "prepare", "tones", "clips_per_class=24"]
    command += ["--storage", str(tmp_path / "runs"), "--shard-mib", "0.5", "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "runs").rglob("*.bin")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    assert contents(tmp_path / "runs") == whole
    assert "prepared: tones, 144 recordings" in again.stdout


def test_the_command_says_what_is_prepared_and_where(tmp_path, layout, capsys):
    assert cli.main(["prepare", "esc50", "--source", str(layout), "--storage", "runs"]) == 0
    said = capsys.readouterr().out
    for line in (
        "checking the source: 250 of 250 files",
        "decoding: 250 of 250 recordings",
        "prepared: esc50, 250 recordings, 20.8 minutes, 50 classes",
        "recordings  250 of 250",
        "seconds     1250.0, of which 99.98% padding or silence at the end",
        "per class   5 recordings",
        "shards      1, 38.1 MiB",
        f"where       file://{tmp_path}/runs, data/esc50-",
    ):
        assert line in said
    before = contents(tmp_path / "runs")
    assert cli.main(["prepare", "esc50", "--source", str(layout), "--storage", "runs"]) == 0
    assert "decoding" not in capsys.readouterr().out and contents(tmp_path / "runs") == before


def test_the_command_lists_every_bad_file_and_takes_a_quarantine(layout, capsys, tmp_path):
    bad = sorted((layout / "audio").iterdir())[:30]
    for file in bad:
        file.write_bytes(b"")
    given = ["prepare", "esc50", "--source", str(layout)]
    assert cli.main([*given, "--quarantine", "29"]) == 2
    refused = capsys.readouterr().err
    assert all(f"  {file.stem}: audio/{file.name} is empty (0 bytes)\n" in refused for file in bad)
    assert "30 recordings cannot be read, 29 were accepted (--quarantine 30 leaves them out)" in refused
    assert not list(tmp_path.rglob("manifest.json"))
    assert cli.main([*given, "--quarantine", "30"]) == 0
    said = capsys.readouterr().out
    assert "recordings  220 of 250" in said and f"quarantine  {bad[0].stem}: {bad[0].name} is empty" in said
    storage = open_storage("runs")
    recordings = prepared_data(
        DataSpec(dataset="esc50"), source=None, storage=storage, storage_named=True, allow_partial=False, say=print
    )
    assert len(recordings) == 220 and "(30 in quarantine)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prepare", "esc-50"], "unknown data set 'esc-50'; known: "),
        (["prepare", "esc50"], "it needs its files; get them at https://github.com/karolpiczak/ESC-50"),
        (["prepare", "esc50", "--source", "nowhere"], "there is no meta/esc50.csv"),
        (["prepare", "tones", "--source", "."], "tones is made on the fly and takes no --source"),
        (["prepare", "tones", "--shard-mib", "0"], "shard_mib is 0.0; wanted a positive and finite size in MiB"),
        (["prepare", "tones", "--shard-mib", "inf"], "shard_mib is inf; wanted a positive and finite size in MiB"),
        (["prepare", "tones", "--shard-mib", "nan"], "shard_mib is nan; wanted a positive and finite size in MiB"),
        (["prepare", "tones", "--workers", "0"], "workers is 0; wanted 1 or more"),
        (["prepare", "tones", "--quarantine", "-1"], "quarantine is -1; wanted the number of bad files"),
        (["prepare", "tones", "--download"], "tones cannot be downloaded by this command"),
        (["prepare", "tones", "clips_per_class=2"], "clips_per_class is 2; wanted at least one clip"),
        (["prepare", "tones", "--storage", "file/runs"], "cannot write to the storage"),
        (["verify", "esc-50"], "unknown data set 'esc-50'; known: "),
        (["verify", "--storage", "ftp://host/x"], "is not supported"),
    ],
)
def test_bad_input_is_refused_with_what_was_wanted(arguments, said, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert cli.main(arguments) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.rglob("*.bin"))


class _Archive(BaseHTTPRequestHandler):
    data = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.data)))
        self.end_headers()
        self.wfile.write(self.data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


def test_a_download_shows_the_licence_and_is_prepared(tmp_path, layout, monkeypatch, capsys):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as packed:
        packed.add(layout, "ESC-50-master")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("ArchiveHandler", (_Archive,), {"data": archive.getvalue()}))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/esc50"
    monkeypatch.setattr(esc50.Esc50, "downloads", (Download(url=url, name="ESC-50.tar.gz"),))
    try:
        assert cli.main(["prepare", "esc50", "--download"]) == 0
    finally:
        server.shutdown()
        server.server_close()
    said = capsys.readouterr().out
    assert 0 <= said.index("esc50: CC BY-NC 3.0") < said.index(url) < said.index("downloading ESC-50.tar.gz")
    assert "recordings  250 of 250" in said
    assert cli.main(["prepare", "esc50", "--source", str(layout)]) == 0  # the same contents: nothing is new
    assert len(find(open_storage("runs"), "esc50")) == 1
    shards = list((tmp_path / "runs").rglob("*.bin"))
    assert len(shards) == 1


def test_verify_reads_everything_back_and_names_what_is_damaged(layout, capsys):
    assert cli.main(["verify"]) == 0
    assert "nothing is stored in" in capsys.readouterr().out
    for options in ([], ["clips_per_class=4"]):
        assert cli.main(["prepare", "tones", *options]) == 0
    storage = open_storage("runs")
    one, other = (f"data/{name}" for name in storage.children("data"))
    assert cli.main(["verify", "tones"]) == 0
    assert capsys.readouterr().out.count("whole    data/tones-") == 2
    flip(storage, f"{one}/shards/00000.bin")
    flip(storage, f"{one}/index.parquet")
    storage.delete(f"{other}/manifest.json")
    assert cli.main(["verify"]) == 1
    said = capsys.readouterr().out
    assert f"damaged  {one}/shards/00000.bin: is gone or has other bytes" in said
    assert f"damaged  {one}/index.parquet: is gone or has other bytes" in said
    assert f"open     {other}: its preparation was never finished" in said
    assert "helix prepare DATASET --source DIR mends data" in said
    for options in ([], ["clips_per_class=4"]):
        assert cli.main(["prepare", "tones", *options]) == 0
    assert cli.main(["verify", "tones"]) == 0
    assert cli.main(["verify", "esc50"]) == 0


def flip(storage: Storage, key: str, position: int = 100) -> None:
    data = bytearray(storage.get(key))
    data[position] ^= 1
    storage.put(key, bytes(data))


def test_a_display_without_a_terminal_prints_a_line_now_and_then():
    now = [0.0]
    out = io.StringIO()
    with ProgressDisplay(Console(file=out, width=200), clock=lambda: now[0]) as display:
        for done in range(101):
            display.watch("decoding", done, 100, done * 10**6, 10**8)
            now[0] += LINE_EVERY_S / 20
    lines = out.getvalue().splitlines()
    assert lines[0] == "decoding: 20 of 100 recordings, 20 of 100 MB, about 40 s left"
    assert lines[-1] == "decoding: 100 of 100 recordings, 100 of 100 MB" and len(lines) == 5


def test_a_display_on_a_terminal_draws_a_bar():
    out = io.StringIO()
    with ProgressDisplay(Console(file=out, width=120, force_terminal=True)) as display:
        display.watch("decoding", 50, 100, 5 * 10**7, 10**8)
        display.on_bytes("a.tar", 10**6, None)
    assert "50 of 100 recordings, 50 of 100 MB" in out.getvalue() or "downloading a.tar" in out.getvalue()
    assert "━" in out.getvalue()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["tones", "clips_per_class=8"], r"train +\d+ clips in 4 folds, \d clips per class, 0\.0% silence"),
        (["esc50"], r"test +50 clips in 5 folds, 1 clips per class, \d+\.\d% silence"),
    ],
)
def test_the_clips_that_a_set_gives_are_printed_stored_and_verified(layout, tmp_path, capsys, options, said):
    storage = open_storage(str(tmp_path / "runs"))
    source = ["--source", str(layout)] if options[0] == "esc50" else []
    assert cli.main(["prepare", *options, *source, "--storage", str(tmp_path / "runs")]) == 0
    assert re.search(said, capsys.readouterr().out)
    (key,) = storage.keys("facts")
    assert all(fold["train"]["clips"] for fold in storage.get_json(key)["folds"].values())
    assert cli.main(["verify", "--storage", str(tmp_path / "runs")]) == 0
    storage.put_json(key, storage.get_json(key) | {"profile": "fair"})
    assert cli.main(["verify", "--storage", str(tmp_path / "runs")]) == 1
    assert f"{key}: does not match its own checksum" in capsys.readouterr().out


def test_speakers_of_a_set_without_folds_are_told_without_one(tmp_path):
    storage = open_storage(str(tmp_path / "runs"))
    data = DataSpec(dataset="tones", options={"clips_per_class": 8})
    prepared = prepare("tones", data.options, source=None, storage=storage)
    spoken = replace(prepared, manifest=prepared.manifest | {"speakers_per_fold": {"None": 3}})
    assert "speakers    3" in described(storage, spoken)


def test_what_killed_writers_left_goes_with_the_next_success_and_a_living_writers_file_stays(tmp_path):
    """A living writer may have been suspended for hours; its file is its own."""
    storage = FolderStorage(tmp_path / "runs")
    how = {"source": None, "storage": storage, "storage_named": True, "allow_partial": False, "workers": 1}
    shards = storage.path(prepare_with_ray(TONES, **how).prefix) / "shards"
    left, elsewhere = (
        shards / f"{TEMPORARY}left",
        storage.path("data/given-up-0123456789ab/shards") / f"{TEMPORARY}left",
    )
    elsewhere.parent.mkdir(parents=True)
    before = contents(tmp_path / "runs")
    living = storage.writer("data/another/shards/0000.bin")
    living.write(b"half a shard")
    (held,) = storage.path("data/another/shards").iterdir()
    for path in (left, elsewhere, held):
        if path != held:
            path.write_bytes(b"half a shard")
        os.utime(path, (time.time() - 7_200,) * 2)
    prepare_with_ray(TONES, **how)
    assert not left.exists() and not elsewhere.exists() and held.exists()
    assert contents(tmp_path / "runs") == before
    living.keep()
    assert storage.get("data/another/shards/0000.bin") == b"half a shard"
