"""The doctor tells what works from what does not, goes on where a check breaks, and ends with a code for scripts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helix import doctor
from helix.doctor import Asked, Check, examine, exit_code, main, verdict
from helix.registry import CHECKS, Registry

ROOT = Path(__file__).resolve().parents[2]


def check(status: doctor.Status, *, needed: bool) -> Check:
    return Check(name="heart", status=status, found="beats", advice="", needed=needed)


@pytest.fixture
def one_check(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Only the check that a test registers."""
    registry: Registry = Registry("check", "helix.registry")
    monkeypatch.setattr(doctor, "CHECKS", registry)
    return registry


@pytest.mark.parametrize(
    ("checks", "code"),
    [
        ([check("ok", needed=True)], 0),
        ([check("warn", needed=True), check("absent", needed=True)], 0),
        ([check("fail", needed=False)], 0),
        ([check("ok", needed=True), check("fail", needed=True)], 1),
    ],
)
def test_the_exit_code_is_1_only_where_something_needed_fails(checks: list[Check], code: int):
    assert exit_code(checks) == code
    assert verdict(checks).startswith("a sweep cannot run here" if code else "a sweep can run here")


def test_a_check_that_breaks_is_a_finding_and_stops_no_other(one_check: Registry):
    def breaks(_):
        raise RuntimeError("no pulse")

    one_check.register("a")(breaks)
    one_check.register("b")(lambda _: [check("ok", needed=True)])
    broken, well = examine(Asked(storage="runs"))
    assert (broken.name, broken.status) == ("a", "fail")
    assert "no pulse" in broken.found
    assert well.status == "ok"


def test_what_a_terminal_shows_is_all_that_was_found(one_check: Registry, capsys: pytest.CaptureFixture):
    found = Check(name="lungs", status="fail", found="[dry] air", advice="open [a] window", needed=True)
    one_check.register("lungs")(lambda _: [found])
    assert main([]) == 1
    said = capsys.readouterr().out
    for text in ("lungs", "fail", "[dry] air", "open [a] window", "a sweep cannot run here: 1 fail"):
        assert text in said


def test_json_is_the_same_checks(one_check: Registry, capsys: pytest.CaptureFixture):
    one_check.register("heart")(lambda _: [check("warn", needed=False)])
    assert main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"name": "heart", "status": "warn", "found": "beats", "advice": "", "needed": False}
    ]


def test_every_check_that_is_not_well_says_what_to_do(tmp_path: Path):
    checks = examine(Asked(storage=str(tmp_path / "runs")))
    assert {c.name for c in checks if c.status in ("fail", "warn", "absent") and not c.advice} == set()
    assert exit_code(checks) == 0, "this environment runs the tests, so a sweep can run in it"
    assert len({c.name for c in checks}) == len(checks) > len(CHECKS.names())


@pytest.mark.parametrize(
    ("setting", "row", "status", "says"),
    [
        ({"NUMBA_DISABLE_JIT": "1"}, "scan numba on cpu", "fail", "unset NUMBA_DISABLE_JIT"),
        ({"HELIX_SCAN": "abacus"}, "scan on cpu: choice", "fail", "unset HELIX_SCAN"),
    ],
)
def test_a_setting_that_slows_or_stops_the_scan_is_named(setting, row, status, says, tmp_path: Path):
    command = [sys.executable, "-m", "helix.doctor", "--json", "--storage", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **setting}, capture_output=True, text=True, check=False)
    rows = {found["name"]: found for found in json.loads(done.stdout)}
    assert rows[row]["status"] == status
    assert says in rows[row]["advice"]
    assert done.returncode == (1 if rows[row]["needed"] else 0)


def test_the_doctor_sees_patients_without_ray_and_mlflow(tmp_path: Path):
    script = (
        "import sys; sys.modules['ray'] = sys.modules['mlflow'] = None\n"
        f"from helix import doctor; sys.exit(doctor.main(['--json', '--storage', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"ray", "mlflow"} <= {found["name"] for found in json.loads(done.stdout)}
