"""What a reader of cluster/ types and what its timers run: done with stand-ins for sudo and kubectl, and looked at."""

import base64
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from orchestration import cli
from orchestration.options import sweep_parser
from tests.cluster.validators import CLUSTER, load_all

README, KUBERAY = CLUSTER / "README.md", CLUSTER / "kuberay" / "README.md"
READMES = pytest.mark.parametrize("readme", [README, KUBERAY], ids=["aws", "kuberay"])


def commands(readme: Path) -> str:
    """The indented lines of a README, with those that go on in the next joined."""
    lines = [line.strip() for line in readme.read_text().splitlines() if line.startswith("    ")]
    return re.sub(r"\\\n", " ", "\n".join(lines))


def stand_in(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def run(script: str, home: Path, given: str = "") -> None:
    env = {"PATH": f"{home / 'bin'}:/usr/bin:/bin", "HOME": str(home), "OUT": str(home / "out")}
    command = ["bash", "-c", f"umask 022; set -e -o pipefail; {script}"]
    subprocess.run(command, env=env, cwd=home / "work", input=given, text=True, check=True)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name in ("bin", "work", "out"):
        (tmp_path / name).mkdir()
    return tmp_path


def submitted_by_the_unit(home: Path) -> list[str]:
    """The words of ExecStart as systemd.service(5) makes them of the environment file that the README writes."""
    (block,) = re.findall(
        r"^printf '%s\\n' PATH=.*?\|\s*sudo tee /etc/helix/schedule\.env$", commands(README), re.M | re.S
    )
    stand_in(home / "bin", "sudo", 'test "$1" = tee && cat >"$OUT/$(basename "$2")"')
    run(block, home)
    lines = (home / "out" / "schedule.env").read_text().splitlines()
    assert not any(mark in line for line in lines for mark in "\"'\\$#"), (
        "what systemd would read otherwise than as it stands"
    )
    values = dict(line.split("=", 1) for line in lines)
    unit = (CLUSTER / "helix-schedule.service").read_text()
    (command,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    words: list[str] = []
    for word in shlex.split(command):
        if word.startswith("$") and not word.startswith("${"):
            words += values[word[1:]].split()
        else:
            words.append(re.sub(r"\$\{(\w+)\}", lambda found: values[found[1]], word))
    return words


def grids_run(home: Path) -> dict[str, list[list[str]]]:
    """For each file, the arguments of sweep.py and schedule.py in it."""
    found = {
        path.name: [shlex.split(document["spec"].get("jobTemplate", document["spec"])["entrypoint"])[2:]]
        for path in sorted((CLUSTER / "kuberay").glob("*.yaml"))
        for document in load_all(path)
        if document["kind"] in ("RayJob", "RayCronJob")
    }
    for readme in sorted(CLUSTER.rglob("README.md")):
        lines = re.findall(r"python orchestration/(?:sweep|schedule)\.py (--.*)", commands(readme))
        found[str(readme.relative_to(CLUSTER))] = [shlex.split(line) for line in lines]
    words = submitted_by_the_unit(home)
    found["helix-schedule.service"] = [words[words.index("orchestration/schedule.py") + 1 :]]
    return found


def test_whatever_runs_the_esc50_grid_on_a_cluster_trains_it_on_gpus(home: Path):
    found = grids_run(home)
    counts = {name: len(runs) for name, runs in found.items() if runs}
    assert counts == {
        "rayjob.yaml": 1,
        "raycronjob.yaml": 1,
        "helix-schedule.service": 1,
        "README.md": 2,
        "kuberay/README.md": 1,
    }
    for name, runs in found.items():
        for arguments in runs:
            options = sweep_parser("schedule.py").parse_intermixed_args(arguments)
            assert (options.grid, options.device) == ("esc50", "cuda"), name


def test_the_unit_submits_the_code_and_options_that_the_environment_file_names(home: Path):
    words = submitted_by_the_unit(home)
    assert words[words.index("--working-dir") + 1] == "s3://example-helix/code/helix.zip"
    options = ["--grid", "esc50", "--device", "cuda"]
    assert words[words.index("--") + 1 :] == ["python", "orchestration/schedule.py", *options]
    assert f"`HELIX_SWEEP_OPTIONS={' '.join(options)}`" in README.read_text()


@READMES
def test_the_data_set_is_put_where_the_sweeps_look_before_the_first_of_them(
    readme: Path, capsys: pytest.CaptureFixture[str]
):
    text = commands(readme)
    (line,) = re.findall(r"^\.venv/bin/helix (prepare .*)$", text, re.MULTILINE)
    assert text.index(line) < text.index("sweep.py --grid esc50")
    words = shlex.split(line)
    with pytest.raises(SystemExit):
        cli.main(["prepare", "--help"])
    known = capsys.readouterr().out
    assert words[1] == "esc50" and all(word in known for word in words if word.startswith("--"))
    written = words[words.index("--storage") + 1]
    files = "".join((CLUSTER / name).read_text() for name in ("aws.yaml", "kuberay/raycluster.yaml"))
    read = set(re.findall(r"HELIX_STORAGE(?:=|, value: )([\w:/.-]+)", files))
    assert read == {written}


@pytest.mark.parametrize("before", [None, 0o644])
def test_the_token_of_the_cluster_is_kept_for_its_owner_alone(home: Path, before: int | None):
    if before is not None:
        (home / ".ray").mkdir(mode=0o755)
        (home / ".ray" / "auth_token").write_text("a longer token of another cluster")
        (home / ".ray" / "auth_token").chmod(before)
    stand_in(home / "bin", "kubectl", f"printf %s {base64.b64encode(b'the token').decode()}")
    (block,) = re.findall(r"^install -d .*\n.*auth_token$", commands(KUBERAY), re.MULTILINE)
    run(block, home)
    token = home / ".ray" / "auth_token"
    assert token.read_text() == "the token"
    assert (token.stat().st_mode & 0o777, token.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_the_password_for_mlflow_reaches_kubernetes_through_no_file_and_no_argument(home: Path):
    stand_in(home / "bin", "kubectl", 'printf "%s\\n" "$@" >"$OUT/arguments"; cat /dev/stdin >"$OUT/stdin"')
    (block,) = re.findall(r"^IFS= read .*?^unset PASSWORD$", commands(KUBERAY), re.MULTILINE | re.DOTALL)
    password = r" it's \a %s password "
    run(block, home, given=f"{password}\n")
    assert (home / "out" / "stdin").read_text() == password
    arguments = (home / "out" / "arguments").read_text()
    assert password.strip() not in arguments and "--from-file=password=/dev/stdin" in arguments
    assert list((home / "work").iterdir()) == []
