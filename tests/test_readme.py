"""What the README tells people to type is typed here, and what it says about the repository is looked up."""

import csv
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from helix.bench import read_options
from helix.registry import BENCHES, BLOCKS, DATASETS, GRIDS
from orchestration import cli, sweep
from orchestration.asked import put_asked
from orchestration.options import sweep_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(
    r"^    (?:\.venv/bin/)?(python orchestration/sweep\.py .*?|helix .*?)(?:\s+#.*)?$", README, re.MULTILINE
)


@pytest.fixture
def esc50(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The official layout of ESC-50 in the working directory, complete and without sound: a plan decodes nothing."""
    monkeypatch.chdir(tmp_path)
    audio, meta = tmp_path / "ESC-50-master" / "audio", tmp_path / "ESC-50-master" / "meta"
    audio.mkdir(parents=True)
    meta.mkdir()
    classes = DATASETS.make("esc50").classes
    with (meta / "esc50.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["filename", "fold", "target", "category", "esc10", "src_file", "take"])
        for number in range(2000):
            fold, label = number % 5 + 1, number // 5 % 50
            name = f"{fold}-{100000 + number}-A-{label}.wav"
            (audio / name).write_bytes(b"RIFF")
            rows.writerow([name, fold, label, classes[label], False, 100000 + number, "A"])


def test_the_readme_has_commands_to_try():
    assert len(COMMANDS) >= 5
    assert any("--grid esc50" in command for command in COMMANDS)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("python")])
def test_every_sweep_of_the_readme_can_be_planned(command: str, esc50: None, capsys: pytest.CaptureFixture[str]):
    arguments = shlex.split(command)[2:]
    assert sweep.main([*arguments, *([] if "--dry-run" in arguments else ["--dry-run"])]) == 0
    name = arguments[arguments.index("--grid") + 1]
    assert f"{name}: " in capsys.readouterr().out


REPORTS = [command for command in COMMANDS if command.startswith("helix report --grid")]


@pytest.mark.parametrize("command", [command for command in REPORTS if "--from-mlflow" in command])
def test_the_report_from_mlflow_of_the_readme_asks_for_an_mlflow(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert cli.main(shlex.split(command)[1:]) == sweep.REFUSED
    assert "runs/mlflow.db is no database" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [command for command in REPORTS if "--from-mlflow" not in command])
def test_every_report_of_the_readme_is_written_once_a_sweep_was_asked_for(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(command)[1:]) == sweep.REFUSED
    assert "nothing of a sweep is stored" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    options = sweep_parser().parse_intermixed_args(["--grid", "demo"])
    planned = sweep.plan_sweep(options, command=["sweep.py", "--grid", "demo"], console=sweep.console())
    assert planned is not None
    put_asked(planned.storage, planned.snapshot.asked)
    assert cli.main(shlex.split(command)[1:]) == sweep.SOME_FAILED  # nothing is trained here, and the report says so
    assert (tmp_path / "runs" / "reports" / "demo.html").exists()


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("helix report --pub")])
def test_the_report_of_the_published_numbers_is_written(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(command)[1:]) == 0
    assert (tmp_path / "runs" / "reports" / "published.html").exists()


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("helix doctor")])
def test_every_doctor_of_the_readme_finds_this_environment_well(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(command)[1:]) == 0


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("helix bench")])
def test_every_bench_of_the_readme_is_there(command: str):
    name, *options = shlex.split(command)[2:]
    assert BENCHES.make(name, read_options(name, options))


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("helix status")])
def test_every_status_of_the_readme_says_that_nothing_was_asked_yet(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(command)[1:]) == sweep.REFUSED
    assert "nothing of a sweep is stored" in capsys.readouterr().err


def test_every_helix_command_of_the_readme_is_one_of_those_above():
    verbs = {command.split()[1] for command in COMMANDS if command.startswith("helix")}
    assert verbs <= {"report", "prepare", "verify", "doctor", "bench", "status"}


@pytest.mark.parametrize("target", ["sweep", "test", "check", "golden"])
def test_the_make_targets_exist(target: str):
    assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True).returncode == 0


def test_every_entry_of_the_tree_exists_and_every_module_is_in_it():
    tree = README.partition("## The tree")[2].partition("## How to add")[0]
    named = set(re.findall(r"[\w/]+\.py", tree))
    for folder in ("helix", "orchestration"):
        modules = {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
        assert modules <= named, modules - named
    folders = ("helix", "orchestration", "cluster", "dashboards", "tests")
    there = {path.name for folder in folders for path in (ROOT / folder).rglob("*.py")}
    assert {Path(name).name for name in named} <= there


def test_the_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README + (ROOT / "CONTRIBUTING.md").read_text())
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_the_members_it_names_are_there():
    assert {"demo", "esc50"} <= set(GRIDS.names())
    assert {"tones", "esc50"} <= set(DATASETS.names())
    assert {"mamba", "attention"} <= set(BLOCKS.names())
